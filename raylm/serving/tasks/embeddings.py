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
from raylm.serving.deploy.texts import Usage
from raylm.serving.engines.deadline import all_in_time
from raylm.serving.http.requests import EmbeddingRequest
from raylm.serving.tasks.prompts import encode_prompts

# What a number in JSON costs, in characters of text that is tokenized.
CHARACTERS_PER_NUMBER = 1


async def embed(service: ModelService, request: EmbeddingRequest) -> Response:
    """OpenAI's list of embeddings."""
    texts = await encode_prompts(service, request.inputs, "input")
    for ids in texts:
        service.check_length(ids, "input")
    service.admit(len(texts))
    vectors = await all_in_time([service.engine.embed(ids, service.pooling) for ids in texts], service.request_seconds)
    usage = Usage(prompt_tokens=sum(map(len, texts)))
    head = {
        "object": "list",
        "model": service.name,
        "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
    }
    # 256 vectors of 1024 numbers take half a second.
    numbers = sum(vector.size for vector in vectors)
    write = functools.partial(_write, head, vectors, request.encoding_format)
    body = await service.text_work.run(numbers * CHARACTERS_PER_NUMBER, 1, write)
    return Response(body, media_type="application/json")


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
