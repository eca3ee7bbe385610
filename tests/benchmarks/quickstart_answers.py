"""How many of the quickstart's held-out questions a model answers, served over HTTP as the quickstart serves it.

    python tests/benchmarks/quickstart_answers.py RUNS OUT.json [--model tune] [--questions 100] [--engine auto]

``RUNS`` is the ``runs/quickstart`` that ``raylm quickstart`` left. Starts a server of the run ``--model`` (finetune,
tune or compress) over ``RUNS/data`` on a free port, asks as the quickstart does, prints the figures with three right
and three wrong answers, and writes every answer as JSON.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from pathlib import Path

from raylm.config.loading import load_config
from raylm.quickstart.questions import ask_held_out
from raylm.serving.stage import running_server

RECIPE = Path(__file__).resolve().parents[2] / "jobs" / "recipes" / "quickstart" / "serve.yaml"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="compress")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as storage:
        overrides = [
            f"run.storage={storage}", f"model.path={arguments.runs / arguments.model}", f"serving.port={port}",
            f"serving.collection={arguments.runs / 'data'}", f"serving.engine={arguments.engine}",
        ]  # fmt: skip
        with running_server(load_config("serve", RECIPE, overrides)) as url:
            began = time.perf_counter()
            result = ask_held_out(url, arguments.runs / "finetune" / "data", arguments.questions)
            seconds = time.perf_counter() - began
    print("\n".join(result.lines()), f"\n{seconds:.1f} s")
    for kind, answers in zip(("right", "wrong"), result.examples(), strict=True):
        for answer in answers:
            print(f"{kind}: {answer.name}\n  answer: {answer.answer}\n  wanted: {answer.wanted}")
    figures = {"model": arguments.model, "engine": arguments.engine, "seconds": seconds, **result.as_dict()}
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
