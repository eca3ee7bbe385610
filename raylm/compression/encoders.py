"""``compress`` for encoders: readers, classifiers and encoders that embed.

In: the forms of the model as directories and what they are measured on: questions of a reader, labelled texts of a
classifier, any texts of another encoder. Out: the figures of each form for ``report.json``: quality, latency, memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.compression.measuring import Variant, in_rounds, medians
from raylm.data.loading import same_tokens
from raylm.models.encoders import Encoder, OpenVinoEncoder, TransformersEncoder
from raylm.progress import Activity

if TYPE_CHECKING:
    from raylm.tasks.base import ScoredSet, Task

BATCH_SIZES = (1, 8)


@dataclass(frozen=True)
class EncoderComparison:
    """What all forms of the model are measured on.

    Attributes:
        source: directory of the original.
        sets: examples in its tokens, by what stands before their measures in the report; the run's own are under "".
        open: from another model's directory to the examples in that one's tokens.
        threads: of every engine.
    """

    task: Task
    source: str
    sets: dict[str, ScoredSet]
    open: Callable[[str], dict[str, ScoredSet]]
    threads: int

    def sets_of(self, model: str | Path) -> dict[str, ScoredSet]:
        """In the tokens of the model in a directory."""
        return self.sets if same_tokens(model, self.source) else self.open(str(model))

    def figures(self, variants: Sequence[Variant], rounds: int | None = None) -> list[dict[str, Any]]:
        """Of each variant quality, latency and memory."""
        sets = {variant.path: self.sets_of(variant.path) for variant in variants}
        with Activity("compress: measuring quality") as activity:
            qualities = []
            for variant in variants:
                activity.change(f"compress: measuring quality, {variant.name}")
                qualities.append(self._quality(self._open(variant), sets[variant.path]))

        def speed_job(variant: Variant, number: int) -> dict[str, Any]:
            return self._speed_job(variant, sets[variant.path][""])

        rounds = in_rounds(variants, "raylm.compression.measure_encoder", speed_job, rounds)
        return [{**medians(found), **quality} for found, quality in zip(rounds, qualities, strict=True)]

    def check_export(self, model: Path, export: Path) -> dict[str, Any]:
        """How close the outputs of an export and of the ``model`` that it was made from are, and for what length.

        Raises:
            RunFailure: they do not agree.
        """
        assert self.task.evaluation is not None
        examples = self.sets_of(model)[""]
        before = _outputs(TransformersEncoder(str(model), self.task.head), examples)
        after = _outputs(OpenVinoEncoder(export, self.task.head, self.threads), examples)
        return {"sequence_length": examples.length, **self.task.evaluation.closeness(examples, before, after)}

    def _open(self, variant: Variant) -> Encoder:
        if variant.engine == "openvino":
            return OpenVinoEncoder(variant.path, self.task.head, self.threads)
        return TransformersEncoder(variant.path, self.task.head)

    def _quality(self, encoder: Encoder, sets: dict[str, ScoredSet]) -> dict[str, Any]:
        assert self.task.evaluation is not None
        keys = [measure.key for measure in self.task.evaluation.measures]
        found = {}
        for name, examples in sets.items():
            figures = examples.figures(_outputs(encoder, examples))
            kept = [key for key in (*keys, *(f"{key}_interval" for key in keys)) if key in figures]
            found |= {f"{name}{key}": figures[key] for key in kept}
        return found

    def _speed_job(self, variant: Variant, examples: ScoredSet) -> dict[str, Any]:
        return {
            "engine": variant.engine,
            "model": variant.path,
            "task": self.task.name,
            "length": examples.length,
            "vocabulary": examples.vocabulary_size,
            "batch_sizes": list(BATCH_SIZES),
            "threads": self.threads,
        }


def _outputs(encoder: Encoder, examples: ScoredSet) -> list[np.ndarray]:
    return [encoder.outputs(batch) for batch in examples.batches]
