"""Stages as jobs of a real cluster of one node, which wants a token: ``raylm submit`` and plain ``ray job submit``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raylm.training.reports.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = "jobs/recipes/quickstart"
PATIENCE_SECONDS = 180.0


@dataclass(frozen=True)
class Cluster:
    """Its dashboard's address, the variables of who may use it, and a folder of its nodes."""

    address: str
    environment: dict[str, str]
    storage: Path

    def raylm(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command with the cluster's address and token."""
        return subprocess.run(
            [sys.executable, "-m", "raylm.cli", *arguments, "--address", self.address], cwd=ROOT,
            env={**self.environment, **environment}, capture_output=True, text=True, timeout=400,
        )  # fmt: skip

    def pretrain(self, name: str, *overrides: str) -> list[str]:
        """Arguments of a short pretraining run of the prepared set ``data``."""
        return [
            f"{RECIPES}/pretrain.yaml", f"run.storage={self.storage}", f"data.train={self.storage}/data",
            f"run.name={name}", "training.warmup_steps=0", "training.sequence_length=32", "training.optimizer=adamw",
            "training.precision=fp32", *overrides,
        ]  # fmt: skip

    def submit_by_ray(self, stage: str, *arguments: str) -> None:
        """Run ``jobs/STAGE.py`` to its end; ``ray job submit`` exits with the job's own success or failure."""
        excludes = '{"excludes": [".venv", ".git", "runs"]}'
        result = subprocess.run(
            ["ray", "job", "submit", f"--address={self.address}", f"--working-dir={ROOT}",
             f"--runtime-env-json={excludes}", "--", sys.executable, f"jobs/{stage}.py", *arguments],
            env=self.environment, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    storage = tmp_path_factory.mktemp("shared")
    port, dashboard, agent = free_port(), free_port(), free_port()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    # As a user's own cluster has them: raylm leaves its token alone.
    token = storage / "token"
    token.write_text("the-token-of-this-cluster-0001")
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # The agent takes the jobs; its default port is held where the session's own Ray runs.
    head = subprocess.Popen(
        ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
         "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        found = Cluster(f"http://127.0.0.1:{dashboard}", environment, storage)
        deadline = time.monotonic() + 120
        # The dashboard listens a little before its job manager answers.
        while found.raylm("jobs").returncode != 0:
            assert head.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "the dashboard did not come up"
            time.sleep(0.5)
        yield found
    finally:
        head.terminate()
        head.wait(60)


@pytest.fixture(scope="module")
def prepared(cluster: Cluster) -> Path:
    """A set that was prepared by a job."""
    text = cluster.storage / "text.txt"
    text.write_text("\n".join(f"line {i} of the text" for i in range(300)))
    result = cluster.raylm(
        "submit", "prepare", f"{RECIPES}/prepare.yaml", f"run.storage={cluster.storage}", "data.text_unit=line",
        f"data.train={text}", "tokenizer={type: byte}",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "prepare: " in result.stdout
    assert result.stderr.splitlines()[-1] == "submit: data is done"
    return cluster.storage / "data"


@pytest.mark.slow
def test_stages_as_jobs(cluster: Cluster, prepared: Path) -> None:
    assert (prepared / "manifest.json").is_file()
    length = ["training.steps=3", "training.evaluate_every_steps=3"]
    cluster.submit_by_ray("pretrain", *cluster.pretrain("whole", *length))
    assert (cluster.storage / "whole" / "model" / "model.safetensors").is_file()
    cut = cluster.raylm(
        "submit", "pretrain", *cluster.pretrain("cut", *length), "parallel.tensor=2", "parallel.pipeline=2",
        "resources.workers=4", "resources.cpus_per_worker=0.25",
    )  # fmt: skip
    assert cut.returncode == 0, cut.stdout[-3000:] + cut.stderr[-2000:]
    one, other = (read_metrics(cluster.storage / name / "metrics.jsonl")[-1] for name in ("whole", "cut"))
    assert other["validation_loss"] == pytest.approx(one["validation_loss"], abs=1e-5)
    assert (cluster.storage / "cut" / "model" / "model.safetensors").is_file()

    jobs = cluster.raylm("jobs").stdout.splitlines()
    assert [line.split()[:3] for line in jobs[1:]] == [
        ["cut", "pretrain", "succeeded"],
        ["data", "prepare", "succeeded"],
    ]
    assert "validation loss" in cluster.raylm("logs", "cut").stdout
    status = cluster.raylm("status").stdout
    assert "(head)" in status
    assert "next       curves on one page" in status
    unknown = cluster.raylm("logs", "whole")
    assert (unknown.returncode, unknown.stderr) == (
        2, "raylm: error: RUN: found whole, allowed: a run that was submitted to this cluster: cut, data\n"
    )  # fmt: skip


@pytest.mark.slow
def test_a_stage_that_fails_gives_its_own_status(cluster: Cluster) -> None:
    result = cluster.raylm(
        "submit", "prepare", f"{RECIPES}/prepare.yaml", f"run.storage={cluster.storage}", "run.name=none",
        "data.train=/nowhere/text.txt", "--retries", "3",
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "raylm: error: data.train: /nowhere/text.txt does not exist" in result.stdout
    assert result.stderr.splitlines()[-1] == "submit: none ended with status 2"
    # Wrong input is as wrong again.
    assert result.stderr.count("is job") == 1
    strange = cluster.raylm("jobs", RAY_AUTH_TOKEN="another-token-0000000001")
    assert strange.returncode == 2
    (line,) = strange.stderr.splitlines()
    assert line.startswith(f"raylm: error: --address: found {cluster.address}, which refuses this client's token")


@pytest.mark.slow
def test_a_run_that_is_stopped_saves_and_goes_on(cluster: Cluster, prepared: Path) -> None:
    arguments = cluster.pretrain("long", "resources.workers=1", "training.log_every_steps=1")
    started = cluster.raylm("submit", "pretrain", *arguments, "training.steps=100000", "--detach")
    assert started.returncode == 0, started.stderr
    assert "raylm logs long --follow" in started.stdout
    metrics = cluster.storage / "long" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(read_metrics(metrics)) < 5:
        assert time.monotonic() < deadline, cluster.raylm("logs", "long").stdout[-2000:]
        time.sleep(0.5)
    again = cluster.raylm("submit", "pretrain", *arguments, "training.steps=100000")
    assert again.returncode == 2
    assert "run.name: found long, which is under way as job raysubmit_" in again.stderr
    stopped = cluster.raylm("stop", "long")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.startswith("stop: long stopped; it said: ")
    assert "saved; the same command goes on" in stopped.stdout
    saved = read_metrics(metrics)[-1]["step"]
    result = cluster.raylm("submit", "pretrain", *arguments, f"training.steps={saved + 3}")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, saved + 4))
