"""Hostile requests to /v1/collections, in one process: what ends with status 500, and how long the loop stands still.

    python -m tests.fuzz.collection_requests --minutes 10 [--seed N]

Several clients with keys of their own make, fill, search and delete collections at once. Names, documents and bodies
are what clients should not send: control characters, long runs of one character, deep JSON, ids with slashes. Some
clients leave before their answer; now and then a file of a collection is damaged. Prints counts of statuses as JSON;
exits with status 1 if there was a 5xx other than 503, a traceback, or a stall of the event loop.

Memory is that of this process, client and server, after a garbage collection, at each tenth of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from raylm.config.serving import CollectionQuota, ServingSection
from raylm.serving.deploy.models import Models
from raylm.serving.http.access import hash_key
from raylm.serving.http.gate import Gate, Limits
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.http.routes import create_app
from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.indexer import Indexer
from raylm.serving.retrieval.library import Library

KEYS = [f"a-key-of-the-fuzz-{number:04}" for number in range(3)]
STALL_SECONDS = 0.25
NAMES = ["a", "b", "c-d", "0_", "z" * 64, "default"]
BAD_NAMES = ["", "A", "..", "../a", "a/b", "a%00", "z" * 65, "北京", ".hidden", "@a", "a b", "a\n", "\ud800", "CURRENT"]
# What texts are made of: words, white space, scripts without spaces, ends of sentences, names with dots.
PIECES = [
    "\n", "\n ", " ", "\t", "\u2003", "\x00", "\x85", "\u200b", "中", "。", "ア", ".", "!", "? ", "a", "a.", "a.b",
    "_", "__a", "word ", "The zebra has stripes. ", "os.path.join ", "Straße ", "\U0001f600", "\u202e", "e\u0301", "'",
    '"', "%", "\\", "ies ", "the of and ", "什么是", "1,2,3,", "\u0130", "\uffff", "<script>", "DROP TABLE facts",
]  # fmt: skip
BAD_BODIES = [b"", b"{", b"null", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000]
BAD_VALUES = [None, True, 0, -1, 1.5, 10**30, "", [], {}, [[]], "\ud800", {"text": "a"}, [None], "x" * 300]


class Fuzz:
    """The server, its hostile clients, and what was seen."""

    def __init__(self, root: Path, seed: int) -> None:
        self.random, self.root = random.Random(seed), root
        metrics = ServerMetrics(export=False)
        quota = CollectionQuota(collections=5, documents=3000, megabytes=12)
        self.library = Library(CollectionStore(root, Indexer().write), quota=quota)
        gate = Gate(
            create_app(Models([]), metrics, self.library),
            Limits.of(ServingSection()),
            {hash_key(key): key for key in KEYS},
            metrics,
        )
        transport = httpx.ASGITransport(gate, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None)
        self.statuses: Counter[str] = Counter()
        self.faults: list[str] = []
        self.stalls: list[tuple[float, float, str]] = []
        self.watching = asyncio.Event()
        self.doing: dict[int, str] = {}

    def text(self, most: int) -> str:
        """Runs of pieces, up to ``most`` characters."""
        made, size = [], 0
        wanted = int(most ** self.random.random())
        while size < wanted:
            piece = self.random.choice(PIECES)
            run = piece * self.random.choice([1, 1, 1, 2, 10, 1000, 100_000])
            made.append(run[: wanted - size])
            size += len(made[-1])
        return "".join(made)

    def documents(self) -> list[Any]:
        """A few documents, some of them none."""
        count = self.random.choice([1, 1, 1, 2, 5, 50, 1000, 1001])
        made = []
        for _ in range(count):
            document: dict[str, Any] = {"text": self.text(2_000_000 if count < 3 else 3_500_000 // count)}
            if self.random.random() < 0.5:
                document["id"] = self.random.choice(["x", "a/b", "..", "?", "#", "\x00", self.text(300)])
            if self.random.random() < 0.3:
                document["title"] = self.text(1100)
            if count < 60 and self.random.random() < 0.03:
                document[self.random.choice(["id", "text", "title", "more"])] = self.random.choice(BAD_VALUES)
            made.append(document)
        return made

    def body(self, good: dict[str, Any]) -> bytes:
        """``good`` as JSON, or something worse in its place."""
        draw = self.random.random()
        if draw < 0.02:
            return self.random.choice(
                [b"", b"{", b"null", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000]
            )
        if draw < 0.03:
            return b'{"documents":[' + b"0," * self.random.randrange(1_900_000) + b"0]}"
        if draw < 0.06:
            good = good | {self.random.choice([*good, "more"]): self.random.choice(BAD_VALUES)}
        return json.dumps(good).encode()

    def request(self) -> tuple[str, str, bytes | None]:
        """Method, path and body of the next request."""
        draw, name = self.random.random(), self.random.choice(NAMES)
        if self.random.random() < 0.05:
            name = self.random.choice(BAD_NAMES).encode("utf-8", "replace").decode()
        path = f"/v1/collections/{name}"
        if draw < 0.15:
            return "POST", "/v1/collections", self.body({"name": name})
        if draw < 0.45:
            return "POST", f"{path}/documents", self.body({"documents": self.documents()})
        if draw < 0.75:
            question = self.text(9000)
            return "POST", f"{path}/search", self.body({"question": question, "passages": self.random.randint(1, 20)})
        if draw < 0.85:
            return "GET", self.random.choice([path, "/v1/collections"]), None
        if draw < 0.95:
            return "DELETE", f"{path}/documents/{self.random.choice(['x', 'a/b', '..', '%2e%2e', '%00'])}", None
        return "DELETE", path, None

    async def attack(self, number: int, end: float) -> None:
        """One client, until ``end``."""
        while time.monotonic() < end:
            # In a thread: making a long text must not look like a server that stands still.
            method, path, body = await asyncio.to_thread(self.request)
            key = self.random.choice([*KEYS, *KEYS, *KEYS, "a wrong key"])
            headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            self.doing[number] = f"{method} {path[:80]} {len(body or b'')} bytes: {(body or b'')[:80]!r}"
            try:
                sending = self.client.request(method, path, content=body, headers=headers)
                patience = self.random.uniform(0, 1) if self.random.random() < 0.1 else 120
                response = await asyncio.wait_for(sending, patience)
            except (TimeoutError, httpx.InvalidURL) as error:
                late = isinstance(error, TimeoutError) and patience == 120
                self.statuses["no answer" if late else "left"] += 1
                if late:
                    self.faults.append(f"no answer in 120 s: {self.doing[number]}")
                continue
            status = response.status_code
            self.statuses[f"{method} {response.request.url.path.count('/')} {status}"] += 1
            if status >= 500 and status != 503:
                self.faults.append(f"{status}: {self.doing[number]}: {response.text[:300]}")
            elif status >= 400 and "\n" in response.json()["error"]["message"]:
                self.statuses["message of several lines"] += 1

    async def watch(self) -> None:
        """Measure how long this process computes without a turn of the event loop."""
        while True:
            await self.watching.wait()
            began, computed = time.monotonic(), time.process_time()
            await asyncio.sleep(0.01)
            lag, busy = time.monotonic() - began - 0.01, time.process_time() - computed
            # A machine with other work stops the process now and then; that is no stall of its own.
            if min(lag, busy) > STALL_SECONDS and self.watching.is_set():
                self.stalls.append((round(lag, 3), round(busy, 3), " | ".join(self.doing.values())))

    async def damage(self) -> None:
        """Now and then write nonsense into a file of a collection; its requests get 409 until it is deleted."""
        while True:
            await asyncio.sleep(20)
            files = [path for path in self.root.rglob("*") if path.is_file() and path.suffix in (".sqlite", "")]
            if files:
                with contextlib.suppress(OSError):
                    self.random.choice(files).write_bytes(self.random.randbytes(2000))
                    self.statuses["files damaged"] += 1

    async def run(self, seconds: float, clients: int) -> list[float]:
        """All clients; gives the process's memory in MB at each tenth of the time."""
        end = time.monotonic() + seconds
        helpers = [asyncio.create_task(self.watch()), asyncio.create_task(self.damage())]
        attackers = [asyncio.create_task(self.attack(number, end)) for number in range(clients)]
        memory = []
        for _ in range(10):
            self.watching.set()
            await asyncio.sleep(seconds / 10)
            # Collecting garbage takes time as well, and is no request's.
            self.watching.clear()
            await asyncio.sleep(0.1)
            memory.append(resident())
        await asyncio.gather(*attackers)
        for helper in helpers:
            helper.cancel()
        # Changes whose client has left are finished, too.
        while self.library.changes._tasks:
            await asyncio.sleep(0.1)
        return [*memory, resident()]


def resident() -> float:
    """Memory of this process in MB, without what the allocator only keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    logging.getLogger("raylm").addHandler(logging.StreamHandler(sys.stdout))
    with tempfile.TemporaryDirectory() as directory:
        fuzz = Fuzz(Path(directory), arguments.seed)
        try:
            memory = asyncio.run(fuzz.run(arguments.minutes * 60, arguments.clients))
        except Exception:  # noqa: BLE001 - what was counted until then is worth showing
            fuzz.faults.append(traceback.format_exc())
            memory = []
    requests = sum(count for what, count in fuzz.statuses.items() if what[-3:].isdigit())
    result = {
        "requests": requests,
        "statuses": dict(sorted(fuzz.statuses.items())),
        "faults": fuzz.faults[:20],
        "stalls": len(fuzz.stalls),
        "longest_stalls": sorted(fuzz.stalls, reverse=True)[:5],
        "memory_mb": memory,
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    sys.exit(1 if fuzz.faults or fuzz.stalls else 0)


if __name__ == "__main__":
    main()
