"""What a forward and backward pass keeps in memory and computes, found by making one without data.

The model's own code runs on fake tensors (shapes and devices without content). Every storage that an operator makes is
counted from its birth to its end, and every operator's floating-point operations. That follows whatever attention
kernel, activation function or recomputation the model uses, where a formula would have to be kept in step with it. The
pass of a deep model is put together from the passes of its different steps: :func:`chain`.
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
_aten = torch.ops.aten
PRODUCTS = (_aten.mm, _aten.addmm, _aten.addmm_, _aten.bmm, _aten.baddbmm)
Kinds = dict[str, int]


@dataclass(frozen=True)
class Work:
    """What one forward and backward pass of a micro-batch asks of a processor.

    Attributes:
        products: FLOPs of products with weights.
        attention: FLOPs of attention: products of queries, keys and values; half where a kernel leaves out what a
            causal mask hides.
        touched: bytes that operators make, which all travel through memory; gradients of weights aside.
        operators: how many of them there are, each a kernel to launch.
    """

    products: float = 0.0
    attention: float = 0.0
    touched: float = 0.0
    operators: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.touched + other.touched,
            self.operators + other.operators,
        )

    def times(self, count: float) -> Work:
        """Of a micro-batch with ``count`` times as many sequences: as many operators, larger ones."""
        return Work(self.products * count, self.attention * count, self.touched * count, self.operators)


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
        work: of both passes, with what is recomputed.
    """

    forward: Kinds
    backward: Kinds
    peak: Kinds
    kept: Kinds
    given: int
    made: int
    gradients: int
    work: Work


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

    def with_logits(self, most: int) -> Footprint:
        """Of a loss that holds at most so many bytes of logits at a time."""

        def capped(kinds: Kinds) -> Kinds:
            return {kind: min(size, most) if kind == "logits" else size for kind, size in kinds.items()}

        return Footprint(capped(self.peak), capped(self.without_gradients), self.kept)


class _Meter(TorchDispatchMode):
    """Counts the storages that operators make, by kind, for as long as they live, and what the operators compute."""

    def __init__(self, parameters: Iterable[torch.Tensor], heads: Iterable[torch.Tensor], causal: bool) -> None:
        super().__init__()
        self._causal = causal
        self._heads = {weight.untyped_storage()._cdata for weight in heads}
        self._known: dict[int, tuple[weakref.ref, str, int]] = {}
        self.work = Work()
        self.live: Counter[str] = Counter()
        self.peak: Kinds = dict.fromkeys(KINDS, 0)
        self.without_gradients: Kinds = dict.fromkeys(KINDS, 0)
        self._shapes: set[torch.Size] = set()
        for parameter in parameters:
            self._add(parameter, None)
            self._shapes.add(parameter.shape)
        self._weights = set(self._known)
        self.backward = False

    def _kinds(self, function: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> list[str]:
        """The kind of each tensor in ``made``, by where it comes from; a shape alone tells little.

        Logits are what the output head makes of hidden states, and what is made of logits in their width: a layer may
        be as wide as the vocabulary. A weight's gradient is a product of two activations in the weight's shape: with as
        many tokens as a layer is wide, what the layer makes has that shape too.
        """
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        widths = {t.shape[-1] for t in given if t.ndim and self._known_kind(t) == "logits"}
        product = function.overloadpacket in PRODUCTS
        head = product and not widths and not storages.isdisjoint(self._heads)
        gradients = self.backward and not (product and not storages.isdisjoint(self._weights))
        # A loss in chunks begins the sum of its head's gradient in the forward pass.
        gradients = gradients or function.overloadpacket is _aten.zeros

        def kind(tensor: torch.Tensor) -> str:
            if known := self._known_kind(tensor):
                # Computed in place: a sum of gradients over the chunks of a loss is one.
                return known
            if gradients and tensor.shape in self._shapes:
                return "gradients"
            return "logits" if head or (not product and tensor.ndim and tensor.shape[-1] in widths) else "activations"

        return [kind(tensor) for tensor in made]

    def _known_kind(self, tensor: torch.Tensor) -> str:
        return self._known.get(tensor.untyped_storage()._cdata, (None, "", 0))[1]

    def _count(self, function: Any, arguments: Any, named: Any, made: list[torch.Tensor], kinds: list[str]) -> None:
        """Add what the operator computes to ``work``."""
        packet = function.overloadpacket
        if all(t.untyped_storage()._cdata in self._known for t in made) and not packet.__name__.endswith("_"):
            # A view of what was there.
            return
        touched = sum(t.nbytes for t, kind in zip(made, kinds, strict=True) if kind != "gradients")
        self.work += Work(*_flops(packet, arguments, self._causal), touched, 1)

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
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        given = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, torch.Tensor)]
        kinds = self._kinds(function, given, made)
        self._count(function, arguments, named, made, kinds)
        for tensor, kind in zip(made, kinds, strict=True):
            self._add(tensor, kind)
        now = self.now()
        if sum(now.values()) > sum(self.peak.values()):
            self.peak = now
        rest = now | {"gradients": 0}
        if sum(rest.values()) > sum(self.without_gradients.values()):
            self.without_gradients = rest
        return result


def _flops(packet: Any, arguments: Any, causal: bool) -> tuple[float, float]:
    """FLOPs of an operator: of a product with a weight, and of attention; (0, 0) of all others.

    A product of matrices (m, k) and (k, n) takes 2 m k n. The backward pass of a fused attention kernel makes five
    such products where the forward one makes two (Dao 2023, arxiv.org/abs/2307.08691, section 4.1), and a causal one
    half of each.
    """
    if packet in PRODUCTS:
        first, second = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)][-2:]
        flops = 2.0 * first.numel() * second.shape[-1]
        # Batched products have no weight in them.
        return (0.0, flops) if first.ndim == 3 else (flops, 0.0)
    name = packet.__name__
    if "scaled_dot_product" not in name:
        return 0.0, 0.0
    tensors = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]
    backward = "backward" in name
    # (batch, heads, time, width) of queries and keys; before them, the gradient of the output.
    queries, keys = tensors[1:3] if backward else tensors[:2]
    return 0.0, (5 if backward else 2) * 2.0 * queries.numel() * keys.shape[-2] * (0.5 if causal else 1.0)


def measure(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], heads: Iterable[torch.Tensor], causal: bool
) -> tuple[Passage, Any]:
    """One pass of a micro-batch; call within a ``FakeTensorMode``, in which everything was made.

    Args:
        module: its call with ``inputs`` gives a scalar, or what goes on to the next step.
        inputs: as they arrive; they are counted as activations.
        heads: weights whose products with hidden states are logits.
        causal: whether tokens see those before them only, which a kernel is told; what positions hold, and with it
            whether a mask would say more, does not show in a fake pass, which makes the mask.

    Returns:
        the passage, and the outputs, cut off from the graph.
    """
    parameters = list(module.parameters())
    meter = _Meter([*parameters, *module.buffers()], heads, causal)
    with meter:
        arrived = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        outputs = module(*arrived)
        kept, forward = meter.now(), meter.without_gradients
        meter.without_gradients, meter.backward = kept, True
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
        work=meter.work,
    )
    return passage, tree_map(lambda t: t.detach(), outputs)


def whole(passage: Passage) -> Footprint:
    """The footprint of a module that is passed by itself."""
    most = max(passage.forward, passage.backward, key=lambda kinds: sum(kinds.values()))
    return Footprint(passage.peak, most, sum(size for kind, size in passage.kept.items() if kind != "gradients"))


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
    kept = live.total() - live["gradients"]
    done = 0
    for passage in reversed(passages):
        # Its own part is in what was measured.
        live.subtract(passage.kept)
        live["activations"] += passage.given
        see(passage.backward, passage.given, done)
        done += passage.gradients
        see({"activations": passage.given}, passage.given, done)
    return Footprint({kind: peak[kind] for kind in KINDS}, {kind: highest[kind] for kind in KINDS}, kept)
