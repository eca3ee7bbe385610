"""Figures of models as a fresh process finds them: the artifact is loaded again, and nothing of another is in memory.

In: jobs for :mod:`raylm.compression.measure` and :mod:`raylm.compression.measure_encoder`. Out: what they print. Speed
is measured in rounds over all models, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raylm.cluster.environment import inherited_environment
from raylm.errors import RunFailure
from raylm.progress import ProgressBar

# A third round is made where two differ by more than SPREAD in a speed, of each form.
ROUNDS, LEAST_ROUNDS, SPREAD = 3, 2, 0.05
# What the figures by batch end in.
MEASURED = ("_per_second", "_milliseconds")
MEASURE_SECONDS = 1800.0


@dataclass(frozen=True)
class Variant:
    """One form of the model.

    Attributes:
        name: in reports.
        engine: that runs it.
        path: its directory.
        describe: engine and numbers, in words.
    """

    name: str
    engine: Literal["transformers", "openvino"]
    path: str
    describe: str


def in_rounds(
    variants: Sequence[Variant], module: str, job: Callable[[Variant, int], dict[str, Any]], rounds: int | None = None
) -> list[Any]:
    """Of each variant what all rounds found.

    Args:
        job: of a variant in a round, from 0.
        rounds: how many; by default :data:`ROUNDS`, or fewer where the first agree.

    Raises:
        RunFailure: a process failed.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in variants]
    least = rounds or min(LEAST_ROUNDS, ROUNDS)
    rounds = rounds or ROUNDS
    with ProgressBar("compress: measuring the forms", rounds * len(variants), "measurements") as bar:
        for number in range(rounds):
            for place, variant in enumerate(variants):
                found[place].append(run_fresh(module, job(variant, number)))
                bar.update(bar.done + 1)
            if number + 1 >= least and all(agree(one) for one in found):
                break
    return found


def agree(found: Sequence[dict[str, Any]]) -> bool:
    """Whether rounds of one form differ by no more than :data:`SPREAD` in their speeds."""
    for name, value in found[0].items():
        for batch in value if name.endswith(MEASURED) else ():
            values = [one[name][batch] for one in found]
            if max(values) > (1 + SPREAD) * min(values):
                return False
    return True


def run_fresh(module: str, job: dict[str, Any]) -> dict[str, Any]:
    """What ``python -m module`` prints of the ``job``, which names ``engine`` and ``threads``.

    Raises:
        RunFailure: it failed; its last line.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "job.json"
        path.write_text(json.dumps(job))
        environment = inherited_environment() | {
            "OMP_NUM_THREADS": str(job["threads"]),
            "TOKENIZERS_PARALLELISM": "false",
        }
        result = subprocess.run(
            [sys.executable, "-m", module, str(path)],
            env=environment, capture_output=True, text=True, timeout=MEASURE_SECONDS,
        )  # fmt: skip
    if result.returncode:
        raise RunFailure(f"measuring {job['engine']} failed: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def medians(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One variant's rounds as their medians: of numbers, and of numbers by batch."""
    merged: dict[str, Any] = {}
    for name, value in found[0].items():
        if isinstance(value, dict):
            merged[name] = {batch: statistics.median(one[name][batch] for one in found) for batch in value}
        elif isinstance(value, int | float):
            merged[name] = statistics.median(one[name] for one in found)
    return merged


def agreement(before: list[list[int]], after: list[list[int]]) -> dict[str, float]:
    """How greedy outputs agree: share of equal tokens up to the first difference, and of identical outputs."""
    same = 0
    for one, other in zip(before, after, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return {
        "tokens_before_first_difference": same / sum(len(one) for one in before),
        "identical_outputs": statistics.mean(one == other for one, other in zip(before, after, strict=True)),
    }
