"""/v1/qa: passages found in the collection, and an answer that a model generates from them or points at."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response

from raylm.data.chat import question_messages
from raylm.serving.deploy.models import Models
from raylm.serving.deploy.service import DEFAULT_TOKENS, ModelService
from raylm.serving.deploy.texts import TextPiece, Usage
from raylm.serving.http.replies import Reply, send_reply, stream_reply
from raylm.serving.http.requests import QuestionRequest
from raylm.serving.retrieval.collections import describe_matches, refusals
from raylm.serving.retrieval.records import Match, Passage
from raylm.serving.retrieval.shelf import Shelf
from raylm.serving.tasks.citations import Citer
from raylm.serving.tasks.encoders import EncoderService
from raylm.serving.tasks.extraction import extract
from raylm.serving.tasks.prompts import check_fits, most_characters, token_ids

# Share of the context that is kept for the answer where the request does not say how long it may be.
ANSWER_SHARE = 0.25
NOTHING_FOUND = "The collection has nothing about this."


class QuestionReply(Reply):
    """Of ``/v1/qa``: the answer and its sources; a stream sends the sources first."""

    prefix, kind, chunk_kind = "qa", "qa", "qa.chunk"

    def __init__(self, service: ModelService, matches: Sequence[Match], used: int) -> None:
        super().__init__(service)
        self._sources = [
            source | {"in_context": place < used} for place, source in enumerate(describe_matches(matches))
        ]

        self._citer = Citer([f"{match.passage.title}\n{match.passage.text}" for match in matches[:used]])

    def whole(self, pieces: Sequence[TextPiece], usage: Usage) -> dict[str, Any]:
        """The answer in one object."""
        return self._head | {
            "object": self.kind,
            "mode": "generative",
            "answer": _cited(self._citer, pieces[0]),
            "answered": True,
            "finish_reason": pieces[0].finish_reason,
            "sources": self._sources,
            "usage": usage.as_dict(),
        }

    def opening(self, texts: int) -> list[dict[str, Any]]:
        """The sources: they are known before the answer begins."""
        return [self._head | {"object": self.chunk_kind, "sources": self._sources}]

    def chunk(self, piece: TextPiece) -> dict[str, Any]:
        """A piece of the answer."""
        return self._head | {"object": self.chunk_kind, **self._delta(piece)}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Token counts."""
        return self._head | {"object": self.chunk_kind, "usage": usage.as_dict()}

    def _choice(self, piece: TextPiece) -> dict[str, Any]:
        return {"answer": _cited(self._citer, piece), "finish_reason": piece.finish_reason}

    _delta = _choice


async def answer_question(
    models: Models, shelf: Shelf, request: QuestionRequest, count: int, least_relevance: float
) -> Response:
    """Find ``count`` passages, or take the given context, and let a reader or a generator answer.

    Raises:
        RequestError: there is no such model or collection, or the question alone fills the context.
    """
    service = choose_model(models, request)
    if isinstance(service, EncoderService):
        return await extract(service, shelf, request, count, least_relevance)
    return await generate_answer(service, shelf, request, count, least_relevance)


def choose_model(models: Models, request: QuestionRequest) -> ModelService:
    """The model that the request names, or one that does what it asks for; of a context a reader by default.

    Raises:
        RequestError: there is none.
    """
    if request.mode is not None:
        return models.find(request.model, "extractive_qa" if request.mode == "extractive" else "generation")
    if request.context is not None:
        return models.find(request.model, "extractive_qa", "generation")
    return models.find(request.model, "generation", "extractive_qa")


async def generate_answer(
    service: ModelService, shelf: Shelf, request: QuestionRequest, count: int, least_relevance: float
) -> Response:
    """Put passages before the question, and answer; or say that none has to do with it.

    Raises:
        RequestError: there is no such collection, or the question alone fills the context.
    """
    service.admit(1)
    check_fits(service, request.question, "question")
    if request.context is not None:
        given = Passage("context", "", request.context, start=0, end=len(request.context))
        matches = [Match(given, 1.0, 1.0)]
    else:
        with refusals():
            matches = await shelf.search(request.collection, request.question, count)
    if max((match.relevance for match in matches), default=0.0) < least_relevance:
        return refuse(request, QuestionReply(service, matches, 0))
    wanted = request.max_tokens
    if wanted is None and service.context_length is not None:
        share = max(1, int(service.context_length * ANSWER_SHARE))
        wanted = min(service.max_new_tokens or DEFAULT_TOKENS, share)
    characters = len(request.question) + sum(len(match.passage.text) for match in matches)
    # Where there is no context, there is nothing to leave room in.
    fit = functools.partial(fit_prompt, service, request.question, matches, wanted or 0)
    prompt, used = await service.text_work.run(characters, 1, fit)
    # The likeliest answer, unless the request asks for chance: sampling invents what the passages do not say.
    parameters = service.parameters(request, wanted, len(prompt), temperature=0.0)
    reply = await service.text_work.run(characters, 1, functools.partial(QuestionReply, service, matches, used))
    return await send_reply(service, request, reply, [prompt], [parameters])


def refuse(request: QuestionRequest, reply: QuestionReply) -> Response:
    """Say that nothing was found, without asking the model."""
    piece, usage = TextPiece(0, NOTHING_FOUND, "stop"), Usage()
    if not request.stream:
        return JSONResponse(reply.whole([piece], usage) | {"answered": False})

    async def pieces() -> AsyncIterator[TextPiece]:
        yield piece

    return stream_reply(request, reply, pieces(), usage)


def _cited(citer: Citer, piece: TextPiece) -> str:
    """The text of ``piece`` with its citations."""
    return citer.push(piece.text) + (citer.finish() if piece.finish_reason else "")


def fit_prompt(
    service: ModelService, question: str, matches: Sequence[Match], answer_tokens: int
) -> tuple[list[int], int]:
    """The prompt with as much of the passages as the context holds, and how many passages those are.

    The best passage comes first and is the last to be cut. The question is never cut.

    Args:
        answer_tokens: tokens to leave for the answer.

    Returns:
        Token ids, and how many of the matches are in them, the last one perhaps in part.
    """
    bare = service.encode_messages(question_messages(question))
    room = None if service.context_length is None else service.context_length - answer_tokens - len(bare)
    # What the context cannot hold whatever its tokens are need not become tokens first.
    context = "\n\n".join(match.passage.text for match in matches)[: most_characters(service)]
    prompt = service.encode_messages(question_messages(question, context)) if context else bare
    # Ids of a text are not a prefix of the ids of a longer one: what was cut is measured again.
    while context and room is not None and len(prompt) - len(bare) > room:
        excess = len(prompt) - len(bare) - room
        context = _shorten(service, context, excess)
        prompt = service.encode_messages(question_messages(question, context)) if context else bare
    used, end = 0, 0
    for match in matches:
        used += end < len(context)
        end += len(match.passage.text) + len("\n\n")
    return prompt, used


def _shorten(service: ModelService, text: str, tokens: int) -> str:
    """``text`` without at least its last ``tokens`` tokens, cut between words where there are any."""
    ids = token_ids(service.tokenizer, text, special=False)
    kept = service.tokenizer.decode(
        ids[: max(0, len(ids) - tokens)], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    # Never longer than before, whatever the tokenizer made of it.
    kept = kept.rstrip("\N{REPLACEMENT CHARACTER}")[: len(text) - 1]
    words = kept.rsplit(None, 1)
    return words[0] if len(words) == 2 else kept
