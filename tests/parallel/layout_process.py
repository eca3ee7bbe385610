"""Many processes, many cases: ``layout_process.py OUTPUT CASES.json`` works through cases of training under a layout.

A case is an object: ``family``, ``data``, ``tensor``, ``pipeline``, ``zero``, ``optimizer``, and optionally ``steps``
([first, stop]), ``save`` (directory: a checkpoint is written at the end) and ``load`` (directory: goes on from its
newest checkpoint), ``dropout`` (of everything that has it), ``balance`` (time), ``compile``, ``smooth`` (label
smoothing), ``average`` (keys of ``training.ema``: evaluated after each step), ``teach`` (keys of ``distillation``) and
``poison`` (a step before which the last rank's weights are spoilt). For each case OUTPUT gets the losses, the gradient
norms, and the samples that were taken.
Processes are forked from one that has imported everything, anew where the number of processes or the engine changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).parent))

from families import BATCH, DOCUMENTS, build, build_teacher, step_data, training_section

from raylm.config.distillation import DistillationSection
from raylm.config.model import ObjectiveSection
from raylm.parallel.engines.environment import prepare_deepspeed


def world_size(case: dict[str, Any]) -> int:
    return case["data"] * case["tensor"] * case["pipeline"]


def start(case: dict[str, Any]) -> tuple[int, bool]:
    """The same for cases that may share processes: DeepSpeed keeps a pipeline's topology for later engines."""
    return world_size(case), case["tensor"] * case["pipeline"] > 1


def hooks(case: dict[str, Any]) -> dict[str, Any]:
    """What a case asks of the engine's places for later work: ``train`` (names end so), ``halve`` (names of weights
    that are halved before training), ``mask`` (whose first row stays 0), ``adapt`` (keys of ``adapter``), ``round``
    (group size of rounded weights)."""
    found: dict[str, Any] = {}
    if "train" in case:
        found["trained"] = lambda name: name.endswith(case["train"])
    if "halve" in case:

        @torch.no_grad()
        def halve(module: torch.nn.Module, place: str) -> None:
            for name, parameter in module.named_parameters():
                if f"{place}.{name}".endswith(case["halve"]):
                    parameter.mul_(0.5)

        found["transform"] = halve
    if "mask" in case:

        def mask(fragments: list) -> None:
            for fragment in fragments:
                if fragment.name.endswith(case["mask"]) and fragment.offset[0] == 0:
                    fragment.tensors["weight"][0].zero_()

        found["after_step"] = mask
    if "adapt" in case:
        from raylm.config.adapter import AdapterSection
        from raylm.models.adapters import add_adapter, is_adapter
        from raylm.models.heads import CAUSAL

        section = AdapterSection(**case["adapt"])
        found |= {"trained": is_adapter, "saves_frozen": False}
        found["transform"] = lambda module, place: add_adapter(module, section, CAUSAL, 0)
    if "round" in case:
        from raylm.models.rounding import kept_whole, round_in_training

        found["transform"] = lambda module, place: round_in_training(module, case["round"], kept_whole(module))
    return found


def make_engine(case: dict[str, Any]):
    from raylm.models.weights import HeldWeights, make_outline
    from raylm.parallel.engines.base import EngineSettings
    from raylm.parallel.engines.data_parallel import DataParallelEngine
    from raylm.parallel.engines.pipeline import PipelineTensorEngine
    from raylm.tasks import make_objective
    from raylm.tasks.objective import ObjectiveModule
    from raylm.training.optimizers.build import make_optimizer

    section = training_section(case["optimizer"])
    whole = build(case["family"], case.get("dropout", 0.0))
    model_type = whole.config.model_type
    boundaries = "attention" if case["family"].endswith(DOCUMENTS) else "ignore"
    teacher, distillation = None, None
    if "teach" in case:
        teacher, distillation = build_teacher(case["family"]), DistillationSection(**case["teach"])
    section_of_task = ObjectiveSection(document_boundaries=boundaries, label_smoothing=case.get("smooth", 0.0))
    objective = make_objective(section_of_task, model_type, distillation)
    model = make_outline(whole.config, objective.head).model
    if case.get("adapt", {}).get("bits") is not None:
        from raylm.models.four_bits import keep_in_four_bits

        keep_in_four_bits(model, objective.head, torch.bfloat16 if case.get("bf16") else torch.float32)
    # Two micro-batches for each stage, as far as the batch goes.
    share = BATCH // case["data"]
    accumulation = min(share, max(2, 2 * case["pipeline"]))
    settings = EngineSettings(
        zero_stage=case["zero"], micro_batch_size=share // accumulation, accumulation=accumulation,
        clipping=section.gradient_clipping, bf16=case.get("bf16", False), device=torch.device("cpu"),
        weights=HeldWeights(whole), compiled=case.get("compile", False), **hooks(case),
    )  # fmt: skip

    def optimizer(named):
        precision = {"precision": "bf16" if settings.bf16 else "fp32"}
        return make_optimizer(section.model_copy(update=precision), named, model)

    if case["tensor"] * case["pipeline"] == 1:
        return DataParallelEngine(ObjectiveModule(model, objective, teacher), optimizer, settings), accumulation
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sizes = {"tensor": case["tensor"], "pipeline": case["pipeline"]}
    if case.get("balance") == "time":
        size = share // accumulation
        sizes["time_batch"] = {name: values[:size] for name, values in step_data(case["family"], 0).items()}
    engine = PipelineTensorEngine(model, objective, optimizer, settings, **sizes)
    return engine, accumulation


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    from raylm.config.training import EmaSection
    from raylm.parallel.engines.base import seed_step
    from raylm.training.checkpoints.store import CheckpointReader, CheckpointWriter, newest_whole
    from raylm.training.loop.averages import Averages

    engine, accumulation = make_engine(case)
    section = training_section(case["optimizer"])
    start, stop = case.get("steps", [0, section.steps])
    averages = Averages(EmaSection(**case["average"]), engine) if "average" in case else None

    def fragments(**options):
        found = engine.fragments(**options)
        return found if averages is None else averages.with_averages(found)

    def evaluate():
        one = [{name: values[:1] for name, values in step_data(case["family"], 0).items()}]
        with averages.in_place() if averages is not None else contextlib.nullcontext():
            return engine.evaluate(one).mean

    if "load" in case:
        found, damaged = newest_whole(Path(case["load"]))
        assert found is not None
        assert not damaged
        reader = CheckpointReader(found)
        assert reader.state["step"] == start
        for fragment in fragments(for_loading=True):
            reader.fill(fragment)
        engine.adopt(reader.part, start)
    losses, norms, rows, evaluations = [], [], [], []
    share = BATCH // engine.data_size
    for step in range(start, stop):
        data = step_data(case["family"], step)
        mine = list(range(engine.data_rank * share, (engine.data_rank + 1) * share))
        size = share // accumulation
        cuts = [slice(mine[i * size], mine[i * size] + size) for i in range(accumulation)]
        engine.set_learning_rate(1.0)
        seed_step(0, step, engine)
        if case.get("poison") == step and dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                next(iter(engine.parameters.values())).view(-1)[0] = float("nan")
        result = engine.train_step([{name: values[cut] for name, values in data.items()} for cut in cuts])
        losses.append(engine.mean_loss(result))
        norms.append(result.gradient_norm)
        if averages is not None:
            averages.update(step + 1)
            evaluations.append(evaluate())
        rows.append([step * BATCH + row for row in mine] if engine.leads else [])
    evaluation = evaluate()
    if "save" in case:
        writer = CheckpointWriter(Path(case["save"]), dist.get_rank(), dist.get_world_size(), "attempt", keep=1)
        writer.save(stop, fragments(), {"step": stop})
        writer.wait()
        dist.barrier()
    taken: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(taken, rows)
    norms_of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(norms_of_all, norms)
    return {
        "loss": losses,
        "gradient_norm": norms,
        "norms_of_all": norms_of_all,
        "stage_bounds": getattr(engine, "stage_bounds", None),
        "samples": [sorted(row for rank in taken for row in rank[i]) for i in range(stop - start)],
        "evaluation": evaluation,
        "evaluations": evaluations,
    }


def run_rank(rank: int, size: int, store: str, cases: list[dict[str, Any]], output: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    results = []
    for case in cases:
        results.append(run_case(case))
        if rank == 0 and "--show" in sys.argv:
            print(case, results[-1]["loss"][-1:], flush=True)
    if rank == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    output, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    prepare_deepspeed(use_gpu=False)
    # Imported once, before the fork.
    import raylm.parallel.engines.pipeline
    import raylm.tasks.masked
    import raylm.tasks.span
    import raylm.training.checkpoints.store
    import raylm.training.optimizers.build  # noqa: F401

    results: list[dict[str, Any]] = []
    for (size, _), group in groupby(cases, start):
        with tempfile.TemporaryDirectory() as directory:
            part = f"{directory}/results.json"
            arguments = (size, f"{directory}/store", list(group), part)
            multiprocessing.start_processes(run_rank, arguments, nprocs=size, start_method="fork")
            results += json.loads(Path(part).read_text())
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
