"""The data-parallel engine: DeepSpeed with ZeRO 0 to 3 behind one ``train_step``.

In: a model in its objective, an optimizer over its parameters, and this rank's micro-batches. Out: the step's loss and
gradient norm over all workers. Losses are summed in each micro-batch and divided once by the number of targets in the
whole batch, so that the result does not depend on how the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

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
from raylm.parallel.engines.filling import fill, share_out_by_deepspeed
from raylm.parallel.layout.fragments import (
    Fragment,
    flat_ranges,
    frozen_fragments,
    partition_fragments,
    replicated_fragments,
    trained_parameters,
)
from raylm.parallel.layout.slicing import Slicing
from raylm.tasks.objective import IGNORED, Batch, ObjectiveModule


class DataParallelEngine:
    """Holds the model, the optimizer and DeepSpeed's engine on one rank.

    Args:
        objective: the model in its objective; the same weights on every rank.
        make_optimizer: from the trained parameters by Hugging Face name to an optimizer.
        settings: how it trains.
    """

    def __init__(self, objective: ObjectiveModule, make_optimizer: MakeOptimizer, settings: EngineSettings) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_rank, self.data_size, self.leads = self.rank, self.world_size, True
        self.random_stream, self.random_streams = self.rank, self.world_size
        self.zero_stage, self.clipping, self.device = settings.zero_stage, settings.clipping, settings.device
        self._saves_frozen = settings.saves_frozen
        config = deepspeed_config(settings, overlap=True)
        if settings.bf16 and self.device.type == "cpu":
            attend_in_fp32(objective.model)
        if settings.weights is not None:
            names = {parameter: name for name, parameter in objective.model.named_parameters()}
            share_out = {"share_out": share_out_by_deepspeed(config)} if self.zero_stage == 3 else {}
            fill(objective.model, names, settings.weights, self.device, **share_out)
        objective.to(self.device)
        if settings.transform is not None:
            settings.transform(objective.model, "")
        if settings.compiled:
            compile_blocks(objective)
        named = {name.removeprefix("model."): p for name, p in objective.named_parameters()}
        trained = select_trained(settings, named)
        self.optimizer = make_optimizer(trained)
        self.engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=self.optimizer,
            model_parameters=list(trained.values()),
            dist_init_required=False,
            config=config,
        )
        self.parameters = {name.removeprefix("model."): p for name, p in self.engine.module.named_parameters()}
        # Muon works on whole matrices, of which ZeRO leaves it flat ranges.
        if self.zero_stage and hasattr(self.optimizer, "bind"):
            self.optimizer.bind(list(flat_ranges(trained, self.engine.optimizer, self.rank)))
        call_after_step(settings, self)

    @property
    def objective(self) -> ObjectiveModule:
        """The model in its objective, as trained."""
        return self.engine.module

    def set_learning_rate(self, factor: float, step: int | None = None) -> None:
        """See :class:`Engine`."""
        scale_learning_rates(self.optimizer, factor, step)

    def train_step(self, micro_batches: list[Batch]) -> StepResult:
        """See :class:`Engine`."""
        self.engine.train()
        targets, tokens = count_batch(self.objective.objective, micro_batches, self.device)
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = self.engine(**batch)
            # DeepSpeed averages over the ranks; the sum over ranks is wanted.
            self.engine.backward(loss * (self.world_size / targets), scale_wrt_gas=False)
            total += loss.detach()
            if self.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary():
                norm = self._clip()
            self.engine.step()
        if self.zero_stage:
            norm = float(self.engine.get_global_grad_norm() or 0.0)
        return StepResult(total, targets, tokens, norm)

    def _clip(self) -> float:
        limit = self.clipping if self.clipping > 0 else float("inf")
        return float(nn.utils.clip_grad_norm_([p for p in self.parameters.values() if p.requires_grad], limit))

    def mean_loss(self, result: StepResult) -> float:
        """See :class:`Engine`."""
        return mean_loss(result)

    def idle_fractions(self) -> list[float]:
        """See :class:`Engine`."""
        return []

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Validation:
        """See :class:`Engine`."""
        self.engine.eval()
        objective = self.objective.objective
        found = []
        for batch in batches:
            loss = self.engine(**batch).double()
            sums = [loss[None], (batch["targets"] != IGNORED).sum()[None]]
            found.append(torch.cat([*sums, *([self.objective.measured] if objective.measures else [])]))
        total = torch.stack(found).sum(dim=0)
        dist.all_reduce(total)
        loss, targets, *measured = total.tolist()
        measures = objective.figures(measured[:-1], measured[-1]) if objective.measures else {}
        return Validation(loss, int(targets), measures)

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """See :class:`Engine`."""
        self.engine.eval()
        modules = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(modules, enabled=self.zero_stage == 3):
            return self.objective.logits(batch).float()

    def fragments(self, *, for_loading: bool = False) -> list[Fragment]:
        """See :class:`Engine`."""
        rank = None if for_loading else self.rank
        frozen = frozen_fragments(self.parameters, {}, rank, self.world_size) if self._saves_frozen else ()
        if self.zero_stage == 0:
            mine = replicated_fragments(self.parameters, {}, self.optimizer, rank, self.world_size)
        else:
            mine = partition_fragments(self.parameters, {}, self.engine.optimizer, self.rank)
        return [*mine, *frozen]

    @torch.no_grad()
    def refresh(self) -> None:
        """See :class:`Engine`."""
        refresh_working(self.zero_stage, self.engine.optimizer)

    def _saved(self) -> dict[str, nn.Parameter]:
        """The parameters that checkpoints hold."""
        return self.parameters if self._saves_frozen else trained_parameters(self.parameters)

    @torch.no_grad()
    def adopt(self, read_part: Callable[[str, Slicing], torch.Tensor], optimizer_steps: int) -> None:
        """See :class:`Engine`."""
        if self.zero_stage == 3:
            self.refresh()
        else:
            for name, parameter in self._saved().items():
                parameter.data.copy_(read_part(name, Slicing(tuple(parameter.shape))))
        set_steps(self.optimizer, optimizer_steps)
        dist.barrier()
