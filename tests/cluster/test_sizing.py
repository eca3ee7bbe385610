"""cluster/SIZING.md: its commands parse, and its tables are what the script prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.readme_commands import ROOT
from tests.readmes import commands, mistakes

PAGE = (ROOT / "cluster" / "SIZING.md").read_text(encoding="utf-8")


def printed(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, str(ROOT / "cluster" / "sizing.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


def test_what_the_page_names_exists() -> None:
    assert len(commands(PAGE)) >= 5
    assert mistakes(PAGE, ROOT / "cluster") == []


@pytest.mark.parametrize(
    ("model", "gpus", "fits"),
    [("124M", "64", True), pytest.param("7B", "64", True, marks=pytest.mark.slow), ("70B", "8", False)],
)
def test_a_row_of_the_page_is_made_again(model: str, gpus: str, fits: bool) -> None:
    status, out, _ = printed("--price", "55", "--model", model, "--gpus", gpus)
    *head, row = out.splitlines()
    assert status == 0
    assert f"| {model} | {gpus} |" in row
    assert ("does not fit" not in row) == fits
    assert f"{head[0]}\n{head[1]}\n" in PAGE
    assert row in PAGE.splitlines()


def test_bad_input_is_refused() -> None:
    status, _, error = printed("--price", "55", "--model", "124M", "--gpus", "8", "--kind", "V100")
    assert status == 2
    assert "allowed: a GPU with figures for bf16" in error
