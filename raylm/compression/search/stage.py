"""The stage ``tune``: a search over training (:mod:`raylm.tuning.stage`), or over ways to compress a model.

Of the latter: Ray Tune runs trials one after the other, as each measures its model's speed with the whole machine. The
report has all trials, the Pareto front of quality, size and speed, and the trial that was taken.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.cluster.groups import groups_given_back
from raylm.cluster.session import ray_session
from raylm.compression.material import Material
from raylm.compression.methods import Steps
from raylm.compression.search.front import pareto_front, pick
from raylm.compression.search.trial import OUTCOME, objectives, run_trial, trial_configs
from raylm.compression.stage import Work, check_target, open_source, put_in_place, sized
from raylm.config.compression import TargetSection
from raylm.config.run_directory import RunDirectory, read_object
from raylm.config.stages import TuneConfig
from raylm.config.tuning import Distribution
from raylm.data.prepare.inputs import check_run_unchanged, note_inputs, run_stamps
from raylm.errors import RunFailure, UserError
from raylm.interrupts import deferred, ended_at_once
from raylm.models.heads import Head
from raylm.progress import Activity
from raylm.tuning.ending import ended_in_order
from raylm.tuning.progress import SearchProgress
from raylm.tuning.search import HEAD_NODE_SHARE, go_back, reason, trial_directory, trial_name
from raylm.tuning.space import param_space, rounds
from raylm.tuning.stage import aligned, cell, whole_record

if TYPE_CHECKING:
    from ray.tune.search import SearchAlgorithm

# Of all trials, those that are drawn at random before tpe learns from them, and the first generation of nsga2.
FIRST_TRIALS = 1 / 3


def tune(config: TuneConfig) -> None:
    """Search ``tuning.space``; the model that is taken becomes ``<run>/model``.

    Raises:
        UserError: configuration or input is wrong; nothing was started.
        RunFailure: no trial finished, or none keeps to ``compression.target``.
    """
    if config.compression is None:
        from raylm.tuning.stage import tune as tune_training

        tune_training(config)
        return
    run = RunDirectory("tune", config)
    run.check()
    if (done := run.report()) is not None:
        check_run_unchanged(run.path, config.data, config.model.path)
        print(f"tune: {run.path} is done already\n{describe(run, done, config)}")
        return
    with Activity("tune: checking the data and the model"), ended_at_once():
        search = _checked(config, run)
        stamps = run_stamps(config.data, config.model.path)
    with run.held():
        run.create()
        report = search.run()
        note_inputs(run.path, stamps)
        run.write_report(report)
    print(f"tune: {len(report['trials'])} trials\n{describe(run, report, config)}")


def _checked(config: TuneConfig, run: RunDirectory) -> _Search:
    """The search, after its space was tried out on configurations.

    Raises:
        UserError: the model, the data, or a value of the space cannot be used.
    """
    from raylm.models.loading import load_parts
    from raylm.tasks import chosen_task

    source, model_config = open_source(config.model)
    load_parts(source)
    task, directory = chosen_task(model_config, config.objective), trial_directory(run.path, 0)
    outcomes, reads, trainings = [], False, [] if config.training is None else [config.training]
    for candidate in corners(config.tuning.space):
        _, compress = trial_configs(config, candidate, directory)
        steps = Steps(compress)
        outcomes.append((steps.check(model_config, task.head), steps))
        reads = reads or steps.need_material
        trainings += steps.trainings
    _refuse_target(config.compression.target, outcomes, task.head)
    _, compress = trial_configs(config, corners(config.tuning.space)[0], directory)
    compress = compress.model_copy(update={"run": config.run})
    material = Material(compress, task, source) if reads or config.training is not None else None
    if material is not None:
        material.check(trainings)
    work = Work(compress, run.path, source, task, Steps(compress), material or Material(compress, task, source))
    return _Search(config, run, work, work.open_comparison(model_config), reads_data=material is not None)


def _refuse_target(target: TargetSection | None, outcomes: list[tuple[Any, Steps]], head: Head) -> None:
    """Refuse a target that no corner of the space can keep to."""
    refusals = []
    for outcome, steps in outcomes:
        try:
            check_target(target, outcome, head, steps)
        except UserError as error:
            refusals.append(error)
    if len(refusals) == len(outcomes):
        raise refusals[0]


def corners(space: dict[str, Distribution]) -> list[dict[str, Any]]:
    """Points that have each value, or each end of a range, at least once, beside the first ones of the other keys."""
    values = {
        key: next(filter(None, (d.choice, d.grid, d.uniform, d.log_uniform, d.integer))) for key, d in space.items()
    }
    first = {key: found[0] for key, found in values.items()}
    return [first, *(first | {key: value} for key, found in values.items() for value in found[1:])]


class _Search:
    """A search that was checked."""

    def __init__(self, config: TuneConfig, run: RunDirectory, work: Work, comparison: Any, *, reads_data: bool) -> None:
        self.config, self.directory, self._keep = config, run.path, run.keep
        self._work, self._comparison, self._reads_data = work, comparison, reads_data
        self.objectives = list(config.tuning.metric)

    def run(self) -> dict[str, Any]:
        """Search, choose, and give what the report has."""
        original = self._original()
        # Without the dashboard, trials that are killed leak their placement groups.
        with ray_session(dashboard=True):
            data = None
            if self._reads_data:
                self._work.material.prepare()
                data = self._work.material.directory
            self._keep()
            with groups_given_back():
                rows = self._trials(data)
        finished = [row for row in rows if row["status"] == "finished"]
        if not finished:
            raise RunFailure(f"no trial finished; trial {rows[0]['trial']}: {rows[0]['failure']}")
        front, target = pareto_front(finished, self.objectives), self.config.compression.target
        if (picked := pick(front, self.objectives, target)) is None:
            raise RunFailure(self._missed(finished))
        partial = self.directory / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(trial_directory(self.directory, picked["trial"]) / "model", partial)
        put_in_place(partial, self.directory / "model")
        return {
            "task": self._work.task.name,
            "objectives": self.objectives,
            "original": original,
            "trials": rows,
            "front": [row["trial"] for row in front],
            "best": picked,
        }

    def _original(self) -> dict[str, Any]:
        """The figures of the model as it is."""
        from raylm.compression.measuring import Variant

        variant = Variant("the original", "transformers", self._work.source, "transformers fp32")
        figures = sized(variant, self._comparison.figures([variant], 1)[0])
        return figures | objectives(figures, self._work.task)

    def _missed(self, rows: list[dict[str, Any]]) -> str:
        target = self.config.compression.target
        assert target is not None
        limits = target.model_dump(exclude_none=True)
        nearest = "; ".join(f"the least {name} is {min(row[name] for row in rows):.4g}" for name in limits)
        return f"no trial keeps to compression.target: {nearest}; all of them are in {self.directory / 'trials'}"

    def _trials(self, data: Path | None) -> list[dict[str, Any]]:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        # A trial that fails is a row with its reason.
        for name in ("ray.tune.execution.tune_controller", "ray.tune.tune"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        tuning = self.config.tuning
        with (
            deferred() as signals,
            ended_in_order(signals),
            SearchProgress(rounds(tuning), "trials", lambda: _looked_at(self.directory / "trials")),
        ):
            results = self._tuner(data).fit()
        rows = []
        for result in results:
            metrics = result.metrics or {}
            rows.append(
                {
                    "trial": int(Path(result.path).name.split("-")[1]),
                    **{key: result.config[key] for key in self.config.tuning.space},
                    **metrics.get("figures", {}),
                    "status": "failed" if result.error else "finished",
                    **({"failure": reason(result.error)} if result.error else {}),
                }
            )
        return sorted(rows, key=lambda row: row["trial"])

    def _tuner(self, data: Path | None) -> Any:
        from ray import tune

        trainable = tune.with_resources(
            tune.with_parameters(
                _trial, config=self._shared(data), directory=self.directory, data=data, folder=Path.cwd()
            ),
            HEAD_NODE_SHARE,
        )
        storage, name = self.directory / "ray-tune", "search"
        space = param_space(self.config.tuning)
        searcher = self._searcher()
        if not whole_record(storage / name):
            shutil.rmtree(storage / name, ignore_errors=True)
        elif tune.Tuner.can_restore(storage / name):
            return tune.Tuner.restore(
                str(storage / name), trainable, resume_unfinished=True, restart_errored=True, param_space=space
            )
        return tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=rounds(self.config.tuning), trial_name_creator=trial_name,
                trial_dirname_creator=trial_name,
            ),
            run_config=tune.RunConfig(name=name, storage_path=str(storage), verbose=0),
        )  # fmt: skip

    def _shared(self, data: Path | None) -> TuneConfig:
        """The file as trials read it: with the prepared set, where there is one of running text."""
        objective = self._work.task.objective
        if data is None or (objective is not None and objective.rows is not None):
            return self.config
        section = self.config.data.model_copy(update={"train": str(data), "validation": None})
        return self.config.model_copy(update={"data": section})

    def _searcher(self) -> SearchAlgorithm:
        from ray.tune.search import ConcurrencyLimiter
        from ray.tune.search.basic_variant import BasicVariantGenerator
        from ray.tune.search.optuna import OptunaSearch

        tuning, seed = self.config.tuning, self.config.run.seed
        if tuning.searcher in ("random", "grid"):
            return BasicVariantGenerator(max_concurrent=1, random_state=seed)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        first = max(3, int(tuning.trials * FIRST_TRIALS))
        sampler = (
            optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=first)
            if tuning.searcher == "tpe"
            else optuna.samplers.NSGAIISampler(seed=seed, population_size=first)
        )
        search = OptunaSearch(metric=self.objectives, mode=["min"] * len(self.objectives), sampler=sampler)
        return ConcurrencyLimiter(search, max_concurrent=1)


def _looked_at(trials: Path) -> tuple[int, str]:
    """How many trials have ended, and the best quality so far."""
    found = [read_object(path) or {} for path in trials.glob(f"*/{OUTCOME}")]
    qualities = [one["figures"]["quality"] for one in found if "figures" in one]
    return len(qualities), f"best quality {min(qualities):.4f}" if qualities else "starting the first trial"


def _trial(candidate: dict[str, Any], config: TuneConfig, directory: Path, data: Path | None, folder: Path) -> None:
    """What Ray Tune runs."""
    from ray import tune

    go_back(folder)
    place = directory / "trials" / tune.get_context().get_trial_name()
    figures = run_trial(candidate, config, place, data)
    tune.report({**{name: figures[name] for name in config.tuning.metric}, "figures": figures})


def describe(run: RunDirectory, report: dict[str, Any], config: TuneConfig) -> str:
    """The trials, the front and where the results lie, for people."""
    keys = list(config.tuning.space)
    front, picked = set(report["front"]), report["best"]["trial"]
    lines = [["trial", *keys, *report["objectives"], ""]]
    for row in [{"trial": "original"} | report["original"], *report["trials"]]:
        mark = "taken" if row["trial"] == picked else "front" if row["trial"] in front else row.get("status", "")
        lines.append([cell(row.get(name)) for name in ["trial", *keys, *report["objectives"]]] + [mark])
    return (
        f"{aligned(lines)}\n"
        f"  model      {run.path / 'model'}, a copy of trial {picked}'s\n"
        f"  trials     {run.path / 'trials'}; one page of all: raylm report {run.path}"
    )
