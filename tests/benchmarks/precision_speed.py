"""bf16 against fp32 on this machine's CPU: speed of training steps, and how far the losses part.

``python tests/benchmarks/precision_speed.py [--width 256 --layers 12 --rounds 5 --loss-steps 60 ...] [--output FILE]``:
a GPT-2 (10 million parameters by default) learns the Python documentation on data-parallel processes of one thread
each, under ZeRO 1. Every process holds one engine a precision. First both make the same steps on the same batches,
which gives the losses; then rounds of steps of both in turn, which gives tokens per second. Also written: what
``training.precision: auto`` measures here, and what it would decide.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from raylm.parallel.engines.environment import prepare_deepspeed

VOCABULARY = 2048
KINDS = ("fp32", "bf16")
WARM_UP = 10


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, all workers together")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step on each worker")
    parser.add_argument("--optimizer", choices=("adamw", "muon", "sgd"), default="adamw")
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--compile", action="store_true", help="run the blocks through torch.compile")
    parser.add_argument("--loss-steps", type=int, default=60, help="steps whose losses are compared")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timed steps, each precision in turn")
    parser.add_argument("--round-steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--output", help="file for the JSON")
    return parser.parse_args()


def documentation() -> torch.Tensor:
    """Python's language reference as word numbers; words rarer than the vocabulary holds are 0."""
    from pydoc_data.topics import topics

    words = re.findall(r"\w+|[^\w\s]", "\n".join(topics[name] for name in sorted(topics)))
    numbers = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(VOCABULARY - 1))}
    return torch.tensor([numbers.get(word, 0) for word in words])


def make_engine(chosen: argparse.Namespace, bf16: bool):
    from transformers import GPT2Config

    from raylm.config.training import TrainingSection
    from raylm.models.weights import DrawnWeights, make_outline
    from raylm.parallel.engines.base import EngineSettings
    from raylm.parallel.engines.data_parallel import DataParallelEngine
    from raylm.tasks.causal import CausalObjective
    from raylm.tasks.objective import ObjectiveModule
    from raylm.training.optimizers.build import make_optimizer

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=chosen.length, n_layer=chosen.layers, n_embd=chosen.width,
        n_head=chosen.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    training = TrainingSection(steps=1, optimizer=chosen.optimizer, precision="bf16" if bf16 else "fp32")
    outline = make_outline(config)
    return DataParallelEngine(
        ObjectiveModule(outline.model, CausalObjective()), lambda named: make_optimizer(training, named, outline.model),
        EngineSettings(
            zero_stage=chosen.zero_stage, micro_batch_size=chosen.batch // chosen.workers // chosen.accumulation,
            accumulation=chosen.accumulation, clipping=1.0, bf16=bf16, device=torch.device("cpu"),
            weights=DrawnWeights(outline, 0), compiled=chosen.compile,
        ),
    )  # fmt: skip


def rank_main(rank: int, store: str, chosen: argparse.Namespace, output: str) -> None:
    from raylm.parallel.plan.precision import decide, measure

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(chosen.workers)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=chosen.workers)
    engines = {kind: make_engine(chosen, kind == "bf16") for kind in KINDS}
    text = documentation()
    micro = chosen.batch // chosen.workers // chosen.accumulation

    def batches(step: int) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of a step, the same for both precisions."""
        generator = torch.Generator().manual_seed(step * chosen.workers + rank)
        found = []
        for _ in range(chosen.accumulation):
            starts = torch.randint(0, len(text) - chosen.length - 1, (micro,), generator=generator).tolist()
            rows = torch.stack([text[start : start + chosen.length + 1] for start in starts])
            found.append({"input_ids": rows[:, :-1], "targets": rows[:, 1:].contiguous()})
        return found

    found: dict[str, Any] = {
        "auto": decide([measure(chosen.width, chosen.batch * chosen.length, 1)]).record(),
        "parameters": sum(p.numel() for p in engines["fp32"].parameters.values()),
        "losses": {kind: [] for kind in KINDS},
        "tokens_per_second": {kind: [] for kind in KINDS},
    }
    for step in range(chosen.loss_steps):
        for kind, engine in engines.items():
            engine.set_learning_rate(min(1.0, (step + 1) / WARM_UP))
            found["losses"][kind].append(engine.mean_loss(engine.train_step(batches(step))))
    for number in range(chosen.rounds):
        for kind, engine in engines.items():
            dist.barrier()
            began = time.perf_counter()
            for step in range(chosen.round_steps):
                engine.train_step(batches(number * chosen.round_steps + step))
            dist.barrier()
            tokens = chosen.round_steps * chosen.batch * chosen.length
            found["tokens_per_second"][kind].append(tokens / (time.perf_counter() - began))
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    chosen = arguments()
    prepare_deepspeed(use_gpu=False)
    import raylm.parallel.engines.data_parallel  # noqa: F401 - imported once, before the fork

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            rank_main, (f"{folder}/store", chosen, f"{folder}/found.json"), nprocs=chosen.workers, start_method="fork"
        )
        result = json.loads(Path(f"{folder}/found.json").read_text())
    speeds, losses = result["tokens_per_second"], result["losses"]
    apart = [abs(b - a) / a for a, b in zip(losses["fp32"], losses["bf16"], strict=True)]
    ratios = [b / a for a, b in zip(speeds["fp32"], speeds["bf16"], strict=True)]
    result |= {
        "settings": vars(chosen),
        "largest_relative_difference_of_losses": max(apart, default=None),
        "median_relative_difference_of_losses": statistics.median(apart) if apart else None,
        "steps_with_losses_within_1e-3": sum(difference <= 1e-3 for difference in apart),
        "median_tokens_per_second": {kind: round(statistics.median(found)) for kind, found in speeds.items() if found},
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    text = json.dumps(result, indent=1)
    if chosen.output:
        Path(chosen.output).write_text(text)
    print(text)
    if losses["fp32"]:
        print(f"losses at the end: {losses['fp32'][-1]:.4f} {losses['bf16'][-1]:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
