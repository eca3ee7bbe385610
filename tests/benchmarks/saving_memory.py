"""Peak memory that saving a checkpoint adds, part of ``training_cost.py``: one process, the real writer.

``saving_memory.py HIDDEN_SIZE LAYERS VOCABULARY``: prints JSON. The kernel's own high-water mark is reset before and
read after (https://www.kernel.org/doc/html/latest/filesystems/proc.html, clear_refs).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from raylm.parallel.engines.environment import prepare_deepspeed
from raylm.training.loop.worker import join_single_process_group


def status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    hidden_size, layers, vocabulary = map(int, sys.argv[1:])
    prepare_deepspeed(False)
    join_single_process_group()
    from transformers import LlamaConfig, LlamaForCausalLM

    from raylm.config.training import TrainingSection
    from raylm.parallel.engines.base import EngineSettings
    from raylm.parallel.engines.data_parallel import DataParallelEngine
    from raylm.tasks.causal import CausalObjective
    from raylm.tasks.objective import ObjectiveModule
    from raylm.training.checkpoints.store import CheckpointWriter
    from raylm.training.optimizers.build import make_optimizer

    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    training, model = TrainingSection(steps=1), LlamaForCausalLM(config)
    engine = DataParallelEngine(
        ObjectiveModule(model, CausalObjective()),
        lambda named: make_optimizer(training, named, model),
        EngineSettings(
            zero_stage=1, micro_batch_size=1, accumulation=1, clipping=1.0, bf16=False, device=torch.device("cpu"),
        ),
    )  # fmt: skip
    ids = torch.randint(0, vocabulary, (1, 64))
    engine.train_step([{"input_ids": ids, "targets": ids}])
    fragments = engine.fragments()
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), 0, 1, "benchmark", 1)
        writer.save(0, fragments, {})
        writer.wait()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        writer.save(1, fragments, {})
        writer.wait()
        extra = status("VmHWM") - before
    chunks = [4 * tensor.numel() for fragment in fragments for tensor in fragment.tensors.values()]
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in engine.parameters.values()),
                "checkpoint_bytes": sum(chunks),
                "largest_chunk_bytes": max(chunks),
                "peak_extra_bytes": max(0, extra),
            }
        )
    )


if __name__ == "__main__":
    main()
