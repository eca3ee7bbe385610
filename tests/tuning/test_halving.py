"""Asynchronous successive halving: which trials go on, by the algorithm of the paper, and at which cost."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from raylm.config import load_config
from raylm.config.tuning import BudgetSection, Distribution, TuningSection
from raylm.training.checkpoints.mirror import METRICS
from raylm.training.loop.worker import Turn
from raylm.training.reports.metrics import read_metrics
from raylm.training.stage import finetune
from raylm.tuning.halving import DrawnBrackets, Halving
from raylm.tuning.search import TURN
from raylm.tuning.searcher import CandidateSearch, make_candidates
from raylm.tuning.stage import tune
from tests.processes import start
from tests.tuning.test_search import wait_until, write_config

RATE = "training.learning_rate"


def search_over(values: Sequence[float], at_a_time: int = 1, halving: Halving | None = None, **tuning: Any):
    section = TuningSection(space={RATE: Distribution(grid=list(values))}, **tuning)
    candidates = make_candidates(section, 0, ["validation_loss"], [True])
    rungs = halving or Halving(10, 4)
    return CandidateSearch(candidates, ["validation_loss"], section.budget, at_a_time, rungs)


def through(search: CandidateSearch, total: int, loss: Callable[[float, int], float | None]) -> dict[float, int]:
    """Make all turns one after the other; steps of each value."""
    steps: Counter[float] = Counter()
    for count in range(1000):
        point = search.suggest(str(count))
        if point == CandidateSearch.FINISHED:
            return dict(steps)
        assert isinstance(point, dict)
        _, first, last = point[TURN]
        last = min(last, total)
        assert steps[point[RATE]] == first
        steps[point[RATE]] = last
        found = loss(point[RATE], last)
        result = {"failure": "no number"} if found is None else {"validation_loss": found, "step": last, "tokens": last}
        search.on_trial_complete(str(count), result | ({"finished": True} if last == total else {}))
    raise AssertionError("it does not end")


def test_the_best_come_to_their_end_whatever_the_order() -> None:
    """16 trials of 240 steps with rungs at 10, 40 and 160: the best is found, with at most 45% of all steps."""
    values = [float(number) for number in range(16)]
    for seed in range(50):
        random.Random(seed).shuffle(values)
        steps = through(search_over(values), 240, lambda value, step: value - step)
        assert steps[0.0] == 240
        assert sum(steps.values()) <= 0.45 * 16 * 240
        assert all(count >= 10 for count in steps.values()) and len(steps) == 16


def test_those_in_the_first_quarter_of_a_rung_go_on() -> None:
    halving = Halving(10, 4)
    for trial in range(3):
        assert halving.begin(trial) == Turn(0, 10)
        halving.record(trial, Turn(0, 10), (float(trial), 0.0), finished=False)
        assert halving.next_turn() is None
    halving.begin(3)
    halving.record(3, Turn(0, 10), (5.0, 0.0), finished=False)
    assert halving.next_turn() == (0, Turn(10, 40))
    # It counts as one of the quarter once it has gone on.
    assert halving.next_turn() is None
    for trial in range(4, 8):
        halving.begin(trial)
        halving.record(trial, Turn(0, 10), (-float(trial), 0.0), finished=False)
    assert halving.next_turn() == (7, Turn(10, 40))
    assert halving.next_turn() == (6, Turn(10, 40))
    assert halving.next_turn() is None
    # No other is at a higher rung: the best of those at the highest goes on to the end, and no further one.
    for trial, score in ((0, 3.0), (7, 2.0), (6, 1.0)):
        halving.record(trial, Turn(10, 40), (score, 0.0), finished=False)
    assert halving.last_turn() == (6, Turn(40, 160))
    halving.record(6, Turn(40, 160), (0.5, 0.0), finished=True)
    assert halving.next_turn() is None and halving.last_turn() is None


def test_equal_figures_are_told_apart_by_the_loss() -> None:
    """As of classifiers that all name the largest class, for which no other figure speaks yet."""
    halving = Halving(10, 2)
    for trial, loss in enumerate((1.78, 1.55, 1.79, 1.76)):
        halving.begin(trial)
        halving.record(trial, Turn(0, 10), (-0.276, loss), finished=False)
    assert halving.next_turn() == (1, Turn(10, 20))
    assert halving.next_turn() == (3, Turn(10, 20))
    assert halving.next_turn() is None


def test_failed_trials_count_as_the_worst_and_never_go_on() -> None:
    steps = through(search_over([1.0, 2.0, 1e30]), 100, lambda value, step: None if value > 1e6 else value)
    assert steps == {1.0: 100, 2.0: 10, 1e30: 10}
    assert through(search_over([1e30, 2e30]), 100, lambda value, step: None) == {1e30: 10, 2e30: 10}


def test_trials_shorter_than_the_first_rung_all_come_to_their_end() -> None:
    assert through(search_over([1.0, 2.0, 3.0]), 5, lambda value, step: value) == {1.0: 5, 2.0: 5, 3.0: 5}


def test_what_runs_is_waited_for() -> None:
    search = search_over([1.0, 2.0, 3.0, 4.0], at_a_time=2, halving=Halving(10, 2))
    assert search.suggest("a") and search.suggest("b") and search.suggest("c") is None
    for name, loss in (("a", 1.0), ("b", 2.0)):
        search.on_trial_complete(name, {"validation_loss": loss, "step": 10, "tokens": 5})
    # The first goes on before another begins.
    assert search.suggest("c") == {RATE: 1.0, TURN: [0, 10, 20]}
    assert search.suggest("d") == {RATE: 3.0, TURN: [2, 0, 10]}
    search.on_trial_complete("d", {"validation_loss": 3.0, "step": 10, "tokens": 5})
    assert search.suggest("e") == {RATE: 4.0, TURN: [3, 0, 10]}
    search.on_trial_complete("e", {"validation_loss": 4.0, "step": 10, "tokens": 5})
    assert search.suggest("f") == {RATE: 2.0, TURN: [1, 10, 20]}
    search.on_trial_complete("f", {"validation_loss": 2.0, "step": 20, "tokens": 10})
    # Nothing may begin, but what runs may make another go on.
    assert search.suggest("g") is None
    search.on_trial_complete("c", {"validation_loss": 1.0, "step": 20, "tokens": 10, "finished": True})
    assert search.suggest("g") == CandidateSearch.FINISHED


def test_a_spent_budget_leaves_one_to_come_to_its_end() -> None:
    search = search_over([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], budget=BudgetSection(tokens=25))
    assert through(search, 100, lambda value, step: value) == {1.0: 100, 2.0: 10, 3.0: 10}


def test_a_saved_search_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """The seventh turn runs while the search is saved; what came of it is told to the one that goes on."""

    def loss(value: float, step: int) -> float:
        return (value * 7 + step) % 11

    values = [float(number) for number in range(12)]
    expected = through(search_over(values), 160, loss)
    search, steps = search_over(values), Counter[float]()
    for count in range(1000):
        point = search.suggest(str(count))
        if point == CandidateSearch.FINISHED:
            break
        assert isinstance(point, dict)
        if count == 6:
            search.save(str(tmp_path / "state"))
            search = search_over(values)
            search.restore(str(tmp_path / "state"))
        last = steps[point[RATE]] = min(160, point[TURN][2])
        found = {"validation_loss": loss(point[RATE], last), "step": last}
        search.on_trial_complete(str(count), found | ({"finished": True} if last == 160 else {}))
    assert dict(steps) == expected


def test_tpe_learns_from_every_turn() -> None:
    """A point that goes on is told of twice, the second time with what it came to later."""
    section = TuningSection(space={RATE: Distribution(uniform=[0.0, 1.0])}, searcher="tpe", trials=8)
    candidates = make_candidates(section, 0, ["validation_loss"], [True])
    search = CandidateSearch(candidates, ["validation_loss"], section.budget, 1, Halving(10, 4))
    steps = through(search, 40, lambda value, step: value - step)
    told = candidates._study.trials
    assert len(told) == 8 + sum(count == 40 for count in steps.values())
    best = min(steps)
    assert [trial.value for trial in told if trial.params[RATE] == best and trial.state.name == "COMPLETE"] == [
        pytest.approx(best - 40)
    ]


def test_brackets_leave_some_trials_alone_for_longer() -> None:
    draw = DrawnBrackets(3, seed=1)
    found = [draw(trial) for trial in range(300)]
    assert found == [draw(trial) for trial in range(300)]
    counts = Counter(found)
    assert counts[0] > counts[1] > counts[2] > 0
    halving = Halving(10, 2, 3, draw)
    assert {halving.begin(trial).last for trial in range(30)} == {10, 20, 40}


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


@pytest.mark.slow
def test_a_search_of_two_workers_pauses_its_trials_and_goes_on_after_a_kill(
    ray_instance, tiny_model: Path, tmp_path: Path
) -> None:
    """What paused trials come to is what one that never paused comes to; a search that was killed does the same."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    space = {RATE: {"grid": [1e-6, 1e-3, 1e-5, 1e-2, 1e-4, 3e-3]}}
    more = ["training.steps=16", "training.evaluate_every_steps=2", "resources.workers=2"]
    paths = [write_config(tmp_path / name, tiny_model, space=space, reduction_factor=2) for name in ("whole", "killed")]
    tune(load_config("tune", paths[0], more))
    command = ["-m", "raylm.cli", "tune", str(paths[1]), *more]
    first = start(*command)
    try:
        wait_until(lambda: (tmp_path / "killed" / "search" / "trials" / "trial-002" / METRICS).exists(), first)
    finally:
        first.kill()
    first.communicate(timeout=60)
    again = start(*command)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors[-2000:]
    found, other = (
        json.loads((tmp_path / name / "search" / "report.json").read_text()) for name in ("whole", "killed")
    )
    assert [(row["status"], row["step"]) for row in other["trials"]] == [
        (row["status"], row["step"]) for row in found["trials"]
    ]
    assert [row["validation_loss"] for row in other["trials"]] == pytest.approx(
        [row["validation_loss"] for row in found["trials"]], abs=1e-6
    )
    assert {row["step"] for row in found["trials"]} > {2, 16}
    assert found["best"][RATE] == 1e-2 and found["best"]["status"] == "finished"
    lines = read_metrics(tmp_path / "whole" / "search" / "trials" / "trial-003" / METRICS)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 16
    plain = load_config("finetune", tmp_path / "whole" / "search" / "best.yaml")
    finetune(plain)
    expected = read_metrics(tmp_path / "whole" / "search-best" / METRICS)
    assert losses(lines) == pytest.approx(losses(expected), abs=1e-6)
