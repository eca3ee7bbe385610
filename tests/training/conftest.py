"""Data for training tests: a small prepared directory, made once by the real prepare stage, and runs as a user starts
them, which tests may then disturb."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from raylm.config.data import DataSection, TokenizerSection
from raylm.data.prepare.stage import prepare_directory
from raylm.training.reports.metrics import read_metrics

PATIENCE_SECONDS = 150.0


@pytest.fixture(scope="session")
def prepared(ray_instance, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte tokens of 200 short documents, a tenth of them held out."""
    root = tmp_path_factory.mktemp("prepared")
    source = root / "documents.txt"
    source.write_text("\n".join(f"{i} apples and {i * i} pears make {i + i * i} fruits in all" for i in range(200)))
    directory = root / "data"
    data = DataSection(train=str(source), text_unit="line", validation_fraction=0.1)
    prepare_directory(directory, data, TokenizerSection(type="byte"))
    return directory


@dataclass
class Run:
    """A pretraining run of a tiny model.

    Attributes:
        config: its YAML file.
        metrics: its metrics.jsonl; with remote storage, the mirror's.
        environment: added to that of the processes.
    """

    config: Path
    metrics: Path
    environment: dict[str, str] = field(default_factory=dict)
    drivers: list[subprocess.Popen] = field(default_factory=list)

    def start(self, *overrides: str) -> subprocess.Popen:
        """Start the command; its output is read by ``communicate``."""
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        driver = subprocess.Popen(
            [sys.executable, "-m", "raylm.cli", "pretrain", str(self.config), *overrides],
            env=environment | self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.drivers.append(driver)
        return driver

    def wait_for_step(self, step: int, driver: subprocess.Popen | None = None) -> None:
        """Wait until ``driver``'s run, or one in this process, has made ``step`` steps."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            lines = read_metrics(self.metrics)
            if lines and lines[-1]["step"] >= step:
                return
            assert driver is None or driver.poll() is None, driver.communicate()
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached")

    def wait_for_restart(self, driver: subprocess.Popen) -> None:
        """Wait until the workers are back, which cut the metrics to their checkpoint."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        # Held open, so that no new file gets its inode.
        with self.metrics.open() as old:
            while os.path.samestat(os.fstat(old.fileno()), self.metrics.stat()):
                assert driver.poll() is None, driver.communicate()
                assert time.monotonic() < deadline, "the workers did not restart"
                time.sleep(0.02)

    def workers(self, driver: subprocess.Popen) -> list[psutil.Process]:
        """The Ray Train worker processes that ``driver`` started, in order of their age."""
        found = []
        for process in psutil.Process(driver.pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda process: process.create_time())

    def losses(self) -> list[float]:
        """Losses of all steps, each of which stands in the metrics once."""
        lines = read_metrics(self.metrics)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]


@pytest.fixture
def make_run(prepared: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """A function from a run's name, and sections to change, to its :class:`Run`."""
    runs = []

    def make(name: str, storage: Path | str = tmp_path, **sections: dict) -> Run:
        values = {
            "run": {"name": name, "storage": str(storage)},
            "data": {"train": str(prepared)},
            "model": {
                "family": "llama",
                "config": {
                    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 2, "tie_word_embeddings": True,
                },
            },
            "training": {"steps": 200, "batch_size": 4, "sequence_length": 32, "log_every_steps": 1},
            "parallel": {"zero_stage": 1},
            "resources": {"workers": 2},
            "checkpoint": {"every_steps": 20, "every_seconds": None},
        }  # fmt: skip
        for section, keys in sections.items():
            values[section] |= keys
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        runs.append(Run(path, Path(storage) / name / "metrics.jsonl"))
        return runs[-1]

    yield make
    for run in runs:
        for driver in run.drivers:
            driver.kill()
