"""What a training process is told about its place, whether Ray Train or a Ray Tune trial started it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylm.config.stages import TrainConfig


@dataclass
class TrainingJob:
    """Everything that is the same on every rank; it travels to the workers by pickle.

    Attributes:
        config: the resolved configuration, ``parallel.data`` and ``micro_batch_size`` as numbers.
        stage: pretrain or finetune.
        directory: the run directory.
        data_directory: the prepared training and validation shards.
        tokenizer_directory: the tokenizer's Hugging Face directory.
        model_source: directory or hub name to start from; None for a new model.
        use_gpu: whether each worker holds a GPU.
        attempt: token of this start of the driver.
        progress: Ray actor handle with an ``update`` method, or None.
    """

    config: TrainConfig
    stage: str
    directory: Path
    data_directory: Path
    tokenizer_directory: Path
    model_source: str | None
    use_gpu: bool
    attempt: str
    progress: Any = None


@dataclass
class Worker:
    """One rank of a running job.

    Attributes:
        report: called by every rank with the metrics at evaluations and at the end.
    """

    rank: int
    world_size: int
    report: Callable[[dict[str, Any]], None] = field(default=lambda metrics: None)


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
