"""Tiny models of every family, their data, and a plain PyTorch loop to compare with: no Ray, no DeepSpeed, no code of
raylm's engines or optimizers in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import (
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

from raylm.config.training import TrainingSection
from raylm.data.samples.token_samples import document_positions

# The vocabulary divides by nothing, the last two targets of the rows count unevenly.
STEPS, BATCH, TIME, VOCABULARY = 20, 8, 16, 97
FAMILIES = ("llama", "llama-tied", "gpt2", "bert", "t5")
# Ending of a family whose packed documents are told apart; the token 0 ends them.
DOCUMENTS = "-documents"


def training_section(optimizer: str) -> TrainingSection:
    clipping = 0.0 if optimizer == "sgd" else 1.0
    rate = 0.1 if optimizer == "sgd" else 1e-3
    return TrainingSection(steps=STEPS, optimizer=optimizer, learning_rate=rate, gradient_clipping=clipping)


def build(family: str, dropout: float = 0.0) -> PreTrainedModel:
    """A model of four heads (the Llamas with two of keys and values) and two layers (t5 with two of each kind)."""
    torch.manual_seed(0)
    family = family.removesuffix(DOCUMENTS)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32,
                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    if family == "bert":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=32, hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )  # fmt: skip
    if family == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=dropout,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, attention_dropout=dropout,
            tie_word_embeddings=family == "llama-tied",
        )
    )  # fmt: skip


def step_data(family: str, step: int) -> dict[str, torch.Tensor]:
    """The whole batch of a step; some targets do not count, unevenly over the sequences. Of t5 they are shorter."""
    # Four batches come round again, so that there is something to learn.
    generator = torch.Generator().manual_seed(1000 + step % 4)
    ids = torch.randint(0, VOCABULARY, (BATCH, TIME + 1), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(BATCH):
        targets[row, : row + step % 5] = -100
    if family.endswith(DOCUMENTS):
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, 0, ids)
        positions = torch.from_numpy(document_positions(ids[:, :-1].numpy(), 0))
        return {"input_ids": ids[:, :-1], "targets": ids[:, 1:].contiguous(), "position_ids": positions}
    return {"input_ids": ids[:, :-1], "targets": targets[:, TIME // 4 :].contiguous() if family == "t5" else targets}


def build_teacher(family: str) -> PreTrainedModel:
    """Another model of the same shape, larger weights and so surer of what comes."""
    teacher = build(family)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return teacher.eval()


def plain_loss(model: PreTrainedModel, data: dict[str, torch.Tensor]) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        # transformers' own shift and loss.
        return model(input_ids=data["input_ids"], labels=data["targets"]).loss
    if "position_ids" in data:
        # Each document alone, as the model would see it without packing.
        total = torch.zeros(())
        for ids, targets, positions in zip(data["input_ids"], data["targets"], data["position_ids"], strict=True):
            for piece in torch.tensor_split(torch.arange(len(ids)), (positions[1:] == 0).nonzero()[:, 0] + 1):
                logits = model(input_ids=ids[piece][None]).logits[0]
                total = total + functional.cross_entropy(logits, targets[piece], reduction="sum")
        return total / data["targets"].numel()
    logits = model(input_ids=data["input_ids"]).logits
    return functional.cross_entropy(logits.flatten(0, 1), data["targets"].flatten(), ignore_index=-100)


def plain_loop(
    family: str,
    optimizer_name: str,
    steps: int = STEPS,
    *,
    prepare: Callable[[PreTrainedModel], Any] = lambda model: None,
    after_step: Callable[[PreTrainedModel], Any] = lambda model: None,
    trained_loss: Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor] = plain_loss,
) -> dict[str, Any]:
    """Losses and gradient norms of one process, and the loss of evaluation at the end.

    Args:
        prepare: changes the model before its optimizer is made.
        after_step: changes it after each step.
        trained_loss: of a model and a batch, a mean over the targets.
    """
    section = training_section(optimizer_name)
    model = build(family)
    prepare(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if optimizer_name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=section.learning_rate, betas=tuple(section.betas), eps=section.epsilon)
    else:
        optimizer = torch.optim.SGD(groups, lr=section.learning_rate, momentum=section.momentum)
    losses, norms = [], []
    for step in range(steps):
        loss = trained_loss(model, step_data(family, step))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), section.gradient_clipping or 1e9)))
        optimizer.step()
        after_step(model)
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        evaluation = float(plain_loss(model, {name: values[:1] for name, values in step_data(family, 0).items()}))
    return {"loss": losses, "gradient_norm": norms, "evaluation": evaluation}
