"""The record of a task: how it is trained, how it is scored, how compressed models are compared on it, what is served.

One task is one module ``raylm.tasks.NAME`` (a file or a folder) with its record as ``TASK``, and its line in
:mod:`raylm.config.tasks`. Nothing outside of it asks which task it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from raylm.config.stages import CompressConfig, EvaluateConfig
from raylm.models.encoder_decoders import open_scored
from raylm.models.heads import Head

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from raylm.config.serving import ServingSection
    from raylm.tasks.objective import Objective

Arrays = dict[str, np.ndarray]
Better = Literal["smaller", "larger"]


class ScoredSet(Protocol):
    """Examples as one model's tokens, and from what the model gives for them to figures.

    Attributes:
        batches: what goes into the model, int64 [n, T]; grouped by length alone, so that the figures do not depend on
            how many workers share them.
        count: examples.
        length: tokens of a text, on which speed is measured.
        vocabulary_size: of the tokenizer.
    """

    batches: Sequence[Arrays]
    count: int
    length: int
    vocabulary_size: int

    def figures(self, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        """Figures for ``report.json`` from the outputs [n, ...] of all batches, those of the task's measures among
        them."""

    def rows(self, outputs: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
        """What the model says to each example, for people, in the order of the data."""


@dataclass(frozen=True)
class Measure:
    """A figure of quality.

    Attributes:
        key: in reports.
        name: with its unit.
        better: which direction is an improvement.
        decimals: that are shown.
    """

    key: str
    name: str
    better: Better
    decimals: int


@dataclass(frozen=True)
class Evaluation:
    """How models with the task's head are scored on examples.

    Attributes:
        open: the examples of a stage's ``data`` section for the model at a path.
        measures: what :meth:`ScoredSet.figures` gives; a report is one of this task where it has the first of them.
        closeness: how alike the outputs of two models are, for the report; raises RunFailure where they differ as those
            of one model in two forms cannot.
        unit: what the examples are.
        results: file of :meth:`ScoredSet.rows` in the run directory.
        describe: the report of ``evaluate`` in some lines.
        open_model: from a path, the head, a number of threads and an ``engine`` to what has ``outputs`` of a batch.
    """

    open: Callable[[EvaluateConfig | CompressConfig, str], ScoredSet]
    measures: tuple[Measure, ...]
    closeness: Callable[[ScoredSet, Sequence[np.ndarray], Sequence[np.ndarray]], dict[str, Any]]
    unit: str
    results: str = ""
    describe: Callable[[dict[str, Any]], str] | None = None
    open_model: Callable[..., Any] = open_scored


@dataclass(frozen=True)
class Service:
    """What ``raylm serve`` offers of a model with the task's head.

    Attributes:
        name: of the task in ``/v1/models``.
        what: the model, in words.
        route: behind ``/v1/``, for the example.
        example: a request's body; the value of ``model`` is the served name.
        settings: how it reads, from the model's directory, its configuration and the ``serving`` section.
        check: refuses a model, its tokenizer or the section, before anything is started.
    """

    name: str
    what: str
    route: str
    example: dict[str, Any]
    settings: Callable[[str, PretrainedConfig, ServingSection], dict[str, Any]] | None = None
    check: Callable[[PretrainedConfig, PreTrainedTokenizerBase, ServingSection, str], None] | None = None


GENERATION = Service("generation", "a text generator", "completions", {"model": "", "prompt": "The", "max_tokens": 32})

WRITING = Service(
    "sequence_to_sequence",
    "a sequence-to-sequence model",
    "completions",
    {"model": "", "prompt": "The old house stands by the river."},
)


@dataclass(frozen=True)
class Task:
    """Everything about a task.

    Attributes:
        name: value of ``objective.type``.
        head: of its models.
        service: what is served of them.
        objective: how it is trained; None where it is not.
        evaluation: how its models are scored; None of those that score running text, by its tokens.
    """

    name: str
    head: Head
    service: Service
    objective: type[Objective] | None = None
    evaluation: Evaluation | None = None

    @property
    def generates(self) -> bool:
        """Whether its models write text, rather than read one."""
        return self.head.network != "encoder"

    @property
    def continues(self) -> bool:
        """Whether its models write text by continuing one."""
        return self.head.network == "decoder"


@dataclass(frozen=True)
class Batches(Sequence[Arrays]):
    """Batches that are padded when they are asked for.

    Attributes:
        numbers: of the examples of each batch.
        make: from such numbers to the batch.
    """

    numbers: list[list[int]] = field(repr=False)
    make: Callable[[list[int]], Arrays]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self.make(numbers) for numbers in self.numbers[number]]
        return self.make(self.numbers[number])


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of examples in batches of similar lengths."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
