"""Dashboards and rules ask for figures that raylm or Ray exports, and the rules fire when they should."""

from __future__ import annotations

import importlib.resources
import json
import math
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from raylm.serving.http.metrics import DEFINITIONS
from raylm.training.reports.gauges import FINITE, SAVED, gauge_labels
from raylm.training.reports.metrics import CURVES, PER_PLACE, MetricsRecorder
from tests.cluster_files.manifests import CLUSTER

ALERTS = CLUSTER / "alerts.yaml"
DASHBOARDS = sorted((CLUSTER / "grafana").glob("*.json"))
METRIC = re.compile(r"\bray_[a-z0-9_]+\b")
LABEL = re.compile(r"(?:by|on) \(([^)]*)\)|[{,]\s*(\w+)\s*(?:=~|!~|!=|=)")
# What Ray, Prometheus or the scrape adds to each figure.
OTHERS = {"le", "instance", "application", "deployment", "replica"}


def expressions() -> list[tuple[str, str]]:
    """(file, PromQL) of all dashboards and rules."""
    found = [
        (path.name, target["expr"])
        for path in DASHBOARDS
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
        for target in panel["targets"]
    ]
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return found + [(ALERTS.name, rule["expr"]) for group in groups for rule in group["rules"]]


def ours() -> dict[str, set[str]]:
    """Metric as Ray exports it -> its labels."""
    found = {f"ray_raylm_{name}": set(labels) for name, labels in gauge_labels(CURVES, PER_PLACE).items()}
    for name, definition in DEFINITIONS.items():
        for end in ("_bucket", "_sum", "_count") if definition.kind == "histogram" else ("",):
            found[f"ray_{name}{end}"] = set(definition.labels)
    return found


@pytest.fixture(scope="module")
def rays() -> str:
    """Ray's own code about metrics: they are not listed anywhere."""
    root = Path(str(importlib.resources.files("ray")))
    folders = ("dashboard/modules", "serve/_private", "train/v2/_internal/metrics")
    return "\n".join(path.read_text("utf-8") for folder in folders for path in sorted((root / folder).rglob("*.py")))


@pytest.mark.parametrize(("file", "text"), expressions())
def test_the_figures_are_exported(file: str, text: str, rays: str) -> None:
    known = ours()
    labels = {"ray_train_run_name", "ray_train_controller_state"}
    names = set(METRIC.findall(re.sub(r"by \([^)]*\)", "", text)))
    assert names
    for name in names:
        if name.startswith("ray_raylm_"):
            assert name in known, name
            labels |= known[name]
        else:
            # In Ray's code without what its exporter adds.
            bare = name.removeprefix("ray_").removesuffix("_total")
            assert re.search(rf'["\'(](ray_)?{bare}\b|\b{name}\b', rays), name
    for several, one in LABEL.findall(text):
        asked = {label.strip() for label in (several or one).split(",")}
        assert asked <= labels | OTHERS, asked


def test_a_figure_that_nobody_exports_is_found(rays: str) -> None:
    with pytest.raises(AssertionError, match="ray_raylm_losses"):
        test_the_figures_are_exported("", "sum by (run) (ray_raylm_losses)", rays)
    with pytest.raises(AssertionError, match="ray_node_moods"):
        test_the_figures_are_exported("", "ray_node_moods > 3", rays)
    with pytest.raises(AssertionError, match="runs"):
        test_the_figures_are_exported("", "sum by (runs) (ray_raylm_loss)", rays)


def test_the_training_dashboard_shows_all_that_training_exports() -> None:
    shown = {name for file, text in expressions() if file == "training.json" for name in METRIC.findall(text)}
    assert {f"ray_raylm_{name}" for name in gauge_labels(CURVES, PER_PLACE)} <= shown


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_a_dashboard_is_whole(path: Path) -> None:
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= variables | {"__rate_interval"}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places) and all(0 <= x <= 16 for x, _ in places)


def test_two_dashboards_do_not_take_each_others_place() -> None:
    uids = [json.loads(path.read_text(encoding="utf-8"))["uid"] for path in DASHBOARDS]
    assert len(uids) == len(set(uids)) == 2


def test_every_rule_says_what_it_is_about() -> None:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    tested = (Path(__file__).parent / "alerts_test.yaml").read_text(encoding="utf-8")
    for rule in rules:
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["alert"] in tested


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not there")
def test_the_rules_fire_when_they_should() -> None:
    for command in (["check", "rules", str(ALERTS)], ["test", "rules", "alerts_test.yaml"]):
        found = subprocess.run(
            ["promtool", *command], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
        )
        assert found.returncode == 0, found.stdout + found.stderr


def test_a_recorder_without_ray_has_no_gauges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    recorder = MetricsRecorder(tmp_path, 0, "alone")
    recorder.record(LINE)
    recorder.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == LINE["step"]


LINE = {
    "step": 7, "tokens": 8, "samples": 2, "loss": math.nan, "gradient_norm": 1.0, "tokens_per_second": 10.0,
    "memory_bytes": [5, 6],
}  # fmt: skip


@pytest.mark.slow
def test_a_runs_figures_reach_rays_exporter_and_stay(tmp_path: Path, ray_instance: Any) -> None:
    """Ray forgets a gauge 20 seconds after it was set, and drops what is not finite."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "LATEST").write_text("step-00000007\n")
    recorder = MetricsRecorder(tmp_path, 0, "watched")
    recorder.record(LINE)
    node = ray_instance.nodes()[0]
    exporter = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def shown() -> dict[tuple[str, str | None], float]:
        with urllib.request.urlopen(exporter, timeout=30) as response:
            text = response.read().decode()
        return {
            (sample.name, sample.labels.get("place")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("run") == "watched"
        }

    began = time.monotonic()
    while not (found := shown()) or time.monotonic() < began + 40:
        assert time.monotonic() < began + 90, "Ray's exporter does not have the figures"
        time.sleep(1)
    assert found["ray_raylm_step", None] == 7
    assert found["ray_raylm_memory_bytes", "rank-1"] == 6
    assert abs(found[f"ray_raylm_{SAVED}", None] - time.time()) < 180
    assert found[f"ray_raylm_{FINITE}", None] == 0
    assert ("ray_raylm_loss", None) not in found
    recorder.close()
    while shown():
        assert time.monotonic() < began + 150, "the figures of a run that has ended are still there"
        time.sleep(1)
