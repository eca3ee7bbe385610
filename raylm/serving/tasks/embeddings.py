"""/v1/embeddings: one vector a text, pooled from the model's last hidden states, of length 1."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from raylm.serving.deploy.service import ModelService, Usage
from raylm.serving.engines.deadline import all_in_time
from raylm.serving.http.requests import EmbeddingRequest
from raylm.serving.tasks.prompts import encode_prompts


async def embed(service: ModelService, request: EmbeddingRequest) -> dict[str, Any]:
    """OpenAI's list of embeddings."""
    texts = await encode_prompts(service, request.inputs, "input")
    for ids in texts:
        service.check_length(ids, "input")
    service.admit(len(texts))
    vectors = await all_in_time([service.engine.embed(ids, service.pooling) for ids in texts], service.request_seconds)
    usage = Usage(prompt_tokens=sum(map(len, texts)))
    return {
        "object": "list",
        "model": service.name,
        "data": [
            {"object": "embedding", "index": index, "embedding": _encode(vector, request.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
    }


def _encode(vector: np.ndarray, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()
