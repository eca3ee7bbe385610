"""Fine-tuning on pairs: only the answers' tokens through the head, against all of them.

``python tests/benchmarks/answer_rows.py [--width 128 --layers 4 --vocabulary 2048 --length 240 --share 0.1 ...]
[--output FILE]``: forward and backward passes of a Llama in one process of one thread, both ways in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raylm.data.samples.token_samples import IGNORED
from raylm.tasks.causal import CausalObjective
from raylm.tasks.objective import ObjectiveModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="pairs of a micro-batch")
    parser.add_argument("--length", type=int, default=240, help="tokens of a pair")
    parser.add_argument("--share", type=float, default=0.1, help="share of the tokens that are the answer's")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", help="file for the JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=chosen.vocabulary, hidden_size=chosen.width, intermediate_size=3 * chosen.width,
        num_hidden_layers=chosen.layers, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ways = {"all": CausalObjective(), "answers": CausalObjective()}
    ways["answers"]._answers_only = True
    ids = torch.randint(0, chosen.vocabulary, (chosen.batch, chosen.length))
    targets = ids.roll(-1, dims=1)
    targets[:, : round(chosen.length * (1 - chosen.share))] = IGNORED
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(chosen.rounds + 1):
        for name, objective in ways.items():
            module = ObjectiveModule(model, objective)
            began = time.perf_counter()
            for _ in range(4):
                module(input_ids=ids, targets=targets).backward()
            seconds[name].append(time.perf_counter() - began)
            model.zero_grad()
    # The first round warms up.
    ratios = [whole / part for whole, part in zip(seconds["all"][1:], seconds["answers"][1:], strict=True)]
    result = {"settings": vars(chosen), "seconds": seconds, "times_as_fast": round(statistics.median(ratios), 3)}
    text = json.dumps(result, indent=1)
    if chosen.output:
        Path(chosen.output).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
