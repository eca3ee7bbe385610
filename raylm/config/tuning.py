"""Section about the search for hyperparameters: ``tuning``."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raylm.config.base import Count, CountOrAuto, Section

Objective = Literal["quality", "megabytes", "p50_milliseconds"]
OBJECTIVES: tuple[Objective, ...] = ("quality", "megabytes", "p50_milliseconds")
# A search keeps every candidate, and its layout is planned before it starts.
MOST_TRIALS = 10_000


class Distribution(Section):
    """One dimension of a search space; exactly one key is given."""

    choice: list[Any] | None = Field(default=None, min_length=1)
    """Values to draw from."""
    grid: list[Any] | None = Field(default=None, min_length=1)
    """Values that are all tried."""
    uniform: list[float] | None = Field(default=None, min_length=2, max_length=2)
    """Bounds of a uniform distribution."""
    log_uniform: list[float] | None = Field(default=None, min_length=2, max_length=2)
    """Bounds of a distribution that is uniform in the logarithm."""
    integer: list[int] | None = Field(default=None, min_length=2, max_length=2)
    """Smallest and largest integer."""

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}; found: {given or 'none'}")
        for name in ("uniform", "log_uniform", "integer"):
            bounds = getattr(self, name)
            if bounds and bounds[0] >= bounds[1]:
                raise ValueError(f"{name}: found {bounds}, allowed: [low, high] with low < high")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform: found {self.log_uniform}, allowed: bounds above 0")
        return self


class TuningSection(Section):
    """``tuning``: a search space over dotted keys of the same file, and how to search it."""

    space: dict[str, Distribution] = Field(min_length=1)
    """Dotted key, for example training.learning_rate, to a distribution."""
    trials: int = Field(default=8, ge=1, le=MOST_TRIALS)
    """Draws from the space; with a grid, draws for each of its points."""
    searcher: Literal["random", "grid", "tpe", "nsga2"] = "random"
    """random draws from the space; grid tries every combination of its values once, whatever ``trials`` says. Where the
    file has a section compression also Optuna's tpe (Ozaki et al. 2020) and nsga2 (Deb et al. 2002)."""
    metric: Literal["validation_loss"] | list[Objective] = Field(default="validation_loss", min_length=1)
    """Metric to minimise. Where the file has a section compression one or more of quality (bits per byte, or the task's
    own figure), megabytes (weights on disk) and p50_milliseconds (of a token of one answer, or of one text); by default
    all three."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops trials early that are worse than others at the same step (Li et al. 2020, arXiv:1810.05934)."""
    grace_evaluations: Count = 1
    """Evaluations of a trial before asha may stop it."""
    reduction_factor: int = Field(default=2, ge=2, le=1000)
    """asha keeps one in this many trials at each rung."""
    max_concurrent: CountOrAuto = "auto"
    """Trials at a time; auto is as many as the cluster holds. More are refused."""

    @field_validator("space")
    @classmethod
    def _inside_training(cls, value: dict[str, Distribution]) -> dict[str, Distribution]:
        for key in value:
            if not key.startswith(("training.", "objective.", "compression.steps.")):
                raise ValueError(f"space: found '{key}', allowed: keys of training, objective and compression.steps")
        return value

    @property
    def _points(self) -> int:
        """Points of the grid: combinations of the values that are all tried."""
        every = self.searcher == "grid"
        sizes = [len(d.grid) for d in self.space.values() if d.grid]
        sizes += [len(d.choice) for d in self.space.values() if d.choice and every]
        sizes += [d.integer[1] - d.integer[0] + 1 for d in self.space.values() if d.integer and every]
        return math.prod(sizes)

    @model_validator(mode="after")
    def _countable(self) -> TuningSection:
        once = self.searcher == "grid" or all(distribution.grid for distribution in self.space.values())
        trials = self._points * (1 if once else self.trials)
        if trials > MOST_TRIALS:
            raise ValueError(f"space: found a grid of {trials} trials, allowed: at most {MOST_TRIALS}")
        endless = [key for key, d in self.space.items() if d.uniform is not None or d.log_uniform is not None]
        if self.searcher == "grid" and endless:
            raise ValueError(
                f"searcher: found grid with a range of {', '.join(endless)}, allowed with grid: choice, grid, integer"
            )
        return self
