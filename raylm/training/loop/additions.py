"""What a run trains beside its data and its model: a teacher, rounded weights, zeros that stay, adapters,
weights that are not trained.

In: the job. Out: the second model that the loss compares with, and the engine's hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raylm.models.adapters import add_adapter, is_adapter, new_modules
from raylm.models.chains import CHAIN, CHAIN_RATE
from raylm.models.depth import Freezing, Rate
from raylm.models.weights import Weights
from raylm.parallel.layout.fragments import Fragment
from raylm.training.loop.zeros import KeepZeros

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from raylm.config.adapter import AdapterSection
    from raylm.config.stages import TrainConfig
    from raylm.models.heads import Head


@dataclass(frozen=True)
class Additions:
    """See the module.

    Attributes:
        reference: the teacher, on the device.
        transform, after_step, trained, saves_frozen: of :class:`raylm.parallel.engines.base.EngineSettings`.
        rates: how each parameter is trained.
    """

    reference: PreTrainedModel | None = None
    transform: Callable[[nn.Module, str], None] | None = None
    after_step: Callable[[list[Fragment]], None] | None = None
    trained: Callable[[str], bool] | None = None
    saves_frozen: bool = True
    rates: Callable[[str], Rate] = lambda name: Rate()


def additions_of(
    config: TrainConfig, model: PreTrainedModel, weights: Weights, head: Head, device: torch.device
) -> Additions:
    """What ``config`` adds to training ``model``.

    Args:
        model: without memory for its parameters; layers of it may be replaced.
        weights: what the model begins with.
        head: of the model, and of its teacher.
    """
    reference = None
    if config.distillation is not None and config.distillation.top_k is None:
        reference = _teacher(config, head, device)
        if config.distillation.attention:
            # The others give no probabilities.
            model.set_attn_implementation("eager")
    if config.adapter is not None:
        if config.adapter.bits is not None:
            _keep_in_four_bits(config, model, head)
        transform = functools.partial(_adapt, section=config.adapter, head=head, seed=config.run.seed)
        trained = functools.partial(_is_trained, whole=tuple(f"{name}." for name in new_modules(model, head)))
        return Additions(reference, transform, None, trained, saves_frozen=False, rates=_faster_chain)
    kept = KeepZeros(weights) if config.training.keep_zeros else None
    if config.freezing is None:
        return Additions(reference, rounding_of(config), kept, rates=_faster_chain)
    freezing = Freezing(config.freezing, model)
    rates = functools.partial(_faster_chain, rates=freezing.rate)
    return Additions(reference, rounding_of(config), kept, freezing.trains, rates=rates)


def _faster_chain(name: str, rates: Callable[[str], Rate] = lambda name: Rate()) -> Rate:
    """How a parameter is trained: as ``rates`` says, and the scores of a chain over tags faster."""
    rate = rates(name)
    return replace(rate, factor=rate.factor * CHAIN_RATE) if name.startswith(f"{CHAIN}.") else rate


def _keep_in_four_bits(config: TrainConfig, model: PreTrainedModel, head: Head) -> None:
    import torch

    from raylm.models.four_bits import keep_in_four_bits

    keep_in_four_bits(model, head, torch.bfloat16 if config.training.precision == "bf16" else torch.float32)


def _adapt(module: nn.Module, name: str, section: AdapterSection, head: Head, seed: int) -> None:
    add_adapter(module, section, head, seed)


def _is_trained(name: str, whole: tuple[str, ...]) -> bool:
    """Whether a parameter is an adapter's, or of a head that is trained ``whole``."""
    return is_adapter(name) or name.startswith(whole)


def rounding_of(config: TrainConfig) -> Callable[[nn.Module, str], None] | None:
    """What makes a model compute with rounded weights, where ``config`` has that."""
    if config.rounding is None:
        return None
    return functools.partial(_round, group_size=config.rounding.group_size)


def _teacher(config: TrainConfig, head: Head, device: torch.device) -> PreTrainedModel:
    import torch

    from raylm.data.loading import resolve_model
    from raylm.models.loading import load_model

    section = config.distillation
    assert section is not None and section.teacher is not None
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    teacher = load_model(resolve_model(section.teacher), dtype, "distillation.teacher", head)
    if section.attention:
        teacher.set_attn_implementation("eager")
    return teacher.to(device)


def _round(module: nn.Module, name: str, group_size: int) -> None:
    from raylm.models.rounding import kept_whole, round_in_training

    round_in_training(module, group_size, kept_whole(module))
