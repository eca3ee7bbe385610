"""What is allowed of a layout, as far as the file alone tells: each rule once, with the words that refuse.

The configuration asks when it is read, the plan and the search of :mod:`raylm.parallel` ask about the layouts that
they weigh. Each function returns the refusal as one line, empty where the layout is allowed. ``model_parallel`` is the
number of workers that hold one copy of the model: tensor x pipeline. What the model itself does not allow stands in
:mod:`raylm.parallel.plan.refusals`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from raylm.config.stages import TrainConfig

Number = int | Literal["auto"]
ABOVE_ONE = "allowed with parallel.tensor or parallel.pipeline above 1"


def elastic_refusal(name: str, found: Number) -> str:
    """Whether ``parallel.<name>`` goes with ``resources.elastic``."""
    allowed: Number = "auto" if name == "data" else 1
    if found in ("auto", allowed):
        return ""
    return (
        f"parallel.{name}: found {found}, allowed with resources.elastic: {allowed}, as the number of data-parallel "
        "workers changes"
    )


def workers_refusal(workers: Number, data: Number, model_parallel: int, *, settled: bool) -> str:
    """Whether data x tensor x pipeline can be the number of workers.

    Args:
        settled: whether ``model_parallel`` is the whole of it; a tensor or pipeline that is still auto may multiply it.
    """
    if workers == "auto":
        return ""
    if workers % model_parallel:
        return (
            f"resources.workers: found {workers}, allowed: auto or a multiple of parallel.tensor x parallel.pipeline "
            f"({model_parallel})"
        )
    if data == "auto" or (workers == data * model_parallel if settled else workers % (data * model_parallel) == 0):
        return ""
    return (
        f"parallel.data: found {data}, allowed: auto or {'' if settled else 'a divisor of '}"
        f"{workers // model_parallel}, as data x tensor x pipeline must equal resources.workers ({workers})"
    )


def sharded_refusal(zero_stage: Number, model_parallel: int) -> str:
    """Whether the ZeRO stage goes with a model that is split over workers."""
    if model_parallel == 1 or zero_stage in ("auto", 0, 1):
        return ""
    return (
        f"parallel.zero_stage: found {zero_stage}, {ABOVE_ONE}: 0, 1, as gradients stay whole until the last "
        "micro-batch"
    )


def compiled_refusal(zero_stage: Number) -> str:
    """Whether the ZeRO stage goes with ``training.compile``."""
    if zero_stage != 3:
        return ""
    return (
        "training.compile: found true, allowed with parallel.zero_stage 0, 1 and 2: ZeRO 3 gathers weights in hooks "
        "of every layer, which leaves nothing to compile"
    )


def bf16_refusal(zero_stage: Number) -> str:
    """Whether the ZeRO stage goes with training in bf16."""
    if zero_stage != 0:
        return ""
    return (
        "parallel.zero_stage: found 0, allowed with training.precision bf16: 1, 2, 3, as ZeRO keeps the fp32 master "
        "weights"
    )


def zero_refusal(zero_stage: int, model_parallel: int, *, bf16: bool, compiled: bool) -> str:
    """Whether the ZeRO stage goes with all the rest of a layout."""
    refusals = (
        sharded_refusal(zero_stage, model_parallel),
        compiled_refusal(zero_stage) if compiled else "",
        bf16_refusal(zero_stage) if bf16 else "",
    )
    return next(filter(None, refusals), "")


def splitting_refusal(config: TrainConfig, model_parallel: int) -> str:
    """Whether what is trained, and how, goes with a model that is split over workers."""
    if model_parallel == 1:
        return ""
    if config.training.optimizer == "muon":
        return f"training.optimizer: found muon, {ABOVE_ONE}: adamw, sgd, as muon needs whole matrices"
    for name, found, reason in (
        ("distillation", config.distillation, "a teacher computes beside the whole model"),
        ("rounding", config.rounding, "weights are rounded before they are cut"),
        ("adapter", config.adapter, "adapters are put into whole layers"),
    ):
        if found is not None:
            return f"{name}: allowed with parallel.tensor and parallel.pipeline 1, as {reason}"
    if (found := config.objective.document_boundaries) != "ignore":
        return (
            f"objective.document_boundaries: found {found}, {ABOVE_ONE}: ignore, as pipeline stages do not pass "
            "positions on"
        )
    return ""


def batch_refusal(batch_size: int, replicas: int) -> str:
    """Whether the batch divides over the data-parallel workers."""
    if batch_size % replicas == 0:
        return ""
    return f"training.batch_size: found {batch_size}, allowed: a multiple of the {replicas} data-parallel workers"


def micro_batch_refusal(micro_batch_size: Number, share: int) -> str:
    """Whether a worker's share of the batch, in sequences, divides into micro-batches."""
    if micro_batch_size == "auto" or share % micro_batch_size == 0:
        return ""
    return (
        f"parallel.micro_batch_size: found {micro_batch_size}, allowed: a divisor of each worker's share of the batch "
        f"({share})"
    )


def layout_refusal(config: TrainConfig) -> str:
    """The first refusal of what the file says."""
    return next(filter(None, _refusals(config)), "")


def _refusals(config: TrainConfig) -> Iterator[str]:
    workers, parallel, training = config.resources.workers, config.parallel, config.training
    model_parallel, settled = parallel.model_parallel, "auto" not in (parallel.tensor, parallel.pipeline)
    if config.resources.elastic is not None:
        for name in ("data", "tensor", "pipeline"):
            yield elastic_refusal(name, getattr(parallel, name))
    yield workers_refusal(workers, parallel.data, model_parallel, settled=settled)
    yield sharded_refusal(parallel.zero_stage, model_parallel)
    yield splitting_refusal(config, model_parallel)
    replicas = workers // model_parallel if workers != "auto" and settled else parallel.data
    if replicas != "auto":
        yield batch_refusal(training.batch_size, replicas)
        yield micro_batch_refusal(parallel.micro_batch_size, training.batch_size // replicas)
