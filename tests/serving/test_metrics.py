"""Figures reach /metrics, Ray's exporter and the dashboard under the same names; requests leave log lines."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from raylm.serving.http.metrics import DEFINITIONS, ServerMetrics, TextTiming

API_KEY = "a-key-for-the-tests-0001"
DASHBOARD = Path(__file__).resolve().parents[2] / "cluster" / "grafana" / "serving.json"


def page(url: str, key: str | None = API_KEY) -> str:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
        return response.read().decode()


def values(text: str, name: str, **labels: str) -> list[float]:
    """The samples called ``name`` that have ``labels``."""
    return [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def samples(text: str, name: str, **labels: str) -> float:
    """Their sum; there must be one."""
    found = values(text, name, **labels)
    assert found, f"no {name} with {labels}"
    return sum(found)


def test_timings_of_a_text() -> None:
    metrics = ServerMetrics(export=False)
    metrics.text("m", TextTiming("stop", 0.2, 1.2, 11))
    metrics.text("m", TextTiming("abort", None, 0.1, 0))
    text = metrics.page().decode()
    assert samples(text, "raylm_time_to_first_token_seconds_sum", model="m") == pytest.approx(0.2)
    assert samples(text, "raylm_time_per_output_token_seconds_sum", model="m") == pytest.approx(0.1)
    assert samples(text, "raylm_request_success_total", finished_reason="abort") == 1
    assert samples(text, "raylm_e2e_request_latency_seconds_count", model="m") == 1


def test_the_dashboard_shows_what_is_exported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {re.sub(r"_bucket$", "", name) for text in targets for name in re.findall(r"ray_(raylm_\w+)", text)}
    assert shown == set(DEFINITIONS)


@pytest.mark.slow
def test_metrics_of_a_server(server: SimpleNamespace, ray_instance: Any) -> None:
    for name in ("tiny", "other"):
        server.client.completions.create(model=name, prompt="the quick brown fox", max_tokens=9, temperature=0)
    text = page(f"{server.url}/metrics")
    assert samples(text, "raylm_generation_tokens_total", model="tiny") >= 9
    assert samples(text, "raylm_time_to_first_token_seconds_count", model="other") >= 1
    assert samples(text, "raylm_num_requests_running", model="tiny") == 0
    assert samples(text, "raylm_request_success_total", finished_reason="length") >= 2
    openvino = "tiny" if server.engine == "openvino" else "other"
    assert 0 <= samples(text, "raylm_kv_cache_usage_perc", model=openvino) <= 1
    assert samples(text, "raylm_http_requests_total", route="/v1/completions", status="200") >= 2
    with pytest.raises(urllib.error.HTTPError, match="401"):
        page(f"{server.url}/metrics", key=None)

    node = ray_instance.nodes()[0]
    exporter = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def exported() -> float:
        name = "ray_raylm_generation_tokens_total"
        return sum(values(page(exporter, key=None), name, model="tiny", application="raylm"))

    # Other servers of this session may have left figures there already.
    end = time.monotonic() + 60
    while exported() < 9:
        assert time.monotonic() < end, "Ray's exporter does not have the figures"
        time.sleep(1)
    assert "ray_raylm_time_to_first_token_seconds_bucket" in page(exporter, key=None)


@pytest.mark.slow
def test_a_request_leaves_one_line_without_secrets(server: SimpleNamespace) -> None:
    body = {"model": "tiny", "prompt": "a secret prompt", "max_tokens": 5, "temperature": 0}
    server.client.completions.create(**body, extra_headers={"X-Request-Id": "look-for-me"})
    end = time.monotonic() + 60
    while "look-for-me" not in (text := "".join(path.read_text() for path in (server.run / "logs").glob("*.jsonl"))):
        assert time.monotonic() < end, "the request left no line"
        time.sleep(0.1)
    (line,) = [entry for entry in map(json.loads, text.splitlines()) if entry["id"] == "look-for-me"]
    assert line["key"] == "tester"
    assert (line["status"], line["model"], line["completion_tokens"], line["texts"]) == (200, "tiny", 5, 1)
    assert (line["finish_reason"], line["path"]) == ("length", "/v1/completions")
    assert 0 < line["first_token_milliseconds"] <= line["milliseconds"]
    assert API_KEY not in text
    assert "secret" not in text
