"""Every YAML of the repository is parsed by its stage, and a job script runs under a real ``ray job submit``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raylm.config import STAGES, load_config
from raylm.training.reports.metrics import read_metrics

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_prepare_and_pretrain_as_jobs(tmp_path: Path) -> None:
    port, dashboard, agent = free_port(), free_port(), free_port()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    # As a user's own cluster has them: raylm leaves its token alone.
    token = tmp_path / "token"
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
        address = f"http://127.0.0.1:{dashboard}"
        wait_for_port(dashboard, head)
        (tmp_path / "text.txt").write_text("\n".join(f"line {i} of the text" for i in range(300)))
        recipes = "jobs/recipes/quickstart"
        overrides = [f"run.storage={tmp_path}"]
        submit(address, environment, "prepare", f"{recipes}/prepare.yaml", *overrides, "data.text_unit=line",
               f"data.train={tmp_path}/text.txt", "tokenizer={type: byte}")  # fmt: skip
        assert (tmp_path / "data" / "manifest.json").is_file()
        pretrain = [f"{recipes}/pretrain.yaml", *overrides, f"data.train={tmp_path}/data", "training.steps=3",
                    "training.warmup_steps=0", "training.sequence_length=32", "training.evaluate_every_steps=3",
                    "training.optimizer=adamw", "training.precision=fp32"]  # fmt: skip
        submit(address, environment, "pretrain", *pretrain)
        assert (tmp_path / "pretrain" / "model" / "model.safetensors").is_file()
        submit(address, environment, "pretrain", *pretrain, "run.name=cut", "parallel.tensor=2", "parallel.pipeline=2",
               "resources.workers=4", "resources.cpus_per_worker=0.25")  # fmt: skip
        whole, cut = (read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("pretrain", "cut"))
        assert cut["validation_loss"] == pytest.approx(whole["validation_loss"], abs=1e-5)
        assert (tmp_path / "cut" / "model" / "model.safetensors").is_file()
    finally:
        head.terminate()
        head.wait(60)


def wait_for_port(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start ended"
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError("the dashboard did not come up")


def submit(address: str, environment: dict[str, str], stage: str, *arguments: str) -> None:
    """Run ``jobs/STAGE.py`` to its end; ``ray job submit`` exits with the job's own success or failure."""
    working_directory = str(ROOT)
    excludes = '{"excludes": [".venv", ".git", "runs"]}'
    deadline = time.monotonic() + 60
    while True:
        result = subprocess.run(
            ["ray", "job", "submit", f"--address={address}", f"--working-dir={working_directory}",
             f"--runtime-env-json={excludes}", "--", sys.executable, f"jobs/{stage}.py", *arguments],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        # The dashboard listens a little before its job manager answers.
        if result.returncode == 0 or "job_" in result.stdout or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
