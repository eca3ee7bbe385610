"""Which start of the driver may write to a run's storage, and where that is remote, what is kept locally.

The storage's file ``OWNER`` names the latest start. An older one that still runs, on whatever host, reads there that it
was overtaken before it next writes what counts, and ends. The lock of the run directory is the quicker refusal, where
the storage has locks that all hosts know.

With remote storage the driver and rank 0 work in a local mirror of the run directory; checkpoints go to the storage by
themselves. The storage wins over what an earlier start left in a mirror. With a local or shared directory, storage and
mirror are one, and nothing is copied.
"""

from __future__ import annotations

import fcntl
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow.lib import ArrowException

from raylm.config.run_directory import parse_object
from raylm.data.sources.segments import MANIFEST
from raylm.errors import RunFailure, UserError
from raylm.training.checkpoints.storage import Storage

OWNER = "OWNER"
# Between two looks at it from the training loop, which writes metrics more often than that.
OWNER_SECONDS = 2.0
# What a driver needs of an earlier start; data is what it prepared from raw sources.
DRIVER_FILES = ("config.yaml", "report.json", "precision.json")
METRICS, BOARD, DATA, SUMMARY = "metrics.jsonl", "tensorboard", "data", "summary.txt"
# Folders of trackers that write files.
TRACKED = ("wandb", "mlruns")


class Mirror:
    """The local mirror ``directory`` of the run in ``storage``.

    Attributes:
        remote: whether the two are apart.
    """

    def __init__(self, storage: Storage, directory: Path) -> None:
        self.storage, self.directory = storage, directory
        self.remote = storage.local is None
        self._looked = float("-inf")

    def open_run(self) -> None:
        """Fetch what an earlier start of the driver left; call before anything is checked.

        Raises:
            UserError: the storage cannot be reached or written.
        """
        if not self.remote:
            return
        try:
            self.storage.write(".probe", "raylm")
            self.storage.remove(".probe")
            for name in DRIVER_FILES:
                self._fetch(name)
            self._have_data()
        except (OSError, ArrowException) as error:
            raise UserError(f"run.storage: {self.storage} cannot be used: {error}") from None

    def own(self, attempt: str) -> None:
        """Make ``attempt`` the one start of the driver that may write; an older one stops before it next writes."""
        owner = {"attempt": attempt, "host": socket.gethostname(), "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self.storage.write(OWNER, json.dumps(owner) + "\n")

    def overtaken(self, attempt: str) -> RunFailure | None:
        """What says that a later start of the same run has taken over; None where ``attempt`` is the owner."""
        text = self.storage.read(OWNER)
        owner = parse_object(text or b"") or {}
        if owner.get("attempt") == attempt:
            return None
        # An earlier raylm wrote the attempt alone.
        by = f"on {owner.get('host')} at {owner.get('time')}" if owner else (text or b"nobody").decode(errors="replace")
        return RunFailure(f"{self.storage} was taken over by a later start of the same run ({by}); this one ends")

    def check_owner(self, attempt: str) -> None:
        """Stop where a later start of the same run has taken over.

        Raises:
            RunFailure: it has.
        """
        if (failure := self.overtaken(attempt)) is not None:
            raise failure
        self._looked = time.monotonic()

    def check_owner_at_times(self, attempt: str) -> None:
        """:meth:`check_owner` before a line of metrics: where that goes to the storage itself, and every other second.

        Raises:
            RunFailure: a later start has taken over.
        """
        if not self.remote and time.monotonic() - self._looked > OWNER_SECONDS:
            self.check_owner(attempt)

    def send(self, *names: str) -> None:
        """Copy files or folders of the mirror to the storage; those that are not there are left out."""
        if self.remote:
            for name in names:
                if (self.directory / name).exists():
                    self.storage.upload(self.directory / name, name)

    def send_data(self) -> None:
        """Copy prepared data that workers on other hosts will fetch, or what an interrupted start has not sent of it.

        The manifest goes last, so that it says that all is there.
        """
        source, folder = self.directory / DATA, self.storage / DATA
        if not self.remote or not (source / MANIFEST).is_file():
            return
        same = folder.read(MANIFEST) == (source / MANIFEST).read_bytes()
        files = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        files.remove(MANIFEST)
        missing = [name for name in files if not (same and folder.size(name) == (source / name).stat().st_size)]
        if same and not missing:
            return
        self.storage.remove(f"{DATA}/{MANIFEST}" if same else DATA)
        for name in [*missing, MANIFEST]:
            folder.upload(source / name, name)

    def fetch_data(self) -> None:
        """On a worker: have the prepared data on this host; the first worker of a host fetches it."""
        if not self.remote:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".data.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._have_data()

    def fetch_metrics(self) -> None:
        """On rank 0, which may be on another host than before: have the metrics so far."""
        if self.remote:
            self._fetch(METRICS)

    def send_metrics(self) -> None:
        """On rank 0, before a checkpoint counts: the metrics up to it."""
        self.send(METRICS, BOARD)

    def _have_data(self) -> None:
        """Have the prepared data here, if the storage has all of it; a part of it is not taken as whole."""
        here = self.directory / DATA
        if _is_whole(Storage(here)):
            return
        if _is_whole(self.storage / DATA):
            self.storage.download(DATA, here)
        else:
            (here / MANIFEST).unlink(missing_ok=True)

    def _fetch(self, name: str) -> None:
        if not self.storage.download(name, self.directory / name):
            (self.directory / name).unlink(missing_ok=True)


def _is_whole(data: Storage) -> bool:
    """Whether a folder of prepared data has a manifest and every file that stands in it; reads no contents."""
    manifest = parse_object(data.read(MANIFEST) or b"")
    if manifest is None or not data.names("tokenizer"):
        return False
    return all(data.size(name) is not None for name in _paths(manifest.get("splits")))


def _paths(part: Any) -> Iterator[str]:
    """Every ``path`` in a part of a manifest, of token shards or of arrays."""
    if isinstance(part, dict):
        if isinstance(part.get("path"), str):
            yield part["path"]
        part = list(part.values())
    for one in part if isinstance(part, list) else ():
        yield from _paths(one)
