"""Measuring a model that writes an answer to a text: pairs to the loss of the references, BLEU, chrF and ROUGE.

In: the pairs of a stage's ``data`` section, as one model's tokens: of an encoder-decoder the source as plain text, of a
next-token model the source as a user's message in its chat template. Batches are of similar lengths and formed by
length alone, so that the figures do not depend on how many workers share them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.evaluation import EvaluationSection
from raylm.config.stages import CompressConfig, EvaluateConfig
from raylm.data.loading import load_tokenizer
from raylm.data.samples.text_pairs import TextPair, encode_sources, encode_targets, evaluation_pairs, pair_batch
from raylm.data.sources.documents import make_pair
from raylm.data.tokens.encoding import PairEncoder
from raylm.data.tokens.tokenizers import reuse_tokenizer
from raylm.errors import UserError
from raylm.models.encoder_decoders import decoder_start, source_prefix
from raylm.models.loading import load_config
from raylm.tasks.base import Arrays, Batches, ScoredSet, by_length
from raylm.tasks.closeness import losses_correlation
from raylm.tasks.intervals import ratio_interval
from raylm.tasks.sequence_to_sequence.scores import check_scorers, compare

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LONGEST_DEFAULT = 512
NEW_TOKENS = 128
IGNORED = -100


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as one model's tokens.

    Attributes:
        sources, targets: ids int64 [T] of each.
        start: what a decoder of its own begins with; None of a next-token model.
    """

    sources: list[np.ndarray]
    targets: list[np.ndarray]
    start: int | None


class PairSet:
    """Pairs, and from a model's records of them to figures; see :class:`raylm.tasks.base.ScoredSet`.

    A model gives for each batch what :meth:`raylm.models.pairs.PairModel.outputs` returns.

    Args:
        pairs: at least one.
        encoded: the same as tokens.
        tokenizer: of the model.
        section: beams, most new tokens, language and batch size.
    """

    def __init__(
        self,
        pairs: list[TextPair],
        encoded: EncodedPairs,
        tokenizer: PreTrainedTokenizerBase,
        section: EvaluationSection,
    ) -> None:
        self.pairs, self._encoded, self._tokenizer, self._section = pairs, encoded, tokenizer, section
        self.count, self.vocabulary_size = len(pairs), len(tokenizer)
        self.length = max(len(ids) for ids in encoded.sources)
        lengths = [len(ids) for ids in encoded.sources]
        self.batches = Batches(by_length(lengths, section.batch_size), self._make)

    def _make(self, numbers: list[int]) -> Arrays:
        """What :class:`raylm.models.pairs.PairModel` takes."""
        encoded = self._encoded
        pad_id = self._tokenizer.pad_token_id or 0
        batch = pair_batch([encoded.sources[n] for n in numbers], [encoded.targets[n] for n in numbers], pad_id)
        if encoded.start is not None:
            decoder = np.roll(batch["targets"], 1, axis=1)
            decoder[decoder == IGNORED] = pad_id
            decoder[:, 0] = encoded.start
            batch["decoder_input_ids"] = decoder
        return batch | {"limits": np.array([self._section.beams, self._section.new_tokens])}

    def _in_order(self, outputs: Sequence[np.ndarray]) -> tuple[list[str], np.ndarray, np.ndarray, int]:
        """What was written for each pair; summed losses and numbers of targets [pairs]; texts without an end."""
        texts, sums, unended = [""] * self.count, np.zeros(self.count), 0
        counts = np.array([len(ids) for ids in self._encoded.targets])
        for numbers, records in zip(self.batches.numbers, outputs, strict=True):
            for number, record in zip(numbers, records, strict=True):
                written = record["written"][record["written"] >= 0].tolist()
                texts[number] = self._tokenizer.decode(written, skip_special_tokens=True).strip()
                sums[number] = record["losses"].astype(np.float64).sum()
                unended += len(written) >= self._section.new_tokens
        return texts, sums, counts, unended

    def figures(self, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        """See :class:`raylm.tasks.base.ScoredSet`."""
        texts, sums, counts, unended = self._in_order(outputs)
        return {
            **compare(texts, [pair.target for pair in self.pairs], self._section.language),
            "target_loss": float(sums.sum() / counts.sum()),
            "target_loss_interval": list(ratio_interval(sums, counts)),
            "pairs": self.count,
            "targets": int(counts.sum()),
            "beams": self._section.beams,
            "without_end": unended,
        }

    def rows(self, outputs: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
        """Each source with its reference, what was written, and the loss of the reference, nats a token."""
        texts, sums, counts, _ = self._in_order(outputs)
        for pair, text, total, count in zip(self.pairs, texts, sums, counts, strict=True):
            loss = float(total / count)
            yield {"source": pair.source, "reference": pair.target, "hypothesis": text, "loss": loss}


def open_pairs(config: EvaluateConfig | CompressConfig, source: str) -> PairSet:
    """The pairs of the ``data`` section for the model at ``source``.

    Raises:
        UserError: bad input, missing libraries, or texts that are longer than the model's positions.
    """
    section, model, tokenizer = config.evaluation, load_config(source), load_tokenizer(source)
    check_scorers()
    if isinstance(config, CompressConfig) and section.beams > 1:
        raise UserError(
            f"evaluation.beams: found {section.beams}, allowed in compress: 1, as all forms take the likeliest token"
        )
    pairs = evaluation_pairs(config.data, section.split)
    if model.is_encoder_decoder:
        encoded = _for_encoder_decoder(pairs, config, model, tokenizer)
        # Source and answer have positions of their own; the first of these is the start token's.
        before = 1
    else:
        encoded = _as_messages(pairs, source)
        before = max(map(len, encoded.sources))
    section = _fitted(section, model, before, max(map(len, encoded.targets)))
    found = PairSet(pairs, encoded, tokenizer, section)
    most = config.compression.text_tokens if isinstance(config, CompressConfig) else None
    if most is None or (total := sum(map(len, encoded.targets))) <= most:
        return found
    # Spread over the text, the same for all forms.
    chosen = np.unique(np.linspace(0, len(pairs) - 1, max(1, len(pairs) * most // total)).round().astype(int))
    some = EncodedPairs([encoded.sources[n] for n in chosen], [encoded.targets[n] for n in chosen], encoded.start)
    return PairSet([pairs[n] for n in chosen], some, tokenizer, section)


def _for_encoder_decoder(
    pairs: list[TextPair],
    config: EvaluateConfig | CompressConfig,
    model: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> EncodedPairs:
    asked, positions = config.evaluation.sequence_length, getattr(model, "max_position_embeddings", None)
    if asked is not None and positions is not None and asked > positions:
        raise UserError(
            f"evaluation.sequence_length: found {asked}, allowed: at most the model's {positions} positions"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("model.path: its tokenizer has no end token, which ends a source and a target")
    prefix = config.objective.source_prefix
    prefix = source_prefix(model) or "" if prefix is None else prefix
    most = asked or min(positions or LONGEST_DEFAULT, LONGEST_DEFAULT)
    sources, _ = encode_sources(tokenizer, [pair.source for pair in pairs], most, prefix)
    targets, _ = encode_targets(tokenizer, [pair.target for pair in pairs], positions)
    return EncodedPairs(sources, targets, decoder_start(model))


def _as_messages(pairs: list[TextPair], source: str) -> EncodedPairs:
    """Pairs as ``raylm prepare`` lays them out for training, and ``raylm serve`` for generation."""
    with tempfile.TemporaryDirectory() as directory:
        reuse_tokenizer(source).save_pretrained(directory)
        tokens, places = PairEncoder(Path(directory)).encode([make_pair(pair.source, pair.target) for pair in pairs])
    sources = [ids[:first] for ids, (first, _, _) in zip(tokens, places, strict=True)]
    targets = [ids[first:] for ids, (first, _, _) in zip(tokens, places, strict=True)]
    return EncodedPairs(sources, targets, None)


def _fitted(section: EvaluationSection, model: PretrainedConfig, before: int, longest: int) -> EvaluationSection:
    """The section with the number of new tokens, which the model has positions for.

    Args:
        before: most tokens before an answer.
        longest: tokens of the longest reference.

    Raises:
        UserError: it has not.
    """
    positions, asked = getattr(model, "max_position_embeddings", None), section.new_tokens
    if positions is None:
        return section.model_copy(update={"new_tokens": asked or NEW_TOKENS})
    room = positions - before
    because = f"as the model has {positions} positions and {before} tokens may stand before an answer"
    if (asked or 1) > room:
        raise UserError(f"evaluation.new_tokens: found {asked or 'none'}, allowed: at most {max(room, 0)}, {because}")
    if longest > room + 1:
        raise UserError(f"data: found a target of {longest} tokens, allowed: at most {room + 1}, {because}")
    return section.model_copy(update={"new_tokens": asked or min(NEW_TOKENS, room)})


def closeness(scored: ScoredSet, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, Any]:
    """How the losses of all targets by two forms go together, and how many texts both write alike.

    Raises:
        RunFailure: the losses do not go together.
    """
    losses = [[records["losses"] for records in outputs] for outputs in (before, after)]
    same = total = 0
    for one, other in zip(before, after, strict=True):
        for first, second in zip(one["written"], other["written"], strict=True):
            same += first[first >= 0].tolist() == second[second >= 0].tolist()
            total += 1
    return {**losses_correlation(*losses), "same_texts": same / total}


def describe(report: dict[str, Any]) -> str:
    """The figures of a report as lines of text."""
    low, high = report["bleu_interval"]
    how = "the likeliest token each time" if report["beams"] == 1 else f"beam search, {report['beams']} beams"
    unended = f"; {report['without_end']:,} texts without an end" if report["without_end"] else ""
    return (
        f"evaluate: {report['model']} on {report['pairs']:,} pairs ({how}{unended})\n"
        f"  quality    BLEU {report['bleu']:.2f} (95% interval {low:.2f} to {high:.2f}), chrF {report['chrf']:.2f}, "
        f"ROUGE-1/2/L {report['rouge1']:.2f}/{report['rouge2']:.2f}/{report['rouge_l']:.2f}; higher is better\n"
        f"             {report['bleu_signature']}\n"
        f"  loss       {report['target_loss']:.4f} nats a token of the references; lower is better\n"
        f"  speed      {report['pairs_per_second']:,.1f} pairs/s on {report['workers']:,} "
        f"worker{'s' if report['workers'] != 1 else ''}"
    )
