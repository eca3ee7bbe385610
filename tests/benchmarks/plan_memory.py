"""The plan's memory estimate against the peak of real processes: ``python plan_memory.py OUTPUT.json [LAYOUT...]``.

A layout is ``FAMILY:dpNxtpNxppN:zeroN[:checkpointing]``. Each runs as many processes as it has ranks, two optimizer
steps with the engine and optimizer of ``raylm pretrain``; each process's peak resident memory above what it held once
everything was imported and the process groups were up is compared with ``Plan.memory_bytes``. Writes raw JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYOUTS = [
    "llama:dp1xtp2xpp1:zero1", "llama:dp1xtp2xpp2:zero1", "gpt2:dp2xtp1xpp1:zero1", "bert:dp1xtp2xpp1:zero1",
    "t5:dp2xtp1xpp1:zero2", "llama:dp2xtp1xpp1:zero1", "llama:dp1xtp1xpp2:zero1", "llama:dp2xtp1xpp1:zero3",
    "llama:dp1xtp1xpp1:zero0", "gpt2:dp1xtp2xpp1:zero0", "bert:dp1xtp1xpp2:zero1",
    "llama:dp1xtp1xpp1:zero1:checkpointing",
]  # fmt: skip
CONFIGS = {
    "llama": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "gpt2": {"n_embd": 512, "n_layer": 6, "n_head": 8},
    "bert": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8},
    "t5": {"d_model": 512, "d_kv": 64, "num_heads": 8, "num_layers": 4, "d_ff": 1536},
}  # fmt: skip
# The optimizer's moments come with the first step.
STEPS, BATCH, TIME, VOCABULARY = 2, 16, 256, 8192


def configuration(layout: str, directory: str):
    """The layout's pretraining configuration, and its parts."""
    from raylm.config.loading import validate
    from raylm.config.stages import PretrainConfig

    family, shape, zero, *rest = layout.split(":")
    data, tensor, pipeline = (int(n) for n in re.fullmatch(r"dp(\d+)xtp(\d+)xpp(\d+)", shape).groups())
    values = {
        "run": {"name": "plan", "storage": directory},
        "data": {"train": f"{directory}/text.txt"},
        "tokenizer": {"type": "bpe", "vocab_size": VOCABULARY},
        "model": {"family": family, "config": CONFIGS[family]},
        "training": {"steps": STEPS, "precision": "fp32", "batch_size": BATCH, "sequence_length": TIME},
        "parallel": {
            "data": data, "tensor": tensor, "pipeline": pipeline, "zero_stage": int(zero.removeprefix("zero")),
            "micro_batch_size": 4, "activation_checkpointing": "checkpointing" in rest,
        },
        "resources": {"workers": data * tensor * pipeline, "cpus_per_worker": 0.25},
    }  # fmt: skip
    return validate(PretrainConfig, values, layout)


def status(key: str) -> int:
    """A field of this process's status, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024


def rank(layout: str, directory: str) -> None:
    """One process of a layout: trains on random tokens and writes what it held."""
    import torch
    import torch.distributed as dist

    from raylm.models.weights import DrawnWeights, make_outline
    from raylm.parallel.engines.base import EngineSettings
    from raylm.parallel.engines.data_parallel import DataParallelEngine
    from raylm.parallel.engines.environment import prepare_deepspeed
    from raylm.parallel.engines.pipeline import PipelineTensorEngine
    from raylm.parallel.plan.planning import make_plan
    from raylm.tasks import make_objective
    from raylm.tasks.objective import ObjectiveModule
    from raylm.training.optimizers.build import make_optimizer

    torch.set_num_threads(1)
    prepare_deepspeed(use_gpu=False)
    dist.init_process_group("gloo")
    config = configuration(layout, directory)
    plan = make_plan(config)
    dist.all_reduce(torch.zeros(1))
    objective = make_objective(config.objective, config.model.family)
    me, parallel, planned = dist.get_rank(), config.parallel, plan.layout
    warm_up = torch.randn(64, 64, requires_grad=True)
    (warm_up @ warm_up).sum().backward()
    dist.barrier()
    baseline = status("VmRSS")
    outline = make_outline(plan.model_config, objective.head)
    model = outline.model
    if parallel.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = {
        "zero_stage": parallel.zero_stage,
        "micro_batch_size": planned.micro_batch_size,
        "accumulation": planned.accumulation,
        "clipping": config.training.gradient_clipping,
        "bf16": False,
        "device": torch.device("cpu"),
        "weights": DrawnWeights(outline, 0),
    }

    def optimizer(named, model=model):
        return make_optimizer(config.training, named, model)

    if parallel.model_parallel == 1:
        engine = DataParallelEngine(ObjectiveModule(model, objective), optimizer, EngineSettings(**settings))
    else:
        cuts = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
        engine = PipelineTensorEngine(model, objective, optimizer, EngineSettings(**settings), **cuts)
    del model, optimizer
    held = {"built": status("VmRSS") - baseline, "peak_built": status("VmHWM") - baseline}
    inputs, outputs = objective.lengths(TIME)
    for step in range(STEPS):
        batches = []
        for index in range(planned.accumulation):
            generator = torch.Generator().manual_seed((step * 64 + index) * 64 + engine.data_rank)
            batches.append(
                {
                    "input_ids": torch.randint(0, VOCABULARY, (planned.micro_batch_size, inputs), generator=generator),
                    "targets": torch.randint(
                        0, VOCABULARY, (planned.micro_batch_size, outputs or inputs), generator=generator
                    ),
                }
            )
        engine.set_learning_rate(1.0)
        began = time.perf_counter()
        engine.train_step(batches)
        held[f"seconds_{step + 1}"] = time.perf_counter() - began
        held[f"after_{step + 1}"] = status("VmRSS") - baseline
    held["peak"] = status("VmHWM") - baseline
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, held)
    if me == 0:
        Path(directory, "held.json").write_text(json.dumps(ranks))
    dist.barrier()
    dist.destroy_process_group()


def run(layout: str) -> dict:
    """Run ``layout`` and compare."""
    from raylm.cluster.environment import training_environment
    from raylm.parallel.plan.planning import make_plan

    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "text.txt").write_text("text")
        plan = make_plan(configuration(layout, directory))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={plan.layout.workers}", __file__, "--rank", layout, directory]  # fmt: skip
        environment = os.environ | training_environment(1) | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        if result.returncode:
            raise SystemExit(f"{layout}:\n{result.stderr[-3000:]}")
        ranks = json.loads(Path(directory, "held.json").read_text())
    memory = plan.memory_bytes()
    measured, estimated = max(r["peak"] for r in ranks), sum(memory.values())
    print(f"{layout:<34}{measured / 1e6:9.1f} MB measured {estimated / 1e6:9.1f} MB estimated "
          f"{estimated / measured - 1:+.1%}  {({k: round(v / 1e6, 1) for k, v in memory.items()})} "
          f"{({k: round(v / 1e6, 1) for k, v in ranks[0].items()})}", flush=True)  # fmt: skip
    return {"layout": layout, "parameters": plan.parameters, "ranks": ranks, "estimated": memory,
            "measured_bytes": measured, "estimated_bytes": estimated, "error": estimated / measured - 1}  # fmt: skip


def main() -> None:
    output, *layouts = sys.argv[1:]
    results = []
    for layout in layouts or LAYOUTS:
        results.append(run(layout))
        Path(output).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        rank(*sys.argv[2:])
    else:
        main()
