"""The last lines of prepare about what was left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raylm.data.prepare.summary import describe, warning


def report(**values: Any) -> dict[str, Any]:
    return {
        "kind": "pairs",
        "documents": {"train": 700, "validation": 40},
        "tokens": {"train": 7000, "validation": 400},
        "bytes": {"train": 70_000, "validation": 4000},
        "bytes_per_token": 10.0,
        "vocab_size": 300,
        "unknown_tokens": 0,
        "compressed": {},
        "sources": [{"source": "a.json", "documents": 900, "bytes": 74_000, "empty": 5, "sha256": "ab" * 32}],
        "documents_read": 995,
        "cleaning": {"dropped": {}},
        "errors": {"policy": "strict", "counts": {}},
        "seconds": {"total": 1.0},
        **values,
    }


def test_what_was_left_out_is_on_the_last_line() -> None:
    found = report(
        cleaning={
            "dropped": {
                "repetition": {"repeated 5-grams": 40, "repeated 6-grams": 3, "lines": 2, "repeated lines": 1},
                "length": {"fewer than 20 characters": 4},
            }
        },
        duplicates={"dropped": 200, "same": 20, "near": 180},
        errors={"policy": "skip", "counts": {"malformed": 5}},
    )
    assert describe(Path("/runs/one"), found).splitlines()[-1] == (
        "  left out    260 of 1,000 pairs: 180 near duplicates; 46 by repetition (repeated 5-grams 40, repeated "
        "6-grams 3, lines 2, 1 more); 20 the same text; 5 empty; 5 malformed (data.errors: skip); 4 by length (fewer "
        "than 20 characters 4)"
    )
    assert warning(found) == (
        "warning: more than a quarter of the pairs were left out (260 of 1,000); report.html shows some of them with "
        "the reasons"
    )


def test_no_warning_on_a_few_and_no_line_on_none() -> None:
    few = report(duplicates={"dropped": 100, "same": 100, "near": 0})
    assert warning(few) is None and "105 of 995 pairs" in describe(Path("/runs/one"), few)
    none = report(sources=[], documents_read=740, errors={"policy": "replace", "counts": {"undecodable": 700}})
    assert warning(none) is None and "left out" not in describe(Path("/runs/one"), none)
