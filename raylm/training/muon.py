"""Muon: momentum whose update of each weight matrix is orthogonalised (Jordan 2024, kellerjordan.github.io/posts/muon).

The Newton-Schulz iteration runs in fp32 on a CPU (bf16 has no hardware there) and in bf16 on a GPU, batched over
matrices of one shape. Embeddings, the output head, norms and biases go to fused AdamW. Each matrix is worked on by one
rank, and the results are gathered; that needs whole matrices, so ZeRO stage 0.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Approximate UV^T of each matrix in ``matrices`` (count, rows, columns) by five quintic Newton-Schulz steps."""
    a, b, c = COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices.float()
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
    (the fused query, key and value projection of GPT-2 holds three); each part is orthogonalised by itself.
    """

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
        # The first entries of each list go together: (parameter index, part) -> a matrix.
        by_shape: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        updates = []
        for index, parameter in enumerate(group["params"]):
            buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(buffer, group["momentum"]))
            parts = group["parts"][index]
            shape = (parameter.shape[0], parameter.shape[1] // parts)
            by_shape[shape].extend((index, part) for part in range(parts))
        for (rows, columns), members in by_shape.items():
            stacked = torch.stack([updates[i][:, p * columns : (p + 1) * columns] for i, p in members])
            result = self._orthogonalize_shared(stacked) * max(1.0, rows / columns) ** 0.5
            for (i, p), matrix in zip(members, result.unbind(), strict=True):
                target = group["params"][i][:, p * columns : (p + 1) * columns]
                target.mul_(1 - group["lr"] * group["weight_decay"]).add_(matrix, alpha=-group["lr"])

    @staticmethod
    def _orthogonalize_shared(stacked: torch.Tensor) -> torch.Tensor:
        """Each rank takes a share of the matrices (count, rows, columns); all ranks get all results."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size == 1 or stacked.size(0) < world_size:
            return orthogonalize(stacked)
        per_rank = -(-stacked.size(0) // world_size)
        padded = torch.zeros(per_rank * world_size, *stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
        padded[: stacked.size(0)] = stacked
        rank = dist.get_rank()
        mine = orthogonalize(padded[rank * per_rank : (rank + 1) * per_rank]).contiguous()
        dist.all_gather_into_tensor(padded, mine)
        return padded[: stacked.size(0)]
