"""Section about the search for hyperparameters: ``tuning``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raylm.config.base import Count, CountOrAuto, Section

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
    searcher: Literal["random", "grid"] = "random"
    """random draws from the space; grid tries every combination of its values once, whatever ``trials`` says."""
    metric: Literal["validation_loss"] = "validation_loss"
    """Metric to minimise."""
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
            if not key.startswith(("training.", "objective.")):
                raise ValueError(f"space: found '{key}', allowed: keys of training and objective")
        return value

    @model_validator(mode="after")
    def _countable(self) -> TuningSection:
        endless = [key for key, d in self.space.items() if d.uniform is not None or d.log_uniform is not None]
        if self.searcher == "grid" and endless:
            raise ValueError(
                f"searcher: found grid with a range of {', '.join(endless)}, allowed with grid: choice, grid, integer"
            )
        return self
