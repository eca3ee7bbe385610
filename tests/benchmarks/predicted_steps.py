"""Predicted against measured step times on this machine: ``python predicted_steps.py OUTPUT.json [--hosts 1|3]``.

Two clusters are made of Linux namespaces (tests/launcher/hosts.py; needs root, sshd, ssh, rsync, ip) and started with
``raylm cluster up``: one host with two CPUs, and three hosts that may each use a part of a CPU, as this machine has
two. On each, ``raylm cluster check --workers`` measures what workers get, the plan of ``raylm plan --measured`` reckons
with that, and ``raylm submit pretrain`` trains a Llama of 10M parameters. The measured step is the median of those
after the first three. The figures are measured before and after the runs of a cluster, and their means are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raylm.cluster.capacity import Capacity, Node
from raylm.cluster.hardware import CPU
from raylm.config import load_config
from raylm.parallel.plan.planning import plan_training
from raylm.training.reports.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.launcher.hosts import Hosts, fill_in, hosts, why_not  # noqa: E402

STEPS, WARM, SECONDS = 14, 3, 600.0
TOLERANCE = 0.25
QUOTAS = Path("/sys/fs/cgroup/cpu")
# Microseconds: short ones, in which a host stands still for less than a message takes.
PERIOD = 5000
# Of a CPU that a host may use, and what the head has beside that for Ray's own processes and the run's driver, which a
# real machine has other CPUs for.
SHARE, HEAD_EXTRA = 0.55, 0.15


@dataclass(frozen=True)
class Case:
    """A layout: hosts, workers of each, and the keys of ``parallel``."""

    name: str
    hosts: int
    workers: int
    keys: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("1 host: 1 worker", 1, 1),
    Case("1 host: 2 replicas", 1, 2, {"data": 2}),
    Case("1 host: 2 replicas, ZeRO 3", 1, 2, {"data": 2, "zero_stage": 3}),
    Case("1 host: tensor 2", 1, 2, {"tensor": 2}),
    Case("1 host: pipeline 2", 1, 2, {"pipeline": 2, "micro_batch_size": 3}),
    Case("3 hosts: 3 replicas", 3, 1, {"data": 3}),
    Case("3 hosts: 3 replicas, ZeRO 2", 3, 1, {"data": 3, "zero_stage": 2, "micro_batch_size": 2}),
    Case("3 hosts: pipeline 3", 3, 1, {"pipeline": 3, "micro_batch_size": 2}),
]


def configuration(case: Case, shared: Path, name: str) -> Path:
    """The file of a run."""
    size = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    values = {
        "run": {"name": name, "storage": str(shared / "runs")},
        "data": {"train": str(shared / "text.txt"), "text_unit": "line", "validation_fraction": 0.05},
        "tokenizer": {"type": "byte"},
        "model": {"family": "llama", "config": {**size, "num_key_value_heads": 6}},
        "training": {
            "steps": STEPS, "batch_size": 12, "sequence_length": 128, "log_every_steps": 1, "precision": "fp32",
            "evaluate_every_steps": STEPS, "warmup_steps": 0, "optimizer": "adamw",
        },
        "parallel": {"micro_batch_size": 12 // case.keys.get("data", 1), **case.keys},
        "resources": {"workers": case.hosts * case.workers, "cpus_per_worker": 1, "gpus_per_worker": 0},
        "checkpoint": {"every_steps": 1000, "every_seconds": None},
    }  # fmt: skip
    path = shared / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def limit(made: Hosts) -> list[Path]:
    """Let each host use a part of a CPU; the groups, to be removed."""
    groups = []
    for number, host in enumerate(made.hosts):
        share = SHARE + (0 if number else HEAD_EXTRA)
        group = QUOTAS / f"raylm-{host.namespace}"
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(PERIOD))
        (group / "cpu.cfs_quota_us").write_text(str(int(PERIOD * share)))
        for pid in descendants(host.process.pid):
            (group / "cgroup.procs").write_text(str(pid))
        groups.append(group)
    return groups


def descendants(pid: int) -> list[int]:
    """The process and those that it started."""
    import psutil

    process = psutil.Process(pid)
    return [pid, *(child.pid for child in process.children(recursive=True))]


class Client:
    """Runs raylm's commands beside the hosts."""

    def __init__(self, made: Hosts, file: Path, home: Path) -> None:
        self.made, self.file = made, file
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        address = f"http://{made.hosts[0].address}:8265"
        self._environment = kept | {
            "HOME": str(home), "RAY_API_SERVER_ADDRESS": address, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"
        }  # fmt: skip

    def raylm(self, *arguments: str) -> str:
        """What the command prints."""
        command = [sys.executable, "-m", "raylm.cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise SystemExit(f"{arguments}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
        return done.stdout

    def figures(self, workers: int) -> dict[str, Any]:
        """What ``workers`` of each node get at once."""
        said = self.raylm("cluster", "check", str(self.file), "--workers", str(workers), "--json")
        record = json.loads(said)
        return {"figures": record["figures"], "workers": record["workers"]}


def measured_step(client: Client, case: Case, number: int) -> tuple[Path, list[float]]:
    """The configuration of a run, and the seconds of its steps."""
    shared = client.made.shared
    path = configuration(case, shared, f"run{number}")
    client.raylm("submit", "pretrain", str(path))
    rows = read_metrics(shared / "runs" / f"run{number}" / "metrics.jsonl")
    return path, [12 * 128 / row["tokens_per_second"] for row in rows][WARM:-1]


def predicted_step(path: Path, case: Case, figures: dict[str, float]) -> dict[str, float]:
    """Seconds of a step, whole and by part, as ``raylm plan --measured`` has them."""
    capacity = Capacity(tuple(Node(float(case.workers)) for _ in range(case.hosts)))
    plan = plan_training(load_config("pretrain", path, []), capacity, None, CPU.measured(figures, "check"))
    time = plan.candidates[0].time
    assert time is not None
    return {"seconds": time.seconds, **vars(time)}


def on_cluster(cases: list[Case]) -> list[dict[str, Any]]:
    """All cases of one cluster."""
    count, cpus = cases[0].hosts, max(case.workers for case in cases)
    found = []
    with tempfile.TemporaryDirectory(prefix="raylm-steps-") as directory, hosts(Path(directory) / "all", count) as made:
        home = Path(directory) / "home"
        home.mkdir()
        letters = random.Random(0)
        lines = ["".join(letters.choices("abcdefgh ", k=120)) for _ in range(3000)]
        (made.shared / "text.txt").write_text("\n".join(lines))
        groups = limit(made) if count > 1 else []
        client = Client(made, fill_in(made, f"ray start --num-cpus={cpus} --object-store-memory=100000000"), home)
        try:
            client.raylm("cluster", "up", str(client.file))
            sizes = sorted({case.workers for case in cases})
            checks = [{size: client.figures(size) for size in sizes}]
            runs = [(case, *measured_step(client, case, number)) for number, case in enumerate(cases)]
            checks.append({size: client.figures(size) for size in sizes})
            for case, path, steps in runs:
                pairs = [check[case.workers]["figures"] for check in checks]
                figures = {name: statistics.fmean(one[name] for one in pairs) for name in pairs[0]}
                found.append({
                    "case": case.name, "predicted": predicted_step(path, case, figures), "steps": steps,
                    "measured": statistics.median(steps), "figures": pairs, "checks": [c[case.workers] for c in checks],
                })  # fmt: skip
            client.raylm("cluster", "down", str(client.file))
        finally:
            made.close()
            for group in groups:
                group.rmdir()
    return found


def main() -> None:
    """Print a row a layout, and write all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--hosts", type=int, choices=(1, 3))
    given = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    rows = []
    for count in (1, 3) if given.hosts is None else (given.hosts,):
        cases = [case for case in CASES if case.hosts == count]
        rows += on_cluster(cases)
        for row in rows[-len(cases) :]:
            row["ratio"] = row["predicted"]["seconds"] / row["measured"]
            print(f"{row['case']:<30} {row['predicted']['seconds']:.3f} s predicted, {row['measured']:.3f} s measured: "
                  f"{row['ratio']:.2f}", flush=True)  # fmt: skip
    within = sum(abs(row["ratio"] - 1) <= TOLERANCE for row in rows)
    print(f"{within} of {len(rows)} within {TOLERANCE:.0%}")
    given.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
