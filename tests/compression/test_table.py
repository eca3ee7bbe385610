"""The table of a compression: units, directions, ratios, and only what says something about the task."""

from __future__ import annotations

from typing import Any

import pytest

from raylm.compression.table import Row, notes, rows, table


def side(engine: str, factor: float, **quality: float) -> dict[str, Any]:
    sizes = {"weight_bytes": 4e6 * factor, "resident_bytes": 2e8, "peak_bytes": 3e8}
    return {"engine": engine, **sizes, **quality}


def test_a_classifier_has_no_cosine() -> None:
    speeds = ({"latency_milliseconds": {"1": 4.0}}, {"latency_milliseconds": {"1": 2.0}})
    report = {
        "task": "classification",
        "sequence_length": 32,
        "labels_agreement": 0.995,
        # As older reports have it: of two labels each text's cosine is 1 or -1.
        "outputs_cosine": 0.99,
        "outputs_cosine_least": -1.0,
        "before": side("fp32", 1.0, accuracy=91.2, macro_f1=90.0) | speeds[0],
        "after": side("int8", 0.25, accuracy=91.2, macro_f1=90.5) | speeds[1],
    }
    text = table(report)
    assert "osine" not in text and "-1" not in text
    assert "The export gives 99.5% of the texts the same label as the original." in text
    chain = table(report | {"steps": [side("fp32", 0.5), side("int8", 0.25)]})
    assert "the same label as the model before the last step." in chain
    lines = {line.split("  ")[1]: line for line in text.splitlines()[1:] if line.startswith("  ")}
    assert lines["weights on disk, MB"].split()[-4:] == ["1.00", "4x", "smaller", "smaller"]
    assert lines["time for 1 x 32 tokens, ms"].split()[-3:] == ["2x", "smaller", "smaller"]
    assert lines["accuracy, %"].split()[-3:] == ["the", "same", "larger"]
    del report["labels_agreement"]
    assert notes(report) == []


def test_a_generator_is_told_by_loss_speed_and_greedy_output() -> None:
    report = {
        "before": side("fp32", 1.0, bits_per_byte=1.0) | {"tokens_per_second": {"1": 100.0, "8": 300.0}},
        "after": side("int8", 0.26, bits_per_byte=1.002) | {"tokens_per_second": {"1": 250.0, "8": 280.0}},
        "greedy_agreement": {"identical_outputs": 0.5, "tokens_before_first_difference": 0.8},
    }
    found = {row.name: row for row in rows(report)}
    assert found["speed, 1 request, tokens/s"].change == "2.5x larger"
    assert found["speed, 8 requests at once, tokens/s"].change == "-6.7%"
    assert found["loss, bits per byte"].change == "+0.2%"
    assert "50% of the prompts" in notes(report)[0]


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(100.0, 100.05, "the same"), (100.0, 40.0, "2.5x smaller"), (0.0, 0.5, "+0.50")]
)
def test_change(before: float, after: float, expected: str) -> None:
    assert Row("F1, %", "larger", before, after, 2).change == expected
