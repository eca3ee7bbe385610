"""The classification objective: say which class a text belongs to.

Devlin et al. 2019, "BERT", section 4.1: a linear layer over the (pooled) class token gives a logit a label, and the
loss is the cross-entropy with the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional

from raylm.config.data import DataSection
from raylm.config.model import ObjectiveSection
from raylm.data.samples.labelled import KIND, LabelledInput, LabelledSamples
from raylm.data.samples.token_samples import IGNORED, Samples
from raylm.data.sources.documents import Split
from raylm.data.tokens.shards import read_manifest
from raylm.errors import UserError
from raylm.models.encoders import label_names
from raylm.models.heads import CLASSIFIER, Head
from raylm.models.own_heads import check_same_head
from raylm.tasks.objective import Batch, EncoderObjective
from raylm.tasks.rows import RowReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SHORTEST = 4


def _read(data: DataSection, config: PretrainedConfig, section: ObjectiveSection) -> LabelledInput:
    check_same_head(config, CLASSIFIER, section)
    # A classifier that is trained further keeps its labels.
    found = LabelledInput(data, label_names(config) if CLASSIFIER.is_named_in(config) else None)
    weights = section.class_weights
    unknown = sorted(set(weights) - set(found.labels)) if isinstance(weights, dict) else []
    if unknown:
        raise UserError(
            f"objective.class_weights: found the label '{unknown[0]}', allowed: {', '.join(found.labels[:20])}"
        )
    return found


def label_weights(section: str | dict[str, float], labels: Sequence[str], counts: Sequence[int]) -> torch.Tensor:
    """Weights fp32 [labels] of ``objective.class_weights``.

    Args:
        counts: training texts of each label. balanced is their number over (labels that occur x the label's own), so
            that the weights of all texts add up to their number; a label that never occurs has 1.
    """
    if section == "balanced":
        present = sum(count > 0 for count in counts)
        return torch.tensor([sum(counts) / (present * count) if count else 1.0 for count in counts])
    assert isinstance(section, dict)
    return torch.tensor([float(section.get(label, 1.0)) for label in labels])


class ClassificationObjective(EncoderObjective):
    """Cross-entropy of the class; one target a text."""

    name: ClassVar[str] = "classification"
    head: Head = CLASSIFIER
    rows: ClassVar[RowReader | None] = RowReader(KIND, "labelled texts", _read)
    smooths_labels: ClassVar[bool] = True
    weighs_classes: ClassVar[bool] = True
    takes_loss: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")

    def __init__(self, section: ObjectiveSection | None = None) -> None:
        super().__init__(section)
        self._weights: torch.Tensor | None = None

    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """See :class:`Objective`; the directory is one of labelled texts, which have their length already."""
        found = LabelledSamples(directory, split, seed)
        if split == "train" and self.section.class_weights is not None:
            labels = read_manifest(directory)["labels"]
            self._weights = label_weights(self.section.class_weights, labels, found.label_counts(len(labels)))
        return found

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, place: str) -> None:
        """See :class:`Objective`."""
        if sequence_length < SHORTEST:
            raise UserError(f"training.sequence_length: found {sequence_length}, allowed: {SHORTEST} or more")
        if tokenizer.pad_token_id is None:
            raise UserError(f"model.path: {place} has no tokenizer with a padding token; classification needs one")

    def settings(self, directory: Path | str) -> dict[str, Any]:
        """See :class:`Objective`: the labels by number."""
        labels = read_manifest(directory)["labels"]
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            **self.head_settings(),
        }

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, cross_entropy: object = None) -> torch.Tensor:
        """``logits`` [batch, labels] and ``targets`` [batch, 1] to the summed cross-entropy in nats."""
        return functional.cross_entropy(logits.float(), targets[:, 0], ignore_index=IGNORED, reduction="sum")

    def training_loss(self, logits: torch.Tensor, targets: torch.Tensor, cross_entropy: object = None) -> torch.Tensor:
        """See :class:`Objective`; weights are those of the training texts, which :meth:`samples` has counted. As in
        torch, of a smoothed target each label's share has that label's weight."""
        weights = None if self._weights is None else self._weights.to(logits.device)
        if self.own_loss is not None:
            return self.own_loss.summed(*self.choices(logits, targets), weights)
        return functional.cross_entropy(
            logits.float(), targets[:, 0], weights, ignore_index=IGNORED, reduction="sum",
            label_smoothing=self.section.label_smoothing,
        )  # fmt: skip

    def choices(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Objective`; a text is a row."""
        return logits, targets[:, 0]

    def measure(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """How often each label [labels] was given rightly, was given, and stands in the texts, end to end."""
        targets = batch["targets"][:, 0]
        counted = targets != IGNORED
        found, targets, labels = logits.argmax(dim=1)[counted], targets[counted], logits.size(1)
        counts = [torch.bincount(those, minlength=labels) for those in (targets[found == targets], found, targets)]
        return torch.cat(counts).double()

    def figures(self, sums: Sequence[float], rows: float) -> dict[str, float]:
        """Accuracy, and the mean F1 of the labels that stand in the texts or among the answers."""
        labels = len(sums) // 3
        right, given, there = sums[:labels], sums[labels : 2 * labels], sums[2 * labels :]
        each = [2 * r / (g + t) for r, g, t in zip(right, given, there, strict=True) if g + t]
        return {"accuracy": sum(right) / max(1.0, rows), "macro_f1": sum(each) / max(1, len(each))}
