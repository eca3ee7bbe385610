"""What was measured for a layout is known to later starts of the run, and to no other layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from raylm.config.stages import PretrainConfig
from raylm.training.loop.measured_stages import MeasuredStages


def make(directory: Path, micro_batch_size: int) -> MeasuredStages:
    config = PretrainConfig.model_validate(
        {
            "run": {"name": "run", "storage": str(directory)},
            "data": {"train": "data"},
            "model": {"family": "llama"},
            "training": {"steps": 1},
            "parallel": {"pipeline": 2, "balance": "time", "micro_batch_size": micro_batch_size},
        }
    )
    return MeasuredStages(directory, config, SimpleNamespace(model_type="llama"))


def test_measured_stages_are_kept_for_their_layout(tmp_path: Path) -> None:
    assert make(tmp_path, 2).known() is None
    make(tmp_path, 2).note([0, 3, 6])
    assert make(tmp_path, 2).known() == [0, 3, 6]
    assert make(tmp_path, 4).known() is None
    layout = json.loads((tmp_path / "stages.json").read_text())["layout"]
    bounds = [None, [], [0, 3], [0, 6, 3], ["0", 3, 6], {"0": 1}]
    damaged = ["{", "[]", "null", json.dumps({"layout": layout}), *(
        json.dumps({"layout": layout, "stage_bounds": found}) for found in bounds
    )]  # fmt: skip
    for text in damaged:
        (tmp_path / "stages.json").write_text(text)
        assert make(tmp_path, 2).known() is None
