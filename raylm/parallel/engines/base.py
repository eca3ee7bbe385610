"""What the two engines have in common: their protocol, their settings, and what DeepSpeed is told on both paths.

A later task, adapter, mask or teacher comes in through :class:`EngineSettings` and the objective's own module; neither
engine asks which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from raylm.models.weights import Weights
from raylm.parallel.layout.fragments import Fragment
from raylm.parallel.layout.slicing import Slicing
from raylm.parallel.plan.layout import BUCKET_ELEMENTS
from raylm.tasks.objective import IGNORED, Batch, Objective

MakeOptimizer = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
# On a GPU a bucket takes its memory whether it is filled or not: DeepSpeed's default is 5e8 elements, and with the
# reduction of gradients overlapped with the backward pass 4.5 times both (deepspeed.ai/docs/config-json).
BUCKETS = {"reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS}
OVERLAP = {"overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True}


@dataclass(frozen=True)
class EngineSettings:
    """How an engine trains, whatever the layout.

    Attributes:
        zero_stage: 0 to 3; with tensor or pipeline parallelism 0 or 1.
        micro_batch_size: sequences of one micro-batch.
        accumulation: micro-batches of one step of a replica.
        clipping: largest gradient norm; 0 does not clip.
        bf16: compute in bf16 with fp32 master weights (zero_stage 1 to 3).
        device: where the model goes.
        weights: what fills a model whose parameters have no memory yet, one by one; under ZeRO 3 each is shared out
            before the next, of a cut model each rank takes its parts only.
        compiled: run the blocks through torch.compile.
        trained: from a parameter's Hugging Face name to whether it is trained; the others are saved, not optimized.
        saves_frozen: whether checkpoints hold what is not trained; else it is what ``weights`` gives.
        transform: called with a module and its name in the model, changes it in place once its weights are there and
            before the optimizer is made: the whole model (its name is empty), of a cut one each module of this rank's
            steps. Under ZeRO 3 the weights are shared out by then: modules can be wrapped, values not changed.
        after_step: called with this rank's fragments of the fp32 weights once the optimizer has made new ones, for each
            of its parameter groups; what it writes into them is what the model goes on with.
    """

    zero_stage: int
    micro_batch_size: int
    accumulation: int
    clipping: float
    bf16: bool
    device: torch.device
    weights: Weights | None = None
    compiled: bool = False
    trained: Callable[[str], bool] | None = None
    saves_frozen: bool = True
    transform: Callable[[nn.Module, str], None] | None = None
    after_step: Callable[[list[Fragment]], None] | None = None


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


@dataclass(frozen=True)
class Validation:
    """What a pass over validation batches found.

    Attributes:
        loss: summed over all ranks, nats.
        targets: that it is the sum over.
        measures: the objective's own, by name.
    """

    loss: float
    targets: int
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Nats a target."""
        return self.loss / max(1, self.targets)


class Engine(Protocol):
    """A model, its optimizer and DeepSpeed's engine on one rank.

    Attributes:
        optimizer: whose groups carry ``peak_learning_rate`` and ``moments``.
        parameters: this rank's, by Hugging Face name.
        data_rank, data_size: which replica this is, of how many; they take different samples.
        leads: whether this rank answers for its replica.
        random_stream, random_streams: which stream of random numbers this rank takes, of how many; ranks that share
            activations take the same.
    """

    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    data_rank: int
    data_size: int
    leads: bool
    random_stream: int
    random_streams: int

    def set_learning_rate(self, factor: float, step: int | None = None) -> None:
        """Set every group's learning rate to ``factor`` times its peak.

        Args:
            step: that comes next, from 0; groups whose training begins later get 0. None for all.
        """

    def train_step(self, micro_batches: list[Batch]) -> StepResult:
        """One optimizer step over this replica's ``micro_batches``, the same on all ranks of the replica."""

    def mean_loss(self, result: StepResult) -> float:
        """The step's loss over all ranks, nats a target; a collective."""

    def evaluate(self, batches: list[Batch]) -> Validation:
        """The live weights on all replicas' ``batches``, of which each replica has equally many; a collective."""

    def logits(self, batch: Batch) -> torch.Tensor:
        """The live weights' logits for a ``batch``, of at most a micro-batch's size; a collective."""

    def idle_fractions(self) -> list[float]:
        """Of each pipeline stage, the share of the time since the last call in which it waited for others; a
        collective. Empty without a pipeline."""

    def fragments(self, *, for_loading: bool = False) -> list[Fragment]:
        """What this rank answers for of weights and moments; ``for_loading`` also what others answer for."""

    def refresh(self) -> None:
        """After what :meth:`fragments` gives for loading was changed: bring the working weights in line; a
        collective."""

    def adopt(self, read_part: Callable[[str, Slicing], torch.Tensor], optimizer_steps: int) -> None:
        """After a load has filled :meth:`fragments`: bring the working weights and the step counters in line.

        Args:
            read_part: from a parameter's name and its slicing to that part of the fp32 weight.
            optimizer_steps: steps that the optimizer had made, for AdamW's bias correction.
        """


def deepspeed_config(settings: EngineSettings, *, overlap: bool) -> dict[str, Any]:
    """What DeepSpeed is told alike on both paths.

    It clips stage 0 by a norm that cannot be read, and in a pipeline by one stage alone: there the engines clip.

    Args:
        overlap: on a GPU, reduce gradients during the backward pass, on a stream of its own.
    """
    zero_stage = settings.zero_stage
    on_gpu = {**BUCKETS, **(OVERLAP if overlap else {})} if settings.device.type == "cuda" and zero_stage else {}
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.clipping if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage, **on_gpu},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        **({"bf16": {"enabled": True}} if settings.bf16 else {}),
    }


def select_trained(settings: EngineSettings, named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Freeze the parameters that ``settings`` does not train; returns the others."""
    if settings.trained is not None:
        for name, parameter in named.items():
            parameter.requires_grad_(parameter.requires_grad and settings.trained(name))
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def call_after_step(settings: EngineSettings, engine: Engine) -> None:
    """Have ``settings.after_step`` called within the optimizer's step.

    ZeRO steps on flat fp32 partitions and copies them into the working weights afterwards, so that what is written
    there in between reaches both.
    """
    if (after_step := settings.after_step) is not None:
        # Views, made once: while DeepSpeed steps on one group the optimizer does not know the others.
        fragments = engine.fragments(for_loading=True)
        engine.optimizer.register_step_post_hook(lambda *_: after_step(fragments))


def count_batch(
    objective: Objective, batches: list[Batch], device: torch.device, group: dist.ProcessGroup | None = None
) -> tuple[int, int]:
    """Targets (at least 1) and tokens of the whole batch; a collective.

    Args:
        batches: this replica's micro-batches.
        group: one rank of each replica; by default all ranks, each of them a replica.
    """
    rows = [torch.stack([(batch["targets"] != IGNORED).sum(), objective.tokens(batch)]) for batch in batches]
    count = torch.stack(rows).sum(dim=0).to(device)
    dist.all_reduce(count, group=group)
    targets, tokens = count.tolist()
    return max(1, targets), tokens


def mean_loss(result: StepResult) -> float:
    """See :meth:`Engine.mean_loss`."""
    total = result.loss.double()
    dist.all_reduce(total)
    return float(total) / result.targets


def scale_learning_rates(optimizer: torch.optim.Optimizer, factor: float, step: int | None) -> None:
    """See :meth:`Engine.set_learning_rate`."""
    for group in optimizer.param_groups:
        is_open = step is None or step >= group.get("opens", 0)
        group["lr"] = group["peak_learning_rate"] * factor if is_open else 0.0


def refresh_working(zero_stage: int, zero_optimizer: Any) -> None:
    """See :meth:`Engine.refresh`; what DeepSpeed does at the end of a step. Under ZeRO 0 the fp32 weights are the
    working ones."""
    if zero_stage == 3:
        # Small parameters are whole on every rank between steps: their parts are cut anew, and brought together anew.
        zero_optimizer._partition_all_parameters()
        for sub_group in range(len(zero_optimizer.fp32_partitioned_groups_flat)):
            zero_optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if whole := zero_optimizer.persistent_parameters:
            whole[0].all_gather(whole)
    elif zero_stage:
        zero_optimizer.update_lp_params()


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set AdamW's counters, by which it corrects the bias of its moments."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))


def seed_step(seed: int, step: int, engine: Engine) -> None:
    """Make everything random in a step follow from (seed, step) and the engine's stream: dropout, above all."""
    torch.manual_seed((seed << 40) + step * engine.random_streams + engine.random_stream)
