"""``compress`` for models that generate text: how well each form of the model predicts text, how alike it writes, how
fast and how large it is.

In: the forms as directories. Out: the figures of each for ``report.json``.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.compression.measuring import Variant, agreement, in_rounds, medians
from raylm.compression.quality import chosen_windows
from raylm.config.stages import CompressConfig
from raylm.data.loading import same_tokens
from raylm.errors import RunFailure, UserError
from raylm.evaluation.perplexity import TextStream, TransformersScorer
from raylm.tasks.intervals import ratio_interval

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Weights of few bits move the logits a little; a broken export moves them altogether.
LEAST_COSINE = {8: 0.98, 4: 0.8}


@dataclass(frozen=True)
class Text:
    """Text that the forms are measured on.

    Attributes:
        name: before ``bits_per_byte`` in the report; empty for the run's own text.
        stream: its tokens.
    """

    name: str
    stream: TextStream


@dataclass(frozen=True)
class Reading:
    """What models of one tokenizer read.

    Attributes:
        texts: the run's own first.
        prompts: token ids, all of one length.
    """

    texts: list[Text]
    prompts: list[list[int]]


@dataclass(frozen=True)
class Comparison:
    """What all forms of the model are measured on.

    Attributes:
        config: of the run, with its data.
        source: directory of the original.
        reading: of the original's tokenizer.
        window: length, stride and batch size of the windows over a text.
        threads: of every engine.
    """

    config: CompressConfig
    source: str
    reading: Reading
    window: tuple[int, int, int]
    threads: int

    def reading_of(self, model: str | Path) -> Reading:
        """What the model in a directory reads: other tokens of the same texts, where its tokenizer is another."""
        if same_tokens(model, self.source):
            return self.reading
        return read_texts(self.config, str(model))

    def figures(self, variants: Sequence[Variant], rounds: int | None = None) -> list[dict[str, Any]]:
        """Of each variant, the first of which is the original: quality and agreement with that, memory and speed."""
        readings = {variant.path: self.reading_of(variant.path) for variant in variants}
        original = variants[0].path
        with tempfile.TemporaryDirectory() as directory:
            texts = {path: self._saved(reading, Path(directory)) for path, reading in readings.items()}

            def job(variant: Variant, number: int) -> dict[str, Any]:
                compared = variant.path != original and readings[variant.path] is self.reading
                # Once, in a process that measured speed: to start one takes as long as to score a small model.
                scoring = {"reference": original if compared else None, "texts": texts[variant.path]}
                return {
                    "engine": variant.engine, "model": variant.path, "prompts": readings[variant.path].prompts,
                    "new_tokens": self.config.compression.new_tokens, "threads": self.threads, "outputs": number == 0,
                    "scoring": scoring if number == 0 else None,
                }  # fmt: skip

            rounds = in_rounds(variants, "raylm.compression.measure", job, rounds)
        outputs, scored = ([found[0].pop(name) for found in rounds] for name in ("outputs", "scored"))
        figures = []
        for place, (variant, found) in enumerate(zip(variants, rounds, strict=True)):
            reading, alike, nats = readings[variant.path], {}, None
            # Other tokens are no tokens to compare.
            if place and reading is self.reading:
                alike["greedy_agreement"], nats = agreement(outputs[0], outputs[place]), scored[0]["nats"]
            figures.append({**medians(found), **self._quality(reading.texts, scored[place], nats), **alike})
        return figures

    def _saved(self, reading: Reading, directory: Path) -> list[dict[str, Any]]:
        """The texts for :func:`raylm.compression.quality.score`, their tokens in files of ``directory``."""
        length, stride, batch_size = self.window
        found = []
        for number, text in enumerate(reading.texts):
            path = directory / f"{id(reading)}-{number}.npy"
            if not path.exists():
                np.save(path, text.stream.tokens)
            window = {"length": length, "stride": stride, "batch_size": batch_size}
            found.append({"tokens": str(path), "most": self.config.compression.text_tokens, **window})
        return found

    def _quality(
        self, texts: Sequence[Text], scored: dict[str, Any], originals: list[list[float]] | None
    ) -> dict[str, Any]:
        """Figures of one form; ``originals`` is the loss of the original on the same windows."""
        figures: dict[str, Any] = {}
        for number, (text, nats) in enumerate(zip(texts, scored["nats"], strict=True)):
            windows = chosen_windows(len(text.stream.tokens), *self.window, self.config.compression.text_tokens)
            counts = [sum(stop + 1 - first for _, stop, first in batch) for batch in windows]
            # From nats a target to bits a byte.
            scale = (len(text.stream.tokens) - 1) / math.log(2) / text.stream.byte_count
            name = f"{text.name}bits_per_byte"
            figures[name] = math.fsum(nats) / sum(counts) * scale
            figures[f"{name}_interval"] = [scale * end for end in ratio_interval(nats, counts)]
            if originals is not None:
                figures[f"{name}_ratio_interval"] = list(ratio_interval(nats, originals[number]))
        if scored["divergence"] is not None:
            figures["divergence"] = scored["divergence"]
        if scored["ran"] is not None:
            figures["ran"] = scored["ran"]
        return figures


def open_comparison(config: CompressConfig, source: str, model_config: PretrainedConfig, threads: int) -> Comparison:
    """Read the texts and choose the prompts.

    Raises:
        UserError: there is too little text, or what is asked for is longer than the model's positions.
    """
    from raylm.evaluation.stage import window_of
    from raylm.models.families.build import check_positions

    compression, window = config.compression, window_of(config.evaluation, model_config)
    check_positions(
        model_config,
        compression.prompt_tokens + compression.new_tokens,
        "compression.prompt_tokens + compression.new_tokens",
    )
    return Comparison(config, source, read_texts(config, source), window, threads)


def read_texts(config: CompressConfig, source: str) -> Reading:
    """Texts and prompts in the tokens of the model at ``source``.

    Raises:
        UserError: there is too little text.
    """
    from raylm.data.loading import load_tokenizer
    from raylm.evaluation.stage import open_text

    compression, tokenizer = config.compression, load_tokenizer(source)
    texts = [Text("", open_text(config.data, config.evaluation.split, tokenizer))]
    if compression.outside is not None:
        texts.append(Text("outside_", open_text(compression.outside, config.evaluation.split, tokenizer)))
    return Reading(texts, take_prompts(texts[0].stream, compression.prompts, compression.prompt_tokens))


def take_prompts(stream: TextStream, count: int, length: int) -> list[list[int]]:
    """``count`` prompts of ``length`` tokens, evenly spaced over the text.

    Raises:
        UserError: the text is too short.
    """
    room = len(stream.tokens) - length
    if room < count:
        raise UserError(
            f"compression.prompts: found {count} prompts of {length} tokens, allowed: fewer or "
            f"shorter ones, as the text has {len(stream.tokens)} tokens"
        )
    starts = np.linspace(0, room, count, dtype=np.int64)
    return [stream.tokens[start : start + length].tolist() for start in starts]


def check_export(model: Path, export: Path, prompts: list[list[int]], bits: int, threads: int) -> float:
    """Cosine between the logits of an export and of the ``model`` that it was made from.

    Raises:
        RunFailure: they do not agree.
    """
    from raylm.compression.exporters.openvino import OpenVINOScorer
    from raylm.models.loading import load_model

    ids = np.array(prompts, dtype=np.int64)
    logits = [TransformersScorer(load_model(model)).logits(ids), OpenVINOScorer(export, threads).logits(ids)]
    centred = [x - x.mean(axis=-1, keepdims=True) for x in logits]
    cosine = float((centred[0] * centred[1]).sum() / np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    if not cosine >= (least := LEAST_COSINE[bits]):
        raise RunFailure(f"the export's logits do not agree with the model's: cosine {cosine:.4f} < {least}")
    return cosine
