"""Rows of a task's own: read from the ``data`` section, written as arrays, and read again as samples.

Running text goes through ``raylm prepare``; a row of such a task is an example as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raylm.config.data import DataSection
from raylm.config.model import ObjectiveSection
from raylm.data.samples.array_sets import verify_set
from raylm.data.sources.segments import MANIFEST
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Keys of ``data`` that are for running text.
FOR_TEXT = ("cleaning", "deduplication", "decontamination", "augmentation")


class Rows(Protocol):
    """All rows of a ``data`` section, read and checked."""

    def write(self, directory: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> dict[str, Any]:
        """Write the directory; returns the manifest."""


class RowsWithTexts(Rows, Protocol):
    """Rows that a new model can be trained on."""

    def texts(self, most_bytes: int) -> Iterator[str]:
        """Training texts for a new tokenizer, of larger sets about ``most_bytes``."""


@dataclass(frozen=True)
class RowReader:
    """How a task's rows are read.

    Attributes:
        kind: in the manifest of what is written.
        what: the rows, in words.
        read: from the ``data`` section, the model's configuration and the ``objective`` section to the rows; raises
            UserError where one is wrong.
        for_new_models: whether a new model can be trained on them, which has no configuration yet; then they are
            :class:`RowsWithTexts`.
    """

    kind: str
    what: str
    read: Callable[[DataSection, PretrainedConfig | None, ObjectiveSection], Rows]
    for_new_models: bool = False

    def check(self, data: DataSection, task: str) -> None:
        """Refuse what such rows do not go through.

        Raises:
            UserError: names the key.
        """
        for key in FOR_TEXT:
            if getattr(data, key) != DataSection.model_fields[key].default:
                raise UserError(f"data.{key}: leave it out, it is not for {self.what} (objective.type {task})")

    def written(self, directory: Path, task: str) -> bool:
        """Whether the ``directory`` holds rows already, whole.

        Raises:
            UserError: it holds something else, or a file is damaged.
        """
        if not (directory / MANIFEST).is_file():
            return False
        verify_set(directory, self.kind, task)
        return True
