"""Muon: momentum whose update of each weight matrix is orthogonalised (Jordan 2024, kellerjordan.github.io/posts/muon).

The Newton-Schulz iteration runs in bf16 on a GPU, and where training does; else in fp32. It is batched over matrices of
one shape. Embeddings, the output head, norms and biases go to fused AdamW. Each matrix is worked on by one
rank, and the results are gathered. Where ZeRO 1 to 3 leaves a rank parts of matrices, the parts of the updates are
first brought together to whole ones.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist

from raylm.parallel.layout.fragments import FlatRange

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Approximate UV^T of each matrix in ``matrices`` (count, rows, columns) by five quintic Newton-Schulz steps.

    Args:
        dtype: of the matrix products on a CPU.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else dtype)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``orthogonal: True`` are updated by Muon instead.

    Such a group holds matrices, and has ``momentum`` and ``parts``: for each matrix, how many lie side by side in it
    (the fused query, key and value projection of GPT-2 holds three); each part is orthogonalised by itself, in
    ``dtype``. Under ZeRO 1 to 3 DeepSpeed puts flat buffers in their place: :meth:`bind` says where the matrices lie in
    them.
    """

    def bind(self, ranges: list[FlatRange]) -> None:
        """Take note of every parameter's place in DeepSpeed's flat buffers, in the same order on every rank."""
        self._ranges: dict[int, list[FlatRange]] = defaultdict(list)
        for place in ranges:
            self._ranges[id(place.flat)].append(place)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every group; ``closure`` is not supported."""
        groups = self.param_groups
        for group in groups:
            if group["orthogonal"]:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        super().step(closure)
        self.param_groups = groups

    def _step_matrices(self, group: dict) -> None:
        parts = group["parts"]
        if not hasattr(self, "_ranges"):
            updates = [self._momentum(parameter, group) for parameter in group["params"]]
            directions = _directions(updates, [parts[name] for name in group["names"]], group["dtype"])
            for parameter, direction in zip(group["params"], directions, strict=True):
                _apply(parameter, direction, group)
            return
        for flat in group["params"]:
            ranges = self._ranges[id(flat)]
            updates = _whole(self._momentum(flat, group), ranges)
            directions = _directions(updates, [parts[place.name] for place in ranges], group["dtype"])
            for place, direction in zip(ranges, directions, strict=True):
                mine = direction.reshape(-1)[place.start : place.start + place.length]
                _apply(flat[place.offset : place.offset + place.length], mine, group)

    def _momentum(self, parameter: torch.Tensor, group: dict) -> torch.Tensor:
        """Nesterov momentum of the gradient, which is what is orthogonalised."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(buffer, group["momentum"])


def _apply(parameter: torch.Tensor, direction: torch.Tensor, group: dict) -> None:
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])


def _whole(update: torch.Tensor, ranges: list[FlatRange]) -> list[torch.Tensor]:
    """The matrices of ``ranges``, of which every rank holds a range in its flat ``update``; a collective."""
    sizes = [math.prod(place.shape) for place in ranges]
    # Every element is held by one rank, so that a sum brings them together.
    joined = update.new_zeros(sum(sizes))
    wholes = joined.split(sizes)
    for place, whole in zip(ranges, wholes, strict=True):
        whole[place.start : place.start + place.length] = update[place.offset : place.offset + place.length]
    dist.all_reduce(joined)
    return [whole.view(place.shape) for place, whole in zip(ranges, wholes, strict=True)]


def _directions(updates: list[torch.Tensor], parts: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """The orthogonalised ``updates`` (matrices of ``parts`` side by side), scaled for their shapes."""
    # The first entries of each list go together: (matrix, part) of one shape.
    by_shape: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for index, (update, count) in enumerate(zip(updates, parts, strict=True)):
        by_shape[update.shape[0], update.shape[1] // count].extend((index, part) for part in range(count))
    directions = [torch.empty_like(update) for update in updates]
    for (rows, columns), members in by_shape.items():
        stacked = torch.stack([updates[i][:, p * columns : (p + 1) * columns] for i, p in members])
        result = _orthogonalize_shared(stacked, dtype).mul_(max(1.0, rows / columns) ** 0.5)
        for (i, p), matrix in zip(members, result.unbind(), strict=True):
            directions[i][:, p * columns : (p + 1) * columns] = matrix
    return directions


def _orthogonalize_shared(stacked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each rank takes a share of the matrices (count, rows, columns); all ranks get all results."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1 or stacked.size(0) < world_size:
        return orthogonalize(stacked, dtype)
    per_rank = -(-stacked.size(0) // world_size)
    padded = torch.zeros(per_rank * world_size, *stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
    padded[: stacked.size(0)] = stacked
    rank = dist.get_rank()
    mine = orthogonalize(padded[rank * per_rank : (rank + 1) * per_rank], dtype).contiguous()
    dist.all_gather_into_tensor(padded, mine)
    return padded[: stacked.size(0)]
