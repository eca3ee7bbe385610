"""Peak memory of setting up an engine: the model built whole on every rank first, against parts alone.

``python tests/benchmarks/setup_memory.py [OUTPUT.json]`` builds the engine of a Llama of about 120 million parameters
as two pipeline stages, as two tensor-parallel ranks, and under ZeRO 3 on two ranks; from a fresh configuration and out
of a Hugging Face directory. Figures are of the fullest rank, anonymous memory above the imported process (pages of the
file that it reads are the system's), in MB.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from raylm.parallel.engines.environment import prepare_deepspeed

VOCABULARY, WIDTH, LAYERS = 16384, 768, 10
LAYOUTS = {"2 stages": (1, 2, 1), "2 tensor-parallel": (2, 1, 1), "ZeRO 3 on 2": (1, 1, 3)}
KINDS = ("whole first", "parts, drawn", "parts, read")


def configuration():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=256,
    )  # fmt: skip


def anonymous() -> int:
    """Bytes of this process's memory that no file stands behind."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


class Peak:
    """Highest :func:`anonymous` while it is watched, above what it was at first."""

    def __init__(self) -> None:
        self.first = self.highest = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.highest = max(self.highest, anonymous())

    def end(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self.highest, anonymous()) - self.first


def rank_main(rank: int, store: str, layout: str, kind: str, saved: str, output: str) -> None:
    from raylm.config.training import TrainingSection
    from raylm.models.families.build import build_model
    from raylm.models.weights import DrawnWeights, make_outline, saved_weights
    from raylm.parallel.engines.base import EngineSettings
    from raylm.parallel.engines.data_parallel import DataParallelEngine
    from raylm.parallel.engines.pipeline import PipelineTensorEngine
    from raylm.tasks.causal import CausalObjective
    from raylm.tasks.objective import ObjectiveModule
    from raylm.training.optimizers.build import make_optimizer

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tensor, pipeline, zero = LAYOUTS[layout]
    training, config, objective = TrainingSection(steps=1), configuration(), CausalObjective()
    settings: dict[str, Any] = {
        "zero_stage": zero, "micro_batch_size": 1, "accumulation": 2, "clipping": 1.0, "bf16": False,
        "device": torch.device("cpu"),
    }  # fmt: skip
    dist.barrier()
    peak, began = Peak(), time.perf_counter()
    if kind == "whole first":
        model = build_model(config, 0)
    else:
        outline = make_outline(config)
        model = outline.model
        drawn = kind == "parts, drawn"
        settings["weights"] = DrawnWeights(outline, 0) if drawn else saved_weights(saved, outline, "causal", 0)

    def optimizer(named, model=model):
        return make_optimizer(training, named, model)

    if tensor * pipeline == 1:
        engine: Any = DataParallelEngine(ObjectiveModule(model, objective), optimizer, EngineSettings(**settings))
    else:
        engine = PipelineTensorEngine(
            model, objective, optimizer, EngineSettings(**settings), tensor=tensor, pipeline=pipeline
        )
    del model, optimizer
    found = {"peak_bytes": peak.end(), "seconds": time.perf_counter() - began, "held_bytes": anonymous() - peak.first}
    found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in engine.parameters.values())
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, found)
    if rank == 0:
        Path(output).write_text(json.dumps(ranks))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    prepare_deepspeed(use_gpu=False)
    import raylm.parallel.engines.pipeline  # noqa: F401 - imported once, before the fork
    from raylm.models.families.build import build_model

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(configuration(), 0)
        result["parameters"] = model.num_parameters()
        model.save_pretrained(f"{folder}/model")
        del model
        for layout in LAYOUTS:
            for kind in KINDS:
                store, output = f"{folder}/{layout}-{kind}-store", f"{folder}/{layout}-{kind}.json"
                arguments = (store, layout, kind, f"{folder}/model", output)
                multiprocessing.start_processes(rank_main, arguments, nprocs=2, start_method="fork")
                result.setdefault(layout, {})[kind] = json.loads(Path(output).read_text())
    print(f"{result['parameters']:,} parameters; peak MB of the fullest rank during setup (held afterwards)")
    for layout in LAYOUTS:
        cells = []
        for kind in KINDS:
            peak, held = (max(rank[key] for rank in result[layout][kind]) / 1e6 for key in ("peak_bytes", "held_bytes"))
            cells.append(f"{kind} {peak:,.0f} ({held:,.0f})")
        print(f"{layout}: " + "; ".join(cells))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
