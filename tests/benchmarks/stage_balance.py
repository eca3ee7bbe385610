"""Pipeline stages balanced by parameters against stages balanced by measured time, on a model with a heavy head.

``python tests/benchmarks/stage_balance.py [ROUNDS] [OUTPUT.json]``: a Llama of eight narrow blocks and a vocabulary of
16,384 in two stages of one thread each. By parameters the looked-up embedding weighs as much as the head, which takes
most of the time. Both engines train in turn; the share of the time in which each stage waits, and tokens per second.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from raylm.parallel.engines.environment import prepare_deepspeed

VOCABULARY, WIDTH, LAYERS, LENGTH, MICRO, ACCUMULATION, STEPS = 16384, 192, 8, 128, 2, 8, 2


def rank_main(rank: int, store: str, rounds: int, output: str) -> None:
    from transformers import LlamaConfig

    from raylm.config.training import TrainingSection
    from raylm.models.weights import DrawnWeights, make_outline
    from raylm.parallel.engines.base import EngineSettings
    from raylm.parallel.engines.pipeline import PipelineTensorEngine
    from raylm.tasks.causal import CausalObjective
    from raylm.training.optimizers.build import make_optimizer

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(0, VOCABULARY, (MICRO, LENGTH + 1), generator=generator)
        return {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}

    training, engines, found = TrainingSection(steps=1), {}, {}
    for kind in ("parameters", "time"):
        outline, began = make_outline(config), time.perf_counter()
        engines[kind] = PipelineTensorEngine(
            outline.model, CausalObjective(), lambda named, model=outline.model: make_optimizer(training, named, model),
            EngineSettings(
                zero_stage=1, micro_batch_size=MICRO, accumulation=ACCUMULATION, clipping=1.0, bf16=False,
                device=torch.device("cpu"), weights=DrawnWeights(outline, 0),
            ),
            tensor=1, pipeline=2, time_batch=batch() if kind == "time" else None,
        )  # fmt: skip
        bounds = engines[kind].stage_bounds
        found[kind] = {"stage_bounds": bounds, "setup_seconds": time.perf_counter() - began, "idle": [], "speed": []}
    for number in range(rounds + 1):
        for kind, engine in engines.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(STEPS):
                engine.train_step([batch() for _ in range(ACCUMULATION)])
            dist.barrier()
            seconds, idle = time.perf_counter() - began, engine.idle_fractions()
            if number:  # the first round warms up
                found[kind]["idle"].append(idle)
                found[kind]["speed"].append(STEPS * ACCUMULATION * MICRO * LENGTH / seconds)
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    prepare_deepspeed(use_gpu=False)
    import raylm.parallel.engines.pipeline  # noqa: F401 - imported once, before the fork

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            rank_main, (f"{folder}/store", rounds, f"{folder}/found.json"), nprocs=2, start_method="fork"
        )
        result: dict[str, Any] = json.loads(Path(f"{folder}/found.json").read_text())
    for kind, found in result.items():
        idle = [statistics.median(stage) for stage in zip(*found["idle"], strict=True)]
        speed = statistics.median(found["speed"])
        shares = ", ".join(f"stage {number} {share:.0%}" for number, share in enumerate(idle))
        print(f"by {kind}: stages begin at {found['stage_bounds']}; idle {shares}; {speed:,.0f} tokens/s")
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
