"""The cut layers against whole ones, on two processes; where stages begin."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from raylm.parallel.stages import Step, Steps, balanced_stages
from raylm.parallel.tensor import (
    ColumnParallel,
    RowParallel,
    TensorGroup,
    VocabularyEmbedding,
    vocabulary_cross_entropy,
)

VOCABULARY, WIDTH = 11, 8


def compare(rank: int, size: int, store: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    group = TensorGroup(rank, size, dist.group.WORLD)
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=1)
    wide, narrow = Conv1D(6 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    ids = torch.tensor([[0, 1, 5, 6], [10, 3, 1, 7]])
    targets = torch.tensor([[1, -100, 5, 10], [0, 6, -100, 4]])

    def loss_of(embed, widen, shrink, read, split, cross_entropy):
        first, second, third = widen(embed(ids)).split(split, -1)
        return cross_entropy(read(shrink(first * second + third)))

    whole = loss_of(
        embedding, wide, narrow, head, 2 * WIDTH,
        lambda logits: functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"),
    )  # fmt: skip
    layers = [
        VocabularyEmbedding(embedding, group), ColumnParallel(wide, group, parts=3), RowParallel(narrow, group),
        ColumnParallel(head, group),
    ]  # fmt: skip
    cut = loss_of(
        *layers, 2 * WIDTH // size,
        lambda logits: vocabulary_cross_entropy(logits, targets, group, VOCABULARY),
    )  # fmt: skip
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-5)
    gradients = torch.autograd.grad(whole, [embedding.weight, wide.weight, wide.bias, narrow.weight, head.weight])
    found = [layers[0].weight, layers[1].weight, layers[1].bias, layers[2].weight, layers[3].weight]
    for part, gradient, mine in zip(found, gradients, torch.autograd.grad(cut, found), strict=True):
        torch.testing.assert_close(mine, part.slicing.take(gradient), rtol=1e-5, atol=1e-5)
    dist.barrier()
    dist.destroy_process_group()


def test_cut_layers_give_the_same_loss_and_gradients(tmp_path: Path) -> None:
    multiprocessing.start_processes(compare, (2, str(tmp_path / "store")), nprocs=2, start_method="spawn")


@pytest.mark.parametrize(
    ("weights", "stages", "expected"),
    [
        ([0, 1, 1, 1, 1, 0], 2, [0, 3, 6]),
        ([9, 1, 1, 1, 1, 0], 2, [0, 2, 6]),
        ([9, 1, 1, 1, 1, 9], 4, [0, 2, 3, 4, 6]),
        ([0, 5, 1, 1, 1, 3], 2, [0, 2, 6]),
        ([0, 1, 1, 1, 1, 0], 1, [0, 6]),
    ],
)
def test_stages_are_balanced_and_none_is_empty(weights: list[int], stages: int, expected: list[int]) -> None:
    step = Step({}, lambda layer, values: values)
    assert balanced_stages(Steps([step], [step] * 4, [step]), weights, stages) == expected
