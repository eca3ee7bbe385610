"""Starting a training job on Ray Train and waiting for it.

The driver starts the workers through Ray Train (which restarts them after failures), watches them
(:mod:`raylm.training.ray_train.watching`), and turns a failure into one line with the first failing rank's own error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pyarrow.lib import ArrowException

from raylm.cluster.environment import default_environment, training_environment, worker_environment
from raylm.cluster.session import shown_on_dashboard
from raylm.cluster.waiting import worker_share
from raylm.errors import RunFailure
from raylm.interrupts import deferred
from raylm.training.checkpoints.mirror import METRICS, Mirror
from raylm.training.loop.worker import TrainingJob, Worker, new_attempt
from raylm.training.ray_train.places import Place, check_tensor_groups, place_here
from raylm.training.ray_train.watching import HANDOVER_SECONDS, POLL_SECONDS, Watch
from raylm.training.reports.events import append_event
from raylm.training.reports.metrics import read_metrics

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from raylm.training.ray_train.board import Failure
    from raylm.training.ray_train.fitting import Fitting

RELEASE_SECONDS = 3.0


def train_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    import ray
    import ray.train

    from raylm.parallel.engines.environment import prepare_deepspeed

    job: TrainingJob = settings["job"]
    context, resources = ray.train.get_context(), job.config.resources
    rank, world_size = context.get_world_rank(), context.get_world_size()

    def doing(text: str) -> None:
        if rank == 0:
            job.progress.update.remote({"doing": text})

    doing("importing DeepSpeed")
    prepare_deepspeed(job.use_gpu)
    from raylm.training.checkpoints.storage import Storage
    from raylm.training.loop.training_loop import TrainingLoop
    from raylm.training.ray_train.health import HealthMonitor
    from raylm.training.ray_train.preemption import Notices

    places = _gather_places(world_size)
    generation, forbidden = _begin(job, rank, places)
    if forbidden is not None:
        # What failed would fail again: end here, the driver has the reason.
        return
    failures = job.directory / "failures" / generation
    health = HealthMonitor(
        job.progress, generation, rank, failures, resources.heartbeat_seconds, resources.collective_timeout_seconds
    )
    mirror = Mirror(Storage(job.storage), job.directory)
    with health:
        try:
            notices = Notices(health, rank)
            worker = Worker(
                rank,
                world_size,
                generation=generation,
                progress=health.progress,
                notice=notices.current,
                saved=lambda: job.progress.saved.remote(notices.asked),
                memory_bytes=lambda: health.answer.memory_bytes,
            )
            check_tensor_groups(places, job.config.parallel.tensor)
            mirror.fetch_data()
            doing("building the model")
            loop = TrainingLoop(job, worker)
            if rank == 0:
                job.progress.update.remote({"total_steps": loop.total_steps})
            final = loop.run()
        except Exception as error:
            health.fail(_cause(mirror, job.attempt, error))
            with contextlib.suppress(OSError):
                mirror.send(str(health.log.relative_to(job.directory)))
            raise
    if rank == 0:
        ray.get(job.progress.update.remote({"final": final}), timeout=HANDOVER_SECONDS)


def _cause(mirror: Mirror, attempt: str, error: Exception) -> Exception:
    """What a rank failed with: that a later start took over explains whatever else it met, and is not tried again."""
    try:
        return mirror.overtaken(attempt) or error
    except (OSError, ArrowException):
        # The storage itself is what fails.
        return error


def _gather_places(world_size: int) -> list[Place]:
    """Where all ranks are, by rank; a collective."""
    import torch.distributed as dist

    places: list[Any] = [None] * world_size
    dist.all_gather_object(places, place_here())
    return places


def _begin(job: TrainingJob, rank: int, places: list[Place]) -> tuple[str, Any]:
    """Name this start of all workers, the same on each; returns also why it must not be, or None."""
    import ray
    import torch.distributed as dist

    begun: list[Any] = [None, None]
    if rank == 0:
        generation = new_attempt()
        begin = job.progress.begin.remote(generation, places)
        begun = [generation, ray.get(begin, timeout=HANDOVER_SECONDS)]
    dist.broadcast_object_list(begun, src=0)
    return begun[0], begun[1]


def launch(job: TrainingJob) -> dict[str, Any]:
    """Run ``job`` under Ray Train to its end and return rank 0's final metrics.

    Raises:
        RunFailure: the workers failed more often than ``resources.max_failures``, or in a way that would come again, or
            the run was asked to stop.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from raylm.training.checkpoints.storage import Storage
    from raylm.training.ray_train.board import Board
    from raylm.training.ray_train.fitting import TellBoard
    from raylm.training.ray_train.preemption import NoticingTorchConfig, SaveBeforeResize
    from raylm.training.ray_train.trainer import LeanTrainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_SECONDS))
    # With the driver, which is useless without it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    job.progress = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
    resources = job.config.resources
    environment = worker_environment if job.use_gpu else training_environment
    trainer = LeanTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=NoticingTorchConfig(
            backend="nccl" if job.use_gpu else "gloo", timeout_s=int(resources.collective_timeout_seconds)
        ),
        scaling_config=ScalingConfig(
            num_workers=resources.workers if resources.elastic is None else tuple(resources.elastic),
            elastic_resize_monitor_interval_s=resources.elastic_check_seconds,
            use_gpu=job.use_gpu,
            resources_per_worker=worker_share(resources, use_gpu=job.use_gpu),
        ),
        run_config=RunConfig(
            # A new name for each start: what resumes is our own checkpoints, not Ray Train's bookkeeping.
            name=f"{job.config.run.name}-{job.attempt}",
            storage_path=(Storage(job.storage) / "ray-train").uri,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            worker_runtime_env={"env_vars": environment(resources.cpus_per_worker)},
            callbacks=[
                TellBoard(job.progress),
                *([SaveBeforeResize(job.progress)] if resources.elastic is not None else []),
            ],
        ),
    )
    with _noting_the_end(job), default_environment(shown_on_dashboard()):
        return _fit(job, trainer)


def _fit(job: TrainingJob, trainer: TorchTrainer) -> dict[str, Any]:
    from raylm.training.ray_train.fitting import Fitting

    with deferred() as signals:
        watch = Watch(job, signals)
        with Fitting(trainer, job.progress) as fitting:
            watch.show(fitting)
            # Long enough for the workers' resources to be free again; without a dashboard Ray Train's controller then
            # waits ten seconds more for an answer that cannot come, and nothing of it is needed.
            fitting.wait(RELEASE_SECONDS)
        final = _final(job, fitting, watch)
        if signals.received is not None and "failure" in final:
            print(f"{job.stage}: {final['failure']}", file=sys.stderr, flush=True)
    if "failure" in final:
        raise RunFailure(final["failure"])
    return final


def _final(job: TrainingJob, fitting: Fitting, watch: Watch) -> dict[str, Any]:
    """Rank 0's final metrics, with ``failure`` where it ended before the last step."""
    import ray

    first = ray.get(job.progress.first_failure.remote(), timeout=HANDOVER_SECONDS)
    latest = ray.get(job.progress.latest.remote(), timeout=HANDOVER_SECONDS)
    if (error := fitting.error) is not None or (first is not None and first.kind == "fatal"):
        watch.keep_logs(latest["losses"])
        lost = ray.get(job.progress.lost.remote(), timeout=HANDOVER_SECONDS)
        raise RunFailure(_explain(error, first, lost) + watch.where_logs_are()) from error
    # Ray Train keeps the metrics of reports with a checkpoint only; ours are not its checkpoints.
    if (final := latest.get("final")) is None:
        raise RunFailure(f"{job.directory}: the workers ended without a result")
    return {**final, "restarts": latest["restarts"]}


@contextlib.contextmanager
def _noting_the_end(job: TrainingJob) -> Iterator[None]:
    """Write an end that is no success into the run's events."""
    try:
        yield
    except (RunFailure, KeyboardInterrupt) as error:
        failed = isinstance(error, RunFailure)
        lines = read_metrics(job.directory / METRICS)
        append_event(
            job.directory,
            {
                "kind": "failure" if failed else "interrupted",
                "step": lines[-1]["step"] if lines else 0,
                "text": str(error) if failed else "interrupted; the same command goes on from the last checkpoint",
            },
        )
        raise


def _explain(error: Exception | None, first: Failure | None, lost: str) -> str:
    """The first failing rank's own error, then where its log is.

    Args:
        lost: ranks whose processes died.
    """
    # A rank that died without a word comes before those that lost it in a collective.
    if lost and (first is None or first.kind == "collective"):
        return lost
    if first is not None:
        return f"rank {first.rank}: {first.text} (log: {first.log})"
    # The last line of a traceback is the exception itself.
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
