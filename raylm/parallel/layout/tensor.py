"""Layers cut over the ranks of a tensor-parallel group (Shoeybi et al. 2019, arxiv.org/abs/1909.08053).

For Y = X A, a column-parallel layer holds columns of A and gives its columns of Y; the row-parallel layer after it
holds the matching rows of its own matrix and sums the products over the ranks. Embedding and head are cut along the
vocabulary, and the cross-entropy works on the parts of the logits, which are never brought together.

Between a column- and the row-parallel layer after it the ranks hold different activations, so that dropout there must
differ from rank to rank; everywhere else they hold the same, and must drop the same. :class:`DropoutStreams` sees to it
(Megatron-LM's way: two streams of random numbers, of which the second one is the rank's own).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from raylm.parallel.layout.slicing import Slicing, cut_evenly
from raylm.tasks.objective import IGNORED, Objective, summed_cross_entropy


class DropoutStreams:
    """Two streams of random numbers: one that all tensor-parallel ranks share, and one of this rank alone.

    The latter is seeded anew, each time that it is entered, by a number of the shared stream and the rank. So all of it
    follows from the seed of the shared stream, and a recomputation that restores that one repeats both.

    Args:
        rank: of this process in the tensor-parallel group.
        device: whose generator dropout uses.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._shared: list[torch.Tensor] | None = None

    def enter(self) -> None:
        """Go over to this rank's own stream, unless that was done already."""
        if self._shared is not None:
            return
        # The numbers come from the CPU's generator, so that nothing waits for a GPU.
        seed = int(torch.randint(1 << 48, (1,)))
        self._shared = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._shared.append(torch.cuda.get_rng_state(self._device))
        torch.manual_seed(seed * 1024 + self._rank)

    def leave(self) -> None:
        """Go back to the shared stream, where it was left."""
        if self._shared is None:
            return
        torch.set_rng_state(self._shared[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._shared[1], self._device)
        self._shared = None


@dataclass
class TensorGroup:
    """This rank's tensor-parallel group; ``group`` is filled in once the process groups exist.

    Attributes:
        streams: where the model has dropout.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    streams: DropoutStreams | None = None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        """Largest of the group, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values


class _CopyToParts(torch.autograd.Function):
    """The same input to all parts: nothing forward, the sum of their gradients backward."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return ctx.group.sum(gradient.contiguous().clone()), None


class _SumOverParts(torch.autograd.Function):
    """The sum of what the parts give: all-reduced forward, the same gradient to each backward."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        return group.sum(values.contiguous().clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient, None


def copy_to_parts(values: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """``values`` as the input of layers that each rank holds a part of."""
    return _CopyToParts.apply(values, group) if group.size > 1 else values


def sum_over_parts(values: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """The sum of the ranks' ``values``."""
    return _SumOverParts.apply(values, group) if group.size > 1 else values


def part_of(parameter: torch.Tensor, slicing: Slicing) -> nn.Parameter:
    """This rank's part of a whole ``parameter``; carries ``slicing``, and the mark that DeepSpeed's norm looks for."""
    part = nn.Parameter(slicing.take(parameter.detach()))
    part.slicing = slicing
    # Without it DeepSpeed counts the parameter on the first tensor-parallel rank only.
    part.tensor_model_parallel = True
    return part


def _is_transposed(layer: nn.Module) -> bool:
    """Whether ``layer`` is GPT-2's Conv1D, whose weight is (in, out)."""
    return type(layer).__name__ == "Conv1D"


class ColumnParallel(nn.Module):
    """A linear layer (or GPT-2's Conv1D) of which each rank holds a part of the outputs.

    Args:
        layer: the whole layer.
        parts: matrices side by side in it, each of which is cut by itself.
        last: whether no row-parallel layer brings its outputs together (a head).
    """

    def __init__(self, layer: nn.Module, group: TensorGroup, parts: int = 1, *, last: bool = False) -> None:
        super().__init__()
        self.group, self.transposed, self.last = group, _is_transposed(layer), last
        shape = tuple(layer.weight.shape)
        cut = cut_evenly(shape, 1 if self.transposed else 0, group.rank, group.size, parts)
        self.weight = part_of(layer.weight, cut)
        self.bias = None
        if layer.bias is not None:
            self.bias = part_of(layer.bias, cut_evenly(tuple(layer.bias.shape), 0, group.rank, group.size, parts))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) to this rank's part of the outputs (..., out / size)."""
        if self.training and self.group.streams is not None and not self.last:
            self.group.streams.enter()
        weight = self.weight.t() if self.transposed else self.weight
        return functional.linear(copy_to_parts(inputs, self.group), weight, self.bias)


class RowParallel(nn.Module):
    """A linear layer (or GPT-2's Conv1D) of which each rank holds the part that its inputs are multiplied with."""

    def __init__(self, layer: nn.Module, group: TensorGroup) -> None:
        super().__init__()
        self.group, self.transposed = group, _is_transposed(layer)
        shape = tuple(layer.weight.shape)
        self.weight = part_of(layer.weight, cut_evenly(shape, 0 if self.transposed else 1, group.rank, group.size))
        self.bias = layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """This rank's part of the inputs (..., in / size) to the whole outputs (..., out)."""
        if self.group.streams is not None:
            # First of all, as what recomputes activations may end as soon as it has the last one that it needs.
            self.group.streams.leave()
        products = functional.linear(inputs, self.weight.t() if self.transposed else self.weight)
        outputs = sum_over_parts(products, self.group)
        return outputs if self.bias is None else outputs + self.bias


class VocabularyEmbedding(nn.Module):
    """An embedding of which each rank holds the rows of a range of the vocabulary."""

    def __init__(self, embedding: nn.Embedding, group: TensorGroup) -> None:
        super().__init__()
        self.group = group
        cut = cut_evenly(tuple(embedding.weight.shape), 0, group.rank, group.size)
        ((self.first, self.stop),) = cut.ranges
        self.weight = part_of(embedding.weight, cut)
        padding = embedding.padding_idx
        here = padding is not None and self.first <= padding < self.stop
        self.padding = padding - self.first if here else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (...) to embeddings (..., width), whole on every rank."""
        elsewhere = (ids < self.first) | (ids >= self.stop)
        local = (ids - self.first).masked_fill(elsewhere, 0)
        found = functional.embedding(local, self.weight, padding_idx=self.padding)
        return sum_over_parts(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group)


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits: torch.Tensor,
        targets: torch.Tensor,
        group: TensorGroup,
        first: int,
        vocab_size: int,
        smoothing: float,
    ) -> torch.Tensor:
        logits = logits.float()
        highest = logits.amax(-1)
        group.maximum(highest)
        shifted = logits - highest.unsqueeze(-1)
        elsewhere = (targets < first) | (targets >= first + logits.size(-1))
        local = (targets - first).masked_fill(elsewhere, 0)
        chosen = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        # What the targets ask for: the chosen logit and, smoothed, the mean of all of them.
        asked = (1 - smoothing) * chosen
        if smoothing:
            asked += smoothing / vocab_size * shifted.sum(-1)
        exponentials = shifted.exp_()
        # One collective for both sums.
        total, asked = group.sum(torch.stack([exponentials.sum(-1), asked]))
        counted = targets != IGNORED
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), local, elsewhere, counted)
        ctx.vocab_size, ctx.smoothing = vocab_size, smoothing
        return (total.log() - asked).masked_fill(~counted, 0.0).sum()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        probabilities, local, elsewhere, counted = ctx.saved_tensors
        here = (~elsewhere).to(probabilities.dtype).unsqueeze(-1) * (1 - ctx.smoothing)
        result = probabilities.scatter_add(-1, local.unsqueeze(-1), -here)
        if ctx.smoothing:
            result -= ctx.smoothing / ctx.vocab_size
        return result.mul_(counted.unsqueeze(-1) * gradient), None, None, None, None, None


def split_loss(
    objective: Objective,
    logits: torch.Tensor,
    targets: torch.Tensor,
    group: TensorGroup,
    vocab_size: int,
    *,
    training: bool = True,
) -> torch.Tensor:
    """The objective's summed loss, nats, from the ranks' parts of the logits; see :func:`vocabulary_cross_entropy`.

    Args:
        training: what training minimises; else the plain loss.
    """

    def cross_entropy(part: torch.Tensor, those: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return vocabulary_cross_entropy(part, those, group, vocab_size, smoothing)

    return (objective.training_loss if training else objective.loss)(logits, targets, cross_entropy)


def vocabulary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, group: TensorGroup, vocab_size: int, smoothing: float = 0.0
) -> torch.Tensor:
    """Summed cross-entropy, nats, in fp32, from the ranks' parts of the logits.

    Args:
        logits: this rank's part (batch, time, its part of the vocabulary).
        targets: (batch, time), :data:`IGNORED` where nothing counts.
        vocab_size: of the whole vocabulary.
        smoothing: share of each target that the whole vocabulary has in equal parts.
    """
    if group.size == 1:
        return summed_cross_entropy(logits, targets, smoothing)
    ((first, _),) = cut_evenly((vocab_size,), 0, group.rank, group.size).ranges
    return _VocabularyCrossEntropy.apply(logits, targets, group, first, vocab_size, smoothing)
