"""The stage ``tune``: search, print and save the table of trials, export the best trial's model."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from raylm.cluster.groups import groups_given_back
from raylm.cluster.session import ray_session
from raylm.cluster.waiting import live_capacity, nodes_for
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import TuneConfig
from raylm.config.tuning import TuningSection
from raylm.data.prepare.inputs import note_inputs, run_stamps
from raylm.errors import RunFailure, UserError
from raylm.interrupts import deferred, ended_at_once
from raylm.progress import Activity
from raylm.tuning.checking import check_space
from raylm.tuning.ending import ended_in_order
from raylm.tuning.population.rows import with_schedule
from raylm.tuning.population.state import STATE as POPULATION
from raylm.tuning.population.state import read as read_population
from raylm.tuning.progress import Look, SearchProgress, trained_so_far
from raylm.tuning.ray_tune import STATE, quiet_ray_tune, resumed
from raylm.tuning.results import best_of, counted, describe, export_best, make_rows, rows_so_far
from raylm.tuning.search import HEAD_NODE_SHARE, Planner, concurrency, run_trial, trial_name
from raylm.tuning.space import is_minimised
from raylm.tuning.testing import check_test, test_best, tested

if TYPE_CHECKING:
    from ray.tune import Tuner

    from raylm.config.stages import FinetuneConfig
    from raylm.training.checkpoints.mirror import Mirror
    from raylm.training.inputs import Checked
    from raylm.training.loop.worker import TrainingJob
    from raylm.tuning.searcher import CandidateSearch


def tune(config: TuneConfig) -> None:
    """Search ``tuning.space``; the best trial's model becomes ``<run>/model``.

    Raises:
        UserError: configuration or input is wrong, or the run is an older raylm's; nothing was started.
        RunFailure: no trial finished.
    """
    from raylm.training.inputs import check_done, labels_of, validate

    run = RunDirectory("tune", config)
    run.check()
    if (done := run.report()) is not None:
        check_done(config)
        print(f"tune: {run.path} is done already\n{describe(run, done, config.tuning)}{tested(done)}")
        return
    _refuse_older(run)
    with Activity("tune: checking the data and the model"), ended_at_once():
        checked = validate(config)
        stamps = run_stamps(config.data, config.model.path)
        objective = checked.model.objective
        check_test(config, objective)
        labels = labels_of(config, checked.data) if objective.takes_loss else ()
        points = check_space(config, objective, labels)

    from raylm.parallel.plan.precision import with_precision
    from raylm.training.precision import note_precision, run_precision

    # Without the dashboard, trials that are killed leak their placement groups.
    with ray_session(dashboard=True):
        capacity = live_capacity(
            "tune", config.resources, lambda capacity: Planner(config, capacity).resolve(points[0])
        )
        # One for all trials, which the search is to tell apart.
        precision = run_precision(run, config, checked.model.config, capacity)
        planned = with_precision(config, precision)
        planner = Planner(planned, capacity)
        first, use_gpu = planner.resolve_alike(points)
        at_a_time = concurrency(config, capacity.cpus, capacity.gpus, use_gpu, first.resources.workers)
        with run.held():
            run.create(planned)
            note_precision(run, precision)
            with nodes_for("tune", first.resources.workers, config.resources, capacity):
                base, mirror = _job(config, run, checked, first, use_gpu=use_gpu)
            with groups_given_back():
                rows = _search(planner, base, at_a_time)
            mirror.check_owner(base.attempt)
            best = _best(run, rows, config.tuning)
            export_best(run, config, best)
            report = {"best": best, "trials": rows, "metric": config.tuning.metric, "concurrent_trials": at_a_time}
            if config.tuning.test is not None:
                report["test"] = test_best(config)
            note_inputs(run.path, stamps)
            run.write_report(report | {"minimised": is_minimised(config.tuning), "precision": precision.record()})
    print(f"tune: {counted(rows)}\n{describe(run, report, config.tuning)}{tested(report)}")


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


def _best(run: RunDirectory, rows: list[dict[str, Any]], tuning: TuningSection) -> dict[str, Any]:
    try:
        best = best_of(rows, tuning)
    except RunFailure as error:
        # Once what they failed for is mended, the same command tries them again.
        shutil.rmtree(run.path / STATE, ignore_errors=True)
        (run.path / POPULATION).unlink(missing_ok=True)
        raise RunFailure(f"{error}; see {run.path / 'trials'}") from None
    population = read_population(run.path)
    return best if population is None else with_schedule(best, population)


def _refuse_older(run: RunDirectory) -> None:
    """Refuse to go on with a search of an older raylm, which drew other candidates from the same seed."""
    saved = run.saved()
    if saved is not None and "budget" not in saved["tuning"]:
        raise UserError(
            f"run.name: {run.path} was begun by an older raylm, whose candidates cannot be drawn again; choose another "
            "run.name to search anew"
        )


def _search(planner: Planner, base: TrainingJob, at_a_time: int) -> list[dict[str, Any]]:
    from raylm.tuning.halving import make_halving
    from raylm.tuning.searcher import CandidateSearch, make_candidates

    tuning = planner.config.tuning
    if tuning.scheduler == "pbt":
        from raylm.tuning.population.search import evolve

        return evolve(planner, base, at_a_time)
    quiet_ray_tune()
    metric = str(tuning.metric)
    candidates = make_candidates(tuning, planner.config.run.seed, [metric], [is_minimised(tuning)], at_a_time)
    assert planner.config.training is not None
    search = CandidateSearch(
        candidates, [metric], tuning.budget, at_a_time,
        make_halving(tuning, planner.config.training, planner.config.run.seed), minimised=is_minimised(tuning),
    )  # fmt: skip
    tuner, count = _tuner(planner, base, search, at_a_time), candidates.count

    def look() -> Look:
        return trained_so_far(rows_so_far(base.directory / "trials", tuning), count, tuning)

    with deferred() as signals, ended_in_order(signals), SearchProgress(count, "steps", look):
        results = tuner.fit()
    return make_rows(results, tuning)


def _tuner(planner: Planner, base: TrainingJob, search: CandidateSearch, at_a_time: int) -> Tuner:
    """Ray Tune over the space: of a search that was interrupted, or a new one."""
    from ray import tune

    from raylm.tuning.schedulers import make_scheduler

    config = planner.config
    resources, tuning, workers = config.resources, config.tuning, base.config.resources.workers
    share = {"CPU": resources.cpus_per_worker, **({"GPU": 1} if base.use_gpu else {})}
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, base=base, planner=planner), share if workers == 1 else HEAD_NODE_SHARE
    )
    # A search that was interrupted goes on, unless trials now take another share of the cluster.
    name = f"trials-{workers}-workers-{at_a_time}-at-a-time"
    return resumed(base.directory / STATE, name, trainable) or tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric=str(tuning.metric),
            mode="min" if is_minimised(tuning) else "max",
            search_alg=search,
            num_samples=search.most,
            scheduler=make_scheduler(tuning, config.training),
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
            # Most of a short trial's time is its process, and what that imports.
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(base.directory / STATE),
            verbose=0,
            # Of processes that die; what a trial raises it reports itself.
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
        ),
    )
