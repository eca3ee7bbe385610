"""Memory of the fullest rank of a layout: weights, gradients, optimizer, activations, logits.

Activations and logits come from the model's own code (:mod:`raylm.parallel.footprint`), cut into the stages and parts
that the engines make. What DeepSpeed holds beside them follows Rajbhandari et al. 2020 ("ZeRO", section 3), with the
buffers of its implementation added.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from raylm.models.families import auto_class
from raylm.objectives.base import Objective, ObjectiveModule
from raylm.parallel.cut import Cut
from raylm.parallel.footprint import Footprint, measure

FP32 = 4
# ZeRO 3, in elements: stage3_max_live_parameters and reduce_bucket_size of DeepSpeed.
GATHERED_LIMIT, BUCKET_LIMIT = 1_000_000_000, 500_000_000
# What glibc's malloc keeps of blocks that come and go, as a share of them: measured, tests/benchmarks/plan_memory.py.
# Handing each back to the system instead (MALLOC_MMAP_THRESHOLD_=131072) keeps nothing, and is 1.3 to 1.7 times slower.
ALLOCATOR_SHARE = 0.6
MOMENTS = {"adamw": 2, "muon": 2, "sgd": 1}


@dataclass(frozen=True)
class StageMemory:
    """What one rank of a pipeline stage (of the only one, without a pipeline) holds.

    Attributes:
        parameters: how many it holds before ZeRO shards them.
        footprint: of one micro-batch.
        in_flight: micro-batches whose activations it keeps at a time.
        reduced: bytes that it adds up with the other tensor-parallel ranks for one micro-batch, forward and backward.
        sent: bytes of activations that it sends to the next stage for one micro-batch; as many gradients come back.
    """

    parameters: int
    footprint: Footprint
    in_flight: int
    reduced: int
    sent: int


def stage_memories(config: PretrainedConfig, objective: Objective, sequence_length: int, cut: Cut) -> list[StageMemory]:
    """Every stage's parameters and activations, found without allocating either."""
    dtype = torch.bfloat16 if cut.bf16 else torch.float32
    with FakeTensorMode():
        model = auto_class(objective.head).from_config(config, dtype=dtype).train()
        length, target_length = objective.lengths(sequence_length)
        batch = {
            "input_ids": torch.zeros((cut.micro_batch_size, length), dtype=torch.long),
            "targets": torch.zeros((cut.micro_batch_size, target_length or length), dtype=torch.long),
        }
        if cut.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if cut.tensor * cut.pipeline == 1:
            group = None
            stages: list[nn.Module] = [_Whole(ObjectiveModule(model, objective))]
            values: Any = tuple(batch.values())
        else:
            group = _lone_group(cut.tensor)
            stages = _stages(model, cut, batch["targets"], group)
            values = tuple(objective.inputs(batch, model.config).values())
        width = -(-config.vocab_size // cut.tensor)
        found, before = [], 0
        for number, stage in enumerate(stages):
            footprint, values = measure(stage, values if isinstance(values, tuple) else (values,), width)
            in_flight = min(cut.pipeline - number, cut.accumulation)
            sent = sum(t.nbytes for t in tree_leaves(values)) if number < cut.pipeline - 1 else 0
            reduced, before = (group.added - before, group.added) if group is not None else (0, 0)
            parameters = sum(p.numel() for p in stage.parameters())
            found.append(StageMemory(parameters, footprint, in_flight, reduced, sent))
    return found


class _Whole(nn.Module):
    """A model in its objective, called with ``input_ids`` and ``targets``."""

    def __init__(self, module: ObjectiveModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.module(input_ids=input_ids, targets=targets)


class _Stage(nn.Module):
    """One pipeline stage: its layers, and the loss after the last one's."""

    def __init__(self, layers: list[nn.Module], loss: Any = None) -> None:
        super().__init__()
        self.layers, self._loss = nn.ModuleList(layers), loss

    def forward(self, *values: torch.Tensor) -> Any:
        result: Any = values[0] if len(values) == 1 else values
        for layer in self.layers:
            result = layer(result)
        return self._loss(result) if self._loss is not None else result


def _lone_group(size: int) -> Any:
    """The first rank of a tensor-parallel group whose others are not there: what they would add changes no size."""
    from raylm.parallel.tensor import TensorGroup

    class Lone(TensorGroup):
        added = 0

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            self.added += values.nbytes
            return values

        def maximum(self, values: torch.Tensor) -> torch.Tensor:
            return self.sum(values)

    return Lone(0, size)


def _stages(model: Any, cut: Cut, targets: torch.Tensor, group: Any) -> list[nn.Module]:
    """The stages that the pipeline engine makes, with the first tensor-parallel rank's parts."""
    from raylm.parallel.families import PLANS
    from raylm.parallel.stages import StageLayer, balanced_stages, step_weights
    from raylm.parallel.tensor import vocabulary_cross_entropy

    plan = PLANS[model.config.model_type]
    steps = plan.steps(model)
    in_order = [*steps.before, *steps.blocks, *steps.after]
    bounds = balanced_stages(steps, step_weights(model, in_order), cut.pipeline)
    vocab_size = model.config.vocab_size
    ties: dict[str, nn.Module] = {}
    stages: list[nn.Module] = []
    for number, (first, stop) in enumerate(pairwise(bounds)):
        layers: list[nn.Module] = []
        ties.clear()
        for step in in_order[first:stop]:
            layer = StageLayer(step, model, plan, group)
            if step.tied is not None:
                key = next(iter(step.modules.values()))
                if key in ties:
                    # A stage that uses a tied weight twice holds it once.
                    layer.embedding = ties[key].embedding
                ties[key] = layer
            layers.append(layer)
        last = number == cut.pipeline - 1
        loss = (lambda logits: vocabulary_cross_entropy(logits, targets, group, vocab_size)) if last else None
        stages.append(_Stage(layers, loss))
    return stages


def rank_bytes(stage: StageMemory, cut: Cut, *, use_gpu: bool) -> dict[str, float]:
    """Bytes of one rank at the moment when they are the most, by kind."""
    low = 2 if cut.bf16 else FP32
    parameters, data, zero = stage.parameters, cut.data, cut.zero_stage
    weights = parameters * low / (data if zero == 3 else 1)
    # ZeRO keeps an fp32 copy of its share of the weights beside the moments.
    optimizer = parameters * FP32 * (MOMENTS[cut.optimizer] + (1 if zero else 0)) / (data if zero else 1)
    gradients = parameters * low / (data if zero >= 2 else 1)
    if cut.accumulation > 1 or zero >= 2:
        # Gradients of the micro-batches before are there when this one's activations are the most.
        now = stage.footprint.without_gradients
    else:
        now = stage.footprint.peak
        gradients = now["gradients"]
    gathered = 0.0
    if zero == 3:
        # DeepSpeed's limits on gathered weights and on gradients that wait to be reduced, in elements.
        gathered = min(parameters, GATHERED_LIMIT) * low
        gradients += min(parameters, BUCKET_LIMIT) * low
    activations = now["activations"] + (stage.in_flight - 1) * stage.footprint.kept
    kinds = {
        "weights": weights + gathered,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "logits": now["logits"],
    }
    if not use_gpu:
        kinds["allocator"] = ALLOCATOR_SHARE * (gathered + gradients + activations + now["logits"])
    return kinds


def traffic_bytes(stage: StageMemory, cut: Cut) -> dict[str, float]:
    """Bytes that one rank sends in a step, by the kind of parallelism; sums travel in rings.

    A ring of n ranks that adds up b bytes sends 2 (n - 1) / n * b from each, and half of that to scatter or to gather.
    Rajbhandari et al. 2020, section 7: ZeRO 1 as much as plain data parallelism, ZeRO 3 half as much again; ZeRO 2 and
    3 reduce, and ZeRO 3 gathers, for every micro-batch.
    """
    low = 2 if cut.bf16 else FP32
    half_ring = (cut.data - 1) / cut.data * stage.parameters * low
    halves = {0: 2, 1: 2, 2: cut.accumulation + 1, 3: 3 * cut.accumulation}[cut.zero_stage]
    return {
        "data": halves * half_ring,
        "tensor": 2 * (cut.tensor - 1) / cut.tensor * stage.reduced * cut.accumulation,
        "pipeline": 2.0 * stage.sent * cut.accumulation,
    }
