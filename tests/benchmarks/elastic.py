"""A cluster that loses a node and gets one back: training goes on at the smaller and then the larger size.

``python tests/benchmarks/elastic.py [STEPS] [OUTPUT.json]`` (400 by default) starts a Ray cluster of one-CPU nodes on
this machine, kills one node while a run with ``resources.elastic: [1, 2]`` trains, adds one later, and checks from the
logged sample numbers that every sample was taken exactly once; at the end a node is taken away with a notice. Exit
status 1 if not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from ray.cluster_utils import Cluster
from small_run import finish, start, wait_until, write_recipes

from raylm.training.reports.metrics import read_metrics

BATCH_SIZE = 6


def beyond(run: Path, step: int, starts: int) -> bool:
    """Whether the run has been started ``starts`` times and has made more than ``step`` steps."""
    generations = {path.name.split(".")[0] for path in (run / "samples").glob("*.jsonl")}
    return len(generations) >= starts and reached(run) > step


def reached(run: Path) -> int:
    lines = read_metrics(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def saved_step(run: Path) -> int:
    return int((run / "checkpoints" / "LATEST").read_text().strip().removeprefix("step-"))


def drain(node: str, address: str) -> None:
    """Tell Ray, as a cloud's notice would, that the node will be taken away in two minutes."""
    subprocess.run(
        ["ray", "drain-node", "--address", address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
         "--reason-message", "spot", "--deadline-remaining-seconds", "120"],
        check=True, timeout=60, stdout=sys.stderr,
    )  # fmt: skip


def check_samples(run: Path, steps: int) -> tuple[list[dict], bool]:
    """The starts with their sizes and steps, and whether each step took its samples exactly once.

    Steps after the checkpoint that a start goes on from are made again; the last time counts.
    """
    taken: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    began: dict[str, float] = {}
    ranks: dict[str, int] = defaultdict(int)
    for path in (run / "samples").glob("*.jsonl"):
        generation = path.name.split(".")[0]
        ranks[generation] += 1
        for line in map(json.loads, path.read_text().splitlines()):
            taken[generation][line["step"]] += line["samples"]
            began[generation] = min(began.get(generation, float("inf")), line["time"])
    order = sorted(began, key=began.__getitem__)
    last = {step: samples for generation in order for step, samples in taken[generation].items()}
    exactly_once = sorted(sample for samples in last.values() for sample in samples) == list(range(steps * BATCH_SIZE))
    starts = [{"workers": ranks[g], "first_step": min(taken[g]), "last_step": max(taken[g])} for g in order]
    return starts, exactly_once


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        run = directory / "elastic"
        write_recipes(
            directory, "elastic", 64,
            training={
                "steps": steps, "batch_size": BATCH_SIZE, "sequence_length": 128, "log_every_steps": 1,
                "log_samples": True,
            },
            checkpoint={"every_steps": 50, "every_seconds": None},
            resources={"elastic": [1, 2], "elastic_check_seconds": 3.0},
        )  # fmt: skip
        finish(start("prepare", directory), directory)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        lost = cluster.add_node(num_cpus=1)
        driver = None
        try:
            driver = start("pretrain", directory, ray_address=cluster.address)
            wait_until(lambda: beyond(run, steps // 8, 1), "the first start", driver, directory)
            cluster.remove_node(lost, allow_graceful=False)
            step = reached(run)
            wait_until(lambda: beyond(run, step + steps // 8, 2), "the start on one node", driver, directory)
            spot = cluster.add_node(num_cpus=1)
            wait_until(lambda: beyond(run, step + steps // 4, 3), "the start on two nodes again", driver, directory)
            at = reached(run)
            drain(spot.node_id, cluster.address)
            wait_until(lambda: saved_step(run) >= at, "a checkpoint before the drained node goes", driver, directory)
            saved_on_notice = saved_step(run)
            cluster.remove_node(spot, allow_graceful=False)
            wait_until(lambda: beyond(run, 0, 4), "the start without the drained node", driver, directory)
            finish(driver, directory)
        finally:
            if driver is not None:
                driver.kill()
            cluster.shutdown()
        starts, exactly_once = check_samples(run, steps)
        losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    result = {
        "steps": steps,
        "starts": starts,
        "drained_at_step": at,
        "saved_on_notice": saved_on_notice,
        "every_sample_exactly_once": exactly_once,
        "first_and_last_loss": [losses[0], losses[-1]],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text)
    sys.exit(not exactly_once)


if __name__ == "__main__":
    main()
