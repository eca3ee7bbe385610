"""A cluster of three hosts from ``cluster/local.yaml``: up, looked at with faults planted, worked on, broken, down."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from raylm.training.reports.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = "jobs/recipes/quickstart"
PATIENCE_SECONDS = 300.0
# They stand beside each other on this machine, whose memory they share.
SMALL = "ray start --num-cpus=2 --object-store-memory=100000000"


def load_hosts() -> Any:
    """The module beside this one."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("raylm_test_hosts", Path(__file__).with_name("hosts.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HOSTS = load_hosts()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(HOSTS.why_not()), reason=HOSTS.why_not() or "none")]


@dataclass
class Cluster:
    """Three hosts, the file of their cluster, and a client beside them with a home of its own."""

    hosts: Any
    file: Path
    home: Path
    shared: Path
    environment: dict[str, str] = field(default_factory=dict)

    def raylm(self, *arguments: str, token: bool = True, seconds: float = PATIENCE_SECONDS) -> Any:
        """Run the command as the client."""
        environment = {**self.environment, **({"RAY_AUTH_MODE": "token"} if token else {})}
        return subprocess.run(
            [sys.executable, "-m", "raylm.cli", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=seconds,
        )  # fmt: skip

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command as the client."""
        return subprocess.Popen(
            [sys.executable, "-m", "raylm.cli", *arguments], cwd=ROOT, text=True,
            env={**self.environment, "RAY_AUTH_MODE": "token"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def pretrain(self, name: str, steps: int) -> list[str]:
        """Arguments of a run over two stages and two replicas."""
        return [
            "submit", "pretrain", f"{RECIPES}/pretrain.yaml", f"run.storage={self.shared}/runs", f"run.name={name}",
            f"data.train={self.shared}/runs/data", f"training.steps={steps}", "training.evaluate_every_steps=1000",
            "training.log_every_steps=1", "training.warmup_steps=0", "training.sequence_length=32",
            "training.optimizer=adamw", "training.precision=fp32", "parallel.pipeline=2", "parallel.data=2",
            "checkpoint.every_steps=5", "resources.workers=4", "resources.cpus_per_worker=1",
        ]  # fmt: skip

    def losses(self, name: str) -> dict[int, float]:
        """By step."""
        path = self.shared / "runs" / name / "metrics.jsonl"
        return {row["step"]: row["loss"] for row in read_metrics(path) if "loss" in row} if path.exists() else {}

    @property
    def head(self) -> Any:
        return self.hosts.hosts[0]


def done(result: Any) -> str:
    """What a command printed that must have worked."""
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def wait_until(what: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, what
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("hosts")
    home = tmp_path_factory.mktemp("client")
    with HOSTS.hosts(directory / "all", 3) as hosts:
        file = HOSTS.fill_in(hosts, SMALL)
        address = f"http://{hosts.hosts[0].address}:8265"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = {**kept, "HOME": str(home), "RAY_API_SERVER_ADDRESS": address, "PYTHONPATH": str(ROOT)}
        yield Cluster(hosts, file, home, hosts.shared, environment)


@pytest.fixture(scope="module")
def running(cluster: Cluster) -> Cluster:
    """The cluster, up."""
    said = done(cluster.raylm("cluster", "up", str(cluster.file)))
    assert said.splitlines()[0] == f"raylm: 3 nodes up, head {cluster.head.address}"
    return cluster


@pytest.fixture(scope="module")
def prepared(running: Cluster) -> Cluster:
    """The cluster with a set that it prepared."""
    text = running.shared / "text.txt"
    text.write_text("\n".join(f"line {i} of the text" for i in range(300)))
    done(running.raylm(
        "submit", "prepare", f"{RECIPES}/prepare.yaml", f"run.storage={running.shared}/runs", "data.text_unit=line",
        f"data.train={text}", "tokenizer={type: byte}",
    ))  # fmt: skip
    return running


def test_nobody_gets_in_without_the_token(running: Cluster) -> None:
    token = running.home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    refused = running.raylm("jobs", token=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "refuses this client's token" in refused.stderr
    line = f"RAY_AUTH_TOKEN={'x' * 64} ray start --address={running.head.address}:6379 2>&1 || true"
    said = on(running.hosts.hosts[1], f"unset RAY_AUTH_TOKEN_PATH; {line}")
    assert "Ray runtime started" not in said
    assert len(json.loads(done(checked(running)))["nodes"]) == 3


def test_the_preflight_names_each_fault_and_its_node(running: Cluster) -> None:
    arguments = ["cluster", "check", str(running.file), "--storage", str(running.shared), "--json"]
    sound = json.loads(done(running.raylm(*arguments, "--workers", "1")))
    assert not sound["broken"], sound["findings"]
    assert len(sound["workers"]["rates"]) == 3
    assert {"matrix_flops", "memory_bandwidth", "far_bandwidth", "launch_seconds"} <= sound["figures"].keys()
    assert {len(sound["nodes"]), sound["all_reduce"].get("nodes")} == {3}

    _, second, third = running.hosts.hosts
    with planted(second, third, running):
        result = running.raylm(*arguments)
    assert result.returncode == 1, result.stderr
    found = {(one["node"], one["what"]): one["found"] for one in json.loads(result.stdout)["findings"]}
    assert blamed(found) == {second.address, third.address}, result.stdout
    assert "torch 2.0.0" in found[second.address, "packages"]
    assert "MB/s" in found[second.address, "network"]
    assert "is not shared" in found[third.address, "storage"]
    assert "no connection with" in found[third.address, "ports"]
    # Ray's processes die where they cannot write: it is seen from outside.
    third.run("sh", "-c", "dd if=/dev/zero of=/tmp/fill bs=1M 2>/dev/null; true", seconds=60)
    full = running.raylm(*arguments)
    third.run("rm", "/tmp/fill")
    found = {(one["node"], one["what"]): one["found"] for one in json.loads(full.stdout)["findings"]}
    assert "free where Ray writes" in found[third.address, "disk"]
    assert blamed(found) == {third.address}
    assert not json.loads(done(running.raylm(*arguments)))["broken"]


def blamed(found: dict[tuple[str, str], str]) -> set[str]:
    """Nodes of which more is said than what this machine is to blame for."""
    return {node for node, what in found if what not in ("open files", "speed", "shared memory")}


class planted:
    """Faults on two hosts while the block lasts."""

    def __init__(self, second: Any, third: Any, cluster: Cluster) -> None:
        self._second, self._third, self._shared = second, third, cluster.shared
        folder = next(Path(sys.prefix).glob("lib/python3*/site-packages"))
        self._torch = next(path for path in folder.glob("torch-*.dist-info"))
        self._other = cluster.shared.parent / "METADATA"

    def __enter__(self) -> None:
        lines = (self._torch / "METADATA").read_text().splitlines()
        changed = ["Version: 2.0.0" if line.startswith("Version: ") else line for line in lines]
        self._other.write_text("\n".join(changed) + "\n")
        self._second.run("mount", "--bind", str(self._other), str(self._torch / "METADATA"))
        slow = ["root", "tbf", "rate", "40mbit", "burst", "64kb", "latency", "200ms"]
        self._second.run("tc", "qdisc", "add", "dev", "eth0", *slow)
        self._third.run("mount", "-t", "tmpfs", "tmpfs", str(self._shared))
        self._third.run(*self._firewall("-I"))

    def __exit__(self, *_: object) -> None:
        self._third.run(*self._firewall("-D"))
        self._third.run("umount", str(self._shared))
        self._second.run("tc", "qdisc", "del", "dev", "eth0", "root")
        self._second.run("umount", str(self._torch / "METADATA"))

    @staticmethod
    def _firewall(what: str) -> list[str]:
        """Ray's own ports are open, those that the system gives are not."""
        return ["iptables", what, "INPUT", "-p", "tcp", "--syn", "--dport", "32768:60999", "-j", "DROP"]


def test_a_clock_that_is_wrong(running: Cluster) -> None:
    if shutil.which("faketime") is None:
        pytest.skip("not installed: faketime")
    third = running.hosts.hosts[2]
    join = f"ray start --address={running.head.address}:6379 --node-ip-address={third.address} --num-cpus=2"
    on(third, f"ray stop >/dev/null; faketime -f +90s {join} --object-store-memory=100000000")
    wait_until(lambda: len(json.loads(checked(running).stdout)["nodes"]) == 3)
    found = {(one["node"], one["what"]): one["found"] for one in json.loads(checked(running).stdout)["findings"]}
    assert "s ahead of the head's" in found[third.address, "clock"]
    on(third, f"ray stop >/dev/null; {join} --object-store-memory=100000000")


def checked(cluster: Cluster) -> Any:
    return cluster.raylm("cluster", "check", str(cluster.file), "--json")


def on(host: Any, line: str) -> str:
    """What a line of a node's shell prints."""
    return host.run("bash", "-c", f"cd; . ~/raylm/cluster/node.sh; export PYTHONPATH={ROOT}; {line}", seconds=90)


def test_every_stage_is_a_job(prepared: Cluster) -> None:
    """The run that the others compare with, a search with trials of two workers, and what is made of the model."""
    runs = prepared.shared / "runs"
    done(prepared.raylm(*prepared.pretrain("whole", 40)))
    text, model = f"data.train={prepared.shared}/text.txt", f"model.path={runs}/whole/model"
    storage = f"run.storage={runs}"
    done(prepared.raylm(
        "submit", "tune", f"{RECIPES}/tune.yaml", storage, f"data.train={runs}/data", model, "training.steps=4",
        "training.evaluate_every_steps=2", "training.warmup_steps=0", "training.sequence_length=32",
        "training.optimizer=adamw", "training.precision=fp32", "tuning.trials=2", "resources.workers=2",
        "tuning.space={training.learning_rate: {log_uniform: [1.0e-4, 1.0e-3]}}",
    ))  # fmt: skip
    assert (runs / "tune" / "model" / "model.safetensors").is_file()
    done(prepared.raylm("submit", "evaluate", f"{RECIPES}/evaluate.yaml", storage, text, model))
    assert json.loads((runs / "evaluate" / "report.json").read_text())
    small = ["compression.prompts=4", "compression.prompt_tokens=8", "compression.new_tokens=8"]
    done(prepared.raylm("submit", "compress", f"{RECIPES}/compress.yaml", storage, text, model, *small))
    assert any((runs / "compress" / "model" / "openvino").glob("*.xml"))

    serving = prepared.begin(
        "submit", "serve", f"{RECIPES}/serve.yaml", storage, f"model.path={runs}/compress", "serving.collection=null"
    )
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/health', timeout=5).read().decode())"
    said = wait_until(lambda: prepared.head.run(sys.executable, "-c", ask, check=False))
    assert json.loads(said)["status"]
    status = done(prepared.raylm("status"))
    assert re.search(r"^served +status +route +replicas\n\S+ +running +/ +1$", status, re.MULTILINE), status
    assert "stopped" in done(prepared.raylm("stop", "serve"))
    serving.communicate(timeout=PATIENCE_SECONDS)
    assert serving.returncode == 143


def test_training_survives_the_loss_of_a_host(prepared: Cluster) -> None:
    running = prepared.begin(*prepared.pretrain("hurt", 40))
    wait_until(lambda: len(prepared.losses("hurt")) >= 12)
    workers = [host for host in prepared.hosts.hosts[1:] if any("RayTrainWorker" in line for line in host.processes())]
    assert workers, "no rank is on a worker host"
    workers[-1].lose()
    output, _ = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 0, output[-3000:]
    assert prepared.losses("hurt") == pytest.approx(prepared.losses("whole"), abs=2e-5)
    number = int(workers[-1].name.removeprefix("host"))
    prepared.hosts.add(number)


def test_a_run_goes_on_after_the_head_was_lost(prepared: Cluster) -> None:
    running = prepared.begin(*prepared.pretrain("again", 40))
    wait_until(lambda: len(prepared.losses("again")) >= 12)
    prepared.head.lose()
    running.kill()
    running.communicate()
    before = prepared.losses("again")
    prepared.hosts.add(1)
    done(prepared.raylm("cluster", "up", str(prepared.file)))
    said = done(prepared.raylm(*prepared.pretrain("again", 40)))
    assert "40 steps" in said
    after = prepared.losses("again")
    assert after == pytest.approx(prepared.losses("whole"), abs=2e-5)
    assert before.items() <= after.items() or after.keys() == set(range(1, 41))


def test_down_leaves_nothing(running: Cluster) -> None:
    assert done(running.raylm("cluster", "down", str(running.file))) == "raylm: down\n"
    assert {host.name: host.processes() for host in running.hosts.hosts} == {"host1": [], "host2": [], "host3": []}
