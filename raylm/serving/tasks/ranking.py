"""/v1/rerank and /score: how well texts fit a query, or each other.

A sentence encoder says the cosine of the two vectors. A classifier with one label reads both texts together (a
cross-encoder, Nogueira and Cho 2019) and gives its logit through the sigmoid, or as it is where its configuration says
so. Bodies and answers are those of Jina, Cohere and vLLM.
"""

from __future__ import annotations

import math
import time
import uuid
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag, model_validator

from raylm.serving.deploy.models import Models
from raylm.serving.http.bodies import Items, Part, RequestBody, Texts, as_list
from raylm.serving.http.errors import LIST, TEXT, RequestError
from raylm.serving.http.requests import Truncation
from raylm.serving.tasks.embeddings import read_vectors
from raylm.serving.tasks.encoders import EncoderService
from raylm.serving.tasks.prompts import PromptOptions, check_fits, encode_prompts, kept_tokens

MOST_DOCUMENTS = 1024
TASKS = ("classification", "embedding")


class DocumentText(Part):
    """A document as Cohere's clients send it."""

    text: str


Document = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[DocumentText, Tag(LIST)],
    Discriminator(
        lambda value: TEXT if isinstance(value, str) else LIST if isinstance(value, dict) else None,
        custom_error_type="kind",
        custom_error_message='found neither a text nor an object such as {"text": ...}',
    ),
]


class PairRequest(RequestBody):
    """What both routes share."""

    idle: ClassVar[dict[str, tuple[Any, ...]]] = {"max_chunks_per_doc": (1,), "rank_fields": (["text"],)}

    model: str | None = None
    """Name of a sentence encoder or of a classifier with one label; by default the first one."""
    use_activation: bool | None = None
    """Of a classifier: give the logit through the sigmoid. By default as its configuration says, else true."""
    truncate_prompt_tokens: Truncation | None = None
    """Sentence encoder: keep only this many last tokens of each text; -1: as many as the model takes."""


class RerankRequest(PairRequest):
    """``POST /v1/rerank``."""

    query: str = Field(min_length=1)
    """What is looked for."""
    documents: Items[Document] = Field(min_length=1, max_length=MOST_DOCUMENTS)
    """Texts, or objects with one as ``text``."""
    top_n: int | None = Field(default=None, ge=0)
    """Give this many best documents; 0 and by default all."""
    return_documents: bool | None = None
    """Give the documents' texts; true by default."""

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class ScoreRequest(PairRequest):
    """``POST /score``: of each pair of a text of ``text_1`` and one of ``text_2``."""

    text_1: Texts
    """A text that goes with all others, or as many as there are others."""
    text_2: Texts
    """A text or a list of them."""

    @property
    def pairs(self) -> tuple[list[str], list[str]]:
        """The first and the second texts."""
        first, second = as_list(self.text_1), as_list(self.text_2)
        return (first * len(second) if len(first) == 1 else first), second

    @model_validator(mode="after")
    def _as_many(self) -> ScoreRequest:
        first, second = self.pairs
        if not 0 < len(second) <= MOST_DOCUMENTS:
            raise ValueError(f"text_2: found {len(second)} texts, allowed: 1 to {MOST_DOCUMENTS}")
        if len(first) != len(second):
            raise ValueError(f"text_1: found {len(first)} texts, allowed: 1 or {len(second)}, as many as in text_2")
        return self


async def rerank(models: Models, request: RerankRequest) -> dict[str, Any]:
    """The documents, those that fit best first."""
    service, texts = find_ranker(models, request.model), request.texts
    scores, tokens = await _scores(service, request, [request.query] * len(texts), texts, ("query", "documents"))
    order = sorted(range(len(texts)), key=lambda place: -scores[place])
    results = [{"index": place, "relevance_score": scores[place]} for place in order[: request.top_n or len(order)]]
    if request.return_documents is not False:
        results = [result | {"document": {"text": texts[result["index"]]}} for result in results]
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": service.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": results,
    }


async def score(models: Models, request: ScoreRequest) -> dict[str, Any]:
    """The score of each pair."""
    service = find_ranker(models, request.model)
    scores, tokens = await _scores(service, request, *request.pairs, ("text_1", "text_2"))
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": [{"index": place, "object": "score", "score": value} for place, value in enumerate(scores)],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }


def find_ranker(models: Models, name: str | None) -> EncoderService:
    """The model called ``name``, else the first classifier with one label, else the first sentence encoder.

    Raises:
        RequestError: there is none, or it gives no score of two texts.
    """
    if name is None:
        able = [one for one in models.services if isinstance(one, EncoderService) and len(one.labels) == 1]
        return able[0] if able else models.find(None, "embedding")
    found = models.find(name, *TASKS)
    if found.task == "classification" and len(found.labels) != 1:
        raise RequestError(
            f"The model '{name}' is a classifier with {len(found.labels)} labels, allowed: a sentence encoder, or a "
            "classifier with one label",
            parameter="model",
            code="model_not_supported",
        )
    return found


async def _scores(
    service: EncoderService, request: PairRequest, first: list[str], second: list[str], names: tuple[str, str]
) -> tuple[list[float], int]:
    """The score of each pair, and how many tokens were read.

    Args:
        names: of the parameters that the texts come from.
    """
    if service.task == "classification":
        if request.truncate_prompt_tokens is not None:
            raise RequestError(
                "truncate_prompt_tokens: allowed with a sentence encoder only", parameter="truncate_prompt_tokens"
            )
        through = service.sigmoid if request.use_activation is None else request.use_activation
        return await _read_together(service, first, second, names[1], through=through)
    return await _cosines(service, request, first, second, names)


async def _cosines(
    service: EncoderService, request: PairRequest, first: list[str], second: list[str], names: tuple[str, str]
) -> tuple[list[float], int]:
    # A query that goes with every document is read once.
    shared = first[:1] if len(set(first)) == 1 else first
    options = PromptOptions(keep=kept_tokens(service, request.truncate_prompt_tokens))
    ids = []
    for texts, name in ((shared, names[0]), (second, names[1])):
        found = await encode_prompts(service, texts, name, options, places=1)
        for one in found:
            service.check_length(one, name)
        ids += found
    vectors = await read_vectors(service, ids)
    left, right = vectors[: len(shared)], vectors[len(shared) :]
    if len(left) == 1:
        left = left * len(right)
    # All are of length 1.
    return [float(one @ other) for one, other in zip(left, right, strict=True)], sum(map(len, ids))


async def _read_together(
    service: EncoderService, first: list[str], second: list[str], name: str, *, through: bool
) -> tuple[list[float], int]:
    for texts in (first, second):
        for text in texts:
            check_fits(service, text, name)

    def encode() -> list[tuple[list[int], list[int] | None]]:
        given = service.tokenizer(first, second, verbose=False)
        types = given.get("token_type_ids") or [None] * len(second)
        return list(zip(given["input_ids"], types, strict=True))

    service.admit(1)
    pairs = await service.text_work.run(sum(map(len, first + second)), 1, encode)
    for ids, _ in pairs:
        service.check_length(service.check_ids(ids, name), name)
    logits = [float(found[0]) for found in await service.pair_logits(pairs)]
    return [_sigmoid(logit) if through else logit for logit in logits], sum(len(ids) for ids, _ in pairs)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
