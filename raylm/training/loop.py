"""The training loop of one rank: the same for Ray Train workers and for a Ray Tune trial that trains inside itself.

In: a :class:`TrainingJob` and the rank. Out: metrics, checkpoints, and at the end ``<run>/model``, reloaded and
compared. Everything random is a function of (seed, step, rank), so that a resumed run repeats the bits of the
uninterrupted one.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from raylm.data.samples import open_samples
from raylm.errors import RunFailure
from raylm.models.families import build_config, build_model
from raylm.models.loading import load_model, load_tokenizer
from raylm.objectives.causal import CausalObjective
from raylm.parallel.engine import DataParallelEngine, StepResult
from raylm.training.batches import evaluation_batches, step_batches, to_tensors, total_steps
from raylm.training.checkpoints import BEST, CheckpointReader, CheckpointWriter, newest_whole
from raylm.training.export import export_model, largest_difference
from raylm.training.flops import flops_per_token, peak_flops
from raylm.training.metrics import MetricsRecorder
from raylm.training.optimizers import make_optimizer
from raylm.training.schedules import learning_rate_factor
from raylm.training.worker import TrainingJob, Worker

# Reloaded fp32 weights are the same bits; kernels may still differ with the shape of the batch.
LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


class TrainingLoop:
    """Builds everything on one rank, then :meth:`run`."""

    def __init__(self, job: TrainingJob, worker: Worker) -> None:
        self.job, self.worker, self.config = job, worker, job.config
        training, run = self.config.training, self.config.run
        torch.manual_seed(run.seed)
        if job.use_gpu:
            import ray.train.torch

            self.device = ray.train.torch.get_device()
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        self.bf16 = training.precision == "bf16"
        answer_only = self.config.objective.answer_only
        self.samples, self.validation = (
            open_samples(job.data_directory, split, training.sequence_length, run.seed, answer_only)
            for split in ("train", "validation")
        )
        self.total_steps = total_steps(training, self.samples.count)
        model = self._model()
        self.model_config = model.config
        self.flops = flops_per_token(model, training.sequence_length)
        self.micro_batch_size = int(self.config.parallel.micro_batch_size)
        self.engine = DataParallelEngine(
            CausalObjective(model),
            lambda named: make_optimizer(training, named, model.config.model_type),
            zero_stage=self.config.parallel.zero_stage,
            micro_batch_size=self.micro_batch_size,
            accumulation=training.batch_size // worker.world_size // self.micro_batch_size,
            clipping=training.gradient_clipping,
            bf16=self.bf16,
            device=self.device,
        )
        self.peak = peak_flops(self.device)
        self.writer = CheckpointWriter(
            job.directory / "checkpoints", worker.rank, worker.world_size, job.attempt, self.config.checkpoint.keep
        )
        self.state: dict[str, Any] = {"step": 0, "tokens": 0, "best": None, "without_improvement": 0}

    def _model(self):
        if self.job.model_source is not None:
            model = load_model(self.job.model_source)
        else:
            tokenizer = load_tokenizer(self.job.tokenizer_directory)
            section = self.config.model
            config = build_config(section.family, section.config, tokenizer, self.config.training.sequence_length)
            model = build_model(config, self.config.run.seed)
        if self.config.parallel.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def run(self) -> dict[str, Any]:
        """Train to the end and export; returns the final metrics (the same on every rank)."""
        self._resume()
        recorder = None
        if self.worker.rank == 0:
            self.writer.remove_leftovers()
            recorder = MetricsRecorder(self.job.directory, self.state["step"], self.config.run.name, self.job.progress)
        try:
            self._train(recorder)
            final = self._finish()
        finally:
            if recorder is not None:
                recorder.close()
        return final

    def _resume(self) -> None:
        # Rank 0 checks the checksums; the others take its word, so that all load the same.
        chosen: list[Any] = [None]
        if self.worker.rank == 0:
            found, damaged = newest_whole(self.writer.root)
            for directory in damaged:
                print(f"raylm: checkpoint {directory} is damaged and passed over", flush=True)
            chosen[0] = found
        dist.broadcast_object_list(chosen, src=0)
        if chosen[0] is not None:
            self._load(CheckpointReader(chosen[0]))

    def _load(self, reader: CheckpointReader) -> None:
        for fragment in self.engine.fragments(for_loading=True):
            reader.fill(fragment)
        self.engine.adopt(reader.weight, reader.state["step"])
        self.state = dict(reader.state)

    def _train(self, recorder: MetricsRecorder | None) -> None:
        training, checkpoint = self.config.training, self.config.checkpoint
        saved_at = time.monotonic()
        interval = _Interval()
        while self.state["step"] < self.total_steps and not self._should_stop():
            step = self.state["step"]
            torch.manual_seed((self.config.run.seed << 40) + step * self.worker.world_size + self.worker.rank)
            began = time.perf_counter()
            batches = step_batches(
                self.samples, step, training.batch_size, self.worker.rank, self.worker.world_size,
                self.micro_batch_size, self.device,
            )  # fmt: skip
            interval.data_wait += time.perf_counter() - began
            self.engine.set_learning_rate(learning_rate_factor(training, step, self.total_steps))
            result = self.engine.train_step(batches)
            self.state["step"] = step = step + 1
            self.state["tokens"] += result.targets
            interval.tokens += result.targets
            last = step == self.total_steps
            evaluated = (bool(training.evaluate_every_steps) and step % training.evaluate_every_steps == 0) or last
            timed_save = False
            if step % training.log_every_steps == 0 or evaluated:
                metrics = self._metrics(result, interval)
                timed_save = self._seconds_passed(saved_at, checkpoint.every_seconds)
                if evaluated:
                    metrics |= self._evaluate()
                if recorder is not None:
                    recorder.record(metrics)
                if evaluated:
                    self.worker.report(metrics)
                interval = _Interval()
            improved = evaluated and self.state["without_improvement"] == 0
            best = improved and training.early_stopping is not None
            if last or best or timed_save or (checkpoint.every_steps and step % checkpoint.every_steps == 0):
                began = time.perf_counter()
                self.writer.save(step, self.engine.fragments(), dict(self.state), best=best)
                interval.checkpoint += time.perf_counter() - began
                saved_at = time.monotonic()
        if self._should_stop():
            self.writer.save(self.state["step"], self.engine.fragments(), dict(self.state))
        self.writer.wait()
        dist.barrier()

    def _metrics(self, result: StepResult, interval: _Interval) -> dict[str, Any]:
        seconds = max(1e-9, time.perf_counter() - interval.began)
        speed = interval.tokens / seconds
        return {
            "step": self.state["step"],
            "tokens": self.state["tokens"],
            "samples": self.state["step"] * self.config.training.batch_size,
            "loss": self.engine.mean_loss(result),
            "learning_rate": self.engine.optimizer.param_groups[0]["lr"],
            "gradient_norm": result.gradient_norm,
            "tokens_per_second": speed,
            "mfu": speed * self.flops / (self.peak * self.worker.world_size),
            "data_wait_seconds": interval.data_wait,
            "checkpoint_seconds": interval.checkpoint,
        }

    def _seconds_passed(self, since: float, limit: float | None) -> bool:
        """Whether rank 0's clock says that it is time; the same answer on all ranks."""
        if limit is None:
            return False
        flag = torch.tensor(float(self.worker.rank == 0 and time.monotonic() - since >= limit), device=self.device)
        dist.all_reduce(flag)
        return bool(flag > 0)

    def _evaluate(self) -> dict[str, float]:
        training = self.config.training
        batches = evaluation_batches(
            self.validation, training.evaluation_batches, self.micro_batch_size,
            self.worker.rank, self.worker.world_size, self.device,
        )  # fmt: skip
        total, targets = self.engine.evaluate(batches)
        loss = total / max(1, targets)
        self.state["validation_loss"] = loss
        minimum = training.early_stopping.minimum_change if training.early_stopping else 0.0
        if self.state["best"] is None or loss < self.state["best"] - minimum:
            self.state |= {"best": loss, "without_improvement": 0}
        else:
            self.state["without_improvement"] += 1
        return {"validation_loss": loss}

    def _should_stop(self) -> bool:
        stopping = self.config.training.early_stopping
        return stopping is not None and self.state["without_improvement"] >= stopping.patience

    def _finish(self) -> dict[str, Any]:
        """Export the final (under early stopping the best) weights, reload them and compare."""
        root = self.writer.root
        source, _ = newest_whole(root)
        if self.config.training.early_stopping and (root / BEST).exists():
            source = root / (root / BEST).read_text().strip()
        if source is None:
            raise SafetensorError(f"{root} holds no whole checkpoint to export")
        last_step = self.state["step"]
        reader = CheckpointReader(source)
        if reader.state["step"] != last_step:
            self._load(reader)
        probe = to_tensors(self.validation, np.arange(1), self.device)["input_ids"]
        expected = self.engine.logits(probe).cpu()
        difference = None
        if self.worker.rank == 0:
            dtype = torch.bfloat16 if self.bf16 else torch.float32
            output = self.job.directory / "model"
            export_model(source, self.model_config, self.job.tokenizer_directory, output, dtype)
            difference = largest_difference(output, probe.cpu(), expected)
            if not difference <= LOGITS_TOLERANCE[dtype]:
                raise RunFailure(f"{output}: the reloaded model's logits differ from the trained one's by {difference}")
        dist.barrier()
        return {
            "finished": True,
            "step": last_step,
            "exported_step": reader.state["step"],
            "tokens": self.state["tokens"],
            "validation_loss": self.state.get("validation_loss"),
            "best_validation_loss": self.state["best"],
            "logits_difference": difference,
            "stopped_early": last_step < self.total_steps,
        }


class _Interval:
    """What is counted between two lines of metrics."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.tokens = 0
        self.data_wait = self.checkpoint = 0.0
