"""One rank of the parity test: ``torchrun --nproc-per-node N parity_process.py OUTPUT CASE...``.

A case is ``optimizer:zero_stage[:family][:save=DIR|load=DIR]``. Rank 0 writes the
losses and gradient norms of each as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from raylm.config.model import ObjectiveSection
from raylm.config.training import TrainingSection
from raylm.data.samples import document_positions
from raylm.objectives import make_objective
from raylm.objectives.base import ObjectiveModule
from raylm.parallel.environment import prepare_deepspeed
from raylm.training.checkpoints import CheckpointReader, CheckpointWriter, newest_whole
from raylm.training.optimizers import make_optimizer

STEPS, BATCH, TIME, VOCABULARY = 20, 8, 16, 96


def training_section(optimizer: str) -> TrainingSection:
    clipping = 0.0 if optimizer == "sgd" else 1.0
    rate = 0.1 if optimizer == "sgd" else 1e-3
    return TrainingSection(steps=STEPS, optimizer=optimizer, learning_rate=rate, gradient_clipping=clipping)


def build(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    if family in ("gpt2", "gpt2-documents"):
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    if family == "bert":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip
    if family == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        )
    )  # fmt: skip


def step_data(step: int, family: str = "llama") -> dict[str, torch.Tensor]:
    """The whole batch of a step; some targets do not count, unevenly over the sequences. Of t5 they are shorter.

    Of a family that ends in ``-documents`` the token 0 ends documents, which are told apart.
    """
    # Four batches come round again, so that there is something to learn.
    generator = torch.Generator().manual_seed(1000 + step % 4)
    ids = torch.randint(0, VOCABULARY, (BATCH, TIME + 1), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(BATCH):
        targets[row, : row + step % 5] = -100
    if family.endswith("-documents"):
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, 0, ids)
        positions = torch.from_numpy(document_positions(ids[:, :-1].numpy(), 0))
        return {"input_ids": ids[:, :-1], "targets": ids[:, 1:].contiguous(), "position_ids": positions}
    return {"input_ids": ids[:, :-1], "targets": targets[:, TIME // 4 :].contiguous() if family == "t5" else targets}


def run_case(case: str, rank: int, world_size: int) -> dict[str, list[float]]:
    from raylm.parallel.engine import DataParallelEngine

    optimizer, stage, *rest = case.split(":")
    family = next((part for part in rest if "=" not in part), "llama")
    kind = family.removesuffix("-documents")
    section = ObjectiveSection(document_boundaries="ignore" if kind == family else "attention")
    action = dict(part.split("=") for part in rest if "=" in part)
    share = BATCH // world_size
    model = build(family)
    engine = DataParallelEngine(
        ObjectiveModule(model, make_objective(section, kind)),
        lambda named: make_optimizer(training_section(optimizer), named, kind),
        zero_stage=int(stage),
        micro_batch_size=share // 2,
        accumulation=2,
        clipping=training_section(optimizer).gradient_clipping,
        bf16=False,
        device=torch.device("cpu"),
    )
    start = 0
    if "load" in action:
        found, _ = newest_whole(Path(action["load"]))
        reader = CheckpointReader(found)
        for fragment in engine.fragments(for_loading=True):
            reader.fill(fragment)
        engine.adopt(reader.part, reader.state["step"])
        start = reader.state["step"]
    losses, norms = [], []
    for step in range(start, STEPS):
        data = step_data(step, family)
        rows = [slice(rank * share + i * share // 2, rank * share + (i + 1) * share // 2) for i in range(2)]
        engine.set_learning_rate(1.0)
        result = engine.train_step([{name: values[r] for name, values in data.items()} for r in rows])
        losses.append(engine.mean_loss(result))
        norms.append(result.gradient_norm)
        if "save" in action and step + 1 == STEPS // 2:
            writer = CheckpointWriter(Path(action["save"]), rank, world_size, "attempt", keep=1)
            writer.save(step + 1, engine.fragments(), {"step": step + 1})
            writer.wait()
            dist.barrier()
    return {"loss": losses, "gradient_norm": norms}


def main() -> None:
    output, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_deepspeed(use_gpu=False)
    dist.init_process_group("gloo")
    results = {case: run_case(case, dist.get_rank(), dist.get_world_size()) for case in cases}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Leave without the interpreter's farewell: a thread of gloo that still runs would abort it now and then.
    sys.stdout.flush()
    os._exit(0)
