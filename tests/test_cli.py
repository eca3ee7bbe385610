"""The command line as a user types it: version, help, recipes, and what it imports for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import raylm
from raylm.cli import main
from raylm.config import load_config
from raylm.errors import UserError
from raylm.recipes import all_recipes, find_recipe

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "raylm.cli", *arguments],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_version(tmp_path: Path) -> None:
    result = run("--version", directory=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"raylm {raylm.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipes"], ["recipes", "quickstart/tune"]])
def test_light_commands_import_neither_torch_nor_ray(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from raylm.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'ray', 'transformers'} & set(sys.modules); sys.exit(f'imports {heavy}' if heavy else status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_recipes_lists_every_file_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted((ROOT / "jobs" / "recipes").rglob("*.yaml"))
    names = [path.relative_to(ROOT / "jobs" / "recipes").with_suffix("").as_posix() for path in files]
    assert [line.split()[0] for line in lines[: len(files)]] == names
    for recipe in all_recipes():
        assert len(recipe.purpose) > 10, recipe.name
        assert load_config(recipe.stage, recipe.path).run.name


def test_a_printed_recipe_is_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "quickstart/pretrain"]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "jobs" / "recipes" / "quickstart" / "pretrain.yaml").read_text()
    assert yaml.safe_load(printed)["run"]["name"] == "pretrain"


@pytest.mark.parametrize("name", ["shakespeare/plain", "plain", "plain.yaml", "jobs/recipes/shakespeare/plain.yaml"])
def test_a_recipe_is_found_by_what_people_type(name: str) -> None:
    assert find_recipe(name).name == "shakespeare/plain"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain"], "raylm: error: Missing argument 'CONFIG'; see raylm pretrain --help\n"),
        (
            ["generate", "m", "p", "--max-new-token", "3"],
            "raylm: error: No such option '--max-new-token'. Did you mean '--max-new-tokens'?",
        ),
        (["pretrian", "x.yaml"], "raylm: error: No such command 'pretrian'"),
        (["doctor", "more"], "raylm: error: Got unexpected extra argument (more); see raylm doctor --help\n"),
        (["quickstart", "--directory"], "raylm: error: Option '--directory' requires an argument; see raylm --help\n"),
    ],
)
def test_a_mistyped_command_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(message)
    assert shown.err.count("\n") == 1


def test_unknown_recipe_is_one_line_with_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "quickstart/pretrian"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "did you mean quickstart/pretrain?" in error
    with pytest.raises(UserError, match=r"found 'zzz', `raylm recipes` lists them"):
        find_recipe("zzz")
