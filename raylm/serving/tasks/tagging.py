"""/v1/tag: the spans of a text that a tagger finds, or the tag of each of its words.

A text that is longer than the model's positions is read in windows that part between words.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import model_validator

from raylm.data.samples.word_windows import WordWindow, WordWindows
from raylm.serving.http.bodies import RequestBody, Texts, as_list
from raylm.serving.http.errors import RequestError
from raylm.serving.http.requests import MOST_INPUTS
from raylm.serving.tasks.encoders import MOST_WINDOWS, EncoderService
from raylm.tasks.tagging.entities import cut_words, entities

# Tokens of a window of a model without a limit.
LONGEST_DEFAULT = 512

Places = list[tuple[int, int]]


class TagRequest(RequestBody):
    """``POST /v1/tag``."""

    input: Texts
    """A text, or a list of them."""
    model: str | None = None
    """Name of the tagger; by default the first one."""

    @model_validator(mode="after")
    def _not_too_many(self) -> TagRequest:
        if not 0 < len(self.inputs) <= MOST_INPUTS:
            raise ValueError(f"input: found {len(self.inputs)} texts, allowed: 1 to {MOST_INPUTS}")
        return self

    @property
    def inputs(self) -> list[str]:
        """``input`` as a list."""
        return as_list(self.input)


async def tag(service: EncoderService, request: TagRequest) -> dict[str, Any]:
    """Each text's spans, or its words with their tags.

    Raises:
        RequestError: the texts need too many windows, or the queue is full.
        EngineFailure: the engine has stopped, or took too long.
    """
    texts = request.inputs
    service.admit(len(texts))
    characters = sum(map(len, texts))
    places, windows = await service.text_work.run(characters, len(texts), functools.partial(_cut, service, texts))
    logits = await service.logits([window.ids.tolist() for cut in windows for window in cut])

    def write() -> list[dict[str, Any]]:
        rest = iter(logits)
        return [
            _item(service, index, text, words, [next(rest)[window.firsts] for window in cut])
            for index, (text, words, cut) in enumerate(zip(texts, places, windows, strict=True))
        ]

    data = await service.text_work.run(characters, len(texts), write)
    tokens = sum(len(window.ids) for cut in windows for window in cut)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": service.name, "data": data, "usage": usage}


def _cut(service: EncoderService, texts: Sequence[str]) -> tuple[list[Places], list[list[WordWindow]]]:
    """The words of each text, and its windows; of a text without words none.

    Raises:
        RequestError: there are too many.
    """
    length = service.context_length or LONGEST_DEFAULT
    places = [cut_words(text) for text in texts]
    refusal = RequestError(
        f"The texts need more than {MOST_WINDOWS} windows of {length} tokens, allowed: at most {MOST_WINDOWS} in one "
        "request; send fewer or shorter ones",
        parameter="input",
        code="context_length_exceeded",
    )
    # A word is a token at least.
    if any(len(words) > MOST_WINDOWS * length for words in places):
        raise refusal
    cutter = WordWindows(service.tokenizer, length)
    sentences = [[text[start:end] for start, end in words] for text, words in zip(texts, places, strict=True)]
    windows = cutter.cut(sentences)
    # Short texts may be many; what is limited is how far one goes on.
    if any(len(cut) > MOST_WINDOWS for cut in windows) or sum(map(len, windows)) > MOST_WINDOWS + MOST_INPUTS:
        raise refusal
    for cut in windows:
        for window in cut:
            service.check_ids(window.ids.tolist(), "input")
    return places, windows


def _item(
    service: EncoderService, index: int, text: str, words: Places, logits: Sequence[np.ndarray]
) -> dict[str, Any]:
    """The answer for one text, of whose words the ``logits`` are, [words, labels] for each window."""
    decoder = service.decoder
    assert decoder is not None
    tags, scores = decoder.scored(np.concatenate(logits)) if logits else ([], [])
    found = entities(words, tags, scores, decoder.scheme)
    named = "tag" if decoder.scheme == "none" else "label"
    return {
        "object": "tagging",
        "index": index,
        "tokens" if decoder.scheme == "none" else "entities": [
            {
                named: one.label, "text": text[one.start : one.end], "start": one.start, "end": one.end,
                "score": one.score,
            }
            for one in found
        ],
    }  # fmt: skip
