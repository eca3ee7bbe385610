"""Datasets of the Hugging Face hub, or in its layout on disk, through the ``datasets`` library.

A name is ``owner/name``, ``owner/name:configuration``, or a directory: one written by ``Dataset.save_to_disk`` or one
of data files that ``load_dataset`` understands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylm.config.data import DataSection
from raylm.data.documents import Document
from raylm.data.readers import Rows, rows_to_documents
from raylm.errors import UserError


class HubSource:
    """One split of a dataset; loaded when it is first read, memory-mapped by ``datasets`` afterwards."""

    def __init__(self, name: str, data: DataSection, key: str) -> None:
        self.name, self._data, self._key = name, data, key
        self._dataset: Any = None

    def documents(self) -> Iterator[Document]:
        """The rows of ``data.hub_split``."""
        if self._dataset is None:
            self._dataset = self._load()

        def rows() -> Rows:
            for number, row in enumerate(self._dataset, start=1):
                yield f"{self.name}: row {number}", row

        return rows_to_documents(rows(), self._data.fields, self.name)

    def _load(self) -> Any:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        split = self._data.hub_split
        name, _, configuration = self.name.partition(":")
        directory = Path(name).expanduser()
        saved = any((directory / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
        try:
            if saved:
                found = datasets.load_from_disk(str(directory))
                if not isinstance(found, datasets.DatasetDict):
                    return found
                if split not in found:
                    raise UserError(f"data.hub_split: found '{split}', allowed for {name}: {', '.join(found)}")
                return found[split]
            source = str(directory) if directory.is_dir() else name
            return datasets.load_dataset(source, configuration or None, split=split)
        except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self._key}: {self.name} cannot be loaded by datasets: {reason}") from None
