"""Who holds which part of which parameter, under any layout and ZeRO stage.

Every rank describes what it owns as :class:`Fragment` objects: a rectangle of a whole parameter, with views of the fp32
weight and of the optimizer's moments in it. Checkpoints are written from these views and read into them, which is what
makes them independent of the layout; nothing is gathered.

ZeRO's partitions are read from DeepSpeed's own tables: the ``_hp_mapping`` of stages 1 and 2, and the sub-groups and
``grad_position`` of stage 3 (deepspeed.runtime.zero.stage_1_and_2, stage3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from raylm.parallel.layout.slicing import Offset, Shape, Slicing, boxes


@dataclass
class Fragment:
    """A rectangle of one parameter that this rank owns.

    Attributes:
        name: the parameter's Hugging Face name.
        shape: shape of the whole parameter.
        offset: the rectangle's first element in the whole parameter.
        tensors: "weight" and, of what is trained, the optimizer's moments -> fp32 views of the rectangle.
    """

    name: str
    shape: Shape
    offset: Offset
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class FlatRange:
    """This rank's flat range of one parameter in one of DeepSpeed's flat fp32 buffers.

    Attributes:
        name: the parameter's Hugging Face name.
        shape: shape of the parameter on this rank, were it whole.
        group: index of the parameter group in the optimizer.
        flat: the buffer.
        offset: where in ``flat`` the range begins.
        start: first element of the range in the flattened parameter.
        length: elements; 0 where this rank holds nothing of the parameter.
    """

    name: str
    shape: Shape
    group: int
    flat: torch.Tensor
    offset: int
    start: int
    length: int


def even_range(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """The ``rank``-th of ``world_size`` nearly equal ranges of ``numel`` elements, as (start, stop)."""
    per_rank = -(-numel // world_size)
    return min(rank * per_rank, numel), min((rank + 1) * per_rank, numel)


def initialize_moments(optimizer: torch.optim.Optimizer, flat: torch.Tensor, group: dict) -> dict[str, torch.Tensor]:
    """Optimizer state of ``flat``, with zero moments where the optimizer has not made them yet.

    torch's optimizers create state in their first step; a checkpoint is to be loaded before it.
    """
    state = optimizer.state[flat]
    for name in group["moments"]:
        if state.get(name) is None:
            state[name] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    if "exp_avg" in group["moments"] and "step" not in state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device=flat.device if group.get("fused") else "cpu")
    return state


def _fragments(
    name: str, slicing: Slicing, start: int, length: int, flat: dict[str, torch.Tensor]
) -> Iterator[Fragment]:
    """The flat range of ``length`` elements from ``start``, of which ``flat`` holds the values, as fragments."""
    for offset, shape, first, part in boxes(slicing, start, start + length):
        count = torch.Size(shape).numel()
        tensors = {kind: values[first : first + count].view(shape)[part] for kind, values in flat.items()}
        yield Fragment(name, slicing.shape, offset, tensors)


def replicated_fragments(
    parameters: dict[str, nn.Parameter],
    slicings: Mapping[str, Slicing],
    optimizer: torch.optim.Optimizer,
    rank: int | None,
    world_size: int,
) -> Iterator[Fragment]:
    """ZeRO 0: every data-parallel rank holds everything; each answers for one range of each parameter.

    Args:
        slicings: of the parameters that are cut over tensor-parallel ranks.
        rank: whose ranges; None for the whole parameters (what a load fills).
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trained_parameters(parameters).items():
        group = groups[id(parameter)]
        state = initialize_moments(optimizer, parameter, group)
        start, stop = (0, parameter.numel()) if rank is None else even_range(parameter.numel(), rank, world_size)
        flat = {"weight": parameter.detach().view(-1)[start:stop]}
        flat |= {key: state[key].view(-1)[start:stop] for key in group["moments"]}
        slicing = slicings.get(name) or Slicing(tuple(parameter.shape))
        yield from _fragments(name, slicing, start, stop - start, flat)


def trained_parameters(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those that the optimizer has."""
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


def frozen_fragments(
    parameters: dict[str, nn.Parameter], slicings: Mapping[str, Slicing], rank: int | None, world_size: int
) -> Iterator[Fragment]:
    """Weights that are not trained, in the type that the model has them in; ``rank`` as in
    :func:`replicated_fragments`. ZeRO 3 has cut them over the ranks like all others."""
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            continue
        if (mine := getattr(parameter, "ds_tensor", None)) is not None:
            shape, size = tuple(parameter.ds_shape), parameter.ds_numel
            start = min(dist.get_rank() * mine.ds_numel, size)
            flat, length = mine.detach().view(-1), max(0, min(mine.ds_numel, size - start))
        else:
            shape, flat = tuple(parameter.shape), parameter.detach().view(-1)
            start, stop = (0, flat.numel()) if rank is None else even_range(flat.numel(), rank, world_size)
            flat, length = flat[start:stop], stop - start
        yield from _fragments(name, slicings.get(name) or Slicing(shape), start, length, {"weight": flat})


def partition_fragments(
    parameters: dict[str, nn.Parameter], slicings: Mapping[str, Slicing], zero_optimizer, rank: int
) -> Iterator[Fragment]:
    """ZeRO 1 to 3: each rank answers for the ranges that lie in its flat buffers."""
    inner = zero_optimizer.optimizer
    for place in flat_ranges(trained_parameters(parameters), zero_optimizer, rank):
        group = inner.param_groups[place.group]
        state = initialize_moments(inner, place.flat, group)
        flat = {"weight": place.flat.detach(), **{key: state[key] for key in group["moments"]}}
        flat = {kind: values[place.offset : place.offset + place.length] for kind, values in flat.items()}
        slicing = slicings.get(place.name) or Slicing(place.shape)
        yield from _fragments(place.name, slicing, place.start, place.length, flat)


def flat_ranges(parameters: dict[str, nn.Parameter], zero_optimizer, rank: int) -> Iterator[FlatRange]:
    """Where ZeRO 1 to 3 keeps this rank's range of each parameter; all parameters, in the same order on every rank."""
    if hasattr(zero_optimizer, "fp32_partitioned_groups_flat"):
        # Stage 3: each parameter is cut evenly over the ranks, the last range padded; sub-groups join the ranges.
        for name, parameter in parameters.items():
            sub_group, offset, _ = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
            per_rank = parameter.ds_tensor.ds_numel
            start = min(rank * per_rank, parameter.ds_numel)
            yield FlatRange(
                name=name,
                shape=tuple(parameter.ds_shape),
                group=zero_optimizer.sub_group_to_group_id[sub_group],
                flat=zero_optimizer.fp32_partitioned_groups_flat[sub_group],
                offset=offset,
                start=start,
                length=max(0, min(per_rank, parameter.ds_numel - start)),
            )
        return
    # Stages 1 and 2: each group's parameters lie end to end in a flat buffer that is cut evenly over the ranks.
    if hasattr(zero_optimizer, "bit16_groups"):
        members_of, flats = zero_optimizer.bit16_groups, zero_optimizer.single_partition_of_fp32_groups
    else:  # DeepSpeed's BF16_Optimizer, which stands for stage 1 where bf16 gradients are accumulated in fp32.
        members_of, flats = zero_optimizer.bf16_groups, zero_optimizer.fp32_groups_flat_partition
    groups = {id(p): index for index, members in enumerate(members_of) for p in members}
    for name, parameter in parameters.items():
        group, mapping = groups[id(parameter)], parameter._hp_mapping
        yield FlatRange(
            name=name,
            shape=tuple(parameter.shape),
            group=group,
            flat=flats[group],
            offset=mapping.hp_fragment_address.start if mapping else 0,
            start=mapping.lp_fragment_address.start if mapping else 0,
            length=mapping.hp_fragment_address.numel if mapping else 0,
        )
