"""How a run is laid out over its workers, in numbers: what its memory and its communication follow from."""

from __future__ import annotations

from dataclasses import dataclass

# Of each of the two buckets in which data-parallel gradients and weights travel on a GPU while others are computed.
BUCKET_ELEMENTS = 100_000_000


@dataclass(frozen=True)
class Layout:
    """How a run is laid out; the names are those of ``parallel`` and ``training``, each ``auto`` decided.

    Attributes:
        data: replicas.
        accumulation: micro-batches of a step on each replica.
        use_gpu: whether each worker holds a GPU.
        trained: share of the parameters that is trained, the others have neither gradients nor moments.
        averaged: whether an average of what is trained is kept.
        packed: share of the parameters that is kept in 4 bits.
        unpacked: elements of the largest of these, which is whole while it is multiplied by.
    """

    data: int
    tensor: int
    pipeline: int
    zero_stage: int
    micro_batch_size: int
    accumulation: int
    activation_checkpointing: bool
    bf16: bool
    optimizer: str
    use_gpu: bool = False
    trained: float = 1.0
    averaged: bool = False
    packed: float = 0.0
    unpacked: int = 0

    @property
    def workers(self) -> int:
        """Processes: data x tensor x pipeline."""
        return self.data * self.tensor * self.pipeline

    @property
    def precision(self) -> str:
        """fp32 or bf16."""
        return "bf16" if self.bf16 else "fp32"

    @property
    def warning(self) -> str:
        """What is allowed but slow; empty where nothing is."""
        if self.accumulation >= self.pipeline:
            return ""
        return (
            f"{self.accumulation} micro-batches for {self.pipeline} pipeline stages: some are never at work together; "
            "a smaller parallel.micro_batch_size, or a larger training.batch_size, helps"
        )
