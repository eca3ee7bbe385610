"""The record of a family, and the words in which it says how its models are split over ranks.

To add a family, write a module with its record as ``FAMILY`` and a line in :mod:`raylm.config.families`. For tensor and
pipeline parallelism the record has an :class:`Outline`, of which two parts are work:

1. the table ``splits``: the end of a module's name -> how its weight is split over tensor-parallel ranks.
   ``Split("column")`` for what widens (queries, keys, values, the first matrix of a feed-forward network; ``parts=3``
   where three matrices lie side by side), ``Split("row")`` for what comes back to the residual stream,
   ``Split("vocabulary")`` for embedding and head, ``Split("heads")`` for an embedding with a number for each attention
   head. What is not in the table is the same on every rank. ``divided`` names attributes of attention modules that
   count heads or widths and must be divided too.
2. the function ``steps``: the forward pass as a list of :class:`Step` objects, in order: what comes before the blocks,
   the blocks (between which pipeline stages may be cut), what comes after. What passes from step to step is one tensor,
   or a tuple of tensors of which every float one must get a gradient. What several families do is in
   :mod:`raylm.models.families.steps`.

``shared_out`` and ``block_count`` say, from a configuration alone, what the splits must divide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from raylm.models.heads import Network

Values = torch.Tensor | tuple[torch.Tensor, ...]


class Layer(Protocol):
    """What a step's function is given: the step's modules and what it shares, as attributes of their names there."""

    def __getattr__(self, name: str) -> Any: ...

    def copy_to_parts(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden``, any shape, as the input of a weight that each rank holds a part of.

        A split module does so itself. A step that multiplies with a bare weight has to call this first.
        """
        ...


@dataclass(frozen=True)
class Split:
    """How a layer is split: along outputs, inputs, vocabulary or heads; ``parts`` matrices lie side by side."""

    kind: Literal["column", "row", "vocabulary", "heads"]
    parts: int = 1


@dataclass(frozen=True)
class Step:
    """One step of a model's forward pass.

    Attributes:
        modules: name inside the step -> name in the model, of modules and of single parameters.
        forward: from the :class:`Layer` that holds the modules, and what came in, to what goes on.
        tied: where the step's one module is used again in another step: its weight's name inside the step.
        shared: modules without parameters, and configurations, that several steps use.
    """

    modules: dict[str, str]
    forward: Callable[[Any, Any], Values]
    tied: str | None = None
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Steps:
    """A model's forward pass: what comes first, the blocks, and what comes after them."""

    before: list[Step]
    blocks: list[Step]
    after: list[Step]


@dataclass(frozen=True)
class Outline:
    """How a family's models are split over ranks; the top of this file explains it.

    Attributes:
        splits: end of a module's name -> its split.
        steps: from a whole model to its steps.
        shared_out: what is shared out over tensor-parallel ranks, by name -> its number in a configuration.
        block_count: from a configuration to the number of blocks that ``steps`` gives.
        divided: class of a module -> attributes that are divided by the number of tensor-parallel ranks.
        inputs: entries of a batch that the first step takes; a tuple of them where there are several.
    """

    splits: dict[str, Split]
    steps: Callable[[PreTrainedModel], Steps]
    shared_out: dict[str, Callable[[PretrainedConfig], int]]
    block_count: Callable[[PretrainedConfig], int]
    divided: dict[str, tuple[str, ...]] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("input_ids",)


@dataclass(frozen=True)
class Units:
    """Heads or neurons of a block: patterns (fnmatch) of the names, in the block, of the modules they lie between.

    Attributes:
        key: configuration key of their number.
        sources: whose outputs they are, with biases.
        sinks: whose inputs they are.
        shared_sources: of heads, whose outputs groups of them share (keys and values).
        shared_key: configuration key of the number of groups; None where each head is a group.
        size_key: configuration key of the outputs of a head; None where width / heads is assumed, so that heads go only
            together with width.
        tables: embeddings with a number for each of them.
    """

    key: str
    sources: tuple[str, ...]
    sinks: tuple[str, ...]
    shared_sources: tuple[str, ...] = ()
    shared_key: str | None = None
    size_key: str | None = None
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class OwnFamily:
    """What raylm has of a family that transformers has not.

    Attributes:
        register: lets transformers open its models; may be called again and again.
        keys: what ``model.config`` may hold; the rest of its configuration follows from the data.
        check: refuses values of these keys with a UserError.
        count: from a configuration and a stream of tokens, int [n], in which an end of text stands before each document
            and after the last, to a model; None for a family that is trained by gradient.
    """

    register: Callable[[], None]
    keys: tuple[str, ...]
    check: Callable[[Any], None]
    count: Callable[[Any, np.ndarray], PreTrainedModel] | None = None


@dataclass(frozen=True)
class Family:
    """What raylm knows about one architecture.

    Attributes:
        model_type: the name that transformers has for it, and the module's (with _ for -).
        heads_key: configuration key of the number of attention heads, where there are any.
        width_key: configuration key of the width of the residual stream, where there is one.
        positions_key: configuration key of the longest context; None where positions are relative.
        head_width_key: configuration key of the width of an attention head, where width / heads is not assumed.
        defaults: configuration values that differ from the Hugging Face ones.
        network: what kind of network it is, and so which heads it takes (:mod:`raylm.models.heads`).
        plain_head: whether the logits are the last hidden states times the output embedding, and nothing else.
        fused_matrices: suffix of a weight's name -> number of matrices side by side in its last dimension.
        blocks: path of a list of blocks in a model -> configuration key of its length.
        heads, neurons: what a block can lose and still be one; None where that is not known.
        norms: of a family whose residual stream is read through RMS norms alone, a norm of a block -> patterns
            (fnmatch) of the matrices of the block that read what it gives.
        final_norm: path of the norm before the output matrix, in such a family.
        reads_encoder: parts of the names of a decoder's weights that are multiplied with the encoder's tokens.
        outline: how its models are split over ranks; None for a family that trains with data parallelism only.
        own: what raylm has of a family that transformers has not.
    """

    model_type: str
    heads_key: str | None = None
    width_key: str | None = None
    positions_key: str | None = None
    head_width_key: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    network: Network = "decoder"
    plain_head: bool = False
    fused_matrices: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    heads: Units | None = None
    neurons: Units | None = None
    norms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    final_norm: str | None = None
    reads_encoder: tuple[str, ...] = ()
    outline: Outline | None = None
    own: OwnFamily | None = None
