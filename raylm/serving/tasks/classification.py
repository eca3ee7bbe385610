"""/v1/classify: which of a classifier's labels each text has."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from raylm.serving.http.bodies import RequestBody, Texts, as_list
from raylm.serving.http.requests import MOST_INPUTS
from raylm.serving.tasks.encoders import EncoderService
from raylm.serving.tasks.prompts import encode_prompts
from raylm.tasks.classification.texts import softmax


class ClassifyRequest(RequestBody):
    """``POST /v1/classify``."""

    input: Texts
    """A text, or a list of them."""
    model: str | None = None
    """Name of the classifier; by default the first one."""
    top: int | None = Field(default=None, ge=1)
    """Return the scores of this many likeliest labels; all by default."""

    @model_validator(mode="after")
    def _not_too_many(self) -> ClassifyRequest:
        if not 0 < len(self.inputs) <= MOST_INPUTS:
            raise ValueError(f"input: found {len(self.inputs)} texts, allowed: 1 to {MOST_INPUTS}")
        return self

    @property
    def inputs(self) -> list[str]:
        """``input`` as a list."""
        return as_list(self.input)


async def classify(service: EncoderService, request: ClassifyRequest) -> dict[str, Any]:
    """The likeliest label of each text, and the probabilities."""
    texts = await encode_prompts(service, request.inputs, "input")
    for ids in texts:
        service.check_length(ids, "input")
    data = []
    for index, logits in enumerate(await service.logits(texts)):
        scores = softmax(logits)
        order = (-scores).argsort(kind="stable").tolist()
        chosen = order if request.top is None else order[: request.top]
        data.append(
            {
                "object": "classification",
                "index": index,
                "label": service.labels[order[0]],
                "score": float(scores[order[0]]),
                "scores": {service.labels[number]: float(scores[number]) for number in chosen},
            }
        )
    tokens = sum(map(len, texts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": service.name, "data": data, "usage": usage}
