"""The data-parallel engine: DeepSpeed with ZeRO 0 to 3 behind one ``train_step``.

In: a model in its objective, an optimizer over its parameters, and this rank's micro-batches. Out: the step's loss and
gradient norm over all workers. Losses are summed in each micro-batch and divided once by the number of targets in the
whole batch, so that the result does not depend on how the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from raylm.models.weights import Weights
from raylm.parallel.attention import attend_in_fp32
from raylm.parallel.compilation import compile_blocks
from raylm.parallel.cut import BUCKET_ELEMENTS
from raylm.parallel.filling import fill, share_out_by_deepspeed
from raylm.parallel.fragments import Fragment, partition_fragments, pieces, replicated_fragments
from raylm.parallel.slicing import Slicing
from raylm.tasks.objective import IGNORED, Batch, ObjectiveModule


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured.

    Attributes:
        loss: this rank's summed loss, nats; a tensor, so that nothing waits for it.
        targets: targets in the whole batch.
        tokens: tokens of the whole batch that count as trained on.
        gradient_norm: norm of the whole gradient before clipping.
    """

    loss: torch.Tensor
    targets: int
    tokens: int
    gradient_norm: float


# On a GPU a bucket takes its memory whether it is filled or not: DeepSpeed's default is 5e8 elements, and with the
# reduction of gradients overlapped with the backward pass 4.5 times both (deepspeed.ai/docs/config-json).
BUCKETS = {"reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS}
OVERLAP = {"overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True}


def deepspeed_config(
    zero_stage: int,
    micro_batch_size: int,
    accumulation: int,
    clipping: float,
    *,
    bf16: bool,
    device: torch.device,
    overlap: bool,
) -> dict[str, Any]:
    """What DeepSpeed is told alike on both paths.

    It clips stage 0 by a norm that cannot be read, and in a pipeline by one stage alone: there the engines clip.

    Args:
        overlap: on a GPU, reduce gradients during the backward pass, on a stream of its own.
    """
    on_gpu = {**BUCKETS, **(OVERLAP if overlap else {})} if device.type == "cuda" and zero_stage else {}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clipping if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage, **on_gpu},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        **({"bf16": {"enabled": True}} if bf16 else {}),
    }


def scale_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"] * factor


def seed_step(seed: int, step: int, engine: Any) -> None:
    """Make everything random in a step follow from (seed, step) and the engine's stream: dropout, above all."""
    torch.manual_seed((seed << 40) + step * engine.random_streams + engine.random_stream)


class DataParallelEngine:
    """Holds the model, the optimizer and DeepSpeed's engine on one rank.

    Args:
        objective: the model in its objective; the same weights on every rank.
        make_optimizer: from the objective's parameters by name to an optimizer whose groups name their ``moments``.
        zero_stage: 0 to 3.
        micro_batch_size: sequences of one micro-batch.
        accumulation: micro-batches of one step on this rank.
        clipping: largest gradient norm; 0 does not clip.
        bf16: compute in bf16 with fp32 master weights (zero_stage 1 to 3).
        device: where the model goes.
        weights: what fills a model whose parameters have no memory yet, one by one; under ZeRO 3 each is shared out
            before the next.
        compiled: run the blocks through torch.compile.

    Attributes:
        data_rank, data_size: which replica this is, of how many; they take different samples.
        leads: whether this rank answers for its replica.
        random_stream, random_streams: which stream of random numbers this rank takes, of how many.
        measures: what the objective measured in the last :meth:`evaluate`, by name.
    """

    def __init__(
        self,
        objective: ObjectiveModule,
        make_optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
        *,
        zero_stage: int,
        micro_batch_size: int,
        accumulation: int,
        clipping: float,
        bf16: bool,
        device: torch.device,
        weights: Weights | None = None,
        compiled: bool = False,
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_rank, self.data_size, self.leads = self.rank, self.world_size, True
        self.random_stream, self.random_streams = self.rank, self.world_size
        self.zero_stage, self.clipping, self.device = zero_stage, clipping, device
        config = deepspeed_config(
            zero_stage, micro_batch_size, accumulation, clipping, bf16=bf16, device=device, overlap=True
        )
        if bf16 and device.type == "cpu":
            attend_in_fp32(objective.model)
        if weights is not None:
            names = {parameter: name for name, parameter in objective.model.named_parameters()}
            share_out = {"share_out": share_out_by_deepspeed(config)} if zero_stage == 3 else {}
            fill(objective.model, names, weights, device, **share_out)
        objective.to(device)
        if compiled:
            compile_blocks(objective)
        optimizer = make_optimizer({name.removeprefix("model."): p for name, p in objective.named_parameters()})
        self.engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            model_parameters=objective.parameters(),
            dist_init_required=False,
            config=config,
        )
        self.parameters = {name.removeprefix("model."): p for name, p in self.engine.module.named_parameters()}
        self.optimizer = optimizer
        self.measures: dict[str, float] = {}
        # Muon works on whole matrices, of which ZeRO leaves it flat ranges.
        if zero_stage and hasattr(optimizer, "bind"):
            optimizer.bind(list(pieces(self.parameters, self.engine.optimizer, self.rank)))

    @property
    def objective(self) -> ObjectiveModule:
        """The model in its objective, as trained."""
        return self.engine.module

    def set_learning_rate(self, factor: float) -> None:
        """Set every group's learning rate to ``factor`` times its peak."""
        scale_learning_rates(self.optimizer, factor)

    def train_step(self, micro_batches: list[Batch]) -> StepResult:
        """One optimizer step over this rank's ``micro_batches`` of the objective."""
        self.engine.train()
        targets, tokens = self._counts(micro_batches)
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
        return float(nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))

    def _counts(self, batches: list[Batch]) -> tuple[int, int]:
        """Targets and tokens of the whole batch, over all ranks."""
        objective = self.objective.objective
        rows = [torch.stack([(batch["targets"] != IGNORED).sum(), objective.tokens(batch)]) for batch in batches]
        count = torch.stack(rows).sum(dim=0).to(self.device)
        dist.all_reduce(count)
        targets, tokens = count.tolist()
        return max(1, targets), tokens

    def mean_loss(self, result: StepResult) -> float:
        """The step's loss over all ranks, nats a target; a collective."""
        total = result.loss.double()
        dist.all_reduce(total)
        return float(total) / result.targets

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> tuple[float, int]:
        """Summed loss (nats) and targets over all ranks' ``batches``, of which every rank has equally many."""
        self.engine.eval()
        names = self.objective.objective.measures
        total = torch.zeros(len(names) + 3, dtype=torch.float64, device=self.device)
        for batch in batches:
            total[0] += self.engine(**batch).double()
            total[1] += (batch["targets"] != IGNORED).sum()
            if names:
                total[2:] += self.objective.measured
        dist.all_reduce(total)
        loss, targets, *sums, rows = total.tolist()
        self.measures = {name: value / max(1.0, rows) for name, value in zip(names, sums, strict=True)}
        return loss, int(targets)

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """The objective's logits of ``batch`` with the live weights; a collective under ZeRO 3."""
        self.engine.eval()
        modules = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(modules, enabled=self.zero_stage == 3):
            return self.objective.logits(batch).float()

    def fragments(self, *, for_loading: bool = False) -> list[Fragment]:
        """What this rank owns of the weights and the optimizer's moments (all of them at ZeRO 0 ``for_loading``)."""
        if self.zero_stage == 0:
            rank = None if for_loading else self.rank
            return list(replicated_fragments(self.parameters, {}, self.optimizer, rank, self.world_size))
        return list(partition_fragments(self.parameters, {}, self.engine.optimizer, self.rank))

    @torch.no_grad()
    def adopt(self, read_part: Callable[[str, Slicing], torch.Tensor], optimizer_steps: int) -> None:
        """After a load has filled :meth:`fragments`: bring the working weights and the step counters in line.

        Args:
            read_part: from a parameter's name and its slicing to that part of the fp32 weight.
            optimizer_steps: steps that the optimizer had made, for AdamW's bias correction.
        """
        if self.zero_stage == 3:
            zero = self.engine.optimizer
            for sub_group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        else:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(read_part(name, Slicing(tuple(parameter.shape))))
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(optimizer_steps))
        dist.barrier()
