"""What a teacher says to each sample, computed once on Ray Data before training and kept with the run.

Which sample has which number is a pure function of the seed, so that the teacher's answers can be kept by that number:
of each target the likeliest choices with their log-probabilities. Training then holds no teacher, and a run that goes
on, or is done again, does not ask it again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.stages import TrainConfig
from raylm.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from raylm.data.samples.token_samples import Samples
    from raylm.tasks.objective import Batch, Objective

FOLDER = "teacher"
# Samples of a file, and of a pass of the teacher.
SHARD, BATCH_SIZE = 256, 8
# Of a choice: its number, and its log-probability.
CHOICE_BYTES = 4 + 2


def keep_rows(stage: str, config: TrainConfig, model_type: str, run: Path, data: Path, *, use_gpu: bool) -> None:
    """Have what the teacher says to all samples of the run in its directory.

    Args:
        model_type: of the student.
        run: directory of the run, which all nodes see.
        data: directory of the prepared samples.

    Raises:
        UserError: there is not enough disk.
        RunFailure: the teacher failed.
    """
    from raylm.data.prepare.jobs import run_jobs
    from raylm.training.loop.batches import total_steps

    training, objective = config.training, _objective(config, model_type)
    samples = objective.samples(data, "train", training.sequence_length, config.run.seed)
    total = total_steps(training, samples.count) * training.batch_size
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    firsts = [first for first in range(0, total, SHARD) if not shard(folder, first).is_file()]
    jobs = [{"first": first, "stop": min(first + SHARD, total)} for first in firsts]
    _check_room(config, objective, folder, len(jobs) * SHARD)
    run_jobs(
        f"{stage}: asking the teacher", score_shard, jobs, cpus=None, gpus=int(use_gpu), unit="samples",
        weights=[job["stop"] - job["first"] for job in jobs],
        arguments={"config": config, "model_type": model_type, "folder": str(folder), "data": str(data)},
    )  # fmt: skip


def shard(folder: Path, number: int) -> Path:
    """The file that has a sample."""
    return folder / f"{number // SHARD:08d}.npz"


def _objective(config: TrainConfig, model_type: str) -> Objective:
    from raylm.tasks import make_objective

    return make_objective(config.objective, model_type, config.distillation)


def _check_room(config: TrainConfig, objective: Objective, folder: Path, samples: int) -> None:
    assert config.distillation is not None and config.distillation.top_k is not None
    targets = objective.example(config.training.sequence_length)["targets"].shape[1]
    needed, free = samples * targets * config.distillation.top_k * CHOICE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"distillation.top_k: found {config.distillation.top_k}, which takes {needed / 1e9:,.1f} GB in {folder}, "
            f"allowed: what fits into {free / 1e9:,.1f} GB, or null, with which the teacher computes beside the model"
        )


def score_shard(job: dict[str, int], *, config: TrainConfig, model_type: str, folder: str, data: str) -> dict[str, Any]:
    """Ask the teacher about samples ``first`` to ``stop`` - 1, and write the file of what it says."""
    import torch

    from raylm.data.loading import resolve_model
    from raylm.models.loading import load_model
    from raylm.training.loop.batches import training_samples

    section, objective = config.distillation, _objective(config, model_type)
    assert section is not None
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_model(resolve_model(str(section.teacher)), dtype, "distillation.teacher", objective.head)
    teacher = teacher.to(device).eval()
    samples = training_samples(objective, data, config.training, config.run.seed)
    parts = [
        _rows(objective, teacher, samples, np.arange(first, min(first + BATCH_SIZE, job["stop"])), device)
        for first in range(job["first"], job["stop"], BATCH_SIZE)
    ]
    arrays = {name: _stacked([part[name] for part in parts]) for name in ("choices", "log_probabilities")}
    path = shard(Path(folder), job["first"])
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)
    partial.replace(path)
    return {}


def _rows(
    objective: Objective, teacher: PreTrainedModel, samples: Samples, numbers: np.ndarray, device: torch.device
) -> dict[str, np.ndarray]:
    """Of each target the likeliest choices, [samples, targets, k], and their log-probabilities."""
    import torch

    from raylm.training.loop.batches import to_tensors

    section, batch = objective.distillation, to_tensors(samples, numbers, device)
    assert section is not None and section.top_k is not None
    with torch.inference_mode():
        rows, _ = objective.choices(objective.logits(teacher, batch), batch["targets"])
        likely = torch.log_softmax(rows.float() / section.temperature, dim=-1).topk(min(section.top_k, rows.shape[-1]))
    shape = (len(numbers), batch["targets"].shape[1], -1)
    return {
        "choices": likely.indices.reshape(shape).int().cpu().numpy(),
        "log_probabilities": likely.values.reshape(shape).half().cpu().numpy(),
    }


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Batches [samples, targets, k] as one: what is shorter is filled up, as padding is, where no target counts."""
    longest = max(part.shape[1] for part in parts)
    return np.concatenate([_fitted(part, longest) for part in parts])


def _fitted(rows: np.ndarray, targets: int) -> np.ndarray:
    missing = targets - rows.shape[1]
    return rows[:, :targets] if missing <= 0 else np.pad(rows, ((0, 0), (0, missing), (0, 0)))


class TaughtSamples:
    """Samples with what the teacher says to them; see :class:`raylm.data.samples.token_samples.Samples`.

    Adds ``teacher_choices``, int32 [n, targets, k], and ``teacher_log_probabilities``, float16, to each batch.
    """

    def __init__(self, samples: Samples, run: Path) -> None:
        self.count = samples.count
        self._samples, self._folder = samples, run / FOLDER
        self._open: dict[Path, dict[str, np.ndarray]] = {}

    def batch(self, indices: np.ndarray) -> Batch:
        """Samples by global number."""
        found: dict[str, Any] = dict(self._samples.batch(indices))
        targets = found["targets"].shape[1]
        for name in ("choices", "log_probabilities"):
            rows = [self._read(int(number), name)[None] for number in indices]
            found[f"teacher_{name}"] = np.concatenate([_fitted(row, targets) for row in rows])
        return found

    def _read(self, number: int, name: str) -> np.ndarray:
        path = shard(self._folder, number)
        if path not in self._open:
            # A rank reads its samples in order; the other is the first, which fills up batches.
            for old in list(self._open)[:-1]:
                del self._open[old]
            with np.load(path) as arrays:
                self._open[path] = dict(arrays)
        return self._open[path][name][number % SHARD]
