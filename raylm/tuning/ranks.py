"""The ranks of trials with several workers, which stay from one trial to the next.

In: jobs. Out: what rank 0 reports, and its final metrics. A trial's own process holds the group: one actor a rank, each
with a :mod:`raylm.tuning.rank_server` beside it, all in one placement group. A trial that begins forks its ranks from
processes that have imported everything; one that is stopped has its ranks killed. Where the trial's process dies, Ray
ends the actors, and their servers with them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from raylm.cluster.environment import inherited_environment, training_environment, worker_environment
from raylm.cluster.waiting import worker_share
from raylm.errors import RunFailure
from raylm.training.loop.worker import TrainingJob, new_attempt
from raylm.training.ray_train.board import Failure, first_own
from raylm.training.ray_train.places import Place, check_tensor_groups, place_here
from raylm.training.reports.events import append_event
from raylm.tuning.rank_server import Message, Order

POLL_SECONDS = 2.0
# Within which the other ranks tell of a failure: the first that is heard of may only have lost the one that failed.
GATHER_SECONDS = 5.0
END_SECONDS = 10.0


class RankFailure(RunFailure):
    """A rank failed in a way that need not come again."""


class Rank:
    """The actor of one rank; it waits, and its server's forks compute."""

    def __init__(self, use_gpu: bool, folder: str) -> None:
        self._pipe, other = Pipe()
        self._running = False
        if Path(folder).is_dir():
            os.chdir(folder)
        command = [sys.executable, "-m", "raylm.tuning.rank_server", str(other.fileno()), "gpu" if use_gpu else "cpu"]
        # As this process finds modules, so does that one.
        environment = inherited_environment() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._server = subprocess.Popen(command, env=environment, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL)
        other.close()

    def place(self) -> Place:
        """Where the rank is."""
        return place_here()

    def address(self) -> str:
        """Where ranks may meet, of which this one is the first."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{host}:{free.getsockname()[1]}"

    def begin(self, order: Order) -> None:
        """Have the server start the rank."""
        self._pipe.send(order)
        self._running = True

    def messages(self, seconds: float) -> list[Message]:
        """What the rank has said; waits for it for up to so many seconds."""
        found: list[Message] = []
        while self._running and self._pipe.poll(0 if found else seconds):
            found.append(self._receive())
        return found

    def end(self) -> None:
        """End the rank, if it runs."""
        if self._running:
            self._pipe.send(None)
            while self._running:
                self._receive()

    def _receive(self) -> Message:
        try:
            message = self._pipe.recv()
        except EOFError:
            message = ("ended", self._server.wait())
        self._running &= message[0] != "ended"
        return message


class RankGroup:
    """The ranks of one trial at a time.

    Args:
        job: any of the trials'; all of them have as many workers, of the same kind.
        folder: in which the search was started.

    Raises:
        RunFailure: tensor-parallel ranks would be on several nodes.
    """

    def __init__(self, job: TrainingJob, folder: Path) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        resources, self.size = job.config.resources, job.config.resources.workers
        share = worker_share(resources, use_gpu=job.use_gpu)
        environment = (worker_environment if job.use_gpu else training_environment)(resources.cpus_per_worker)
        self._places = placement_group([share] * self.size, strategy="PACK")
        ray.get(self._places.ready(), timeout=resources.node_wait_seconds)
        ranks = [
            ray.remote(Rank)
            .options(
                num_cpus=share["CPU"],
                num_gpus=share.get("GPU", 0),
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._places, number),
            )
            .remote(job.use_gpu, str(folder))
            for number in range(self.size)
        ]
        places = ray.get([rank.place.remote() for rank in ranks])
        # Ranks of a node follow each other.
        nodes = list(dict.fromkeys(place.node for place in places))
        order = sorted(range(self.size), key=lambda number: nodes.index(places[number].node))
        self._ranks, self._where = [ranks[number] for number in order], [places[number] for number in order]

    def train(self, job: TrainingJob, on_evaluation: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Run ``job`` to its end; rank 0's final metrics.

        Raises:
            RunFailure: a rank failed in a way that would come again.
            RankFailure: in another way.
        """
        import ray

        check_tensor_groups(self._where, job.config.parallel.tensor)
        generation = new_attempt()
        try:
            store = ray.get(self._ranks[0].address.remote())
            orders = [Order(job, rank, self.size, store, generation) for rank in range(self.size)]
            ray.get([rank.begin.remote(order) for rank, order in zip(self._ranks, orders, strict=True)])
            return self._followed(on_evaluation)
        except ray.exceptions.RayActorError as error:
            raise RankFailure(f"the process of a rank died: {' '.join(str(error).split())}") from error
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get([rank.end.remote() for rank in self._ranks], timeout=END_SECONDS)

    def _followed(self, on_evaluation: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        import ray

        waiting = {rank.messages.remote(POLL_SECONDS): number for number, rank in enumerate(self._ranks)}
        final, failures, deadline = None, list[Failure](), float("inf")
        while waiting and time.monotonic() < deadline:
            ready, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
            for reference in ready:
                number, ended = waiting.pop(reference), False
                for kind, value in ray.get(reference):
                    if kind == "evaluation":
                        on_evaluation(value)
                    elif kind == "final":
                        final = value
                    elif kind == "failed":
                        failures.append(value)
                    else:
                        ended = True
                        if value != 0:
                            failures.append(Failure(number, "own", f"its process ended with status {value}", "", 0))
                if not ended:
                    waiting[self._ranks[number].messages.remote(POLL_SECONDS)] = number
            if failures and deadline == float("inf"):
                deadline = time.monotonic() + GATHER_SECONDS
        if failures:
            raise _explained(failures)
        if final is None:
            raise RankFailure("the ranks ended without a result")
        return final

    def close(self) -> None:
        """Give everything back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(ray.exceptions.RayError):
            for rank in self._ranks:
                ray.kill(rank)
            remove_placement_group(self._places)


def _explained(failures: list[Failure]) -> RunFailure:
    """The first failure that follows from no other rank's."""
    first = first_own(failures)
    assert first is not None
    log = f" (log: {first.log})" if first.log else ""
    return (RunFailure if first.kind == "fatal" else RankFailure)(f"rank {first.rank}: {first.text}{log}")


class KeptRanks:
    """The group of a trial's process, if it has one; made when a trial asks for it first."""

    def __init__(self) -> None:
        self._group: RankGroup | None = None

    def train(self, job: TrainingJob, folder: Path, on_evaluation: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Run ``job`` to its end, from its last checkpoint after ranks died, up to ``resources.max_failures`` times;
        rank 0's final metrics.

        Raises:
            RunFailure: a rank failed more often, or in a way that would come again.
        """
        for left in range(job.config.resources.max_failures, -1, -1):
            if self._group is None:
                self._group = RankGroup(job, folder)
            try:
                return self._group.train(job, on_evaluation)
            except RankFailure as error:
                # What is left of it may be dead, or hang.
                self.close()
                if not left:
                    raise
                append_event(
                    job.directory, {"kind": "restart", "step": 0, "text": f"ranks started again after {error}"}
                )
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Give back what the ranks hold."""
        if self._group is not None:
            self._group.close()
            self._group = None
