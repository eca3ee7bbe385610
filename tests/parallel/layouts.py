"""Cases for ``layout_process.py`` and a way to run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "layout_process.py"
# name -> (data, tensor, pipeline)
LAYOUTS = {
    "one": (1, 1, 1),
    "dp2": (2, 1, 1),
    "tp2": (1, 2, 1),
    "pp2": (1, 1, 2),
    "dp4": (4, 1, 1),
    "dp2 x tp2": (2, 2, 1),
    "dp2 x pp2": (2, 1, 2),
    "pp2 x tp2": (1, 2, 2),
    "2 x 2 x 2": (2, 2, 2),
}


def case(family: str, layout: str, zero: int, optimizer: str, **rest: Any) -> dict[str, Any]:
    """One case of ``layout_process.py``."""
    data, tensor, pipeline = LAYOUTS[layout]
    sizes = {"data": data, "tensor": tensor, "pipeline": pipeline}
    return {"family": family, **sizes, "zero": zero, "optimizer": optimizer, **rest}


def run_cases(cases: list[dict[str, Any]], directory: Path, timeout: float = 550) -> list[dict[str, Any]]:
    """What each of ``cases`` gave; those of as many processes that follow each other share a start."""
    given, found = directory / "cases.json", directory / "results.json"
    given.write_text(json.dumps(cases))
    command = [sys.executable, str(SCRIPT), str(found), str(given)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(found.read_text())


def largest_difference(one: list[float], other: list[float]) -> float:
    """Of two equally long lists."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
