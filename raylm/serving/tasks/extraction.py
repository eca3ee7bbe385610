"""/v1/qa, extractive: a reader points at the answer, in the context of the request or in a collection's passages."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from raylm.serving.http.requests import QuestionRequest
from raylm.serving.retrieval.collections import describe_matches, refusals
from raylm.serving.retrieval.records import Match
from raylm.serving.retrieval.shelf import Shelf
from raylm.serving.tasks.encoders import EncoderService
from raylm.tasks.extractive_qa.spans import AnswerSpan

# Of a passage without any relevance, so that its logarithm is a number.
LEAST_PRIOR = 1e-6


async def extract(
    service: EncoderService, shelf: Shelf, request: QuestionRequest, count: int, least_relevance: float
) -> Response:
    """Read the request's context, or ``count`` passages of its collection, and give the best span.

    Raises:
        RequestError: there is no such collection, or the context is too long.
    """
    threshold = service.reading.null_threshold if request.null_threshold is None else request.null_threshold
    if request.context is not None:
        (answer,), tokens = await service.find(request.question, [request.context], threshold)
        return _send(service, request, _describe(answer, answer.score), [], tokens)
    with refusals():
        matches = await shelf.search(request.collection, request.question, count)
    sources = describe_matches(matches)
    if not matches or max(match.relevance for match in matches) < least_relevance:
        return _send(service, request, _describe(None, 1.0), sources, 0)
    answers, tokens = await service.find(request.question, [match.passage.text for match in matches], threshold)
    place, score = best_of(answers, [match.relevance for match in matches])
    found = _describe(answers[place], score, matches[place])
    return _send(service, request, found | {"source": place}, sources, tokens)


def best_of(answers: Sequence[AnswerSpan], relevances: Sequence[float]) -> tuple[int, float]:
    """Which of the ``answers`` from passages of these ``relevances`` is the best, and its probability.

    Spans of all passages compete in one softmax, in which a passage's relevance is its prior; passages that have no
    answer count with the best of those that have one, or with all where none has.
    """
    priors = [math.log(max(relevance, LEAST_PRIOR)) for relevance in relevances]
    masses = [prior + answer.mass for prior, answer in zip(priors, answers, strict=True)]
    highest = max(masses)
    whole = highest + math.log(sum(math.exp(mass - highest) for mass in masses))
    answering = [place for place, answer in enumerate(answers) if not answer.no_answer] or range(len(answers))
    best = max(answering, key=lambda place: priors[place] + answers[place].logit)
    return best, math.exp(priors[best] + answers[best].logit - whole)


def _describe(answer: AnswerSpan | None, score: float, match: Match | None = None) -> dict[str, Any]:
    """The answer with its characters: of the context, or of the passage's document."""
    if answer is None or answer.no_answer:
        return {"answer": "", "answered": False, "start": None, "end": None, "score": score}
    offset = match.passage.start if match is not None else 0
    return {
        "answer": answer.text,
        "answered": True,
        "start": offset + answer.start,
        "end": offset + answer.end,
        "score": score,
    }


def _send(
    service: EncoderService, request: QuestionRequest, found: dict[str, Any], sources: list[Any], tokens: int
) -> Response:
    body = {
        "id": f"qa-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": service.name,
        "object": "qa",
        "mode": "extractive",
        **found,
        "finish_reason": "stop",
        "sources": sources,
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }
    if not request.stream:
        return JSONResponse(body)

    async def events() -> AsyncIterator[str]:
        # There is nothing to wait for between the parts of a span.
        yield f"data: {json.dumps(body | {'object': 'qa.chunk'}, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
