"""Does a searcher that learns find a better Pareto front than random draws, in the same number of trials?

    python tests/benchmarks/pareto_search.py MODEL DATA OUTPUT.json [--trials 12] [--seeds 1]

MODEL is a Llama that raylm trained (its run directory), DATA its prepared set. Both searchers compress it over layers,
neurons, bits and groups, one search after the other, from the same seed. OUTPUT has every trial, the fronts, the time
of each search, and the hypervolume of each front after every trial: of the box below the original model's figures, the
share that the front covers (Zitzler and Thiele 1999).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

OBJECTIVES = ("quality", "megabytes", "p50_milliseconds")
# Quality of the worst model that counts, as a multiple of the original's bits per byte.
WORST_QUALITY = 2.0


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume that ``points``, of which smaller is better, cover below ``reference``; by slices of the last figure."""
    inside = [point for point in points if all(a < b for a, b in zip(point, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(point[0] for point in inside)
    total, ordered = 0.0, sorted(inside, key=lambda point: point[-1])
    for number, point in enumerate(ordered):
        top = ordered[number + 1][-1] if number + 1 < len(ordered) else reference[-1]
        total += (top - point[-1]) * hypervolume([one[:-1] for one in ordered[: number + 1]], reference[:-1])
    return total


def search(model: str, data: str, searcher: str, trials: int, seed: int, directory: Path) -> dict[str, Any]:
    """One search; its report, with the seconds that it took."""
    values = {
        "run": {"name": f"{searcher}-{seed}", "storage": str(directory), "seed": seed},
        "data": {"train": data},
        "model": {"path": model},
        "evaluation": {"sequence_length": 256, "stride": 256},
        "compression": {
            "prompts": 4,
            "steps": [
                {"prune": {"layers": 7, "neurons": 832, "samples": 16}},
                {"quantize": {"bits": 8}},
            ],
        },
        "tuning": {
            "searcher": searcher,
            "trials": trials,
            "space": {
                "compression.steps.0.prune.layers": {"choice": [4, 5, 6, 7]},
                "compression.steps.0.prune.neurons": {"choice": [448, 576, 704, 832]},
                "compression.steps.1.quantize.bits": {"choice": [8, 4]},
            },
        },
    }
    path = directory / f"{searcher}-{seed}.yaml"
    path.write_text(yaml.safe_dump(values))
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "raylm.cli", "tune", str(path)], check=True)
    report = json.loads((directory / f"{searcher}-{seed}" / "report.json").read_text())
    return report | {"seconds": time.monotonic() - began}


def covered(report: dict[str, Any]) -> list[float]:
    """Share of the box that the front covers after each trial."""
    original = report["original"]
    reference = [original["quality"] * WORST_QUALITY, original["megabytes"], original["p50_milliseconds"]]
    box = 1.0
    for bound, least in zip(reference, (original["quality"], 0.0, 0.0), strict=True):
        box *= bound - least
    points = [[row[name] for name in OBJECTIVES] for row in report["trials"] if row["status"] == "finished"]
    return [hypervolume(points[: count + 1], reference) / box for count in range(len(points))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output", type=Path)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(given.seeds):
            for searcher in ("tpe", "random"):
                report = search(given.model, given.data, searcher, given.trials, seed, Path(directory))
                shares = covered(report)
                rows.append({"searcher": searcher, "seed": seed, "covered": shares, **report})
                print(f"{searcher}, seed {seed}: {shares[-1]:.4f} of the box, {report['seconds']:.0f} s", flush=True)
    given.output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
