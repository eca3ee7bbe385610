"""/v1/collections: make, fill, list, search and delete collections of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field, field_validator

from raylm.serving.http.bodies import BodyRoute, Items, RequestBody
from raylm.serving.http.errors import INVALID, RequestError, error_response
from raylm.serving.http.gate import OWNER
from raylm.serving.retrieval.errors import (
    CollectionBusy,
    CollectionDamaged,
    CollectionError,
    CollectionExists,
    CollectionUnreachable,
    NoRoom,
    NoSuchCollection,
    QuotaExceeded,
)  # fmt: skip
from raylm.serving.retrieval.library import Library
from raylm.serving.retrieval.records import Match, StoredDocument
from raylm.serving.retrieval.shelf import DEFAULT, Entry, Shelf

MOST_DOCUMENTS = 1000
MOST_PASSAGES = 20
# For the OpenAPI document: what routes answer instead.
DAMAGED: dict[int | str, dict[str, Any]] = {409: error_response("The collection is damaged")}
STORING: dict[int | str, dict[str, Any]] = {507: error_response("The server's disk is full")}
# Status and code of each kind of refusal; the first kind that fits counts.
_ANSWERS: dict[type[CollectionError], tuple[int, str]] = {
    NoSuchCollection: (404, "collection_not_found"),
    CollectionExists: (409, "collection_exists"),
    CollectionDamaged: (409, "collection_damaged"),
    QuotaExceeded: (413, "quota_exceeded"),
    CollectionBusy: (503, "server_busy"),
    CollectionUnreachable: (503, "collection_unreachable"),
    NoRoom: (507, "no_room"),
    CollectionError: (400, "collection_refused"),
}


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

    @field_validator("text")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if text.isspace():
            raise ValueError("found only white space, allowed: a text that can be searched")
        return text


class NewDocuments(RequestBody):
    """``POST /v1/collections/{name}/documents``."""

    documents: Items[NewDocument] = Field(min_length=1, max_length=MOST_DOCUMENTS)


class Search(RequestBody):
    """``POST /v1/collections/{name}/search``."""

    question: str = Field(min_length=1)
    """Question or words to search for."""
    passages: int = Field(default=3, ge=1, le=MOST_PASSAGES)
    """Number of passages to find."""


def shelf_of(library: Library, request: Request) -> Shelf:
    """The collections as the client of ``request`` has them."""
    return Shelf(library, request.scope.get(OWNER))


def collection_routes(library: Library) -> APIRouter:
    """The routes over ``library``."""
    router = APIRouter(prefix="/v1/collections", route_class=BodyRoute)

    def mine(request: Request) -> Shelf:
        return shelf_of(library, request)

    shelf_of_client = Depends(mine)
    _add_document_routes(router, shelf_of_client)

    @router.post("", responses={409: error_response("A collection of this name exists"), **STORING})
    async def create(request: NewCollection, shelf: Shelf = shelf_of_client) -> dict[str, Any]:
        """Make an empty collection. It belongs to the API key of the request."""
        with refusals():
            return _describe(await shelf.create(request.name))

    @router.get("")
    async def list_all(shelf: Shelf = shelf_of_client) -> dict[str, Any]:
        """All collections of the API key, and the common ones."""
        with refusals():
            return {"object": "list", "data": [_describe(entry) for entry in await shelf.entries()]}

    @router.get("/{name}")
    async def retrieve(name: str, shelf: Shelf = shelf_of_client) -> dict[str, Any]:
        """One collection."""
        with refusals():
            return _describe(await shelf.entry(name))

    @router.delete("/{name}")
    async def delete(name: str, shelf: Shelf = shelf_of_client) -> dict[str, Any]:
        """Delete a collection with its documents."""
        with refusals():
            await shelf.delete(name)
        return {"object": "collection.deleted", "id": name, "deleted": True}

    return router


def _add_document_routes(router: APIRouter, shelf_of_client: Any) -> None:
    """What is done with the documents of a collection."""

    @router.post("/{name}/documents", responses={**DAMAGED, **STORING})
    async def add(name: str, request: NewDocuments, shelf: Shelf = shelf_of_client) -> dict[str, Any]:
        """Add documents: all or none. A search finds them as soon as this request is answered."""
        documents = [
            StoredDocument(document.id or _hash(document.text), document.title, document.text)
            for document in request.documents
        ]
        with refusals():
            passages = await shelf.add(name, documents)
        ids = [document.id for document in documents]
        return {"object": "collection.documents", "collection": name, "ids": ids, "passages": passages}

    @router.delete("/{name}/documents/{document_id:path}", responses={**DAMAGED, **STORING})
    async def remove(name: str, document_id: str, shelf: Shelf = shelf_of_client) -> dict[str, Any]:
        """Delete a document."""
        with refusals():
            removed = await shelf.remove(name, document_id)
        if not removed:
            raise RequestError(f"The collection '{name}' has no document '{document_id}'", status=404, parameter="id")
        return {"object": "collection.document.deleted", "id": document_id, "deleted": True}

    @router.post("/{name}/search", responses=DAMAGED)
    async def search(name: str, request: Search, shelf: Shelf = shelf_of_client) -> dict[str, Any]:
        """The passages that fit a question best, one for each document."""
        with refusals():
            matches = await shelf.search(name, request.question, request.passages)
        return {"object": "list", "collection": name, "data": describe_matches(matches)}


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what a collection cannot do into an answer to the client."""
    try:
        yield
    except CollectionError as error:
        status, code = next(answer for kind, answer in _ANSWERS.items() if isinstance(error, kind))
        raise RequestError(
            str(error),
            status=status,
            parameter="name" if isinstance(error, CollectionExists) else "collection",
            code=code,
            kind=INVALID if status < 500 else "server_error",
            headers={"Retry-After": "1"} if status == 503 else None,
        ) from None


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


def _describe(entry: Entry) -> dict[str, Any]:
    facts = entry.facts
    return {
        "id": entry.name,
        "object": "collection",
        "status": "damaged" if facts is None else "ready",
        "error": entry.damage or None,
        "created": facts and facts.created,
        "documents": facts and facts.documents,
        "passages": facts and facts.passages,
        "embedded": facts and facts.embedded,
        "bytes": facts and facts.bytes,
        "common": entry.common,
        "read_only": entry.name == DEFAULT,
    }


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
