"""A process that has imported training, and forks one that trains for each trial: a rank whose start costs no imports.

In: orders over a pipe, ``python -m raylm.tuning.rank_server DESCRIPTOR cpu|gpu``. Out: what the rank reports, over the
same pipe. It never computes itself, so that what it forks may use a GPU and threads. Without Ray: the actor of
:mod:`raylm.tuning.ranks` holds the other end, and when that is gone, so is this process.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from raylm.training.loop.worker import TrainingJob, Worker

# With the metrics, with those at the end, with a Failure, and with the exit status, behind which nothing comes.
Kind = Literal["evaluation", "final", "failed", "ended"]
Message = tuple[Kind, Any]


@dataclass(frozen=True)
class Order:
    """One rank of one trial.

    Attributes:
        store: ``tcp://HOST:PORT`` at which the ranks find each other.
        generation: token of this start, the same on all ranks.
    """

    job: TrainingJob
    rank: int
    size: int
    store: str
    generation: str


def serve(pipe: Connection, use_gpu: bool) -> None:
    """Carry out orders until the other end is gone; None ends the rank that runs."""
    from raylm.parallel.engines.environment import prepare_deepspeed

    prepare_deepspeed(use_gpu)
    # Imported once, before the forks.
    import raylm.training.loop.training_loop
    import raylm.training.ray_train.health  # noqa: F401

    forking = multiprocessing.get_context("fork")
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        if order is None:
            # That rank has ended by itself meanwhile.
            continue
        process = forking.Process(target=_run_rank, args=(order, pipe))
        process.start()
        if not _watched(process, pipe):
            return
        pipe.send(("ended", process.exitcode))


def _watched(process: BaseProcess, pipe: Connection) -> bool:
    """Wait for the end of the rank, or end it; whether the other end of the pipe is still there."""
    if pipe not in wait([process.sentinel, pipe]):
        process.join()
        return True
    try:
        pipe.recv()
        there = True
    except EOFError:
        there = False
    # It may hang in a collective, which no signal that can be handled ends.
    process.kill()
    process.join()
    return there


def _run_rank(order: Order, pipe: Connection) -> None:
    import torch.distributed as dist

    from raylm.training.checkpoints.mirror import Mirror
    from raylm.training.checkpoints.storage import Storage
    from raylm.training.loop.training_loop import TrainingLoop
    from raylm.training.ray_train.board import Failure
    from raylm.training.ray_train.health import HealthMonitor, failure_kind, failure_text

    job, rank, resources = order.job, order.rank, order.job.config.resources
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(order.size)}
    failures = job.directory / "failures" / order.generation
    health = HealthMonitor(None, order.generation, rank, failures, None, resources.collective_timeout_seconds)

    def report(metrics: dict[str, Any]) -> None:
        if rank == 0:
            pipe.send(("evaluation", metrics))

    with health:
        try:
            dist.init_process_group(
                "nccl" if job.use_gpu else "gloo", init_method=order.store, rank=rank, world_size=order.size,
                timeout=datetime.timedelta(seconds=resources.collective_timeout_seconds),
            )  # fmt: skip
            Mirror(Storage(job.storage), job.directory).fetch_data()
            worker = Worker(rank, order.size, report, order.generation, health.progress, device=0)
            final = TrainingLoop(job, worker).run()
            if rank == 0:
                pipe.send(("final", final))
            # No rank leaves while others still ask it for something.
            dist.barrier()
        except Exception as error:  # noqa: BLE001 - whatever it is, the trial hears of it
            health.fail(error)
            pipe.send(("failed", Failure(rank, failure_kind(error), failure_text(error), str(health.log), health.step)))
    # Threads of libraries that still wait for others would keep the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), use_gpu=sys.argv[2] == "gpu")
