"""What the quickstart shows: estimates, results in a few words, the table and the plain lines."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from raylm.quickstart.display import PlainDisplay, TableDisplay
from raylm.quickstart.running import Progress
from raylm.quickstart.screen import last_screen
from raylm.quickstart.stages import STAGES, about, clock, duration, seconds_left

REPORTS = {
    "prepare": {
        "bytes": {"train": 2_238_542, "validation": 130_399},
        "tokens": {"train": 758_326, "validation": 44_907},
    },
    "pretrain": {"validation_loss": 3.3456, "bits_per_byte": 1.6612},
    "finetune": {"validation_loss": 1.25},
    "tune": {"best": {"validation_loss": 1.125}, "trials": [{}, {}, {}, {}]},
    "evaluate": {"bits_per_byte": 1.6598},
    "compress": {
        "before": {"weight_bytes": 4_465_112, "tokens_per_second": {"1": 500.0}},
        "after": {"weight_bytes": 1_142_013, "tokens_per_second": {"1": 1500.0}},
    },
}  # fmt: skip


def test_results_come_from_reports() -> None:
    results = {stage.name: stage.result(REPORTS[stage.name]) for stage in STAGES if stage.name in REPORTS}
    assert results == {
        "prepare": "2.37 MB, 803,233 tokens",
        "pretrain": "1.66 bits per byte",
        "finetune": "loss 1.25 on answers",
        "tune": "loss 1.12, best of 4",
        "evaluate": "1.66 bits per byte",
        "compress": "4.5 to 1.1 MB, 3.0x speed",
    }


def test_time_left_follows_the_machine() -> None:
    usual = sum(stage.seconds for stage in STAGES)
    assert seconds_left(STAGES, {}) == pytest.approx(usual)
    slow = seconds_left(STAGES[2:], {"prepare": 3 * STAGES[0].seconds, "pretrain": 3 * STAGES[1].seconds})
    rest = sum(stage.seconds for stage in STAGES[2:])
    assert 2.5 * rest < slow < 3 * rest
    # A stage that was done already says nothing about the pace.
    assert seconds_left(STAGES[1:], {}) == pytest.approx(usual - STAGES[0].seconds)
    own = seconds_left(STAGES[1:], {}, running=500, own=30)
    assert own == pytest.approx(38 + sum(stage.seconds for stage in STAGES[2:]))
    assert seconds_left(STAGES[-1:], {}, running=1000) > 0
    assert seconds_left([], {}) == 0


@pytest.mark.parametrize(("seconds", "text"), [(44.6, "45 s"), (60, "1 min 0 s"), (370, "6 min 10 s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    minutes, _, rest = clock(seconds).partition(":")
    assert 60 * int(minutes) + int(rest) == round(seconds) and len(rest) == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "about 10 s"), (86, "about 90 s"), (130, "about 2 min"), (395, "about 7 min")]
)
def test_estimates_are_rounded_as_they_deserve(seconds: float, text: str) -> None:
    assert about(seconds) == text


def test_the_table_fits_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    with TableDisplay(STAGES, console) as display:
        for stage in STAGES[:-1]:
            display.begin(stage, "")
            if stage.name == "pretrain":
                display.poll(Progress("pretrain", 120, 500, "steps", 95.0), "pretrain: 120/500 steps " + "x" * 200)
                running = _shown(display, 80)
            display.finish(stage.result(REPORTS[stage.name]))
        display.begin(STAGES[-1], "")
        display.finish("http://127.0.0.1:8000/")
        done = _shown(display, 80)
    assert "min left" in running[0]
    assert any("1:35 left" in line and "120 of 500 steps" in line for line in running)
    assert any(line.startswith("pretrain: 120/500 steps xxx") for line in running)
    assert max(map(len, running + done)) <= 80
    assert len(done) == len(STAGES) + 3  # title, header, caption: no result is wrapped
    assert sum("done" in line for line in done) == len(STAGES)
    text = "\n".join(done)
    assert "1.66 bits per byte" in text and "http://127.0.0.1:8000/" in text and " left" not in text


def _shown(display: TableDisplay, width: int) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width, color_system=None).print(display.table())
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_a_stage_that_fails_is_marked() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with TableDisplay(STAGES, console) as display:
        display.begin(STAGES[0], "")
    assert any("prepare" in line and "stopped" in line for line in _shown(display, 100))


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainDisplay(STAGES) as display:
        display.begin(STAGES[0], "raylm prepare prepare.yaml")
        display.finish("2.37 MB, 803,233 tokens")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "== 1/7 prepare, docs to tokens: raylm prepare prepare.yaml"
    assert lines[2] == "   prepare took 0 s: 2.37 MB, 803,233 tokens"


@pytest.mark.parametrize("serving", [True, False])
def test_the_last_screen(serving: bool) -> None:
    results = {"pretrain": "1.66 bits per byte", "serve": "http://127.0.0.1:8001/"}
    text = last_screen(results, "http://127.0.0.1:8001", 370, 4_100_000_000, Path("/home/me"), serving=serving)
    assert "Done in 6 min 10 s, with at most 4.1 GB of memory." in text
    assert "1.66 bits per byte" in text and "/home/me/runs/quickstart" in text
    assert "pen http://127.0.0.1:8001/ in a browser" in text
    assert max(map(len, text.splitlines())) <= 80
    assert ("raylm quickstart --serve" in text) is not serving
    assert [line.strip()[:2] for line in text.splitlines() if line.strip()[:2] in ("1.", "2.", "3.")] == [
        "1.",
        "2.",
        "3.",
    ]
