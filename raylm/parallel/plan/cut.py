"""A layout as numbers: what its memory and its communication follow from."""

from __future__ import annotations

from dataclasses import dataclass

# Of each of the two buckets in which data-parallel gradients and weights travel on a GPU while others are computed.
BUCKET_ELEMENTS = 100_000_000


@dataclass(frozen=True)
class Cut:
    """What of a layout decides a rank's memory; the names are those of ``parallel`` and ``training``.

    Attributes:
        data: replicas.
        accumulation: micro-batches of a step on each replica.
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
