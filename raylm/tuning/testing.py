"""The best trial's model on data that no trial has seen: ``tuning.test``, asked once.

In: the search's file and ``<run>/model``. Out: the report of an evaluate run in ``<run>/test``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raylm.config.run_directory import RunDirectory
from raylm.config.stages import EvaluateConfig, TuneConfig
from raylm.data.sources.segments import open_sources
from raylm.errors import UserError
from raylm.evaluation.stage import describe, measure
from raylm.tasks import find_task

if TYPE_CHECKING:
    from raylm.tasks.objective import Objective


def test_config(config: TuneConfig) -> EvaluateConfig:
    """The evaluate run over the whole test set."""
    run = config.run
    data = config.data.model_copy(
        update={"train": config.tuning.test, "validation": None, "validation_fraction": 0.0}
        | dict.fromkeys(("deduplication", "decontamination", "augmentation"))
    )
    return EvaluateConfig(
        run={"name": "test", "storage": str(run.directory), "seed": run.seed},
        data=data.model_dump(),
        model={"path": str(run.directory / "model")},
        objective=config.objective.model_dump(),
        evaluation=config.evaluation.model_dump() | {"split": "train"},
        resources=config.resources.model_dump(),
    )


def check_test(config: TuneConfig, objective: Objective) -> None:
    """Refuse a test set that is not there, or a task that evaluate does not know; reads nothing of the set.

    Raises:
        UserError: names ``tuning.test``.
    """
    if config.tuning.test is None:
        return
    evaluation = find_task(objective.name).evaluation
    if not objective.counts_text and not (evaluation is not None and evaluation.results):
        raise UserError(f"tuning.test: leave it out with objective.type {objective.name}, which evaluate does not know")
    data = test_config(config).data
    open_sources(data, data.train_sections, "tuning.test")


def test_best(config: TuneConfig) -> dict[str, Any]:
    """The figures of the exported model on the test set; asked for once more, those of the first time.

    Raises:
        UserError: the test set cannot be read.
    """
    asked = test_config(config)
    run = RunDirectory("evaluate", asked)
    return run.report() or measure(asked, run)


def tested(report: dict[str, Any]) -> str:
    """What a search says of the test, as lines behind its table."""
    return f"\n{describe(report['test'])}" if "test" in report else ""
