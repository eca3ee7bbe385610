"""/v1/collections: make, fill, list, search and delete collections of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from raylm.serving.http.bodies import RequestBody
from raylm.serving.http.errors import RequestError, error_response
from raylm.serving.retrieval.library import DEFAULT, Library
from raylm.serving.retrieval.store import (
    CollectionError,
    CollectionExists,
    Facts,
    Match,
    NoSuchCollection,
    StoredDocument,
)  # fmt: skip

MOST_DOCUMENTS = 1000
MOST_PASSAGES = 20


class NewCollection(RequestBody):
    """``POST /v1/collections``."""

    name: str = Field(pattern="^[a-z0-9][a-z0-9_-]*$", max_length=64)
    """Name of letters a to z, digits, - and _."""


class NewDocument(RequestBody):
    """A document to put into a collection."""

    text: str = Field(min_length=1)
    """Text of the document. It is cut into passages, which are searched."""
    title: str = Field(default="", max_length=1000)
    """Title of the document. It is searched too, and shown with a passage."""
    id: str | None = Field(default=None, min_length=1, max_length=256)
    """Id of the document; by default a hash of the text. A document with the same id is replaced."""


class NewDocuments(RequestBody):
    """``POST /v1/collections/{name}/documents``."""

    documents: list[NewDocument] = Field(min_length=1, max_length=MOST_DOCUMENTS)


class Search(RequestBody):
    """``POST /v1/collections/{name}/search``."""

    question: str = Field(min_length=1)
    """Question or words to search for."""
    passages: int = Field(default=3, ge=1, le=MOST_PASSAGES)
    """Number of passages to find."""


def collection_routes(library: Library) -> APIRouter:
    """The routes over ``library``."""
    router = APIRouter(prefix="/v1/collections")

    @router.post("", responses={409: error_response("A collection of this name exists")})
    async def create(request: NewCollection) -> dict[str, Any]:
        """Make an empty collection."""
        with refusals():
            return _describe(await library.create(request.name))

    @router.get("")
    async def list_all() -> dict[str, Any]:
        """All collections."""
        with refusals():
            return {"object": "list", "data": [_describe(facts) for facts in await library.all_facts()]}

    @router.get("/{name}")
    async def retrieve(name: str) -> dict[str, Any]:
        """One collection."""
        with refusals():
            return _describe(await library.facts(name))

    @router.delete("/{name}")
    async def delete(name: str) -> dict[str, Any]:
        """Delete a collection with its documents."""
        with refusals():
            await library.delete(name)
        return {"object": "collection.deleted", "id": name, "deleted": True}

    @router.post("/{name}/documents")
    async def add(name: str, request: NewDocuments) -> dict[str, Any]:
        """Add documents. A search finds them as soon as this request is answered."""
        documents = [
            StoredDocument(document.id or _hash(document.text), document.title, document.text)
            for document in request.documents
        ]
        with refusals():
            passages = await library.add(name, documents)
        ids = [document.id for document in documents]
        return {"object": "collection.documents", "collection": name, "ids": ids, "passages": passages}

    @router.delete("/{name}/documents/{document_id:path}")
    async def remove(name: str, document_id: str) -> dict[str, Any]:
        """Delete a document."""
        with refusals():
            removed = await library.remove(name, document_id)
        if not removed:
            raise RequestError(f"The collection '{name}' has no document '{document_id}'", status=404, parameter="id")
        return {"object": "collection.document.deleted", "id": document_id, "deleted": True}

    @router.post("/{name}/search")
    async def search(name: str, request: Search) -> dict[str, Any]:
        """The passages that fit a question best, one for each document."""
        with refusals():
            matches = await library.search(name, request.question, request.passages)
        return {"object": "list", "collection": name, "data": describe_matches(matches)}

    return router


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what a collection cannot do into an answer to the client."""
    try:
        yield
    except NoSuchCollection as error:
        raise RequestError(str(error), status=404, parameter="collection", code="collection_not_found") from None
    except CollectionExists as error:
        raise RequestError(str(error), status=409, parameter="name", code="collection_exists") from None
    except CollectionError as error:
        raise RequestError(str(error), parameter="collection", code="collection_refused") from None


def describe_matches(matches: Sequence[Match]) -> list[dict[str, Any]]:
    """Sources as clients see them; ``start`` and ``end`` are offsets into the document's text, in characters."""
    return [
        {
            "id": match.passage.id,
            "title": match.passage.title,
            "start": match.passage.start,
            "end": match.passage.end,
            "score": round(match.score, 4),
            "relevance": round(match.relevance, 4),
            "text": match.passage.text,
        }
        for match in matches
    ]


def _describe(facts: Facts) -> dict[str, Any]:
    return {
        "id": facts.name,
        "object": "collection",
        "created": facts.created,
        "documents": facts.documents,
        "passages": facts.passages,
        "embedded": facts.embedded,
        "read_only": facts.name == DEFAULT,
    }


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
