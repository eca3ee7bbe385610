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
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from raylm.models.families.base import Step, Steps
from raylm.parallel.layout.pipeline_stages import balanced_stages
from raylm.parallel.layout.tensor import (
    ColumnParallel,
    DropoutStreams,
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

    layers = [
        VocabularyEmbedding(embedding, group), ColumnParallel(wide, group, parts=3), RowParallel(narrow, group),
        ColumnParallel(head, group),
    ]  # fmt: skip
    for smoothing in (0.0, 0.2):
        whole = loss_of(
            embedding, wide, narrow, head, 2 * WIDTH,
            lambda logits, share=smoothing: functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=share
            ),
        )  # fmt: skip
        cut = loss_of(
            *layers, 2 * WIDTH // size,
            lambda logits, share=smoothing: vocabulary_cross_entropy(logits, targets, group, VOCABULARY, share),
        )  # fmt: skip
        torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-5)
        gradients = torch.autograd.grad(whole, [embedding.weight, wide.weight, wide.bias, narrow.weight, head.weight])
        found = [layers[0].weight, layers[1].weight, layers[1].bias, layers[2].weight, layers[3].weight]
        for part, gradient, mine in zip(found, gradients, torch.autograd.grad(cut, found), strict=True):
            torch.testing.assert_close(mine, part.slicing.take(gradient), rtol=1e-5, atol=1e-5)
    check_dropout(TensorGroup(rank, size, dist.group.WORLD, DropoutStreams(rank, torch.device("cpu"))))
    dist.barrier()
    dist.destroy_process_group()


def check_dropout(group: TensorGroup) -> None:
    """Dropout differs over the ranks where activations are cut, nowhere else, and follows from the seed."""
    torch.manual_seed(0)
    wide, narrow = (ColumnParallel(nn.Linear(8, 64), group), RowParallel(nn.Linear(64, 8), group))
    inputs = torch.randn(4, 8)

    def block(values: torch.Tensor) -> torch.Tensor:
        masks["before"] = functional.dropout(torch.ones(32), 0.5)
        hidden = wide(values)
        masks["inside"] = functional.dropout(torch.ones(4, 64 // group.size), 0.5)
        result = narrow(hidden * masks["inside"])
        masks["after"] = functional.dropout(torch.ones(4, 8), 0.5)
        # Saved for the backward pass last, which is where a recomputation ends.
        return (result * masks["after"]).sin()

    def run(seed: int, *, recompute: bool) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        masks.clear()
        torch.manual_seed(seed)
        outputs = inputs
        for _ in range(2):
            outputs = checkpoint(block, outputs, use_reentrant=False) if recompute else block(outputs)
        forward = dict(masks)
        return forward, list(torch.autograd.grad(outputs.sum(), [wide.weight, narrow.weight, narrow.bias]))

    masks: dict[str, torch.Tensor] = {}
    first, gradients = run(5, recompute=False)
    for name, mask in first.items():
        ranks = [torch.empty_like(mask) for _ in range(group.size)]
        dist.all_gather(ranks, mask)
        assert torch.equal(ranks[0], ranks[1]) == (name != "inside"), name
    again, recomputed = run(5, recompute=True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for one, other in zip(gradients, recomputed, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(run(6, recompute=False)[0]["inside"], first["inside"])
    wide.eval()
    state = torch.get_rng_state()
    wide(inputs)
    assert torch.equal(state, torch.get_rng_state())


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
