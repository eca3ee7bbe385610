"""Prompts that cannot fit are refused before they are tokenized, and long ones are tokenized off the event loop."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from raylm.data.loading import load_tokenizer
from raylm.serving.deploy.service import ModelService
from raylm.serving.engines.stats import EngineStats
from raylm.serving.http.errors import RequestError
from raylm.serving.retrieval.store import Match, Passage
from raylm.serving.tasks.answering import fit_prompt
from raylm.serving.tasks.prompts import MOST_INLINE, encode_messages, encode_prompts, longest_token, token_ids

CONTEXT = 256
TEXT = "the quick brown fox jumps over the lazy dog <|user|> é 中 \x00 " * 200


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


def service(tokenizer: PreTrainedTokenizerBase, context: int | None = CONTEXT, capacity: int = 8) -> ModelService:
    """A model whose engine is asked for its load alone."""
    engine: Any = SimpleNamespace(name="none", stats=EngineStats.nothing)
    return ModelService("model", engine, tokenizer, context, 16, capacity)


def test_long_texts_have_the_ids_of_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(TEXT) > MOST_INLINE
    for special in (True, False):
        assert (
            token_ids(tokenizer, TEXT, special=special)
            == (tokenizer(TEXT, add_special_tokens=special, verbose=False)["input_ids"])
        )


def test_what_fits_is_never_refused_and_what_cannot_is(tokenizer: PreTrainedTokenizerBase) -> None:
    longest = longest_token(tokenizer)
    # The vocabulary's longest: <|endoftext|> and <|assistant|>.
    assert longest == 13
    fits = "<|endoftext|>" * CONTEXT
    assert asyncio.run(encode_prompts(service(tokenizer), [fits])) == [[0] * CONTEXT]
    with pytest.raises(RequestError, match="3328 characters at most can fit into, but prompt has 3329"):
        asyncio.run(encode_prompts(service(tokenizer), [fits + "a"]))
    with pytest.raises(RequestError, match="maximum context length is 256 tokens, but the text has 257"):
        asyncio.run(encode_prompts(service(tokenizer), [[5] * 257]))
    with pytest.raises(RequestError, match="characters at most can fit into, but messages has"):
        asyncio.run(encode_messages(service(tokenizer), [{"role": "user", "content": "a" * 4000}]))


def test_no_bound_is_claimed_where_text_may_be_in_no_token(tokenizer: PreTrainedTokenizerBase) -> None:
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Strip()
    assert longest_token(tokenizer) is None
    backend.normalizer = normalizers.Sequence([])
    assert longest_token(tokenizer) is None
    backend.normalizer = None
    assert longest_token(tokenizer) == 13
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert longest_token(tokenizer) is None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_tokens([AddedToken("<wide>", lstrip=True)])
    assert longest_token(tokenizer) is None


def test_a_long_prompt_leaves_the_event_loop_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    async def lag() -> tuple[float, int]:
        asked = asyncio.create_task(encode_prompts(service(tokenizer, context=None), ["ab 中" * 100_000]))
        worst, seen = 0.0, time.monotonic()
        while not asked.done():
            await asyncio.sleep(0.005)
            worst, seen = max(worst, time.monotonic() - seen), time.monotonic()
        return worst, len((await asked)[0])

    worst, tokens = asyncio.run(lag())
    assert tokens > 100_000
    assert worst < 0.25


def test_long_prompts_in_work_count_for_the_queue(tokenizer: PreTrainedTokenizerBase) -> None:
    async def ask() -> list[Any]:
        asked = service(tokenizer, context=None, capacity=2)
        long = ["ab 中" * 10_000]
        found = await asyncio.gather(*(encode_prompts(asked, long) for _ in range(3)), return_exceptions=True)
        # They have left the queue again.
        assert asked.text_work.texts == 0
        return found

    *done, refused = asyncio.run(ask())
    assert all(isinstance(ids, list) for ids in done)
    assert isinstance(refused, RequestError)
    assert refused.status == 503


def test_a_context_of_megabytes_is_cut_in_a_moment(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    given = Passage("context", "", "the quick brown fox " * 200_000, start=0, end=4_000_000)
    began = time.monotonic()
    prompt, used = fit_prompt(service(tokenizer), "where?", [Match(given, 1.0, 1.0)], 16)
    assert time.monotonic() - began < 2
    assert CONTEXT - 40 < len(prompt) <= CONTEXT - 16
    assert used == 1
