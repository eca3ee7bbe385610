"""From texts in generation to OpenAI's answers: one JSON object, or server-sent events."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, ClassVar

from fastapi.responses import JSONResponse, Response, StreamingResponse

from raylm.serving.deploy.service import SEEDS, ModelService
from raylm.serving.deploy.texts import TextPiece, Usage, generate
from raylm.serving.engines.base import EngineFailure, SamplingParameters
from raylm.serving.http.errors import error_body
from raylm.serving.http.generation import GenerationRequest, StreamOptions


class Reply(abc.ABC):
    """How the texts of one request are put into JSON.

    Args:
        service: the model that answers.
        prompts: token ids of each text's prompt, where those and the text's own are to be shown.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, service: ModelService, prompts: Sequence[list[int]] | None = None) -> None:
        self._prompts = prompts
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}

    def whole(self, pieces: Sequence[TextPiece], usage: Usage) -> dict[str, Any]:
        """The answer in one object; one piece per text."""
        choices = [self._choice(piece) for piece in pieces]
        return self._head | {"object": self.kind, "choices": choices, "usage": usage.as_dict()}

    def opening(self, texts: int) -> list[dict[str, Any]]:
        """Events that come before any text."""
        return []

    def chunk(self, piece: TextPiece) -> dict[str, Any]:
        """The event of one piece."""
        return self._head | {"object": self.chunk_kind, "choices": [self._delta(piece)]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last event, if the client asked for it."""
        return self._head | {"object": self.chunk_kind, "choices": [], "usage": usage.as_dict()}

    def _end(self, piece: TextPiece) -> dict[str, Any]:
        """Of a choice: why it ended, and its ids where they are to be shown."""
        end = {"logprobs": piece.logprobs, "finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        return end if self._prompts is None else end | {"token_ids": list(piece.fresh)}

    @abc.abstractmethod
    def _choice(self, piece: TextPiece) -> dict[str, Any]: ...

    @abc.abstractmethod
    def _delta(self, piece: TextPiece) -> dict[str, Any]: ...


class CompletionReply(Reply):
    """Of ``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, service: ModelService, echoes: Sequence[str] = (), prompts: Sequence[list[int]] | None = None
    ) -> None:
        super().__init__(service, prompts)
        self._echoes = echoes

    def opening(self, texts: int) -> list[dict[str, Any]]:
        """The prompts, where they are to be echoed or their ids to be shown."""
        if self._prompts is None:
            return [self.chunk(TextPiece(index, echo)) for index, echo in enumerate(self._echoes)]
        pieces = [TextPiece(index, self._echoes[index] if self._echoes else "") for index in range(texts)]
        return [
            self._head | {"object": self.chunk_kind, "choices": [self._delta(piece) | self._prompt(piece.index)]}
            for piece in pieces
        ]

    def _choice(self, piece: TextPiece) -> dict[str, Any]:
        echo = self._echoes[piece.index] if self._echoes else ""
        return self._delta(piece) | {"text": echo + piece.text} | self._prompt(piece.index)

    def _delta(self, piece: TextPiece) -> dict[str, Any]:
        return {"index": piece.index, "text": piece.text, **self._end(piece)}

    def _prompt(self, index: int) -> dict[str, Any]:
        return {} if self._prompts is None else {"prompt_token_ids": self._prompts[index]}


class ChatReply(Reply):
    """Of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, pieces: Sequence[TextPiece], usage: Usage) -> dict[str, Any]:
        """The answers in one object."""
        return super().whole(pieces, usage) | self._prompt()

    def opening(self, texts: int) -> list[dict[str, Any]]:
        """Says of each text that the assistant speaks."""
        delta = {"role": "assistant", "content": ""}
        chunks = [
            self._head
            | {"object": self.chunk_kind, "choices": [{"index": index, "delta": delta, "finish_reason": None}]}
            for index in range(texts)
        ]
        return [chunks[0] | self._prompt(), *chunks[1:]]

    def _choice(self, piece: TextPiece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.index, "message": message, **self._end(piece)}

    def _delta(self, piece: TextPiece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.index, "delta": delta, **self._end(piece)}

    def _prompt(self) -> dict[str, Any]:
        return {} if self._prompts is None else {"prompt_token_ids": self._prompts[0]}


async def send_reply(
    service: ModelService,
    request: GenerationRequest,
    reply: Reply,
    prompts: Sequence[list[int]],
    parameters: Sequence[SamplingParameters],
    choices: int = 1,
    logprobs: Callable[[list[int], Sequence[int]], Awaitable[dict[str, Any]]] | None = None,
) -> Response:
    """Generate ``choices`` texts for each prompt and answer with them, streaming if the request says so.

    Args:
        prompts: token ids of each prompt.
        parameters: of each prompt; further choices of it get the seeds that follow.
        choices: texts for each prompt.
        logprobs: makes the object of that name from a prompt's ids and those of the text after it; in a stream it comes
            with a text's last piece, as the whole text is read for it.
    """
    service.admit(len(prompts) * choices)
    usage = Usage(prompt_tokens=sum(map(len, prompts)))
    jobs = [
        (prompt, dataclasses.replace(chosen, seed=(chosen.seed + choice) % SEEDS))
        for prompt, chosen in zip(prompts, parameters, strict=True)
        for choice in range(choices)
    ]
    pieces = generate(service, [job[0] for job in jobs], [job[1] for job in jobs], service.text_options(request), usage)
    if logprobs is not None:
        pieces = _with_logprobs(pieces, [job[0] for job in jobs], logprobs)
    if request.stream:
        return stream_reply(request, reply, pieces, usage, len(jobs))
    texts = [""] * len(jobs)
    ends: list[Any] = [None] * len(jobs)
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            texts[piece.index] += piece.text
            ends[piece.index] = piece
    whole = [dataclasses.replace(end, text=text, fresh=end.tokens) for end, text in zip(ends, texts, strict=True)]
    return JSONResponse(reply.whole(whole, usage))


async def _with_logprobs(
    pieces: AsyncIterator[TextPiece],
    prompts: Sequence[list[int]],
    logprobs: Callable[[list[int], Sequence[int]], Awaitable[dict[str, Any]]],
) -> AsyncIterator[TextPiece]:
    """``pieces``, the last one of each text with its log-probabilities."""
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if piece.finish_reason is None:
                yield piece
            else:
                found = await logprobs(prompts[piece.index], piece.tokens)
                yield dataclasses.replace(piece, logprobs=found)


def stream_reply(
    request: GenerationRequest, reply: Reply, pieces: AsyncIterator[TextPiece], usage: Usage, texts: int = 1
) -> Response:
    """Server-sent events of ``pieces``; ``usage`` comes last where the request asks for it."""
    return StreamingResponse(
        _events(reply, pieces, texts, usage, request.stream_options or StreamOptions()),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _events(
    reply: Reply, pieces: AsyncIterator[TextPiece], texts: int, usage: Usage, options: StreamOptions
) -> AsyncIterator[str]:
    for opening in reply.opening(texts):
        yield _event(opening)
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                chunk = reply.chunk(piece)
                yield _event(chunk | {"usage": usage.as_dict()} if options.continuous_usage_stats else chunk)
    except EngineFailure as error:
        # The status was sent long ago; an error object is what OpenAI's client looks for in a stream.
        yield _event(error_body(str(error), "server_error", code="engine_failure"))
        return
    if options.include_usage:
        yield _event(reply.usage_chunk(usage))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
