"""Report pages: of runs of every stage as the project's own writers leave them, done, going on and failed."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from raylm.cli import main
from raylm.config.loading import validate
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import STAGES
from raylm.errors import UserError
from raylm.reports.charts import LEAST_SMOOTHED, MOST_POINTS, smoothed, thinned
from raylm.reports.confusion import confusion
from raylm.reports.report import write_report
from raylm.reports.runs import differing, open_run, open_runs
from raylm.training.reports.events import append_event
from raylm.training.reports.metrics import MetricsRecorder

TRAINING = {"steps": 40, "batch_size": 4, "sequence_length": 32, "evaluate_every_steps": 10, "log_every_steps": 1}


def make_run(root: Path, name: str, stage: str = "pretrain", **sections: Any) -> RunDirectory:
    """A run directory with its configuration, as a stage begins it."""
    values: dict[str, Any] = {"run": {"name": name, "storage": str(root)}, "data": {"train": "text.txt"}}
    values["model"] = {"family": "llama"} if stage == "pretrain" else {"path": "somewhere"}
    if stage in ("pretrain", "finetune", "tune"):
        values["training"] = TRAINING
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    if stage == "serve":
        del values["data"]
    run = RunDirectory(stage, validate(STAGES[stage], values, "test"))
    run.create()
    return run


def record(directory: Path, steps: int, slope: float = 0.01, ranks: int = 2) -> None:
    """Metrics of ``steps`` steps, written by the recorder that training uses."""
    recorder = MetricsRecorder(directory, 0, "test")
    for step in range(1, steps + 1):
        line = {
            "step": step, "tokens": 128 * step, "samples": 4 * step, "loss": 5.0 - slope * step + 0.001 * (step % 3),
            "learning_rate": 1e-3, "gradient_norm": 1.25, "tokens_per_second": 1000.0, "mfu": 0.21,
            "data_wait_seconds": 0.0, "checkpoint_seconds": 0.0, "memory_bytes": [600_000_000 + step] * ranks,
        }  # fmt: skip
        recorder.record(line | ({"validation_loss": 5.1 - slope * step} if step % 10 == 0 else {}))
    recorder.close()


def finish(run: RunDirectory, **values: Any) -> None:
    run.write_report(
        {
            "finished": True, "step": 40, "exported_step": 40, "tokens": 5120, "validation_loss": 4.7,
            "best_validation_loss": 4.7, "logits_difference": 0.0, "stopped_early": False, "skipped": [],
            "restarts": [], "bits_per_byte": 2.25, **values,
        }
    )  # fmt: skip


class Page(html.parser.HTMLParser):
    """Text, tags, titles and the charts' data of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.charts: list[dict[str, Any]] = []
        self._data = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        self._data = ""

    def handle_data(self, data: str) -> None:
        if self.tags[-1] in ("script", "style"):
            self._data += data
        else:
            self.text += f"{data} "

    def handle_endtag(self, tag: str) -> None:
        if tag == "script" and self._data.startswith("{"):
            self.charts.append(json.loads(self._data))


def read(path: Path) -> Page:
    """The page, which must need nothing from outside and show nothing of Python."""
    content = path.read_text(encoding="utf-8")
    page = Page(content)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert "http://" not in page.text and "https://" not in page.text and "@import" not in content
    for token in ("None", "{'", "True", "False", "nan"):
        assert token not in page.text, page.text
    return page


def test_a_finished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "one")
    record(run.path, 40)
    finish(run)
    page = read(write_report([run.path]))
    for text in ("done", "4.7000", "validation loss, nats a target", "2.2500", "5,120", "1,000", "tokens/s", "21.0%",
                 "600 MB", "0:00:05"):  # fmt: skip
        assert text in page.text, text
    titles = re.findall(r"<figcaption><b>(.*?)</b>", (run.path / "report.html").read_text())
    assert titles == ["loss", "learning rate", "gradient norm", "speed", "MFU"]
    assert [one["name"] for one in page.charts[0]["series"]] == ["training", "validation"]
    assert page.charts[0]["series"][0]["y"][:2] == [pytest.approx(4.991), pytest.approx(4.982)]
    assert page.charts[0]["series"][1]["x"] == [10, 20, 30, 40]
    # One line a rank.
    assert re.search(r"rank\s+largest\s+at the last point\s+0\s+600 MB\s+600 MB\s+1\s+600 MB", page.text)


def test_keys_that_the_optimizer_does_not_read_are_left_out(tmp_path: Path) -> None:
    texts = {}
    for name in ("adamw", "muon", "sgd"):
        run = make_run(tmp_path, name, training={"optimizer": name})
        texts[name] = read(write_report([run.path])).text
    assert "betas" in texts["adamw"] and "momentum" not in texts["adamw"]
    assert "matrix_learning_rate" not in texts["adamw"] and "decay_fraction" not in texts["adamw"]
    assert "matrix_learning_rate" in texts["muon"] and "momentum" in texts["muon"]
    assert "momentum" in texts["sgd"] and "betas" not in texts["sgd"]


def test_a_run_that_failed_or_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, "broken")
    page = read(write_report([run.path]))
    assert "not finished" in page.text and "Nothing has been measured yet" in page.text
    record(run.path, 25)
    with run.held():
        page = read(write_report([run.path]))
        assert "running" in page.text and "25 of 40" in page.text
    events = [
        {"kind": "restart", "step": 12, "text": "workers started again after step 12, rank 1: <b>gone</b>"},
        {"kind": "resume", "step": 10, "text": "goes on from the checkpoint of step 10"},
        {"kind": "anomaly", "step": 18, "text": "step 18: the gradient is not finite"},
        {"kind": "failure", "step": 25, "text": "rank 0: No space left on device"},
    ]
    for event in events:
        append_event(run.path, event)
    page = read(write_report([run.path]))
    assert "failed" in page.text and page.text.count("No space left on device") >= 2
    assert "b" not in page.tags[page.tags.index("table") :], "text of events is escaped"
    for chart in page.charts:
        assert [mark[0] for mark in chart["marks"]] == [12, 10, 18, 25]
    # Four marks on each of the five charts.
    assert page.tags.count("title") == 1 + 4 * 5
    append_event(run.path, {"kind": "interrupted", "step": 25, "text": "interrupted"})
    assert open_run(run.path).status == "interrupted"
    finish(run)
    assert open_run(run.path).status == "done"


def test_restarts_of_an_older_run_are_read_from_its_report(tmp_path: Path) -> None:
    run = make_run(tmp_path, "old")
    record(run.path, 40)
    finish(run, restarts=["step 17, rank 0: it died", "a worker died"])
    assert [mark[0] for mark in read(write_report([run.path])).charts[0]["marks"]] == [17]
    assert [event["step"] for event in open_run(run.path).events] == [17, 0]


def test_runs_are_overlaid_and_their_differences_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = make_run(tmp_path / "a", "run", training={"learning_rate": 1e-3})
    second = make_run(tmp_path / "b", "run", training={"learning_rate": 2e-3, "optimizer": "muon"})
    for run, slope in ((first, 0.01), (second, 0.02)):
        record(run.path, 40, slope)
        finish(run)
    found = differing(open_runs([first.path, second.path]))
    assert found == {
        "training.optimizer": ["adamw", "muon"],
        "training.learning_rate": ["0.001", "0.002"],
        "training.matrix_learning_rate": ["", "0.02"],
        "training.momentum": ["", "0.95"],
    }
    assert main(["report", str(first.path), str(second.path)]) == 0
    page = read(tmp_path / "report.html")
    assert not (first.path / "report.html").exists()
    assert len(page.charts) == 6
    assert all([one["name"] for one in chart["series"]] == ["a/run", "b/run"] for chart in page.charts)
    assert len({one["colour"] for one in page.charts[0]["series"]}) == 2
    assert re.search(r"training\.learning_rate\s+0\.001\s+0\.002", page.text)
    assert main(["report", str(first.path), str(second.path), "--output", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == (tmp_path / "report.html").read_text()


def test_a_search_shows_its_trials(tmp_path: Path) -> None:
    run = make_run(tmp_path, "search", "tune", tuning={"space": {"training.learning_rate": {"uniform": [1e-4, 1e-3]}}})
    for number in range(2):
        directory = run.path / "trials" / f"trial-{number:03d}"
        directory.mkdir(parents=True)
        record(directory, 40, 0.01 * (number + 1), ranks=1)
    rows = [
        {"trial": 0, "training.learning_rate": 1.23456e-4, "step": 40, "validation_loss": 4.7, "status": "finished"},
        {"trial": 1, "training.learning_rate": 0.0009, "step": None, "validation_loss": None, "status": "failed"},
    ]
    run.write_report({"best": rows[0], "trials": rows, "concurrent_trials": 2})
    page = read(write_report([run.path]))
    assert [one["name"] for one in page.charts[0]["series"]] == ["trial 0", "trial 1"]
    assert re.search(r"0\s+0\.0001235\s+40\s+4\.7000\s+finished\s+1\s+0\.0009\s+–\s+–\s+failed", page.text)


REPORTS = {
    "evaluate": (
        {"accuracy": 91.25, "macro_f1": 90.0, "texts": 40, "texts_per_second": 12.0, "workers": 2, "seconds": 3.0,
         "labels": {"home": {"precision": 91.0, "recall": 92.5, "f1": 91.7, "texts": 20}},
         "confusion": {"home": {"home": 17, "<away>": 3}, "<away>": {"<away>": 20}}},
        ["91.25%", "recall, %", "92.5", "home", "Confusion", "home <away> home 17 3 <away> 0 20"],
    ),
    "compress": (
        {"threads": 2, "logits_cosine": 0.9999,
         "before": {"engine": "transformers fp32", "weight_bytes": 4e6, "resident_bytes": 1e8, "peak_bytes": 2e8,
                    "tokens_per_second": {"1": 100.0, "8": 300.0}, "bits_per_byte": 1.5},
         "after": {"engine": "OpenVINO int8", "weight_bytes": 1e6, "resident_bytes": 9e7, "peak_bytes": 2e8,
                   "tokens_per_second": {"1": 200.0, "8": 600.0}, "bits_per_byte": 1.5},
         "greedy_agreement": {"identical_outputs": 0.5, "tokens_before_first_difference": 0.75}},
        ["4x smaller", "tokens/s", "smaller", "50% of the prompts"],
    ),
    "serve": (
        {"url": "x", "start_seconds": 12.5, "served_seconds": 75.0, "requests": 3, "finished": 3, "cancelled": 0,
         "failed": 0, "prompt_tokens": 1234, "generated_tokens": 99},
        ["1,234", "tokens generated", "12.5", "0:01:15"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", REPORTS)
def test_the_other_stages(tmp_path: Path, stage: str) -> None:
    run = make_run(tmp_path, "run", stage)
    report, expected = REPORTS[stage]
    run.write_report({"model": "somewhere", **report})
    page = read(write_report([run.path]))
    for text in expected:
        assert text in page.text, text
    assert not page.charts


def test_models_of_other_tools_are_drawn_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "run", "compress")
    run.write_report({"model": "somewhere", **REPORTS["compress"][0]})
    points = tmp_path / "points.json"
    given = {"name": "llama.cpp Q8_0", "quality_ratio": 1.02, "megabytes": 2.5, "p50_milliseconds": 4.0}
    points.write_text(json.dumps([given]))
    write_report([run.path], beside=points)
    # Of its ratio and the original's 1.5 bits per byte.
    titles = re.findall(r"<title>(llama\.cpp [^<]*)</title>", (run.path / "report.html").read_text())
    assert titles == ["llama.cpp Q8_0: 2.5, 1.53", "llama.cpp Q8_0: 4, 1.53"]
    for wrong, expected in (
        ({}, "found no points, allowed: a JSON list"),
        ([given | {"megabytes": -1}], "entry 0: megabytes: found -1, allowed: a number above 0"),
        ([given, {"name": "x", "quality": 1.0}], "entry 1: found name, quality; needed: quality or quality_ratio, and"),
    ):
        points.write_text(json.dumps(wrong))
        assert main(["report", str(run.path), "--beside", str(points)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and expected in error
    points.write_text(json.dumps([given]))
    with pytest.raises(UserError, match="--beside: allowed with one finished run that compressed"):
        write_report([make_run(tmp_path, "other").path], beside=points)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "run")
    for arguments, expected in (
        ([tmp_path / "nowhere"], "no such directory"),
        ([tmp_path], "is no run directory (no config.yaml)"),
        ([run.path, run.path], "given twice"),
        ([run.path, "--output", tmp_path / "missing" / "x.html"], "cannot be written"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and expected in error
    (run.path / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"report\.json: is damaged"):
        write_report([run.path])


def test_thinning_keeps_peaks_and_ends() -> None:
    points = [(float(x), math.sin(x / 100)) for x in range(10_000)]
    points[4321] = (4321.0, 9.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2 and kept == sorted(kept)
    assert kept[0] == points[0] and kept[-1] == points[-1] and points[4321] in kept
    assert thinned(points[:100]) == points[:100]


def test_smoothing_has_no_bias_at_the_start() -> None:
    assert smoothed([3.0] * LEAST_SMOOTHED, 0.9) == pytest.approx([3.0] * LEAST_SMOOTHED)
    assert smoothed([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])
    assert smoothed([1.0, 5.0, 2.0], 0.0) == [1.0, 5.0, 2.0]


def test_of_many_labels_the_most_frequent_confusions_stand_on_the_page() -> None:
    rows = {f"label{i}": {f"label{i}": 9, f"label{(i + 1) % 25}": i} for i in range(1, 25)}
    shown = confusion({"confusion": rows})
    assert shown.index("label24") < shown.index("label23") and "25 labels" in shown
    assert "72.7" in shown and confusion({}) == ""
