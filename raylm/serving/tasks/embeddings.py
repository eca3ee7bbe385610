"""/v1/embeddings: one vector a text, pooled from the model's last hidden states, of length 1."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi.responses import Response

from raylm.serving.deploy.service import ModelService
from raylm.serving.engines.deadline import AT_ONCE, all_in_groups
from raylm.serving.http.errors import RequestError
from raylm.serving.http.requests import EmbeddingRequest
from raylm.serving.tasks.prompts import PromptOptions, encode_prompts, kept_tokens

# What a number in JSON costs, in characters of text that is tokenized.
CHARACTERS_PER_NUMBER = 1


async def embed(service: ModelService, request: EmbeddingRequest) -> Response:
    """OpenAI's list of embeddings.

    Raises:
        RequestError: a text is too long, is not taken as token ids, or its vector is to have another length.
    """
    _check(service, request)
    options = PromptOptions(keep=kept_tokens(service, request.truncate_prompt_tokens))
    texts = await encode_prompts(service, request.inputs, "input", options, places=min(len(request.inputs), AT_ONCE))
    for ids in texts:
        service.check_length(ids, "input")
    vectors = await read_vectors(service, texts)
    tokens = sum(map(len, texts))
    head = {
        "object": "list",
        "model": service.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    # 256 vectors of 1024 numbers take half a second.
    numbers = sum(vector.size for vector in vectors)
    write = functools.partial(_write, head, vectors, request.encoding_format)
    body = await service.text_work.run(numbers * CHARACTERS_PER_NUMBER, 1, write)
    return Response(body, media_type="application/json")


async def read_vectors(service: ModelService, texts: Sequence[list[int]]) -> list[np.ndarray]:
    """The vector of each text, fp32 [width] of length 1.

    Raises:
        RequestError: the queue is full.
        EngineFailure: the engine has stopped, or took too long.
    """
    service.admit(min(len(texts), AT_ONCE))
    return await all_in_groups(lambda ids: service.engine.embed(ids, service.pooling), texts, service.request_seconds)


def _check(service: ModelService, request: EmbeddingRequest) -> None:
    if request.dimensions not in (None, service.width):
        raise RequestError(
            f"dimensions: found {request.dimensions}, allowed: {service.width}, the length of this model's vectors",
            parameter="dimensions",
        )
    if not service.token_ids and any(not isinstance(text, str) for text in request.inputs):
        raise RequestError(
            "input: found token ids, allowed: texts, as ids of another tokenizer would give wrong vectors; LangChain's "
            "OpenAIEmbeddings sends texts with check_embedding_ctx_length=False (the server takes ids with "
            "serving.token_ids: true)",
            parameter="input",
            code="token_ids_not_allowed",
        )


def _write(head: dict[str, Any], vectors: Sequence[np.ndarray], encoding: str) -> bytes:
    """The answer; one vector after the other, so that the event loop has its turn between them."""
    data = (
        json.dumps({"object": "embedding", "index": index, "embedding": _encode(vector, encoding)}, allow_nan=False)
        for index, vector in enumerate(vectors)
    )
    return f'{json.dumps(head, ensure_ascii=False)[:-1]}, "data": [{", ".join(data)}]}}'.encode()


def _encode(vector: np.ndarray, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()
