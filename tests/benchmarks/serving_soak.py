"""`raylm serve` under more than it can do: overload, clients that leave, a killed replica, a rolling update.

    python tests/benchmarks/serving_soak.py overload MODEL_DIRECTORY OUT.json --seconds 600
    python tests/benchmarks/serving_soak.py leave MODEL_DIRECTORY OUT.json --requests 1000
    python tests/benchmarks/serving_soak.py kill MODEL_DIRECTORY OUT.json
    python tests/benchmarks/serving_soak.py update MODEL_DIRECTORY OUT.json

``overload`` measures how many requests a second 32 clients get through, then sends twice as many at random times (a
Poisson process). It prints the answers by status, times to first token of those that were accepted, and the resident
memory of the server's processes. ``leave`` hangs up on streams half-way and looks whether the engine is empty
afterwards. ``kill`` and ``update`` put two replicas of one CPU each on a local Ray with `serve deploy`, under eight
clients.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import http_load
import psutil
from serving_load import PROCESSES, HttpArm, free_port, prompts, serve_command

from raylm.cluster.local_access import local_access

CLIENTS = 8
# Beyond these the client would run out of ports and cores, not the server of places.
MOST_AT_ONCE = 600
# As many as the language reference holds of 128 tokens; then they come again.
DIFFERENT_PROMPTS = 880
SAMPLE_SECONDS = 5.0


def health(port: int) -> dict:
    """What /health says."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as response:
        return json.load(response)


def resident_megabytes(root: psutil.Process) -> dict[str, float]:
    """Resident memory of the server's processes."""
    found: dict[str, float] = collections.defaultdict(float)
    for process in root.children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            for name, mark in PROCESSES.items():
                if mark in line:
                    found[name] += process.memory_info().rss / 1e6
        except psutil.Error:
            continue
    return dict(found)


def served(model: str, directory: str, **serving: object) -> HttpArm:
    """`raylm serve` in a process of its own, warm."""
    port = free_port()
    command = serve_command(model, os.cpu_count() or 1, port, Path(directory), **serving)
    arm = HttpArm("raylm", command, port, "/health", "model", chat=False, pausable=False)
    arm.run(prompts(model, 2, 32), 1, 4)
    return arm


def bodies(model: str, count: int, tokens: int, new_tokens: int) -> list[dict]:
    """``count`` requests; no prompt starts like another one, so none is found in the prefix cache."""
    texts = prompts(model, min(count, DIFFERENT_PROMPTS), tokens)
    return [
        http_load.completion("model", f"{number} {texts[number % len(texts)]}", new_tokens) for number in range(count)
    ]


def overload(arguments: argparse.Namespace) -> dict:
    """Twice the load that the server can take."""
    with tempfile.TemporaryDirectory() as directory:
        arm = served(arguments.model, directory)
        try:
            return asyncio.run(_overload(arm, arguments))
        finally:
            arm.stop()


async def _overload(arm: HttpArm, arguments: argparse.Namespace) -> dict:
    root = psutil.Process(arm.process.pid)
    warm = bodies(arguments.model, 96, arguments.prompt_tokens, arguments.new_tokens)
    answers, seconds = await http_load.closed_loop(arm.port, "/v1/completions", warm, 32)
    capacity = len(answers) / seconds
    print(
        f"capacity: {capacity:.2f} requests a second, {sum(a.tokens for a in answers) / seconds:.0f} tokens", flush=True
    )

    chance = random.Random(0)
    times: list[float] = []
    while not times or times[-1] < arguments.seconds:
        times.append((times[-1] if times else 0.0) + chance.expovariate(2 * capacity))
    load = bodies(arguments.model, len(times) + len(warm), arguments.prompt_tokens, arguments.new_tokens)[len(warm) :]
    results: list[tuple[float, http_load.Answer]] = []
    spare: list[http_load.Client] = []

    async def ask(number: int) -> None:
        client = spare.pop() if spare else http_load.Client(arm.port)
        answer = await client.ask(load[number])
        if answer.status == 503 and "retry-after" not in answer.headers:
            answer.broken = "503 without Retry-After"
        answer.body = answer.body[:300] if answer.status != 200 or answer.broken else b""
        results.append((times[number], answer))
        spare.append(client)

    memory: list[dict] = []

    async def watch() -> None:
        began = time.monotonic()
        while True:
            memory.append({"seconds": round(time.monotonic() - began, 1), **resident_megabytes(root)})
            await asyncio.sleep(SAMPLE_SECONDS)

    watching = asyncio.create_task(watch())
    left_out = await http_load.open_loop(times, ask, MOST_AT_ONCE)
    watching.cancel()
    load_after = health(arm.port)
    result = describe_overload([answer for _, answer in results], memory, arguments.seconds)
    result |= {"capacity_requests_per_second": capacity, "sent": len(results), "left_out": left_out}
    result |= {"running_after": load_after["running"], "waiting_after": load_after["waiting"], "memory": memory}
    return result


def describe_overload(answers: list[http_load.Answer], memory: list[dict], seconds: float) -> dict:
    """Answers by status, times of the accepted ones, and how memory grew from the second tenth to the last."""
    accepted = [answer for answer in answers if answer.status == 200]
    firsts = [answer.first for answer in accepted if answer.first is not None]
    refused = [answer.whole for answer in answers if answer.status in (429, 503)]
    tenth = max(1, len(memory) // 10)

    def megabytes(rows: list[dict]) -> float:
        return statistics.mean(sum(row.get(name, 0.0) for name in PROCESSES) for row in rows)

    early, late = megabytes(memory[tenth : 2 * tenth] or memory), megabytes(memory[-tenth:])
    return {
        "statuses": dict(collections.Counter(str(answer.status) for answer in answers)),
        "broken": collections.Counter(answer.broken for answer in answers if answer.broken).most_common(5),
        "incomplete": sum(not answer.complete for answer in accepted),
        "tokens_per_second": sum(answer.tokens for answer in accepted) / seconds,
        "ttft_seconds": {str(share): http_load.quantile(firsts, share) for share in (0.5, 0.95, 0.99, 1.0)},
        "refused_seconds": {str(share): http_load.quantile(refused, share) for share in (0.5, 0.95)},
        "memory_early_megabytes": early,
        "memory_late_megabytes": late,
        "memory_growth": late / early - 1,
    }


def leave(arguments: argparse.Namespace) -> dict:
    """Clients that hang up half-way."""
    with tempfile.TemporaryDirectory() as directory:
        arm = served(arguments.model, directory)
        try:
            return asyncio.run(_leave(arm, arguments))
        finally:
            arm.stop()


async def _leave(arm: HttpArm, arguments: argparse.Namespace) -> dict:
    before = health(arm.port)
    load = bodies(arguments.model, arguments.requests, 32, 200)
    chance, gate = random.Random(0), asyncio.Semaphore(48)

    async def ask(number: int) -> None:
        async with gate:
            # From at once to long after the first tokens.
            await http_load.Client(arm.port).leave(load[number], chance.uniform(0.0, 2.0))

    began = time.monotonic()
    await asyncio.gather(*(ask(number) for number in range(len(load))))
    ended = time.monotonic()
    while (after := health(arm.port))["running"] + after["waiting"] or after["models"]["model"]["cache_usage"]:
        if time.monotonic() - ended > 30:
            break
        await asyncio.sleep(0.1)
    return {
        "left": len(load),
        "seconds": ended - began,
        "seconds_until_empty": time.monotonic() - ended,
        "cancelled": after["cancelled"] - before["cancelled"],
        "finished": after["finished"] - before["finished"],
        "running": after["running"],
        "waiting": after["waiting"],
        "cache_usage": after["models"]["model"]["cache_usage"],
    }


class Deployment:
    """Two replicas on a local Ray, put there by `serve deploy`."""

    def __init__(self, model: str, directory: str) -> None:
        import ray

        os.environ.pop("RAY_ADDRESS", None)
        context = ray.init(address="local", include_dashboard=True, num_cpus=4, log_to_driver=False)
        self.port, self._model, self._directory = free_port(), model, Path(directory)
        self._environment = {**os.environ, "RAY_DASHBOARD_ADDRESS": f"http://{context.dashboard_url}"}

    def deploy(self, **serving: object) -> None:
        serving = {"name": "model", "cpus_per_replica": 1.0, "replicas": 2, "update_first": True, **serving}
        arguments = {
            "run": {"name": "deployed", "storage": str(self._directory)},
            "model": {"path": self._model},
            "serving": serving,
        }
        application = {"name": "app", "route_prefix": "/", "import_path": "raylm.serving.deploy.app:build_app"}
        values = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [application | {"args": arguments}],
        }
        path = self._directory / "serve.yaml"
        path.write_text(json.dumps(values))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(path)]
        subprocess.run(command, env=self._environment, check=True, capture_output=True, timeout=60)

    def replicas(self) -> list[int]:
        """Pids of those that run."""
        from ray import serve

        application = serve.status().applications.get("app")
        # While it is being built it has none.
        model = application.deployments.get("model") if application else None
        running = model.replica_states.get("RUNNING", 0) if model else 0
        found = []
        for process in psutil.Process().children(recursive=True):
            # One that was just killed has no command line.
            with contextlib.suppress(psutil.Error):
                if "ray::ServeReplica:app" in str(process.cmdline()):
                    found.append(process.pid)
        return found if len(found) == running else []

    async def wait(self, gone: set[int]) -> float:
        """Seconds until two replicas run, none of them ``gone``."""
        began = time.monotonic()
        while len(now := self.replicas()) != 2 or set(now) & gone:
            assert time.monotonic() - began < 180, now
            await asyncio.sleep(0.1)
        return time.monotonic() - began


def disturb(arguments: argparse.Namespace) -> dict:
    """A killed replica, or a rolling update, under load."""
    with local_access(), tempfile.TemporaryDirectory() as directory:
        deployment = Deployment(arguments.model, directory)
        import ray

        try:
            return asyncio.run(_disturb(deployment, arguments))
        finally:
            ray.shutdown()


async def _disturb(deployment: Deployment, arguments: argparse.Namespace) -> dict:
    deployment.deploy()
    await deployment.wait(set())
    load = bodies(arguments.model, 1000, 32, 32)
    answers: list[tuple[float, http_load.Answer]] = []
    stopped = asyncio.Event()

    async def work() -> None:
        client = http_load.Client(deployment.port)
        while not stopped.is_set():
            answers.append((time.monotonic(), await client.ask(load[len(answers) % len(load)])))

    working = [asyncio.create_task(work()) for _ in range(CLIENTS)]
    await asyncio.sleep(10)
    before, began = set(deployment.replicas()), time.monotonic()
    if arguments.what == "kill":
        os.kill(min(before), signal.SIGKILL)
        await asyncio.sleep(0.5)
        seconds = 0.5 + await deployment.wait({min(before)})
    else:
        await asyncio.to_thread(deployment.deploy, max_new_tokens=250)
        seconds = await deployment.wait(before)
    await asyncio.sleep(5)
    stopped.set()
    await asyncio.gather(*working)
    good = [ended for sent, a in answers if a.complete and (ended := sent + a.whole) > began]
    gaps = [later - earlier for earlier, later in zip(sorted(good), sorted(good)[1:], strict=False)]
    failed = [
        {"status": a.status, "broken": a.broken, "body": a.body.decode()[:200]} for _, a in answers if not a.complete
    ]
    return {
        "answers": len(answers),
        "failed": len(failed),
        "failures": failed[:10],
        "seconds_until_two_replicas": seconds,
        "longest_gap_between_answers_seconds": max(gaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overload", "leave", "kill", "update"])
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    result = {"overload": overload, "leave": leave}.get(arguments.what, disturb)(arguments)
    arguments.output.write_text(json.dumps(result))
    print(json.dumps({key: value for key, value in result.items() if key != "memory"}, indent=1))


if __name__ == "__main__":
    main()
