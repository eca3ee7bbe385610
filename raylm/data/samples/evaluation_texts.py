"""The ``data`` section of ``evaluate`` and ``compress`` to the texts that a model is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raylm.config.data import DataSection
from raylm.data.prepare.stage import prepared_directory
from raylm.data.sources.corpus import source_documents
from raylm.data.sources.documents import Split, read_documents
from raylm.data.sources.segments import open_sources


def evaluation_texts(data: DataSection, split: Split = "validation") -> Iterator[str]:
    """The texts that a model is evaluated on; their bytes are those that the manifest of a prepared set counts.

    Of a prepared directory it is the split. Of raw sources the training texts are those of ``data.train``; the
    validation texts those of ``data.validation`` where it is given, else all of ``data.train`` too: there is no
    holding out where nothing is trained.

    Raises:
        UserError: bad input; names the file and the place.
    """
    if (directory := prepared_directory(data)) is not None:
        documents = read_documents(directory, split)
    else:
        use_validation = split == "validation" and bool(data.validation_sources)
        names: list[Any] = data.validation_sources if use_validation else data.train_sections
        sources = open_sources(data, names, "data.validation" if use_validation else "data.train")
        documents = (document for source in sources for document in source_documents(source, data))
    # Blank documents are no documents, as in ``prepare``.
    return (document.text for document in documents if document.text.strip())
