"""Layout-free checkpoints: fp32 weights and optimizer moments under their Hugging Face names.

Each rank streams the rectangles of the parameters that it owns into one safetensors file, keyed ``kind/name@offset``
(the offset's numbers joined by commas); nothing is gathered and nothing is copied whole. A load takes whatever parts it
needs out of all files, so that any layout can read what any other wrote. The manifest is written when every rank's file
is there, ``LATEST`` after it; a folder without a manifest does not count, and a damaged checkpoint is passed over for
the one before.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from raylm.errors import RunFailure
from raylm.parallel.layout.fragments import Fragment
from raylm.parallel.layout.slicing import Offset, Shape, Slicing, boxes
from raylm.training.checkpoints.manifest import DIGEST, DIGESTS, MANIFEST, FileEntry, parse_manifest, state_of
from raylm.training.checkpoints.storage import Storage

LATEST, BEST = "LATEST", "BEST"
COMMIT_TIMEOUT_SECONDS = 600.0
# Most elements that are copied at once, where a tensor is not fp32 in main memory already: 64 MiB.
PIECE_ELEMENTS = 1 << 24
READ_BYTES = 1 << 22
FLOAT_BYTES = 4


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def _as_storage(root: Path | Storage) -> Storage:
    return root if isinstance(root, Storage) else Storage(root)


def damaged_files(checkpoint: Storage, rank: int = 0, world_size: int = 1) -> list[str]:
    """Names of files that lack the size or digest in the manifest, among this rank's share of the files."""
    manifest = parse_manifest(checkpoint.read(MANIFEST))
    if manifest is None:
        return [MANIFEST]
    return [n for n in sorted(manifest.files)[rank::world_size] if not _is_whole(checkpoint, n, manifest.files[n])]


def _is_whole(checkpoint: Storage, name: str, expected: FileEntry) -> bool:
    if checkpoint.size(name) != expected.bytes:
        return False
    assert expected.digest is not None
    kind, value = expected.digest
    digest = DIGESTS[kind]()
    with checkpoint.open(name) as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest() == value


def newest_whole(
    root: Path | Storage, rank: int = 0, world_size: int = 1, gather: Callable[[list[str]], list[str]] = list
) -> tuple[Storage | None, list[str]]:
    """The newest undamaged checkpoint under ``root`` and the names of damaged ones that were passed over.

    Args:
        gather: joins the ranks' lists, the same on all ranks; each rank verifies a share of the files.
    """
    root = _as_storage(root)
    mine = [name for name in root.names() if name.startswith("step-")] if rank == 0 else []
    damaged = []
    for name in sorted(gather([n for n in mine if root.size(f"{n}/{MANIFEST}") is not None]), reverse=True):
        if not gather(damaged_files(root / name, rank, world_size)):
            return root / name, damaged
        damaged.append(name)
    return None, damaged


def whole_best(root: Storage, rank: int, world_size: int, gather: Callable[[list[str]], list[str]]) -> Storage | None:
    """The checkpoint with the best validation loss; None where none is noted, or it is damaged; see newest_whole."""
    if (name := _best_name(root)) is None:
        return None
    if gather(damaged_files(root / name, rank, world_size)):
        if rank == 0:
            print(f"raylm: the best checkpoint {root / name} is damaged; the last one is taken", flush=True)
        return None
    return root / name


def _best_name(root: Storage) -> str | None:
    name = (root.read(BEST) or b"").decode(errors="replace").strip()
    return name if re.fullmatch(r"step-\d+", name) else None


class CheckpointWriter:
    """Writes checkpoints of one rank; rank 0 also commits them and removes old ones.

    A background thread streams the live tensors to disk, which is why :meth:`settle` must be called before an optimizer
    changes them (a step pre-hook does that). What is left, an upload to remote storage and the commit, overlaps further
    steps.

    Args:
        root: folder ``checkpoints`` of the run.
        generation: a token that is the same on all ranks and new at every start of the workers, so that what several
            starts leave behind never mixes.
        keep: newest checkpoints to keep; the best is kept besides.
        asynchronous: write in the background.
        scratch: local folder for files on their way to remote storage.
        before_commit: called on rank 0 before a checkpoint begins to count.
        check_owner: called on rank 0, raises where another start of the run has taken over.

    Attributes:
        stall_seconds: time that training has waited for the writer so far.
        committed: on rank 0, the step of the newest checkpoint that counts, as far as is known.
    """

    def __init__(
        self,
        root: Path | Storage,
        rank: int,
        world_size: int,
        generation: str,
        keep: int,
        *,
        asynchronous: bool = True,
        scratch: Path | None = None,
        before_commit: Callable[[], None] | None = None,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self.root = _as_storage(root)
        self.rank, self.world_size, self.generation, self.keep = rank, world_size, generation, keep
        self.stall_seconds = 0.0
        self.committed: int | None = None
        self._asynchronous, self._scratch = asynchronous, scratch
        self._before_commit, self._check_owner = before_commit, check_owner
        self._thread: threading.Thread | None = None
        self._streamed = threading.Event()
        self._streamed.set()
        self._error: BaseException | None = None

    def save(self, step: int, fragments: list[Fragment], state: dict[str, Any], *, best: bool = False) -> str:
        """Begin to write ``fragments``, which must not change before :meth:`settle`; ``state`` (JSON) is rank 0's.

        Returns:
            The checkpoint's name.
        """
        self.wait()
        began = time.perf_counter()
        self._streamed.clear()
        self._thread = threading.Thread(
            target=self._write, args=(step, fragments, json.dumps(state), best), daemon=True
        )
        self._thread.start()
        self.stall_seconds += time.perf_counter() - began
        if not self._asynchronous:
            self.wait()
        return checkpoint_name(step)

    def settle(self) -> None:
        """Wait until the live tensors have been read; raises what went wrong with it."""
        began = time.perf_counter()
        self._streamed.wait()
        self.stall_seconds += time.perf_counter() - began
        if self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint under way; raises what its writing raised."""
        began = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.stall_seconds += time.perf_counter() - began
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, fragments: list[Fragment], state: str, best: bool) -> None:
        folder = checkpoint_name(step)
        name = f"rank-{self.rank:05d}.{self.generation}"
        file = f"{name}.safetensors"
        target = (self._scratch or Path()) / file if self.root.local is None else self.root.local / folder / file
        handed_over = False
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as stream:
                entry = write_fragments(stream, fragments)
                self._streamed.set()
                stream.flush()
                os.fsync(stream.fileno())
            if self.root.local is None:
                self.root.upload(target, f"{folder}/{file}")
            self.root.write(f"{folder}/{name}.json", json.dumps({file: entry}))
            handed_over = self.root.local is not None
            if self.rank == 0:
                self._commit(folder, json.loads(state), best)
        except BaseException as error:  # noqa: BLE001 - handed to the training thread, which raises it in wait()
            self._error = error
        finally:
            # Nothing counts that was not handed over, and a full disk needs the space.
            if not handed_over:
                target.unlink(missing_ok=True)
            self._streamed.set()

    def _commit(self, folder: str, state: dict[str, Any], best: bool) -> None:
        suffix = f".{self.generation}.json"
        deadline = time.monotonic() + COMMIT_TIMEOUT_SECONDS
        while len(parts := [n for n in self.root.names(folder) if n.endswith(suffix)]) < self.world_size:
            if time.monotonic() > deadline:
                raise TimeoutError(f"checkpoint {folder}: {len(parts)} of {self.world_size} ranks wrote their part")
            time.sleep(0.02 if self.root.local is not None else 0.5)
        files: dict[str, Any] = {}
        shapes: dict[str, list[int]] = {}
        for part in parts:
            for name, entry in json.loads(self.root.read(f"{folder}/{part}") or b"").items():
                shapes |= entry.pop("shapes")
                files[name] = entry
        # What is removed is listed before the look at the owner: a later start has written none of it yet, however long
        # this one may be held up after the look.
        leftover = [name for name in self.root.names(folder) if name not in files and name != MANIFEST]
        older = [name for name in self.root.names() if name.startswith("step-") and name < folder]
        self._check_owner()
        if self._before_commit is not None:
            self._before_commit()
        manifest = json.dumps({"files": files, "shapes": shapes, "state": state})
        self.root.write(f"{folder}/{MANIFEST}", manifest)
        self._still_owned(folder, manifest)
        self.root.write(LATEST, folder + "\n")
        self.committed = state["step"]
        if best:
            self.root.write(BEST, folder + "\n")
        for name in leftover:
            self.root.remove(f"{folder}/{name}")
        self._remove_old(older)

    def _still_owned(self, folder: str, manifest: str) -> None:
        """Take a checkpoint back that was written while another start took over: that one goes on from an older."""
        try:
            self._check_owner()
        except RunFailure:
            if self.root.read(f"{folder}/{MANIFEST}") == manifest.encode():
                self.root.remove(f"{folder}/{MANIFEST}")
            raise

    def _remove_old(self, older: list[str]) -> None:
        """Of the checkpoints before the newest, keep as many as are wanted; one of a later step is damaged anyway."""
        best = _best_name(self.root)
        for name in older[: max(0, len(older) + 1 - self.keep)]:
            if name != best:
                # The manifest goes first, so that half a removal never looks like a checkpoint.
                self.root.remove(f"{name}/{MANIFEST}")
                self.root.remove(name)

    def remove_leftovers(self) -> None:
        """Delete folders that an interrupted start left without a manifest; call on rank 0 before any save."""
        for name in self.root.names():
            if name.startswith("step-") and self.root.size(f"{name}/{MANIFEST}") is None:
                self.root.remove(name)


def write_fragments(stream: BinaryIO, fragments: list[Fragment]) -> dict[str, Any]:
    """Write ``fragments`` in the safetensors format, piece by piece; returns the file's manifest entry."""
    tensors = [
        (f"{kind}/{fragment.name}@{','.join(map(str, fragment.offset))}", tensor.detach())
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    ]
    header, offset = {}, 0
    for key, tensor in tensors:
        end = offset + FLOAT_BYTES * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = DIGESTS[DIGEST](), 0
    for block in _blocks(text, tensors):
        stream.write(block)
        digest.update(block)
        size += len(block)
    shapes = {fragment.name: list(fragment.shape) for fragment in fragments}
    return {"bytes": size, DIGEST: digest.hexdigest(), "shapes": shapes}


def _blocks(header: bytes, tensors: list[tuple[str, torch.Tensor]]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for _, tensor in tensors:
        rows = max(1, PIECE_ELEMENTS // torch.Size(tensor.shape[1:]).numel())
        for start in range(0, tensor.shape[0], rows):
            # No copy of what lies in main memory as contiguous fp32; else one piece at a time.
            piece = tensor[start : start + rows].to("cpu", torch.float32).contiguous()
            yield memoryview(piece.numpy()).cast("B")


class CheckpointReader:
    """Reads rectangles of parameters and moments out of a checkpoint, whoever wrote them, and little else of it.

    Raises:
        SafetensorError: it is none, or its manifest is damaged.
    """

    def __init__(self, checkpoint: Path | Storage) -> None:
        self.checkpoint = _as_storage(checkpoint)
        manifest = parse_manifest(self.checkpoint.read(MANIFEST))
        if manifest is None:
            raise SafetensorError(f"{self.checkpoint}: {MANIFEST} is missing or damaged")
        self.state: dict[str, Any] = state_of(manifest)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(s) for name, s in manifest.shapes.items()}
        # kind/name -> (offset, shape, file, byte of the first element)
        self._chunks: dict[str, list[tuple[Offset, Shape, Any, int]]] = defaultdict(list)
        for name in sorted(manifest.files):
            file = self.checkpoint.open(name)
            length = int.from_bytes(file.read(8), "little")
            for key, entry in json.loads(file.read(length)).items():
                whole, _, where = key.rpartition("@")
                offset = tuple(int(number) for number in where.split(",") if number)
                first_byte = 8 + length + entry["data_offsets"][0]
                self._chunks[whole].append((offset, tuple(entry["shape"]), file, first_byte))

    def fill(self, fragment: Fragment) -> None:
        """Copy into the fragment's views what the checkpoint has for them.

        Raises:
            SafetensorError: the checkpoint lacks a part of it.
        """
        for kind, tensor in fragment.tensors.items():
            self._copy(f"{kind}/{fragment.name}", fragment.offset, tensor)

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such a ``kind`` of tensor (weight, a moment) of the parameter ``name``."""
        return f"{kind}/{name}" in self._chunks

    def weight(self, name: str, kind: str = "weight") -> torch.Tensor:
        """The whole fp32 weight ``name`` in its shape, or another ``kind`` of tensor of it."""
        return self.part(name, Slicing(self.shapes[name]), kind)

    def part(self, name: str, slicing: Slicing, kind: str = "weight") -> torch.Tensor:
        """The part of the fp32 weight ``name`` that ``slicing`` means; reads no more than its rows.

        Raises:
            SafetensorError: the checkpoint lacks a part of it.
        """
        part = torch.empty(slicing.local_shape)
        for offset, shape, first, inside in boxes(slicing, 0, part.numel()):
            count = torch.Size(shape).numel()
            self._copy(f"{kind}/{name}", offset, part.view(-1)[first : first + count].view(shape)[inside])
        return part

    def _copy(self, key: str, offset: Offset, target: torch.Tensor) -> None:
        filled = 0
        for first, shape, file, first_byte in self._chunks.get(key, ()):
            low = [max(a, b) for a, b in zip(offset, first, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, target.shape, first, shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = [slice(a - o, b - o) for a, b, o in zip(low, high, first, strict=True)]
            here = target[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))]
            row = torch.Size(shape[1:]).numel()
            rows = max(1, PIECE_ELEMENTS // row)
            for begin in range(there[0].start, there[0].stop, rows):
                end = min(there[0].stop, begin + rows)
                piece = torch.empty((end - begin, *shape[1:]))
                file.seek(first_byte + FLOAT_BYTES * begin * row)
                if file.readinto(memoryview(piece.numpy()).cast("B")) != FLOAT_BYTES * piece.numel():
                    raise SafetensorError(f"{self.checkpoint} is cut short at {key}")
                done = begin - there[0].start
                here[done : done + end - begin].copy_(piece[(slice(None), *there[1:])])
            filled += here.numel()
        if filled != target.numel():
            raise SafetensorError(f"{self.checkpoint} holds {filled} of {target.numel()} elements of {key} at {offset}")
