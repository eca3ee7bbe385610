"""The time of a step, estimated: what a plan ranks layouts by.

In: what a rank of each pipeline stage computes and sends (:mod:`raylm.parallel.plan.memory`), and what its hardware
gives (:class:`raylm.cluster.hardware.Figures`). A micro-batch takes

    products / FLOP/s + attention / FLOP/s + (bytes made + 4 x weights) / bytes/s     (Williams et al. 2009, as a sum)

where the weights are read twice, and their gradients written and added up: few tokens in a micro-batch leave the
processor waiting for them. It takes at least what starting its operators takes. Recomputation is part of what the
passes were seen to compute. To it come the sums of tensor parallelism, which nothing hides (Shoeybi et al. 2019,
section 3). Stages are as slow as the slowest, and wait (p - 1) / v micro-batches, with v chunks of the model on each
(Narayanan et al. 2021, section 2.2). On GPUs, traffic between replicas hides behind computation, but for a share: that
of ZeRO 3 (and 2) behind every micro-batch, else behind the last backward pass, and with a pipeline behind nothing. Each
kind of traffic has the slowest link that it takes, within a node or between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raylm.cluster.hardware import Figures
from raylm.parallel.plan.layout import Layout
from raylm.parallel.plan.memory import FP32, StageMemory, traffic_bytes

# Of a forward and backward pass, the backward one.
BACKWARD = 2 / 3
# Bytes of a parameter that an update reads and writes: master weight and moments (AdamW) both ways, and the gradient.
UPDATED_BYTES = 7 * FP32


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest rank, and what it computes.

    Attributes:
        computing: forward and backward passes, with what is recomputed.
        tensor: sums over tensor-parallel ranks.
        waiting: for other pipeline stages.
        data: traffic between replicas, as far as nothing hides it.
        pipeline: activations and their gradients between stages.
        updating: the optimizer.
    """

    computing: float
    tensor: float
    waiting: float
    data: float
    pipeline: float
    updating: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.computing + self.tensor + self.waiting + self.data + self.pipeline + self.updating


def bubble(layout: Layout, chunks: int = 1) -> float:
    """Share of the passes in which a pipeline stage waits: (p - 1) / (v m + p - 1)."""
    waiting = layout.pipeline - 1
    return waiting / (chunks * layout.accumulation + waiting)


def step_time(
    stages: Sequence[StageMemory], layout: Layout, figures: Figures, per_node: int, chunks: int = 1
) -> StepTime:
    """Estimated time of a step; see the module.

    Args:
        stages: what a rank of each stage computes and sends, as ``ModelMemory.stages`` gives it for ``layout``.
        per_node: workers of a node.
        chunks: parts of the model on each stage (interleaved schedule); raylm's own pipeline has 1.
    """
    passes = [(_computing(stage, layout, figures), _summing(stage, layout, figures)) for stage in stages]
    computing, tensor = max(passes, key=sum)
    micro_batches = layout.accumulation
    body = (computing + tensor) * micro_batches
    # Ranks are numbered by stage, then replica, then tensor-parallel rank. A ring enters and leaves a node once, and
    # has the shares of the network of all the node's workers that are in it.
    in_ring = max(1, per_node // layout.tensor)
    within = layout.tensor * layout.data <= per_node
    far = min(figures.near_bandwidth, figures.far_bandwidth * in_ring)
    sent = [traffic_bytes(stage, layout) for stage in stages]
    between_replicas = max(kinds["data"] for kinds in sent) / (figures.near_bandwidth if within else far)
    if layout.zero_stage == 3:
        # Weights are gathered one after the other, in each forward and each backward pass.
        sharded = max(stage.sharded for stage in stages)
        between_replicas += 2 * micro_batches * sharded * figures.collective_seconds
    near_stages = layout.workers <= per_node
    between_stages = max(kinds["pipeline"] for kinds in sent)
    hidden = min(between_replicas, _window(layout, computing, body))
    updated = max(stage.parameters for stage in stages) / (layout.data if layout.zero_stage else 1)
    return StepTime(
        computing=computing * micro_batches,
        tensor=tensor * micro_batches,
        waiting=(computing + tensor) * (layout.pipeline - 1) / chunks,
        data=between_replicas - hidden + figures.exposed * hidden,
        pipeline=between_stages / (figures.near_bandwidth if near_stages else figures.far_bandwidth),
        updating=UPDATED_BYTES * updated / figures.memory_bandwidth,
    )


def model_flops(stages: Sequence[StageMemory], layout: Layout) -> float:
    """FLOPs of a step on all workers without what is recomputed, from ``stages`` measured without recomputation."""
    work = sum(stage.work.products + stage.work.attention for stage in stages)
    return work * layout.accumulation * layout.tensor * layout.data


def _computing(stage: StageMemory, layout: Layout, figures: Figures) -> float:
    """Seconds of one micro-batch on a rank of ``stage``."""
    work, weights = stage.work, stage.parameters * (2 if layout.bf16 else FP32)
    busy = work.products / figures.matrix_flops + work.attention / figures.attention_flops
    busy += (work.touched + 4 * weights) / figures.memory_bandwidth
    return max(busy, work.operators * figures.launch_seconds)


def _summing(stage: StageMemory, layout: Layout, figures: Figures) -> float:
    """Seconds in which one micro-batch is summed over tensor-parallel ranks, which are of one node."""
    ring = 2 * (layout.tensor - 1) / layout.tensor * stage.reduced
    return ring / figures.near_bandwidth + stage.sums * figures.collective_seconds


def _window(layout: Layout, computing: float, body: float) -> float:
    """Seconds of computation behind which traffic between replicas hides."""
    if layout.pipeline > 1:
        return 0.0
    if layout.zero_stage == 3:
        return body
    return BACKWARD * (body if layout.zero_stage == 2 else computing)
