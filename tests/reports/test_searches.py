"""A search on a page: what matters, lines over all keys, and the table with what failed."""

from __future__ import annotations

import random
from typing import Any

from raylm.reports.searches import importance, importance_section, keys_of, parallel_coordinates, trials

RATE, OPTIMIZER, MATRIX = "training.learning_rate", "training.optimizer", "training.matrix_learning_rate"


def make_report(count: int, metric: str = "validation_loss") -> dict[str, Any]:
    """A search in which the rate decides nearly everything and the decay nothing; the last trial failed."""
    generator, rows = random.Random(0), []
    for number in range(count):
        rate, optimizer = 10 ** generator.uniform(-5, -1), generator.choice(["adamw", "muon"])
        value = abs(rate - 0.001) ** 0.2 + (0.02 if optimizer == "adamw" else 0.0)
        rows.append(
            {
                "trial": number, RATE: rate, "training.weight_decay": generator.uniform(0, 1), OPTIMIZER: optimizer,
                MATRIX: 0.02 if optimizer == "muon" else None, "step": 10, "validation_loss": value,
                **{metric: value}, "status": "finished",
            }
        )  # fmt: skip
    rows[-1] |= {"validation_loss": None, metric: None, "status": "failed", "failure": "the gradient <is> not finite"}
    minimised = metric == "validation_loss"
    best = (min if minimised else max)(rows[:-1], key=lambda row: row[metric])
    return {"trials": rows, "best": best, "metric": metric, "minimised": minimised, "concurrent_trials": 2}


def test_the_key_that_decides_matters_most() -> None:
    found = importance(make_report(40))
    assert next(iter(found)) == RATE and found[RATE] > 0.7
    assert found["training.weight_decay"] < 0.15
    # Not all trials have this one.
    assert MATRIX not in found
    assert abs(sum(found.values()) - 1) < 1e-6
    assert importance(make_report(40)) == found


def test_few_trials_say_nothing_of_what_matters() -> None:
    assert importance(make_report(6)) == {} and importance_section(make_report(6)) == ""


def test_lines_over_all_keys() -> None:
    for metric in ("validation_loss", "validation_accuracy"):
        report = make_report(12, metric)
        drawn = parallel_coordinates(report)
        # What failed has no line; the best is drawn thick, behind the others.
        assert drawn.count("<polyline") == 11
        assert drawn.count('stroke-width="3"') == 1
        last = drawn.rpartition("<polyline")[2]
        assert f"trial {report['best']['trial']} " in last and 'stroke-width="3"' in last
        # A line has a point for each key that the trial has, and for the metric.
        points = len(drawn.partition('points="')[2].partition('"')[0].split())
        assert points in (len(keys_of(report)), len(keys_of(report)) + 1)


def test_the_table_says_why_a_trial_failed() -> None:
    report = make_report(4)
    shown = trials(report)
    assert "failed: the gradient &lt;is&gt; not finite" in shown
    assert shown.index(f"{report['best'][RATE]:.4g}"[:5]) < shown.index("failed:")
