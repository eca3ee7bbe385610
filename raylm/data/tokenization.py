"""Document files to token files on Ray Data: one task a file, so that the output depends on no worker count.

A task reads its Parquet file a row group at a time and writes ``<split>/tokens-00000.bin`` and its index under
temporary names, renamed when whole; what it returns goes into the manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raylm.data.documents import Kind, Split, flush_to_disk, read_row_groups
from raylm.errors import RunFailure
from raylm.progress import ProgressBar


@dataclass(frozen=True)
class Layout:
    """What all token files of a set share: the tokenizer's ids, the dtype's name, and what a document is."""

    kind: Kind
    dtype: str
    eos_id: int
    unknown_id: int | None


def tokenize_documents(
    directory: Path, files: list[tuple[Split, Path]], layout: Layout, *, cpus: int | None
) -> list[dict[str, Any]]:
    """Tokenize every file of ``directory / documents`` on the Ray that is running.

    Args:
        directory: the set that is being prepared; shared by all nodes.
        files: (split, document file), in their order within a split.
        layout: see :class:`Layout`.
        cpus: most tasks at a time, each on one CPU; None takes all that there are.

    Returns:
        one manifest entry a file, in the order of ``files``, each with its split.

    Raises:
        RunFailure: a task failed; names its error.
    """
    import ray.data

    numbers = {"train": 0, "validation": 0}
    jobs = []
    for split, path in files:
        jobs.append({"split": split, "number": numbers[split], "path": str(path)})
        numbers[split] += 1
    # Our bar stands in for Ray Data's own; what it has to say about its execution goes to its log file only.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map_batches(
        tokenize_file,
        batch_size=1,
        batch_format="numpy",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=cpus),
        fn_kwargs={"directory": str(directory), "layout": asdict(layout)},
    )
    entries = []
    total = sum(path.stat().st_size for _, path in files)
    with ProgressBar("tokenizing", total, "bytes") as bar:
        done = 0
        try:
            for row in dataset.iter_rows():
                entries.append(json.loads(row["entry"]))
                done += Path(directory, entries[-1]["text"]["path"]).stat().st_size
                bar.update(done)
        except ray.exceptions.RayError as error:
            raise RunFailure(f"tokenizing failed: {_first_cause(error)}") from error
    # Tasks end in any order.
    places = {(job["split"], job["number"]): place for place, job in enumerate(jobs)}
    return sorted(entries, key=lambda entry: places[entry["split"], entry["number"]])


def _first_cause(error: Exception) -> str:
    """One line on what went wrong first: Ray keeps the task's own exception only in the text of the chain."""
    own, separator, _ = str(error).partition("\n\nThe above exception was the direct cause")
    lines = own.strip().splitlines() or [type(error).__name__]
    return lines[-1 if separator else 0]


def tokenize_file(batch: dict[str, np.ndarray], directory: str, layout: dict[str, Any]) -> dict[str, list[str]]:
    """The Ray Data task: a batch of one job to a batch of one manifest entry, as JSON."""
    # Ray counts this task as one CPU.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    split, number, path = str(batch["split"][0]), int(batch["number"][0]), Path(str(batch["path"][0]))
    entry = write_token_file(Path(directory), split, number, path, Layout(**layout))
    return {"entry": [json.dumps(entry)]}


def write_token_file(directory: Path, split: str, number: int, source: Path, layout: Layout) -> dict[str, Any]:
    """Tokenize one document file into one token file and its index; returns its manifest entry."""
    from raylm.data.encoding import DocumentEncoder, PairEncoder

    tokenizer = directory / "tokenizer"
    is_pairs = layout.kind == "pairs"
    encoder = PairEncoder(tokenizer) if is_pairs else DocumentEncoder(tokenizer, layout.eos_id)
    folder = directory / split
    folder.mkdir(parents=True, exist_ok=True)
    tokens_path, index_path = folder / f"tokens-{number:05d}.bin", folder / f"index-{number:05d}.npy"
    # A task that Ray runs again must not write into the file of one that it took for dead.
    partial = folder / f".{tokens_path.name}.{os.getpid()}.partial"
    digest = hashlib.sha256()
    position = unknown = size = 0
    rows: list[np.ndarray] = []
    with partial.open("wb") as stream:

        def write(ids: np.ndarray) -> None:
            nonlocal position
            content = ids.astype(layout.dtype).tobytes()
            stream.write(content)
            digest.update(content)
            position += len(ids)

        if number == 0 and not is_pairs:
            # The stream begins as every document does: after an end-of-text token.
            write(np.array([layout.eos_id]))
        for documents in read_row_groups(source):
            tokens, columns = encoder.encode(documents)
            lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
            starts = position + np.cumsum(lengths) - lengths
            rows.append(np.concatenate([starts[:, None], columns], axis=1))
            joined = np.concatenate(tokens)
            write(joined)
            size += sum(document.byte_count for document in documents)
            if layout.unknown_id is not None:
                unknown += int(np.count_nonzero(joined == layout.unknown_id))
    flush_to_disk(partial)
    partial.replace(tokens_path)
    index = np.concatenate(rows)
    index_partial = partial.with_name(f".{index_path.name}.{os.getpid()}.partial")
    with index_partial.open("wb") as stream:
        np.save(stream, index)
    flush_to_disk(index_partial)
    index_partial.replace(index_path)
    return {
        "split": split,
        "number": number,
        "path": f"{split}/{tokens_path.name}",
        "tokens": position,
        "sha256": digest.hexdigest(),
        "documents": len(index),
        "bytes": size,
        "unknown_tokens": unknown,
        "index": {"path": f"{split}/{index_path.name}", "sha256": hashlib.sha256(index_path.read_bytes()).hexdigest()},
        "text": {"path": f"documents/{source.name}", "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
    }
