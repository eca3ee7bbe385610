"""Schedules at the points that define them."""

from __future__ import annotations

import pytest

from raylm.config.training import TrainingSection
from raylm.training.loop.schedules import learning_rate_factor


def section(schedule: str, **more) -> TrainingSection:
    return TrainingSection(steps=100, schedule=schedule, warmup_steps=10, final_learning_rate_fraction=0.1, **more)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_to_the_peak(schedule: str) -> None:
    factors = [learning_rate_factor(section(schedule), step, 100) for step in range(11)]
    assert factors == sorted(factors)
    assert 0 < factors[0] < 0.2
    assert factors[10] == pytest.approx(1.0)


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0), ("wsd", 1.0)])
def test_middle_and_end(schedule: str, middle: float) -> None:
    assert learning_rate_factor(section(schedule), 55, 100) == pytest.approx(middle)
    end = learning_rate_factor(section(schedule), 100, 100)
    assert end == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_stable_decay_falls_in_its_last_share_only() -> None:
    training = section("wsd", decay_fraction=0.5)
    assert learning_rate_factor(training, 49, 100) == 1.0
    assert learning_rate_factor(training, 75, 100) == pytest.approx(0.55)
