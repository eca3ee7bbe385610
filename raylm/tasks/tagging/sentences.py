"""Measuring a tagger: tagged sentences to token accuracy and, where tags say where spans are, precision, recall and F1.

Windows are sorted by length and grouped into batches by that alone, so that the figures do not depend on how many
workers share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.stages import CompressConfig, EvaluateConfig
from raylm.data.loading import load_tokenizer
from raylm.data.padding import encoder_batch
from raylm.data.samples.tagged import TaggedSentence, evaluation_tagged, fitting
from raylm.data.samples.tagged_sets import check_known
from raylm.data.samples.word_windows import WordWindow, WordWindows
from raylm.errors import RunFailure, UserError
from raylm.models.encoders import encoder_positions
from raylm.models.loading import load_config
from raylm.tasks.base import Batches, ScoredSet, by_length
from raylm.tasks.closeness import LEAST_AGREEMENT
from raylm.tasks.intervals import ratio_interval
from raylm.tasks.tagging.decoding import Decoder
from raylm.tasks.tagging.scoring import Counts, count, count_types

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_DEFAULT = 512
SPEED_LENGTH = 128


class SentenceSet:
    """Tagged sentences as windows of one model's tokens, and from its logits to figures.

    See :class:`raylm.tasks.base.ScoredSet`; what the model gives are logits [n, T, tags].

    Args:
        sentences: at least one, whose tags are among the decoder's.
        decoder: reads the model's logits.
        tokenizer: the model's.
        length: most tokens of a window.
        batch_size: windows read together.
    """

    def __init__(
        self,
        sentences: list[TaggedSentence],
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        batch_size: int,
    ) -> None:
        self.sentences, self.decoder, self.scheme = sentences, decoder, decoder.scheme
        self.count, self.length, self.vocabulary_size = len(sentences), length, len(tokenizer)
        self._cuts = WordWindows(tokenizer, length).cut([sentence.tokens for sentence in sentences])
        windows = [window for cut in self._cuts for window in cut]
        self._windows: list[WordWindow] = windows
        pad_id = tokenizer.pad_token_id
        self.batches = Batches(
            by_length([len(window.ids) for window in windows], batch_size),
            lambda batch: encoder_batch([windows[number].ids for number in batch], pad_id, length),
        )

    def words(self, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Logits [words, tags] of each window, in the order of the windows."""
        found: list[Any] = [None] * len(self._windows)
        for batch, rows in zip(self.batches.numbers, outputs, strict=True):
            for number, row in zip(batch, rows, strict=True):
                found[number] = row[self._windows[number].firsts]
        return found

    def tags(self, outputs: Sequence[np.ndarray]) -> list[list[str]]:
        """The tags of each sentence's words."""
        rest = iter(self.words(outputs))
        return [self.decoder.tags(np.concatenate([next(rest) for _ in cut])) for cut in self._cuts]

    def figures(self, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        """In percent: token accuracy, the spans' precision, recall and F1, 95% intervals, and each label's own figures.

        Of tags without spans a label is a tag. Intervals draw whole sentences.
        """
        found = self.tags(outputs)
        pairs = [(sentence.tags, tags) for sentence, tags in zip(self.sentences, found, strict=True)]
        each = [count(*pair, self.scheme) for pair in pairs]
        total, types = sum(each, Counts()), {}
        for pair in pairs:
            for kind, counts in count_types(*pair, self.scheme).items():
                types[kind] = types.get(kind, Counts()) + counts
        figures: dict[str, Any] = {
            "sentences": len(self.sentences),
            "windows": len(self._windows),
            "words": total.words,
            "scheme": self.scheme,
            "token_accuracy": 100.0 * total.accuracy,
            "token_accuracy_interval": _interval([(one.right_words, one.words) for one in each]),
        }
        if self.scheme != "none":
            figures |= {
                "spans": total.there,
                "span_precision": 100.0 * total.precision,
                "span_recall": 100.0 * total.recall,
                "span_f1": 100.0 * total.f1,
                "span_f1_interval": _interval([(2 * one.right, one.found + one.there) for one in each]),
            }
        what = "words" if self.scheme == "none" else "spans"
        figures["labels"] = {
            kind: {
                "precision": 100.0 * one.precision, "recall": 100.0 * one.recall, "f1": 100.0 * one.f1, what: one.there
            }
            for kind, one in sorted(types.items())
        }  # fmt: skip
        return figures

    def rows(self, outputs: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
        """Sentences with their tags, and those that were found."""
        for sentence, tags in zip(self.sentences, self.tags(outputs), strict=True):
            yield {"tokens": list(sentence.tokens), "tags": list(sentence.tags), "found": tags}


def _interval(parts: list[tuple[int, int]]) -> list[float]:
    """Ends of the 95% interval of a ratio in percent, of the sentences in which anything is counted."""
    counted = [part for part in parts if part[1]]
    if not counted:
        return [0.0, 0.0]
    return [100.0 * end for end in ratio_interval(*zip(*counted, strict=True))]


def open_sentences(config: EvaluateConfig | CompressConfig, source: str) -> SentenceSet:
    """The tagged sentences of the ``data`` section for the model at ``source``.

    Raises:
        UserError: bad input, tags that the model does not have, or windows that are longer than its positions.
    """
    model_config = load_config(source)
    positions, asked = encoder_positions(model_config), config.evaluation.sequence_length
    if asked is not None and positions is not None and asked > positions:
        raise UserError(
            f"evaluation.sequence_length: found {asked}, allowed: at most the model's {positions} positions"
        )
    length = asked or min(positions or LONGEST_DEFAULT, LONGEST_DEFAULT)
    decoder = Decoder.of(source, model_config)
    sentences = list(fitting(evaluation_tagged(config.data, config.evaluation.split), decoder.scheme, config.data))
    if not sentences:
        raise UserError("data: no sentence is left, allowed: one or more")
    check_known(sentences, decoder.labels, "the model has")
    found = SentenceSet(sentences, decoder, load_tokenizer(source), length, config.evaluation.batch_size)
    found.length = asked or min(length, SPEED_LENGTH)
    return found


def tag_agreement(scored: ScoredSet, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, Any]:
    """Share of the words that get the same tag from both.

    Raises:
        RunFailure: too few do.
    """
    assert isinstance(scored, SentenceSet)
    pairs = zip(scored.tags(before), scored.tags(after), strict=True)
    same = [one == other for pair in pairs for one, other in zip(*pair, strict=True)]
    agreed = sum(same) / len(same)
    if not agreed >= LEAST_AGREEMENT:
        raise RunFailure(
            f"the export's tags do not agree with the model's: {agreed:.1%} of the words get the same tag, at least "
            f"{LEAST_AGREEMENT:.0%} must"
        )
    return {"tags_agreement": agreed}


def describe(report: dict[str, Any]) -> str:
    """The report in three lines."""
    spans = ""
    if "span_f1" in report:
        spans = (
            f"; {report['spans']:,} spans: precision {report['span_precision']:.2f}%, recall "
            f"{report['span_recall']:.2f}%, F1 {report['span_f1']:.2f}%"
        )
    return (
        f"evaluate: {report['model']} on {report['sentences']:,} tagged sentences, {report['words']:,} words\n"
        f"  quality    token accuracy {report['token_accuracy']:.2f}%{spans} (higher is better)\n"
        f"  speed      {report['sentences_per_second']:,.0f} sentences/s on {report['workers']:,} "
        f"worker{'s' if report['workers'] != 1 else ''}"
    )
