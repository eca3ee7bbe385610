"""What Prometheus sees of a server: the figures that vLLM made customary, under the same names with ``raylm_`` before.

Each figure goes two ways: to Ray's own exporter, which every node of a cluster has (there with ``ray_`` before the name
and the replica's id as a label), and to ``/metrics``, which shows the replica that answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest

from raylm.serving.engines.stats import EngineStats

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
# Seconds, up to what a long answer takes on a slow CPU.
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True)
class Definition:
    """One figure: its kind, what it says, its labels, and a histogram's upper bounds."""

    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()


# Names as they are exported.
DEFINITIONS: dict[str, Definition] = {
    "raylm_num_requests_running": Definition("gauge", "Texts that the engine has in work"),
    "raylm_num_requests_waiting": Definition("gauge", "Texts that wait for a place in the engine"),
    "raylm_kv_cache_usage_perc": Definition("gauge", "Share of the key-value cache in use, 0 to 1"),
    "raylm_prompt_tokens_total": Definition("counter", "Tokens of prompts"),
    "raylm_generation_tokens_total": Definition("counter", "Tokens generated"),
    "raylm_request_success_total": Definition(
        "counter",
        "Texts that ended: stop, length, abort (the client left), error",
        ("model", "finished_reason"),
    ),
    "raylm_time_to_first_token_seconds": Definition(
        "histogram", "From a text's entry into the queue to its first token", buckets=_FIRST
    ),
    "raylm_time_per_output_token_seconds": Definition(
        "histogram", "Mean time between the tokens of a text after the first", buckets=_EACH
    ),
    "raylm_e2e_request_latency_seconds": Definition(
        "histogram", "From a text's entry into the queue to its end", buckets=_WHOLE
    ),
    "raylm_http_requests_total": Definition("counter", "HTTP requests, by route and status", ("route", "status")),
}


@dataclass(frozen=True)
class TextTiming:
    """How long one text took, in seconds from its entry into the queue.

    Attributes:
        reason: ``stop``, ``length``, ``abort`` or ``error``.
        first: to the first token; None where none came.
        whole: to the end.
        tokens: how many were generated.
    """

    reason: str
    first: float | None
    whole: float
    tokens: int

    @property
    def each(self) -> float | None:
        """Mean time between tokens; None below two tokens."""
        return (self.whole - self.first) / (self.tokens - 1) if self.first is not None and self.tokens > 1 else None


class Measured(Protocol):
    """A model with a name and an engine that counts."""

    @property
    def name(self) -> str: ...

    def load(self) -> EngineStats: ...


class ServerMetrics:
    """The figures of one replica.

    Args:
        export: hand them to Ray's exporter as well; needs a Ray process.
    """

    def __init__(self, *, export: bool) -> None:
        self._registry = CollectorRegistry()
        self._page = {name: _page_metric(name, definition, self._registry) for name, definition in DEFINITIONS.items()}
        self._ray = {name: _ray_metric(name, definition) for name, definition in DEFINITIONS.items()} if export else {}
        self._seen: dict[tuple[str, str], int] = {}

    def text(self, model: str, timing: TextTiming) -> None:
        """Count a text that has ended."""
        self._add("raylm_request_success_total", 1, model=model, finished_reason=timing.reason)
        if timing.first is not None:
            self._observe("raylm_time_to_first_token_seconds", timing.first, model=model)
        if timing.each is not None:
            self._observe("raylm_time_per_output_token_seconds", timing.each, model=model)
        if timing.reason != "abort":
            self._observe("raylm_e2e_request_latency_seconds", timing.whole, model=model)

    def http(self, route: str, status: int | None) -> None:
        """Count an HTTP request; a status of None is a client that left before there was an answer (nginx's 499)."""
        self._add("raylm_http_requests_total", 1, route=route, status=str(status or 499))

    def publish(self, services: Sequence[Measured]) -> None:
        """Bring what the engines count themselves up to date."""
        for service in services:
            stats = service.load()
            self._set("raylm_num_requests_running", stats.running, model=service.name)
            self._set("raylm_num_requests_waiting", stats.waiting, model=service.name)
            if stats.cache_usage is not None:
                self._set("raylm_kv_cache_usage_perc", stats.cache_usage, model=service.name)
            for name, total in (
                ("raylm_prompt_tokens_total", stats.prompt_tokens),
                ("raylm_generation_tokens_total", stats.generated_tokens),
            ):
                new = total - self._seen.get((name, service.name), 0)
                self._seen[name, service.name] = total
                self._add(name, new, model=service.name)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def _add(self, name: str, value: int, **labels: str) -> None:
        self._page[name].labels(**labels).inc(value)
        if value and self._ray:
            self._ray[name].inc(value, tags=labels)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._page[name].labels(**labels).set(value)
        if self._ray:
            self._ray[name].set(value, tags=labels)

    def _observe(self, name: str, value: float, **labels: str) -> None:
        self._page[name].labels(**labels).observe(value)
        if self._ray:
            self._ray[name].observe(value, tags=labels)


def _page_metric(name: str, definition: Definition, registry: CollectorRegistry):
    if definition.kind == "histogram":
        return prometheus_client.Histogram(
            name, definition.help, definition.labels, buckets=definition.buckets, registry=registry
        )
    kind = {"gauge": prometheus_client.Gauge, "counter": prometheus_client.Counter}[definition.kind]
    return kind(name, definition.help, definition.labels, registry=registry)


def _ray_metric(name: str, definition: Definition):
    # Serve's own kinds: they add the deployment, the application and the replica as labels.
    from ray.serve import metrics

    if definition.kind == "histogram":
        boundaries = list(definition.buckets)
        return metrics.Histogram(name, definition.help, boundaries=boundaries, tag_keys=definition.labels)
    kind = {"gauge": metrics.Gauge, "counter": metrics.Counter}[definition.kind]
    return kind(name, definition.help, tag_keys=definition.labels)
