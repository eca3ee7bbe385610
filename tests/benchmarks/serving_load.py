"""`raylm serve` under load from another process, beside the bare engine on the same model and cores.

Closed loop: each client sends its next request when its last one has ended. Arms take turns; figures are medians over
rounds, and ratios are of medians. Time to first token is from sending the request to the first token's arrival.

    python tests/benchmarks/serving_load.py MODEL_DIRECTORY --output load.json
    python tests/benchmarks/serving_load.py MODEL_DIRECTORY --arms raylm --clients 1,8

MODEL_DIRECTORY is a Hugging Face directory with an ``openvino/`` export (`raylm compress`). Arms: ``engine`` (OpenVINO
GenAI's pipeline in one process, no HTTP) and ``raylm``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp

# Requests of each client, by the number of clients: a cell takes some ten seconds on two cores.
REQUESTS = {1: 8, 8: 4, 32: 2}
START_SECONDS = 240


def prompts(model: str, count: int, tokens: int) -> list[str]:
    """``count`` texts of ``tokens`` tokens each from the Python language reference, no two with the same start."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), verbose=False)["input_ids"]
    return [tokenizer.decode(ids[place : place + tokens]) for place in range(0, count * tokens, tokens)]


async def stream(session: aiohttp.ClientSession, url: str, body: dict) -> tuple[float, float, int]:
    """Send one streaming request; seconds to the first token and to the end, and how many tokens came."""
    began, first, events, counted = time.perf_counter(), None, 0, None
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            assert "error" not in event, event
            if event.get("usage"):
                counted = event["usage"]["completion_tokens"]
            if event["choices"] and event["choices"][0]["text"]:
                first = first or time.perf_counter()
                events += 1
    end = time.perf_counter()
    # A server that does not count sends one event a token.
    return (first or end) - began, end - began, events if counted is None else counted


async def load(url: str, model: str, texts: list[str], clients: int, new_tokens: int) -> dict:
    """Run all ``texts`` through ``clients`` clients."""
    waiting = list(reversed(texts))
    results: list[tuple[float, float, int]] = []

    async def client(session: aiohttp.ClientSession) -> None:
        while waiting:
            body = {
                "model": model, "prompt": waiting.pop(), "max_tokens": new_tokens, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            results.append(await stream(session, url, body))

    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seconds = time.perf_counter() - began
    return summary(results, seconds)


def summary(results: list[tuple[float, float, int]], seconds: float) -> dict:
    """Figures of one cell: each result is (seconds to first token, seconds in all, tokens)."""
    firsts = sorted(first for first, _, _ in results)
    tokens = sum(count for _, _, count in results)
    return {
        "tokens_per_second": tokens / seconds,
        "ttft_p50_ms": statistics.median(firsts) * 1e3,
        "ttft_p95_ms": firsts[int(0.95 * (len(firsts) - 1))] * 1e3,
        "tpot_p50_ms": statistics.median((total - first) / max(count - 1, 1) for first, total, count in results) * 1e3,
        "requests": len(results),
        "tokens": tokens,
        "seconds": seconds,
    }


class HttpArm:
    """A server in a process of its own."""

    def __init__(self, name: str, command: list[str], port: int, ready: str, model: str) -> None:
        self.name, self._url, self._model = name, f"http://127.0.0.1:{port}", model
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        end = time.monotonic() + START_SECONDS
        while not self._answers(ready):
            assert self.process.poll() is None, f"{name} ended with status {self.process.returncode}"
            assert time.monotonic() < end, f"{name} did not come up"
            time.sleep(0.5)

    def _answers(self, path: str) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self._url + path, timeout=5) as response:
            return response.status == 200
        return False

    def run(self, texts: list[str], clients: int, new_tokens: int) -> dict:
        return asyncio.run(load(self._url, self._model, texts, clients, new_tokens))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


class EngineArm:
    """OpenVINO GenAI's pipeline, stepped in a process of its own that does nothing else."""

    name = "engine"

    def __init__(self, model: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, model, "--engine-process", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def run(self, texts: list[str], clients: int, new_tokens: int) -> dict:
        self.process.stdin.write(json.dumps({"texts": texts, "clients": clients, "new_tokens": new_tokens}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def engine_process(model: str, threads: int) -> None:
    """Read jobs from stdin, run each through the bare pipeline in a closed loop, print its figures."""
    import numpy as np
    import openvino
    import openvino_genai
    from transformers import AutoTokenizer

    from raylm.models.openvino import open_pipeline

    tokenizer = AutoTokenizer.from_pretrained(model)
    pipeline = open_pipeline(model, 1, threads)
    number = 0
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        config = openvino_genai.GenerationConfig(
            max_new_tokens=job["new_tokens"], do_sample=False, stop_token_ids={tokenizer.eos_token_id}
        )
        waiting, active, results = list(reversed(job["texts"])), {}, []
        began = time.perf_counter()
        while waiting or active:
            while waiting and len(active) < job["clients"]:
                sent = time.perf_counter()
                ids = np.array([tokenizer(waiting.pop())["input_ids"]], dtype=np.int64)
                handle = pipeline.add_request(number, openvino.Tensor(ids), config)
                active[number] = [handle, sent, None, 0]
                number += 1
            pipeline.step()
            for key, state in list(active.items()):
                while state[0].can_read():
                    state[3] += sum(len(output.generated_ids) for output in state[0].read().values())
                now = time.perf_counter()
                state[2] = state[2] or (now if state[3] else None)
                if state[0].get_status() != openvino_genai.GenerationStatus.RUNNING:
                    results.append((state[2] - state[1], now - state[1], state[3]))
                    del active[key]
        print(json.dumps(summary(results, time.perf_counter() - began)), flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def open_arm(name: str, model: str, threads: int, directory: Path) -> HttpArm | EngineArm:
    """Start the arm called ``name``."""
    if name == "engine":
        return EngineArm(model, threads)
    port = free_port()
    recipe = directory / "serve.yaml"
    recipe.write_text(
        f"run: {{name: load, storage: {directory}}}\nmodel: {{path: {model}}}\n"
        f"serving: {{port: {port}, name: model, cpus_per_replica: {float(threads)}}}\n"
    )
    return HttpArm(name, [sys.executable, "-m", "raylm.cli", "serve", str(recipe)], port, "/health", "model")


@contextlib.contextmanager
def running(names: list[str], model: str, threads: int) -> Iterator[list[HttpArm | EngineArm]]:
    """All arms, started one after the other, stopped at the end."""
    arms: list[HttpArm | EngineArm] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            for name in names:
                arms.append(open_arm(name, model, threads, Path(directory)))
                arms[-1].run(prompts(model, 2, 32), 1, 4)
            yield arms
        finally:
            for arm in arms:
                arm.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--arms", default="engine,raylm")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("serving_load.json"))
    parser.add_argument("--engine-process", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine_process:
        engine_process(arguments.model, arguments.engine_process)
        return
    counts = [int(count) for count in arguments.clients.split(",")]
    names = arguments.arms.split(",")
    if unknown := set(names) - {"engine", "raylm"}:
        parser.error(f"--arms: found {', '.join(sorted(unknown))}, allowed: engine, raylm")
    needed = {count: count * REQUESTS.get(count, 2) for count in counts}
    # Fresh texts for every cell: no arm finds a prompt in its prefix cache.
    texts = iter(prompts(arguments.model, arguments.rounds * sum(needed.values()), arguments.prompt_tokens))
    cells = []
    with running(names, arguments.model, arguments.threads) as arms:
        for round_number in range(arguments.rounds):
            for count in counts:
                chosen = [next(texts) for _ in range(needed[count])]
                # Every round starts with another arm.
                for arm in arms[round_number % len(arms) :] + arms[: round_number % len(arms)]:
                    figures = arm.run(chosen, count, arguments.new_tokens)
                    cells.append({"arm": arm.name, "clients": count, "round": round_number, **figures})
                    print(json.dumps(cells[-1]), flush=True)
    arguments.output.write_text(
        json.dumps({"arguments": {k: str(v) for k, v in vars(arguments).items()}, "cells": cells})
    )
    report(cells, names, counts)


def report(cells: list[dict], names: list[str], counts: list[int]) -> None:
    """Print medians, and each arm's throughput against the first arm's."""
    print(f"{'clients':>8}{'arm':>12}{'tokens/s':>10}{'of first':>10}{'TTFT p50 ms':>13}{'p95':>8}{'TPOT ms':>9}")
    for count in counts:
        base = None
        for name in names:
            rows = [cell for cell in cells if cell["arm"] == name and cell["clients"] == count]
            median = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key not in ("arm",)}
            base = base or median["tokens_per_second"]
            print(
                f"{count:>8}{name:>12}{median['tokens_per_second']:>10.1f}{median['tokens_per_second'] / base:>10.2f}"
                f"{median['ttft_p50_ms']:>13.0f}{median['ttft_p95_ms']:>8.0f}{median['tpot_p50_ms']:>9.1f}"
            )


if __name__ == "__main__":
    main()
