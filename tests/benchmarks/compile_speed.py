"""torch.compile against eager execution: two data-parallel processes of one thread each, steps of both in turn.

``python tests/benchmarks/compile_speed.py [ROUNDS] [OUTPUT.json]``: the GPT-2 of 10 million parameters of
``ddp_throughput.py`` under ZeRO 1. Prints tokens per second, their ratio, and what the first compiled step took.
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

VOCABULARY, LENGTH, LAYERS, WIDTH, HEADS, BATCH, STEPS = 2048, 256, 12, 256, 8, 16, 4


def rank_main(rank: int, store: str, rounds: int, output: str) -> None:
    from transformers import GPT2Config

    from raylm.config.training import TrainingSection
    from raylm.models.weights import DrawnWeights, make_outline
    from raylm.parallel.engines.base import EngineSettings
    from raylm.parallel.engines.data_parallel import DataParallelEngine
    from raylm.tasks.causal import CausalObjective
    from raylm.tasks.objective import ObjectiveModule
    from raylm.training.optimizers.build import make_optimizer

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    training, engines = TrainingSection(steps=1), {}
    for kind in ("eager", "compiled"):
        outline = make_outline(config)
        engines[kind] = DataParallelEngine(
            ObjectiveModule(outline.model, CausalObjective()),
            lambda named, model=outline.model: make_optimizer(training, named, model),
            EngineSettings(
                zero_stage=1, micro_batch_size=BATCH // 2, accumulation=1, clipping=1.0, bf16=False,
                device=torch.device("cpu"), weights=DrawnWeights(outline, 0), compiled=kind == "compiled",
            ),
        )  # fmt: skip
    generator = torch.Generator().manual_seed(rank)

    def steps(kind: str, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            ids = torch.randint(0, VOCABULARY, (BATCH // 2, LENGTH + 1), generator=generator)
            engines[kind].train_step([{"input_ids": ids[:, :-1], "targets": ids[:, 1:].contiguous()}])
        dist.barrier()
        return time.perf_counter() - began

    found: dict[str, Any] = {"first_step_seconds": {}, "tokens_per_second": {}}
    for kind in engines:
        found["first_step_seconds"][kind] = steps(kind, 1)
        if rank == 0:
            print(f"first step, {kind}: {found['first_step_seconds'][kind]:.1f} s", file=sys.stderr, flush=True)
    for _ in range(rounds):
        for kind in engines:
            speed = STEPS * BATCH * LENGTH / steps(kind, STEPS)
            found["tokens_per_second"].setdefault(kind, []).append(speed)
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    prepare_deepspeed(use_gpu=False)
    import raylm.parallel.engines.data_parallel  # noqa: F401 - imported once, before the fork

    with tempfile.TemporaryDirectory() as folder:
        # What an earlier run compiled is not to be found.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"
        multiprocessing.start_processes(
            rank_main, (f"{folder}/store", rounds, f"{folder}/found.json"), nprocs=2, start_method="fork"
        )
        result = json.loads(Path(f"{folder}/found.json").read_text())
    medians = {kind: statistics.median(speeds) for kind, speeds in result["tokens_per_second"].items()}
    ratios = [b / a for a, b in zip(*result["tokens_per_second"].values(), strict=True)]
    result |= {"median": medians, "ratio_of_medians": medians["compiled"] / medians["eager"], "ratios": ratios}
    text = json.dumps(result, indent=1)
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text)


if __name__ == "__main__":
    main()
