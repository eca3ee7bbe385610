"""What a job takes along, and paths that would mean another place in it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import raylm
from raylm.cli import main
from raylm.config.loading import validate
from raylm.config.stages import STAGES
from raylm.errors import UserError
from raylm.launcher.connection import connect
from raylm.launcher.control import table
from raylm.launcher.jobs import Job, to_job
from raylm.launcher.package import check_paths, packaged, paths_in
from raylm.launcher.submit import ending


def test_a_package_runs_by_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {name: a}\n")
    with packaged(tmp_path / "mine.yaml") as directory:
        assert (directory / "config.yaml").read_text() == "run: {name: a}\n"
        assert sorted(path.name for path in directory.iterdir()) == ["config.yaml", "raylm"]
        assert not list(directory.rglob("__pycache__"))
        assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) < 5e6
        code = "import raylm, raylm.cli; print(raylm.__file__); raylm.cli.main(['--version'])"
        result = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [f"{directory}/raylm/__init__.py", f"raylm {raylm.__version__}"]
    assert not directory.exists()


TRAINED = {"run": {"name": "a", "storage": "/shared"}, "model": {"family": "gpt2"}, "training": {"steps": 1}}
HERE = "allowed in a job: an absolute path that all nodes share"


@pytest.mark.parametrize(
    ("stage", "sections", "message"),
    [
        ("pretrain", {"run": {"name": "a"}, "data": {"train": "/d"}}, "run.storage: found ./runs, allowed in a job"),
        ("pretrain", {"data": {"train": "d.txt"}}, f"data.train: found d.txt, {HERE}"),
        ("pretrain", {"data": {"train": ["/x", "d.txt"]}}, f"data.train: found d.txt, {HERE}"),
        ("pretrain", {"data": {"train": [{"path": "d.txt"}]}}, f"data.train.path: found d.txt, {HERE}"),
        ("pretrain", {"data": {"train": "/x", "validation": "d.txt"}}, f"data.validation: found d.txt, {HERE}"),
        ("finetune", {"data": {"train": "/x"}, "model": {"path": "m"}}, f"model.path: found m, {HERE}"),
        (
            "serve",
            {
                "run": {"name": "a", "storage": "/s"},
                "model": {"path": "/m"},
                "serving": {"models": {"b": {"path": "m"}}},
            },
            f"serving.models.b.path: found m, {HERE}",
        ),
        # What all nodes see, what is on the hub, and what comes with raylm.
        ("pretrain", {"data": {"train": "stdlib-docs"}}, None),
        ("finetune", {"data": {"train": "s3://bucket/x.jsonl"}, "model": {"path": "owner/name"}}, None),
    ],
)
def test_a_path_of_this_machine_is_refused(
    stage: str, sections: dict, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.txt").write_text("text")
    (tmp_path / "m").mkdir()
    values = sections if stage == "serve" else {**TRAINED, **sections}
    config = validate(STAGES[stage], values, "file.yaml")
    if message is None:
        assert len(dict(paths_in(config))) >= 2
        check_paths(config)
    else:
        with pytest.raises(UserError) as refusal:
            check_paths(config)
        assert str(refusal.value).startswith(message)


def test_what_cannot_be_submitted_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.yaml").write_text("run: {name: a}\ndata: {train: /x}\n")
    for arguments, message in (
        (["pretrian", f"{tmp_path}/p.yaml"], "STAGE: found pretrian, allowed: prepare, pretrain, "),
        (["prepare", f"{tmp_path}/p.yaml"], "run.storage: found ./runs, allowed in a job: an absolute path"),
        (["prepare", f"{tmp_path}/p.yaml", "data.trian=/y"], "data.trian: unknown key"),
    ):
        assert main(["submit", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


class NoRay(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), NoRay)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_what_is_no_dashboard_is_refused(
    other_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        for address, said in (
            (f"http://127.0.0.1:{port}", "Connection refused"),
            (other_server, "Version check returned 404"),
            ("ftp://a", "http://HOST:8265, the address"),
            ("http://a:99999999", "http://HOST:8265"),
        ):
            with pytest.raises(UserError, match=rf"^--address: found .*{address}.*, allowed: .*{said}"):
                connect(address)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
        for command in (["jobs"], ["status"], ["logs", "x"], ["stop", "x"]):
            assert main(command) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"raylm: error: RAY_API_SERVER_ADDRESS: found http://127.0.0.1:{port}, allowed")
            assert error.count("\n") == 1


def details(**values: object) -> SimpleNamespace:
    base = {
        "submission_id": "raysubmit_1", "metadata": {"raylm_run": "a", "raylm_stage": "pretrain"}, "status": "RUNNING",
        "driver_exit_code": None, "start_time": 1000, "end_time": None, "message": "",
    }  # fmt: skip
    return SimpleNamespace(**{**base, **values})


@pytest.mark.parametrize(
    ("values", "status", "words"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, "is done"),
        ({"status": "FAILED", "driver_exit_code": 2}, 2, "ended with status 2"),
        ({"status": "FAILED", "driver_exit_code": 1}, 1, "ended with status 1"),
        ({"status": "FAILED", "message": "no python\nhere"}, 1, "failed: no python"),
        # Ray's own command says 0.
        ({"status": "STOPPED"}, 143, "was stopped; submit it again to go on"),
    ],
)
def test_the_status_of_a_job_is_that_of_its_stage(values: dict, status: int, words: str) -> None:
    job = to_job(details(**values))
    assert isinstance(job, Job)
    assert job.over
    assert (job.exit_status, ending(job)) == (status, words)
    assert job.started == 1.0


def test_jobs_of_others_are_left_out() -> None:
    assert to_job(details(metadata={})) is None
    assert to_job(details(metadata=None, submission_id=None)) is None
    job = to_job(details())
    assert job is not None
    assert not job.over


def test_columns_are_as_wide_as_their_cells() -> None:
    assert table([("a", "b"), ("long", "x")]) == "a     b\nlong  x"
