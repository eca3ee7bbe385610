"""A run's figures as gauges of Ray's exporter, which Prometheus reads: ``ray_raylm_METRIC`` with the label ``run``.

Ray's exporter shows a gauge for about 20 seconds after it was set (twice ``metrics_report_interval_ms``), and shows no
NaN and no infinity. So the last values are set again and again while the process lives, and one gauge says whether they
are finite. Without Ray nothing happens.
"""

from __future__ import annotations

import contextlib
import math
import threading
from pathlib import Path
from typing import Any

# Below Ray's interval of 10 s, so that no export finds a gauge unset.
REFRESH_SECONDS = 5.0
# Beside the metrics of a line: how far the run is, when its newest checkpoint was whole (seconds since 1970), and
# whether loss and gradient are finite (1 or 0).
STEP, SAVED, FINITE = "step", "last_checkpoint_timestamp_seconds", "finite"
# Metric -> what one of its places is called.
Places = dict[str, str]


def gauge_labels(curves: tuple[str, ...], places: Places) -> dict[str, tuple[str, ...]]:
    """Metric -> labels of its gauge; Ray adds labels of its own."""
    return dict.fromkeys((*curves, STEP, SAVED, FINITE), ("run",)) | dict.fromkeys(places, ("run", "place"))


class Gauges:
    """The gauges of one run; a thread sets them until :meth:`close`.

    Args:
        run: the label.
        latest: the file that is written when a checkpoint is whole. Of a run on remote storage it is not there, and no
            gauge tells of it.
        labels: of :func:`gauge_labels`.
        places: metrics that are lists, one number a place.
    """

    def __init__(self, run: str, latest: Path, labels: dict[str, tuple[str, ...]], places: Places) -> None:
        self._run, self._latest, self._places = run, latest, places
        self._values: dict[tuple[str, str], float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._gauges = _make(labels)
        self._thread = threading.Thread(target=self._refresh, name="raylm-gauges", daemon=True)
        if self._gauges:
            self._thread.start()

    def show(self, metrics: dict[str, Any]) -> None:
        """Set all gauges to what a line of metrics says."""
        if not self._gauges:
            return
        values: dict[tuple[str, str], float] = {
            (name, ""): float(metrics[name]) for name in self._gauges if name in metrics and name not in self._places
        }
        for name, place in self._places.items():
            values |= {(name, f"{place}-{number}"): value for number, value in enumerate(metrics.get(name) or [])}
        values[FINITE, ""] = float(all(math.isfinite(metrics[name]) for name in ("loss", "gradient_norm")))
        with contextlib.suppress(OSError):
            values[SAVED, ""] = self._latest.stat().st_mtime
        with self._lock:
            # What an evaluation measured stays until the next one.
            self._values |= values
        self._set()

    def close(self) -> None:
        """Stop setting them; they vanish."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _refresh(self) -> None:
        while not self._closed.wait(REFRESH_SECONDS):
            self._set()

    def _set(self) -> None:
        with self._lock:
            for (name, place), value in self._values.items():
                if math.isfinite(value):
                    tags = {"run": self._run} | ({"place": place} if place else {})
                    self._gauges[name].set(value, tags=tags)


def _make(labels: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    import ray

    if not ray.is_initialized():
        return {}
    from ray.util.metrics import Gauge

    return {name: Gauge(f"raylm_{name}", f"raylm training: {name}", tag_keys=tags) for name, tags in labels.items()}
