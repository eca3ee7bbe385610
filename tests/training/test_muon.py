"""Newton-Schulz orthogonalisation and the update that it makes."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raylm.config.training import TrainingSection
from raylm.training.optimizers.build import make_optimizer
from raylm.training.optimizers.muon import orthogonalize


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((3, 16, 64), (3, 64, 16), (2, 16, 40)):
            found = orthogonalize(torch.randn(shape), dtype)
            assert found.dtype == torch.float32
            values = torch.linalg.svdvals(found)
            # The quintic with these coefficients ends between about 0.7 and 1.2, not at one exactly.
            assert values.min() > 0.3, (shape, dtype)
            assert values.max() < 1.3, (shape, dtype)


def test_update_keeps_the_singular_directions() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1, 8, 24)
    u, _, vh = torch.linalg.svd(matrix[0], full_matrices=False)
    inner = u.T @ orthogonalize(matrix)[0] @ vh.T
    off_diagonal = inner - torch.diag(inner.diagonal())
    assert off_diagonal.abs().max() < 1e-4


def test_fused_parts_are_orthogonalised_apart() -> None:
    torch.manual_seed(0)
    names = ["transformer.h.0.attn.c_attn.weight", *(f"transformer.h.{i}.attn.c_proj.weight" for i in range(3))]
    fused = torch.nn.Parameter(torch.randn(8, 24))
    single = [torch.nn.Parameter(fused.detach()[:, i * 8 : i * 8 + 8].clone()) for i in range(3)]
    training = TrainingSection(steps=1, optimizer="muon", weight_decay=0.1)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16))
    optimizer = make_optimizer(training, dict(zip(names, [fused, *single], strict=True)), model)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    gradient = torch.randn(8, 24)
    fused.grad = gradient
    for i, parameter in enumerate(single):
        parameter.grad = gradient[:, i * 8 : i * 8 + 8].clone()
    optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in single], dim=1))
