"""The driver's watch over a running job: progress on the screen, events and logs in the run directory, signals.

In: the board, which knows of the workers. Out: lines for people, ``events.jsonl``, the logs of workers that failed, and
an end where the workers find no places any more, or do not end when they are told to.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from pyarrow.lib import ArrowException

from raylm.cluster.capacity import live_places
from raylm.errors import RunFailure
from raylm.interrupts import Deferred
from raylm.progress import Activity, ProgressBar
from raylm.tasks.measures import measured, shown
from raylm.training.checkpoints.mirror import Mirror
from raylm.training.checkpoints.storage import Storage
from raylm.training.loop.worker import TrainingJob
from raylm.training.ray_train.places import LOGS, keep_logs
from raylm.training.reports.events import append_event

if TYPE_CHECKING:
    from raylm.training.ray_train.fitting import Fitting

POLL_SECONDS = 0.5
HANDOVER_SECONDS = 60.0
# Within which the workers are to save a checkpoint and end, after the driver was told to.
STOP_SECONDS = 120.0
# Workers that start again are told of where that takes longer.
UNPLACED_SECONDS = 5.0
# Between two copies of the logs to remote storage.
SEND_SECONDS = 60.0


class Watch:
    """Of one job, until it ends.

    Args:
        signals: those that the driver got and holds back.
    """

    def __init__(self, job: TrainingJob, signals: Deferred) -> None:
        self._job, self._signals = job, signals
        self._mirror = Mirror(Storage(job.storage), job.directory)
        self._latest: dict[str, Any] = {"restarts": []}
        self._noted = self._lost = 0
        self._deadline, self._waits, self._sent = float("inf"), "", time.monotonic()
        self._kept: list[str] = []

    def show(self, fitting: Fitting) -> None:
        """Until ``fitting`` ends, or rank 0 has its result.

        Raises:
            RunFailure: the workers have no places any more, or did not end when they were told to.
        """
        stage = self._job.stage
        with Activity(f"{stage}: starting {_workers(self._job)}") as activity:
            while fitting.running() and "total_steps" not in self._latest:
                self._poll(fitting)
                if "doing" in self._latest:
                    activity.change(f"{stage}: {self._latest['doing']}")
        with ProgressBar(stage, self._latest.get("total_steps"), "steps", self._latest.get("step", 0)) as bar:
            while fitting.running() and "final" not in self._latest:
                self._poll(fitting)
                if "step" in self._latest:
                    bar.update(self._latest["step"], describe_latest(self._latest))

    def keep_logs(self, losses: int) -> None:
        """Have the logs of the ranks that failed in the run directory, and in its storage.

        Args:
            losses: how many ranks have failed so far.
        """
        if losses > self._lost:
            new = self._ask("losses", self._lost)
            self._kept += keep_logs(new, self._job.directory)
            self._lost += len(new)
            self._send_logs()

    def where_logs_are(self) -> str:
        """Words for the end of a message; empty where no rank has left any."""
        return f"; logs of the worker: {self._mirror.storage / self._kept[-1]}" if self._kept else ""

    def _ask(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._job.progress, method).remote(*arguments), timeout=HANDOVER_SECONDS)

    def _say(self, text: str) -> None:
        print(f"{self._job.stage}: {text}", file=sys.stderr, flush=True)

    def _poll(self, fitting: Fitting) -> None:
        fitting.wait(POLL_SECONDS)
        self._latest = self._ask("latest")
        for event in self._ask("events", self._noted):
            self._say(event["text"])
            append_event(self._job.directory, event)
            self._noted += 1
        self.keep_logs(self._latest["losses"])
        if time.monotonic() - self._sent > SEND_SECONDS:
            self._send_logs()
        self._check_places()
        self._answer_signals()

    def _send_logs(self) -> None:
        self._sent = time.monotonic()
        # The next copy may go through; what ends the run is what rank 0 cannot write.
        with contextlib.suppress(OSError, ArrowException):
            self._mirror.send(LOGS)

    def _check_places(self) -> None:
        """Say that workers which ran before wait for a node in place of a lost one, and end where none comes."""
        seconds = self._latest["unplaced_seconds"] or 0.0
        resources = self._job.config.resources
        if seconds < UNPLACED_SECONDS:
            self._waits = ""
            return
        held = resources.model_copy(update={"gpus_per_worker": int(self._job.use_gpu)})
        if live_places(held) >= (resources.workers if resources.elastic is None else resources.elastic[0]):
            # They are only being started.
            return
        longest = resources.node_wait_seconds
        lost = self._ask("lost") or "they failed"
        what = f"places for {_workers(self._job)} again ({lost})"
        if seconds > longest:
            raise RunFailure(
                f"resources.node_wait_seconds: after {longest:g} s the cluster has no {what}; the same command goes on"
            )
        # Which node was lost is known after a while.
        if self._waits != lost:
            self._waits = lost
            self._say(f"waiting up to {longest:g} s for {what}")

    def _answer_signals(self) -> None:
        number = self._signals.received
        if number is None:
            return
        if "total_steps" not in self._latest or "finishing" in self._latest:
            # No step was made, or the last one, which was saved.
            raise KeyboardInterrupt
        if self._deadline == float("inf"):
            self._deadline = time.monotonic() + STOP_SECONDS
            self._job.progress.stop.remote(number.name)
            self._say("saving a checkpoint, then ending; Ctrl-C once more ends at once")
        if time.monotonic() > self._deadline:
            raise RunFailure(f"{number.name}: the workers did not end within {STOP_SECONDS:.0f} s")


def _workers(job: TrainingJob) -> str:
    count = job.config.resources.workers
    return "workers" if count == "auto" else f"{count} worker{'s' if count != 1 else ''}"


def describe_latest(latest: dict[str, Any]) -> str:
    """The latest figures, or what is done after the last step."""
    if "finishing" in latest:
        return latest["finishing"]
    validation = f", validation loss {latest['validation_loss']:.4f}" if "validation_loss" in latest else ""
    validation += "".join(f", {one.name} {shown(metric, latest[metric])}" for metric, one in measured(latest).items())
    saved = f", saved at step {latest['checkpoint_step']}" if latest.get("checkpoint_step") else ""
    return f"loss {latest['loss']:.4f}{validation}, {latest['tokens_per_second']:,.0f} tokens/s{saved}"
