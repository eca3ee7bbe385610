"""The tagging objective: say of each word what it is.

Devlin et al. 2019, "BERT", section 5.3: a linear layer over the last hidden state of a word's first sub-word gives a
logit a tag, and the loss is the cross-entropy with the right one. The other sub-words have no target. With a chain
(:mod:`raylm.models.chains`) the loss is that of the sentence's sequence of tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from raylm.config.data import DataSection
from raylm.config.model import ObjectiveSection
from raylm.data.samples.tag_schemes import KnownScheme
from raylm.data.samples.tagged_sets import KIND, TaggedInput, TaggedSamples
from raylm.data.samples.token_samples import IGNORED, Samples
from raylm.data.samples.word_windows import check_word_tokenizer
from raylm.data.sources.documents import Split
from raylm.data.tokens.shards import read_manifest
from raylm.errors import UserError
from raylm.models.chains import has_chain
from raylm.models.encoders import label_names
from raylm.models.heads import TAGGER, Head
from raylm.models.own_heads import check_same_head
from raylm.tasks.objective import Batch, EncoderObjective
from raylm.tasks.rows import RowReader
from raylm.tasks.tagging.decoding import followers, model_scheme
from raylm.tasks.tagging.scoring import Counts, count

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHORTEST = 4


def _read(data: DataSection, config: PretrainedConfig, section: ObjectiveSection) -> TaggedInput:
    if has_chain(config) and section.head != "crf":
        raise UserError(f"objective.head: found {section.head}, allowed: crf, as the model at model.path has one")
    check_same_head(config, TAGGER, section)
    if not TAGGER.is_named_in(config):
        return TaggedInput(data, section.scheme)
    # A tagger that is trained further keeps its tags, and what they say of spans unless the file says otherwise.
    scheme = model_scheme(config) if section.scheme == "auto" else section.scheme
    return TaggedInput(data, scheme, label_names(config))


class TaggingObjective(EncoderObjective):
    """Cross-entropy of the tags; a target a word.

    Attributes:
        labels, scheme: of the data, once its samples were opened.
    """

    name: ClassVar[str] = "tagging"
    head: Head = TAGGER
    rows: ClassVar[RowReader | None] = RowReader(KIND, "tagged sentences", _read)
    measures: ClassVar[tuple[str, ...]] = ("token_accuracy", "span_f1")
    takes_loss: ClassVar[bool] = True
    plain_heads: ClassVar[tuple[str, ...]] = ("linear", "crf")
    choices_vary: ClassVar[bool] = True

    labels: Sequence[str] = ()
    scheme: KnownScheme = "none"

    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """See :class:`Objective`; the directory is one of tagged sentences, whose windows have their length already."""
        found = TaggedSamples(directory, split, seed)
        self.labels, self.scheme = found.labels, found.scheme
        return found

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, place: str) -> None:
        """See :class:`Objective`."""
        least = SHORTEST + tokenizer.num_special_tokens_to_add(pair=False)
        if sequence_length < least:
            raise UserError(f"training.sequence_length: found {sequence_length}, allowed: {least} or more")
        check_word_tokenizer(tokenizer, place)

    def settings(self, directory: Path | str) -> dict[str, Any]:
        """See :class:`Objective`: the tags by number, and what they say of spans."""
        manifest = read_manifest(directory)
        return {
            "id2label": dict(enumerate(manifest["labels"])),
            "label2id": {label: number for number, label in enumerate(manifest["labels"])},
            "tagging_scheme": manifest["scheme"],
            "tagging_head": self.section.head if self.head.own is None else "linear",
            **self.head_settings(),
        }

    def example(self, sequence_length: int) -> Batch:
        """See :class:`Objective`; each token has a target."""
        return {**super().example(sequence_length), "targets": torch.zeros((1, sequence_length), dtype=torch.long)}

    def summed_loss(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """See :class:`Objective`."""
        return self._loss(model, self.logits(model, batch), batch["targets"])

    def scored(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Objective`."""
        logits = self.logits(model, batch)
        found = self._best(model, logits, batch["targets"]) if has_chain(model.config) else logits
        return self._loss(model, logits, batch["targets"]), self.measure(found, batch)

    def _loss(self, model: PreTrainedModel, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of ``logits`` [batch, time, tags], nats."""
        return model.crf(logits, targets, IGNORED) if has_chain(model.config) else self.loss_of(model)(logits, targets)

    def _best(self, model: PreTrainedModel, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """1 at the tags of the best sequence of a model with a chain, else 0; in the shape of ``logits``."""
        # A window may begin and end within a span.
        chain = model.crf().within(followers(self.labels, self.scheme, whole=False))
        found = torch.zeros_like(logits)
        for row, words in enumerate(targets != IGNORED):
            places = words.nonzero()[:, 0]
            if len(places):
                found[row, places, chain.path(logits[row, places].detach().float().cpu().numpy())] = 1
        return found

    def measure(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Words, right tags, and spans: right, found, and there; a span that a window cuts counts in its parts."""
        targets = batch["targets"].cpu().numpy()
        found = logits.argmax(dim=-1).cpu().numpy()
        total = Counts()
        for said, expected in zip(found, targets, strict=True):
            words = expected != IGNORED
            total += count(self._names(expected[words]), self._names(said[words]), self.scheme)
        return torch.tensor(total.numbers(), dtype=torch.float64, device=logits.device)

    def figures(self, sums: Sequence[float], rows: float) -> dict[str, float]:
        """See :class:`Objective`: token accuracy and, where tags say where spans are, their micro-F1."""
        total = Counts(*(int(value) for value in sums))
        return {"token_accuracy": total.accuracy} | ({} if self.scheme == "none" else {"span_f1": total.f1})

    def _names(self, numbers: np.ndarray) -> list[str]:
        return [self.labels[number] for number in numbers.tolist()]
