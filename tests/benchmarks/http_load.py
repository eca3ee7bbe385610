"""A cheap client for load: one kept connection, streaming requests, and no JSON read before the answer is whole.

The machine's cores are shared with the server under load, so what a request costs here is kept below what it costs
there: answers are searched for their first text and, at the end, for their token count.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

_TEXT = re.compile(rb'"(?:text|content)": ?"[^"]')
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass
class Answer:
    """What came back for one request; times in seconds from sending it.

    Attributes:
        status: of the answer; 0 where the connection broke before there was one.
        first: to the first text; None where none came.
        whole: to the end.
        tokens: that the server counted, or pieces of text where it does not count.
        headers: of the answer, names in lower case.
        body: as it came.
        broken: what broke the connection off.
    """

    status: int = 0
    first: float | None = None
    whole: float = 0.0
    tokens: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    broken: str | None = None

    @property
    def complete(self) -> bool:
        """Whether a stream ended as it should."""
        return self.status == 200 and self.broken is None and b'"error"' not in self.body[-2000:]


class Client:
    """One connection, opened when it is needed and kept while the server keeps it.

    Args:
        port: on 127.0.0.1.
        path: of every request.
    """

    def __init__(self, port: int, path: str = "/v1/completions") -> None:
        self._port, self._path = port, path
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: dict, headers: dict[str, str] | None = None) -> Answer:
        """Send ``body`` and read the answer to its end."""
        answer, began = Answer(), time.perf_counter()
        kept = self._streams is not None
        try:
            await self._send(body, headers or {})
            try:
                await self._receive(answer, began)
            except (asyncio.IncompleteReadError, ConnectionError):
                # A server may close a kept connection whenever it likes: no request was refused by that.
                if not kept or answer.status:
                    raise
                self.close()
                await self._send(body, headers or {})
                await self._receive(answer, began)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            answer.broken = repr(error)
            self.close()
        answer.whole = time.perf_counter() - began
        counted = _USAGE.findall(answer.body)
        answer.tokens = int(counted[-1]) if counted else len(_TEXT.findall(answer.body))
        return answer

    async def leave(self, body: dict, after: float) -> None:
        """Send ``body`` and hang up ``after`` seconds later, whatever came by then."""
        await self._send(body, {})
        await asyncio.sleep(after)
        reader_writer, self._streams = self._streams, None
        if reader_writer is not None:
            reader_writer[1].transport.abort()

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _send(self, body: dict, headers: dict[str, str]) -> None:
        if self._streams is None or self._streams[0].at_eof():
            self.close()
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        data = json.dumps(body).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n{lines}\r\n"
        )
        self._streams[1].write(head.encode() + data)

    async def _receive(self, answer: Answer, began: float) -> None:
        assert self._streams is not None
        reader, _ = self._streams
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        answer.status = int(head[0].split(" ")[1])
        answer.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        if "content-length" in answer.headers:
            answer.body = await reader.readexactly(int(answer.headers["content-length"]))
        else:
            parts: list[bytes] = []
            while not parts or not (parts[-1] if len(parts[-1]) > 7 else b"".join(parts[-3:])).endswith(
                b"\r\n0\r\n\r\n"
            ):
                part = await reader.read(65536)
                if not part:
                    raise asyncio.IncompleteReadError(b"", None)
                parts.append(part)
                if answer.first is None and _TEXT.search(part):
                    answer.first = time.perf_counter() - began
            answer.body = b"".join(parts)
        if answer.headers.get("connection", "").lower() == "close":
            self.close()


def completion(model: str, prompt: str, new_tokens: int) -> dict:
    """A streaming greedy completion, with token counts at its end."""
    return {
        "model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def closed_loop(port: int, path: str, bodies: Sequence[dict], clients: int) -> tuple[list[Answer], float]:
    """All ``bodies`` through ``clients`` clients, each sending its next request when its last one has ended.

    Returns:
        The answers, and the seconds that all of it took.
    """
    waiting, answers = list(reversed(bodies)), []

    async def work() -> None:
        client = Client(port, path)
        while waiting:
            answers.append(await client.ask(waiting.pop()))
        client.close()

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    return answers, time.perf_counter() - began


async def open_loop(times: Sequence[float], ask: Callable[[int], Awaitable[None]], most_at_once: int) -> int:
    """Start ``ask(i)`` at ``times[i]`` seconds from now, whether the earlier ones have ended or not.

    Args:
        most_at_once: further ones are left out, as they would measure this client and not the server.

    Returns:
        How many were left out.
    """
    began, tasks, left_out = time.perf_counter(), set(), 0
    for number, due in enumerate(times):
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        if len(tasks) >= most_at_once:
            left_out += 1
            continue
        task = asyncio.create_task(ask(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return left_out


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lies; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def figures(results: Sequence[tuple[float, float, int]], seconds: float) -> dict[str, float]:
    """Figures of one cell: each result is (seconds to first text, seconds in all, tokens)."""
    firsts = [first for first, _, _ in results]
    tokens = sum(count for _, _, count in results)
    return {
        "tokens_per_second": tokens / seconds,
        "ttft_p50_ms": statistics.median(firsts) * 1e3,
        "ttft_p95_ms": quantile(firsts, 0.95) * 1e3,
        "tpot_p50_ms": statistics.median((whole - first) / max(count - 1, 1) for first, whole, count in results) * 1e3,
        "requests": len(results),
        "tokens": tokens,
        "seconds": seconds,
    }
