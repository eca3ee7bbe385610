"""From a tagger's logits to the tags of a sentence, and how likely each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raylm.data.samples.tag_schemes import OUTSIDE, KnownScheme, follows, scheme_of
from raylm.models.chains import Chain, Follows, read_chain
from raylm.models.encoders import label_names
from raylm.tasks.classification.texts import softmax

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Decoder:
    """How a tagger's logits are read.

    Attributes:
        labels: the tags, in the order of the logits.
        scheme: what they say of spans.
        chain: scores of neighbouring tags, without those that the scheme does not allow; None of a model without.
    """

    labels: Sequence[str]
    scheme: KnownScheme
    chain: Chain | None = None

    @classmethod
    def of(cls, source: str, config: PretrainedConfig) -> Decoder:
        """That of the model in a directory.

        Raises:
            UserError: its weights lack the chain that its configuration names.
        """
        labels, chain = label_names(config), read_chain(source, config)
        scheme = model_scheme(config)
        return cls(labels, scheme, chain and chain.within(followers(labels, scheme)))

    def tags(self, logits: np.ndarray) -> list[str]:
        """The tags of a sentence from its ``logits`` [words, tags]."""
        best = logits.argmax(axis=1).tolist() if self.chain is None else self.chain.path(logits)
        return [self.labels[number] for number in best]

    def scored(self, logits: np.ndarray) -> tuple[list[str], list[float]]:
        """The tags of a sentence, and the probability of each."""
        shares = softmax(logits) if self.chain is None else self.chain.probabilities(logits)
        tags = self.tags(logits)
        numbers = {label: number for number, label in enumerate(self.labels)}
        return tags, [float(row[numbers[tag]]) for row, tag in zip(shares, tags, strict=True)]


def model_scheme(config: PretrainedConfig) -> KnownScheme:
    """What a tagger's labels say of spans: its configuration's ``tagging_scheme``, or what they look like."""
    found = getattr(config, "tagging_scheme", None)
    return found if found in ("bio", "bioes", "none") else scheme_of(label_names(config))


def followers(labels: Sequence[str], scheme: KnownScheme, *, whole: bool = True) -> Follows:
    """Which tag may stand behind which, by number.

    Args:
        whole: None stands for the ends of a sentence; else for those of a part of one, where any tag may stand.
    """

    def allowed(one: int | None, other: int | None) -> bool:
        if not whole and (one is None or other is None):
            return True
        before, behind = (OUTSIDE if number is None else labels[number] for number in (one, other))
        return follows(before, behind, scheme)

    return allowed
