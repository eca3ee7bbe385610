"""Choosing a layout: what ``auto`` in ``parallel`` becomes.

In: what the model, the file and the cluster allow. Out: the layout that fits into a worker's memory and has the least
estimated time for a step (:mod:`raylm.parallel.plan.timing`), and the others with the reason against each. Of layouts
within a tenth the simplest is taken: data parallelism and the lowest ZeRO stage, then tensor, then pipeline, without
recomputation where there is a choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raylm.cluster.capacity import PROCESS_BYTES
from raylm.cluster.hardware import Figures
from raylm.config.layout import batch_refusal, micro_batch_refusal, splitting_refusal, workers_refusal, zero_refusal
from raylm.config.stages import TrainConfig
from raylm.parallel.plan.layout import Layout
from raylm.parallel.plan.refusals import model_refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.models.trained import Packed
    from raylm.parallel.plan.memory import ModelMemory
    from raylm.parallel.plan.teacher import Teacher
    from raylm.parallel.plan.timing import StepTime
    from raylm.tasks.objective import Objective

# Tokens of one micro-batch beyond which a bigger one gains nothing but takes memory.
MICRO_BATCH_TOKENS = 16384
# Estimates that differ by less do not tell layouts apart.
CLOSE = 1.1


@dataclass(frozen=True)
class Candidate:
    """A layout with what it takes.

    Attributes:
        layout: how the run would be laid out.
        time: of a step, estimated; None for a layout that was refused before it was weighed.
        bytes: of the fullest rank, by kind.
        bubble: share of a step in which a stage waits.
        reason: why it was not taken; empty for the one that was.
    """

    layout: Layout
    time: StepTime | None
    bytes: dict[str, float]
    bubble: float
    reason: str = ""

    @property
    def seconds(self) -> float:
        """Estimated, of a step; infinite where it was not weighed."""
        return float("inf") if self.time is None else self.time.seconds

    @property
    def total_bytes(self) -> float:
        """Of all kinds."""
        return sum(self.bytes.values())

    @property
    def simplicity(self) -> tuple:
        """The smaller, the simpler."""
        one = self.layout
        return (one.pipeline, one.tensor, one.zero_stage, one.activation_checkpointing, -one.micro_batch_size)


@dataclass(frozen=True)
class Space:
    """What a search may choose from.

    Attributes:
        config: the training file.
        model_config: of the model.
        objective: what the model is trained on.
        places: workers that the cluster holds (or the file wants).
        per_node: workers of a node.
        limit: bytes that a worker may hold; None if not known.
        use_gpu: whether each worker holds a GPU.
        bf16: whether training computes in bf16.
        parameters: of the model.
        figures: what a worker's hardware gives.
        teacher: that each worker holds beside the model, if there is one.
        trained: share of the parameters that is trained.
        packed: what of them is kept in 4 bits, if anything is.
    """

    config: TrainConfig
    model_config: PretrainedConfig
    objective: Objective
    places: int
    per_node: int
    limit: float | None
    use_gpu: bool
    bf16: bool
    parameters: int
    figures: Figures
    teacher: Teacher | None = None
    trained: float = 1.0
    packed: Packed | None = None

    @property
    def budget(self) -> float | None:
        """Bytes that are left of a worker's memory for training."""
        return None if self.limit is None else self.limit - PROCESS_BYTES[self.use_gpu]

    def _allows(self, tensor: int, pipeline: int) -> bool:
        """Whether the model may be split so."""
        model_parallel = tensor * pipeline
        if model_parallel > 1 and self.config.resources.elastic is not None:
            return False
        if splitting_refusal(self.config, model_parallel):
            return False
        return not model_refusal(self.model_config, self.objective, tensor, pipeline)

    def tensors(self) -> list[int]:
        """Numbers of tensor-parallel ranks."""
        given = self.config.parallel.tensor
        if given != "auto":
            return [given]
        # Tensor parallelism waits for each sum: not over a network.
        most = min(self.places, self.per_node)
        return [n for n in range(1, most + 1) if self.per_node % n == 0 and self._allows(n, 1)]

    def pipelines(self, tensor: int) -> list[int]:
        """Numbers of stages."""
        given = self.config.parallel.pipeline
        if given != "auto":
            return [given]
        most = self.places // tensor
        shared = [n for n in range(1, most + 1) if most % n == 0 or n & (n - 1) == 0]
        return [n for n in shared if self._allows(tensor, n)]

    def replicas(self, model_parallel: int) -> list[int]:
        """The most replicas of ``model_parallel`` workers that the batch divides over; none if not even one."""
        resources, data, batch = self.config.resources, self.config.parallel.data, self.config.training.batch_size
        if resources.elastic is not None:
            return [max(resources.elastic[0], min(resources.elastic[1], self.places))]
        if isinstance(resources.workers, int):
            if workers_refusal(resources.workers, data, model_parallel, settled=True):
                return []
            sizes = [resources.workers // model_parallel]
        elif data != "auto":
            sizes = [data] if data * model_parallel <= self.places else []
        else:
            sizes = list(range(self.places // model_parallel, 0, -1))
        return next(([n] for n in sizes if not batch_refusal(batch, n)), [])

    def zero_stages(self, model_parallel: int) -> list[int]:
        """ZeRO stages that go with ``model_parallel`` workers a replica."""
        given, compiled = self.config.parallel.zero_stage, self.config.training.compile
        stages = [0, 1, 2, 3] if given == "auto" else [given]
        adapter = self.config.adapter
        if adapter is not None and (adapter.type == "dora" or adapter.bits is not None):
            # It reads whole weights, or they are not cut.
            stages = [n for n in stages if n < 3]
        return [n for n in stages if not zero_refusal(n, model_parallel, bf16=self.bf16, compiled=compiled)]

    def micro_batch_sizes(self, replicas: int) -> list[int]:
        """Sizes that divide a replica's share of the batch, the largest first."""
        training, given = self.config.training, self.config.parallel.micro_batch_size
        share = -(-training.batch_size // replicas)
        if given != "auto":
            # The shares of an elastic run change: its last micro-batch may be a smaller one.
            elastic = self.config.resources.elastic is not None
            return [given] if elastic or not micro_batch_refusal(given, share) else []
        limit = max(1, MICRO_BATCH_TOKENS // training.sequence_length)
        return [n for n in range(min(share, limit), 0, -1) if not micro_batch_refusal(n, share)]

    def checkpointings(self) -> list[bool]:
        """Whether activations are recomputed."""
        given = self.config.parallel.activation_checkpointing
        return [False, True] if given == "auto" else [given]

    def layouts(self) -> Iterator[list[Layout]]:
        """Layouts, in lists that differ in micro-batch size and recomputation only: of each the fastest first."""
        for tensor in self.tensors():
            for pipeline in self.pipelines(tensor):
                for replicas in self.replicas(tensor * pipeline):
                    share = -(-self.config.training.batch_size // replicas)
                    sizes = self.micro_batch_sizes(replicas)
                    for zero_stage in self.zero_stages(tensor * pipeline) if sizes else []:
                        yield [
                            Layout(
                                replicas, tensor, pipeline, zero_stage, micro, -(-share // micro), checkpointing,
                                self.bf16, self.config.training.optimizer, self.use_gpu, self.trained,
                                self.config.training.ema is not None, *(self.packed or ()),
                            )
                            for checkpointing in self.checkpointings()
                            for micro in sizes
                        ]  # fmt: skip


def candidates(space: Space, memory: ModelMemory) -> list[Candidate]:
    """All layouts that the space allows, the taken one first, then those that fit from the fastest, then the rest.

    Empty where the workers cannot be shared out at all.
    """
    fitting, rejected = [], []
    for group in space.layouts():
        found = _best_of(space, memory, group)
        (rejected if found.reason else fitting).append(found)
    rejected.sort(key=lambda candidate: candidate.total_bytes)
    if not fitting:
        return rejected
    least = min(candidate.seconds for candidate in fitting)
    close = [candidate for candidate in fitting if candidate.seconds <= least * CLOSE]
    taken = min(close, key=lambda candidate: candidate.simplicity)
    others = sorted((c for c in fitting if c is not taken), key=lambda candidate: candidate.seconds)
    return [taken, *(replace(c, reason=_slower(c, taken)) for c in others), *rejected]


def _best_of(space: Space, memory: ModelMemory, group: list[Layout]) -> Candidate:
    """The fastest layout of the group that fits, without recomputation if it is close; else what misses by least."""
    best: list[Candidate] = []
    misses: list[Candidate] = []
    for recomputed in space.checkpointings():
        layouts = [layout for layout in group if layout.activation_checkpointing == recomputed]
        fitting, full = _weigh(space, memory, layouts)
        best += [min(fitting, key=lambda candidate: candidate.seconds)] if fitting else []
        misses += full
        if fitting and not full:
            # Recomputation makes room, of which there is enough.
            break
    if best:
        least = min(candidate.seconds for candidate in best)
        return next(candidate for candidate in best if candidate.seconds <= least * CLOSE)
    closest = min(misses, key=lambda candidate: candidate.total_bytes)
    more = "more than " if closest.time is None else ""
    return replace(closest, reason=f"needs {more}{_gb(closest.total_bytes)} a worker, {_gb(space.budget)} are free")


def _weigh(space: Space, memory: ModelMemory, layouts: list[Layout]) -> tuple[list[Candidate], list[Candidate]]:
    """The layouts, which differ in the size of micro-batches only, that fit, and those that do not.

    Without a pipeline a larger micro-batch is never slower: the first that fits will do. With one each size is weighed.
    """
    from raylm.parallel.plan.memory import held_bytes, rank_bytes
    from raylm.parallel.plan.timing import bubble, step_time

    fitting: list[Candidate] = []
    full: list[Candidate] = []
    for layout in layouts:
        least = held_bytes(space.parameters // (layout.tensor * layout.pipeline), layout)
        if space.budget is not None and sum(least.values()) > space.budget:
            # Without any activations already: not worth measuring.
            return fitting, [*full, Candidate(layout, None, least, bubble(layout))]
        stages = memory.stages(layout)
        held = max((rank_bytes(s, layout) for s in stages), key=lambda kinds: sum(kinds.values()))
        if space.teacher is not None:
            held |= {"teacher": space.teacher.bytes(layout)}
            beside = space.teacher.work.times(layout.micro_batch_size)
            stages = [replace(stage, work=stage.work + beside) for stage in stages]
        time = step_time(stages, layout, space.figures, space.per_node)
        candidate = Candidate(layout, time, held, bubble(layout))
        if space.budget is not None and candidate.total_bytes > space.budget:
            full.append(candidate)
            continue
        fitting.append(candidate)
        if layout.pipeline == 1:
            break
    return fitting, full


def _slower(candidate: Candidate, taken: Candidate) -> str:
    if candidate.seconds <= taken.seconds * CLOSE:
        return "as fast by estimate, less simple"
    return f"{candidate.seconds / taken.seconds:.2f} times the estimated time"


def _gb(size: float | None) -> str:
    return f"{(size or 0.0) / 1e9:,.1f} GB"
