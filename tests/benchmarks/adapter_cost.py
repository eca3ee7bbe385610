"""What a training step costs with all weights, LoRA, DoRA and preferences (DPO): seconds and peak memory.

    python tests/benchmarks/adapter_cost.py MODEL TEXT.txt OUT.json [--tokens 512] [--length 256] [--checkpointing]

DPO trains all weights on pairs of as many tokens, half of the text in each answer; its reference is known before.
Each way trains in processes of its own, in turn, through raylm's engine with ZeRO 0, in a worker's environment. OUT
has, of each round, the median seconds of a step and the peak of the process above what it held before the model was
there; on the screen the medians of the ratios to training all weights.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from raylm.cluster.environment import training_environment

WAYS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {"rank": 16},
    "dora": {"type": "dora", "rank": 16},
    "dpo": None,
}
STEPS = 5


def measure(way: str, model: str, text: str, tokens: int, length: int, checkpointing: bool) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from raylm.compression.measure import peak_bytes, resident_bytes
    from raylm.config.adapter import AdapterSection
    from raylm.config.training import TrainingSection
    from raylm.data.loading import load_tokenizer
    from raylm.models.adapters import add_adapter, is_adapter
    from raylm.models.heads import CAUSAL
    from raylm.models.loading import load_config
    from raylm.models.weights import make_outline, saved_weights
    from raylm.parallel.engines.base import EngineSettings
    from raylm.parallel.engines.data_parallel import DataParallelEngine
    from raylm.parallel.engines.environment import prepare_deepspeed
    from raylm.tasks.causal import CausalObjective
    from raylm.tasks.objective import ObjectiveModule
    from raylm.tasks.preference import PreferenceObjective
    from raylm.training.optimizers.build import make_optimizer

    prepare_deepspeed(use_gpu=False)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ids = torch.tensor(load_tokenizer(model)(Path(text).read_text())["input_ids"])
        count = tokens // length
        rows = ids[: (STEPS + 1) * count * (length + 1)].view(STEPS + 1, count, length + 1)
        # Libraries are no part of a way.
        for name in ("deepspeed", "peft", "transformers.models.llama.modeling_llama"):
            importlib.import_module(name)
        before = resident_bytes()
        outline = make_outline(load_config(model))
        if checkpointing:
            outline.model.gradient_checkpointing_enable({"use_reentrant": False})
        section = WAYS[way]
        added: dict[str, Any] = {}
        if section is not None:
            adapter = AdapterSection(**section)
            added = {"trained": is_adapter, "saves_frozen": False}
            added["transform"] = lambda module, name: add_adapter(module, adapter, CAUSAL, 0)
        training = TrainingSection(steps=STEPS, learning_rate=1e-4)
        # A pair has two.
        sequences = count // 2 if way == "dpo" else count
        objective = PreferenceObjective() if way == "dpo" else CausalObjective()
        engine = DataParallelEngine(
            ObjectiveModule(outline.model, objective),
            lambda named: make_optimizer(training, named, outline.model),
            EngineSettings(
                zero_stage=0, micro_batch_size=sequences, accumulation=1, clipping=1.0, bf16=False,
                device=torch.device("cpu"), weights=saved_weights(model, outline, CAUSAL, 0), **added,
            ),
        )  # fmt: skip
        seconds, losses = [], []
        for step in range(STEPS + 1):
            began = time.perf_counter()
            batch = {"input_ids": rows[step][:, :-1].contiguous(), "targets": rows[step][:, 1:].contiguous()}
            result = engine.train_step([paired(batch) if way == "dpo" else batch])
            seconds.append(time.perf_counter() - began)
            losses.append(engine.mean_loss(result))
        trained = sum(p.numel() for p in engine.parameters.values() if p.requires_grad)
        # The first step makes the optimizer's state.
        return {
            "way": way, "seconds": statistics.median(seconds[1:]), "peak_megabytes": (peak_bytes() - before) / 1e6,
            "trained": trained, "losses": losses,
        }  # fmt: skip


def paired(batch: dict[str, Any]) -> dict[str, Any]:
    """Rows of text as the answers of pairs."""
    import torch

    sides = {name: rows.view(-1, 2, rows.shape[1]) for name, rows in batch.items()}
    count = len(sides["input_ids"])
    return {
        "input_ids": sides["input_ids"], "labels": sides["targets"],
        "targets": torch.zeros((count, 1), dtype=torch.long), "reference": torch.zeros((count, 2)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="full is what others are compared to"
    )
    parser.add_argument("--way", default=None)
    given = parser.parse_args()
    if given.way is not None:
        found = measure(given.way, given.model, given.text, given.tokens, given.length, given.checkpointing)
        given.output.write_text(json.dumps(found))
        return
    rounds = []
    for _ in range(given.rounds):
        rounds.append({})
        for way in given.ways:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, __file__, given.model, given.text, file.name, "--way", way]
                command += ["--checkpointing"] if given.checkpointing else []
                command += ["--tokens", str(given.tokens), "--length", str(given.length)]
                environment = {**os.environ, **training_environment(given.threads)}
                subprocess.run(command, check=True, timeout=1800, env=environment)
                rounds[-1][way] = json.loads(Path(file.name).read_text())
            print({key: value for key, value in rounds[-1][way].items() if key != "losses"}, flush=True)
        given.output.write_text(json.dumps(rounds, indent=2))
    for way in given.ways:
        ratios = {
            name: statistics.median(one[way][name] / one["full"][name] for one in rounds)
            for name in ("seconds", "peak_megabytes")
        }
        print(f"{way}: {ratios['seconds']:.2f} of the time, {ratios['peak_megabytes']:.2f} of the memory")


if __name__ == "__main__":
    main()
