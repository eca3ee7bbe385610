"""``raylm tune`` over ways to compress: the front, what is taken of it, what is refused, and a whole search."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from raylm.compression.search.front import keeps_to, pareto_front, pick
from raylm.compression.search.stage import tune
from raylm.config import load_config
from raylm.config.compression import TargetSection
from raylm.config.distributions import corners
from raylm.config.loading import set_key
from raylm.config.tuning import Distribution
from raylm.errors import RunFailure, UserError

OBJECTIVES = ["quality", "megabytes", "p50_milliseconds"]
ROWS = [
    {"trial": 0, "quality": 1.0, "megabytes": 100.0, "p50_milliseconds": 10.0},
    {"trial": 1, "quality": 1.1, "megabytes": 50.0, "p50_milliseconds": 6.0},
    {"trial": 2, "quality": 1.2, "megabytes": 50.0, "p50_milliseconds": 6.0},
    {"trial": 3, "quality": 2.0, "megabytes": 40.0, "p50_milliseconds": 7.0},
]


def test_the_front_has_what_nothing_else_beats() -> None:
    assert [row["trial"] for row in pareto_front(ROWS, OBJECTIVES)] == [0, 1, 3]
    assert [row["trial"] for row in pareto_front(ROWS, ["quality"])] == [0]
    # Two alike do not beat each other.
    assert len(pareto_front([ROWS[0], dict(ROWS[0])], OBJECTIVES)) == 2


@pytest.mark.parametrize(
    ("target", "trial"),
    [
        (None, 1),
        (TargetSection(megabytes=100), 0),
        (TargetSection(megabytes=80), 1),
        (TargetSection(p50_milliseconds=6.5), 1),
        (TargetSection(megabytes=45), 3),
        (TargetSection(megabytes=45, p50_milliseconds=6.5), None),
    ],
)
def test_what_is_taken_keeps_to_the_target(target: TargetSection | None, trial: int | None) -> None:
    front = pareto_front(ROWS, OBJECTIVES)
    taken = pick(front, OBJECTIVES, target)
    assert (None if taken is None else taken["trial"]) == trial
    assert taken is None or keeps_to(taken, target)


def test_each_value_is_tried_out_before_a_search() -> None:
    space = {"a": Distribution(choice=[1, 2, 3]), "b": Distribution(uniform=[0.1, 0.2])}
    assert corners(space) == [{"a": 1, "b": 0.1}, {"a": 2, "b": 0.1}, {"a": 3, "b": 0.1}, {"a": 1, "b": 0.2}]


def test_keys_reach_into_lists() -> None:
    values = {"steps": [{"prune": {"layers": 3}}, {"quantize": {}}]}
    set_key(values, "steps.1.quantize.bits", 4)
    assert values["steps"][1] == {"quantize": {"bits": 4}}
    with pytest.raises(UserError, match=r"found '2' in a list, allowed: 0 to 1"):
        set_key(values, "steps.2.quantize.bits", 4)
    with pytest.raises(UserError, match=r"found 'x' in a list, allowed: 0 to 1"):
        set_key(values, "steps.x", 4)


def write(directory: Path, model: Path, **sections: dict) -> Path:
    (directory / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    values = {
        "run": {"name": "search", "storage": str(directory)},
        "data": {"train": str(directory / "text.txt")},
        "model": {"path": str(model)},
        "compression": {"prompts": 8, "prompt_tokens": 8, "new_tokens": 4, "steps": [{"quantize": {"bits": 8}}]},
        "evaluation": {"sequence_length": 64},
        "tuning": {
            "searcher": "tpe",
            "trials": 3,
            "space": {"compression.steps.0.quantize.activations": {"choice": ["float"]}},
        },
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path = directory / "tune.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"tuning": {"metric": ["speed"]}}, "tuning.metric"),
        ({"compression": {"target": {"megabytes": 0.001}}}, "compression.target.megabytes: found 0.001, allowed: 0."),
        ({"compression": {"target": {}}}, "target: found nothing, allowed: megabytes, p50_milliseconds"),
        (
            {"tuning": {"space": {"training.learning_rate": {"choice": [1e-3]}}}},
            "tuning.space: found 'training.learning_rate', allowed with a section training only",
        ),
        (
            {"tuning": {"space": {"compression.steps.0.quantize.bits": {"choice": [8, 3]}}}},
            "quantize.bits: found 3, allowed: 8 or 4",
        ),
        (
            {"tuning": {"space": {"compression.steps.4.quantize.bits": {"choice": [8]}}}},
            "found '4' in a list, allowed: 0 to 0",
        ),
    ],
)
def test_refused_before_anything_is_made(tiny_model: Path, tmp_path: Path, sections: dict, expected: str) -> None:
    path = write(tmp_path, tiny_model, **sections)
    with pytest.raises(UserError) as caught:
        tune(load_config("tune", path))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "search").exists()


@pytest.mark.slow
def test_a_search_measures_and_takes_a_model(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray Tune runs trials in folders of their own, where these paths lead nowhere.
    monkeypatch.chdir(tmp_path)
    relative = Path(os.path.relpath(tiny_model, tmp_path))
    path = write(
        tmp_path, relative, compression={"target": {"megabytes": 1.0}}, run={"storage": "."}, data={"train": "text.txt"}
    )
    tune(load_config("tune", path))
    assert "taken" in capsys.readouterr().out
    run = tmp_path / "search"
    report = json.loads((run / "report.json").read_text())
    assert [row["status"] for row in report["trials"]] == ["finished"] * 3
    # All three were asked for the same, so that one was measured.
    assert len({row["p50_milliseconds"] for row in report["trials"]}) == 1
    assert all(row["megabytes"] < report["original"]["megabytes"] for row in report["trials"])
    assert report["best"]["trial"] in report["front"]
    assert (run / "model" / "openvino" / "openvino_model.xml").is_file()
    assert (run / "model" / "config.json").is_file()

    from raylm.reports.report import write_report

    page = write_report([run]).read_text()
    assert "weights on disk, MB" in page and "taken" in page and page.count("<circle") >= 8
    # What has ended is not run again.
    stamps = {path: path.stat().st_mtime_ns for path in run.glob("trials/*/outcome.json")}
    (run / "report.json").unlink()
    tune(load_config("tune", path))
    assert len(stamps) == 3
    assert {path: path.stat().st_mtime_ns for path in run.glob("trials/*/outcome.json")} == stamps


@pytest.mark.slow
def test_a_search_of_failures_says_why(tiny_model: Path, tmp_path: Path) -> None:
    step = {"bits": 4, "group_size": 32, "megabytes": 0.001, "samples": 4, "sequence_length": 16}
    space = {"compression.steps.0.quantize.samples": {"choice": [4]}}
    compression = {"steps": [{"quantize": step}]}
    tuning, data = {"trials": 1, "space": space}, {"text_unit": "line", "validation_fraction": 0.2}
    path = write(tmp_path, tiny_model, compression=compression, tuning=tuning, data=data)
    (tmp_path / "text.txt").write_text("\n".join(f"the {n} brown foxes jump over the lazy dogs" for n in range(200)))
    with pytest.raises(
        RunFailure, match=r"^no trial finished; trial 0: .*quantize\.megabytes: found 0\.001, allowed: 0"
    ):
        tune(load_config("tune", path))
