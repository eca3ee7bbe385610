"""Samples as flat arrays on disk: how sets of questions, labelled texts or tagged sentences are written and verified.

In: the arrays of each split. Out: a directory with ``tokenizer/``, ``<split>-<name>.npy`` files that are memory-mapped,
and ``manifest.json`` with their checksums, written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.run_directory import write_atomically
from raylm.data.samples.length_groups import LengthGroups
from raylm.data.samples.permutation import permute
from raylm.data.sources.documents import Split
from raylm.data.sources.segments import MANIFEST
from raylm.data.tokens.shards import FORMAT_VERSION, file_hash, read_manifest
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS: tuple[Split, ...] = ("train", "validation")


def write_set(
    directory: Path,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    make_split: Callable[[Split], tuple[dict[str, np.ndarray], dict[str, int]]],
    **settings: Any,
) -> dict[str, Any]:
    """Write the directory anew; returns the manifest.

    Args:
        make_split: from a split to its arrays by name, and the counts that the manifest is to have of it.
        settings: what else stands in the manifest.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tokenizer.save_pretrained(directory / "tokenizer")
    splits = {}
    for split in SPLITS:
        arrays, counts = make_split(split)
        files = []
        for name, array in arrays.items():
            path = directory / f"{split}-{name}.npy"
            np.save(path, array)
            files.append({"path": path.name, "sha256": file_hash(path)})
        splits[split] = {**counts, "files": files}
    manifest = {
        "version": FORMAT_VERSION,
        "kind": kind,
        **settings,
        "pad_id": tokenizer.pad_token_id,
        "splits": splits,
    }
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def verify_set(directory: Path, kind: str, objective: str) -> dict[str, Any]:
    """Compare every file with its checksum; returns the manifest.

    Raises:
        UserError: the directory holds another kind than the ``objective`` needs, or a file is missing or differs.
    """
    manifest = read_manifest(directory)
    if manifest["kind"] != kind:
        raise UserError(f"{directory}: found {manifest['kind']}, allowed with objective {objective}: {kind}")
    for split in manifest["splits"].values():
        for entry in split["files"]:
            path = directory / entry["path"]
            if not path.is_file() or file_hash(path) != entry["sha256"]:
                raise UserError(f"{path}: missing or damaged; remove {directory}, and it is prepared again")
    return manifest


def map_arrays(directory: Path, split: Split, names: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    """The arrays of a split, memory-mapped."""
    return tuple(np.load(directory / f"{split}-{name}.npy", mmap_mode="r") for name in names)


class ArraySamples:
    """Samples out of a directory of arrays; see :class:`raylm.data.samples.token_samples.Samples`.

    Args:
        directory: what :func:`write_set` wrote.
        split: train (shuffled) or validation (in order).
        seed: decides the order.
        names: of the arrays; the last one has a row for each sample.

    Attributes:
        count: samples in one epoch.
        pad_id: of the tokenizer.
        length: most tokens of a sample.
    """

    def __init__(self, directory: Path | str, split: Split, seed: int, names: tuple[str, ...]) -> None:
        manifest = read_manifest(Path(directory))
        self.arrays = map_arrays(Path(directory), split, names)
        self.count = len(self.arrays[-1])
        self.pad_id, self.length = manifest["pad_id"], manifest["sequence_length"]
        self._seed, self._shuffle = seed, split == "train"
        self._groups: LengthGroups | None = None

    def in_order(self) -> None:
        """From now on give the samples in the order of the rows."""
        self._shuffle = False

    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [count]: those that the padding of a batch follows from."""
        return np.asarray(self.arrays[-1][:, 1])

    def group_by_length(self, batch_size: int) -> None:
        """From now on give samples of about the same length in each batch of this size; see :class:`LengthGroups`."""
        self._groups = LengthGroups(self.lengths(), batch_size, self._seed)

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """The numbers of the rows of the samples with these global numbers, int64 [n]."""
        if self._shuffle and self._groups is not None:
            return self._groups.numbers(indices)
        epochs, places = np.divmod(np.asarray(indices, dtype=np.int64), self.count)
        return permute(places, epochs, self.count, self._seed) if self._shuffle else places

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows of the samples with these global numbers, int64 [n]."""
        return np.asarray(self.arrays[-1][self.numbers(indices)])
