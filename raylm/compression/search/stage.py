"""The stage ``tune``: a search over training (:mod:`raylm.tuning.stage`), or over ways to compress a model.

Of the latter: Ray Tune runs trials one after the other, as each measures its model's speed with the whole machine. The
report has all trials, the Pareto front of quality, size and speed, and the trial that was taken.
"""

from __future__ import annotations

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
from raylm.config.distributions import corners
from raylm.config.run_directory import RunDirectory, read_object
from raylm.config.stages import TuneConfig
from raylm.data.prepare.inputs import check_run_unchanged, note_inputs, run_stamps
from raylm.errors import RunFailure, UserError
from raylm.interrupts import deferred, ended_at_once
from raylm.models.heads import Head
from raylm.progress import Activity
from raylm.tuning.ending import ended_in_order
from raylm.tuning.progress import Look, SearchProgress
from raylm.tuning.ray_tune import STATE, quiet_ray_tune, resumed
from raylm.tuning.results import aligned, cell
from raylm.tuning.search import HEAD_NODE_SHARE, go_back, reason, trial_directory, trial_name, trial_number
from raylm.tuning.space import earlier_trials

if TYPE_CHECKING:
    from raylm.tuning.candidates import Candidates


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
    earlier_trials(config.tuning, list(config.tuning.metric))
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
            # Once what they failed for is mended, the same command tries them again.
            shutil.rmtree(self.directory / STATE, ignore_errors=True)
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
        from raylm.tuning.searcher import make_candidates

        quiet_ray_tune()
        tuning = self.config.tuning
        alike = [True] * len(self.objectives)
        candidates = make_candidates(tuning, self.config.run.seed, self.objectives, alike)
        with (
            deferred() as signals,
            ended_in_order(signals),
            SearchProgress(candidates.count, "trials", lambda: _looked_at(self.directory / "trials")),
        ):
            results = self._tuner(data, candidates).fit()
        rows = []
        for result in results:
            metrics = result.metrics or {}
            rows.append(
                {
                    "trial": trial_number(Path(result.path).name),
                    **{key: result.config.get(key) for key in self.config.tuning.space},
                    **metrics.get("figures", {}),
                    "status": "failed" if result.error else "finished",
                    **({"failure": reason(result.error)} if result.error else {}),
                }
            )
        return sorted(rows, key=lambda row: row["trial"])

    def _tuner(self, data: Path | None, candidates: Candidates) -> Any:
        from ray import tune

        from raylm.tuning.searcher import CandidateSearch

        trainable = tune.with_resources(
            tune.with_parameters(
                _trial, config=self._shared(data), directory=self.directory, data=data, folder=Path.cwd()
            ),
            HEAD_NODE_SHARE,
        )
        storage, name = self.directory / STATE, "trials"
        return resumed(storage, name, trainable) or tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                # Each trial measures its model's speed with the whole machine.
                search_alg=CandidateSearch(candidates, self.objectives, self.config.tuning.budget, at_a_time=1),
                num_samples=candidates.count,
                trial_name_creator=trial_name,
                trial_dirname_creator=trial_name,
            ),
            run_config=tune.RunConfig(name=name, storage_path=str(storage), verbose=0),
        )

    def _shared(self, data: Path | None) -> TuneConfig:
        """The file as trials read it: with the prepared set, where there is one of running text."""
        objective = self._work.task.objective
        if data is None or (objective is not None and objective.rows is not None):
            return self.config
        section = self.config.data.model_copy(update={"train": str(data), "validation": None})
        return self.config.model_copy(update={"data": section})


def _looked_at(trials: Path) -> Look:
    """How many trials have ended, and the best quality so far."""
    found = [read_object(path) or {} for path in trials.glob(f"*/{OUTCOME}")]
    qualities = [one["figures"]["quality"] for one in found if "figures" in one]
    return Look(len(qualities), f"best quality {min(qualities):.4f}" if qualities else "starting the first trial")


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
