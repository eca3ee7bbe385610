"""Trackers of experiments: TensorBoard, Weights & Biases, MLflow. Rank 0 tells them the run's configuration, its
metrics by step, and its final figures.

They write into the run directory unless their own variables name a server (``WANDB_MODE``, ``MLFLOW_TRACKING_URI``).
A run that goes on is the same run there: its id follows from the run directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raylm.errors import UserError

if TYPE_CHECKING:
    from raylm.config.stages import TrainConfig

# Tracker -> the package that it is in, and what installs that.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
PROJECT = "raylm"
# What MLflow takes of a parameter's value, and how many at once.
MLFLOW_VALUE, MLFLOW_BATCH = 6000, 100


class Tracker(Protocol):
    """Where a run's figures go."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Metrics after ``step`` steps, all of them finite."""

    def finish(self, final: dict[str, float]) -> None:
        """The run's final figures."""

    def close(self) -> None:
        """Flush everything; the run may go on later."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UserError: one line with the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"run.trackers: found {name}, whose package is not installed: python -m pip install {PACKAGES[name]}, "
                "or leave it out"
            )


def open_trackers(config: TrainConfig, directory: Path, start_step: int) -> list[Tracker]:
    """The trackers of a run.

    Args:
        directory: the run directory.
        start_step: step that training goes on from.
    """
    values = config.model_dump(mode="json")
    name = config.run.name if directory.name == config.run.name else f"{config.run.name}/{directory.name}"
    found: list[Tracker] = []
    for kind in dict.fromkeys(config.run.trackers):
        if kind == "tensorboard":
            found.append(TensorBoard(directory, start_step, values))
        elif kind == "wandb":
            found.append(WeightsAndBiases(directory, name, values))
        else:
            found.append(MLflow(directory, name, values))
    return found


def flattened(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections as dotted keys with their values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of the ``values``, sections included, that are finite numbers."""
    return {
        key: float(value)
        for key, value in flattened(values)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


class TensorBoard:
    """Event files in ``<run>/tensorboard``."""

    def __init__(self, directory: Path, start_step: int, config: dict[str, Any] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1)
        if config is not None:
            self._write_table("configuration", dict(flattened(config)))

    def _write_table(self, title: str, values: Mapping[str, Any]) -> None:
        # TensorBoard shows Markdown.
        lines = ["| key | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in values.items())]
        self._writer.add_text(title, "\n".join(lines))

    def log(self, step: int, values: dict[str, float]) -> None:
        """See :class:`Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, final: dict[str, float]) -> None:
        """See :class:`Tracker`."""
        self._write_table("final", final)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


def run_id(directory: Path) -> str:
    """An id that every start of the run in this directory has, and no other run."""
    return hashlib.sha256(str(directory).encode()).hexdigest()[:16]


class WeightsAndBiases:
    """A run of wandb's project ``raylm`` (or ``WANDB_PROJECT``)."""

    def __init__(self, directory: Path, name: str, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=run_id(directory),
            resume="allow",
            dir=str(directory),
            config=config,
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # By its own count, wandb drops what comes at a step again, as it does after a rollback.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """See :class:`Tracker`."""
        self._run.log({"step": step, **values})

    def finish(self, final: dict[str, float]) -> None:
        """See :class:`Tracker`."""
        self._run.summary.update({f"final/{name}": value for name, value in final.items()})

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._run.finish()


class MLflow:
    """A run of MLflow's experiment ``raylm`` (or ``MLFLOW_EXPERIMENT_NAME``).

    A server that does not answer costs the figures that it did not get, not the run.
    """

    def __init__(self, directory: Path, name: str, config: dict[str, Any]) -> None:
        # Read when it is imported; without it, MLflow 3 refuses to write files.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunStatus

        self._client = MlflowClient(
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or (directory / "mlruns").as_uri()
        )
        self._run, self._told = "", False
        with self._asking():
            self._run, is_new = self._open(run_id(directory), name)
            if is_new:
                parameters = [Param(key, str(value)[:MLFLOW_VALUE]) for key, value in flattened(config)]
                for first in range(0, len(parameters), MLFLOW_BATCH):
                    self._client.log_batch(self._run, params=parameters[first : first + MLFLOW_BATCH])
            else:
                self._client.set_terminated(self._run, RunStatus.to_string(RunStatus.RUNNING))

    def _open(self, own: str, name: str) -> tuple[str, bool]:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        place = known.experiment_id if known is not None else self._client.create_experiment(experiment)
        found = self._client.search_runs([place], f"tags.`raylm.id` = '{own}'")
        if found:
            return found[0].info.run_id, False
        return self._client.create_run(place, run_name=name, tags={"raylm.id": own}).info.run_id, True

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if not self._told:
                self._told = True
                print(f"raylm: MLflow did not take all figures: {str(error).splitlines()[0]}", flush=True)

    def _log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        if self._run:
            with self._asking():
                self._client.log_batch(self._run, metrics=[Metric(k, value, now, step) for k, value in values.items()])

    def log(self, step: int, values: dict[str, float]) -> None:
        """See :class:`Tracker`."""
        self._log(values, step)

    def finish(self, final: dict[str, float]) -> None:
        """See :class:`Tracker`."""
        self._log({f"final/{name}": value for name, value in final.items()}, int(final.get("step", 0)))

    def close(self) -> None:
        """See :class:`Tracker`."""
        if self._run:
            with self._asking():
                self._client.set_terminated(self._run)
