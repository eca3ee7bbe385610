"""Prepared data on their way to a bucket and from there to another host: uploads that end in the middle."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from raylm.data.samples.array_sets import verify_set, write_set
from raylm.training.checkpoints.mirror import Mirror
from raylm.training.checkpoints.storage import Storage

SEND = """
import sys
from pathlib import Path
from raylm.training.checkpoints.mirror import Mirror
from raylm.training.checkpoints.storage import Storage
Mirror(Storage(sys.argv[1]), Path(sys.argv[2])).send_data()
"""


@pytest.fixture
def storage(bucket: str) -> Storage:
    """A run's folder in the bucket."""
    return Storage(bucket) / uuid.uuid4().hex


def write_data(directory: Path, model: Path, rows: int = 50) -> None:
    def split(name: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        return {"ids": np.arange(rows * 8).reshape(rows, 8), "labels": np.arange(rows)}, {"rows": rows}

    write_set(directory / "data", "labels", AutoTokenizer.from_pretrained(model), split, sequence_length=8)


def other_host(storage: Storage, directory: Path) -> Path:
    """The data that a start on another host finds; none where they are not all in the storage."""
    mirror = Mirror(storage, directory)
    mirror.directory.mkdir(exist_ok=True)
    mirror.open_run()
    return directory / "data"


def test_an_upload_that_was_killed_is_completed(storage: Storage, tiny_model: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "first", tiny_model, rows=400_000)
    sender = subprocess.Popen([sys.executable, "-c", SEND, storage.uri, str(tmp_path / "first")])
    deadline = time.monotonic() + 60
    while not storage.names("data"):
        assert sender.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    sender.kill()
    sender.wait()
    # Files, but no manifest, which would say that they are all there.
    assert storage.names("data") and storage.size("data/manifest.json") is None
    assert not other_host(storage, tmp_path / "early").exists()
    first = Mirror(storage, tmp_path / "first")
    first.open_run()
    first.send_data()
    verify_set(other_host(storage, tmp_path / "second"), "labels", "classification")


@pytest.mark.parametrize("lost", ["train-ids.npy", "validation-labels.npy", "tokenizer"])
def test_a_manifest_without_its_files_is_not_whole(
    storage: Storage, tiny_model: Path, tmp_path: Path, lost: str
) -> None:
    """As an upload of an earlier raylm, which began with the manifest, was interrupted."""
    write_data(tmp_path / "first", tiny_model)
    first = Mirror(storage, tmp_path / "first")
    first.send_data()
    storage.remove(f"data/{lost}")
    assert not other_host(storage, tmp_path / "early").exists()
    first.open_run()
    first.send_data()
    assert storage.names("data") == sorted(path.name for path in (tmp_path / "first" / "data").iterdir())
    verify_set(other_host(storage, tmp_path / "second"), "labels", "classification")


def test_whole_data_are_sent_once_and_others_replaced(storage: Storage, tiny_model: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "first", tiny_model)
    mirror = Mirror(storage, tmp_path / "first")
    mirror.send_data()
    system, path = storage._opened
    written = system.get_file_info(f"{path}/data/train-ids.npy").mtime_ns
    mirror.send_data()
    assert system.get_file_info(f"{path}/data/train-ids.npy").mtime_ns == written
    storage.write("data/left-over", "x")
    write_data(tmp_path / "first", tiny_model, rows=60)
    mirror.send_data()
    assert "left-over" not in storage.names("data")
    verify_set(other_host(storage, tmp_path / "second"), "labels", "classification")


def test_a_part_that_is_here_is_replaced_by_the_whole(storage: Storage, tiny_model: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "first", tiny_model)
    Mirror(storage, tmp_path / "first").send_data()
    write_data(tmp_path / "second", tiny_model)
    (tmp_path / "second" / "data" / "train-ids.npy").unlink()
    verify_set(other_host(storage, tmp_path / "second"), "labels", "classification")
    # In the worker's way to them too.
    (tmp_path / "second" / "data" / "train-ids.npy").unlink()
    Mirror(storage, tmp_path / "second").fetch_data()
    verify_set(tmp_path / "second" / "data", "labels", "classification")
    # Nowhere whole: prepared again.
    storage.remove("data/train-ids.npy")
    (tmp_path / "second" / "data" / "train-ids.npy").unlink()
    assert not (other_host(storage, tmp_path / "second") / "manifest.json").exists()


def test_an_owner_that_is_no_text_is_another(storage: Storage, tmp_path: Path) -> None:
    from raylm.errors import RunFailure

    (tmp_path / "OWNER").write_bytes(b"\xff\xfe")
    storage.upload(tmp_path / "OWNER", "OWNER")
    with pytest.raises(RunFailure, match="taken over by a later start"):
        Mirror(storage, tmp_path).check_owner("mine")
