"""The training loop in plain processes, without Ray: ``loop_process.py OUTPUT CASES.json`` works through runs.

A case is an object: ``stage``, ``config`` (a YAML file whose data are prepared, or rows of a task), ``overrides``, and
``workers``. It becomes a run directory as the stage makes one; the ranks are processes over gloo. OUTPUT gets what each
run returned. Processes are forked from one that has imported everything.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from raylm.cluster.capacity import Capacity, Node
from raylm.config import load_config
from raylm.config.run_directory import RunDirectory
from raylm.parallel.engines.environment import prepare_deepspeed


def make_job(case: dict[str, Any]):
    """The run directory and the job, as :func:`raylm.training.stage.run_training` makes them."""
    from raylm.data.loading import resolve_model
    from raylm.parallel.plan.planning import apply_layout, plan_training, recorded
    from raylm.parallel.plan.precision import Precision, with_precision
    from raylm.training.checkpoints.mirror import Mirror
    from raylm.training.checkpoints.storage import Storage
    from raylm.training.inputs import ensure_data, validate
    from raylm.training.loop.worker import TrainingJob, new_attempt

    stage = case.get("stage", "pretrain")
    overrides = [*case["overrides"], f"resources.workers={case['workers']}"]
    config = load_config(stage, case["config"], overrides)
    run = RunDirectory(stage, config)
    mirror = Mirror(Storage(config.run.uri), run.path)
    mirror.open_run()
    run.check()
    checked = validate(config)
    planned = with_precision(config, Precision("fp32", "these are tests"))
    layout = plan_training(planned, Capacity((Node(8.0),)), checked.model).layout
    run.create(recorded(planned, layout))
    attempt = new_attempt()
    mirror.own(attempt)
    data, tokenizer = ensure_data(config, run.path, checked)
    source = resolve_model(config.model.path) if config.model.path else None
    return TrainingJob(
        apply_layout(planned, layout), stage, run.path, config.run.uri, data, tokenizer, source, False, attempt
    )


def run_rank(rank: int, size: int, store: str, job: Any, output: str) -> None:
    from raylm.training.loop.training_loop import TrainingLoop
    from raylm.training.loop.worker import Worker

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    reports: list[int] = []
    worker = Worker(rank, size, generation=job.attempt, report=lambda metrics: reports.append(metrics["step"]))
    final = TrainingLoop(job, worker).run()
    if rank == 0:
        Path(output).write_text(json.dumps({**final, "reports": reports}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    output, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    prepare_deepspeed(use_gpu=False)
    # Imported once, before the fork.
    import raylm.training.loop.training_loop  # noqa: F401

    results = []
    for case in cases:
        # Planning runs a backward pass, after which torch's CUDA build forbids one in forked processes: not here.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as apart:
            job = apart.submit(make_job, case).result()
        with tempfile.TemporaryDirectory() as directory:
            part = f"{directory}/result.json"
            arguments = (case["workers"], f"{directory}/store", job, part)
            multiprocessing.start_processes(run_rank, arguments, nprocs=case["workers"], start_method="fork")
            results.append(json.loads(Path(part).read_text()))
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
