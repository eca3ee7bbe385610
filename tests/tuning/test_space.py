"""Points of a search space: drawn, listed, conditional, begun with; and what searchers learn."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from raylm.config.distributions import Distribution, corners, grid_points, is_active
from raylm.config.tuning import BudgetSection, TuningSection
from raylm.errors import UserError
from raylm.tuning.searcher import CandidateSearch, make_candidates
from raylm.tuning.space import draw_candidates, drawn, earlier_trials

RATE, MATRIX, OPTIMIZER = "training.learning_rate", "training.matrix_learning_rate", "training.optimizer"
CONDITIONAL = {
    MATRIX: Distribution(log_uniform=[1e-3, 1e-1], when={OPTIMIZER: "muon"}),
    OPTIMIZER: Distribution(choice=["adamw", "muon", "sgd"]),
    "training.momentum": Distribution(choice=[0.8, 0.9], when={OPTIMIZER: ["muon", "sgd"]}),
}


def test_steps_are_kept_to() -> None:
    generator = np.random.default_rng(0)
    tenths = Distribution(uniform=[0.1, 0.5], step=0.1)
    assert list(tenths.listed) == [0.1, 0.2, 0.3, 0.4, 0.5]
    counts = Counter(drawn(tenths, generator) for _ in range(500))
    assert set(counts) == {0.1, 0.2, 0.3, 0.4, 0.5} and min(counts.values()) > 60
    # A range that is no whole number of steps ends with the last of them.
    assert list(Distribution(uniform=[0.0, 1.0], step=0.4).listed) == [0.0, 0.4, 0.8]
    fours = Distribution(integer=[4, 13], step=4)
    assert {drawn(fours, generator) for _ in range(100)} == {4, 8, 12}
    logarithmic = Distribution(log_uniform=[1.0, 100.0], step=1.0)
    found = [drawn(logarithmic, generator) for _ in range(500)]
    assert all(value == int(value) and 1 <= value <= 100 for value in found)
    # As many below ten as above.
    assert 200 < sum(value < 10 for value in found) < 300


def test_a_key_is_drawn_only_where_another_has_its_value() -> None:
    points = draw_candidates(TuningSection(space=CONDITIONAL, trials=60), seed=1)
    for point in points:
        assert (MATRIX in point) == (point[OPTIMIZER] == "muon")
        assert ("training.momentum" in point) == (point[OPTIMIZER] != "adamw")
    assert {point[OPTIMIZER] for point in points} == {"adamw", "muon", "sgd"}


def test_a_grid_has_each_combination_that_can_be_once() -> None:
    space = {
        OPTIMIZER: Distribution(choice=["adamw", "muon"]),
        MATRIX: Distribution(uniform=[0.01, 0.02], step=0.01, when={OPTIMIZER: "muon"}),
        RATE: Distribution(grid=[1, True]),
    }
    points = draw_candidates(TuningSection(space=space, searcher="grid", scheduler="none"), seed=0)
    assert points == [
        {OPTIMIZER: "adamw", RATE: 1}, {OPTIMIZER: "adamw", RATE: True},
        {OPTIMIZER: "muon", MATRIX: 0.01, RATE: 1}, {OPTIMIZER: "muon", MATRIX: 0.01, RATE: True},
        {OPTIMIZER: "muon", MATRIX: 0.02, RATE: 1}, {OPTIMIZER: "muon", MATRIX: 0.02, RATE: True},
    ]  # fmt: skip
    # What is begun with is not tried again.
    begun = TuningSection(space=space, searcher="grid", scheduler="none", start=[points[3]])
    assert draw_candidates(begun, seed=0) == [points[3], *points[:3], *points[4:]]


def test_grids_among_keys_that_are_drawn() -> None:
    space = {RATE: Distribution(log_uniform=[1e-4, 1e-2]), "training.batch_size": Distribution(grid=[2, 4])}
    points = draw_candidates(TuningSection(space=space, trials=3), seed=0)
    assert [point["training.batch_size"] for point in points] == [2, 4] * 3
    assert len({point[RATE] for point in points}) == 6
    assert len(list(grid_points(space, every=False))) == 2


def test_corners_reach_every_value_with_its_conditions() -> None:
    found = corners(CONDITIONAL)
    for key, distribution in CONDITIONAL.items():
        assert {point.get(key) for point in found} >= set(distribution.choice or distribution.log_uniform)
        assert all((key in point) == is_active(distribution, point) for point in found)


def test_what_is_begun_with_comes_first_and_is_completed() -> None:
    space = {RATE: Distribution(log_uniform=[1e-4, 1e-2]), "training.batch_size": Distribution(integer=[2, 8])}
    start = [{RATE: 0.005}, {RATE: 0.001, "training.batch_size": 3}]
    for searcher in ("random", "tpe"):
        tuning = TuningSection(space=space, trials=5, start=start, searcher=searcher)
        candidates = make_candidates(tuning, 0, ["validation_loss"], [True])
        points = [candidates.ask() for _ in range(candidates.count)]
        assert len(points) == 5
        assert points[0][RATE] == 0.005 and 2 <= points[0]["training.batch_size"] <= 8
        assert points[1] == start[1]


REPORT = {
    "trials": [
        {"trial": 0, RATE: 0.001, "step": 9, "validation_loss": 2.0, "status": "finished"},
        {"trial": 1, RATE: 0.002, "step": 9, "validation_loss": 1.0, "status": "finished"},
        {"trial": 2, RATE: 0.003, "step": 3, "validation_loss": 0.5, "status": "stopped"},
        {"trial": 3, RATE: 0.004, "step": 3, "validation_loss": None, "status": "failed", "failure": "no"},
        {"trial": 4, RATE: 5.0, "step": 9, "validation_loss": 0.1, "status": "finished"},
    ]
}


def test_an_earlier_search_is_learnt_from(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    space = {RATE: Distribution(log_uniform=[1e-4, 1e-2])}
    tuning = TuningSection(space=space, trials=4, start_from=str(tmp_path), searcher="tpe")
    known = earlier_trials(tuning, ["validation_loss"])
    assert [(one.point[RATE], one.values, one.step) for one in known] == [
        (0.001, [2.0], None), (0.002, [1.0], None), (0.003, [0.5], 3),
    ]  # fmt: skip
    for searcher in ("tpe", "random"):
        candidates = make_candidates(tuning.model_copy(update={"searcher": searcher}), 0, ["validation_loss"], [True])
        assert candidates.ask() == {RATE: 0.002}
        assert candidates.count == 4
    # Of a figure where more is better.
    best = make_candidates(tuning, 0, ["validation_loss"], [False]).ask()
    assert best == {RATE: 0.001}
    other = TuningSection(space={"training.momentum": Distribution(choice=[0.9])}, start_from=str(tmp_path))
    with pytest.raises(UserError, match=r"tuning\.start_from: .*none of whose trials is a point of tuning\.space"):
        make_candidates(other, 0, ["validation_loss"], [True])
    nowhere = TuningSection(space=space, start_from=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"allowed: the run directory of a search that is done"):
        make_candidates(nowhere, 0, ["validation_loss"], [True])


def loss(point: dict[str, Any]) -> float:
    """A cheap stand-in for a trained model's: a valley over three numbers, whose depth depends on the optimizer."""
    rate, batch = math.log10(point[RATE]) + 3.0, math.log2(point["training.batch_size"]) - 4.0
    depth = {"adamw": 0.0, "muon": 0.3, "sgd": 0.6}[point[OPTIMIZER]]
    return rate**2 + 2.0 * (point["training.weight_decay"] - 0.3) ** 2 + 0.075 * batch**2 + depth


def searched(searcher: str, seed: int, trials: int = 24) -> float:
    """The least loss that a search finds, through the searcher that Ray Tune is given."""
    space = {
        RATE: Distribution(log_uniform=[1e-6, 1.0]),
        "training.weight_decay": Distribution(uniform=[0.0, 1.0]),
        "training.batch_size": Distribution(integer=[1, 64]),
        OPTIMIZER: Distribution(choice=["adamw", "muon", "sgd"]),
    }
    tuning = TuningSection(space=space, searcher=searcher, trials=trials)
    candidates = make_candidates(tuning, seed, ["validation_loss"], [True])
    search = CandidateSearch(candidates, ["validation_loss"], tuning.budget, at_a_time=1)
    losses = []
    while (point := search.suggest(f"t{len(losses)}")) != CandidateSearch.FINISHED:
        losses.append(loss(point))
        search.on_trial_complete(f"t{len(losses) - 1}", {"validation_loss": losses[-1], "finished": True})
    assert len(losses) == trials
    return min(losses)


def test_tpe_finds_more_than_random_draws() -> None:
    """24 trials over 5 seeds: in the mean, and at most one seed the other way round."""
    found = {name: [searched(name, seed) for seed in range(5)] for name in ("random", "tpe")}
    assert np.mean(found["tpe"]) < np.mean(found["random"]) - 0.1, found
    assert sum(tpe < random for tpe, random in zip(found["tpe"], found["random"], strict=True)) >= 4, found


def make_search(**tuning: Any) -> CandidateSearch:
    section = TuningSection(space={RATE: Distribution(log_uniform=[1e-4, 1e-2])}, **{"trials": 9, **tuning})
    candidates = make_candidates(section, 0, ["validation_loss"], [True])
    return CandidateSearch(candidates, ["validation_loss"], section.budget, at_a_time=2)


def test_no_more_run_at_a_time_than_may() -> None:
    search = make_search()
    assert search.suggest("a") and search.suggest("b") and search.suggest("c") is None
    search.on_trial_complete("a", error=True)
    assert search.suggest("c") and search.suggest("d") is None


def test_a_search_that_is_saved_goes_on_as_it_would_have(tmp_path: Path) -> None:
    for searcher in ("random", "tpe"):
        whole, first, second = (make_search(searcher=searcher) for _ in range(3))
        expected = []
        for number in range(9):
            expected.append(whole.suggest(str(number)))
            whole.on_trial_complete(str(number), {"validation_loss": number % 4, "finished": True})
        for number in range(5):
            assert first.suggest(str(number)) == expected[number]
            if number == 4:
                # This one runs while the search is saved.
                first.save(str(tmp_path / searcher))
            first.on_trial_complete(str(number), {"validation_loss": number % 4, "finished": True})
        second.restore(str(tmp_path / searcher))
        second.on_trial_complete("4", {"validation_loss": 0, "finished": True})
        for number in range(5, 9):
            assert second.suggest(str(number)) == expected[number]
            second.on_trial_complete(str(number), {"validation_loss": number % 4, "finished": True})
        assert second.suggest("9") == CandidateSearch.FINISHED


def test_failed_trials_are_avoided() -> None:
    """Above a rate all fail: tpe draws fewer of those than at random."""

    def failures(searcher: str, seed: int) -> int:
        section = TuningSection(space={RATE: Distribution(uniform=[0.0, 1.0])}, searcher=searcher, trials=24)
        search = CandidateSearch(
            make_candidates(section, seed, ["validation_loss"], [True]), ["validation_loss"], section.budget, 1
        )
        failed = 0
        for number in range(24):
            rate = search.suggest(str(number))[RATE]
            failed += rate > 0.5
            result = {"failure": "not finite", "step": 1} if rate > 0.5 else {"validation_loss": 1.0, "finished": True}
            search.on_trial_complete(str(number), result)
        return failed

    tpe, random = (sum(failures(name, seed) for seed in range(5)) for name in ("tpe", "random"))
    assert tpe < 0.7 * random


def test_a_budget_ends_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    search = make_search(budget=BudgetSection(trials=2))
    assert search.suggest("a") and search.suggest("b") and search.suggest("c") == CandidateSearch.FINISHED
    search = make_search(budget=BudgetSection(tokens=1000))
    assert search.suggest("a") and search.suggest("b")
    search.on_trial_result("a", {"tokens": 400})
    search.on_trial_result("b", {"tokens": 500})
    search.on_trial_complete("a", {"tokens": 450, "validation_loss": 1.0, "finished": True})
    assert search.suggest("c")
    search.on_trial_result("c", {"tokens": 50})
    assert search.suggest("d") == CandidateSearch.FINISHED
    search = make_search(budget=BudgetSection(minutes=10))
    assert search.suggest("a")
    state = pickle.dumps(search._searched_seconds())
    assert pickle.loads(state) < 60
    monkeypatch.setattr("raylm.tuning.searcher.time.monotonic", lambda: search._began + 601)
    assert search.suggest("b") == CandidateSearch.FINISHED


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"space": {RATE: {"choice": [1.0], "step": 0.5}}}, "step: found 0.5 with choice, allowed with: uniform"),
        ({"space": {RATE: {"uniform": [0.0, 1.0], "step": 2.0}}}, "step: found 2, allowed: at most 1"),
        ({"space": {RATE: {"integer": [1, 9], "step": 1.5}}}, "allowed with integer: a whole number"),
        ({"space": {"data.format": {"choice": ["csv"]}}}, "the data are prepared once for all trials"),
        ({"space": {"resources.workers": {"choice": [1]}}}, "trials take equal shares of the cluster"),
        ({"space": {"objective.type": {"choice": ["causal"]}}}, "losses of different tasks cannot be compared"),
        ({"space": {"adapter": {"choice": [None]}, "adapter.rank": {"choice": [4]}}}, "which is a part of it"),
        (
            {"space": {RATE: {"choice": [1.0], "when": {OPTIMIZER: "sgd"}}}},
            f"space.{RATE}.when: found '{OPTIMIZER}', allowed: another key of the space (none)",
        ),
        (
            {
                "space": {
                    OPTIMIZER: {"choice": ["sgd"]},
                    RATE: {"choice": [1.0], "when": {OPTIMIZER: "adamw"}},
                }
            },
            f"space.{RATE}.when.{OPTIMIZER}: found 'adamw', allowed: a value of choice ['sgd']",
        ),
        (
            {
                "space": {
                    OPTIMIZER: {"choice": ["sgd"], "when": {RATE: 1.0}},
                    RATE: {"choice": [1.0], "when": {OPTIMIZER: "sgd"}},
                }
            },
            "allowed: no circle",
        ),
        ({"space": {RATE: {"grid": [1.0]}}, "searcher": "tpe"}, "found tpe with a grid of training.learning_rate"),
        ({"space": {RATE: {"uniform": [0.0, 1.0]}}, "start": [{RATE: 2.0}]}, f"start.0.{RATE}: found 2.0, allowed"),
        ({"space": {RATE: {"uniform": [0.0, 1.0]}}, "start": [{"training.x": 2.0}]}, "allowed: keys of tuning.space"),
        (
            {
                "space": {
                    OPTIMIZER: {"choice": ["sgd", "muon"]},
                    RATE: {"choice": [1.0], "when": {OPTIMIZER: "muon"}},
                },
                "start": [{OPTIMIZER: "sgd", RATE: 1.0}],
            },
            "found beside other values than its 'when' asks for",
        ),
    ],
)
def test_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TuningSection.model_validate(values)
    assert expected in str(caught.value)
