"""Section about reading an answer out of a context: ``evaluation.reading`` and ``serving.reading``."""

from __future__ import annotations

from pydantic import Field, model_validator

from raylm.config.base import LARGEST_COUNT, Count, CountFromZero, Section


class ReadingSection(Section):
    """How an extractive reader looks for the answer."""

    sequence_length: int = Field(default=384, ge=16, le=LARGEST_COUNT)
    """Most tokens of a window: the question, a part of the context, and the tokenizer's special tokens."""
    overlap: CountFromZero = 128
    """Tokens that two windows of a long context share."""
    max_answer_tokens: Count = 30
    """Most tokens of an answer."""
    null_threshold: float | None = Field(default=None, ge=-1e30, le=1e30)
    """Give no answer if the score (a logit) of no answer exceeds the best answer's score by more than this. For readers
    trained on questions without answers (SQuAD 2); start with 0. By default a reader always gives an answer."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> ReadingSection:
        if self.overlap > self.sequence_length // 3:
            raise ValueError(
                f"overlap: found {self.overlap}, allowed: at most a third of sequence_length "
                f"({self.sequence_length // 3}), as the question takes up to a half"
            )
        return self
