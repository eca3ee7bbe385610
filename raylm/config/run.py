"""Sections about where a run lives and what it may use: ``run`` and ``resources``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raylm.config.base import (
    LONGEST_SECONDS,
    MOST_WORKERS,
    CountFromZero,
    CountOrAuto,
    MayChange,
    PathText,
    Section,
    Seed,
    Workers,
)

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class RunSection(Section):
    """``run``: the name and place of a run directory, ``<storage>/<name>/``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Directory name of the run. The same name in the same storage resumes."""
    storage: Annotated[PathText, MayChange()] = "./runs"
    """Directory that holds the runs; on several hosts it must be shared by all of them. pretrain and finetune also take
    any URI that Ray Train's storage does, such as ``s3://bucket/runs``."""
    seed: Seed = 0
    """Seed of everything random: initial weights, the order of samples, dropout."""

    @property
    def remote(self) -> bool:
        """Whether ``storage`` is a URI."""
        return "://" in self.storage

    @property
    def directory(self) -> Path:
        """Absolute path of the run directory; of its local mirror where the storage is remote."""
        if self.remote:
            key = hashlib.sha256(self.storage.encode()).hexdigest()[:12]
            return Path("~/.cache/raylm/runs").expanduser() / key / self.name
        return Path(self.storage).expanduser().resolve() / self.name

    @property
    def uri(self) -> str:
        """Path or URI of the run directory itself."""
        if not self.remote:
            return str(self.directory)
        address, mark, query = self.storage.partition("?")
        return f"{address.rstrip('/')}/{self.name}{mark}{query}"


class TrainingRunSection(RunSection):
    """``run`` of pretrain and finetune."""

    trackers: Annotated[list[Tracker], MayChange()] = Field(default=["tensorboard"])
    """Where metrics, configuration and final figures go beside metrics.jsonl: tensorboard (<run>/tensorboard), wandb
    (<run>/wandb; offline, unless WANDB_MODE is set), mlflow (<run>/mlruns, unless MLFLOW_TRACKING_URI is set)."""


class LocalRunSection(RunSection):
    """``run`` of the stages whose storage must be a directory."""

    @field_validator("storage")
    @classmethod
    def _local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("allowed: a local or shared directory; only pretrain and finetune take URIs")
        return value


class TuneRunSection(LocalRunSection, TrainingRunSection):
    """``run`` of tune, whose trials have the trackers."""


class ResourcesSection(Section):
    """``resources``: the worker processes of a stage and what each of them reserves."""

    workers: CountOrAuto = "auto"
    """Number of worker processes; ``auto`` takes every GPU of the cluster, or else every CPU."""
    cpus_per_worker: float = Field(default=1.0, gt=0, le=MOST_WORKERS)
    """CPUs that a worker reserves; a fraction lets several workers share a core."""
    gpus_per_worker: int | Literal["auto"] = "auto"
    """GPUs that a worker holds, 0 or 1; ``auto`` is 1 where the cluster has GPUs."""
    workers_per_node: Workers | None = None
    """Workers of one node, for raylm plan and auto; by default what each node of the cluster holds."""
    memory_per_worker_gb: float | None = Field(default=None, gt=0, le=1e6)
    """Memory of a worker in 10^9 bytes, for raylm plan and auto; by default its GPU's memory, or else its share of the
    node's."""
    measured: PathText | None = None
    """JSON file that ``raylm cluster check --workers N --json`` wrote: figures of this hardware, for raylm plan and
    auto, in place of a data sheet's or of round ones."""
    elastic: list[Workers] | None = Field(default=None, min_length=2, max_length=2)
    """[least, most] workers: training uses as many as the cluster holds and follows its size; off by default."""
    elastic_check_seconds: float = Field(default=60.0, ge=1, le=LONGEST_SECONDS)
    """elastic: seconds between two checks whether the cluster holds more workers."""
    node_wait_seconds: float = Field(default=900.0, ge=1, le=LONGEST_SECONDS)
    """Longest wait for nodes that the cluster's autoscaler starts for the workers, or starts in place of lost ones."""
    max_failures: CountFromZero = 3
    """Restarts from the last checkpoint after workers died; then the run fails."""
    collective_timeout_seconds: float = Field(default=600.0, ge=1, le=LONGEST_SECONDS)
    """Longest wait for other workers in a collective operation. After it, all ranks write their stacks and restart."""
    heartbeat_seconds: float | None = Field(default=60.0, ge=5, le=LONGEST_SECONDS)
    """Longest time without a sign of life from a worker. After it, the worker counts as hung and all restart. null
    turns this off."""

    @model_validator(mode="after")
    def _elastic(self) -> ResourcesSection:
        if self.elastic is not None:
            least, most = self.elastic
            if not 1 <= least <= most:
                raise ValueError(f"elastic: found {self.elastic}, allowed: [least, most] with 1 <= least <= most")
            if self.workers != "auto":
                raise ValueError(f"workers: found {self.workers}, allowed with elastic: auto")
        return self

    @field_validator("gpus_per_worker")
    @classmethod
    def _zero_or_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value not in (0, 1):
            raise ValueError("allowed: 0, 1 or auto")
        return value
