"""The model families by name, and the encoders that exist: what a YAML file has to know of each.

What a family is made of is in ``raylm/models/families/NAME.py``. Another family is a line here and that file.
"""

from __future__ import annotations

from dataclasses import dataclass

# Family (transformers' model type) -> the tasks that it can be trained on from nothing; the first is its default.
FAMILY_TASKS: dict[str, tuple[str, ...]] = {
    "gpt2": ("causal",),
    "llama": ("causal",),
    "bert": ("masked",),
    "t5": ("span",),
}


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
