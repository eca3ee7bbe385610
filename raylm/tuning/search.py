"""Ray Tune over training: how many trials fit at a time, and the trial itself.

A trial is a real training run in its own directory, ``<run>/trials/<trial>/``. With one worker it trains inside the
trial's own process; with several it has ranks in a placement group and reserves nothing itself, and as many trials run
at a time as the cluster holds whole groups, so that trials never wait for each other's resources. A trial that
raises, or whose loss is no number, reports why, and its process takes the next one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.config.distributions import Point
from raylm.config.loading import set_key, validate
from raylm.config.run_directory import read_object, write_atomically
from raylm.config.stages import FinetuneConfig, TuneConfig
from raylm.errors import RunFailure, UserError, first_line
from raylm.training.checkpoints.mirror import METRICS, Mirror
from raylm.training.checkpoints.storage import Storage
from raylm.training.loop.worker import TrainingJob, Turn, Worker, join_single_process_group
from raylm.training.reports.metrics import read_metrics
from raylm.tuning.ranks import KeptRanks

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

    from raylm.cluster.capacity import Capacity
    from raylm.parallel.plan.planning import Layout

# Within which a stopped trial is to end; it gives up on its ranks before (END_SECONDS of raylm.tuning.ranks).
UNWIND_SECONDS = 15.0
# A sliver of the head node's own marker resource: places the trial without taking a CPU from its workers.
HEAD_NODE_SHARE = {"node:__internal_head__": 0.001}
# In a candidate: which trial goes forward, where it is a part of one, from which step and to which.
TURN = "turn"
# In a result: why the trial failed, and that it came to its end.
FAILURE, FINISHED = "failure", "finished"
# Of a trial: what it is and how it stands, and the whole of what it failed with.
TRIAL, FAILURE_LOG = "trial.json", "failure.log"
# What a layout follows from, beside the cluster.
PLANNED = {"model", "objective", "parallel", "distillation", "rounding", "adapter", "freezing"}
PLANNED_TRAINING = {"batch_size", "sequence_length", "optimizer", "precision", "compile"}


def trial_config(config: TuneConfig, candidate: Point, origin: str = "tuning.space") -> FinetuneConfig:
    """The fine-tuning configuration with the ``candidate``'s dotted keys set.

    Raises:
        UserError: a key does not exist or a value is not allowed.
    """
    values = config.model_dump(mode="json", include=set(FinetuneConfig.model_fields))
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


@dataclasses.dataclass
class Planner:
    """How the configuration of a trial follows from its candidate; travels to the trials by pickle.

    Attributes:
        config: of the search.
        capacity: of the cluster.
        folder: in which the search was started.
        layouts: those that are planned already, by what they follow from.
    """

    config: TuneConfig
    capacity: Capacity
    folder: Path = dataclasses.field(default_factory=Path.cwd)
    layouts: dict[str, Layout] = dataclasses.field(default_factory=dict)

    def resolve(self, candidate: Point) -> tuple[FinetuneConfig, bool]:
        """The configuration that the trial trains with, and whether on GPUs.

        Raises:
            UserError: the candidate is not allowed, or its layout does not fit.
        """
        from raylm.parallel.plan.planning import apply_layout, plan_training

        # A search runs many trials; one worker (or one copy of the model) each is what uses a small machine best.
        resources, cut = self.config.resources, self.config.parallel.model_parallel
        single = resources.model_copy(update={"workers": cut if resources.workers == "auto" else resources.workers})
        one = trial_config(self.config, candidate).model_copy(update={"resources": single})
        key = one.model_dump_json(include={**dict.fromkeys(PLANNED, True), "training": PLANNED_TRAINING})
        if key not in self.layouts:
            self.layouts[key] = plan_training(one, self.capacity).layout
        return apply_layout(one, self.layouts[key]), self.layouts[key].use_gpu

    def resolve_alike(self, points: Sequence[Point]) -> tuple[FinetuneConfig, bool]:
        """What :meth:`resolve` gives for the first of the ``points``, after all were tried out.

        Raises:
            UserError: one is not allowed, or trials would have different numbers of workers.
        """
        (first, use_gpu), *others = [self.resolve(point) for point in points]
        for point, (other, _) in zip(points[1:], others, strict=True):
            if other.resources.workers != first.resources.workers:
                keys = ", ".join(key for key in point if key.startswith("parallel."))
                raise UserError(
                    f"resources.workers: found auto with tuning.space over {keys}, by which trials would have "
                    f"{first.resources.workers} or {other.resources.workers} workers, allowed: a number"
                )
        return first, use_gpu


def trial_name(trial: Trial) -> str:
    """Name of what Ray Tune has as a trial, and of its folder: that of the trial's directory, by Ray Tune's own count,
    from 1, which a resumed search goes on with; of a part of a trial with the step that it begins at."""
    if (turn := trial.config.get(TURN)) is not None:
        number, first, _ = turn
        return f"{trial_directory(Path(), number).name}-from-{first}"
    return trial_directory(Path(), int(trial.experiment_tag.split("_")[0]) - 1).name


def trial_number(name: str) -> int:
    """The trial whose name, or that of a part of it, this is."""
    return int(name.split("-")[1])


class EndsFirst:
    """Added to Ray Tune's trainable: a trial that is stopped gives back its workers before its process ends, or takes
    the next trial.

    Ray Tune ends the function of a stopped trial where it reports, and its process without waiting for the function:
    what the function still has to do, such as removing the workers' placement group, would be lost.
    """

    def cleanup(self) -> None:
        """Let the function end, up to ``UNWIND_SECONDS``."""
        try:
            super().cleanup()
        finally:
            _ended.wait(UNWIND_SECONDS)
            _ranks.close()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Let the function end as well; Ray Tune would give up on the next trial after two seconds."""
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(int(UNWIND_SECONDS))
        return super().reset_config(new_config)


# Of the one trial that a process runs at a time; its ranks wait for the next one.
_ended = threading.Event()
_ended.set()
_ranks = KeptRanks()


def run_trial(candidate: Point, base: TrainingJob, planner: Planner) -> None:
    """One trial, called by Ray Tune with what was drawn."""
    _ended.clear()
    try:
        _run_trial(candidate, base, planner)
    finally:
        _ended.set()


def _run_trial(candidate: Point, base: TrainingJob, planner: Planner) -> None:
    from ray import tune

    go_back(planner.folder)
    directory = trial_directory(base.directory, trial_number(tune.get_context().get_trial_name()))
    candidate = dict(candidate)
    turn = candidate.pop(TURN, None)
    begin(directory, candidate)
    ended = "stopped"
    try:
        final = _train(candidate, base, planner, directory, None if turn is None else Turn(*turn[1:]))
        ended = "failed" if FAILURE in final else "finished" if FINISHED in final else "stopped"
    except Exception as error:  # noqa: BLE001 - whatever it is, the other trials go on
        (directory / FAILURE_LOG).write_text(traceback.format_exc(), encoding="utf-8")
        final, ended = {FAILURE: first_line(error)}, "failed"
    finally:
        note(directory, candidate, ended)
    tune.report({FAILURE: final[FAILURE], "step": reached(directory)} if FAILURE in final else final)


def reached(directory: Path) -> int:
    """The last step of a trial that its ``directory`` tells of."""
    lines = read_metrics(directory / METRICS)
    return lines[-1]["step"] if lines else 0


def begin(directory: Path, candidate: Point) -> None:
    """Make the trial's ``directory``. One that an interrupted search left for another candidate is emptied."""
    found = read_object(directory / TRIAL) or {}
    if found.get("candidate") != json.loads(json.dumps(candidate)):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    note(directory, candidate, "running")


def note(directory: Path, candidate: Point, status: str) -> None:
    """Write down how the trial stands: running, finished, stopped or failed."""
    write_atomically(directory / TRIAL, json.dumps({"candidate": candidate, "status": status}) + "\n")


def _train(candidate: Point, base: TrainingJob, planner: Planner, directory: Path, turn: Turn | None) -> dict[str, Any]:
    """Train to the end of the ``turn`` or of all, or find that the trial has come to it; the last figures, at the end
    those of the exported weights."""
    from raylm.parallel.engines.environment import prepare_deepspeed

    if base.config.resources.workers == 1:
        prepare_deepspeed(base.use_gpu)
    job = dataclasses.replace(job_of(candidate, base, planner, directory), turn=turn)
    # Ray Tune writes down what has finished some time later: after an interrupt it may ask for a finished trial again.
    outcome, metric = Outcome(directory, job.config), str(planner.config.tuning.metric)
    if (final := outcome.read()) is not None:
        return final
    ranks = None if job.config.resources.workers == 1 else _ranks
    final = trained(job, base, planner.folder, ranks, reporter(metric))
    if FAILURE in final:
        return final
    lines = read_metrics(directory / METRICS)
    if FINISHED not in final:
        assert turn is not None
        # Killed later than Ray Tune has noted, a trial may have come farther than it is asked for.
        step = min(turn.last, final["step"])
        return {"step": step, "tokens": final["tokens"], **figures_at(lines, step, metric)}
    final |= figures_at(lines, final["exported_step"], metric)
    outcome.write(final)
    return final


def job_of(candidate: Point, base: TrainingJob, planner: Planner, directory: Path) -> TrainingJob:
    """The job of a trial in its ``directory``.

    Args:
        base: what all trials share.

    Raises:
        UserError: the candidate is not allowed, or its layout does not fit.
    """
    from raylm.data.loading import resolve_model

    resolved, _ = planner.resolve(candidate)
    source = base.model_source if "model.path" not in candidate else resolve_model(resolved.model.path)
    return dataclasses.replace(
        base, config=resolved, directory=directory, storage=str(directory), model_source=source, progress=None
    )


def trained(
    job: TrainingJob, base: TrainingJob, folder: Path, ranks: KeptRanks | None, report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train a trial; the final metrics.

    Args:
        ranks: that train it; None trains it in this process, for one worker.

    Raises:
        RunFailure: a later start of the search has taken over, or a rank failed.
    """
    # A trial of a search that was overtaken may not take its directory back.
    Mirror(Storage(base.storage), base.directory).check_owner(base.attempt)
    Mirror(Storage(job.storage), job.directory).own(base.attempt)
    if ranks is not None:
        return ranks.train(job, folder, report)
    join_single_process_group()
    from raylm.training.loop.training_loop import TrainingLoop

    return TrainingLoop(job, Worker(0, 1, report, device=0)).run()


def figures_at(lines: list[dict[str, Any]], step: int, metric: str) -> dict[str, float]:
    """What validation gave for the weights of a ``step``, of those lines of metrics.jsonl.

    Raises:
        RunFailure: a figure is no finite number.
    """
    found = next(line for line in reversed(lines) if line["step"] == step and "validation_loss" in line)
    return finite(found, metric)


def reporter(metric: str) -> Callable[[dict[str, Any]], None]:
    """What hands the figures of an evaluation on to Ray Tune, which may end the trial there."""

    def report(metrics: dict[str, Any]) -> None:
        from ray import tune

        tune.report({"step": metrics["step"], "tokens": metrics["tokens"], **finite(metrics, metric)})

    return report


def finite(metrics: dict[str, Any], metric: str) -> dict[str, float]:
    """The loss and the metric of an evaluation.

    Raises:
        RunFailure: one is no finite number.
    """
    names = dict.fromkeys(("validation_loss", metric))
    for name in names:
        if not math.isfinite(metrics[name]):
            raise RunFailure(f"step {metrics['step']}: {name} is {metrics[name]}, no finite number")
    return {name: metrics[name] for name in names}


def go_back(folder: Path) -> None:
    """Go to the ``folder`` in which the search was started, where this machine has it.

    Ray Tune starts each trial in a folder of its own, where the file's relative paths lead nowhere.
    """
    if folder.is_dir():
        os.chdir(folder)


def reason(error: BaseException) -> str:
    """Why a trial failed, in a line, from what Ray Tune keeps of it."""
    return first_line(getattr(error, "cause", None) or error)


# What Ray Tune adds to the trainable that it makes of a function.
run_trial.__mixins__ = (EndsFirst,)


class Outcome:
    """The final metrics of a trial that came to its end with ``config``, in ``<trial>/outcome.json``."""

    def __init__(self, directory: Path, config: FinetuneConfig) -> None:
        self._path, self._config = directory / "outcome.json", config.model_dump(mode="json")

    def read(self) -> dict[str, Any] | None:
        """The metrics; None where the trial has not ended, or had another configuration, or the file is damaged."""
        found = read_object(self._path) or {}
        metrics = found.get("metrics")
        whole = isinstance(metrics, dict) and isinstance(metrics.get("validation_loss"), int | float)
        whole = whole and (self._path.parent / "model").is_dir()
        return metrics if whole and found.get("config") == self._config else None

    def write(self, metrics: dict[str, Any]) -> None:
        """Note that the trial ended with ``metrics``, unless it ended by a ``failure``."""
        if FAILURE not in metrics:
            write_atomically(self._path, json.dumps({"config": self._config, "metrics": metrics}) + "\n")


def trial_directory(run: Path, number: int) -> Path:
    """Where the trial of that number trained."""
    return run / "trials" / f"trial-{number:03d}"
