"""Predicted layouts, speed and cost of five models on 8, 64 and 512 GPUs: ``python cluster/sizing.py --help``.

Prints the tables of cluster/SIZING.md as Markdown. Each row is what ``raylm plan`` says of a run with parallel's keys
on ``auto``; nothing is started, and no GPU is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from raylm.config.loading import validate
from raylm.config.stages import PretrainConfig
from raylm.errors import UserError
from raylm.parallel.plan.description import digits
from raylm.parallel.plan.on_clusters import PlannedNodes, plan_on_cluster, read_terms

GPUS = (8, 64, 512)


def llama(width: int, inner: int, layers: int, heads: int, key_value_heads: int) -> dict[str, int]:
    """``model.config`` of a Llama."""
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }  # fmt: skip


# Model -> family, configuration, vocabulary, tokens of a sequence, sequences of a step. The shapes are those of GPT-2,
# of GPT-3's 1.3B (Brown et al. 2020, table 2.1) and of Llama 2 (Touvron et al. 2023).
MODELS: dict[str, tuple[str, dict[str, int], int, int, int]] = {
    "124M": ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12}, 50257, 1024, 512),
    "1.3B": ("gpt2", {"n_embd": 2048, "n_layer": 24, "n_head": 16}, 50257, 2048, 512),
    "7B": ("llama", llama(4096, 11008, 32, 32, 32), 32000, 4096, 1024),
    "13B": ("llama", llama(5120, 13824, 40, 40, 40), 32000, 4096, 1024),
    "70B": ("llama", llama(8192, 28672, 80, 64, 8), 32000, 4096, 1024),
}


def configuration(model: str, gpus: int) -> PretrainConfig:
    """A training file for so many GPUs that leaves the layout open."""
    family, shape, vocabulary, length, batch = MODELS[model]
    values: dict[str, Any] = {
        "run": {"name": "sizing", "storage": "runs"},
        "data": {"train": "text.txt"},
        "tokenizer": {"type": "bpe", "vocab_size": vocabulary},
        "model": {"family": family, "config": shape},
        "training": {"tokens": 10**9, "batch_size": batch, "sequence_length": length},
        "parallel": {"tensor": "auto", "pipeline": "auto", "zero_stage": "auto"},
        "resources": {"workers": gpus, "gpus_per_worker": 1},
    }
    return validate(PretrainConfig, values, model)


def row(model: str, gpus: int, found: PlannedNodes) -> str:
    """One line of a table."""
    plan, layout = found.plan, found.plan.layout
    cells = [model, str(gpus), f"{sum(plan.memory_bytes().values()) / 1e9:,.0f}"]
    if plan.candidates[0].reason:
        return f"| {' | '.join([*cells, 'does not fit', *['–'] * 6])} |"
    shape = f"{layout.data} x {layout.tensor} x {layout.pipeline}"
    again = ", recomputed" if layout.activation_checkpointing else ""
    used, price = plan.utilisation, found.price
    assert used is not None
    cells += [
        f"{shape}, ZeRO {layout.zero_stage}{again}", f"{layout.accumulation} x {layout.micro_batch_size}",
        digits(plan.candidates[0].seconds), f"{plan.bubble:.0%}", f"{plan.tokens_per_second:,.0f}", f"{used:.0%}",
        "–" if price is None else f"${price * found.billion_hours:,.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(models: list[str], sizes: list[int], kind: str, network: float, price: str) -> Iterator[str]:
    """The lines of a table."""
    yield (
        "| model | GPUs | GB a GPU | data x tensor x pipeline | micro-batches | s a step | bubble | tokens/s | MFU | "
        "10^9 tokens |"
    )
    yield f"|{' --- |' * 10}"
    terms = read_terms(f"{kind}:8", network, [price], None)
    for model in models:
        for gpus in sizes:
            (found,) = plan_on_cluster(configuration(model, gpus), None, terms, MODELS[model][2])
            yield row(model, gpus, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["124M", "1.3B", "7B", "13B", "70B"], help="only this one")
    parser.add_argument("--gpus", type=int, help="only so many, a multiple of 8")
    parser.add_argument("--kind", default="H100", help="of GPU, as raylm plan --gpus takes it")
    parser.add_argument("--network", type=float, default=3200.0, help="Gbit/s of a node")
    parser.add_argument("--price", required=True, help="dollars an hour of a node of eight")
    values = parser.parse_args()
    models, sizes = [values.model] if values.model else list(MODELS), [values.gpus] if values.gpus else list(GPUS)
    try:
        for line in table(models, sizes, values.kind, values.network, values.price):
            print(line, flush=True)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
