"""Cross-entropy from hidden states, which never holds all logits.

4,096 tokens of a vocabulary of 49,152 are 805 MB in fp32, and a plain pass holds three of them: the logits, their
softmax and the gradient. Here the logits of some tokens are made at a time, and the gradient with respect to the hidden
states and the head with them (as in Wijmans et al. 2024, arXiv:2411.09009, without the kernel).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from raylm.data.samples.token_samples import IGNORED

# Elements of the logits that are in memory at a time: 32 MiB in fp32 on a CPU. A GPU needs a thousand rows at once to
# be busy with a large vocabulary: 512 MiB.
MOST_ELEMENTS, MOST_ON_GPU = 1 << 23, 1 << 27


def most_elements(use_gpu: bool) -> int:
    """Elements of the logits that are in memory at a time."""
    return MOST_ON_GPU if use_gpu else MOST_ELEMENTS


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy, nats, of targets by a linear head.

    The backward pass multiplies the gradients that the forward pass made.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        smoothing: float = 0.0,
        most: int | None = None,
    ) -> torch.Tensor:
        """``hidden`` [n, width], ``weight`` [vocabulary, width], ``bias`` [vocabulary], ``targets``, int64 [n]; some of
        these may be :data:`IGNORED`. All choices share ``smoothing`` of each target. ``most``: see
        :func:`head_loss`."""
        needs = context.needs_input_grad
        of_hidden = torch.empty_like(hidden) if needs[0] else None
        # Sums over many chunks: in fp32 also where the weights are not.
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs[1] else None
        of_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if needs[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part in _parts(hidden, weight, most):
            logits = functional.linear(hidden[part], weight, bias).float()
            likely = torch.log_softmax(logits, dim=-1)
            counted = (targets[part] != IGNORED).unsqueeze(1)
            plain = functional.nll_loss(likely, targets[part], ignore_index=IGNORED, reduction="sum")
            total += (1 - smoothing) * plain
            if smoothing:
                total -= smoothing * (likely.mean(dim=1) * counted[:, 0]).sum()
            if not any(needs[:3]):
                continue
            asked = (smoothing - 1) * counted.float()
            gradient = likely.exp_().scatter_add_(1, targets[part].clamp(min=0).unsqueeze(1), asked)
            if smoothing:
                gradient -= smoothing / len(weight)
            gradient *= counted
            if of_bias is not None:
                of_bias += gradient.sum(dim=0)
            gradient = gradient.to(hidden.dtype)
            if of_hidden is not None:
                of_hidden[part] = gradient @ weight
            if of_weight is not None:
                _add_product(of_weight, gradient, hidden[part])
        context.save_for_backward(
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(weight.dtype),
        )
        return total

    @staticmethod
    def backward(context: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden states, weight and bias."""
        return (
            *(None if one is None else one * outer.to(one.dtype) for one in context.saved_tensors),
            None,
            None,
            None,
        )


class ChunkedLogProbabilities(torch.autograd.Function):
    """The log-probability of each target by a linear head.

    What a gradient counts is known in the backward pass only, which makes the logits again.
    """

    @staticmethod
    def forward(
        context: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        """``hidden`` [n, width], ``weight`` [vocabulary, width], ``bias`` [vocabulary], ``targets``, int64 [n], to fp32
        [n]."""
        found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for part in _parts(hidden, weight):
            likely = torch.log_softmax(functional.linear(hidden[part], weight, bias).float(), dim=-1)
            found[part] = likely.gather(1, targets[part].unsqueeze(1))[:, 0]
        context.save_for_backward(hidden, weight, bias, targets)
        return found

    @staticmethod
    def backward(context: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden states, weight and bias."""
        hidden, weight, bias, targets = context.saved_tensors
        needs = context.needs_input_grad
        of_hidden = torch.empty_like(hidden) if needs[0] else None
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs[1] else None
        of_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if needs[2] else None
        for part in _parts(hidden, weight):
            logits = functional.linear(hidden[part], weight, bias).float()
            gradient = torch.log_softmax(logits, dim=-1).exp_().neg_()
            gradient.scatter_add_(1, targets[part].unsqueeze(1), torch.ones_like(gradient[:, :1]))
            gradient *= outer[part].unsqueeze(1)
            if of_bias is not None:
                of_bias += gradient.sum(dim=0)
            gradient = gradient.to(hidden.dtype)
            if of_hidden is not None:
                of_hidden[part] = gradient @ weight
            if of_weight is not None:
                _add_product(of_weight, gradient, hidden[part])
        found = (None if one is None else one.to(hidden.dtype) for one in (of_weight, of_bias))
        return (of_hidden, *found, None)


def _parts(hidden: torch.Tensor, weight: torch.Tensor, most: int | None = None) -> Iterator[slice]:
    """Rows whose logits are in memory at a time."""
    rows = max(1, (most or most_elements(hidden.is_cuda)) // len(weight))
    for first in range(0, len(hidden), rows):
        yield slice(first, first + rows)


def _add_product(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add a part's gradient of the weight to the sum, fp32.

    Products of bf16 are many times as fast as those of fp32 on a GPU, and sum in fp32 within the part.
    """
    if hidden.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden)
    else:
        total += gradient.t() @ hidden


def head_loss(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0, most: int | None = None
) -> torch.Tensor:
    """The summed cross-entropy of ``targets`` [n] by ``head`` over ``hidden`` [n, width].

    Args:
        smoothing: share of each target that all choices have in equal parts.
        most: elements of the logits at a time; by default what suits the device.
    """
    return _within(head, ChunkedCrossEntropy, hidden, targets, smoothing, most)


def head_log_probabilities(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The log-probability of each of ``targets`` [n] by ``head`` over ``hidden`` [n, width], fp32 [n]."""
    return _within(head, ChunkedLogProbabilities, hidden, targets)


def _within(
    head: nn.Linear, function: Any, hidden: torch.Tensor, targets: torch.Tensor, *more: float | None
) -> torch.Tensor:
    """Compute ``function`` within the call of the head itself, which ZeRO 3 gathers the weights for."""

    def forward(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return function.apply(hidden, head.weight, head.bias, targets, *more)

    # DeepSpeed may have put a function of its own in the place of the module's.
    before = head.__dict__.get("forward")
    head.forward = forward  # type: ignore[method-assign]
    try:
        return head(hidden, targets)
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]
