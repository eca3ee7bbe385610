"""The masked objective: predict tokens that were hidden from a bidirectional encoder.

Devlin et al. 2019, "BERT", section 3.1 and appendix A.1: of the tokens, 15% are chosen; of these 80% become the mask
token, 10% a random token, and 10% stay. Nothing else counts. A sample is a window of the packed text between the
tokenizer's class and separator tokens. There is no next-sentence task (Liu et al. 2019, "RoBERTa", section 4.2), and
each epoch draws other masks. What is drawn is a function of (seed, sample), so that neither the number of workers nor
a restart changes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from raylm.data.loading import load_tokenizer
from raylm.data.samples.noise import choose, draw
from raylm.data.samples.token_samples import IGNORED, PackedSamples, Samples
from raylm.data.sources.documents import Split
from raylm.data.tokens.shards import TokenShards
from raylm.errors import UserError
from raylm.models.heads import MASKED, Head
from raylm.tasks.base import GENERATION, Task
from raylm.tasks.objective import Batch, Objective, input_tokens, need_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
_CHOICE, _TREATMENT, _REPLACEMENT = 0, 1, 2
# The class and the separator token around a window.
AROUND = 2


class MaskedObjective(Objective):
    """Cross-entropy of the tokens that were chosen."""

    name: ClassVar[str] = "masked"
    head: ClassVar[Head] = MASKED
    predicts_tokens: ClassVar[bool] = True
    smooths_labels: ClassVar[bool] = True

    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """See :class:`Objective`."""
        tokenizer = load_tokenizer(Path(directory) / "tokenizer", "data.train")
        self.check_tokenizer(tokenizer, sequence_length, str(directory))
        return MaskedSamples(directory, split, sequence_length, seed, tokenizer, self.section.noise_fraction)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, place: str) -> None:
        """See :class:`Objective`."""
        if sequence_length <= AROUND:
            raise UserError(f"training.sequence_length: found {sequence_length}, allowed: more than {AROUND}")
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"objective.type: masked needs a tokenizer with a mask token, and that of {place} has none; "
                "raylm prepare with tokenizer.mask_token=true makes one"
            )

    def tokens(self, batch: Batch) -> torch.Tensor:
        """All input tokens: predicting a few of them still reads every one."""
        return input_tokens(batch)


class MaskedSamples:
    """Windows of text with tokens hidden; see :class:`raylm.data.samples.token_samples.Samples`.

    Args:
        directory: a prepared directory of documents.
        split: train or validation.
        sequence_length: tokens of a sample, those around the window included.
        seed: decides the order and the masks.
        tokenizer: that of ``directory``.
        fraction: share of a window's tokens that is chosen, at least one token.
    """

    def __init__(
        self,
        directory: Path | str,
        split: Split,
        sequence_length: int,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        fraction: float,
    ) -> None:
        shards = TokenShards(directory, split)
        need_documents(shards.kind, "masked", directory)
        if not shards.document_count:
            raise UserError(f"{directory} has no {split} documents; prepare it with a data.{split} source")
        width = sequence_length - AROUND
        self._windows = PackedSamples(shards, width, seed, shuffle=split == "train")
        self.count = self._windows.count
        # Validation has masks of its own, the same at every evaluation.
        self._seed = seed if split == "train" else ~seed
        self._chosen = max(1, round(fraction * width))
        special = set(tokenizer.all_special_ids)
        self._ordinary = np.array([i for i in range(len(tokenizer)) if i not in special], dtype=np.int64)
        self._mask = tokenizer.mask_token_id
        first = (tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        last = (tokenizer.sep_token_id, tokenizer.eos_token_id)
        self._first, self._last = (next(i for i in ids if i is not None) for ids in (first, last))

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """``input_ids`` and ``targets``, int64 [n, sequence_length]; equally many targets in each row."""
        indices = np.asarray(indices, dtype=np.int64)
        tokens = self._windows.windows(indices)
        width = tokens.shape[1]
        chosen = choose(draw(self._seed, indices, width, _CHOICE), self._chosen)
        treatment = draw(self._seed, indices, width, _TREATMENT) / 2.0**64
        replacement = self._ordinary[
            (draw(self._seed, indices, width, _REPLACEMENT) % np.uint64(len(self._ordinary))).astype(np.int64)
        ]
        shown = np.where(
            treatment < MASKED_SHARE, self._mask, np.where(treatment < MASKED_SHARE + RANDOM_SHARE, replacement, tokens)
        )
        inputs = np.pad(np.where(chosen, shown, tokens), ((0, 0), (1, 1)))
        inputs[:, 0], inputs[:, -1] = self._first, self._last
        targets = np.pad(np.where(chosen, tokens, IGNORED), ((0, 0), (1, 1)), constant_values=IGNORED)
        return {"input_ids": inputs, "targets": targets}


TASK = Task(name="masked", head=MASKED, objective=MaskedObjective, service=GENERATION)
