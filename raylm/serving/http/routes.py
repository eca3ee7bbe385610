"""The HTTP application: OpenAI-compatible routes, /v1/qa where there is a collection, /health, and the page at /."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

import raylm
from raylm.serving.deploy.models import Models
from raylm.serving.deploy.service import ModelService
from raylm.serving.http.bodies import BodyRoute
from raylm.serving.http.browsers import HeadAsGet
from raylm.serving.http.errors import ERROR_RESPONSES, install_error_handlers
from raylm.serving.http.metrics import CONTENT_TYPE, ServerMetrics
from raylm.serving.http.requests import ChatRequest, CompletionRequest, EmbeddingRequest, QuestionRequest
from raylm.serving.retrieval.collections import collection_routes, shelf_of
from raylm.serving.retrieval.library import Library
from raylm.serving.tasks.answering import answer_question
from raylm.serving.tasks.classification import ClassifyRequest, classify
from raylm.serving.tasks.completions import chat, complete
from raylm.serving.tasks.embeddings import embed
from raylm.serving.tasks.ranking import RerankRequest, ScoreRequest, rerank, score
from raylm.serving.tasks.tagging import TagRequest, tag
from raylm.serving.tasks.tokenization import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from raylm.tasks.base import GENERATION, WRITING

PLAYGROUND = Path(__file__).with_name("playground.html")
# The page loads nothing from elsewhere, talks to this server only, and no other page may frame it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
}
# Tasks of models that write text; where a request names none, the first served one of the first of them answers.
WRITERS = (GENERATION.name, WRITING.name)
# For the OpenAPI document: what a route answers where the request says ``stream``.
STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer: one JSON object; with `stream`, server-sent events",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {},
        },
    }
}


def create_app(
    models: Models, metrics: ServerMetrics, library: Library, passages: int = 3, least_relevance: float = 0.0
) -> FastAPI:
    """The HTTP application of the served models.

    Args:
        models: who answers.
        metrics: what /metrics shows.
        library: the collections that /v1/qa searches.
        passages: passages of a question that does not say how many it wants.
        least_relevance: a question without a passage of this relevance is not answered.
    """
    app = FastAPI(title="raylm", version=raylm.__version__, docs_url=None, redoc_url=None, responses=ERROR_RESPONSES)
    app.router.route_class = BodyRoute
    app.add_middleware(HeadAsGet)
    install_error_handlers(app)
    _add_state_routes(app, models, metrics)
    _add_model_routes(app, models)

    @app.post("/v1/qa", responses=STREAMS)
    async def question_answering(request: QuestionRequest, client: Request) -> Response:
        """Answer a question from the passages of a collection, with its sources, or from a given context."""
        shelf = shelf_of(library, client)
        return await answer_question(models, shelf, request, request.passages or passages, least_relevance)

    app.include_router(collection_routes(library))
    return app


def _add_state_routes(app: FastAPI, models: Models, metrics: ServerMetrics) -> None:
    """The page, and what tells how the server does."""

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether every model can answer, the load of each, and counters since the start."""
        loads = {}
        for service in models.services:
            service.engine.check()
            state = {"engine": service.engine.name, "loaded": service.engine.loaded}
            loads[service.name] = state | dataclasses.asdict(service.load())
        counters = [key for key, value in next(iter(loads.values())).items() if type(value) is int]
        totals = {key: sum(load[key] for load in loads.values()) for key in counters}
        return {"status": "ok", **totals, "models": loads}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of raylm."""
        return {"version": raylm.__version__}

    @app.get("/", response_class=HTMLResponse)
    async def playground() -> Response:
        """A page to try the server with."""
        return HTMLResponse(PLAYGROUND.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """This replica's figures, as Prometheus reads them."""
        metrics.publish(models.services)
        return Response(metrics.page(), media_type=CONTENT_TYPE)


def _add_model_routes(app: FastAPI, models: Models) -> None:
    """What asks one model."""

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models that are served."""
        return {"object": "list", "data": [_model_object(service) for service in models.services]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        """One model."""
        return _model_object(models.find(name))

    @app.post("/v1/completions", responses=STREAMS)
    async def completions(request: CompletionRequest) -> Response:
        """Continue each prompt; a sequence-to-sequence model writes what answers it, such as its translation."""
        return await complete(models.find(request.model, *WRITERS), request)

    @app.post("/v1/chat/completions", responses=STREAMS)
    async def chat_completions(request: ChatRequest) -> Response:
        """The assistant's next message in a conversation."""
        return await chat(models.find(request.model, *WRITERS), request)

    @app.post("/v1/embeddings", response_model=dict[str, Any])
    async def embeddings(request: EmbeddingRequest) -> Response:
        """One vector for each text, of length 1."""
        return await embed(models.find(request.model, "generation", "embedding"), request)

    @app.post("/v1/rerank")
    @app.post("/v2/rerank", include_in_schema=False)
    @app.post("/rerank", include_in_schema=False)
    async def reranking(request: RerankRequest) -> dict[str, Any]:
        """How well each document fits a query, the best first, by a sentence encoder or a cross-encoder."""
        return await rerank(models, request)

    @app.post("/score")
    @app.post("/v1/score", include_in_schema=False)
    async def scoring(request: ScoreRequest) -> dict[str, Any]:
        """How well the texts of each pair fit each other, by a sentence encoder or a cross-encoder."""
        return await score(models, request)

    @app.post("/tokenize")
    async def tokenization(request: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a prompt or of messages."""
        return await tokenize(models.find(request.model), request)

    @app.post("/detokenize")
    async def detokenization(request: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        return await detokenize(models.find(request.model), request)

    @app.post("/v1/classify")
    async def classification(request: ClassifyRequest) -> dict[str, Any]:
        """The likeliest label of each text, and the probabilities of the labels."""
        return await classify(models.find(request.model, "classification"), request)

    @app.post("/v1/tag")
    async def tagging(request: TagRequest) -> dict[str, Any]:
        """The spans of each text with their labels, or each word with its tag."""
        return await tag(models.find(request.model, "tagging"), request)


def _model_object(service: ModelService) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "raylm",
        "parent": service.parent,
        "task": service.task,
        "max_model_len": service.context_length,
    }
