"""The causal objective: predict each next token.

A batch is ``input_ids`` and ``targets``, both ``(batch, time)``; ``targets[b, t]`` is the token that follows
``input_ids[b, t]``, or -100 where nothing is to be predicted (padding, a prompt). Right padding needs no attention
mask, as causal attention never looks at it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from raylm.data.documents import Split
from raylm.data.samples import Samples, open_samples
from raylm.objectives.base import Objective


class CausalObjective(Objective):
    """Cross-entropy of each next token."""

    name: ClassVar[str] = "causal"
    head: ClassVar[str] = "causal"
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}

    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """See :class:`Objective`; documents are packed, of pairs the answers count (``objective.answer_only``)."""
        return open_samples(directory, split, sequence_length, seed, self.section.answer_only)
