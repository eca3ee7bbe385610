"""The expected wait for a turn, on a clock that the test moves."""

from __future__ import annotations

import pytest

from raylm.serving.engines.pace import Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def work(pace: Pace, clock: Clock, seconds: float, tokens_per_second: float, length: int) -> None:
    """Texts of ``length`` tokens, in steps of a tenth of a second."""
    done = 0.0
    for _ in range(round(seconds * 10)):
        clock.now += 0.1
        pace.tokens(round(tokens_per_second / 10))
        done += tokens_per_second / 10
        while done >= length:
            pace.finished(length)
            done -= length


def test_the_wait_follows_rate_and_length() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.begin()
    work(pace, clock, 3, 200, 50)
    assert pace.wait(8) == pytest.approx(8 * 50 / 200, rel=0.05)
    # Slower and longer from now on.
    work(pace, clock, 60, 100, 80)
    assert pace.wait(8) == pytest.approx(8 * 80 / 100, rel=0.1)
    assert pace.wait(0) == 0.0


def test_nothing_is_claimed_before_it_can_be_known() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.wait(100) == 0.0
    pace.begin()
    work(pace, clock, 1, 200, 50)
    assert pace.wait(100) == 0.0
    work(pace, clock, 9, 200, 50)
    assert pace.wait(100) > 0
    # After an idle hour the old rate counts no more.
    clock.now += 3600
    pace.begin()
    assert pace.wait(100) == 0.0
    work(pace, clock, 3, 200, 50)
    assert pace.wait(8) == pytest.approx(2.0, rel=0.05)
