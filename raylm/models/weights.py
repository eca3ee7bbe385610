"""Weights one parameter at a time: drawn from a seed, or read out of a Hugging Face directory.

In: an :class:`Outline`, a model whose parameters have shapes but no memory. Out: for the name of a parameter something
that gives any part of it. Whoever needs a part of a model (a pipeline stage, a tensor-parallel rank) takes it from
here, so that no process ever holds the whole. What is drawn is a function of the seed and the parameter's name, and so
is the same under every layout.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raylm.errors import UserError, first_line
from raylm.models.heads import CAUSAL, Head
from raylm.models.loading import load_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# What safetensors calls the types that are weights as they are; others (8 bits) mean something with a scale only.
TRAINABLE = ("F64", "F32", "F16", "BF16")


class Sliceable(Protocol):
    """A whole parameter of which parts can be taken: a tensor, or a tensor in a file that is read where it is cut."""

    def __getitem__(self, part: Any) -> torch.Tensor: ...


class Weights(Protocol):
    """Where a model's parameters come from."""

    def open(self, name: str) -> Sliceable:
        """The parameter ``name`` (the first of its names, where it is tied), fp32 or as the file has it.

        Raises:
            UserError: there is none of this name and shape.
        """


@dataclass(frozen=True)
class _Operation:
    """One in-place operation of an initialisation, on a view of a parameter."""

    function: Any
    arguments: tuple
    options: dict[str, Any]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Outline:
    """A model without memory for its parameters, and how its family initialises each of them.

    Attributes:
        model: its parameters are on torch's meta device; its buffers are filled.
        rules: name of a parameter -> what transformers would do to it, in order.
    """

    model: PreTrainedModel
    rules: dict[str, list[_Operation]]


class _Recorder(TorchDispatchMode):
    """Notes the in-place operations on parameters without memory, which do nothing to them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        self.rules: dict[str, list[_Operation]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), named: Any = None) -> Any:
        target = arguments[0] if arguments else None
        if function._schema.is_mutable and isinstance(target, torch.Tensor) and target.is_meta:
            name = self._names.get(target.untyped_storage()._cdata)
            if name is not None:
                place = (tuple(target.shape), target.stride(), target.storage_offset())
                self.rules.setdefault(name, []).append(_Operation(function, arguments[1:], named or {}, *place))
        return function(*arguments, **(named or {}))


def make_outline(config: PretrainedConfig, head: Head = CAUSAL) -> Outline:
    """The outline of a model of this configuration, to be trained in fp32."""
    with torch.device("meta"):
        model = head.load_class().from_config(config, dtype=torch.float32)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    # A module all of whose parameters belong to others is tied to them: transformers initialises before it ties, so
    # that what counts is done by the first.
    seen: set[int] = set()
    for module in model.modules():
        own = [id(parameter) for parameter in module.parameters(recurse=False)]
        if own and seen.issuperset(own):
            module._is_hf_initialized = True
        seen.update(own)
    recorder = _Recorder(model)
    # transformers' own rules; they also compute the buffers.
    with recorder:
        model.initialize_weights()
    return Outline(model, recorder.rules)


class DrawnWeights:
    """Parameters drawn as the family's own initialisation says, each from ``seed`` and its name alone."""

    def __init__(self, outline: Outline, seed: int) -> None:
        self._rules, self._model, self._seed = outline.rules, outline.model, seed
        self._shapes = {name: tuple(p.shape) for name, p in outline.model.named_parameters()}

    def open(self, name: str) -> torch.Tensor:
        """See :class:`Weights`; holds the one parameter in main memory."""
        if name in self._own:
            return self._own[name]
        if name not in self._rules:
            raise UserError(f"model: its family has no rule to initialise {name}")
        weight = torch.empty(self._shapes[name])
        key = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()[:8]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int.from_bytes(key, "little") >> 1)
            for operation in self._rules[name]:
                view = weight.as_strided(operation.size, operation.stride, operation.offset)
                operation.function(view, *operation.arguments, **operation.options)
        return weight

    @functools.cached_property
    def _own(self) -> dict[str, torch.Tensor]:
        """Of a head of the user's own, which are what its constructor gives them."""
        own = getattr(self._model, "own", None)
        return {} if own is None else own.drawn(self._model.config, self._seed)


class HeldWeights:
    """Parameters of a ``model`` that is held whole."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._held = {name: p.detach() for name, p in model.named_parameters()}

    def open(self, name: str) -> torch.Tensor:
        """See :class:`Weights`."""
        return self._held[name]


class SavedWeights:
    """Parameters in the safetensors files of a Hugging Face ``directory``; those of a new head are drawn.

    Files whose tensors have the names of another model class (the network without its head, LayerNorms with the old
    names gamma and beta) are read as they are.
    """

    def __init__(self, directory: Path, outline: Outline, seed: int) -> None:
        self._directory, self._drawn = directory, DrawnWeights(outline, seed)
        self._files = _files_by_key(directory)
        self._base = f"{outline.model.base_model_prefix}."
        self._aliases: dict[int, list[str]] = {}
        for name, parameter in outline.model.named_parameters(remove_duplicate=False):
            self._aliases.setdefault(id(parameter), []).append(name)
        self._parameters = dict(outline.model.named_parameters())

    def missing(self) -> list[str]:
        """Parameters of the network below the head that the files have under no name that is known here."""
        return [name for name in self._parameters if name.startswith(self._base) and self._key(name) is None]

    def _key(self, name: str) -> str | None:
        for alias in self._aliases[id(self._parameters[name])]:
            old = alias.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            for known in (alias, alias.removeprefix(self._base), old, old.removeprefix(self._base)):
                if known in self._files:
                    return known
        return None

    def open(self, name: str) -> Sliceable:
        """See :class:`Weights`; reads nothing before a part is taken."""
        key = self._key(name)
        if key is None:
            return self._drawn.open(name)
        found = self._files[key].get_slice(key)
        expected = list(self._parameters[name].shape)
        if found.get_shape() != expected:
            raise UserError(
                f"model.path: {self._directory} has {key} in the shape {found.get_shape()}, its config.json implies "
                f"{expected}"
            )
        if found.get_dtype() not in TRAINABLE:
            raise UserError(
                f"model.path: {self._directory} has {key} as {found.get_dtype()}, allowed for training: "
                f"{', '.join(TRAINABLE)}"
            )
        return _Stored(found)


class _Stored:
    """A tensor in a file; what is taken of it is memory of its own, not pages of the file that a write would copy."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def __getitem__(self, part: Any) -> torch.Tensor:
        return self._stored[part].clone()


def _files_by_key(directory: Path) -> dict[str, Any]:
    """Name of a tensor -> the open safetensors file that has it."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    files = [safe_open(directory / name, framework="pt") for name in names or ["model.safetensors"]]
    return {key: file for file in files for key in file.keys()}  # noqa: SIM118 - a safetensors file is no dictionary


@contextmanager
def _as_user_error(source: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"model.path: {source} cannot be loaded: {first_line(error)}") from None


def saved_weights(source: str, outline: Outline, head: Head, seed: int) -> Weights:
    """The weights of ``source``, a directory or a hub name.

    Where its tensors have names that only transformers can translate, the model is loaded whole by it.

    Args:
        seed: from which a head that the model does not have yet is drawn.

    Raises:
        UserError: it cannot be read.
    """
    from huggingface_hub import snapshot_download

    with _as_user_error(source):
        directory = Path(source)
        if not directory.is_dir():
            directory = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        saved = SavedWeights(directory, outline, seed)
    if not saved.missing():
        return saved
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HeldWeights(load_model(source, head=head, config=outline.model.config))
