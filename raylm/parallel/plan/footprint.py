"""What a forward and backward pass keeps in memory, found by making one without data.

The model's own code runs on fake tensors (shapes and devices without content), and every storage that an operator makes
is counted from its birth to its end. That follows whatever attention kernel, activation function or recomputation the
model uses, where a formula would have to be kept in step with it. The pass of a deep model is put together from the
passes of its different steps: :func:`chain`.
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
Kinds = dict[str, int]


@dataclass(frozen=True)
class Passage:
    """Live bytes by kind (:data:`KINDS`) in one forward and backward pass of a module by itself.

    Attributes:
        forward: the most in the forward pass.
        backward: the most other than gradients in the backward pass.
        peak: the most at all, the first time that gradients are made.
        kept: between the two passes, with what came in and what went out.
        given: bytes that came in.
        made: bytes that went out.
        gradients: bytes of its parameters.
    """

    forward: Kinds
    backward: Kinds
    peak: Kinds
    kept: Kinds
    given: int
    made: int
    gradients: int


@dataclass(frozen=True)
class Footprint:
    """Bytes at the moments that matter of one forward and backward pass of a micro-batch.

    Attributes:
        peak: live bytes by kind (:data:`KINDS`) when they are the most, the first time gradients are made.
        without_gradients: the most live bytes other than gradients, by kind.
        kept: bytes that wait between the forward and the backward pass.
    """

    peak: Kinds
    without_gradients: Kinds
    kept: int

    def times(self, count: int) -> Footprint:
        """Of a micro-batch with ``count`` times as many sequences: all but the gradients grow with it."""

        def grown(kinds: Kinds) -> Kinds:
            return {kind: size if kind == "gradients" else size * count for kind, size in kinds.items()}

        return Footprint(grown(self.peak), grown(self.without_gradients), self.kept * count)


class _Meter(TorchDispatchMode):
    """Counts the storages that operators make, by kind, for as long as they live."""

    def __init__(self, parameters: Iterable[torch.Tensor], vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._known: dict[int, tuple[weakref.ref, str, int]] = {}
        self.live: Counter[str] = Counter()
        self.peak: Kinds = dict.fromkeys(KINDS, 0)
        self.without_gradients: Kinds = dict.fromkeys(KINDS, 0)
        # What an operator makes in a parameter's shape is a gradient, or becomes a part of one.
        self._shapes: set[torch.Size] = set()
        for parameter in parameters:
            self._add(parameter, None)
            self._shapes.add(parameter.shape)

    def _kind(self, tensor: torch.Tensor) -> str:
        if tensor.shape in self._shapes:
            return "gradients"
        return "logits" if tensor.ndim and tensor.shape[-1] == self._vocab_size else "activations"

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

    def now(self) -> Kinds:
        """Live bytes by kind."""
        return {kind: self.live[kind] for kind in KINDS}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, self._kind(tensor))
        now = self.now()
        if sum(now.values()) > sum(self.peak.values()):
            self.peak = now
        rest = now | {"gradients": 0}
        if sum(rest.values()) > sum(self.without_gradients.values()):
            self.without_gradients = rest
        return result


def measure(module: nn.Module, inputs: tuple[torch.Tensor, ...], logits_width: int) -> tuple[Passage, Any]:
    """One pass of a micro-batch; call within a ``FakeTensorMode``, in which everything was made.

    Args:
        module: its call with ``inputs`` gives a scalar, or what goes on to the next step.
        inputs: as they arrive; they are counted as activations.
        logits_width: last dimension of the tensors that are counted as logits.

    Returns:
        the passage, and the outputs, cut off from the graph.
    """
    parameters = list(module.parameters())
    meter = _Meter([*parameters, *module.buffers()], logits_width)
    with meter:
        arrived = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        outputs = module(*arrived)
        kept, forward = meter.now(), meter.without_gradients
        meter.without_gradients = kept
        sent = [t for t in tree_leaves(outputs) if t.requires_grad]
        torch.autograd.backward(sent, [torch.ones_like(t) for t in sent])
    gradients = sum(parameter.nbytes for parameter in parameters)
    for parameter in parameters:
        parameter.grad = None
    passage = Passage(
        forward,
        meter.without_gradients,
        meter.peak,
        kept,
        given=sum(t.nbytes for t in arrived),
        made=sum(t.nbytes for t in tree_leaves(outputs)),
        gradients=gradients,
    )
    return passage, tree_map(lambda t: t.detach(), outputs)


def whole(passage: Passage) -> Footprint:
    """The footprint of a module that is passed by itself."""
    most = max(passage.forward, passage.backward, key=lambda kinds: sum(kinds.values()))
    return Footprint(passage.peak, most, sum(passage.kept.values()))


def chain(passages: list[Passage]) -> Footprint:
    """The footprint of steps that are passed one after the other, each of which was measured by itself.

    What goes out of one step is what comes into the next, and is counted once, with the step that makes it.
    """
    live = Counter({"activations": passages[0].given})
    peak: Counter[str] = Counter()
    highest: Counter[str] = Counter()

    def see(moment: Kinds, given: int, made_before: int) -> None:
        nonlocal peak, highest
        now = live + Counter(moment)
        now["activations"] -= given
        rest = +now
        if rest.total() > highest.total():
            highest = rest
        if rest.total() + made_before > peak.total():
            peak = rest + Counter({"gradients": made_before})

    for passage in passages:
        see(passage.forward, passage.given, 0)
        live.update(passage.kept)
        live["activations"] -= passage.given
    kept = live.total()
    done = 0
    for passage in reversed(passages):
        # Its own part is in what was measured.
        live.subtract(passage.kept)
        live["activations"] += passage.given
        see(passage.backward, passage.given, done)
        done += passage.gradients
        see({"activations": passage.given}, passage.given, done)
    return Footprint({kind: peak[kind] for kind in KINDS}, {kind: highest[kind] for kind in KINDS}, kept)
