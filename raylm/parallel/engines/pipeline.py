"""The pipeline- and tensor-parallel engine: DeepSpeed's 1F1B pipeline over Hugging Face blocks, cut for this rank.

In: a model's outline, an optimizer over its parameters, and micro-batches of this rank's data-parallel replica. Out:
the same as from the data-parallel engine. Processes are numbered by stage, then replica, then tensor-parallel rank, so
that those which talk most are next to each other. ZeRO 0 and 1.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from types import MethodType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn
from transformers import PreTrainedModel

from raylm.models.families import find_outline
from raylm.models.families.base import Step
from raylm.models.families.build import has_dropout
from raylm.parallel.engines.attention import attend_in_fp32
from raylm.parallel.engines.base import (
    EngineSettings,
    MakeOptimizer,
    StepResult,
    Validation,
    call_after_step,
    count_batch,
    deepspeed_config,
    mean_loss,
    refresh_working,
    scale_learning_rates,
    select_trained,
    set_steps,
)
from raylm.parallel.engines.compilation import compile_blocks
from raylm.parallel.engines.filling import fill
from raylm.parallel.engines.stopwatch import Stopwatch
from raylm.parallel.layout.fragments import Fragment, frozen_fragments, partition_fragments, replicated_fragments
from raylm.parallel.layout.pipeline_stages import StageLayer, balanced_stages, step_weights
from raylm.parallel.layout.slicing import Slicing
from raylm.parallel.layout.tensor import DropoutStreams, TensorGroup, split_loss
from raylm.parallel.layout.timing import step_seconds
from raylm.tasks.objective import IGNORED, Batch, Objective

# What a stage does that is not waiting for another one.
WORK = (schedule.ForwardPass, schedule.BackwardPass, schedule.OptimizerStep, schedule.LoadMicroBatch)


class _Spec(LayerSpec):
    """A layer that is made, and cut, only on the stage that holds it."""

    def __init__(self, make: Callable[[], StageLayer]) -> None:
        super().__init__(StageLayer)
        self._make = make

    def build(self, log: bool = False) -> StageLayer:
        return self._make()


class _TiedSpec(TiedLayerSpec):
    """The same for a layer whose weight two steps use; DeepSpeed keeps the copies on two stages equal."""

    def __init__(self, make: Callable[[], StageLayer], key: str, step: Step) -> None:
        super().__init__(key, StageLayer, forward_fn=step.forward, tied_weight_attr=step.tied)
        self._make = make

    def build(self, log: bool = False) -> StageLayer:
        return self._make()


class _Pipeline(PipelineModule):
    """DeepSpeed's pipeline with stages that begin where ``bounds`` says."""

    def __init__(self, specs: list[LayerSpec], bounds: list[int], **arguments: Any) -> None:
        self._bounds = bounds
        super().__init__(specs, **arguments)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


class _ScaledLoss:
    """The objective's summed loss times ``scale``, from this rank's part of the logits: what training minimises, or the
    plain loss where ``training`` is off."""

    def __init__(self, objective: Objective, group: TensorGroup, vocab_size: int) -> None:
        self.objective, self.group, self.vocab_size, self.scale = objective, group, vocab_size, 1.0
        self.training = True

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = split_loss(
            self.objective, logits, targets, self.group, self.vocab_size, training=self.training
        )  # fmt: skip
        return loss * self.scale


class PipelineTensorEngine:
    """Holds this rank's stage of the model, the optimizer and DeepSpeed's pipeline engine.

    Args:
        model: its parameters have no memory yet, or are the same on every rank.
        objective: what a batch holds, and its loss.
        make_optimizer: from the trained parameters by Hugging Face name to an optimizer.
        settings: how it trains.
        tensor: tensor-parallel ranks.
        pipeline: stages; the other processes are data-parallel replicas.
        time_batch: a micro-batch; given, stages are balanced by the time that the first rank measures with it, not by
            parameters.
        stage_bounds: what an earlier start has measured; rank 0's counts.

    Attributes:
        stage_bounds: where each stage begins in the list of steps, and its end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        make_optimizer: MakeOptimizer,
        settings: EngineSettings,
        *,
        tensor: int,
        pipeline: int,
        time_batch: Batch | None = None,
        stage_bounds: list[int] | None = None,
    ) -> None:
        device = settings.device
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", dist_init_required=True)
        os.environ.setdefault("LOCAL_RANK", "0")
        self.rank, self.device, self.settings = dist.get_rank(), device, settings
        self.zero_stage = settings.zero_stage
        replicas = dist.get_world_size() // (tensor * pipeline)
        topology = PipeModelDataParallelTopology(num_pp=pipeline, num_dp=replicas, num_mp=tensor)
        place = topology.get_coord(self.rank)
        self.stage, self.stages = place.pipe, pipeline
        self.data_rank, self.data_size, self.tensor = place.data, replicas, TensorGroup(place.model, tensor)
        if tensor > 1 and has_dropout(model.config):
            self.tensor.streams = DropoutStreams(place.model, device)
        self.random_stream, self.random_streams = place.data * pipeline + place.pipe, replicas * pipeline
        self.leads = self.stage == 0 and self.tensor.rank == 0
        self.objective, self.model_config = objective, model.config
        self.plan = find_outline(model.config.model_type)
        self._loss = _ScaledLoss(objective, self.tensor, model.config.vocab_size)
        if settings.bf16 and device.type == "cpu":
            attend_in_fp32(model)
        self.stage_bounds = self._bounds(model, time_batch, stage_bounds)
        module = self._build(model, topology)
        if settings.compiled:
            compile_blocks(module)
        self.grid = module.mpu()
        self.tensor.group = self.grid.get_slice_parallel_group() if tensor > 1 else None
        self.parameters: dict[str, nn.Parameter] = {}
        for layer in module.modules():
            if isinstance(layer, StageLayer):
                self.parameters |= dict(layer.model_parameters())
        trained = select_trained(settings, self.parameters)
        self.optimizer = make_optimizer(trained)
        self._working, self._spent = Stopwatch(device), Stopwatch(device)
        self._norm = torch.zeros((), device=device)
        self._shape: tuple | None = None
        self.engine = self._initialize(module, list(trained.values()))
        if self.zero_stage == 0:
            self.optimizer.register_step_pre_hook(lambda *_: self._clip())
        call_after_step(settings, self)

    def _initialize(self, module: nn.Module, trained: list[nn.Parameter]) -> Any:
        """DeepSpeed's pipeline engine, whose instructions are timed."""
        config = deepspeed_config(self.settings, overlap=False)
        if self.settings.bf16:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            model_parameters=trained,
            dist_init_required=False,
            config={**config, "pipeline": {"pipe_partitioned": False, "grad_partitioned": False}},
        )
        engine._INSTRUCTION_MAP = {
            kind: self._timed(method) if kind in WORK else method for kind, method in engine._INSTRUCTION_MAP.items()
        }
        return engine

    def _bounds(self, model: PreTrainedModel, time_batch: Batch | None, known: list[int] | None) -> list[int]:
        """Where the stages begin, the same on all ranks."""
        steps, weights = self.plan.steps(model), self.settings.weights
        if time_batch is None or weights is None:
            in_order = [*steps.before, *steps.blocks, *steps.after]
            return balanced_stages(steps, step_weights(model, in_order), self.stages)
        found = [known]
        if self.rank == 0 and known is None:
            inputs, _ = self._inputs(time_batch)
            seconds = step_seconds(
                model, self.objective, self.plan, weights, inputs, time_batch,
                tensor=self.tensor.size, device=self.device, bf16=self.settings.bf16,
            )  # fmt: skip
            found = [balanced_stages(steps, seconds, self.stages)]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _build(self, model: PreTrainedModel, topology: PipeModelDataParallelTopology) -> _Pipeline:
        steps, weights, transform = self.plan.steps(model), self.settings.weights, self.settings.transform
        in_order = [*steps.before, *steps.blocks, *steps.after]

        def spec(step: Step) -> LayerSpec:
            def make() -> StageLayer:
                layer = StageLayer(step, model, self.plan, self.tensor)
                if weights is not None:
                    names = {parameter: name for name, parameter in layer.model_parameters()}
                    fill(layer, names, weights, self.device)
                for name, path in layer.step.modules.items() if transform is not None else ():
                    if isinstance(member := getattr(layer, name), nn.Module):
                        transform(member, path)
                return layer

            if step.tied is None:
                return _Spec(make)
            return _TiedSpec(make, next(iter(step.modules.values())).replace(".", "-"), step)

        # It prints its stages, and broadcasts tied weights, which autograd would warn about.
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            module = _Pipeline(
                [spec(step) for step in in_order], self.stage_bounds, topology=topology, loss_fn=self._loss
            )
        # The specs hold on to the whole model.
        module._layer_specs = []
        return module

    def _timed(self, method: Callable) -> Callable:
        def run(engine, **arguments) -> None:
            # Validation is not what idle time is asked about.
            with self._working.measure() if engine.module.training else contextlib.nullcontext():
                MethodType(method, engine)(**arguments)
            if method is PipelineEngine._exec_forward_pass and engine.is_last_stage() and engine.module.training:
                # DeepSpeed would hold on to these logits, and to the ones before, for nothing.
                engine.pipe_buffers["outputs"][arguments["buffer_id"]] = None

        return run

    def set_learning_rate(self, factor: float, step: int | None = None) -> None:
        """See :class:`Engine`."""
        scale_learning_rates(self.optimizer, factor, step)

    def train_step(self, micro_batches: list[Batch]) -> StepResult:
        """See :class:`Engine`."""
        replicas = self.grid.get_data_parallel_group()
        targets, tokens = count_batch(self.objective, micro_batches, self.device, replicas)
        # DeepSpeed divides by the micro-batches and the replicas; the sum over both is wanted.
        self._loss.scale, self._loss.training = len(micro_batches) * self.data_size / targets, True
        self._adapt_to(micro_batches)
        with self._spent.measure():
            self.engine.train_batch(iter([self._inputs(batch) for batch in micro_batches]))
        total = torch.zeros((), device=self.device)
        if self.stage == self.stages - 1 and self.tensor.rank == 0:
            total = self.engine.total_loss.detach() / self._loss.scale
        norm = self.engine.get_global_grad_norm() if self.zero_stage else self._norm
        return StepResult(total, targets, tokens, float(norm or 0.0))

    def _inputs(self, batch: Batch) -> tuple[Any, torch.Tensor]:
        """What the first stage and what the last one take."""
        given = self.objective.inputs(batch, self.model_config)
        names = self.plan.inputs
        inputs = given[names[0]] if len(names) == 1 else tuple(given[name] for name in names)
        return inputs, batch["targets"]

    def _adapt_to(self, batches: list[Batch]) -> None:
        """The pipeline keeps buffers for what passes between stages, of one shape."""
        shape = tuple((name, tuple(values.shape)) for name, values in batches[0].items())
        if shape != self._shape:
            self.engine.reset_activation_shape()
            self._shape = shape

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank answers for the ``parameter``, of which others may hold the same."""
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        return self.tensor.rank == 0 or getattr(parameter, "tensor_model_parallel", False)

    @torch.no_grad()
    def _clip(self) -> None:
        """Clip by the norm over all stages and parts, each parameter counted once."""
        mine = [p.grad.norm() for p in self.parameters.values() if p.grad is not None and self._counts(p)]
        squares = torch.stack(mine).square().sum() if mine else torch.zeros((), device=self.device)
        dist.all_reduce(squares, group=self.grid.get_model_parallel_group())
        self._norm = squares.sqrt()
        if (limit := self.settings.clipping) > 0:
            factor = (limit / (self._norm + 1e-6)).clamp(max=1.0)
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def mean_loss(self, result: StepResult) -> float:
        """See :class:`Engine`."""
        return mean_loss(result)

    def idle_fractions(self) -> list[float]:
        """See :class:`Engine`."""
        mine = torch.zeros(self.stages, device=self.device)
        mine[self.stage] = 1.0 - self._working.seconds() / max(self._spent.seconds(), 1e-9)
        dist.all_reduce(mine)
        return (mine / (self.data_size * self.tensor.size)).tolist()

    def _padded(self, batch: Batch) -> Batch:
        """``batch`` with as many sequences as a micro-batch has; in the added ones no target counts."""
        missing = self.settings.micro_batch_size - batch["targets"].size(0)
        if missing <= 0:
            return batch
        padded = {name: torch.cat([v, v[:1].expand(missing, *v.shape[1:])]) for name, v in batch.items()}
        padded["targets"][-missing:] = IGNORED
        return padded

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Validation:
        """See :class:`Engine`."""
        padded = [self._padded(batch) for batch in batches]
        self._loss.scale, self._loss.training = 1.0, False
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        if padded:
            self._adapt_to(padded)
            self.engine.total_loss = None
            feed = iter([self._inputs(batch) for batch in padded])
            losses = self.engine.eval_batch(feed, reduce_output=None, bcast_loss=False, num_micro_batches=len(padded))
            if self.stage == self.stages - 1 and self.tensor.rank == 0:
                total[0] = torch.stack(losses).double().sum()
                total[1] = sum((batch["targets"] != IGNORED).sum() for batch in padded)
        dist.all_reduce(total)
        return Validation(float(total[0]), int(total[1]))

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """See :class:`Engine`."""
        padded = self._padded(batch)
        self._adapt_to([padded])
        # DeepSpeed adds up what the last stage gives, losses or logits.
        self.engine.total_loss = None
        feed = iter([self._inputs(padded)])
        _, mine = self.engine.eval_batch(
            feed, return_logits=True, compute_loss=False, reduce_output=None, num_micro_batches=1
        )
        targets = padded["targets"]
        whole = torch.zeros(*targets.shape, self._loss.vocab_size, device=self.device)
        if self.stage == self.stages - 1:
            width = -(-whole.size(-1) // self.tensor.size)
            first = self.tensor.rank * width
            whole[..., first : first + mine.size(-1)] = mine.float()
            if self.tensor.size > 1:
                self.tensor.sum(whole)
        dist.broadcast(whole, src=self.grid.stage_to_global(self.stages - 1, data=0, model=0))
        return whole[: batch["targets"].size(0)]

    def fragments(self, *, for_loading: bool = False) -> list[Fragment]:
        """See :class:`Engine`."""
        chosen = {name: p for name, p in self.parameters.items() if for_loading or self._counts(p)}
        slicings = {name: p.slicing for name, p in chosen.items() if hasattr(p, "slicing")}
        rank = None if for_loading else self.data_rank
        frozen = frozen_fragments(chosen, slicings, rank, self.data_size)
        if self.zero_stage == 0:
            mine = replicated_fragments(chosen, slicings, self.optimizer, rank, self.data_size)
        else:
            mine = partition_fragments(chosen, slicings, self.engine.optimizer, self.data_rank)
        return [*mine, *frozen]

    @torch.no_grad()
    def refresh(self) -> None:
        """See :class:`Engine`."""
        refresh_working(self.zero_stage, self.engine.optimizer)

    @torch.no_grad()
    def adopt(self, read_part: Callable[[str, Slicing], torch.Tensor], optimizer_steps: int) -> None:
        """See :class:`Engine`."""
        for name, parameter in self.parameters.items():
            slicing = getattr(parameter, "slicing", None) or Slicing(tuple(parameter.shape))
            parameter.data.copy_(read_part(name, slicing))
        set_steps(self.optimizer, optimizer_steps)
        dist.barrier()
