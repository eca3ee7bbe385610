"""Checkpoint files, and the other files of a run that a start reads, on their own: whole and damaged ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from raylm.errors import RunFailure
from raylm.parallel.layout.fragments import Fragment
from raylm.training.checkpoints.storage import Storage
from raylm.training.checkpoints.store import (
    MANIFEST,
    CheckpointReader,
    CheckpointWriter,
    damaged_files,
    newest_whole,
    whole_best,
)
from raylm.training.ray_train.watching import describe_latest
from raylm.training.reports.events import append_event, read_events
from raylm.training.reports.metrics import MetricsRecorder, read_metrics


def save(root: Path, *steps: int, keep: int = 3, best: int | None = None) -> None:
    writer = CheckpointWriter(root, 0, 1, "attempt", keep=keep)
    for step in steps:
        weight = torch.full((4, 8), float(step))
        fragments = [Fragment("w", (4, 8), (0, 0), {"weight": weight})]
        assert writer.save(step, fragments, {"step": step}, best=step == best) == f"step-{step:08d}"
        writer.wait()


def test_damage_is_found_by_either_digest(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    newest = tmp_path / "step-00000002"
    manifest = json.loads((newest / MANIFEST).read_text())
    ((name, entry),) = manifest["files"].items()
    assert "xxh3" in entry
    for digests in ({"xxh3": entry["xxh3"]}, {"sha256": hashlib.sha256((newest / name).read_bytes()).hexdigest()}):
        manifest["files"][name] = {"bytes": entry["bytes"], **digests}
        (newest / MANIFEST).write_text(json.dumps(manifest))
        found, damaged = newest_whole(tmp_path)
        assert str(found) == str(newest)
        assert not damaged
        assert torch.equal(CheckpointReader(found).weight("w"), torch.full((4, 8), 2.0))
        content = bytearray((newest / name).read_bytes())
        content[-1] ^= 1
        (newest / name).write_bytes(content)
        found, damaged = newest_whole(tmp_path)
        assert str(found) == str(tmp_path / "step-00000001")
        assert damaged == ["step-00000002"]
        content[-1] ^= 1
        (newest / name).write_bytes(content)


FILES = {"a": {"bytes": 1, "xxh3": "0"}}
MISSHAPEN = [
    "", "{", "null", "5", "[]", "[1, 2]", '"text"', "[" * 100_000, "{}", "\x00" * 40,
    json.dumps({"files": FILES, "shapes": {"w": [1]}}),
    json.dumps({"files": FILES, "state": {"step": 1}}),
    json.dumps({"shapes": {"w": [1]}, "state": {"step": 1}}),
    json.dumps({"files": [], "shapes": {"w": [1]}, "state": {"step": 1}}),
    json.dumps({"files": {}, "shapes": {}, "state": {"step": 1}}),
    json.dumps({"files": {"a": 5}, "shapes": {"w": [1]}, "state": {"step": 1}}),
    json.dumps({"files": {"a": {"bytes": "1", "xxh3": "0"}}, "shapes": {"w": [1]}, "state": {"step": 1}}),
    json.dumps({"files": {"a": {"bytes": 1}}, "shapes": {"w": [1]}, "state": {"step": 1}}),
    json.dumps({"files": FILES, "shapes": {"w": "4x8"}, "state": {"step": 1}}),
    json.dumps({"files": FILES, "shapes": {"w": [1]}, "state": []}),
    json.dumps({"files": FILES, "shapes": {"w": [1]}, "state": {"step": "1"}}),
    json.dumps({"files": FILES, "shapes": {"w": [1]}, "state": {"step": 1, "skipped": [[3]]}}),
]  # fmt: skip


@pytest.mark.parametrize("text", MISSHAPEN)
def test_manifest_of_the_wrong_shape_is_damage(tmp_path: Path, text: str) -> None:
    save(tmp_path, 1, 2)
    newest = tmp_path / "step-00000002"
    (newest / MANIFEST).write_text(text)
    found, damaged = newest_whole(tmp_path)
    assert (str(found), damaged) == (str(tmp_path / "step-00000001"), ["step-00000002"])
    assert CheckpointReader(found).state == {"step": 1}
    with pytest.raises(SafetensorError, match=r"checkpoint\.json is missing or damaged"):
        CheckpointReader(newest)


def test_every_byte_at_which_a_manifest_may_end(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / MANIFEST
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert newest_whole(tmp_path)[1] == ["step-00000002"]
    path.write_bytes(whole)
    assert newest_whole(tmp_path)[1] == []


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "step": 7, "tokens": 3, "best": 1.25, "without_improvement": 2, "skipped": [[1, 2], [5, 9]], "anomalies": 2,
        "validation_loss": 1.5, "recent_losses": [0.1, 0.3],
    }  # fmt: skip
    writer = CheckpointWriter(tmp_path, 0, 1, "attempt", keep=3)
    writer.save(7, [Fragment("w", (1,), (0,), {"weight": torch.zeros(1)})], state)
    writer.wait()
    assert CheckpointReader(tmp_path / "step-00000007").state == state


@pytest.mark.parametrize("pointer", ["", "step-00000009", "../../etc", "\x00", "step-00000001\n"])
def test_a_best_checkpoint_that_is_none_is_not_taken(tmp_path: Path, pointer: str) -> None:
    save(tmp_path, 1, 2, best=1)
    root = Storage(tmp_path)
    assert str(whole_best(root, 0, 1, list)) == str(tmp_path / "step-00000001")
    (tmp_path / "BEST").write_text(pointer)
    (tmp_path / "step-00000001" / MANIFEST).write_text("[]")
    assert whole_best(root, 0, 1, list) is None
    (tmp_path / "BEST").write_bytes(b"\xff")
    assert whole_best(root, 0, 1, list) is None


def test_a_damaged_later_checkpoint_does_not_cost_the_new_one(tmp_path: Path) -> None:
    """What was passed over has a later step than what follows, and is no reason to remove that."""
    save(tmp_path, 5, 10)
    (tmp_path / "step-00000010" / MANIFEST).write_text("[]")
    save(tmp_path, 7, keep=1)
    assert str(newest_whole(tmp_path)[0]) == str(tmp_path / "step-00000007")
    assert not (tmp_path / "step-00000005").exists()


LINE = {"step": 1, "tokens": 8, "samples": 2, "loss": 3.0, "gradient_norm": 1.0, "tokens_per_second": 10.0}


def test_a_writer_that_loses_the_run_takes_back_its_last_checkpoint_and_removes_nothing(tmp_path: Path) -> None:
    """A later start takes over before the manifest is written, or, where this one is held up, after the look."""
    save(tmp_path, 1, 2, keep=2)
    for looks in (0, 1):
        left = iter([True] * looks + [False])

        def check(left: Iterator[bool] = left) -> None:
            if not next(left):
                raise RunFailure("taken over")

        writer = CheckpointWriter(tmp_path, 0, 1, "late", keep=1, check_owner=check)
        with pytest.raises(RunFailure, match="taken over"):
            writer.save(3, [Fragment("w", (4, 8), (0, 0), {"weight": torch.ones(4, 8)})], {"step": 3})
            writer.wait()
        assert not (tmp_path / "step-00000003" / MANIFEST).exists()
        assert writer.committed is None
        assert (tmp_path / "LATEST").read_text() == "step-00000002\n"
        for name in ("step-00000001", "step-00000002"):
            assert damaged_files(Storage(tmp_path / name)) == []


def test_the_driver_hears_of_the_newest_checkpoint_that_counts(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 0, 1, "a", keep=1)
    assert writer.committed is None
    writer.save(4, [Fragment("w", (4, 8), (0, 0), {"weight": torch.ones(4, 8)})], {"step": 4})
    writer.wait()
    assert writer.committed == 4
    latest = LINE | {"checkpoint_step": writer.committed}
    assert describe_latest(latest) == "loss 3.0000, 10 tokens/s, saved at step 4"
    assert describe_latest(LINE | {"checkpoint_step": None}) == "loss 3.0000, 10 tokens/s"


@pytest.mark.parametrize("damage", ["[]", "5", "null", "{}", '{"step": "2"}', '{"step": 2, "lo', "\x00" * 20, "\xff"])
def test_damaged_metrics_end_where_the_damage_is(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(LINE).encode() + b"\n" + damage.encode("latin-1") + b"\n")
    assert read_metrics(path) == [LINE]
    recorder = MetricsRecorder(tmp_path, 1, "run")
    recorder.record(LINE | {"step": 2})
    recorder.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("damage", ["[]}", "{}", "5", '{"kind": 1, "step": 2, "text": "x"}', '{"kind": "a', "\x00}"])
def test_damaged_events_are_left_out(tmp_path: Path, damage: str) -> None:
    append_event(tmp_path, {"kind": "resume", "step": 4, "text": "goes on"})
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write(damage + "\n")
    append_event(tmp_path, {"kind": "restart", "step": 5, "text": "again"})
    assert [event["kind"] for event in read_events(tmp_path)] == ["resume", "restart"]
