"""Every YAML of the repository is parsed by its stage, and every stage has a script for ``ray job submit``."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylm.config import STAGES, load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "jobs" / "recipes").rglob("*.yaml"))


def stage_of(path: Path) -> str:
    """A recipe is named after its stage, or starts with a line ``# stage: NAME``."""
    first = path.read_text().splitlines()[0]
    return first.removeprefix("# stage: ").strip() if first.startswith("# stage: ") else path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_is_valid(path: Path) -> None:
    assert load_config(stage_of(path), path).run.name


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_job_and_a_schema(stage: str) -> None:
    assert (ROOT / "jobs" / f"{stage}.py").is_file()
    assert STAGES[stage].model_json_schema()["additionalProperties"] is False
