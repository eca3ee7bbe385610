"""Datasets of the Hugging Face hub, or in its layout on disk, through the ``datasets`` library.

A name is ``owner/name``, ``owner/name:configuration``, or a directory: one written by ``Dataset.save_to_disk`` or one
of data files that ``load_dataset`` understands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylm.config.data import DataSection
from raylm.data.sources.blocks import SMALLEST_BLOCK, Segment
from raylm.data.sources.rows import Rows
from raylm.errors import UserError, first_line

ROWS_A_SEGMENT = 10_000
ROWS_A_BATCH = 256


def hub_segments(name: str, data: DataSection, key: str) -> list[Segment]:
    """Ranges of rows of ``data.hub_split``; of a streamed dataset, one a file of it.

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
    dataset = _load(name, data, key)
    if data.hub_streaming:
        # How large its files are is not known; one task is to read few of them.
        return [Segment(name, "hub", shard, shard + 1, SMALLEST_BLOCK) for shard in range(dataset.num_shards)]
    count = len(dataset)
    size = max(1, int(dataset.data.nbytes) // max(1, count))
    stamp = getattr(dataset, "_fingerprint", "")
    ranges = [(start, min(count, start + ROWS_A_SEGMENT)) for start in range(0, count, ROWS_A_SEGMENT)]
    return [Segment(name, "hub", start, stop, (stop - start) * size, stamp) for start, stop in ranges]


def hub_rows(segment: Segment, data: DataSection) -> Rows:
    """(number from 1, row) of a segment."""
    dataset = _load(segment.path, data, "data.train")
    with _loading(segment.path, "data.train"):
        if data.hub_streaming:
            rows = dataset.shard(num_shards=dataset.num_shards, index=segment.start)
            yield from enumerate(rows, start=1)
            return
        number = segment.start
        for batch in dataset.select(range(segment.start, segment.stop or len(dataset))).iter(ROWS_A_BATCH):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield number, dict(zip(batch, values, strict=True))


@contextmanager
def _loading(source: str, key: str) -> Iterator[None]:
    """Refuse what ``datasets`` cannot read; a stream finds that out when its rows are read."""
    import datasets

    try:
        yield
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error)
        raise UserError(f"{key}: {source} cannot be loaded by datasets: {reason}") from None


def _load(source: str, data: DataSection, key: str) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    split = data.hub_split
    name, _, configuration = source.partition(":")
    directory = Path(name).expanduser()
    saved = any((directory / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    with _loading(source, key):
        if saved:
            found = datasets.load_from_disk(str(directory))
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise UserError(f"data.hub_split: found '{split}', allowed for {name}: {', '.join(found)}")
                found = found[split]
            return found.to_iterable_dataset() if data.hub_streaming else found
        path = str(directory) if directory.is_dir() else name
        return datasets.load_dataset(path, configuration or None, split=split, streaming=data.hub_streaming)
