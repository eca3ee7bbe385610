"""What is allowed of a layout, as far as the file alone tells: each rule once, with the words that refuse.

The configuration asks when it is read, the plan and the search of :mod:`raylm.parallel` ask about the layouts that
they weigh. Each function returns the refusal as one line, empty where the layout is allowed. ``cut`` is the number of
workers that hold one copy of the model: tensor x pipeline. What the model itself does not allow stands in
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


def workers_refusal(workers: Number, data: Number, cut: int, *, settled: bool) -> str:
    """Whether data x tensor x pipeline can be the number of workers.

    Args:
        settled: whether ``cut`` is the whole of it; a tensor or pipeline that is still auto may multiply it.
    """
    if workers == "auto":
        return ""
    if workers % cut:
        return (
            f"resources.workers: found {workers}, allowed: auto or a multiple of parallel.tensor x parallel.pipeline "
            f"({cut})"
        )
    if data == "auto" or (workers == data * cut if settled else workers % (data * cut) == 0):
        return ""
    return (
        f"parallel.data: found {data}, allowed: auto or {'' if settled else 'a divisor of '}{workers // cut}, as data "
        f"x tensor x pipeline must equal resources.workers ({workers})"
    )


def sharded_refusal(zero_stage: Number, cut: int) -> str:
    """Whether the ZeRO stage goes with a model that is cut."""
    if cut == 1 or zero_stage in ("auto", 0, 1):
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


def zero_refusal(zero_stage: int, cut: int, *, bf16: bool, compiled: bool) -> str:
    """Whether the ZeRO stage goes with all the rest of a layout."""
    refusals = (
        sharded_refusal(zero_stage, cut),
        compiled_refusal(zero_stage) if compiled else "",
        bf16_refusal(zero_stage) if bf16 else "",
    )
    return next(filter(None, refusals), "")


def cutting_refusal(config: TrainConfig, cut: int) -> str:
    """Whether what is trained, and how, goes with a model that is cut."""
    if cut == 1:
        return ""
    if config.training.optimizer == "muon":
        return f"training.optimizer: found muon, {ABOVE_ONE}: adamw, sgd, as muon needs whole matrices"
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
    cut, settled = parallel.model_parallel, "auto" not in (parallel.tensor, parallel.pipeline)
    if config.resources.elastic is not None:
        for name in ("data", "tensor", "pipeline"):
            yield elastic_refusal(name, getattr(parallel, name))
    yield workers_refusal(workers, parallel.data, cut, settled=settled)
    yield sharded_refusal(parallel.zero_stage, cut)
    yield cutting_refusal(config, cut)
    replicas = workers // cut if workers != "auto" and settled else parallel.data
    if replicas != "auto":
        yield batch_refusal(training.batch_size, replicas)
        yield micro_batch_refusal(parallel.micro_batch_size, training.batch_size // replicas)
