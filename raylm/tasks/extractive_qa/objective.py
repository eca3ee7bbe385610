"""The extractive question answering objective: point at the first and the last token of the answer.

Devlin et al. 2019, "BERT", sections 4.2 and 4.3: the encoder reads question and context together; two dot products a
token score it as the answer's first and last one; the loss is the mean of the two cross-entropies. A window without
the answer, and a question without one (SQuAD 2), point at the class token. Only that and the tokens of the context
can be pointed at: the others' logits are a large negative constant, here and when questions are answered.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional

from raylm.config.data import DataSection
from raylm.config.model import ObjectiveSection
from raylm.data.samples.question_sets import KIND, QuestionInput, QuestionSamples
from raylm.data.samples.token_samples import IGNORED, Samples
from raylm.data.samples.windows import check_reader_tokenizer
from raylm.data.sources.documents import Split
from raylm.errors import UserError
from raylm.models.heads import READER, Head
from raylm.tasks.objective import Batch, EncoderObjective
from raylm.tasks.rows import RowReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Logit of a token that cannot be pointed at; finite, so that no sum of it is not a number.
EXCLUDED = -1e4
SHORTEST = 16


def _read(data: DataSection, config: PretrainedConfig, section: ObjectiveSection) -> QuestionInput:
    return QuestionInput(data, section.overlap)


class ExtractiveQaObjective(EncoderObjective):
    """Cross-entropy of the answer's first and last token; two targets a window."""

    name: ClassVar[str] = "extractive_qa"
    head: ClassVar[Head] = READER
    rows: ClassVar[RowReader | None] = RowReader(KIND, "questions", _read)
    measures: ClassVar[tuple[str, ...]] = ("span_exact", "span_f1")
    targets_each: ClassVar[int] = 2
    smooths_labels: ClassVar[bool] = True
    choices_vary: ClassVar[bool] = True

    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """See :class:`Objective`; the directory is one of questions, whose windows have their length already."""
        return QuestionSamples(directory, split, seed)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, place: str) -> None:
        """See :class:`Objective`."""
        if sequence_length < SHORTEST:
            raise UserError(f"training.sequence_length: found {sequence_length}, allowed: {SHORTEST} or more")
        if self.section.overlap > sequence_length // 3:
            raise UserError(
                f"objective.overlap: found {self.section.overlap}, allowed: at most a third of "
                f"training.sequence_length ({sequence_length // 3})"
            )
        check_reader_tokenizer(tokenizer, place)

    def example(self, sequence_length: int) -> Batch:
        """See :class:`Objective`."""
        return {
            **super().example(sequence_length),
            "candidates": torch.ones((1, sequence_length), dtype=torch.bool),
        }

    def logits(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """Scores [batch, time, 2] of each token as the answer's first and last."""
        output = model(**self.inputs(batch, model.config))
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
        return logits.masked_fill(~batch["candidates"][:, :, None], EXCLUDED)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, cross_entropy: object = None) -> torch.Tensor:
        """``logits`` [batch, time, 2] and ``targets`` [batch, 2] to the summed cross-entropy in nats."""
        return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")

    def training_loss(self, logits: torch.Tensor, targets: torch.Tensor, cross_entropy: object = None) -> torch.Tensor:
        """See :class:`Objective`; what is spread goes to the tokens that can be pointed at."""
        smoothing = self.section.label_smoothing
        plain = self.loss(logits, targets)
        if not smoothing:
            return plain
        candidates = logits > EXCLUDED / 2
        each = -logits.float().log_softmax(dim=1).masked_fill(~candidates, 0.0).sum(dim=1) / candidates.sum(dim=1)
        return (1 - smoothing) * plain + smoothing * each.masked_fill(targets == IGNORED, 0.0).sum()

    def choices(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Objective`; the first and the last token of a window's answer are rows."""
        return logits.transpose(1, 2).flatten(0, 1), targets.flatten()

    def measure(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Windows whose span is right, and the F1 of tokens between span and target, each averaged over windows later.

        The likeliest first and last token are taken on their own; ``raylm evaluate`` searches for the best pair, joins
        the windows of a question, and compares texts.
        """
        targets = batch["targets"]
        counted = targets[:, 0] != IGNORED
        found = logits.argmax(dim=1)
        exact = (found == targets).all(dim=1)
        both = torch.minimum(found, targets)[:, 1] - torch.maximum(found, targets)[:, 0] + 1
        lengths = (found[:, 1] - found[:, 0] + 1).clamp(min=0) + targets[:, 1] - targets[:, 0] + 1
        overlap = torch.where(found[:, 1] >= found[:, 0], both.clamp(min=0), 0)
        return torch.stack([(exact & counted).sum().double(), (2.0 * overlap / lengths * counted).sum().double()])
