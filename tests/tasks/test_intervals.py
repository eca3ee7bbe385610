"""Bootstrap intervals: their ends against the normal approximation, and where nothing varies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raylm.data.samples.questions import Question
from raylm.tasks.extractive_qa.answers import summarize
from raylm.tasks.intervals import mean_interval, ratio_interval


def test_a_mean_has_the_interval_of_its_normal_approximation() -> None:
    values = np.random.default_rng(1).random(2000)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 8)
    assert mean_interval([3.0] * 50) == [3.0, 3.0]


def test_a_ratio_weighs_its_parts() -> None:
    """Parts of one loss a token: nothing varies, however long they are."""
    counts = [10, 200, 30, 4]
    assert ratio_interval([2.5 * count for count in counts], counts) == pytest.approx((2.5, 2.5))


def test_a_reader_has_intervals_over_all_questions() -> None:
    questions = [Question(str(n), "q", "context", ("a",) if n % 4 else (), (0,)) for n in range(200)]
    found = summarize([(float(n % 2), 0.5) for n in range(200)], questions)
    assert found["exact_match"] == 50.0
    low, high = found["exact_match_interval"]
    assert 40 < low < 50 < high < 60
    assert found["f1_interval"] == [50.0, 50.0]
    assert "answerable_exact_match_interval" not in found
