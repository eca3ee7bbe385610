"""Small models of each family, for tests that cut them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from raylm.compression.pruning.cutting import Cutter
from raylm.config.model import ObjectiveSection
from raylm.config.pruning import PruneSection
from raylm.models.heads import CAUSAL, MASKED, SEQUENCE_TO_SEQUENCE
from raylm.tasks import make_objective

VOCABULARY = 50
HEADS = {"llama": CAUSAL, "gpt2": CAUSAL, "bert": MASKED, "t5": SEQUENCE_TO_SEQUENCE}
STOCK = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
}
FAMILIES = list(HEADS)


def build(family: str) -> PreTrainedModel:
    """Width 128, four heads of 32 (Llama: two of keys and values), 192 neurons, three layers."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=128, n_layer=3, n_head=4, n_positions=32, n_inner=192,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model: PreTrainedModel = GPT2LMHeadModel(config)
    elif family == "bert":
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=32,
        )  # fmt: skip
        model = BertForMaskedLM(config)
    elif family == "t5":
        config = T5Config(
            vocab_size=VOCABULARY, d_model=128, d_kv=32, d_ff=192, num_layers=3, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu",
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    else:
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    # Larger than they are drawn, so that a wrong slice shows.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def of_heads(count: int, width: int) -> PreTrainedModel:
    """Heads with keys and values of their own, 192 neurons, two layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=count, num_key_value_heads=count, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip


def batches(family: str, count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(2, VOCABULARY, (4, 17), generator=generator)
        batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:].contiguous()}
        if family == "bert":
            batch |= {"attention_mask": torch.ones_like(batch["input_ids"]),
                      "token_type_ids": torch.zeros_like(batch["input_ids"])}  # fmt: skip
        found.append(batch)
    return found


def objective(family: str):
    return make_objective(ObjectiveSection(), family)


def logits(family: str, model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return objective(family).logits(model, batches(family)[0])


def cutter(family: str, criterion: str = "activation", **section: object) -> Cutter:
    return Cutter(PruneSection(importance=criterion, **section), objective(family), batches(family))


def reloaded(family: str, model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    model.save_pretrained(directory)
    found, info = STOCK[family].from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return found.eval()
