"""The files of Ray's cluster launcher and the Slurm script: against Ray's own checks, and what each must have."""

from __future__ import annotations

import copy
import importlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raylm.launcher import spot
from tests.cluster_files.manifests import CLUSTER, ROOT

CLOUDS = ("aws", "gcp")
SLURM = CLUSTER / "slurm.sbatch"
COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Name, and the file as YAML."""
    return request.param, yaml.safe_load((CLUSTER / f"{request.param}.yaml").read_text(encoding="utf-8"))


def ray_options(command: str) -> set[str]:
    """Options of `ray start` in a command."""
    return set(re.findall(r"(--[a-z-]+)", command.partition("ray start")[2].partition(";")[0]))


def known_options() -> set[str]:
    """Options that the installed `ray start` takes."""
    start = importlib.import_module("ray.scripts.scripts").start
    return {option for parameter in start.params for option in parameter.opts}


def test_ray_takes_it(cloud: tuple[str, dict[str, Any]]) -> None:
    prepared = prepare_config(copy.deepcopy(cloud[1]))
    validate_config(prepared)
    # Ray's defaults have the dashboard on all addresses.
    assert "0.0.0.0" not in str([prepared[key] for key in COMMANDS])


def test_ray_refuses_a_mistake(cloud: tuple[str, dict[str, Any]]) -> None:
    wrong = prepare_config(cloud[1] | {"max_worker": 2})
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(wrong)


def test_every_command_parses_and_names_what_is_there(cloud: tuple[str, dict[str, Any]]) -> None:
    config = cloud[1]
    for key in COMMANDS:
        for command in config.get(key, []):
            # As Ray's command runner wraps it: a comment at the end would take the parenthesis.
            found = subprocess.run(["bash", "-n", "-c", f"true && ({command})"], capture_output=True, text=True)
            assert found.returncode == 0, (command, found.stderr)
            for path in re.findall(r"~/raylm/([\w/.]+\.(?:sh|py))", command):
                assert (ROOT / path).is_file(), path
            assert ray_options(command) <= known_options()


def test_nobody_gets_in_without_the_token(cloud: tuple[str, dict[str, Any]]) -> None:
    config = cloud[1]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    environment = (CLUSTER / "node.sh").read_text(encoding="utf-8")
    assert "RAY_AUTH_MODE=token" in environment and "$HOME/.ray/auth_token" in environment
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert command.startswith(". ~/raylm/cluster/node.sh; ")
    (head,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head


def test_the_head_takes_no_rank_and_workers_are_spot(cloud: tuple[str, dict[str, Any]]) -> None:
    name, config = cloud
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {key: kind for key, kind in types.items() if key != config["head_node_type"]}
    assert set(workers) == {"cpu", "gpu"}
    for kind in workers.values():
        assert kind["min_workers"] == 0 < kind["max_workers"]
        node = kind["node_config"]
        spot_market = {
            "aws": node.get("InstanceMarketOptions", {}).get("MarketType") == "spot",
            "gcp": node.get("scheduling", {}).get("provisioningModel") == "SPOT",
        }
        assert spot_market[name]
    assert sum(kind["max_workers"] for kind in workers.values()) <= config["max_workers"]


def test_workers_watch_for_the_notice_of_their_cloud(cloud: tuple[str, dict[str, Any]]) -> None:
    name, config = cloud
    (watch,) = [command for command in config["worker_start_ray_commands"] if "raylm.launcher.spot" in command]
    words = shlex.split(watch)
    assert words[words.index("raylm.launcher.spot") + 1] == name and name in spot.CLOUDS
    assert words[-1] == "&"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of one node, with programs that stand in for srun and for `ray symmetric-run`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    # Notes its arguments, and then does what `ray symmetric-run` does on the head: runs what follows "--".
    (tools / "ray").write_text(
        '#!/bin/bash\necho "$@" > ray-arguments; stat -c %a "$RAY_AUTH_TOKEN_PATH" > token-mode\n'
        'if [ -n "${NO_RAY:-}" ]; then exit 0; fi\nwhile [ "$1" != -- ]; do shift; done; shift\nexec "$@"\n'
    )
    (tools / "raylm").write_text(f'#!/bin/bash\nexec {sys.executable} -m raylm.cli "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "2", "RAY_ADDRESS": "another:6379", "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def test_a_slurm_job_ends_with_the_stages_status(slurm: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", str(SLURM), "pretrain", "no such file.yaml", "run.storage=/shared"]
    found = subprocess.run(command, cwd=tmp_path, env=slurm, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert "raylm: error: no such file.yaml" in found.stderr
    address = f"{this_address()}:24560"
    start = (tmp_path / "ray-arguments").read_text().partition(" -- ")[0].split()
    assert start[:3] == ["symmetric-run", "--address", address]
    options = {word.partition("=")[0] for word in start if word.startswith("--")} - {"--address", "--min-nodes"}
    assert options <= known_options()
    # symmetric-run sets these itself.
    assert not options & {"--head", "--port", "--block", "--node-ip-address"}
    ports = [int(word.partition("=")[2]) for word in start if "-port=" in word]
    assert len(set(ports)) == len(ports) and all(24560 < port < 24570 for port in ports)
    assert (tmp_path / "token-mode").read_text().strip() == "600"
    assert not (tmp_path / ".raylm-slurm" / "123456").exists()


def test_the_signal_of_slurm_reaches_the_stage_alone(slurm: dict[str, str], tmp_path: Path) -> None:
    """A process that lasts stands in for the stage; what a stage does about SIGTERM is for the stages' tests."""
    (tmp_path / "tools" / "raylm").write_text(
        "#!/bin/bash\ntrap 'echo $RAY_ADDRESS > told; exit 143' TERM\ntouch begun\nwhile true; do sleep 0.1; done\n"
    )
    with subprocess.Popen(["bash", str(SLURM), "pretrain", "file.yaml"], cwd=tmp_path, env=slurm) as job:
        while not (tmp_path / "begun").exists():
            assert job.poll() is None
            time.sleep(0.05)
        job.terminate()
        assert job.wait(30) == 143
    assert (tmp_path / "told").read_text().strip() == f"{this_address()}:24560"


def this_address() -> str:
    """As the script finds it."""
    return subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]


def test_a_slurm_job_whose_ray_did_not_start_fails(slurm: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", str(SLURM), "pretrain", "file.yaml"]
    environment = slurm | {"NO_RAY": "1"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert found.stderr.startswith("raylm: failed: the stage has not ended by itself")


def test_a_slurm_job_without_a_stage_is_refused(slurm: dict[str, str], tmp_path: Path) -> None:
    found = subprocess.run(["bash", str(SLURM)], cwd=tmp_path, env=slurm, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert found.stderr.startswith("raylm: error: found 0 arguments, allowed: STAGE FILE.yaml")
