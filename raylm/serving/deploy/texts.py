"""Texts in generation: ids from an engine become pieces of text, which end where the request says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raylm.serving.deploy.watch import TextWatch
from raylm.serving.engines.base import EngineTimeout, FinishReason, SamplingParameters
from raylm.serving.http import request_log
from raylm.serving.tasks.text import IncrementalDecoder, StopStrings

if TYPE_CHECKING:
    from raylm.serving.deploy.service import ModelService


@dataclass(frozen=True)
class TextPiece:
    """A part of one text, as it is streamed: ``finish_reason`` comes with the last one."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    tokens: tuple[int, ...] = ()
    """With the last piece: all ids of the text."""
    logprobs: dict[str, Any] | None = None
    fresh: tuple[int, ...] = ()
    """Ids that came since the piece before."""
    stop_reason: int | str | None = None
    """With the last piece: the stop string or the id of ``stop_token_ids`` that ended the text."""


@dataclass
class Usage:
    """Token counts of one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    """Of the prompts: what the engine had in its cache; None where it does not say."""

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": None
            if self.cached_tokens is None
            else {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
        }

    def count_cached(self, tokens: int | None) -> None:
        """Add what of one prompt was in the cache."""
        if tokens is not None:
            self.cached_tokens = (self.cached_tokens or 0) + tokens


@dataclass(frozen=True)
class TextOptions:
    """Where a text ends, and what of its tokens it shows.

    Attributes:
        stops: strings before which it ends.
        special_stops: special tokens that end it, and the strings that name them.
        include_stop: it ends behind them.
        skip_special: special tokens are left out.
        min_tokens: tokens in which no stop string is looked for.
    """

    stops: tuple[str, ...] = ()
    special_stops: dict[int, str] = field(default_factory=dict)
    include_stop: bool = False
    skip_special: bool = True
    min_tokens: int = 0


class _Text:
    """One text: what has come of it."""

    def __init__(self, service: ModelService, parameters: SamplingParameters, options: TextOptions) -> None:
        self._special = service.special_ids
        self._parameters, self._options = parameters, options
        self._decoder = IncrementalDecoder(service.tokenizer, skip_special=options.skip_special)
        self.stopping = StopStrings(options.stops, include=options.include_stop)
        self.ids: list[int] = []
        self._given = 0
        # A special token that may turn out to be the one that ended the text.
        self._held: list[int] = []

    def push(self, tokens: list[int]) -> str:
        """Take ``tokens`` and return the text that is certain now."""
        early = tokens[: max(0, self._options.min_tokens - len(self.ids))]
        self.ids += tokens
        text = self._decode(early, early=True) if early else ""
        return text + self._decode(tokens[len(early) :])

    def _decode(self, tokens: list[int], *, early: bool = False) -> str:
        tokens, self._held = self._held + tokens, []
        if not self._options.skip_special and tokens and tokens[-1] in self._special:
            tokens, self._held = tokens[:-1], tokens[-1:]
        return self.stopping.push(self._decoder.push(tokens), early=early)

    def finish(self, reason: FinishReason | None) -> str:
        """The last text, after which nothing comes.

        Args:
            reason: the engine's.
        """
        last = self.ids[-1] if self.ids and reason == "stop" else None
        text = ""
        if self._held and (self._options.include_stop or last != self._held[-1]):
            text = self.stopping.push(self._decoder.push(self._held))
        text += self.stopping.push(self._decoder.finish())
        if not self.stopping.found:
            text += self.stopping.finish()
            if self._options.include_stop and self._options.skip_special and last in self._options.special_stops:
                text += self._options.special_stops[last]
        return text

    def fresh(self) -> tuple[int, ...]:
        """The ids that came since the last call."""
        given, self._given = self._given, len(self.ids)
        return tuple(self.ids[given:])

    def stop_reason(self, reason: FinishReason | None) -> int | str | None:
        """What the request named that ended the text."""
        if self.stopping.found:
            return self.stopping.found
        last = self.ids[-1] if self.ids and reason == "stop" else None
        if last is None or last not in self._parameters.stop_token_ids:
            return None
        return self._options.special_stops.get(last, last)


async def generate(
    service: ModelService,
    prompts: Sequence[list[int]],
    parameters: Sequence[SamplingParameters],
    options: TextOptions,
    usage: Usage,
) -> AsyncIterator[TextPiece]:
    """Generate the texts of all ``prompts`` side by side, and give their pieces as they come.

    When the caller stops listening, the engine stops generating.

    Args:
        service: the model.
        prompts: one list of token ids per text.
        parameters: one per text.
        options: where the texts end.
        usage: counts completion tokens on the way.
    """
    if len(prompts) == 1:
        async for piece in _text(service, 0, prompts[0], parameters[0], options, usage):
            yield piece
        return
    pieces: asyncio.Queue[TextPiece | None] = asyncio.Queue()

    async def follow(index: int) -> None:
        try:
            async for piece in _text(service, index, prompts[index], parameters[index], options, usage):
                pieces.put_nowait(piece)
        finally:
            pieces.put_nowait(None)

    tasks = [asyncio.create_task(follow(index)) for index in range(len(prompts))]
    try:
        ended = 0
        while ended < len(tasks):
            piece = await pieces.get()
            if piece is None:
                ended += 1
            else:
                yield piece
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _text(
    service: ModelService,
    index: int,
    prompt: list[int],
    parameters: SamplingParameters,
    options: TextOptions,
    usage: Usage,
) -> AsyncIterator[TextPiece]:
    written = _Text(service, parameters, options)
    late = EngineTimeout(f"the text was not ready within {service.request_seconds:g} s (serving.request_seconds)")
    watch = TextWatch(service)
    request_log.note(model=service.name)
    request_log.count(texts=1, prompt_tokens=len(prompt))
    with contextlib.ExitStack() as stack:
        stack.enter_context(watch)
        stream = (await service.engine.open()).submit(prompt, parameters)
        stack.callback(stream.cancel)
        timer = asyncio.get_running_loop().call_later(service.request_seconds, stream.cancel, late)
        stack.callback(timer.cancel)

        def last(text: str, reason: FinishReason | None) -> TextPiece:
            usage.count_cached(stream.cached)
            return TextPiece(
                index, text, reason, tuple(written.ids), fresh=written.fresh(), stop_reason=written.stop_reason(reason)
            )

        async for tokens in stream:
            watch.tokens(len(tokens))
            usage.completion_tokens += len(tokens)
            text = written.push(tokens)
            if written.stopping.found:
                watch.reason = "stop"
                yield last(text, "stop")
                return
            if text:
                yield TextPiece(index, text, fresh=written.fresh())
        watch.reason = stream.finish_reason
        text = written.finish(stream.finish_reason)
        yield last(text, "stop" if written.stopping.found else stream.finish_reason)
