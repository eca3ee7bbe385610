"""Who may use a run directory, and what a command that is refused leaves: nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raylm.config.loading import validate
from raylm.config.run_directory import RunDirectory, is_held
from raylm.config.stages import STAGES
from raylm.errors import RunFailure, UserError

VALUES = {
    "pretrain": {"data": {"train": "t.txt"}, "model": {"family": "llama"}, "training": {"steps": 4}},
    "finetune": {"data": {"train": "t.txt"}, "model": {"path": "m"}, "training": {"steps": 4}},
    "tune": {
        "data": {"train": "t.txt"}, "model": {"path": "m"}, "training": {"steps": 4, "evaluate_every_steps": 2},
        "tuning": {"space": {"training.learning_rate": {"grid": [0.1]}}},
    },
    "evaluate": {"data": {"train": "t.txt"}, "model": {"path": "m"}},
    "compress": {"data": {"train": "t.txt"}, "model": {"path": "m"}},
    "serve": {"model": {"path": "m"}},
}  # fmt: skip
HOLDER = """
import sys
from raylm.config.loading import load_config
from raylm.config.run_directory import RunDirectory
run = RunDirectory(sys.argv[1], load_config(sys.argv[1], sys.argv[2]))
with run.held():
    run.create()
    print("held", flush=True)
    sys.stdin.read()
"""


def write_config(directory: Path, stage: str) -> Path:
    path = directory / f"{stage}.yaml"
    path.write_text(yaml.safe_dump({"run": {"name": "one", "storage": str(directory / "runs")}, **VALUES[stage]}))
    return path


def make(path: Path, stage: str, **run: str) -> RunDirectory:
    values = yaml.safe_load(path.read_text())
    values["run"] |= run
    return RunDirectory(stage, validate(STAGES[stage], values, "test"))


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and when it was written."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The configuration of a run that another process holds."""
    path = write_config(tmp_path, request.param)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, request.param, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield path
    process.communicate(timeout=30)


@pytest.mark.parametrize(("holder", "stage"), [(stage, stage) for stage in VALUES], indirect=["holder"])
def test_a_second_command_touches_nothing(holder: Path, stage: str) -> None:
    """Of every stage, called as the command line calls it: at once, before Ray, torch's work or a download."""
    import importlib

    from raylm.cli import STAGE_FUNCTIONS
    from raylm.config import load_config

    before = content(holder.parent)
    module, name = STAGE_FUNCTIONS[stage]
    # Another value of a key that may change between two starts.
    changed = ["checkpoint.keep=9"] if stage in ("pretrain", "finetune", "tune") else []
    with pytest.raises(UserError, match=r"run\.name: .*one is in use by another command that is still running"):
        getattr(importlib.import_module(module), name)(load_config(stage, holder, changed))
    assert content(holder.parent) == before


@pytest.mark.parametrize("holder", ["pretrain"], indirect=True)
def test_a_command_that_begins_between_look_and_start_is_refused(holder: Path) -> None:
    before = content(holder.parent)
    run = make(holder, "pretrain")
    with pytest.raises(UserError, match="in use by another command"), run.held():
        raise AssertionError("it was not held")
    assert content(holder.parent) == before
    assert is_held(run.path)


def test_a_run_that_another_command_has_begun_meanwhile_is_refused(tmp_path: Path) -> None:
    first, second = (make(write_config(tmp_path, "pretrain"), "pretrain") for _ in range(2))
    second._config = second._config.model_copy(
        update={"training": second._config.training.model_copy(update={"learning_rate": 0.5})}
    )
    second.check()
    with first.held():
        first.create()
    with pytest.raises(UserError, match=r"training\.learning_rate \(was 0\.001, now 0\.5\)"), second.held():
        second.create()
    assert first.saved()["training"]["learning_rate"] == 0.001


def test_a_start_that_fails_leaves_no_directory(tmp_path: Path) -> None:
    run = make(write_config(tmp_path, "pretrain"), "pretrain", storage=str(tmp_path / "a" / "b"))
    with pytest.raises(RuntimeError), run.held():
        assert run.path.is_dir()
        raise RuntimeError
    assert not (tmp_path / "a").exists()
    with run.held(), run.held():
        run.create()
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "config.yaml"]
    assert not is_held(run.path)


def test_an_end_before_the_configuration_was_written_is_no_other_run(tmp_path: Path) -> None:
    run = make(write_config(tmp_path, "pretrain"), "pretrain")
    run.path.mkdir(parents=True)
    (run.path / ".lock").touch()
    run.check()
    with run.held():
        run.create()
    assert run.saved()["stage"] == "pretrain"


@pytest.mark.parametrize("damage", ["a: [", "- 1\n", "", "\x00\x01", "5"])
def test_a_damaged_configuration_is_one_line(tmp_path: Path, damage: str) -> None:
    run = make(write_config(tmp_path, "pretrain"), "pretrain")
    with run.held():
        run.create()
    (run.path / "config.yaml").write_text(damage)
    with pytest.raises(UserError, match=r"config\.yaml is damaged, or not of .*: .*; restore the file"):
        run.check()
    (run.path / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"config\.yaml is damaged, or not of .*(utf-8|UTF-8)"):
        run.check()


@pytest.mark.parametrize("damage", ["{", "[1]", "5", "null", "", "[" * 100_000, "\xff"])
def test_a_damaged_report_does_not_count(tmp_path: Path, damage: str) -> None:
    run = make(write_config(tmp_path, "pretrain"), "pretrain")
    run.create()
    (run.path / "report.json").write_bytes(damage.encode("latin-1"))
    assert run.report() is None
    run.write_report({"step": 4})
    assert run.report() == {"step": 4}


def begin(tmp_path: Path) -> RunDirectory:
    """A run of ``pretrain`` in a storage that is missing yet."""
    return make(write_config(tmp_path, "pretrain"), "pretrain", storage=str(tmp_path / "new" / "runs"))


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_wrong_input_takes_back_the_run_and_what_was_made_for_it(tmp_path: Path) -> None:
    run = begin(tmp_path)
    with pytest.raises(UserError, match="row 7"), run.held():
        run.create()
        (run.path / "data").mkdir()
        (run.path / "data" / "shard").touch()
        raise UserError("row 7 is wrong")
    assert names(tmp_path) == ["pretrain.yaml"]


def test_what_other_runs_have_finished_stays(tmp_path: Path) -> None:
    """The storage was missing when the run began; another run has finished in it since."""
    run = begin(tmp_path)
    with pytest.raises(UserError), run.held():
        run.create()
        (run.path.parent / "other").mkdir()
        (run.path.parent / "other" / "report.json").write_text("{}")
        raise UserError("row 7 is wrong")
    assert names(tmp_path / "new") == ["runs", "runs/other", "runs/other/report.json"]


def test_an_empty_directory_stays_as_it_was(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.path.mkdir(parents=True)
    with pytest.raises(UserError), run.held():
        run.create()
        raise UserError("wrong")
    assert names(tmp_path / "new" / "runs") == ["one"]


def test_a_failure_keeps_what_the_stage_resumes(tmp_path: Path) -> None:
    run = begin(tmp_path)
    with pytest.raises(RunFailure), run.held():
        run.create()
        (run.path / "work").mkdir()
        raise RunFailure("a node died")
    # A resumed run is not this command's alone.
    resumed = begin(tmp_path)
    with pytest.raises(UserError), resumed.held():
        resumed.create()
        raise UserError("wrong")
    assert names(run.path) == [".lock", "config.yaml", "work"]


@pytest.mark.parametrize("failure", [RunFailure, KeyboardInterrupt, OSError])
def test_a_failure_leaves_nothing_of_a_stage_that_begins_anew(tmp_path: Path, failure: type[BaseException]) -> None:
    run = begin(tmp_path)
    with pytest.raises(failure), run.held(resumes=False):
        run.create()
        raise failure("no memory")
    assert names(tmp_path) == ["pretrain.yaml"]


@pytest.mark.parametrize("resumes", [True, False])
def test_what_is_to_be_kept_is(tmp_path: Path, resumes: bool) -> None:
    run = begin(tmp_path)
    with pytest.raises(UserError), run.held(resumes=resumes):
        run.create()
        (run.path / "checkpoints").mkdir()
        run.keep()
        raise UserError("wrong")
    assert names(run.path) == [".lock", "checkpoints", "config.yaml"]
