"""Layout-free checkpoints: fp32 weights and optimizer moments under their Hugging Face names.

Each rank writes one safetensors file with the rectangles of the parameters that it owns, keyed ``kind/name@offset``
(the offset's numbers joined by commas); nothing is gathered. A load takes whatever parts it needs out of all files, so
that any layout can read what any other wrote. A checkpoint is written under a partial name in the background, renamed
when every rank is done, and only then named in ``LATEST``; one that is damaged is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from raylm.config.run_directory import write_atomically
from raylm.parallel.fragments import Fragment
from raylm.parallel.slicing import Offset, Shape, Slicing, boxes

LATEST, BEST, MANIFEST = "LATEST", "BEST", "checkpoint.json"
COMMIT_TIMEOUT_SECONDS = 600.0


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)


def _digest(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def is_whole(directory: Path) -> bool:
    """Whether every file of the checkpoint is there with the size and checksum in its manifest."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
            return False
    return True


def newest_whole(root: Path) -> tuple[Path | None, list[Path]]:
    """The newest undamaged checkpoint under ``root`` and the damaged ones that were passed over."""
    damaged = []
    for directory in sorted(root.glob("step-*"), reverse=True):
        if is_whole(directory):
            return directory, damaged
        damaged.append(directory)
    return None, damaged


class CheckpointWriter:
    """Writes checkpoints of one rank in the background; rank 0 also commits them and removes old ones.

    Args:
        root: ``<run>/checkpoints``, shared by all ranks.
        attempt: a token that is the same on all ranks and new at every start, so that leftovers never mix.
        keep: newest checkpoints to keep.
    """

    def __init__(self, root: Path, rank: int, world_size: int, attempt: str, keep: int) -> None:
        self.root, self.rank, self.world_size, self.attempt, self.keep = root, rank, world_size, attempt, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        root.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, fragments: list[Fragment], state: dict[str, Any], *, best: bool = False) -> None:
        """Copy ``fragments`` now and write them in the background; ``state`` (JSON) is rank 0's."""
        self.wait()
        tensors = {
            f"{kind}/{fragment.name}@{','.join(map(str, fragment.offset))}": _copy_of(tensor)
            for fragment in fragments
            for kind, tensor in fragment.tensors.items()
        }
        shapes = {fragment.name: list(fragment.shape) for fragment in fragments}
        self._thread = threading.Thread(target=self._write, args=(step, tensors, shapes, state, best), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint under way; raises what its writing raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, tensors: dict, shapes: dict, state: dict, best: bool) -> None:
        try:
            partial = self.root / f".{checkpoint_name(step)}.{self.attempt}.partial"
            partial.mkdir(exist_ok=True)
            path = partial / f"rank-{self.rank:05d}.safetensors"
            save_file(tensors, path)
            entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path), "shapes": shapes}
            write_atomically(partial / f"rank-{self.rank:05d}.json", json.dumps({path.name: entry}))
            if self.rank == 0:
                self._commit(step, partial, state, best)
        except BaseException as error:  # noqa: BLE001 - handed to the training thread, which raises it in wait()
            self._error = error

    def _commit(self, step: int, partial: Path, state: dict[str, Any], best: bool) -> None:
        deadline = time.monotonic() + COMMIT_TIMEOUT_SECONDS
        while len(parts := sorted(partial.glob("rank-*.json"))) < self.world_size:
            if time.monotonic() > deadline:
                raise TimeoutError(f"checkpoint {partial}: {len(parts)} of {self.world_size} ranks wrote their part")
            time.sleep(0.02)
        files: dict[str, Any] = {}
        shapes: dict[str, list[int]] = {}
        for part in parts:
            for name, entry in json.loads(part.read_text()).items():
                shapes |= entry.pop("shapes")
                files[name] = entry
            part.unlink()
        write_atomically(partial / MANIFEST, json.dumps({"files": files, "shapes": shapes, "state": state}))
        final = self.root / checkpoint_name(step)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        write_atomically(self.root / LATEST, final.name + "\n")
        if best:
            write_atomically(self.root / BEST, final.name + "\n")
        self._remove_old()

    def _remove_old(self) -> None:
        best = self.root / BEST
        kept = {best.read_text().strip()} if best.exists() else set()
        for directory in sorted(self.root.glob("step-*"))[: -self.keep]:
            if directory.name not in kept:
                shutil.rmtree(directory)

    def remove_leftovers(self) -> None:
        """Delete what interrupted attempts left half-written; call on rank 0 before any save."""
        for directory in self.root.glob(".step-*.partial"):
            if f".{self.attempt}." not in directory.name:
                shutil.rmtree(directory, ignore_errors=True)


class CheckpointReader:
    """Reads rectangles of parameters and moments out of a checkpoint, whoever wrote them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        manifest = json.loads((directory / MANIFEST).read_text())
        self.state: dict[str, Any] = manifest["state"]
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(s) for name, s in manifest["shapes"].items()}
        self._chunks: dict[str, list[tuple[Offset, Shape, Any, str]]] = defaultdict(list)
        for name in manifest["files"]:
            file = safe_open(directory / name, framework="pt")
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                whole, _, where = key.rpartition("@")
                offset = tuple(int(number) for number in where.split(",") if number)
                self._chunks[whole].append((offset, tuple(file.get_slice(key).get_shape()), file, key))

    def fill(self, fragment: Fragment) -> None:
        """Copy into the fragment's views what the checkpoint has for them.

        Raises:
            SafetensorError: the checkpoint lacks a part of it.
        """
        for kind, tensor in fragment.tensors.items():
            self._copy(f"{kind}/{fragment.name}", fragment.offset, tensor)

    def weight(self, name: str) -> torch.Tensor:
        """The whole fp32 weight ``name`` in its shape."""
        return self.part(name, Slicing(self.shapes[name]))

    def part(self, name: str, slicing: Slicing) -> torch.Tensor:
        """The part of the fp32 weight ``name`` that ``slicing`` means; reads no more than that.

        Raises:
            SafetensorError: the checkpoint lacks a part of it.
        """
        part = torch.empty(slicing.local_shape)
        for offset, shape, first, inside in boxes(slicing, 0, part.numel()):
            count = torch.Size(shape).numel()
            self._copy(f"weight/{name}", offset, part.view(-1)[first : first + count].view(shape)[inside])
        return part

    def _copy(self, key: str, offset: Offset, target: torch.Tensor) -> None:
        filled = 0
        for first, shape, file, full_key in self._chunks.get(key, ()):
            low = [max(a, b) for a, b in zip(offset, first, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, target.shape, first, shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, first, strict=True))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            target[here].copy_(file.get_slice(full_key)[there])
            filled += target[here].numel()
        if filled != target.numel():
            raise SafetensorError(f"{self.directory} holds {filled} of {target.numel()} elements of {key} at {offset}")
