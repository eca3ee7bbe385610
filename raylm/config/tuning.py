"""Section about the search for hyperparameters: ``tuning``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raylm.config.base import Count, CountOrAuto, PathText, Section, Total
from raylm.config.distributions import Distribution, Point, count_points, in_order, is_active
from raylm.config.population import within_refusal

__all__ = ["Distribution", "TuningSection"]

Objective = Literal["quality", "megabytes", "p50_milliseconds"]
OBJECTIVES: tuple[Objective, ...] = ("quality", "megabytes", "p50_milliseconds")
# A search keeps every candidate, and its layout is planned before it starts.
MOST_TRIALS = 10_000
# Sections, and keys of others, that a trial may have in its own way.
MAY_VARY = ("training", "objective", "adapter", "freezing", "parallel", "distillation", "rounding", "model.path")
# Of these the keys that may not, with the reason.
MAY_NOT_VARY = {
    "training.evaluation_batches": "trials would be compared on different texts",
    "objective.type": "losses of different tasks cannot be compared",
    "objective.source_prefix": "the data are prepared with it, once for all trials",
    "objective.target_length": "the data are prepared with it, once for all trials",
    "objective.scheme": "the data are prepared with it, once for all trials",
    "objective.overlap": "the data are prepared with it, once for all trials",
    "distillation.teacher": "the losses of different teachers cannot be compared",
    "distillation.top_k": "what the teacher says is kept with the data, once for all trials",
}
REASONS = {
    "run": "it names the search itself",
    "data": "the data are prepared once for all trials",
    "tokenizer": "the data are prepared once for all trials",
    "resources": "trials take equal shares of the cluster",
    "checkpoint": "it does not change what is trained",
    "evaluation": "figures could not be compared",
    "model": "trials go on from the model at model.path",
    "tuning": "it is about the search itself",
}


def vary_refusal(key: str) -> str:
    """Why trials cannot differ in the ``key``, in words for a message; empty where they can."""
    section = key.partition(".")[0]
    for place, reason in MAY_NOT_VARY.items():
        if key == place:
            return f"found '{key}', allowed: keys that trials can differ in; {reason}"
    if key.startswith("compression.steps.") or any(key == place or key.startswith(f"{place}.") for place in MAY_VARY):
        return ""
    reason = f"; {REASONS[section]}" if section in REASONS else ""
    return f"found '{key}', allowed: keys of {', '.join(MAY_VARY)} and compression.steps{reason}"


class BudgetSection(Section):
    """``tuning.budget``: when no further trial begins; those that have begun come to their end. With the scheduler pbt,
    when no further turn begins; the best member is exported as it is then."""

    trials: Annotated[int | None, Field(ge=1, le=MOST_TRIALS)] = None
    """Trials, whatever the space and ``tuning.trials`` ask for."""
    minutes: float | None = Field(default=None, gt=0, le=1e6)
    """Minutes of searching, all starts of the command together."""
    tokens: Total | None = None
    """Tokens that all trials together have trained on."""


class TuningSection(Section):
    """``tuning``: a search space over dotted keys of the same file, and how to search it."""

    space: dict[str, Distribution] = Field(min_length=1)
    """Dotted key, for example training.learning_rate, to a distribution."""
    trials: int = Field(default=8, ge=1, le=MOST_TRIALS)
    """Draws from the space; with a grid, draws for each of its points. With the scheduler pbt, members of the
    population."""
    start: list[dict[str, Any]] = Field(default=[], max_length=MOST_TRIALS)
    """Points that are tried first; keys of the space that a point leaves out are drawn."""
    start_from: PathText | None = None
    """Run directory of an earlier search: its best point is tried after those of ``start``, and tpe learns from all of
    its trials whose keys and values are of this space."""
    searcher: Literal["random", "grid", "tpe", "nsga2"] = "random"
    """random draws from the space; grid tries every combination of its values once, whatever ``trials`` says, with a
    scheduler in an order drawn by ``run.seed``; tpe draws near what was good so far (Optuna's; Bergstra et al. 2011,
    Ozaki et al. 2020). Where the file has a section compression also Optuna's nsga2 (Deb et al. 2002)."""
    metric: str | list[Objective] = Field(default="validation_loss", min_length=1)
    """What the best trial is best in: validation_loss, or another figure of validation that the task has, such as
    validation_accuracy. Where the file has a section compression one or more of quality (bits per byte, or the task's
    own figure), megabytes (weights on disk) and p50_milliseconds (of a token of one answer, or of one text), all of
    them minimised; by default all three."""
    direction: Literal["auto", "min", "max"] = "auto"
    """Whether a smaller or a larger ``metric`` is better; auto: a smaller loss, and a larger one of any other."""
    scheduler: Literal["asha", "hyperband", "median", "pbt", "none"] = "asha"
    """Stops trials early. asha: a trial pauses at each rung and goes on once it is among the best of those that came as
    far (Li et al. 2020, arXiv:1810.05934); of equal figures the smaller loss is the better one.
    hyperband: the same, but some trials are left alone for longer (its brackets, Li et al. 2018, arXiv:1603.06560).
    median: those whose best is worse than the median of the others' means (Golovin et al. 2017). pbt stops none: the
    trials are a population that goes forward in turns, after each of which the last quarter takes over the checkpoints
    of the first, and goes on with their values changed (population based training, Jaderberg et al. 2017,
    arXiv:1711.09846)."""
    grace_evaluations: Count = 1
    """Evaluations of a trial before it may be stopped, or with pbt take over another's checkpoint."""
    perturbation_evaluations: Count = 1
    """pbt: evaluations of a turn, of training.evaluate_every_steps each."""
    resample_probability: float = Field(default=0.25, ge=0, le=1)
    """pbt: how likely a value that is taken over is drawn from the space anew. Else a number is multiplied by 0.8 or
    1.2, within its range, and a choice goes to a neighbour in its list."""
    reduction_factor: int = Field(default=4, ge=2, le=1000)
    """asha and hyperband: one in this many trials goes on from each rung, to a rung at this many times the steps."""
    max_concurrent: CountOrAuto = "auto"
    """Trials at a time; auto is as many as the cluster holds. More are refused."""
    test: PathText | None = None
    """Data that no trial sees, as ``data`` says: the best trial's model is evaluated on them once."""
    budget: BudgetSection = BudgetSection()
    """When no further trial begins; by default once all of them have."""

    @field_validator("space")
    @classmethod
    def _may_vary(cls, value: dict[str, Distribution]) -> dict[str, Distribution]:
        for key in value:
            if refusal := vary_refusal(key):
                raise ValueError(refusal)
        for key in value:
            if below := next((other for other in value if other.startswith(f"{key}.")), None):
                raise ValueError(f"found '{key}' and '{below}', which is a part of it, allowed: one of them")
        return value

    @model_validator(mode="after")
    def _searchable(self) -> TuningSection:
        in_order(self.space)
        every = self.searcher == "grid"
        endless = [key for key, d in self.space.items() if d.listed is None]
        if every and endless:
            raise ValueError(
                f"searcher: found grid with a range of {', '.join(endless)}, allowed with grid: choice, grid, integer, "
                "and a range with a step"
            )
        gridded = [key for key, d in self.space.items() if d.grid is not None]
        if self.searcher in ("tpe", "nsga2") and gridded:
            raise ValueError(
                f"searcher: found {self.searcher} with a grid of {', '.join(gridded)}, allowed with it: choice, "
                "uniform, log_uniform, integer"
            )
        once = every or len(gridded) == len(self.space)
        trials = count_points(self.space, MOST_TRIALS, every=every) * (1 if once else self.trials)
        if trials > MOST_TRIALS:
            raise ValueError(f"space: found a grid of {trials} trials, allowed: at most {MOST_TRIALS}")
        if self.scheduler == "pbt":
            self._of_population(gridded)
        for number, point in enumerate(self.start):
            if refusal := self.point_refusal(point):
                raise ValueError(f"start.{number}{refusal}")
        return self

    def _of_population(self, gridded: list[str]) -> None:
        """Check what a population is told."""
        if self.searcher != "random":
            raise ValueError(f"searcher: found {self.searcher} with scheduler pbt, allowed with it: random")
        if gridded:
            raise ValueError(
                f"space: found a grid of {', '.join(gridded)} with scheduler pbt, allowed with it: choice, uniform, "
                "log_uniform, integer"
            )
        if self.trials < 2:
            raise ValueError(f"trials: found {self.trials} with scheduler pbt, allowed with it: 2 or more members")
        if refusal := within_refusal(self.space):
            raise ValueError(refusal)

    def point_refusal(self, point: Point) -> str:
        """Why a point is none of the space, in words that begin behind its place; empty where it is one."""
        for key, value in point.items():
            if key not in self.space:
                return f": found '{key}', allowed: keys of tuning.space ({', '.join(self.space)})"
            if not self.space[key].has(value):
                return f".{key}: found {value!r}, allowed: a value of {self.space[key].described()}"
        for key in point:
            known = {name for name in self.space[key].when or () if name in point}
            if len(known) == len(self.space[key].when or ()) and not is_active(self.space[key], point):
                return f".{key}: found beside other values than its 'when' asks for, allowed: leave it out"
        return ""
