"""What a forward and backward pass keeps in memory, found by making one without data.

The model's own code runs on fake tensors (shapes and devices without content), and every storage that an operator makes
is counted from its birth to its end. That follows whatever attention kernel, activation function or recomputation the
model uses, where a formula would have to be kept in step with it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KINDS = ("gradients", "logits", "activations")


@dataclass(frozen=True)
class Footprint:
    """Bytes at the moments that matter of one forward and backward pass of a micro-batch.

    Attributes:
        peak: live bytes by kind (:data:`KINDS`) when they are the most, the first time gradients are made.
        without_gradients: the most live bytes other than gradients, by kind.
        kept: bytes that wait between the forward and the backward pass.
    """

    peak: dict[str, int]
    without_gradients: dict[str, int]
    kept: int


class _Meter(TorchDispatchMode):
    """Counts the storages that operators make, by kind, for as long as they live."""

    def __init__(self, parameters: Iterable[nn.Parameter], vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._known: dict[int, tuple[weakref.ref, str, int]] = {}
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.without_gradients: dict[str, int] = {}
        for parameter in parameters:
            self._add(parameter, None)

    def _add(self, tensor: torch.Tensor, kind: str | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if kind else 0

        def forget(_: Any) -> None:
            _, kind_now, size_now = self._known.pop(key)
            self.live[kind_now] -= size_now

        self._known[key] = (weakref.ref(storage, forget), kind or "", size)
        self.live[kind or ""] += size

    def is_gradient(self, parameter: nn.Parameter) -> None:
        """Count the storage of ``parameter.grad`` as one of gradients from here on."""
        key = parameter.grad.untyped_storage()._cdata
        reference, kind, size = self._known[key]
        self._known[key] = (reference, "gradients", size)
        self.live[kind] -= size
        self.live["gradients"] += size

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, "logits" if tensor.ndim and tensor.shape[-1] == self._vocab_size else "activations")
        now = {kind: self.live[kind] for kind in KINDS}
        if sum(now.values()) > sum(self.peak.values()):
            self.peak = now
        rest = now | {"gradients": 0}
        if sum(rest.values()) > sum(self.without_gradients.values()):
            self.without_gradients = rest
        return result


def measure(module: nn.Module, inputs: tuple[torch.Tensor, ...], logits_width: int) -> tuple[Footprint, Any]:
    """The footprint of one micro-batch; call within a ``FakeTensorMode``, in which everything was made.

    Args:
        module: its call with ``inputs`` gives a scalar, or what goes on to the next pipeline stage.
        inputs: as they arrive; they are counted as activations, as a stage keeps what it was sent.
        logits_width: last dimension of the tensors that are counted as logits.

    Returns:
        the footprint, and the outputs, cut off from the graph.
    """
    parameters = list(module.parameters())
    meter = _Meter([*parameters, *module.buffers()], logits_width)
    hooks = [parameter.register_post_accumulate_grad_hook(meter.is_gradient) for parameter in parameters]
    with meter:
        arrived = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        outputs = module(*arrived)
        kept = sum(meter.live[kind] for kind in KINDS)
        sent = [t for t in tree_leaves(outputs) if t.requires_grad]
        torch.autograd.backward(sent, [torch.ones_like(t) for t in sent])
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None
    return Footprint(meter.peak, meter.without_gradients, kept), tree_map(lambda t: t.detach(), outputs)
