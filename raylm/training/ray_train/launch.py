"""Starting a training job on Ray Train and waiting for it.

The driver resolves the layout, starts the workers through Ray Train (which restarts them after failures), shows the
progress that rank 0 sends, and turns a failure into one line with the first failing rank's own error.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from raylm.cluster.environment import training_environment, worker_environment
from raylm.errors import RunFailure
from raylm.interrupts import Deferred, deferred
from raylm.progress import Activity, ProgressBar
from raylm.training.checkpoints.mirror import METRICS
from raylm.training.loop.worker import TrainingJob, Worker
from raylm.training.reports.events import append_event
from raylm.training.reports.metrics import read_metrics

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from raylm.training.ray_train.board import Failure
    from raylm.training.ray_train.fitting import Fitting

POLL_SECONDS = 0.5
HANDOVER_SECONDS = 60.0
RELEASE_SECONDS = 3.0
# Within which the workers are to save a checkpoint and end, after the driver was told to.
STOP_SECONDS = 120.0


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
    from raylm.training.checkpoints.mirror import Mirror
    from raylm.training.checkpoints.storage import Storage
    from raylm.training.loop.training_loop import TrainingLoop
    from raylm.training.ray_train.health import HealthMonitor
    from raylm.training.ray_train.preemption import Notices

    generation, forbidden = _begin(job, rank, world_size)
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
            mirror.fetch_data()
            doing("building the model")
            loop = TrainingLoop(job, worker)
            if rank == 0:
                job.progress.update.remote({"total_steps": loop.total_steps})
            final = loop.run()
        except Exception as error:
            health.fail(error)
            with contextlib.suppress(OSError):
                mirror.send(str(health.log.relative_to(job.directory)))
            raise
    if rank == 0:
        ray.get(job.progress.update.remote({"final": final}), timeout=HANDOVER_SECONDS)


def _begin(job: TrainingJob, rank: int, world_size: int) -> tuple[str, Any]:
    """Name this start of all workers, the same on each; returns also why it must not be, or None."""
    import ray
    import torch.distributed as dist

    begun: list[Any] = [None, None]
    if rank == 0:
        generation = new_attempt()
        begin = job.progress.begin.remote(generation, world_size)
        begun = [generation, ray.get(begin, timeout=HANDOVER_SECONDS)]
    dist.broadcast_object_list(begun, src=0)
    return begun[0], begun[1]


def launch(
    job: TrainingJob,
    cpus_per_worker: float,
    max_failures: int,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run ``job`` under Ray Train to its end and return rank 0's final metrics.

    Args:
        on_evaluation: called with the metrics of each step that was evaluated.

    Raises:
        RunFailure: the workers failed more often than ``max_failures``, or in a way that would come again, or the run
            was asked to stop.
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
            resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if job.use_gpu else {})},
        ),
        run_config=RunConfig(
            # A new name for each start: what resumes is our own checkpoints, not Ray Train's bookkeeping.
            name=f"attempt-{job.attempt}",
            storage_path=(Storage(job.storage) / "ray-train").uri,
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": environment(cpus_per_worker)},
            callbacks=[
                TellBoard(job.progress),
                *([SaveBeforeResize(job.progress)] if resources.elastic is not None else []),
            ],
        ),
    )
    with _noting_the_end(job):
        return _fit(job, trainer, on_evaluation)


def _fit(
    job: TrainingJob, trainer: TorchTrainer, on_evaluation: Callable[[dict[str, Any]], None] | None
) -> dict[str, Any]:
    from raylm.training.ray_train.fitting import Fitting

    with deferred() as signals:
        with Fitting(trainer, job.progress) as fitting:
            _show_progress(job, fitting, signals, on_evaluation)
            # Long enough for the workers' resources to be free again; without a dashboard Ray Train's controller then
            # waits ten seconds more for an answer that cannot come, and nothing of it is needed.
            fitting.wait(RELEASE_SECONDS)
        final = _final(job, fitting)
        if signals.received is not None and "failure" in final:
            print(f"{job.stage}: {final['failure']}", file=sys.stderr, flush=True)
    if "failure" in final:
        raise RunFailure(final["failure"])
    return final


def _final(job: TrainingJob, fitting: Fitting) -> dict[str, Any]:
    """Rank 0's final metrics, with ``failure`` where it ended before the last step."""
    import ray

    first = ray.get(job.progress.first_failure.remote(), timeout=HANDOVER_SECONDS)
    latest = ray.get(job.progress.latest.remote(), timeout=HANDOVER_SECONDS)
    if (error := fitting.error) is not None or (first is not None and first.kind == "fatal"):
        raise RunFailure(_explain(error, first)) from error
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


def _explain(error: Exception | None, first: Failure | None) -> str:
    """The first failing rank's own error, then where its log is."""
    import ray
    from ray.train.v2.api.exceptions import WorkerGroupError

    # A rank that died without a word comes before those that lost it in a collective.
    if isinstance(error, WorkerGroupError) and (first is None or first.kind == "collective"):
        lost = [rank for rank, failure in error.worker_failures.items() if type(failure).__name__.startswith("Worker")]
        if lost:
            logs = ray._private.worker._global_node.get_logs_dir_path()
            return f"rank {min(lost)}: the worker process died (logs of the workers: {logs})"
    if first is not None:
        return f"rank {first.rank}: {first.text} (log: {first.log})"
    # The last line of a traceback is the exception itself.
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _show_progress(
    job: TrainingJob,
    fitting: Fitting,
    signals: Deferred,
    on_evaluation: Callable[[dict[str, Any]], None] | None,
) -> None:
    import ray

    latest: dict[str, Any] = {"restarts": []}
    noted, evaluated, deadline = 0, 0, float("inf")

    def poll() -> None:
        nonlocal latest, noted, evaluated, deadline
        fitting.wait(POLL_SECONDS)
        latest = ray.get(job.progress.latest.remote(), timeout=HANDOVER_SECONDS)
        for event in ray.get(job.progress.events.remote(noted), timeout=HANDOVER_SECONDS):
            print(f"{job.stage}: {event['text']}", file=sys.stderr, flush=True)
            append_event(job.directory, event)
            noted += 1
        if on_evaluation is not None:
            for metrics in ray.get(job.progress.evaluations.remote(evaluated), timeout=HANDOVER_SECONDS):
                on_evaluation(metrics)
                evaluated += 1
        if (number := signals.received) is not None:
            if "total_steps" not in latest or "finishing" in latest:
                # No step was made, or the last one, which was saved.
                raise KeyboardInterrupt
            if deadline == float("inf"):
                deadline = time.monotonic() + STOP_SECONDS
                job.progress.stop.remote(number.name)
                text = "saving a checkpoint, then ending; Ctrl-C once more ends at once"
                print(f"{job.stage}: {text}", file=sys.stderr, flush=True)
            if time.monotonic() > deadline:
                raise RunFailure(f"{number.name}: the workers did not end within {STOP_SECONDS:.0f} s")

    with Activity(f"{job.stage}: starting {_workers(job)}") as activity:
        while fitting.running() and "total_steps" not in latest:
            poll()
            if "doing" in latest:
                activity.change(f"{job.stage}: {latest['doing']}")
    with ProgressBar(job.stage, latest.get("total_steps"), "steps", latest.get("step", 0)) as bar:
        while fitting.running() and "final" not in latest:
            poll()
            if "step" in latest:
                bar.update(latest["step"], _note(latest))


def _workers(job: TrainingJob) -> str:
    count = job.config.resources.workers
    return "workers" if count == "auto" else f"{count} worker{'s' if count != 1 else ''}"


def _note(latest: dict[str, Any]) -> str:
    """The latest figures, or what is done after the last step."""
    if "finishing" in latest:
        return latest["finishing"]
    validation = f", validation loss {latest['validation_loss']:.4f}" if "validation_loss" in latest else ""
    return f"loss {latest['loss']:.4f}{validation}, {latest['tokens_per_second']:,.0f} tokens/s"


def new_attempt() -> str:
    """A token that no other start of the driver has."""
    return uuid.uuid4().hex[:8]
