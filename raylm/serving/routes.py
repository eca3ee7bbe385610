"""The HTTP application: OpenAI-compatible routes, /v1/qa where there is a collection, and /health."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

import raylm
from raylm.serving.answering import answer_question
from raylm.serving.errors import install_error_handlers
from raylm.serving.replies import ChatReply, CompletionReply, send_reply
from raylm.serving.requests import ChatRequest, CompletionRequest, QuestionRequest
from raylm.serving.retrieval import Collection
from raylm.serving.service import ModelService

# OpenAI's default for completions; chat answers run as long as they may.
COMPLETION_TOKENS = 16


def create_app(service: ModelService, collection: Collection | None = None, passages: int = 3) -> FastAPI:
    """The HTTP application of one served model.

    Args:
        service: the model.
        collection: what /v1/qa searches; without one it refuses.
        passages: passages of a question that does not say how many it wants.
    """
    app = FastAPI(title="raylm", version=raylm.__version__, docs_url=None, redoc_url=None)
    install_error_handlers(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the model can answer, its load, and counters since the start."""
        service.engine.check()
        stats = dataclasses.asdict(service.engine.stats())
        return {"status": "ok", "model": service.name, "engine": service.engine.name, **stats}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models that can be asked."""
        return {"object": "list", "data": [_model_object(service)]}

    @app.get("/v1/models/{name}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        """One model."""
        service.check_model(name)
        return _model_object(service)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> Response:
        """Text that goes on from each prompt."""
        service.check_model(request.model)
        prompts = [service.encode_prompt(prompt) for prompt in request.prompts]
        wanted = request.max_tokens or min(COMPLETION_TOKENS, service.max_new_tokens)
        parameters = [service.parameters(request, wanted, len(prompt)) for prompt in prompts]
        return await send_reply(service, request, CompletionReply(service), prompts, parameters, request.n or 1)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> Response:
        """The assistant's next message in a conversation."""
        service.check_model(request.model)
        prompt = service.encode_messages([message.plain() for message in request.messages])
        parameters = service.parameters(request, request.max_completion_tokens or request.max_tokens, len(prompt))
        return await send_reply(service, request, ChatReply(service), [prompt], [parameters], request.n or 1)

    @app.post("/v1/qa")
    async def question_answering(request: QuestionRequest) -> Response:
        """An answer generated from the collection's passages, with its sources."""
        return await answer_question(service, collection, request, request.passages or passages)

    return app


def _model_object(service: ModelService) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "raylm",
        "max_model_len": service.context_length,
    }
