"""What each family needs to be cut: a table of its layers and a list of its steps.

To add a family, write two things and put them into :data:`PLANS`:

1. the table ``cuts``: the end of a module's name -> how its weight is cut over tensor-parallel ranks. ``Cut("column")``
   for what widens (queries, keys, values, the first matrix of a feed-forward network; ``parts=3`` where three matrices
   lie side by side), ``Cut("row")`` for what comes back to the residual stream, ``Cut("vocabulary")`` for embedding and
   head. What is not in the table is the same on every rank. ``divided`` names attributes of attention modules that
   count heads or widths and must be divided as well.
2. the function ``steps``: the forward pass as a list of :class:`Step` objects, in order: what comes before the blocks,
   the blocks (between which pipeline stages may be cut), what comes after. What passes from step to step is one tensor,
   or a tuple of tensors of which every float one must get a gradient.

``shared_out`` and ``block_count`` say, from a configuration alone, what the cuts must divide. Nothing of the models'
own code is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from raylm.parallel.tensor import ColumnParallel, RowParallel, TensorGroup, VocabularyEmbedding, copy_to_parts

Values = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Cut:
    """How a layer is cut: along its outputs, its inputs, or the vocabulary; ``parts`` matrices lie side by side."""

    kind: Literal["column", "row", "vocabulary"]
    parts: int = 1


@dataclass(frozen=True)
class Step:
    """One step of a model's forward pass.

    Attributes:
        modules: name inside the step -> name in the model.
        forward: from the :class:`StageLayer` that holds the modules, and what came in, to what goes on.
        tied: where the step's one module is used again in another step: its weight's name inside the step.
        shared: modules without parameters, and configurations, that several steps use.
    """

    modules: dict[str, str]
    forward: Callable[[StageLayer, Any], Values]
    tied: str | None = None
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Steps:
    """A model's forward pass: what comes first, the blocks, and what comes after them."""

    before: list[Step]
    blocks: list[Step]
    after: list[Step]


@dataclass(frozen=True)
class FamilyPlan:
    """How a family is cut; see the top of this module.

    Attributes:
        cuts: end of a module's name -> its cut.
        divided: class of a module -> attributes that are divided by the number of tensor-parallel ranks.
        steps: from a whole model to its steps.
        shared_out: what is shared out over tensor-parallel ranks, by name -> its number in a configuration.
        block_count: from a configuration to the number of blocks that ``steps`` gives.
        inputs: entries of a batch that the first step takes; a tuple of them where there are several.
    """

    cuts: dict[str, Cut]
    divided: dict[str, tuple[str, ...]]
    steps: Callable[[PreTrainedModel], Steps]
    shared_out: dict[str, Callable[[PretrainedConfig], int]]
    block_count: Callable[[PretrainedConfig], int]
    inputs: tuple[str, ...] = ("input_ids",)


class StageLayer(nn.Module):
    """The modules of one :class:`Step`, cut for this rank; calling it makes the step."""

    def __init__(self, step: Step, model: nn.Module, cuts: FamilyPlan, group: TensorGroup) -> None:
        super().__init__()
        self.step, self.group = step, group
        for name, path in step.modules.items():
            setattr(self, name, cut_module(model.get_submodule(path), path, cuts, group))
        for name, value in step.shared.items():
            setattr(self, name, value)

    def forward(self, values: Values) -> Values:
        """What the step makes of ``values``."""
        return self.step.forward(self, values)

    def model_parameters(self):
        """(name in the model, parameter) of all parameters here."""
        for name, path in self.step.modules.items():
            for inner, parameter in getattr(self, name).named_parameters():
                yield f"{path}.{inner}", parameter


def cut_module(module: nn.Module, path: str, plan: FamilyPlan, group: TensorGroup) -> nn.Module:
    """``module``, called ``path`` in the model, with its layers in the plan's table replaced by this rank's parts."""
    if group.size == 1:
        return module
    for name, inner in list(module.named_modules()):
        for attribute in plan.divided.get(type(inner).__name__, ()):
            setattr(inner, attribute, getattr(inner, attribute) // group.size)
        whole_name = f"{path}.{name}" if name else path
        cut = next((cut for end, cut in plan.cuts.items() if f".{whole_name}".endswith(f".{end}")), None)
        if cut is None:
            continue
        replacement = _cut_layer(inner, cut, group)
        if not name:
            return replacement
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, replacement)
    return module


def _cut_layer(layer: nn.Module, cut: Cut, group: TensorGroup) -> nn.Module:
    if cut.kind == "row":
        return RowParallel(layer, group)
    if isinstance(layer, nn.Embedding):
        return VocabularyEmbedding(layer, group)
    return ColumnParallel(layer, group, cut.parts)


def balanced_stages(steps: Steps, weights: list[float], stages: int) -> list[int]:
    """Where the stages begin in ``before + blocks + after``: at least one block each, the heaviest as light as can be.

    Args:
        weights: of all steps, in order: their parameters, or their time.

    Returns:
        ``stages + 1`` indices.
    """
    first, count = len(steps.before), len(steps.blocks)
    blocks = list(weights[first : first + count])
    blocks[0] += sum(weights[:first])
    blocks[-1] += sum(weights[first + count :])
    # heaviest[n] -> for the first n blocks: (weight of the heaviest stage, its last stage's beginning)
    heaviest: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(stages):
        before, now = heaviest[-1], {}
        for stop in range(1, count + 1):
            choices = [
                (max(best, sum(blocks[start:stop])), start) for start, (best, _) in before.items() if start < stop
            ]
            if choices:
                now[stop] = min(choices)
        heaviest.append(now)
    bounds = [count]
    for stage in range(stages, 0, -1):
        bounds.append(heaviest[stage][bounds[-1]][1])
    inner = [first + bound for bound in reversed(bounds[1:-1])]
    return [0, *inner, len(weights)]


def step_weights(model: nn.Module, steps: list[Step]) -> list[float]:
    """Parameters of each step; a tied weight counts where it is used, as each stage that uses it holds it."""
    return [
        float(sum(p.numel() for path in step.modules.values() for p in model.get_submodule(path).parameters()))
        for step in steps
    ]


def _embed(layer: StageLayer, ids: torch.Tensor) -> torch.Tensor:
    return layer.embedding(ids)


def _tied_head(layer: StageLayer, hidden: torch.Tensor) -> torch.Tensor:
    return functional.linear(copy_to_parts(hidden, layer.group), layer.embedding.weight)


def _head(layer: StageLayer, hidden: torch.Tensor) -> torch.Tensor:
    return layer.head(hidden)


def _norm(layer: StageLayer, hidden: torch.Tensor) -> torch.Tensor:
    return layer.norm(hidden)


def _ends(model: PreTrainedModel, embedding: str, head: str) -> tuple[Step, Step]:
    """The steps of the embedding and of the head, which may share a weight."""
    if model.get_submodule(embedding).weight is model.get_submodule(head).weight:
        modules = {"embedding": embedding}
        return Step(modules, _embed, "embedding.weight"), Step(modules, _tied_head, "embedding.weight")
    return Step({"embedding": embedding}, _embed), Step({"head": head}, _head)


def _positions(hidden: torch.Tensor) -> torch.Tensor:
    return torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)


def _causal_mask(layer: StageLayer, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
    """What the model itself would make; None where the attention kernel is told that it is causal."""
    return create_causal_mask(
        config=layer.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
    )


def _llama_block(layer: StageLayer, hidden: torch.Tensor) -> torch.Tensor:
    positions = _positions(hidden)
    return layer.block(
        hidden,
        attention_mask=_causal_mask(layer, hidden, positions),
        position_ids=positions,
        position_embeddings=layer.rotary(hidden, position_ids=positions),
    )


def _llama_steps(model: PreTrainedModel) -> Steps:
    shared = {"config": model.config, "rotary": model.model.rotary_emb}
    embedding, head = _ends(model, "model.embed_tokens", "lm_head")
    blocks = [
        Step({"block": f"model.layers.{index}"}, _llama_block, shared=shared)
        for index in range(len(model.model.layers))
    ]
    return Steps([embedding], blocks, [Step({"norm": "model.norm"}, _norm), head])


def _gpt2_positions(layer: StageLayer, hidden: torch.Tensor) -> torch.Tensor:
    return layer.dropout(hidden + layer.positions(_positions(hidden)))


def _gpt2_block(layer: StageLayer, hidden: torch.Tensor) -> torch.Tensor:
    return layer.block(hidden, attention_mask=_causal_mask(layer, hidden, _positions(hidden)))


def _gpt2_steps(model: PreTrainedModel) -> Steps:
    embedding, head = _ends(model, "transformer.wte", "lm_head")
    positions = Step({"positions": "transformer.wpe"}, _gpt2_positions, shared={"dropout": model.transformer.drop})
    shared = {"config": model.config}
    blocks = [
        Step({"block": f"transformer.h.{index}"}, _gpt2_block, shared=shared)
        for index in range(len(model.transformer.h))
    ]
    return Steps([embedding, positions], blocks, [Step({"norm": "transformer.ln_f"}, _norm), head])


PLANS = {
    "llama": FamilyPlan(
        cuts={
            "embed_tokens": Cut("vocabulary"),
            "lm_head": Cut("vocabulary"),
            "q_proj": Cut("column"),
            "k_proj": Cut("column"),
            "v_proj": Cut("column"),
            "o_proj": Cut("row"),
            "gate_proj": Cut("column"),
            "up_proj": Cut("column"),
            "down_proj": Cut("row"),
        },
        divided={},
        steps=_llama_steps,
        shared_out={
            "num_attention_heads": lambda config: config.num_attention_heads,
            "num_key_value_heads": lambda config: config.num_key_value_heads,
            "intermediate_size": lambda config: config.intermediate_size,
        },
        block_count=lambda config: config.num_hidden_layers,
    ),
    "gpt2": FamilyPlan(
        cuts={
            "wte": Cut("vocabulary"),
            "lm_head": Cut("vocabulary"),
            "attn.c_attn": Cut("column", parts=3),
            "attn.c_proj": Cut("row"),
            "mlp.c_fc": Cut("column"),
            "mlp.c_proj": Cut("row"),
        },
        divided={"GPT2Attention": ("split_size", "num_heads")},
        steps=_gpt2_steps,
        shared_out={
            "n_head": lambda config: config.n_head,
            "n_inner": lambda config: config.n_inner or 4 * config.n_embd,
        },
        block_count=lambda config: config.n_layer,
    ),
}
