"""/v1/collections over HTTP: two replicas that share what was uploaded, and a server that is started again."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raylm.config.stages import ServeConfig

pytestmark = pytest.mark.slow

API_KEY = "a-key-of-these-tests-0001"
ANIMALS = [
    {"id": "zebra", "title": "Zebra", "text": "The zebra has stripes.\n\nIt lives in Africa."},
    {"id": "lion", "title": "Lion", "text": "The lion has a mane and sleeps for twenty hours."},
    {"id": "北京", "title": "北京", "text": "北京是中华人民共和国的首都。"},
]


class Client:
    """Plain HTTP, a new connection for each request, so that any replica may answer."""

    restart: Callable[[], str]

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, method: str, path: str, body: Any = None, key: str = API_KEY) -> tuple[int, Any]:
        """Status and JSON of one request."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def found(self, collection: str, question: str) -> list[str]:
        """Ids of what a question finds."""
        status, body = self.ask("POST", f"/v1/collections/{collection}/search", {"question": question})
        assert status == 200, body
        return [source["id"] for source in body["data"]]


@pytest.fixture(scope="module")
def config(
    exported_model: Path, collection_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], ServeConfig]:
    """The same server on a new port each time."""
    from raylm.config.loading import validate
    from tests.serving.conftest import free_port

    root = tmp_path_factory.mktemp("library")
    keys = root / "keys"
    keys.write_text(API_KEY)

    def make() -> ServeConfig:
        values = {
            "run": {"name": f"run-{free_port()}", "storage": str(root)},
            "model": {"path": str(exported_model)},
            "serving": {
                "port": free_port(),
                "engine": "transformers",
                "api_keys_file": str(keys),
                "collection": str(collection_directory),
                "collections": str(root / "uploads"),
                "replicas": 2,
                "cpus_per_replica": 0.5,
                "max_new_tokens": 16,
            },
        }
        return validate(ServeConfig, values, "test")

    return make


@pytest.fixture(scope="module")
def client(ray_instance: object, config: Callable[[], ServeConfig]) -> Iterator[Client]:
    from raylm.serving.stage import running_server

    stack = contextlib.ExitStack()

    def start() -> str:
        stack.close()
        return stack.enter_context(running_server(config()))

    with stack:
        client = Client(start())
        client.restart = start
        yield client


def test_what_one_replica_takes_both_find(client: Client) -> None:
    status, body = client.ask("POST", "/v1/collections", {"name": "animals"})
    assert (status, body["id"], body["documents"]) == (200, "animals", 0)
    status, body = client.ask("POST", "/v1/collections/animals/documents", {"documents": ANIMALS})
    assert (status, body["ids"], body["passages"]) == (200, ["zebra", "lion", "北京"], 3)
    for _ in range(10):
        assert client.found("animals", "Who has stripes?")[0] == "zebra"
        assert client.found("animals", "中国的首都是哪里？")[0] == "北京"
    status, body = client.ask("POST", "/v1/collections/animals/search", {"question": "Africa stripes", "passages": 1})
    (source,) = body["data"]
    assert ANIMALS[0]["text"][source["start"] : source["end"]] == source["text"]
    status, body = client.ask("GET", "/v1/collections")
    assert [entry["id"] for entry in body["data"]] == ["default", "animals"]
    assert client.ask("GET", "/v1/collections/animals")[1]["documents"] == 3


def test_documents_are_replaced_and_removed(client: Client) -> None:
    client.ask("POST", "/v1/collections", {"name": "changing"})
    for text in ("an armadillo", "a pangolin"):
        client.ask("POST", "/v1/collections/changing/documents", {"documents": [{"id": "a/b", "text": text}]})
    for _ in range(6):
        assert client.found("changing", "armadillo") == []
        assert client.found("changing", "pangolins") == ["a/b"]
    assert client.ask("DELETE", "/v1/collections/changing/documents/a/b")[0] == 200
    assert client.ask("DELETE", "/v1/collections/changing/documents/a/b")[0] == 404
    for _ in range(6):
        assert client.found("changing", "pangolin") == []
    assert client.ask("DELETE", "/v1/collections/changing") == (
        200,
        {"object": "collection.deleted", "id": "changing", "deleted": True},
    )
    for _ in range(6):
        assert client.ask("GET", "/v1/collections/changing")[0] == 404


def test_questions_to_a_collection(client: Client) -> None:
    client.ask("POST", "/v1/collections", {"name": "capitals"})
    client.ask("POST", "/v1/collections/capitals/documents", {"documents": ANIMALS})
    status, body = client.ask("POST", "/v1/qa", {"question": "What is 北京?", "collection": "capitals", "passages": 1})
    assert status == 200, body
    assert [source["id"] for source in body["sources"]] == ["北京"]
    assert body["usage"]["completion_tokens"] > 0
    status, body = client.ask("POST", "/v1/qa", {"question": "What does json.dumps do?"})
    assert body["sources"][0]["title"] == "json.dumps"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/collections", {"name": "Not A Name"}, 400, "invalid_value"),
        ("POST", "/v1/collections", {"name": "default"}, 409, "collection_exists"),
        ("POST", "/v1/collections", {}, 400, "missing_parameter"),
        ("POST", "/v1/collections", {"name": "a", "more": 1}, 400, "unsupported_parameter"),
        ("POST", "/v1/collections", b"{", 400, None),
        ("GET", "/v1/collections/absent", None, 404, "collection_not_found"),
        ("GET", "/v1/collections/..%2Fuploads", None, 404, "unknown_url"),
        ("DELETE", "/v1/collections/absent", None, 404, "collection_not_found"),
        ("DELETE", "/v1/collections/default", None, 400, "collection_refused"),
        ("POST", "/v1/collections/default/documents", {"documents": [{"text": "a"}]}, 400, "collection_refused"),
        ("POST", "/v1/collections/absent/documents", {"documents": [{"text": "a"}]}, 404, "collection_not_found"),
        ("POST", "/v1/collections/absent/documents", {"documents": []}, 400, "invalid_value"),
        ("POST", "/v1/collections/absent/documents", {"documents": [{"text": ""}]}, 400, "invalid_value"),
        ("POST", "/v1/collections/absent/documents", {"documents": [{"text": "\ud800"}]}, 400, "invalid_value"),
        ("POST", "/v1/collections/absent/search", {"question": "a"}, 404, "collection_not_found"),
        ("POST", "/v1/collections/default/search", {"question": "a", "passages": 0}, 400, "invalid_value"),
        ("POST", "/v1/qa", {"question": "a", "collection": "absent"}, 404, "collection_not_found"),
    ],
)
def test_bad_requests(client: Client, method: str, path: str, body: Any, status: int, code: str | None) -> None:
    found, answer = client.ask(method, path, body)
    assert (found, answer["error"]["code"]) == (status, code), answer


def test_keys_are_asked_for(client: Client) -> None:
    for method, path in (("GET", ""), ("POST", ""), ("DELETE", "/animals"), ("POST", "/animals/search")):
        assert client.ask(method, f"/v1/collections{path}", None if method != "POST" else {}, key="wrong")[0] == 401


def test_names_are_taken_once(client: Client) -> None:
    assert client.ask("POST", "/v1/collections", {"name": "once"})[0] == 200
    status, body = client.ask("POST", "/v1/collections", {"name": "once"})
    assert (status, body["error"]["code"]) == (409, "collection_exists")


def test_collections_survive_a_restart(client: Client) -> None:
    client.ask("POST", "/v1/collections", {"name": "lasting"})
    client.ask("POST", "/v1/collections/lasting/documents", {"documents": ANIMALS})
    client.url = client.restart()
    assert client.found("lasting", "mane") == ["lion"]
