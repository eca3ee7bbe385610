"""How long each step of a model takes, forward and backward, on this machine: what stages can be balanced by.

In: a model's outline, its weights, and a micro-batch. Out: seconds of each step, found by making the steps one after
the other on one rank alone. Steps of one kind (all blocks of most families) are measured once. What the ranks send each
other is left out: it is the same for every block.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from raylm.models.families.base import Outline
from raylm.models.weights import Weights
from raylm.parallel.engines.filling import fill
from raylm.parallel.layout.pipeline_stages import StageLayer
from raylm.parallel.layout.tensor import TensorGroup, split_loss
from raylm.tasks.objective import Batch, Objective

WARM_UP, REPEATS = 1, 3


class _LoneGroup(TensorGroup):
    """The first rank of a tensor-parallel group whose others are not asked."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        return values


def step_seconds(
    model: PreTrainedModel,
    objective: Objective,
    plan: Outline,
    weights: Weights,
    inputs: Any,
    batch: Batch,
    *,
    tensor: int,
    device: torch.device,
    bf16: bool,
) -> list[float]:
    """Seconds of each step of ``model``, in order; the last one's with the loss.

    Args:
        model: its parameters have no memory; it is not changed.
        inputs: what the first step takes of ``batch``.
        tensor: tensor-parallel ranks, of which the first one's part is measured.
    """
    model, group = copy.deepcopy(model), _LoneGroup(0, tensor)
    steps = plan.steps(model)
    in_order = [*steps.before, *steps.blocks, *steps.after]
    known: dict[Any, tuple[float, Any]] = {}
    seconds, values = [], inputs
    for index, step in enumerate(in_order):
        layer = StageLayer(step, model, plan, group)
        shapes = tuple((tuple(p.shape), getattr(p, "slicing", None)) for p in layer.parameters())
        kind = (step.forward, shapes, tuple(t.shape for t in _tensors(values)), index == len(in_order) - 1)
        if kind not in known:
            fill(layer, {parameter: name for name, parameter in layer.model_parameters()}, weights, device)
            layer.to(dtype=torch.bfloat16 if bf16 else torch.float32).train()

            def finish(outputs: Any, *, last: bool = kind[-1]) -> Any:
                if not last:
                    return outputs
                return split_loss(objective, outputs, batch["targets"], group, model.config.vocab_size)

            known[kind] = _measure(layer, values, finish, device)
        found, values = known[kind]
        seconds.append(found)
    return seconds


def _measure(layer: StageLayer, values: Any, finish: Callable, device: torch.device) -> tuple[float, Any]:
    times = []
    for _ in range(WARM_UP + REPEATS):
        arrived = [t.detach().requires_grad_(t.is_floating_point()) for t in _tensors(values)]
        _synchronize(device)
        began = time.perf_counter()
        outputs = layer(tuple(arrived) if isinstance(values, tuple) else arrived[0])
        sent = [t for t in _tensors(finish(outputs)) if t.requires_grad]
        torch.autograd.backward(sent, [torch.ones_like(t) for t in sent])
        _synchronize(device)
        times.append(time.perf_counter() - began)
        layer.zero_grad()
    detached = tuple(t.detach() for t in _tensors(outputs))
    return statistics.median(times[WARM_UP:]), detached if isinstance(outputs, tuple) else detached[0]


def _tensors(values: Any) -> tuple[torch.Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
