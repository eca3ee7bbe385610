"""A run whose storage is remote: what is kept locally and when it is copied.

The driver and rank 0 work in a local mirror of the run directory; checkpoints go to the storage by themselves. The
storage wins over what an earlier start left in a mirror, on whatever host. With a local or shared directory, storage
and mirror are one, and nothing here does anything.
"""

from __future__ import annotations

import fcntl
from pathlib import Path

from pyarrow.lib import ArrowException

from raylm.errors import RunFailure, UserError
from raylm.training.checkpoints.storage import Storage

OWNER = "OWNER"
# What a driver needs of an earlier start; data is what it prepared from raw sources.
DRIVER_FILES = ("config.yaml", "report.json", "precision.json")
METRICS, BOARD, DATA, SUMMARY = "metrics.jsonl", "tensorboard", "data", "summary.txt"


class Mirror:
    """The local mirror ``directory`` of the run in ``storage``."""

    def __init__(self, storage: Storage, directory: Path) -> None:
        self.storage, self.directory = storage, directory
        self.remote = storage.local is None

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
        except (OSError, ArrowException) as error:
            raise UserError(f"run.storage: {self.storage} cannot be used: {error}") from None
        if not (self.directory / DATA).exists():
            self.storage.download(DATA, self.directory / DATA)

    def own(self, attempt: str) -> None:
        """Make ``attempt`` the one start of the driver that may write; an older one stops at its next checkpoint."""
        if self.remote:
            self.storage.write(OWNER, attempt)

    def check_owner(self, attempt: str) -> None:
        """Stop where a later start of the same run has taken over.

        Raises:
            RunFailure: it has.
        """
        if self.remote and (owner := self.storage.read(OWNER)) != attempt.encode():
            by = (owner or b"nobody").decode()
            raise RunFailure(f"{self.storage} was taken over by a later start of the same run ({by})")

    def send(self, *names: str) -> None:
        """Copy files or folders of the mirror to the storage; those that are not there are left out."""
        if self.remote:
            for name in names:
                if (self.directory / name).exists():
                    self.storage.upload(self.directory / name, name)

    def send_data(self) -> None:
        """Copy prepared data that workers on other hosts will fetch."""
        if self.remote and not self.storage.names(DATA):
            self.send(DATA)

    def fetch_data(self) -> None:
        """On a worker: have the prepared data on this host; the first worker of a host fetches it."""
        if not self.remote:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".data.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.directory / DATA).exists():
                self.storage.download(DATA, self.directory / DATA)

    def fetch_metrics(self) -> None:
        """On rank 0, which may be on another host than before: have the metrics so far."""
        if self.remote:
            self._fetch(METRICS)

    def send_metrics(self) -> None:
        """On rank 0, before a checkpoint counts: the metrics up to it."""
        self.send(METRICS, BOARD)

    def _fetch(self, name: str) -> None:
        if not self.storage.download(name, self.directory / name):
            (self.directory / name).unlink(missing_ok=True)
