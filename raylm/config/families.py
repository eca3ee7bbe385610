"""The model families by name, and the encoders that exist: what a YAML file has to know of each.

What a family is made of is in ``raylm/models/families/NAME.py``. Another family is a line here and that file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyTraits:
    """What is particular to a family of models.

    Attributes:
        tasks: that it can be trained on from nothing; the first is its default.
        counted: its models are counted from the data in one pass, not trained by gradient.
        own: transformers does not have it, raylm does.
    """

    tasks: tuple[str, ...]
    counted: bool = False
    own: bool = False


# By transformers' model type.
FAMILIES: dict[str, FamilyTraits] = {
    "gpt2": FamilyTraits(("causal",)),
    "llama": FamilyTraits(("causal",)),
    "bert": FamilyTraits(("masked",)),
    "t5": FamilyTraits(("span", "sequence_to_sequence")),
    "ngram": FamilyTraits(("causal",), counted=True, own=True),
}


def is_counted(model_type: str | None) -> bool:
    """Whether models of transformers' ``model_type`` are counted."""
    return model_type in FAMILIES and FAMILIES[model_type].counted


@dataclass(frozen=True)
class EncoderTraits:
    """What is particular to a type of encoder.

    Attributes:
        counts_behind_padding: whether the first token's position is the padding token's id + 1, so that fewer
            positions are left for a text than the configuration names.
    """

    counts_behind_padding: bool = False


# Model types of encoders that exist.
ENCODERS: dict[str, EncoderTraits] = {
    "bert": EncoderTraits(),
    "roberta": EncoderTraits(counts_behind_padding=True),
    "xlm-roberta": EncoderTraits(counts_behind_padding=True),
    "distilbert": EncoderTraits(),
    "electra": EncoderTraits(),
    "albert": EncoderTraits(),
    "camembert": EncoderTraits(counts_behind_padding=True),
    "mpnet": EncoderTraits(counts_behind_padding=True),
    "deberta-v2": EncoderTraits(),
}
