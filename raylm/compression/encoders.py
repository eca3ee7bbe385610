"""``compress`` for models that are scored on examples: readers, classifiers, encoders that embed, encoder-decoders.

In: the forms of the model as directories and what they are measured on: questions of a reader, labelled texts of a
classifier, pairs or gaps of an encoder-decoder, any texts of another encoder. Out: the figures of each form for
``report.json``: quality, latency (of an encoder-decoder the speed of its answers), memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.compression.measuring import Variant, agreement, in_rounds, medians
from raylm.config.compression import CompressionSection
from raylm.data.loading import same_tokens
from raylm.models.encoder_decoders import EncoderDecoder
from raylm.models.encoders import Encoder
from raylm.progress import Activity

if TYPE_CHECKING:
    from raylm.tasks.base import ScoredSet, Task

BATCH_SIZES = (1, 8)


@dataclass(frozen=True)
class ExampleComparison:
    """What all forms of the model are measured on.

    Attributes:
        section: of the file.
        source: directory of the original.
        sets: examples in its tokens, by what stands before their measures in the report; the run's own are under "".
        open: from another model's directory to the examples in that one's tokens.
        threads: of every engine.
    """

    section: CompressionSection
    task: Task
    source: str
    sets: dict[str, ScoredSet]
    open: Callable[[str], dict[str, ScoredSet]]
    threads: int

    def sets_of(self, model: str | Path) -> dict[str, ScoredSet]:
        """In the tokens of the model in a directory."""
        return self.sets if same_tokens(model, self.source) else self.open(str(model))

    def figures(self, variants: Sequence[Variant], rounds: int | None = None) -> list[dict[str, Any]]:
        """Of each variant, the first of which is the original: quality, speed and memory."""
        sets = {variant.path: self.sets_of(variant.path) for variant in variants}
        with Activity("compress: measuring quality") as activity:
            qualities = []
            for variant in variants:
                activity.change(f"compress: measuring quality, {variant.name}")
                qualities.append(self._quality(self._open(variant), sets[variant.path]))

        speeds = (self._latencies if self.task.head.network == "encoder" else self._answers)(variants, sets, rounds)
        return [{**speed, **quality} for speed, quality in zip(speeds, qualities, strict=True)]

    def _latencies(
        self, variants: Sequence[Variant], sets: Mapping[str, dict[str, ScoredSet]], rounds: int | None
    ) -> list[dict[str, Any]]:
        """Of each variant the time that texts take."""

        def job(variant: Variant, number: int) -> dict[str, Any]:
            return self._speed_job(variant, sets[variant.path][""])

        return [medians(found) for found in in_rounds(variants, "raylm.compression.measure_encoder", job, rounds)]

    def _answers(
        self, variants: Sequence[Variant], sets: Mapping[str, dict[str, ScoredSet]], rounds: int | None
    ) -> list[dict[str, Any]]:
        """Of each variant how fast it writes, and how much of that is as the original does."""
        prompts = {path: self._prompts(found[""]) for path, found in sets.items()}

        def job(variant: Variant, number: int) -> dict[str, Any]:
            return {
                "engine": variant.engine, "model": variant.path, "network": self.task.head.network,
                "prompts": prompts[variant.path], "new_tokens": self.section.new_tokens, "threads": self.threads,
                "outputs": number == 0,
            }  # fmt: skip

        found = in_rounds(variants, "raylm.compression.measure", job, rounds)
        outputs, figures = [one[0].pop("outputs") for one in found], []
        for place, (variant, one) in enumerate(zip(variants, found, strict=True)):
            same = place > 0 and sets[variant.path] is sets[variants[0].path]
            alike = {"greedy_agreement": agreement(outputs[0], outputs[place])} if same else {}
            figures.append({**medians(one), **alike})
        return figures

    def _prompts(self, examples: ScoredSet) -> list[list[int]]:
        """Inputs of some examples, the longest, cut to one length."""
        rows: list[np.ndarray] = []
        for batch in reversed(examples.batches):
            pairs = zip(batch["input_ids"], batch["attention_mask"].sum(axis=1), strict=True)
            rows += [row[:count] for row, count in pairs]
            if len(rows) >= self.section.prompts:
                break
        rows = sorted(rows, key=len, reverse=True)[: self.section.prompts]
        length = min(self.section.prompt_tokens, len(rows[-1]))
        return [row[:length].tolist() for row in rows]

    def check_export(self, model: Path, export: Path) -> dict[str, Any]:
        """How close the outputs of an export and of the ``model`` that it was made from are, and for what length.

        Raises:
            RunFailure: they do not agree.
        """
        assert self.task.evaluation is not None
        examples = self.sets_of(model)[""]
        opened = self.task.evaluation.open_model
        before = _outputs(opened(str(model), self.task.head, self.threads), examples)
        after = _outputs(opened(str(export), self.task.head, self.threads, engine="openvino"), examples)
        return {"sequence_length": examples.length, **self.task.evaluation.closeness(examples, before, after)}

    def _open(self, variant: Variant) -> Encoder | EncoderDecoder:
        assert self.task.evaluation is not None
        return self.task.evaluation.open_model(variant.path, self.task.head, self.threads, engine=variant.engine)

    def _quality(self, encoder: Encoder | EncoderDecoder, sets: dict[str, ScoredSet]) -> dict[str, Any]:
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


def _outputs(encoder: Encoder | EncoderDecoder, examples: ScoredSet) -> list[np.ndarray]:
    return [encoder.outputs(batch) for batch in examples.batches]
