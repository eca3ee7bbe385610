"""Whether every node of the cluster sees the folders that a run reads and writes.

In: folders on this machine. A probe file is written beside them by the driver and looked for by a task pinned to each
node. Ray itself would notice at the first checkpoint or never: each node would write a part of it to its own disk.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from raylm.errors import UserError

# Network file systems may show a new file late.
PATIENCE_SECONDS = 2.0
ANSWER_SECONDS = 120.0


def nodes_without(path: str) -> list[str]:
    """Nodes with CPUs on which a process does not see the file or folder at ``path``; starts a task on each."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def seen(patience: float) -> bool:
        deadline = time.monotonic() + patience
        while not Path(path).exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    look = ray.remote(num_cpus=0, max_retries=0)(seen)
    answers = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            PATIENCE_SECONDS
        )
        for node in nodes
    ]
    # A node that leaves meanwhile is none of the run's.
    missing = []
    for node, answer in zip(nodes, answers, strict=True):
        with contextlib.suppress(ray.exceptions.TaskUnschedulableError, ray.exceptions.WorkerCrashedError):
            if not ray.get(answer, timeout=ANSWER_SECONDS):
                missing.append(f"{node['NodeName']} ({node['NodeManagerAddress']})")
    return sorted(missing)


def check_shared(storage: Path | None, inputs: dict[str, Path]) -> None:
    """Refuse folders of this machine that other nodes of the cluster do not see; does nothing on one node.

    Args:
        storage: folder that runs are written to, which may not exist yet; None where it is remote.
        inputs: key of the configuration -> folder that is read.

    Raises:
        UserError: names the key, the folder and a node that does not see it.
    """
    import ray

    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return
    if storage is not None:
        with _probe_file(storage) as probe:
            _refuse("run.storage", storage, nodes_without(str(probe)), " or a URI such as s3://bucket/runs")
    for key, folder in inputs.items():
        _refuse(key, folder, nodes_without(str(folder)))


def _refuse(key: str, folder: Path, missing: list[str], other: str = "") -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{key}: found {folder}, which is not seen by node {missing[0]}{more}, allowed on a cluster of several "
            f"nodes: a directory that all of them share{other}"
        )


@contextlib.contextmanager
def _probe_file(folder: Path) -> Iterator[Path]:
    """A new file in ``folder``; it, and the folders that had to be made for it, are gone afterwards."""
    made = []
    probe = folder / f".raylm-probe-{uuid.uuid4().hex[:8]}"
    try:
        for parent in reversed([folder, *folder.parents]):
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
        probe.touch()
    except OSError as error:
        raise UserError(f"run.storage: {folder} cannot be written: {error.strerror}") from None
    try:
        yield probe
    finally:
        probe.unlink(missing_ok=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
