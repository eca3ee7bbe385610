"""What is refused of a search space before anything starts.

In: the file. Each point that is known by then is tried out on the configuration, and on the model where that may refuse
it. Of searchers that learn, these are the corners of the space; what else they draw and cannot be trained fails alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raylm.config.distributions import Point, corners
from raylm.config.stages import FinetuneConfig, TuneConfig
from raylm.errors import UserError
from raylm.tasks.measures import LOSSES, VALIDATION
from raylm.tuning.search import trial_config
from raylm.tuning.space import draw_candidates, earlier_trials

if TYPE_CHECKING:
    from raylm.tasks.objective import Objective

# On which it depends whether a model can be trained.
OF_THE_MODEL = {"model", "objective", "adapter", "freezing", "distillation"}
OF_TRAINING = {"sequence_length", "compile", "group_by_length"}


def check_space(config: TuneConfig, objective: Objective, labels: Sequence[str] = ()) -> list[Point]:
    """Points of the space to plan with, after each was tried out.

    Args:
        objective: of the file as it stands.
        labels: of the data, on which losses and heads of the user's own are tried.

    Raises:
        UserError: a key does not exist or cannot vary, a value is not allowed, or the metric is none of the task.
    """
    from raylm.training.inputs import check_own

    tuning = config.tuning
    _check_metric(str(tuning.metric), objective)
    if objective.rows is not None:
        _refuse_for_rows(config, objective)
    earlier_trials(tuning, [str(tuning.metric)])
    learns = tuning.searcher in ("tpe", "nsga2")
    points = [*tuning.start, *corners(tuning.space)] if learns else draw_candidates(tuning, config.run.seed)
    if tuning.scheduler == "pbt":
        # What members come to is none of what was drawn.
        points += corners(tuning.space)
    seen: set[str] = set()
    for point in points:
        found = trial_config(config, point)
        key = found.model_dump_json(include={**dict.fromkeys(OF_THE_MODEL, True), "training": OF_TRAINING})
        if key not in seen:
            seen.add(key)
            _check_model(config, found)
            if found.objective.loss is not None or ":" in found.objective.head:
                check_own(found, len(labels))
    return points


def _check_metric(metric: str, objective: Objective) -> None:
    known = [LOSSES[0], *(f"{VALIDATION}{name}" for name in objective.measures)]
    if metric not in known:
        raise UserError(
            f"tuning.metric: found {metric}, allowed for objective.type {objective.name}: {', '.join(known)}"
        )


def _refuse_for_rows(config: TuneConfig, objective: Objective) -> None:
    """Refuse what rows are cut by, once for all trials."""
    fixed = ["training.sequence_length", *(["model.path"] if objective.name == "preference" else [])]
    for key in fixed:
        if key in config.tuning.space:
            raise UserError(
                f"tuning.space: found '{key}', allowed for objective.type {objective.name}: keys that trials can "
                "differ in; the data are prepared with it, once for all trials"
            )


def _check_model(config: TuneConfig, found: FinetuneConfig) -> None:
    """Refuse a trial that its model does not allow, or whose model reads other tokens."""
    from raylm.training.inputs import check_trained
    from raylm.training.teacher import check_tokenizers

    check_trained(found)
    if found.model.path != config.model.path:
        check_tokenizers(str(found.model.path), str(config.model.path), "model.path")
