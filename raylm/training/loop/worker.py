"""What a training process is told about its place, whether Ray Train or a Ray Tune trial started it."""

from __future__ import annotations

import datetime
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.config.stages import TrainConfig
from raylm.training.reports.events import append_event

if TYPE_CHECKING:
    from raylm.training.ray_train.preemption import Notice


def new_attempt() -> str:
    """A token that no other start has, of the driver or of its workers."""
    return uuid.uuid4().hex[:8]


@dataclass(frozen=True)
class Turn:
    """A part of a run, which ends with a checkpoint that the next one goes on from.

    Attributes:
        first: step that a checkpoint has to be there of, or of a later one; 0 is the beginning.
        last: step at which training pauses, unless it is done before.
        exports: whether the weights are exported there, as at the end of training.
    """

    first: int
    last: int
    exports: bool = False


@dataclass
class TrainingJob:
    """Everything that is the same on every rank; it travels to the workers by pickle.

    Attributes:
        config: the resolved configuration, ``parallel.data`` and ``micro_batch_size`` as numbers.
        stage: pretrain or finetune.
        directory: the run directory; where ``storage`` is remote, its local mirror.
        storage: path or URI of the run.
        data_directory: the prepared training and validation shards.
        tokenizer_directory: the tokenizer's Hugging Face directory.
        model_source: directory or hub name to start from; None for a new model.
        use_gpu: whether each worker holds a GPU.
        attempt: token of this start of the driver.
        progress: handle of the :class:`~raylm.training.ray_train.board.Board` actor, or None.
        turn: the part of the run that is made; by default all of it.
    """

    config: TrainConfig
    stage: str
    directory: Path
    storage: str
    data_directory: Path
    tokenizer_directory: Path
    model_source: str | None
    use_gpu: bool
    attempt: str
    progress: Any = None
    turn: Turn | None = None

    def note(self, kind: str, step: int, text: str) -> None:
        """Have an event of the run written down (:mod:`raylm.training.reports.events`); called on rank 0."""
        if self.progress is not None:
            self.progress.note.remote(kind, step, text)
        else:
            append_event(self.directory, {"kind": kind, "step": step, "text": text})


@dataclass
class Worker:
    """One rank of a running job.

    Attributes:
        report: called by every rank with the metrics at evaluations and at the end.
        generation: token of this start of the workers, the same on all ranks.
        progress: called with the number of steps made.
        notice: whether something is about to be stopped; called by all ranks at the same steps. 0 is no.
        saved: called on rank 0 when what a notice asked for is saved.
        memory_bytes: of all ranks, by rank, as far as known.
        device: number of its GPU among those that the process sees; None where Ray Train knows it.
    """

    rank: int
    world_size: int
    report: Callable[[dict[str, Any]], None] = field(default=lambda metrics: None)
    generation: str = field(default_factory=new_attempt)
    progress: Callable[[int], None] = field(default=lambda step: None)
    notice: Callable[[], Notice | int] = field(default=lambda: 0)
    saved: Callable[[], Any] = field(default=lambda: None)
    memory_bytes: Callable[[], list[int]] = field(default=list)
    device: int | None = None


def join_single_process_group(timeout_seconds: float = 600.0) -> None:
    """A process group of one, for a trial that trains inside itself; needs no port."""
    import torch.distributed as dist

    # DeepSpeed reads these even where the group exists already.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo",
            rank=0,
            world_size=1,
            store=dist.HashStore(),
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
