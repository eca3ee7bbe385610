"""Schedules at the points that define them."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from raylm.config.training import TrainingSection
from raylm.training.loop.schedules import learning_rate_factor, scheduled_momentum, set_momentum


def section(schedule: str, **more) -> TrainingSection:
    return TrainingSection(steps=100, schedule=schedule, warmup_steps=10, final_learning_rate_fraction=0.1, **more)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial", "constant", "wsd"])
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


def test_polynomial_is_a_power_of_what_is_left() -> None:
    training = section("polynomial", power=3.0)
    assert learning_rate_factor(training, 55, 100) == pytest.approx(0.1 + 0.9 * 0.5**3)
    assert learning_rate_factor(training, 100, 100) == pytest.approx(0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [4, 10, 101])
def test_one_cycle_is_torch_s(optimizer: str, steps: int) -> None:
    training = TrainingSection(steps=steps, schedule="one_cycle", optimizer=optimizer)
    weight = [torch.zeros(1, requires_grad=True)]
    kinds = {"sgd": lambda: torch.optim.SGD(weight, lr=1.0, momentum=0.5), "adamw": lambda: torch.optim.AdamW(weight)}
    theirs, ours = kinds[optimizer](), kinds[optimizer]()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=1.0, total_steps=steps)
    for step in range(steps):
        group = theirs.param_groups[0]
        assert learning_rate_factor(training, step, steps) == pytest.approx(group["lr"], rel=1e-9, abs=1e-12)
        set_momentum(ours, scheduled_momentum(training, step, steps))
        for key in ("momentum", "betas"):
            assert ours.param_groups[0].get(key, 0.0) == pytest.approx(group.get(key, 0.0))
        theirs.step()
        scheduler.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_so_few_steps_have_no_rise(steps: int) -> None:
    training = TrainingSection(steps=steps, schedule="one_cycle", one_cycle={"rise_fraction": 1 / 3})
    factors = [learning_rate_factor(training, step, steps) for step in range(steps)]
    assert factors[0] == 1.0 and factors == sorted(factors, reverse=True) and min(factors) >= 0


def test_momentum_stays_where_no_cycle_moves_it() -> None:
    cycle = {"schedule": "one_cycle", "steps": 10}
    still = [
        section("cosine"),
        TrainingSection(**cycle, one_cycle={"momentum": None}),
        TrainingSection(**cycle, optimizer="sgd", momentum=0.0),
    ]
    assert [scheduled_momentum(training, 3, 10) for training in still] == [None] * 3


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"schedule": "one_cycle", "warmup_steps": 5}, "warmup_steps: found 5, allowed with schedule one_cycle: 0"),
        ({"schedule": "plateau"}, "evaluate_every_steps: missing; schedule plateau needs it"),
        ({"one_cycle": {"momentum": [0.9, 0.8]}}, r"momentum: found \[0.9, 0.8\], allowed: \[lowest, highest\]"),
    ],
)
def test_schedules_that_cannot_be_are_refused(keys: dict, expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        TrainingSection(steps=10, **keys)


def test_plateau_multiplies_after_warm_up() -> None:
    training = section("plateau", evaluate_every_steps=5)
    assert learning_rate_factor(training, 4, 100, 0.25) == pytest.approx(5 / 11 * 0.25)
    assert learning_rate_factor(training, 50, 100, 0.25) == 0.25
