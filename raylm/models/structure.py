"""What a model's matrices are for, from its modules: which are looked up, and which make its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lookup_names(model: PreTrainedModel) -> set[str]:
    """The weights that are looked up rather than multiplied: of tokens, positions, token types, relative biases.

    Returns:
        names in ``model``; a weight that is also the output embedding's has both of its names.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in looked_up}


def read_out_names(model: PreTrainedModel) -> set[str]:
    """The parameters of the head that makes logits of tokens, if there is one.

    It is the module around the output embedding, such as BERT's with its transform, or the output embedding alone where
    that stands directly in the model.

    Returns:
        names in ``model``.
    """
    head = model.get_output_embeddings()
    if head is None:
        return set()
    path = next(name for name, module in model.named_modules() if module is head)
    around = path.rpartition(".")[0] or path
    return {
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if name.startswith(f"{around}.") or p is head.weight
    }
