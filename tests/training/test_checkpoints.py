"""Checkpoint files on their own: whole and damaged ones, with the digests of now and of earlier versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from raylm.parallel.layout.fragments import Fragment
from raylm.training.checkpoints.store import MANIFEST, CheckpointReader, CheckpointWriter, newest_whole


def test_damage_is_found_by_either_digest(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 0, 1, "attempt", keep=3)
    for step in (1, 2):
        weight = torch.full((4, 8), float(step))
        writer.save(step, [Fragment("w", (4, 8), (0, 0), {"weight": weight})], {"step": step})
        writer.wait()
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
