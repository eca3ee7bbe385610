"""Where metrics go: ``metrics.jsonl``, :mod:`.trackers`, Ray's exporter (:mod:`.gauges`) and the driver's bar.

Only rank 0 has a recorder. After a resume the file is cut back to the checkpoint's step, so that each step stands in
it once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylm.config.run_directory import parse_object, write_atomically
from raylm.tasks.measures import MEASURES, VALIDATION
from raylm.training.reports.gauges import Gauges, gauge_labels
from raylm.training.reports.trackers import TensorBoard, Tracker, finite_numbers

# Metrics that are curves; the others (step, tokens, samples, time) are their axes.
CURVES = (
    "loss",
    "validation_loss",
    *(f"{VALIDATION}{name}" for name in MEASURES),
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "mfu",
    "data_wait_seconds",
    "checkpoint_seconds",
)

# Metrics that every line has, as numbers.
ALWAYS = ("step", "tokens", "samples", "loss", "gradient_norm", "tokens_per_second")

# Metrics of which each rank or pipeline stage has its own -> what such a place is called.
PER_PLACE = {"memory_bytes": "rank", "stage_idle": "stage"}


class MetricsRecorder:
    """Appends one object a line to ``<run>/metrics.jsonl`` and mirrors it elsewhere.

    Args:
        directory: the run directory.
        start_step: step that training goes on from; later lines of an interrupted attempt are dropped.
        run_name: tag of the dashboard's gauges.
        progress: Ray actor handle with an ``update`` method, or None.
        trackers: TensorBoard alone by default.
    """

    def __init__(
        self,
        directory: Path,
        start_step: int,
        run_name: str,
        progress: Any = None,
        trackers: Sequence[Tracker] | None = None,
    ) -> None:
        self.path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._stream = self.path.open("a", encoding="utf-8")
        self._trackers = [TensorBoard(directory, start_step)] if trackers is None else trackers
        from raylm.training.checkpoints.store import LATEST

        labels = gauge_labels(CURVES, PER_PLACE)
        self._gauges = Gauges(run_name, directory / "checkpoints" / LATEST, labels, PER_PLACE)
        self._progress = progress

    def record(self, metrics: dict[str, Any], checkpoint: int | None = None) -> None:
        """Write one line.

        Args:
            metrics: ``step`` and what was measured there.
            checkpoint: step of the newest checkpoint, for the driver.
        """
        line = {**metrics, "time": time.time()}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        values = {name: metrics[name] for name in CURVES if name in metrics}
        for name, tag in PER_PLACE.items():
            values |= {f"{name}/{tag}-{place}": value for place, value in enumerate(metrics.get(name) or [])}
        for tracker in self._trackers:
            tracker.log(metrics["step"], finite_numbers(values))
        self._gauges.show(metrics)
        if self._progress is not None:
            self._progress.update.remote(line | {"checkpoint_step": checkpoint})

    def finish(self, final: dict[str, Any]) -> None:
        """Tell the trackers the run's final metrics."""
        for tracker in self._trackers:
            tracker.finish(finite_numbers(final))

    def close(self) -> None:
        """Flush everything."""
        self._gauges.close()
        self._stream.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` up to the first that was cut off or is damaged; none without a file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        found = parse_object(line)
        if found is None or not all(isinstance(found.get(name), int | float) for name in ALWAYS):
            break
        lines.append(found)
    return lines
