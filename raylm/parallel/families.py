"""What each family needs to be cut: a table of its layers and a list of its steps.

To add a family, write two things and put them into :data:`PLANS`:

1. the table ``cuts``: the end of a module's name -> how its weight is cut over tensor-parallel ranks. ``Cut("column")``
   for what widens (queries, keys, values, the first matrix of a feed-forward network; ``parts=3`` where three matrices
   lie side by side), ``Cut("row")`` for what comes back to the residual stream, ``Cut("vocabulary")`` for embedding and
   head, ``Cut("heads")`` for an embedding with a number for each attention head. What is not in the table is the same
   on every rank. ``divided`` names attributes of attention modules that count heads or widths and must be divided too.
2. the function ``steps``: the forward pass as a list of :class:`Step` objects, in order: what comes before the blocks,
   the blocks (between which pipeline stages may be cut), what comes after. What passes from step to step is one tensor,
   or a tuple of tensors of which every float one must get a gradient.

``shared_out`` and ``block_count`` say, from a configuration alone, what the cuts must divide.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from raylm.parallel.stages import Cut, FamilyPlan, StageLayer, Step, Steps
from raylm.parallel.tensor import copy_to_parts


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


def _bert_embed(layer: StageLayer, hidden: torch.Tensor) -> torch.Tensor:
    kinds = layer.kinds(torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device))
    return layer.dropout(layer.norm(hidden + kinds + layer.positions(_positions(hidden))))


def _bert_block(layer: StageLayer, hidden: torch.Tensor) -> torch.Tensor:
    return layer.block(hidden)


def _bert_transform(layer: StageLayer, hidden: torch.Tensor) -> torch.Tensor:
    return layer.transform(hidden)


def _bert_bias(layer: StageLayer, logits: torch.Tensor) -> torch.Tensor:
    return logits + layer.bias


def _bert_steps(model: PreTrainedModel) -> Steps:
    embedding, head = _ends(model, "bert.embeddings.word_embeddings", "cls.predictions.decoder")
    if head.tied is None:
        # Without the bias, which is the next step's.
        head = Step({"head": "cls.predictions.decoder.weight"}, _weight_head)
    places = {
        "kinds": "bert.embeddings.token_type_embeddings",
        "positions": "bert.embeddings.position_embeddings",
        "norm": "bert.embeddings.LayerNorm",
    }
    rest = Step(places, _bert_embed, shared={"dropout": model.bert.embeddings.dropout})
    blocks = [
        Step({"block": f"bert.encoder.layer.{index}"}, _bert_block) for index in range(len(model.bert.encoder.layer))
    ]
    transform = Step({"transform": "cls.predictions.transform"}, _bert_transform)
    return Steps([embedding, rest], blocks, [transform, head, Step({"bias": "cls.predictions.bias"}, _bert_bias)])


def _weight_head(layer: StageLayer, hidden: torch.Tensor) -> torch.Tensor:
    return functional.linear(copy_to_parts(hidden, layer.group), layer.head)


# Between T5's steps pass (text, target, position bias of the attention in this stack; none before its first block).


def _t5_embed(layer: StageLayer, ids: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(layer.embedding(part) for part in ids)


def _t5_dropout(layer: StageLayer, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(layer.dropout(part) for part in values)


def _t5_encoder_block(layer: StageLayer, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    text, target, *bias = values
    text, bias = layer.block(text, position_bias=bias[0] if bias else None)[:2]
    if hasattr(layer, "norm"):
        return layer.dropout(layer.norm(text)), target
    return text, target, bias


def _t5_decoder_block(layer: StageLayer, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    text, target, *bias = values
    # The first block's bias holds the mask as well.
    mask = None if bias else _causal_mask(layer, target, _positions(target))
    target, bias = layer.block(
        target, attention_mask=mask, position_bias=bias[0] if bias else None, encoder_hidden_states=text
    )[:2]
    return text, target, bias


def _t5_norm(layer: StageLayer, values: tuple[torch.Tensor, ...]) -> torch.Tensor:
    hidden = layer.dropout(layer.norm(values[1]))
    return hidden * layer.config.d_model**-0.5 if layer.config.scale_decoder_outputs else hidden


def _t5_steps(model: PreTrainedModel) -> Steps:
    encoder, decoder = model.encoder, model.decoder
    embedding, head = _ends(model, "shared", "lm_head")
    embedding = Step(embedding.modules, _t5_embed, embedding.tied)
    blocks = [Step({"block": f"encoder.block.{index}"}, _t5_encoder_block) for index in range(len(encoder.block))]
    # The encoder ends where its last block does, so that no bias is left over between stages.
    last = {**blocks[-1].modules, "norm": "encoder.final_layer_norm"}
    blocks[-1] = Step(last, _t5_encoder_block, shared={"dropout": encoder.dropout})
    shared = {"config": decoder.config}
    blocks += [
        Step({"block": f"decoder.block.{index}"}, _t5_decoder_block, shared=shared)
        for index in range(len(decoder.block))
    ]
    dropout = Step({}, _t5_dropout, shared={"dropout": encoder.dropout})
    norm = Step(
        {"norm": "decoder.final_layer_norm"}, _t5_norm, shared={"dropout": decoder.dropout, "config": decoder.config}
    )
    return Steps([embedding, dropout], blocks, [norm, head])


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
    "bert": FamilyPlan(
        cuts={
            "word_embeddings": Cut("vocabulary"),
            "predictions.decoder.weight": Cut("vocabulary"),
            "predictions.bias": Cut("vocabulary"),
            "self.query": Cut("column"),
            "self.key": Cut("column"),
            "self.value": Cut("column"),
            "intermediate.dense": Cut("column"),
            "output.dense": Cut("row"),
        },
        divided={},
        steps=_bert_steps,
        shared_out={
            "num_attention_heads": lambda config: config.num_attention_heads,
            "intermediate_size": lambda config: config.intermediate_size,
        },
        block_count=lambda config: config.num_hidden_layers,
    ),
    "t5": FamilyPlan(
        cuts={
            "shared": Cut("vocabulary"),
            "lm_head": Cut("vocabulary"),
            "relative_attention_bias": Cut("heads"),
            "q": Cut("column"),
            "k": Cut("column"),
            "v": Cut("column"),
            "o": Cut("row"),
            "wi": Cut("column"),
            "wi_0": Cut("column"),
            "wi_1": Cut("column"),
            "wo": Cut("row"),
        },
        divided={},
        steps=_t5_steps,
        shared_out={"num_heads": lambda config: config.num_heads, "d_ff": lambda config: config.d_ff},
        block_count=lambda config: config.num_layers + config.num_decoder_layers,
        inputs=("input_ids", "decoder_input_ids"),
    ),
}
