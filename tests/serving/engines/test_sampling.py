"""What a request asks of the next token, against transformers' own logits processors and against plain arithmetic."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raylm.config.serving import ServingSection
from raylm.serving.engines.base import EngineRefusal, SamplingParameters
from raylm.serving.engines.client import Engine, start_engine
from raylm.serving.engines.sampling import Sampler

PROMPT = [5, 6, 7, 9]
DRAWS = 4000


def logits_of(size: int = 40) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3)) * 2


def shares(parameters: SamplingParameters, logits: torch.Tensor, before: list[int] | None = None) -> torch.Tensor:
    """How often each token is drawn behind the prompt and ``before``."""
    sampler = Sampler(parameters, frozenset({1}), prompt=PROMPT)
    for token in before or []:
        sampler.account(token)
    counts = Counter(sampler.draw(logits) for _ in range(DRAWS))
    return torch.tensor([counts[token] / DRAWS for token in range(len(logits))])


@pytest.mark.parametrize(
    ("asked", "processors"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"temperature": 0.5, "min_p": 0.1}, [TemperatureLogitsWarper(0.5), MinPLogitsWarper(0.1)]),
        ({"top_k": 6, "top_p": 0.6}, [TopKLogitsWarper(6), TopPLogitsWarper(0.6)]),
        (
            {"min_p": 0.05, "top_k": 6, "top_p": 0.8},
            [MinPLogitsWarper(0.05), TopKLogitsWarper(6), TopPLogitsWarper(0.8)],
        ),
        ({"repetition_penalty": 3.0}, [RepetitionPenaltyLogitsProcessor(3.0)]),
        ({"repetition_penalty": 0.5, "top_k": 8}, [RepetitionPenaltyLogitsProcessor(0.5), TopKLogitsWarper(8)]),
        ({"min_tokens": 4}, [MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, [1])]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else len(value),
)
def test_shares_are_those_of_transformers(asked: dict[str, Any], processors: list[Any]) -> None:
    logits, before = logits_of(), [20, 21]
    logits[1] = 4.0  # the end token is likely
    ids = torch.tensor([PROMPT + before])
    expected = LogitsProcessorList(processors)(ids, logits[None].clone())[0].softmax(dim=-1)
    found = shares(SamplingParameters(10, **asked), logits, before)
    # Five standard deviations of a share.
    assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-6).all())
    # What may not come does not.
    assert set(found.nonzero()[:, 0].tolist()) <= set(expected.nonzero()[:, 0].tolist())


def test_biases_are_added_and_penalties_taken_away() -> None:
    logits = logits_of()
    parameters = SamplingParameters(
        10, presence_penalty=0.5, frequency_penalty=1.0, logit_bias=((3, 6.0), (int(logits.argmax()), -100.0))
    )
    expected = logits.clone()
    expected[3] += 6.0
    expected[int(logits.argmax())] -= 100.0
    expected[20] -= 0.5 + 2 * 1.0
    expected = expected.softmax(dim=-1)
    found = shares(parameters, logits, [20, 20])
    assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-6).all())
    assert float(logits[3]) == float(logits_of()[3]), "the model's logits are its own"


def test_ends() -> None:
    model_ends = frozenset({1})

    def reasons(**asked: Any) -> list[str | None]:
        sampler = Sampler(SamplingParameters(9, **asked), model_ends)
        return [sampler.account(token) for token in (5, 1, 8)]

    assert reasons() == [None, "stop", None]
    assert reasons(ignore_eos=True) == [None, None, None]
    assert reasons(stop_token_ids=(8,)) == [None, "stop", "stop"]
    assert reasons(stop_token_ids=(8,), ignore_eos=True) == [None, None, "stop"]
    likely = torch.zeros(20)
    likely[[1, 8]] = 50.0
    sampler = Sampler(SamplingParameters(9, temperature=0, min_tokens=2, stop_token_ids=(8,)), model_ends)
    drawn = []
    for _ in range(3):
        drawn.append(sampler.draw(likely))
        sampler.account(drawn[-1])
    assert drawn == [0, 0, 1]


def test_no_token_at_all_is_refused() -> None:
    """A sample of no probability would end the engine."""
    sampler = Sampler(SamplingParameters(9, min_tokens=1, stop_token_ids=tuple(range(20))), frozenset())
    with pytest.raises(EngineRefusal, match="min_tokens: the text must end here"):
        sampler.draw(torch.zeros(20))


def test_penalties_of_any_size_leave_probabilities() -> None:
    for penalty in (1e-6, 1e6):
        for temperature in (1e-3, 2.0):
            sampler = Sampler(
                SamplingParameters(9, temperature=temperature, repetition_penalty=penalty), frozenset(), prompt=PROMPT
            )
            assert 0 <= sampler.draw(logits_of() * 1e4) < 40


@pytest.fixture(scope="module", params=["transformers", "openvino"])
def engine(request: pytest.FixtureRequest, exported_model: Path) -> Iterator[Engine]:
    engine = start_engine(str(exported_model), ServingSection(engine=request.param), threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(exported_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(exported_model)


def texts(engine: Engine, *wanted: SamplingParameters) -> list[list[int]]:
    async def one(parameters: SamplingParameters) -> list[int]:
        return [token async for piece in engine.submit(PROMPT, parameters) for token in piece]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*map(one, wanted))

    return asyncio.run(together())


def next_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("asked", [{"top_k": 3}, {"min_p": 0.9}])
def test_engines_draw_from_likely_tokens_only(engine: Engine, model: PreTrainedModel, asked: dict[str, Any]) -> None:
    probabilities = next_logits(model, PROMPT).softmax(dim=-1)
    # 8-bit weights may change places of what is nearly as likely.
    slack = 1.0 if engine.name == "transformers" else 0.9
    least = float(probabilities.topk(3).values[-1]) if "top_k" in asked else 0.9 * float(probabilities.max())
    found = texts(engine, *(SamplingParameters(1, temperature=1.0, seed=seed, **asked) for seed in range(60)))
    drawn = {tokens[0] for tokens in found}
    assert len(drawn) > 1
    assert all(float(probabilities[token]) >= least * slack for token in drawn)
    free = texts(engine, *(SamplingParameters(1, temperature=1.0, seed=seed) for seed in range(60)))
    assert len({tokens[0] for tokens in free}) > len(drawn)


def test_engines_penalize_what_the_prompt_has(engine: Engine, model: PreTrainedModel) -> None:
    """OpenVINO's pipeline too changes the tokens of the prompt, and not only what was generated."""
    (tokens,) = texts(engine, SamplingParameters(30, temperature=0, repetition_penalty=1.5))
    ids = torch.tensor([PROMPT])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(ids, **options, repetition_penalty=1.5)[0, len(PROMPT) :].tolist()
    if engine.name == "transformers":
        assert tokens == expected
    place = next((at for at, (one, other) in enumerate(zip(tokens, expected, strict=False)) if one != other), None)
    if place is not None:
        # 8-bit weights: where the texts part, both tokens are about as likely.
        before = PROMPT + tokens[:place]
        logits = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([before]), next_logits(model, before)[None])[0]
        assert math.isclose(float(logits[tokens[place]]), float(logits[expected[place]]), rel_tol=0.1)


def test_engines_end_at_the_named_token_and_not_before_the_least_number(engine: Engine) -> None:
    (plain,) = texts(engine, SamplingParameters(20, temperature=0, ignore_eos=True))
    assert len(plain) == 20
    stop = plain[6]
    place = plain.index(stop)
    (ended,) = texts(engine, SamplingParameters(20, temperature=0, ignore_eos=True, stop_token_ids=(stop,)))
    assert ended == plain[: place + 1]
    least = place + 3
    (longer,) = texts(
        engine, SamplingParameters(20, temperature=0, ignore_eos=True, stop_token_ids=(stop,), min_tokens=least)
    )
    assert stop not in longer[:least]
    assert len(longer) >= least


def test_a_bias_decides_or_is_refused(engine: Engine) -> None:
    if engine.name == "openvino":
        with pytest.raises(EngineRefusal, match=r"logit_bias: the engine openvino has none; serving\.engine: "):
            texts(engine, SamplingParameters(4, logit_bias=((33, 100.0),)))
    else:
        assert texts(engine, SamplingParameters(4, logit_bias=((33, 100.0),))) == [[33] * 4]
