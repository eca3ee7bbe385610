"""What a run computes in: measured when it begins on CPUs, kept for all its starts.

In: the configuration and the joined cluster. Out: the decision of :mod:`raylm.parallel.plan.precision`, from
measurements on every node, or what the run began with. ``config.yaml`` holds the precision, ``precision.json`` the
figures.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from raylm.config.run_directory import RunDirectory, write_atomically
from raylm.config.stages import TrainConfig
from raylm.parallel.plan.precision import LayerTimes, Precision, decide, measure, settled, width_of

if TYPE_CHECKING:
    from raylm.cluster.capacity import Capacity

FILE = "precision.json"
ANSWER_SECONDS = 120.0


def run_precision(run: RunDirectory, config: TrainConfig, model_config: Any, capacity: Capacity) -> Precision:
    """The precision of this start; call before :meth:`RunDirectory.create`.

    Args:
        model_config: the model's Hugging Face configuration.
    """
    use_gpu, width = capacity.uses_gpus(config.resources), width_of(model_config)
    if (began := run.saved()) is not None:
        name = config.training.precision
        if name == "auto":
            name = began.get("training", {}).get("precision", "auto")
        if name == "auto" and not use_gpu:
            # A raylm that did not measure yet, under which CPUs computed in fp32.
            name = "fp32"
        noted = _noted(run)
        return noted if noted and noted.name == name else Precision(name, "what the run began with")
    return settled(config, width, use_gpu=use_gpu) or decide(_measured(config, width))


def note_precision(run: RunDirectory, precision: Precision) -> None:
    """Keep the decision and its figures; call once the run directory is there."""
    write_atomically(run.path / FILE, json.dumps(precision.record(), indent=2) + "\n")


def slower_in_bf16(config: TrainConfig, model_config: Any, capacity: Capacity) -> str:
    """A warning where the run computes in bf16 on a CPU on which fp32 is faster; else empty. Measures.

    Args:
        config: with the run's precision.
    """
    width = width_of(model_config)
    if config.training.precision != "bf16" or capacity.uses_gpus(config.resources) or not width:
        return ""
    least = min(_measured(config, width), key=lambda one: one.gain)
    if least.gain >= 1:
        return ""
    return (
        f"training.precision is bf16, which on {least.node} takes {1 / least.gain:,.1f} times as long as fp32 would; "
        "a run stays with the precision it began with"
    )


def _noted(run: RunDirectory) -> Precision | None:
    """What an earlier start has decided, with its figures."""
    try:
        found = json.loads((run.path / FILE).read_text(encoding="utf-8"))
        times = tuple(LayerTimes(**one) for one in found["layer_milliseconds"])
        return Precision(found["precision"], found["reason"], times)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measured(config: TrainConfig, width: int) -> list[LayerTimes]:
    """The times of every node with CPUs: in this process where that is the only node, else in a task on each."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tokens = config.training.batch_size * config.training.sequence_length
    asked = (width, tokens, max(1, int(config.resources.cpus_per_worker)))
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    if nodes == [ray.get_runtime_context().get_node_id()]:
        return [measure(*asked)]
    task = ray.remote(num_cpus=0)(measure)
    answers = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*asked)
        for node in nodes
    ]
    return ray.get(answers, timeout=ANSWER_SECONDS)
