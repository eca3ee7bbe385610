"""Latency of an extractive reader at one window of 384 tokens: fp32, int8, and int8 behind /v1/qa.

The two engines take turns in one process; then a server is started, and one client, and eight at a time, ask it from
this process. Every window is full: the context is as long as the window holds. Prints medians, writes all times.

    python tests/benchmarks/reader_latency.py COMPRESSED_READER OUT.json
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from raylm.config.loading import validate
from raylm.config.stages import ServeConfig
from raylm.data.loading import load_tokenizer, resolve_model
from raylm.data.samples.windows import Window, Windows, pad
from raylm.models.encoders import open_encoder
from raylm.models.heads import READER
from raylm.serving.stage import running_server

QUESTION = "Where was the treaty signed that ended the war?"
SENTENCE = "The treaty that ended the war was signed in the old town hall of the city by both of the parties. "
CLIENTS = 8


def full_context(directory: str, length: int) -> tuple[str, Window]:
    """The longest context of whole words that one window holds, and the window."""
    cutter = Windows(load_tokenizer(directory), length, length // 3)
    words = (SENTENCE * length).split(" ")
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        windows = list(cutter.cut(QUESTION, " ".join(words[:middle])))
        low, high = (middle, high) if len(windows) == 1 else (low, middle - 1)
    context = " ".join(words[:low])
    (window,) = cutter.cut(QUESTION, context)
    return context, window


def engines(directory: str, window: Window, length: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Milliseconds of each engine for one window, in turns."""
    batch = pad([window], 0, length)
    readers = {name: open_encoder(directory, READER, threads, engine=name) for name in ("transformers", "openvino")}
    found: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 5):
        for name, reader in readers.items():
            began = time.perf_counter()
            reader.outputs(batch)
            if number >= 5:
                found[name].append((time.perf_counter() - began) * 1e3)
    return found


def served(directory: str, context: str, length: int, requests: int) -> dict[str, Any]:
    """Milliseconds of each request to /v1/qa by one client, and by several at a time."""
    with tempfile.TemporaryDirectory() as storage:
        values = {
            "run": {"name": "reader", "storage": storage},
            "model": {"path": directory},
            "serving": {"port": 8765, "reading": {"sequence_length": length}},
        }
        with running_server(validate(ServeConfig, values, "benchmark")) as url:

            def ask(_: int) -> float:
                body = json.dumps({"question": QUESTION, "context": context}).encode()
                request = urllib.request.Request(f"{url}/v1/qa", body, {"Content-Type": "application/json"})
                began = time.perf_counter()
                with urllib.request.urlopen(request, timeout=60) as response:
                    assert json.load(response)["mode"] == "extractive"
                return (time.perf_counter() - began) * 1e3

            for number in range(10):
                ask(number)
            alone = [ask(number) for number in range(requests)]
            began = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                together = list(pool.map(ask, range(requests)))
            seconds = time.perf_counter() - began
    return {"one_client": alone, "eight_clients": together, "eight_clients_per_second": requests / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    directory = resolve_model(arguments.model)
    context, window = full_context(directory, arguments.length)
    milliseconds: dict[str, Any] = engines(directory, window, arguments.length, arguments.rounds, arguments.threads)
    http = served(directory, context, arguments.length, arguments.rounds)
    result = {
        "model": arguments.model,
        "window_tokens": len(window.input_ids),
        "threads": arguments.threads,
        "milliseconds": milliseconds | http,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"one window of {len(window.input_ids)} tokens, {arguments.threads} threads, milliseconds (p50, p95):")
    for name in ("transformers", "openvino", "one_client", "eight_clients"):
        times = result["milliseconds"][name]
        print(f"  {name:<16}{statistics.median(times):8.1f}{float(np.percentile(times, 95)):8.1f}")
    print(f"  {http['eight_clients_per_second']:.1f} questions a second with {CLIENTS} clients")


if __name__ == "__main__":
    main()
