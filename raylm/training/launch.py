"""Starting a training job on Ray Train and waiting for it.

The driver resolves the layout, starts the workers through Ray Train (which restarts them after failures), shows the
progress that rank 0 sends, and turns a failure into one line with the first failing rank's own error.
"""

from __future__ import annotations

import fcntl
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylm.cluster import worker_environment
from raylm.errors import RunFailure, UserError
from raylm.progress import ProgressBar
from raylm.training.worker import TrainingJob, Worker

POLL_SECONDS = 0.5
HANDOVER_SECONDS = 60.0


def train_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    import ray
    import ray.train

    from raylm.parallel.environment import prepare_deepspeed

    job: TrainingJob = settings["job"]
    prepare_deepspeed(job.use_gpu)
    from raylm.training.loop import TrainingLoop

    context = ray.train.get_context()
    loop = TrainingLoop(job, Worker(context.get_world_rank(), context.get_world_size()))
    if job.progress is not None and context.get_world_rank() == 0:
        job.progress.update.remote({"total_steps": loop.total_steps})
    final = loop.run()
    if job.progress is not None and context.get_world_rank() == 0:
        ray.get(job.progress.update.remote({"final": final}), timeout=HANDOVER_SECONDS)


class ProgressBoard:
    """Ray actor that holds rank 0's latest metrics for the driver."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}

    def update(self, metrics: dict[str, Any]) -> None:
        """Take over ``metrics``."""
        self._latest |= metrics

    def latest(self) -> dict[str, Any]:
        """Everything known so far."""
        return self._latest


def launch(job: TrainingJob, cpus_per_worker: float, max_failures: int) -> dict[str, Any]:
    """Run ``job`` under Ray Train to its end and return rank 0's final metrics.

    Raises:
        RunFailure: the workers failed more often than ``max_failures``.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    job.progress = ray.remote(ProgressBoard).options(num_cpus=0).remote()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if job.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.config.resources.workers,
            use_gpu=job.use_gpu,
            resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if job.use_gpu else {})},
        ),
        run_config=RunConfig(
            # A new name for each start: what resumes is our own checkpoints, not Ray Train's bookkeeping.
            name=f"attempt-{job.attempt}",
            storage_path=str(job.directory / "ray-train"),
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": worker_environment(cpus_per_worker)},
        ),
    )
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            trainer.fit()
        except TrainingFailedError as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    _show_progress(job, thread)
    if (error := outcome.get("error")) is not None:
        failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        rank = min(failures, default=None)
        cause = failures[rank] if rank is not None else error
        where = f"rank {rank}: " if rank is not None else ""
        last = (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
        logs = Path(ray._private.worker._global_node.get_logs_dir_path()) if ray._private.worker._global_node else ""
        raise RunFailure(f"{where}{last} (logs of the workers: {logs})") from None
    # Ray Train keeps the metrics of reports with a checkpoint only; ours are not its checkpoints.
    metrics = ray.get(job.progress.latest.remote(), timeout=HANDOVER_SECONDS).get("final")
    if metrics is None:
        raise RunFailure(f"{job.directory}: the workers ended without a result")
    return metrics


def _show_progress(job: TrainingJob, thread: threading.Thread) -> None:
    import ray

    latest: dict[str, Any] = {}
    while thread.is_alive() and "total_steps" not in latest:
        thread.join(POLL_SECONDS)
        latest = ray.get(job.progress.latest.remote(), timeout=HANDOVER_SECONDS)
    with ProgressBar(job.stage, latest.get("total_steps"), "steps", latest.get("step", 0)) as bar:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            latest = ray.get(job.progress.latest.remote(), timeout=HANDOVER_SECONDS)
            if "step" in latest:
                validation = f" validation {latest['validation_loss']:.4f}" if "validation_loss" in latest else ""
                bar.update(
                    latest["step"],
                    f"loss {latest['loss']:.4f}{validation} {latest['tokens_per_second']:,.0f} tokens/s",
                )


@contextmanager
def exclusive(directory: Path):
    """Hold the run directory, so that two commands never train the same run at once; a dead driver lets go.

    Raises:
        UserError: another command holds it.
    """
    with (directory / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run.name: {directory} is in use by another command that is still running") from None
        yield


def new_attempt() -> str:
    """A token that no other start of the driver has."""
    return uuid.uuid4().hex[:8]
