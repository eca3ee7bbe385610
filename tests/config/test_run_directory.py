"""Who holds a run directory, and what is left of a run that failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raylm.config.run_directory import RunDirectory
from raylm.config.stages import PrepareConfig
from raylm.errors import RunFailure, UserError

HOLD = """
import sys
from pathlib import Path
from raylm.config.run_directory import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def run_in(storage: Path, **values: float) -> RunDirectory:
    data = {"train": "a.txt", **values}
    return RunDirectory("prepare", PrepareConfig(run={"name": "one", "storage": str(storage)}, data=data))


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_wrong_input_takes_back_the_run_and_the_directories_made_for_it(tmp_path: Path) -> None:
    run = run_in(tmp_path / "new" / "runs")
    with pytest.raises(UserError, match="row 7"), run.begin():
        (run.path / "data").mkdir()
        (run.path / "data" / "shard").touch()
        raise UserError("row 7 is wrong")
    assert names(tmp_path) == []


def test_what_other_runs_have_finished_stays(tmp_path: Path) -> None:
    """The storage was missing when the run began; another run has finished in it since."""
    storage = tmp_path / "new" / "runs"
    run = run_in(storage)
    with pytest.raises(UserError), run.begin():
        (storage / "other").mkdir()
        (storage / "other" / "report.json").write_text("{}")
        raise UserError("row 7 is wrong")
    assert names(storage) == ["other", "other/report.json"]


def test_an_empty_directory_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    with pytest.raises(UserError), run_in(tmp_path / "runs").begin():
        raise UserError("wrong")
    assert names(tmp_path / "runs") == ["one"]


def test_the_corrected_file_begins_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError), run_in(tmp_path / "runs").begin():
        raise UserError("data.validation_fraction: leaves none for validation")
    corrected = run_in(tmp_path / "runs", validation_fraction=0.5)
    corrected.check()
    with corrected.begin():
        pass
    assert corrected.saved()["data"]["validation_fraction"] == 0.5


def test_a_failure_keeps_what_the_stage_resumes(tmp_path: Path) -> None:
    run = run_in(tmp_path / "runs")
    with pytest.raises(RunFailure), run.begin():
        (run.path / "work").mkdir()
        raise RunFailure("a node died")
    assert "work" in names(run.path)
    # A resumed run is not this command's alone.
    with pytest.raises(UserError), run.begin():
        raise UserError("wrong")
    assert {"config.yaml", "work"} <= set(names(run.path))


@pytest.mark.parametrize("failure", [RunFailure, KeyboardInterrupt, OSError])
def test_a_failure_leaves_nothing_of_a_stage_that_begins_anew(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), run_in(tmp_path / "runs").begin(resumes=False):
        raise failure("no memory")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("resumes", [True, False])
def test_what_is_to_be_kept_is(tmp_path: Path, resumes: bool) -> None:
    run = run_in(tmp_path / "runs")
    with pytest.raises(UserError), run.begin(resumes=resumes):
        (run.path / "checkpoints").mkdir()
        run.keep()
        raise UserError("wrong")
    assert {"checkpoints", "config.yaml"} <= set(names(run.path))


def test_a_second_command_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = run_in(tmp_path / "runs")
    with run.begin():
        pass
    before = (run.path / "config.yaml").stat()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by another command that is still running"), run.begin():
            pass
        assert (run.path / "config.yaml").stat() == before
        holder.stdin.close()
        assert holder.wait(10) == 0
    # A command that has ended, however, lets go.
    with run.begin():
        pass


def test_a_run_that_another_command_begins_meanwhile_is_refused_and_stays(tmp_path: Path) -> None:
    late = run_in(tmp_path / "runs", validation_fraction=0.5)
    late.check()
    with run_in(tmp_path / "runs").begin():
        pass
    with pytest.raises(UserError, match=r"data\.validation_fraction \(was 0\.05, now 0\.5\)"), late.begin():
        pass
    assert run_in(tmp_path / "runs").saved()["data"]["validation_fraction"] == 0.05


def test_a_lock_without_a_run_does_not_take_the_name(tmp_path: Path) -> None:
    """What a command leaves that was killed between the two."""
    run = run_in(tmp_path / "runs")
    run.path.mkdir(parents=True)
    (run.path / ".lock").touch()
    run.check()
    (run.path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds files but no config"):
        run.check()
