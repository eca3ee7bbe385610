"""N-gram models against a plain computation of the same papers, and as transformers models like any other."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from raylm.errors import UserError
from raylm.models.families import find_family
from raylm.models.families.build import build_config
from raylm.models.families.ngram import NgramConfig, NgramForCausalLM, count
from raylm.models.loading import load_model

END, VOCABULARY = 0, 12


def documents(seed: int = 0, number: int = 80) -> list[list[int]]:
    """Random walks: each token is mostly one of three that may follow the one before it."""
    random = np.random.default_rng(seed)
    return [
        [int(token) for token in np.cumsum(random.choice([1, 2, 5], random.integers(1, 30))) % (VOCABULARY - 2) + 1]
        for _ in range(number)
    ]


def stream(texts: list[list[int]]) -> np.ndarray:
    return np.array([END, *(token for text in texts for token in [*text, END])])


def counted(
    order: int, smoothing: str = "modified_kneser_ney", texts: list[list[int]] | None = None
) -> NgramForCausalLM:
    config = NgramConfig(
        vocab_size=VOCABULARY, order=order, smoothing=smoothing, bos_token_id=END, eos_token_id=END, pad_token_id=END
    )
    return count(config, stream(documents() if texts is None else texts))


class Plain:
    """The same model by dictionaries, a sentence and an n-gram at a time."""

    def __init__(self, texts: list[list[int]], order: int, smoothing: str) -> None:
        self.order, self.smoothing = order, smoothing
        grams: list[Counter] = [Counter() for _ in range(order + 1)]
        for text in texts:
            padded = (END, *text, END)
            for length in range(1, order + 1):
                grams[length].update(padded[i : i + length] for i in range(len(padded) - length + 1))
        grams[1][(END,)] -= len(texts)  # the beginning is never predicted
        self.counts = grams
        if smoothing == "modified_kneser_ney":
            for length in range(1, order):
                after: Counter = Counter(gram[1:] for gram in grams[length + 1])
                self.counts[length] = Counter(
                    {
                        gram: seen if gram[0] == END and length > 1 else after[gram]
                        for gram, seen in grams[length].items()
                        if after[gram] or (gram[0] == END and length > 1)
                    }
                )
        self.discounts = [self.discount(counts) for counts in self.counts]

    def discount(self, counts: Counter) -> list[float]:
        n = [sum(seen == k for seen in counts.values()) for k in range(5)]
        found = [0.0, 0.5, 1.0, 1.5]
        if all(n[1:]):
            share = n[1] / (n[1] + 2 * n[2])
            estimated = [k - (k + 1) * share * n[k + 1] / n[k] for k in (1, 2, 3)]
            if min(estimated) > 0:
                found[1:] = estimated
        return found

    def probability(self, context: tuple[int, ...], token: int) -> float:
        if len(context) == 0 and self.order == 0:
            return 1 / VOCABULARY
        lower = 1 / VOCABULARY if not context else self.probability(context[1:], token)
        counts = self.counts[len(context) + 1]
        here = {gram[-1]: seen for gram, seen in counts.items() if gram[:-1] == context and seen}
        if not here:
            return lower
        total = sum(here.values())
        if self.smoothing == "witten_bell":
            return (here.get(token, 0) + len(here) * lower) / (total + len(here))
        discounts = self.discounts[len(context) + 1]
        left = sum(min(discounts[min(seen, 3)], seen) for seen in here.values())
        seen = here.get(token, 0)
        return (seen - min(discounts[min(seen, 3)], seen)) / total + left / total * lower

    def after(self, text: list[int]) -> tuple[int, ...]:
        """The longest context that was seen, of the end of ``text``, which begins with an end of text."""
        context = tuple(text)[-(self.order - 1) :] if self.order > 1 else ()
        while context and not any(gram[:-1] == context for gram in self.counts[len(context) + 1]):
            context = context[1:]
        return context


@pytest.mark.parametrize("smoothing", ["modified_kneser_ney", "witten_bell"])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_a_plain_computation(order: int, smoothing: str) -> None:
    plain, model = Plain(documents(), order, smoothing), counted(order, smoothing)
    for text in documents(seed=1, number=12):
        ids = [END, *text]
        with torch.inference_mode():
            found = model(torch.tensor([ids])).logits[0].exp()
        torch.testing.assert_close(found.sum(-1), torch.ones(len(ids)), atol=1e-6, rtol=0)
        for place in range(len(ids)):
            context = plain.after(ids[: place + 1])
            expected = [plain.probability(context, token) for token in range(VOCABULARY)]
            assert found[place].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_corpus_without_the_counts_for_three_discounts_has_one() -> None:
    model = counted(3, texts=[[1, 2, 3], [1, 2, 4]])
    with torch.inference_mode():
        found = model(torch.tensor([[END, 1, 2]])).logits[0].exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(3), atol=1e-6, rtol=0)
    # Of two continuations after 1 2, seen once each, half a count is left to the lower order.
    assert found[2, 3] == pytest.approx(found[2, 4].item())
    assert 0.25 < found[2, 3] < 0.5


def test_no_token_depends_on_padding_or_on_the_document_before() -> None:
    model = counted(4)
    ids, other = [3, 4, 5, 6], [9, 8, 7]
    with torch.inference_mode():
        alone = model(torch.tensor([[END, *ids]])).logits[0]
        after = model(torch.tensor([[*other, END, *ids]])).logits[0, len(other) :]
        padded = torch.tensor([[END] * 3 + ids, [1, 2, 3, *ids]])
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
        batch = model(padded, attention_mask=mask).logits
        bare = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(after, alone, rtol=0, atol=0)
    torch.testing.assert_close(batch[0, 3:], bare, rtol=0, atol=0)


def test_a_cache_gives_what_the_whole_text_gives() -> None:
    model, ids = counted(4), torch.tensor([[END, 3, 4, 9, 10, 1], [2, 4, 6, 7, 8, 3]])
    with torch.inference_mode():
        whole = model(ids)
        assert whole.past_key_values is None
        cache = DynamicCache()
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 2), (2, 3), (3, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=0, atol=0)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": END, "eos_token_id": None}
    for row in ids:
        one = row[None]
        assert (
            model.generate(one, use_cache=True, **settings).tolist()
            == model.generate(one, use_cache=False, **settings).tolist()
        )
    beams = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, **settings)
    assert beams.shape == (2, 18)


def test_labels_are_those_of_any_causal_model() -> None:
    model, ids = counted(3), torch.tensor([[END, 3, 4, 9]])
    with torch.inference_mode():
        output = model(ids, labels=ids)
        expected = -output.logits[0, :-1].gather(-1, ids[0, 1:, None]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert math.isfinite(output.loss.item())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model, ids = counted(3), torch.tensor([[END, 3, 4, 9]])
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path).eval()
    assert isinstance(again, NgramForCausalLM)
    assert {name: values.dtype for name, values in again.state_dict().items()} == {
        name: values.dtype for name, values in model.state_dict().items()
    }
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    half = load_model(tmp_path, dtype=torch.bfloat16)
    assert half.unigrams.dtype == torch.float32


class Tokenizer:
    bos_token_id = eos_token_id = pad_token_id = END

    def __len__(self) -> int:
        return VOCABULARY


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": 0}, "model.config.order: found 0, allowed: an integer from 1"),
        ({"order": 9}, "model.config.order: found 9, allowed: an integer from 1 to 8"),
        ({"order": "3"}, "model.config.order: found 3, allowed: an integer"),
        ({"smoothing": "laplace"}, "smoothing: found 'laplace', allowed: modified_kneser_ney, witten_bell"),
        ({"ordre": 3}, "model.config.ordre: no such key in the ngram configuration; did you mean 'order'?"),
        ({"table_sizes": [3]}, "model.config.table_sizes: no such key"),
    ],
)
def test_bad_configurations_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        build_config("ngram", values, Tokenizer(), 32)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="order: found 3, allowed: fewer than the 3 training tokens"):
        counted(3, texts=[[5]])


def test_transformers_knows_the_family_once_it_was_asked_for() -> None:
    from transformers import AutoConfig

    assert find_family("ngram") is not None
    assert isinstance(AutoConfig.for_model("ngram"), NgramConfig)
