"""/v1/collections in one process: whose a collection is, how much it may hold, and what a fault leaves of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from raylm.config.serving import CollectionQuota, ServingSection
from raylm.serving.deploy.models import Models
from raylm.serving.http.access import hash_key
from raylm.serving.http.gate import Gate, Limits
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.http.routes import create_app
from raylm.serving.retrieval.changes import MOST_OF_ONE
from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.errors import CollectionUnreachable
from raylm.serving.retrieval.indexer import Indexer
from raylm.serving.retrieval.library import Library
from raylm.serving.retrieval.records import StoredDocument

ALICE, BOB = "a-key-of-alice-0001", "a-key-of-bob-000001"
ZEBRA = {"id": "zebra", "text": "The zebra has stripes."}
LION = {"id": "lion", "text": "The lion has a mane."}


class Server:
    """The application with its gate, without sockets."""

    def __init__(self, root: Path, keys: tuple[str, ...] = (), **quota: float) -> None:
        metrics = ServerMetrics(export=False)
        self.library = Library(CollectionStore(root, Indexer().write), quota=CollectionQuota(**quota))
        app = create_app(Models([]), metrics, self.library)
        gate = Gate(app, Limits.of(ServingSection()), {hash_key(key): key[-5:] for key in keys}, metrics)
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://127.0.0.1")

    async def ask(self, method: str, path: str, body: Any = None, key: str = ALICE) -> tuple[int, Any]:
        """Status and JSON of one request."""
        headers = {"Authorization": f"Bearer {key}"}
        response = await self._client.request(method, f"/v1/collections{path}", json=body, headers=headers)
        return response.status_code, response.json()

    async def add(self, name: str, *documents: dict[str, str], key: str = ALICE) -> tuple[int, Any]:
        """Put documents in."""
        return await self.ask("POST", f"/{name}/documents", {"documents": list(documents)}, key)

    async def found(self, name: str, question: str, key: str = ALICE) -> list[str]:
        """Ids of what a question finds."""
        status, body = await self.ask("POST", f"/{name}/search", {"question": question}, key)
        assert status == 200, body
        return [source["id"] for source in body["data"]]

    async def names(self, key: str = ALICE) -> list[str]:
        """What the list has."""
        status, body = await self.ask("GET", "", key=key)
        assert status == 200, body
        return [entry["id"] for entry in body["data"]]

    async def count(self, name: str) -> tuple[int, int, int]:
        """Documents, passages and bytes of a collection."""
        entry = (await self.ask("GET", f"/{name}"))[1]
        return entry["documents"], entry["passages"], entry["bytes"]


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_collection_belongs_to_its_key(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server(tmp_path, (ALICE, BOB))
        assert (await server.ask("POST", "", {"name": "animals"}))[1]["common"] is False
        await server.add("animals", ZEBRA)
        assert await server.names() == ["animals"]
        assert await server.names(BOB) == []
        for method, path, body in (
            ("GET", "/animals", None),
            ("DELETE", "/animals", None),
            ("POST", "/animals/documents", {"documents": [LION]}),
            ("DELETE", "/animals/documents/zebra", None),
            ("POST", "/animals/search", {"question": "stripes"}),
        ):
            status, answer = await server.ask(method, path, body, BOB)
            assert (status, answer["error"]["code"]) == (404, "collection_not_found"), (method, path)
        # The name is free for others, and what they store is theirs.
        assert (await server.ask("POST", "", {"name": "animals"}, BOB))[0] == 200
        await server.add("animals", LION, key=BOB)
        assert await server.found("animals", "mane", BOB) == ["lion"]
        assert await server.found("animals", "mane or stripes") == ["zebra"]
        assert (await server.ask("DELETE", "/animals", key=BOB))[0] == 200
        assert await server.found("animals", "stripes") == ["zebra"]

    run(story)


def test_what_was_made_without_keys_is_common(tmp_path: Path) -> None:
    async def story() -> None:
        old = Server(tmp_path)
        await old.ask("POST", "", {"name": "old"})
        await old.add("old", ZEBRA)
        server = Server(tmp_path, (ALICE, BOB))
        await server.ask("POST", "", {"name": "mine"})
        _, body = await server.ask("GET", "")
        assert [(entry["id"], entry["common"]) for entry in body["data"]] == [("mine", False), ("old", True)]
        assert await server.names(BOB) == ["old"]
        assert (await server.add("old", LION, key=BOB))[0] == 200
        assert await server.found("old", "mane or stripes") == ["zebra", "lion"]
        assert (await server.ask("POST", "", {"name": "old"}, BOB))[0] == 409
        # Moved into a key's directory, it is that key's.
        (tmp_path / "old").rename(tmp_path / f"@{hash_key(ALICE)[:32]}" / "old")
        assert await server.found("old", "mane") == ["lion"]
        assert await server.names(BOB) == []
        assert await Server(tmp_path).names() == []

    run(story)


def test_quotas(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server(tmp_path, (ALICE, BOB), collections=2, documents=3, megabytes=0.001)
        for name in ("a", "b"):
            assert (await server.ask("POST", "", {"name": name}))[0] == 200
        status, body = await server.ask("POST", "", {"name": "c"})
        assert (status, body["error"]["message"]) == (413, "There are 2 collections, allowed: 2; delete one first")
        await server.add("a", ZEBRA, LION)
        await server.add("b", {"id": "x", "text": "é" * 100})
        status, body = await server.add("b", {"text": "one more"})
        assert (status, body["error"]["code"]) == (413, "quota_exceeded")
        assert body["error"]["message"] == (
            "The collections would hold 4 documents and 0.00 MB; used are 3 and 0.00 MB, allowed: 3 and 0.001 MB"
        )
        assert await server.count("b") == (1, 1, 200)
        # One in place of another is none more, unless it is too long.
        assert (await server.add("b", {"id": "x", "text": "y" * 950}))[0] == 200
        assert (await server.add("b", {"id": "x", "text": "y" * 960}))[0] == 413
        assert await server.count("b") == (1, 1, 950)
        # The room of another key, and of what was deleted.
        await server.ask("POST", "", {"name": "a"}, BOB)
        assert (await server.add("a", ZEBRA, LION, key=BOB))[0] == 200
        assert (await server.ask("DELETE", "/a/documents/zebra"))[0] == 200
        assert (await server.add("b", {"text": "one more"}))[0] == 200
        assert await server.count("a") == (1, 1, len(LION["text"]))

    run(story)


def test_white_space_is_no_document(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server(tmp_path)
        await server.ask("POST", "", {"name": "a"})
        status, body = await server.add("a", ZEBRA, {"text": " \n\u2003" * 1000})
        assert (status, body["error"]["code"]) == (400, "invalid_value")
        assert await server.count("a") == (0, 0, 0)

    run(story)


def test_a_damaged_collection_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server(tmp_path)
        for name in ("header", "facts", "pages", "current", "index", "whole"):
            await server.ask("POST", "", {"name": name})
            await server.add(name, *({"id": str(n), "text": f"stripes {n} " * 200} for n in range(20)))
        (tmp_path / "header" / "documents.sqlite").write_bytes(b"damaged" * 1000)
        with sqlite3.connect(tmp_path / "facts" / "documents.sqlite") as database:
            database.execute("DELETE FROM facts")
        database.close()
        pages = tmp_path / "pages" / "documents.sqlite"
        pages.write_bytes(pages.read_bytes()[:8192] + b"\xff" * (pages.stat().st_size - 8192))
        (tmp_path / "current" / "CURRENT").unlink()
        for array in (tmp_path / "index").glob("index-*/*/*.npy"):
            array.write_bytes(b"")
        status, body = await Server(tmp_path).ask("GET", "")
        entries = {entry["id"]: entry["status"] for entry in body["data"]}
        assert status == 200
        assert entries["header"] == entries["facts"] == entries["current"] == "damaged"
        assert entries["whole"] == "ready"
        server = Server(tmp_path)
        for name in ("header", "pages", "current", "index"):
            status, body = await server.ask("POST", f"/{name}/search", {"question": "stripes"})
            assert (status, body["error"]["code"]) == (409, "collection_damaged"), name
            assert f"'{name}' is damaged" in body["error"]["message"]
        assert len(await server.found("whole", "stripes")) == 3
        # A new index is made of what is there; what is gone can only be deleted.
        assert (await server.add("index", ZEBRA))[0] == 200
        assert "zebra" in await server.found("index", "zebra")
        for name in ("header", "facts", "pages", "current"):
            assert (await server.add(name, ZEBRA))[0] == 409, name
            assert (await server.ask("DELETE", f"/{name}"))[0] == 200, name
            assert (await server.ask("POST", "", {"name": name}))[0] == 200, name

    run(story)


def test_an_add_goes_on_when_its_client_leaves(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server(tmp_path)
        await server.ask("POST", "", {"name": "a"})
        documents = [{"id": str(number), "text": f"word{number} " * 100} for number in range(300)]
        client = asyncio.create_task(server.add("a", *documents))
        while not server.library.changes._tasks:
            await asyncio.sleep(0.001)
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        for _ in range(300):
            if (await server.count("a"))[0]:
                break
            await asyncio.sleep(0.1)
        # Never counted before it is found.
        assert (await server.count("a"))[0] == 300
        assert await server.found("a", "word299") == ["299"]

    run(story)


def test_waiting_changes_leave_searches_alone(tmp_path: Path) -> None:
    """Another process holds the collection, and more changes wait for it than any pool has threads."""

    async def story() -> None:
        server = Server(tmp_path)
        for name in ("held", "free"):
            await server.ask("POST", "", {"name": name})
            await server.add(name, ZEBRA)
        holder = sqlite3.connect(tmp_path / "held" / "documents.sqlite", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        adds = [asyncio.create_task(server.add("held", {"id": str(n), "text": "late"})) for n in range(MOST_OF_ONE + 4)]
        await asyncio.sleep(0.5)
        for name in ("held", "free"):
            began = time.monotonic()
            assert await server.found(name, "stripes") == ["zebra"]
            assert await server.names() == ["free", "held"]
            assert time.monotonic() - began < 2
        # No more wait than are allowed to.
        refused = [add.result() for add in adds if add.done()]
        assert [(status, body["error"]["code"]) for status, body in refused] == [(503, "server_busy")] * 4
        holder.rollback()
        holder.close()
        assert sorted(status for status, _ in await asyncio.gather(*adds)) == [200] * MOST_OF_ONE + [503] * 4
        assert (await server.count("held"))[0] == MOST_OF_ONE + 1

    run(story)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_refuses_and_leaves_nothing(small_disk: Path) -> None:
    async def story() -> None:
        server = Server(small_disk)
        await server.ask("POST", "", {"name": "a"})
        await server.add("a", ZEBRA)
        filler = small_disk / "filler"
        statuses = set()
        # Wherever the room ends: in the lock file, the database, its journal, or one of the files of the index.
        for free in range(0, 400_000, 12_000):
            filler.unlink(missing_ok=True)
            state = os.statvfs(small_disk)
            filler.write_bytes(b"\0" * max(0, state.f_bavail * state.f_bsize - free))
            text = " ".join(f"word{number}" for number in range(3000))
            status, body = await server.add("a", {"id": f"{free}", "text": text})
            statuses.add(status)
            if status != 200:
                assert (status, body["error"]["code"]) == (507, "no_room"), body
                assert await server.count("a") == (1, 1, len(ZEBRA["text"]))
                assert await server.found("a", "word1") == []
                assert (await server.ask("POST", "", {"name": "b"}))[0] in (200, 507)
                await server.ask("DELETE", "/b")
            else:
                assert await server.found("a", "word1") == [f"{free}"]
                assert (await server.ask("DELETE", f"/a/documents/{free}"))[0] in (200, 507)
                filler.unlink()
                await server.ask("DELETE", f"/a/documents/{free}")
            assert await server.found("a", "stripes") == ["zebra"]
        assert statuses == {200, 507}
        filler.unlink(missing_ok=True)
        assert (await server.add("a", LION))[0] == 200
        assert await server.found("a", "mane") == ["lion"]
        assert len(list((small_disk / "a").glob("*index-*"))) <= 2

    run(story)


def test_an_index_process_that_dies_leaves_nothing(tmp_path: Path) -> None:
    """As the kernel ends one for its memory: the change is refused, and the next has another process."""
    indexer, others = Indexer(), set(psutil.Process().children())
    collection = CollectionStore(tmp_path, indexer.write).create("animals")
    collection.add([StoredDocument("zebra", "", "stripes")])
    (process,) = set(psutil.Process().children()) - others
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    with pytest.raises(CollectionUnreachable, match="The process that makes indexes ended; try again later"):
        collection.add([StoredDocument("lion", "", "mane")])
    assert collection.facts().documents == len(collection.index()) == 1
    collection.add([StoredDocument("lion", "", "mane")])
    assert [match.passage.id for match in collection.search("mane", 5)] == ["lion"]
    indexer.close()
    assert set(psutil.Process().children()) <= others


LIMITED = """
import resource, sys
from pathlib import Path
from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.errors import NoRoom
from raylm.serving.retrieval.records import StoredDocument
collection = CollectionStore(Path(sys.argv[1])).get("animals")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    collection.add([StoredDocument("long", "", " ".join(f"word{number}" for number in range(20000)))])
except NoRoom as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100, 5000, 30_000, 60_000, 200_000])
def test_a_limit_on_files_leaves_nothing(tmp_path: Path, limit: int) -> None:
    collection = CollectionStore(tmp_path).create("animals")
    collection.add([StoredDocument("zebra", "", "stripes")])
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path, str(limit)], capture_output=True, text=True)
    assert done.stdout == "No room is left on the server's disk for the collection 'animals'; nothing was changed\n"
    assert done.stderr == ""
    assert collection.facts().documents == len(collection.index()) == 1
    files = {path.name for path in collection.path.iterdir() if not path.name.startswith("index-")}
    assert files == {"CURRENT", "documents.sqlite", ".build.lock"}
    collection.add([StoredDocument("lion", "", "mane")])
    assert [match.passage.id for match in collection.search("mane", 5)] == ["lion"]


def test_long_questions_are_refused(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server(tmp_path)
        await server.ask("POST", "", {"name": "a"})
        status, body = await server.ask("POST", "/a/search", {"question": "stripes " * 2000})
        assert (status, body["error"]["message"]) == (
            400, "question: found 16000 characters, allowed: at most 8000"
        )  # fmt: skip

    run(story)


def test_the_loop_goes_on_while_a_long_document_comes_in(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server(tmp_path)
        await server.ask("POST", "", {"name": "a"})
        lags = []

        async def watch() -> None:
            while True:
                began = time.monotonic()
                await asyncio.sleep(0.01)
                lags.append(time.monotonic() - began)

        watching = asyncio.create_task(watch())
        for text in ("\n" * 199_999 + "x", "北" * 200_000, "a. " * 60_000):
            assert (await server.add("a", {"text": text}))[0] == 200
        watching.cancel()
        assert max(lags) < 1

    run(story)
