"""Memory and communication of a layout: what each rank holds at the moment when it holds the most.

Activations and logits come from the model's own code (:mod:`raylm.parallel.plan.footprint`), cut into the stages and
parts that the engines make. What DeepSpeed holds beside them follows Rajbhandari et al. 2020 ("ZeRO", section 3), with
the buffers of its implementation added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import PretrainedConfig

from raylm.models.families import find_outline
from raylm.models.families.base import Steps
from raylm.models.four_bits import BYTES
from raylm.parallel.layout.pipeline_stages import StageLayer, balanced_stages, step_weights
from raylm.parallel.layout.tensor import TensorGroup, split_loss
from raylm.parallel.plan.footprint import KINDS, Footprint, Passage, Work, chain, measure, whole
from raylm.parallel.plan.layout import BUCKET_ELEMENTS, Layout
from raylm.tasks.chunked import head_loss, most_elements
from raylm.tasks.objective import Batch, Objective, ObjectiveModule

FP32 = 4
# ZeRO 3, in elements: stage3_max_live_parameters of DeepSpeed; and its reduce_bucket_size.
GATHERED_LIMIT, BUCKET_LIMIT = 1_000_000_000, 500_000_000
# Parameters with no more elements stay whole: its stage3_param_persistence_threshold.
WHOLE_ELEMENTS = 100_000
# What an allocator holds beyond what comes and goes, as a share of it; tests/benchmarks/plan_memory.py measures it.
ALLOCATOR_SHARE = 0.05
# A loss in chunks holds the logits of some tokens with their softmax and the gradient.
CHUNK_COPIES = 3
MOMENTS = {"adamw": 2, "muon": 2, "sgd": 1}


@dataclass(frozen=True)
class StageMemory:
    """What one rank of a pipeline stage (of the only one, without a pipeline) holds.

    Attributes:
        parameters: how many it holds before ZeRO shards them.
        largest: elements of its largest parameter.
        footprint: of one micro-batch.
        in_flight: micro-batches whose activations it keeps at a time.
        reduced: bytes that it adds up with the other tensor-parallel ranks for one micro-batch, forward and backward.
        received: bytes of activations that come from the stage before for one micro-batch.
        sent: bytes of activations that it sends to the next stage for one micro-batch; as many gradients come back.
        work: of one micro-batch.
        sums: how often it adds something up with the other tensor-parallel ranks for one micro-batch.
        sharded: how many of its parameters ZeRO 3 shards, each of which is gathered by itself.
    """

    parameters: int
    largest: int
    footprint: Footprint
    in_flight: int
    reduced: int
    received: int
    sent: int
    work: Work
    sums: int = 0
    sharded: int = 0


@dataclass(frozen=True)
class _Segment:
    """Steps that are measured together: those before the blocks, a block, or those after the blocks and the loss."""

    passage: Passage
    sizes: tuple[int, ...]
    reduced: int
    sums: int


@dataclass(frozen=True)
class _Segments:
    """A model as one tensor-parallel rank holds it: ``segments`` in order, and how stages are cut from them.

    ``tied`` is the elements of a weight that the first and the last segment share.
    """

    segments: list[_Segment]
    steps: Steps
    weights: list[float]
    tied: int

    def stages(self, layout: Layout) -> list[StageMemory]:
        """The segments as pipeline stages."""
        before = len(self.steps.before)
        inner = [bound - before + 1 for bound in balanced_stages(self.steps, self.weights, layout.pipeline)[1:-1]]
        found = []
        for number, (first, stop) in enumerate(pairwise([0, *inner, len(self.segments)])):
            segments = self.segments[first:stop]
            passages = [segment.passage for segment in segments]
            sizes = [size for segment in segments for size in segment.sizes]
            if self.tied and layout.pipeline == 1:
                # A stage that uses a tied weight twice holds it once.
                sizes.remove(self.tied)
                element = passages[0].gradients // max(1, sum(segments[0].sizes))
                passages[0] = replace(passages[0], gradients=passages[0].gradients - self.tied * element)
            last = number == layout.pipeline - 1
            found.append(
                StageMemory(
                    parameters=sum(sizes),
                    largest=max(sizes),
                    footprint=chain(passages),
                    in_flight=min(layout.pipeline - number, layout.accumulation),
                    reduced=sum(segment.reduced for segment in segments),
                    received=passages[0].given if number else 0,
                    sent=0 if last else passages[-1].made,
                    work=sum((passage.work for passage in passages), Work()),
                    sums=sum(segment.sums for segment in segments),
                    sharded=_sharded(sizes),
                )
            )
        return found


class ModelMemory:
    """Parameters and activations of a model, cut in whatever way; nothing is allocated, and nothing measured twice."""

    def __init__(self, config: PretrainedConfig, objective: Objective, sequence_length: int, *, bf16: bool) -> None:
        self._config, self._objective, self._length, self._bf16 = config, objective, sequence_length, bf16
        self._segments: dict[tuple[int, bool, int | None], _Segments] = {}
        self._whole: dict[bool, StageMemory] = {}

    def stages(self, layout: Layout) -> list[StageMemory]:
        """What the ranks of each pipeline stage hold."""
        checkpointing, count = layout.activation_checkpointing, layout.micro_batch_size
        if find_outline(self._config.model_type) is None or not self._objective.predicts_tokens:
            if checkpointing not in self._whole:
                self._whole[checkpointing] = self._measure_whole(checkpointing)
            stages = [self._whole[checkpointing]]
        else:
            key = (layout.tensor, checkpointing, most_elements(layout.use_gpu) if self._chunked(layout) else None)
            if key not in self._segments:
                self._segments[key] = self._measure_segments(*key)
            stages = self._segments[key].stages(layout)
        stages = [replace(stage, footprint=stage.footprint.times(count)) for stage in stages]
        if self._chunked(layout):
            most = CHUNK_COPIES * FP32 * most_elements(layout.use_gpu)
            stages = [replace(stage, footprint=stage.footprint.with_logits(most)) for stage in stages]
        # Measured with one sequence; what does not grow with their number (a mask, positions) is small.
        return [
            replace(
                stage,
                reduced=stage.reduced * count,
                received=stage.received * count,
                sent=stage.sent * count,
                work=stage.work.times(count),
            )
            for stage in stages
        ]

    def _chunked(self, layout: Layout) -> bool:
        """Whether the loss is computed from hidden states, some at a time."""
        return self._objective.chunks_logits(self._config) and layout.tensor * layout.pipeline == 1

    def _build(self, checkpointing: bool) -> tuple[Any, Batch]:
        """The model and a batch of one sequence; within a ``FakeTensorMode``."""
        dtype = torch.bfloat16 if self._bf16 else torch.float32
        model = self._objective.head.load_class().from_config(self._config, dtype=dtype).train()
        if checkpointing and model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model, self._objective.example(self._length)

    def _measure_whole(self, checkpointing: bool) -> StageMemory:
        with FakeTensorMode():
            model, batch = self._build(checkpointing)
            sizes = [p.numel() for p in model.parameters()]
            footprint, work = Footprint(dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0), 0), Work()
            module = _Whole(ObjectiveModule(model, self._objective), list(batch))
            # What a model does next may depend on values, which are not there: then only weights are counted.
            with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
                passage, _ = measure(module, tuple(batch.values()), _head_weights(model), _is_causal(model))
                footprint, work = whole(passage), passage.work
        return StageMemory(sum(sizes), max(sizes), footprint, 1, 0, 0, 0, work, sharded=_sharded(sizes))

    def _measure_segments(self, tensor: int, checkpointing: bool, most: int | None) -> _Segments:
        """The parts of the first of ``tensor`` ranks, each different one passed once.

        Args:
            most: elements of the logits at a time, of a loss in chunks.
        """
        with FakeTensorMode():
            model, batch = self._build(checkpointing)
            group, plan = _lone_group(tensor), find_outline(model.config.model_type)
            assert plan is not None
            steps, vocab_size = plan.steps(model), model.config.vocab_size
            weights = step_weights(model, [*steps.before, *steps.blocks, *steps.after])
            given = self._objective.inputs(batch, model.config)
            values: Any = tuple(given[name] for name in plan.inputs)

            def loss(made: torch.Tensor) -> torch.Tensor:
                if most:
                    targets = batch["targets"].flatten()
                    return head_loss(model.get_output_embeddings(), made.flatten(0, 1), targets, most=most)
                return split_loss(self._objective, made, batch["targets"], group, vocab_size)

            # The head, the last step, is a part of a loss in chunks.
            last = steps.after[:-1] if most else steps.after
            parts = [steps.before, *([block] for block in steps.blocks), last]
            known: dict[str, tuple[_Segment, Any]] = {}
            segments, tied = [], 0
            for number, part in enumerate(parts):
                stage = _Stage([StageLayer(step, model, plan, group) for step in part], loss if part is last else None)
                if most and part is last:
                    stage.head = model.get_output_embeddings()
                shapes = [(name, tuple(p.shape)) for name, p in stage.named_parameters()]
                key = str((part is last, [s.forward for s in part], shapes, [(t.shape, t.dtype) for t in values]))
                if key not in known:
                    group.added = group.sums = 0
                    heads = _head_weights(model, None if most else stage) if part is last else []
                    passage, made = measure(stage, values, heads, _is_causal(model))
                    sizes = tuple(p.numel() for p in stage.parameters())
                    known[key] = _Segment(passage, sizes, group.added, group.sums), made
                if number == 0 and steps.before[0].tied is not None:
                    tied = stage.layers[0].get_parameter(steps.before[0].tied).numel()
                segment, made = known[key]
                values = made if isinstance(made, tuple) else (made,)
                segments.append(segment)
        return _Segments(segments, steps, weights, tied)


def _sharded(sizes: Iterable[int]) -> int:
    """How many parameters of these ``sizes`` ZeRO 3 shards."""
    return sum(size > WHOLE_ELEMENTS for size in sizes)


def _head_weights(model: Any, stage: _Stage | None = None) -> list[torch.Tensor]:
    """The weight that makes logits, in ``model`` or as ``stage`` holds it; none where there is no such head."""
    head = model.get_output_embeddings()
    if head is None:
        return []
    if stage is None:
        return [head.weight]
    names = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight is head.weight}
    return [weight for layer in stage.layers for name, weight in layer.model_parameters() if name in names]


def _is_causal(model: Any) -> bool:
    return model.can_generate() and not model.config.is_encoder_decoder


class _Whole(nn.Module):
    """A model in its objective, called with the entries of a batch in order."""

    def __init__(self, module: ObjectiveModule, names: list[str]) -> None:
        super().__init__()
        self.module, self._names = module, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.module(**dict(zip(self._names, values, strict=True)))


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

    class Lone(TensorGroup):
        added = sums = 0

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            self.added += values.nbytes
            self.sums += 1
            return values

        def maximum(self, values: torch.Tensor) -> torch.Tensor:
            return self.sum(values)

    return Lone(0, size)


def held_bytes(parameters: int, layout: Layout) -> dict[str, float]:
    """Bytes that a rank with so many parameters (before ZeRO shards them) holds from one micro-batch to the next."""
    low = 2 if layout.bf16 else FP32
    data, zero, trained = layout.data, layout.zero_stage, parameters * layout.trained
    gradients = trained * low / (data if zero >= 2 else 1)
    # An average of the weights is one more of them.
    moments = MOMENTS[layout.optimizer] + layout.averaged
    if layout.bf16 and layout.tensor * layout.pipeline > 1:
        # Micro-batches are added up in fp32.
        gradients += trained * FP32
    return {
        "weights": parameters * (low + layout.packed * (BYTES - low)) / (data if zero == 3 else 1),
        "gradients": gradients,
        # ZeRO keeps an fp32 copy of its share of the weights beside the moments.
        "optimizer": trained * FP32 * (moments + (1 if zero else 0)) / (data if zero else 1),
    }


def rank_bytes(stage: StageMemory, layout: Layout) -> dict[str, float]:
    """Bytes of one rank at the moment when they are the most, by kind.

    That is in the last micro-batch's pass, or after it, when gradients are added up between the replicas.
    """
    parameters, data, zero, low = stage.parameters, layout.data, layout.zero_stage, 2 if layout.bf16 else FP32
    weights, gradients, optimizer = held_bytes(parameters, layout).values()
    # Gradients are copied into a bucket to be added up between replicas.
    bucket = min(parameters * layout.trained, BUCKET_LIMIT)
    if zero == 0 and data == 1:
        # None is needed; a new gradient of the largest is added to what the micro-batches before gave.
        bucket = stage.largest * layout.trained
    if layout.use_gpu and zero:
        # There memory that is asked for is taken, whether it is filled or not: 4.5 times both buckets with overlap
        # (deepspeed.ai/docs/config-json), which the pipeline has not.
        bucket = (9 if layout.tensor * layout.pipeline == 1 else 2) * BUCKET_ELEMENTS
    # Else gradients of the micro-batches before are there when this one's activations are the most.
    fresh = layout.accumulation == 1 and zero < 2
    now = stage.footprint.without_gradients
    if fresh:
        now = max(now, stage.footprint.peak, key=lambda kinds: sum(kinds.values()))
    # DeepSpeed's limit on gathered weights.
    gathered = min(parameters, GATHERED_LIMIT) * low if zero == 3 else 0
    activations = now["activations"] + (stage.in_flight - 1) * stage.footprint.kept
    if layout.pipeline > 1:
        # What came in is held twice over, in a buffer for each micro-batch; so is what the next stage sends back.
        activations += stage.received * (1 + max(2, stage.in_flight)) + stage.sent
    passed = {
        "weights": weights + gathered + layout.unpacked * low,
        "gradients": now["gradients"] * layout.trained
        if fresh
        else gradients + (bucket * low if zero >= 2 or layout.use_gpu else 0),
        "optimizer": optimizer,
        "activations": activations,
        "logits": now["logits"],
    }
    added_up = {
        "weights": weights,
        "gradients": gradients + bucket * low,
        "optimizer": optimizer,
        "activations": 0.0,
        "logits": 0.0,
    }
    kinds = max(passed, added_up, key=lambda moment: sum(moment.values()))
    come_and_go = sum(kinds.values()) - optimizer - weights
    return kinds | {"allocator": ALLOCATOR_SHARE * come_and_go}


def traffic_bytes(stage: StageMemory, layout: Layout) -> dict[str, float]:
    """Bytes that one rank sends in a step, by the kind of parallelism; sums travel in rings.

    A ring of n ranks that adds up b bytes sends 2 (n - 1) / n * b from each, and half of that to scatter or to gather.
    Rajbhandari et al. 2020, section 7: ZeRO 1 as much as plain data parallelism, ZeRO 3 half as much again; ZeRO 2 and
    3 reduce, and ZeRO 3 gathers, for every micro-batch.
    """
    low = 2 if layout.bf16 else FP32
    half_ring = (layout.data - 1) / layout.data * stage.parameters * low
    if layout.zero_stage < 3:
        half_ring *= layout.trained
    halves = {0: 2, 1: 2, 2: layout.accumulation + 1, 3: 3 * layout.accumulation}[layout.zero_stage]
    return {
        "data": halves * half_ring,
        "tensor": 2 * (layout.tensor - 1) / layout.tensor * stage.reduced * layout.accumulation,
        "pipeline": 2.0 * stage.sent * layout.accumulation,
    }
