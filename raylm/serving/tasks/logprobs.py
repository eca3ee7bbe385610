"""Log-probabilities of what was asked and answered, as OpenAI's objects: the model reads the whole text once more.

Reading again instead of keeping what sampling saw makes them the same for every engine, at the cost of one more prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raylm.serving.deploy.service import ModelService
from raylm.serving.engines.base import TokenScores
from raylm.serving.engines.deadline import all_in_time
from raylm.serving.tasks.text import IncrementalDecoder

# To name a token takes about as long as to tokenize so many characters.
CHARACTERS_PER_NAME = 8


async def score(service: ModelService, texts: Sequence[Sequence[int]], top: int) -> list[TokenScores]:
    """Scores of each text, one text after the other: who else scores has a turn between them.

    Args:
        texts: token ids.
        top: likeliest tokens to name at each place; one is named always.

    Raises:
        EngineTimeout: all together take longer than a request may.
        EngineFailure: the engine has stopped, or a text cannot be read.
    """

    async def one_by_one() -> list[TokenScores]:
        return [await service.engine.score(ids, max(top, 1)) for ids in texts]

    (scores,) = await all_in_time([one_by_one()], service.request_seconds)
    return scores


async def completion_logprobs(
    service: ModelService, prompt: Sequence[int], tokens: Sequence[int], top: int, *, echo: bool
) -> dict[str, Any]:
    """The ``logprobs`` object of a completion.

    Args:
        prompt: ids of the prompt, at least one.
        tokens: ids that follow it.
        top: likeliest tokens to name at each place.
        echo: name the prompt's tokens too; the first one has no probability.
    """
    ids = [*prompt, *tokens]
    (scores,) = await score(service, [ids], top)
    return await describe(service, scores, ids, 0 if echo else len(prompt), top)


async def describe(
    service: ModelService, scores: TokenScores, ids: Sequence[int], first: int, top: int
) -> dict[str, Any]:
    """The ``logprobs`` object of the tokens from place ``first`` on.

    Args:
        scores: ``chosen`` of all ``ids`` after the first one.
        top: likeliest tokens to name at each place.
    """
    # Each name is a call of the tokenizer: a long text with 20 names a token takes seconds.
    named = (len(ids) - first) * (top + 2) * CHARACTERS_PER_NAME
    return await service.text_work.run(named, 1, lambda: _describe(service, scores, ids, first, top))


def _describe(service: ModelService, scores: TokenScores, ids: Sequence[int], first: int, top: int) -> dict[str, Any]:
    places = range(first, len(ids))
    return {
        "tokens": [service.token_text(ids[place]) for place in places],
        "token_logprobs": [float(scores.chosen[place - 1]) if place else None for place in places],
        "top_logprobs": [_likeliest(service, scores, ids, place) if place else None for place in places]
        if top
        else None,
        "text_offset": _offsets(service, ids[first:]),
    }


async def chat_logprobs(service: ModelService, prompt: Sequence[int], tokens: Sequence[int], top: int) -> dict:
    """The ``logprobs`` object of a chat answer."""
    ids = [*prompt, *tokens]
    (scores,) = await score(service, [ids], top)

    def name() -> list[dict[str, Any]]:
        content = []
        for place in range(len(prompt), len(ids)):
            entry = _chat_token(service, ids[place], float(scores.chosen[place - 1]))
            pairs = zip(scores.top_ids[place - 1, :top].tolist(), scores.top[place - 1, :top].tolist(), strict=True)
            entry["top_logprobs"] = [_chat_token(service, token, value) for token, value in pairs]
            content.append(entry)
        return content

    named = len(tokens) * (top + 1) * CHARACTERS_PER_NAME
    return {"content": await service.text_work.run(named, 1, name), "refusal": None}


def _likeliest(service: ModelService, scores: TokenScores, ids: Sequence[int], place: int) -> dict[str, float]:
    """The likeliest tokens at ``place``, and the one that stands there."""
    named: dict[str, float] = {}
    for token, value in zip(scores.top_ids[place - 1].tolist(), scores.top[place - 1].tolist(), strict=True):
        # Parts of characters look alike: the likelier one keeps the name.
        named.setdefault(service.token_text(token), value)
    named.setdefault(service.token_text(ids[place]), float(scores.chosen[place - 1]))
    return named


def _chat_token(service: ModelService, token: int, value: float) -> dict[str, Any]:
    text = service.token_text(token)
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _offsets(service: ModelService, ids: Sequence[int]) -> list[int]:
    """Characters of text before each token."""
    decoder, offsets, length = IncrementalDecoder(service.tokenizer), [], 0
    for token in ids:
        offsets.append(length)
        length += len(decoder.push([token]))
    return offsets
