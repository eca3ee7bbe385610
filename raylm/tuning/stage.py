"""The stage ``tune``: search, print and save the table of trials, export the best trial's model."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.cluster.groups import groups_given_back
from raylm.cluster.session import ray_session
from raylm.cluster.waiting import live_capacity, nodes_for
from raylm.config.run_directory import RunDirectory, read_object
from raylm.config.stages import TuneConfig
from raylm.data.prepare.inputs import note_inputs, run_stamps
from raylm.errors import RunFailure, UserError
from raylm.interrupts import deferred, ended_at_once
from raylm.progress import Activity
from raylm.tuning.ending import ended_in_order
from raylm.tuning.progress import SearchProgress, trained_steps
from raylm.tuning.search import (
    HEAD_NODE_SHARE,
    Planner,
    concurrency,
    run_trial,
    trial_config,
    trial_directory,
    trial_name,
)
from raylm.tuning.space import SEARCHERS, draw_candidates, param_space, rounds

if TYPE_CHECKING:
    from ray.tune import Tuner
    from ray.tune.schedulers import TrialScheduler

    from raylm.config.stages import FinetuneConfig
    from raylm.training.checkpoints.mirror import Mirror
    from raylm.training.inputs import Checked
    from raylm.training.loop.worker import TrainingJob


def tune(config: TuneConfig) -> None:
    """Search ``tuning.space``; the best trial's model becomes ``<run>/model``.

    Raises:
        UserError: configuration or input is wrong, or the run is an older raylm's; nothing was started.
        RunFailure: no trial finished.
    """
    from raylm.training.inputs import check_done, validate

    run = RunDirectory("tune", config)
    run.check()
    if (done := run.report()) is not None:
        check_done(config)
        print(f"tune: {run.path} is done already\n{describe(run, done, list(config.tuning.space))}")
        return
    _refuse_older(run)
    with Activity("tune: checking the data and the model"), ended_at_once():
        checked = validate(config)
        stamps = run_stamps(config.data, config.model.path)
        candidates = draw_candidates(config.tuning, config.run.seed)
        for candidate in candidates:
            trial_config(config, candidate)

    from raylm.parallel.plan.precision import with_precision
    from raylm.training.precision import note_precision, run_precision

    # Without the dashboard, trials that are killed leak their placement groups.
    with ray_session(dashboard=True):
        capacity = live_capacity(
            "tune", config.resources, lambda capacity: Planner(config, capacity).resolve(candidates[0])
        )
        # One for all trials, which the search is to tell apart.
        precision = run_precision(run, config, checked.model.config, capacity)
        planned = with_precision(config, precision)
        planner = Planner(planned, capacity)
        (first, use_gpu), *_ = [planner.resolve(candidate) for candidate in candidates]
        at_a_time = concurrency(config, capacity.cpus, capacity.gpus, use_gpu, first.resources.workers)
        with run.held():
            run.create(planned)
            note_precision(run, precision)
            with nodes_for("tune", first.resources.workers, config.resources, capacity):
                base, mirror = _job(config, run, checked, first, use_gpu=use_gpu)
            with groups_given_back():
                rows = _search(planner, base, len(candidates), at_a_time)
            mirror.check_owner(base.attempt)
            report = {"best": _export_best(run, rows), "trials": rows, "concurrent_trials": at_a_time}
            note_inputs(run.path, stamps)
            run.write_report(report | {"precision": precision.record()})
    print(f"tune: {_counted(rows)}\n{describe(run, report, list(config.tuning.space))}")


def _job(
    config: TuneConfig, run: RunDirectory, checked: Checked, first: FinetuneConfig, *, use_gpu: bool
) -> tuple[TrainingJob, Mirror]:
    """What all trials share, of which each gets its own configuration and directory; the run is this start's then.

    Args:
        first: configuration of the first trial.
    """
    from raylm.data.loading import resolve_model
    from raylm.training.checkpoints.mirror import Mirror
    from raylm.training.checkpoints.storage import Storage
    from raylm.training.inputs import ensure_data
    from raylm.training.loop.worker import TrainingJob, new_attempt

    attempt, mirror = new_attempt(), Mirror(Storage(run.path), run.path)
    mirror.own(attempt)
    data_directory, tokenizer_directory = ensure_data(config, run.path, checked)
    run.keep()
    return TrainingJob(
        config=first,
        stage="finetune",
        directory=run.path,
        storage=str(run.path),
        data_directory=data_directory,
        tokenizer_directory=tokenizer_directory,
        model_source=resolve_model(config.model.path),
        use_gpu=use_gpu,
        attempt=attempt,
    ), mirror


def _counted(rows: list[dict[str, Any]]) -> str:
    return f"{len(rows)} trials, {sum(row['status'] == 'finished' for row in rows)} finished"


def _export_best(run: RunDirectory, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the finished trial with the lowest loss, whose model becomes ``<run>/model``."""
    finished = [row for row in rows if row["status"] == "finished"]
    if not finished:
        raise RunFailure(f"no trial finished; see {run.path / 'trials'}")
    best = min(finished, key=lambda row: row["validation_loss"])
    partial = run.path / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(trial_directory(run.path, best["trial"]) / "model", partial)
    shutil.rmtree(run.path / "model", ignore_errors=True)
    partial.rename(run.path / "model")
    return best


def _refuse_older(run: RunDirectory) -> None:
    """Refuse to go on with a search of an older raylm, which drew other candidates from the same seed."""
    saved = run.saved()
    if saved is not None and "searcher" not in saved["tuning"]:
        raise UserError(
            f"run.name: {run.path} was begun by an older raylm, whose candidates cannot be drawn again; choose another "
            "run.name to search anew"
        )


def _search(planner: Planner, base: TrainingJob, trials: int, at_a_time: int) -> list[dict[str, Any]]:
    # The setting of Tune's newer output prints its tables whatever ``verbose`` says; the older one keeps silent.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    tuner = _tuner(planner, base, at_a_time)
    look = functools.partial(trained_steps, base.directory / "trials", trials)
    with deferred() as signals, ended_in_order(signals), SearchProgress(trials, "steps", look):
        results = tuner.fit()
    rows = []
    for result in results:
        metrics = result.metrics or {}
        rows.append(
            {
                "trial": int(Path(result.path).name.split("-")[1]),
                **{key: result.config[key] for key in planner.config.tuning.space},
                "step": metrics.get("step"),
                "validation_loss": metrics.get("validation_loss"),
                "status": "failed" if result.error else "finished" if metrics.get("finished") else "stopped",
            }
        )
    return sorted(rows, key=lambda row: row["trial"])


def _tuner(planner: Planner, base: TrainingJob, at_a_time: int) -> Tuner:
    """Ray Tune over the space: of a search that was interrupted, or a new one."""
    from ray import tune

    config = planner.config
    resources, tuning, workers = config.resources, config.tuning, base.config.resources.workers
    share = {"CPU": resources.cpus_per_worker, **({"GPU": 1} if base.use_gpu else {})}
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, base=base, planner=planner), share if workers == 1 else HEAD_NODE_SHARE
    )
    algorithm, space = SEARCHERS[tuning.searcher](config.run.seed, at_a_time), param_space(tuning)
    # A search that was interrupted goes on, unless trials now take another share of the cluster.
    name = f"search-{workers}-workers-{at_a_time}-at-a-time"
    storage = base.directory / "ray-tune"
    # Without the algorithm's state Ray Tune would draw nothing more.
    if not whole_record(storage / name):
        # Begun anew, it draws the same, and trials that have finished say so themselves.
        shutil.rmtree(storage / name, ignore_errors=True)
    elif tune.Tuner.can_restore(storage / name) and algorithm.has_checkpoint(str(storage / name)):
        return tune.Tuner.restore(
            str(storage / name), trainable, resume_unfinished=True, restart_errored=True, param_space=space
        )
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=tuning.metric,
            mode="min",
            search_alg=algorithm,
            num_samples=rounds(tuning),
            scheduler=_scheduler(config),
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(storage),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
        ),
    )


def whole_record(search: Path) -> bool:
    """Whether none of what Ray Tune has written down of a search, and would read, was cut off; reads little of it."""
    states = sorted(search.glob("experiment_state-*.json"))
    pickles = [*sorted(search.glob("basic-variant-state-*.json"))[-1:], *search.glob("tuner.pkl")]
    return all(read_object(path) is not None for path in states[-1:]) and all(
        path.read_bytes().endswith(pickle.STOP) for path in pickles
    )


def _scheduler(config: TuneConfig) -> TrialScheduler | None:
    from ray.tune.schedulers import ASHAScheduler

    tuning = config.tuning
    if tuning.scheduler == "none":
        return None
    return ASHAScheduler(
        # Steps, not reports: a trial that goes on after an interrupt reports from where it stood.
        time_attr="step",
        # Larger than any number of steps, so that no trial is cut off at the end.
        max_t=10**9,
        grace_period=tuning.grace_evaluations * (config.training.evaluate_every_steps or 1),
        reduction_factor=tuning.reduction_factor,
    )


def describe(run: RunDirectory, report: dict[str, Any], keys: list[str]) -> str:
    """The trials, the best of them and where the results lie, for people."""
    best = report["best"]
    return (
        f"{table(report['trials'], keys)}\n"
        f"  best       trial {best['trial']}, validation loss {best['validation_loss']:.4f} nats a target\n"
        f"  model      {run.path / 'model'}, a copy of the best trial's\n"
        f"  trials     {run.path / 'trials'}; one page of all: raylm report {run.path}"
    )


def table(rows: list[dict[str, Any]], keys: list[str]) -> str:
    """The trials as lines of text, best first; a stopped one's loss is the last that it reached."""
    columns = ["trial", *keys, "step", "validation_loss", "status"]
    heads = ["trial", *keys, "steps", "validation loss", "status"]
    return aligned([heads, *[[cell(row.get(column)) for column in columns] for row in best_first(rows)]])


def aligned(cells: list[list[str]]) -> str:
    """Lines of cells as columns of text."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def best_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials by validation loss: finished ones, then stopped ones, then those without a loss."""
    return sorted(
        rows, key=lambda row: (row["status"] != "finished", row["validation_loss"] is None, row["validation_loss"])
    )


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
