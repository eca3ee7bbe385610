"""The whole pipeline on the embedded corpus, each stage the command that a user would type.

Runs prepare, pretrain, finetune, tune, evaluate and compress as subprocesses with the recipes of
``jobs/recipes/quickstart``, then serves the compressed model and asks it over HTTP. A stage that is done already says
so and is passed over.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import raylm
from raylm.config import load_config
from raylm.errors import RunFailure, UserError
from raylm.quickstart.questions import answers_for_people

STAGES = ("prepare", "pretrain", "finetune", "tune", "evaluate", "compress")
QUESTION = "What does os.path.join do?"
COMPLETION_PROMPT = "Return the"
START_SECONDS, CTRL_C_SECONDS, STOP_SECONDS, STAGE_SECONDS = 180.0, 10.0, 60.0, 3600.0


def run_quickstart(directory: Path, *, keep_serving: bool = False) -> None:
    """Run everything with ``directory`` as the working directory; its ``runs/quickstart`` holds the results.

    Raises:
        UserError: the recipes are not there (an installation without the repository).
        RunFailure: a stage failed; the same command goes on from there.
    """
    recipes = Path(raylm.__file__).resolve().parents[1] / "jobs" / "recipes" / "quickstart"
    if not recipes.is_dir():
        raise UserError(f"{recipes}: no such directory; run the quickstart from a clone of the repository")
    directory.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with MemoryWatch() as memory:
        for number, stage in enumerate(STAGES, 1):
            print(f"\n== {number}/{len(STAGES) + 1} {stage}: raylm {stage} {recipes / stage}.yaml", flush=True)
            stage_began = time.monotonic()
            result = subprocess.run(
                [sys.executable, "-m", "raylm.cli", stage, str(recipes / f"{stage}.yaml")],
                cwd=directory,
                timeout=STAGE_SECONDS,
            )
            if result.returncode:
                raise RunFailure(f"quickstart: the stage {stage} ended with status {result.returncode}; see above")
            print(f"   {stage} took {time.monotonic() - stage_began:.0f} s", flush=True)
        print(f"\n== {len(STAGES) + 1}/{len(STAGES) + 1} serve: raylm serve {recipes / 'serve.yaml'}", flush=True)
        with _server(recipes / "serve.yaml", directory) as (url, process):
            _ask(url, directory / "runs" / "quickstart")
            print(f"\nquickstart: done in {time.monotonic() - began:.0f} s, peak memory {memory.peak / 1e9:.1f} GB")
            print("Try it (start the server with: raylm serve jobs/recipes/quickstart/serve.yaml):")
            body = json.dumps({"question": QUESTION})
            print(f"  curl -s {url}/v1/qa -H 'Content-Type: application/json' -d '{body}'", flush=True)
            if keep_serving:
                print(f"Serving on {url}; stop with Ctrl-C.", flush=True)
                _wait_for_ctrl_c(process)


@contextlib.contextmanager
def _server(recipe: Path, directory: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    serving = load_config("serve", recipe).serving
    url = f"http://{serving.host}:{serving.port}"
    process = subprocess.Popen([sys.executable, "-m", "raylm.cli", "serve", str(recipe)], cwd=directory)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(url):
            if process.poll() is not None:
                raise RunFailure(f"quickstart: the server ended with status {process.returncode}; see above")
            if time.monotonic() > deadline:
                raise RunFailure(f"quickstart: the server did not answer within {START_SECONDS:.0f} s")
            time.sleep(0.5)
        yield url, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for_ctrl_c(process: subprocess.Popen) -> None:
    try:
        process.wait()
    except KeyboardInterrupt:
        # A terminal tells the server as well; a second signal would interrupt its end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CTRL_C_SECONDS)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _post(url: str, body: dict[str, Any]):
    data = json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=120)


def _ask(url: str, runs: Path) -> None:
    for line in answers_for_people(url, runs):
        print(f"   {line}", flush=True)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
        model = json.load(response)["data"][0]["id"]
    print(f"   streamed completion: {COMPLETION_PROMPT}", end="", flush=True)
    request = {"model": model, "prompt": COMPLETION_PROMPT, "max_tokens": 40, "stream": True}
    with _post(f"{url}/v1/completions", request) as response:
        for line in response:
            if line.startswith(b"data: ") and b"[DONE]" not in line:
                choices = json.loads(line[len(b"data: ") :])["choices"]
                print("".join(choice["text"] for choice in choices), end="", flush=True)
    print(flush=True)


class MemoryWatch:
    """Peak memory of this process and everything it started, bytes: private pages plus the largest shared part."""

    def __init__(self, interval: float = 1.0) -> None:
        self.peak = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        root = psutil.Process()
        while not self._stop.wait(self._interval):
            private, shared = 0, 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    info = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                private += info.rss - info.shared
                shared = max(shared, info.shared)
            self.peak = max(self.peak, private + shared)
