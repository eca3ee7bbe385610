"""Ray Tune over training: search spaces, how many trials fit at a time, and the trial itself.

A trial is a real training run in its own directory, ``<run>/trials/<trial>/``. With one worker it trains inside the
trial's own process; with several it starts a nested Ray Train run and reserves nothing itself, and as many trials run
at a time as the cluster holds whole worker groups, so that trials never wait for each other's resources.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

from raylm.config.loading import set_key, validate
from raylm.config.run_directory import write_atomically
from raylm.config.stages import FinetuneConfig, TuneConfig
from raylm.config.tuning import Distribution
from raylm.errors import UserError
from raylm.training.worker import TrainingJob, Worker, join_single_process_group

# A sliver of the head node's own marker resource: places the trial without taking a CPU from its workers.
HEAD_NODE_SHARE = {"node:__internal_head__": 0.001}


def draw_candidates(space: dict[str, Distribution], trials: int, seed: int) -> list[dict[str, Any]]:
    """``trials`` draws from ``space`` for each point of its grids; a pure function of ``seed``."""
    grids: list[dict[str, Any]] = [{}]
    for key, distribution in space.items():
        if distribution.grid is not None:
            grids = [{**point, key: value} for point in grids for value in distribution.grid]
    generator = random.Random(seed)
    rounds = trials if any(d.grid is None for d in space.values()) else 1
    candidates = []
    for _ in range(rounds):
        for point in grids:
            drawn = {key: _draw(d, generator) for key, d in space.items() if d.grid is None}
            candidates.append({key: {**point, **drawn}[key] for key in space})
    return candidates


def _draw(distribution: Distribution, generator: random.Random) -> Any:
    if distribution.choice is not None:
        return generator.choice(distribution.choice)
    if distribution.integer is not None:
        return generator.randint(*distribution.integer)
    if distribution.uniform is not None:
        return generator.uniform(*distribution.uniform)
    low, high = distribution.log_uniform
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def trial_config(config: TuneConfig, candidate: dict[str, Any], origin: str = "tuning.space") -> FinetuneConfig:
    """The fine-tuning configuration with the ``candidate``'s dotted keys set.

    Raises:
        UserError: a key does not exist or a value is not allowed.
    """
    values = config.model_dump(mode="json", exclude={"tuning"})
    for key, value in candidate.items():
        if key in ("training.steps", "training.tokens", "training.epochs"):
            for length in ("steps", "tokens", "epochs"):
                values["training"][length] = None
        set_key(values, key, value)
    return validate(FinetuneConfig, values, origin)


def concurrency(config: TuneConfig, cpus: float, gpus: float, use_gpu: bool, workers: int) -> int:
    """Trials that the cluster holds at a time.

    Raises:
        UserError: not even one fits, or ``tuning.max_concurrent`` asks for more than fit.
    """
    fitting = int((cpus + 1e-9) / (workers * config.resources.cpus_per_worker))
    if use_gpu:
        fitting = min(fitting, int(gpus / workers))
    if fitting < 1:
        raise UserError(
            f"resources.workers: found {workers} with {config.resources.cpus_per_worker:g} CPUs each, allowed: what "
            f"fits into {cpus:g} CPUs and {gpus:g} GPUs"
        )
    wanted = config.tuning.max_concurrent
    if wanted == "auto":
        return fitting
    if wanted > fitting:
        raise UserError(f"tuning.max_concurrent: found {wanted}, allowed: at most {fitting}, which the cluster holds")
    return wanted


def run_trial(candidate: dict[str, Any], base: TrainingJob, configs: list[FinetuneConfig]) -> None:
    """One trial, called by Ray Tune with ``{"candidate": index}``."""
    from ray import tune

    index = candidate["candidate"]
    directory = trial_directory(base.directory, index)
    directory.mkdir(parents=True, exist_ok=True)
    job = dataclasses.replace(base, config=configs[index], directory=directory, storage=str(directory), progress=None)
    # Ray Tune writes down what has finished some time later: after an interrupt it may ask for a finished trial again.
    outcome = Outcome(directory, configs[index])
    if (final := outcome.read()) is not None:
        tune.report(final)
        return
    if job.config.resources.workers == 1:
        from raylm.parallel.environment import prepare_deepspeed

        prepare_deepspeed(job.use_gpu)
        join_single_process_group()
        from raylm.training.loop import TrainingLoop

        final = TrainingLoop(job, Worker(0, 1, _report)).run()
    else:
        from raylm.training.launch import launch

        final = launch(job, job.config.resources.cpus_per_worker, job.config.resources.max_failures, _report)
    outcome.write(final)
    tune.report(final)


def _report(metrics: dict[str, Any]) -> None:
    from ray import tune

    tune.report({key: metrics[key] for key in ("step", "loss", "validation_loss", "tokens")})


class Outcome:
    """The final metrics of a trial that came to its end with ``config``, in ``<trial>/outcome.json``."""

    def __init__(self, directory: Path, config: FinetuneConfig) -> None:
        self._path, self._config = directory / "outcome.json", config.model_dump(mode="json")

    def read(self) -> dict[str, Any] | None:
        """The metrics; None where the trial has not ended, or had another configuration."""
        if not self._path.exists():
            return None
        found = json.loads(self._path.read_text(encoding="utf-8"))
        return found["metrics"] if found["config"] == self._config else None

    def write(self, metrics: dict[str, Any]) -> None:
        """Note that the trial ended with ``metrics``, unless it ended by a ``failure``."""
        if "failure" not in metrics:
            write_atomically(self._path, json.dumps({"config": self._config, "metrics": metrics}) + "\n")


def trial_directory(run: Path, index: int) -> Path:
    """Where the ``index``-th candidate trained."""
    return run / "trials" / f"trial-{index:03d}"
