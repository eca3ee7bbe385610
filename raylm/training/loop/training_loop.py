"""The training loop of one rank: the same for Ray Train workers and for a Ray Tune trial that trains inside itself.

In: a :class:`TrainingJob` and the rank. Out: metrics, checkpoints, and at the end ``<run>/model``, reloaded and
compared. Everything random is a function of (seed, step, rank), so that a resumed run repeats the bits of the
uninterrupted one.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from raylm.data.loading import load_tokenizer
from raylm.errors import RunFailure
from raylm.models.families.build import build_config, dropout_of, with_dropout
from raylm.models.loading import load_config
from raylm.models.weights import DrawnWeights, Weights, make_outline, saved_weights
from raylm.parallel.engines.base import StepResult, seed_step
from raylm.parallel.engines.compilation import check_compilation
from raylm.parallel.engines.environment import limit_collectives
from raylm.parallel.layout.fragments import Fragment
from raylm.tasks import make_objective
from raylm.tasks.measures import VALIDATION
from raylm.tasks.objective import Batch
from raylm.training.checkpoints.mirror import Mirror
from raylm.training.checkpoints.storage import Storage
from raylm.training.checkpoints.store import CheckpointReader, CheckpointWriter, newest_whole
from raylm.training.loop.agreement import Agreement, gather_names
from raylm.training.loop.anomalies import batch_of_step, find_anomaly, leave_out
from raylm.training.loop.averages import Averages
from raylm.training.loop.batches import (
    evaluation_batches,
    step_batches,
    total_steps,
    training_samples,
)
from raylm.training.loop.best import check_metrics, initial_state, is_patience_over, judge
from raylm.training.loop.engine import make_engine
from raylm.training.loop.finishing import finish
from raylm.training.loop.flops import flops_per_token, peak_flops
from raylm.training.loop.sample_log import SampleLog
from raylm.training.loop.schedules import learning_rate_factor, scheduled_momentum, set_momentum
from raylm.training.loop.worker import TrainingJob, Worker
from raylm.training.ray_train.preemption import Notice
from raylm.training.reports.metrics import MetricsRecorder
from raylm.training.reports.trackers import open_trackers
from raylm.training.teacher_rows import TaughtSamples


class TrainingLoop:
    """Builds everything on one rank, then :meth:`run`."""

    def __init__(self, job: TrainingJob, worker: Worker) -> None:
        self.job, self.worker, self.config = job, worker, job.config
        self.ranks = (worker.rank, worker.world_size, gather_names)
        training, run = self.config.training, self.config.run
        torch.manual_seed(run.seed)
        if training.compile:
            check_compilation(self.config.parallel.zero_stage)
        if job.use_gpu:
            self.device = _gpu(worker)
            torch.cuda.set_device(self.device)
            # DeepSpeed puts what it makes on the device of this number.
            os.environ["LOCAL_RANK"] = str(self.device.index or 0)
        else:
            self.device = torch.device("cpu")
        self.bf16 = training.precision == "bf16"
        self.model_config = self._model_config()
        self.objective = make_objective(self.config.objective, self.model_config.model_type, self.config.distillation)
        check_metrics(training, self.objective)
        self.model_config.update(self.objective.settings(job.data_directory))
        self.samples = training_samples(self.objective, job.data_directory, training, run.seed)
        self.validation = self.objective.samples(job.data_directory, "validation", training.sequence_length, run.seed)
        if self.config.distillation is not None and self.config.distillation.top_k is not None:
            self.samples = TaughtSamples(self.samples, job.directory)
        self.total_steps = total_steps(training, self.samples.count)
        model, weights = self._model()
        # What an adapter is merged into.
        self.original = weights if self.config.adapter is not None else None
        # What is exported keeps its own dropout.
        self.model_config = with_dropout(model.config, dropout_of(self.model_config))
        self.flops = flops_per_token(model, *self.objective.lengths(training.sequence_length))
        self.micro_batch_size = int(self.config.parallel.micro_batch_size)
        self.engine = make_engine(job, worker, self.objective, model, weights, self.samples, self.device)
        limit_collectives(self.config.resources.collective_timeout_seconds)
        self.peak = peak_flops(self.device)
        self.mirror = Mirror(Storage(job.storage), job.directory)
        self.writer = CheckpointWriter(
            self.mirror.storage / "checkpoints",
            worker.rank,
            worker.world_size,
            worker.generation,
            self.config.checkpoint.keep,
            asynchronous=self.config.checkpoint.asynchronous,
            scratch=job.directory / "scratch",
            before_commit=self.mirror.send_metrics,
            check_owner=self.check_owner,
        )
        # Under every layout the moments are this optimizer's, and the weights change in its step only.
        self.engine.optimizer.register_step_pre_hook(lambda *_: self.writer.settle())
        self.averages = Averages(training.ema, self.engine) if training.ema is not None else None
        self.state = initial_state()
        # Name of the checkpoint that was saved or gone on from last.
        self.newest: str | None = None
        self.recorder: MetricsRecorder | None = None
        self.sample_log = None
        if training.log_samples and self.engine.leads:
            self.sample_log = SampleLog(job.directory, worker, self.engine.data_rank, self.engine.data_size)

    def _model_config(self):
        if self.job.model_source is not None:
            return load_config(self.job.model_source)
        tokenizer = load_tokenizer(self.job.tokenizer_directory)
        section = self.config.model
        return build_config(section.family, section.config, tokenizer, self.config.training.sequence_length)

    def _model(self) -> tuple[PreTrainedModel, Weights]:
        """The model without memory for its parameters, and what they are to be filled with."""
        head, seed = self.objective.head, self.config.run.seed
        outline = make_outline(with_dropout(self.model_config, self.config.training.dropout), head)
        source = self.job.model_source
        weights = DrawnWeights(outline, seed) if source is None else saved_weights(source, outline, head, seed)
        if self.config.parallel.activation_checkpointing:
            outline.model.gradient_checkpointing_enable({"use_reentrant": False})
        return outline.model, weights

    def run(self) -> dict[str, Any]:
        """Train to the end and export; returns the final metrics (the same on every rank).

        Where the run was asked to stop, or its anomalies forbid to go on, they hold ``failure``, the reason. Those of a
        turn that exports nothing lack ``finished``.
        """
        # Before anything is touched that a later start may use.
        if self.worker.rank == 0:
            self.check_owner()
        self._resume()
        if self.worker.rank == 0:
            self.mirror.fetch_metrics()
        self._record_from_here()
        try:
            failure = self._train()
            ends = failure is None and self._exports()
            final = finish(self) if ends else {"failure": failure} if failure is not None else self._paused()
            if self.recorder is not None and ends:
                self.recorder.finish(final)
            return final
        finally:
            if self.recorder is not None:
                self.recorder.close()

    def _record_from_here(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
        if self.worker.rank == 0:
            step, directory = self.state["step"], self.job.directory
            trackers = open_trackers(self.config, directory, step)
            self.recorder = MetricsRecorder(directory, step, self.config.run.name, self.job.progress, trackers)

    def _exports(self) -> bool:
        """Whether the weights are exported at the step at which training has ended."""
        turn = self.job.turn
        return turn is None or turn.exports or self.state["step"] >= self.total_steps or self._should_stop()

    def _paused(self) -> dict[str, Any]:
        """What the last evaluation found, at the end of a turn that exports nothing."""
        found = {"step": self.state["step"], "tokens": self.state["tokens"]}
        return found | {"validation_loss": self.state["validation_loss"], **self.state["measures"]}

    def _resume(self) -> None:
        turn = self.job.turn
        found, damaged = newest_whole(self.writer.root, *self.ranks)
        if self.worker.rank == 0:
            for name in damaged:
                print(f"raylm: checkpoint {self.writer.root / name} is damaged and passed over", flush=True)
            self.writer.remove_leftovers()
        dist.barrier()
        if found is not None:
            self.load(CheckpointReader(found))
            self.newest, self.writer.committed = str(found).rpartition("/")[2], self.state["step"]
            if self.worker.rank == 0 and not (turn is not None and self.state["step"] == turn.first):
                self.job.note("resume", self.state["step"], f"goes on from the checkpoint of step {self.state['step']}")
        if turn is not None and self.state["step"] < turn.first:
            raise RunFailure(f"{self.writer.root} has no whole checkpoint of step {turn.first}, to go on from")
        if found is None and self.config.training.anomalies.policy != "stop":
            # Something to go back to before the first checkpoint is due.
            self._save()

    def load(self, reader: CheckpointReader) -> None:
        """Go on from a checkpoint."""
        for fragment in self._fragments(for_loading=True):
            reader.fill(fragment)
        self.engine.adopt(reader.part, reader.state["step"])
        self.state = {**initial_state(), **reader.state}

    def _save(self, *, best: bool = False) -> None:
        self.newest = self.writer.save(self.state["step"], self._fragments(), self.state, best=best)

    def _fragments(self, *, for_loading: bool = False) -> list[Fragment]:
        found = self.engine.fragments(for_loading=for_loading)
        return found if self.averages is None else self.averages.with_averages(found)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model computes with what is evaluated and exported: the averages, where the run has them."""
        return contextlib.nullcontext() if self.averages is None else self.averages.in_place()

    def _train(self) -> str | None:
        """Train to the end; returns why it did not come to it, or None."""
        training, checkpoint = self.config.training, self.config.checkpoint
        saved_at = time.monotonic()
        agreement = Agreement(self.worker.rank, self.state["step"], self.device)
        interval = _Interval(self.writer)
        end = self.total_steps if self.job.turn is None else min(self.total_steps, self.job.turn.last)
        while self.state["step"] < end and not self._should_stop():
            step = self.state["step"]
            seed_step(self.config.run.seed, step, self.engine)
            began = time.perf_counter()
            batch = batch_of_step(step, self.state["skipped"])
            batches = self._batches(step, batch)
            interval.data_wait += time.perf_counter() - began
            self._set_rates(step)
            result = self.engine.train_step(batches)
            loss = self.engine.mean_loss(result) if training.anomalies.spike_factor is not None else 0.0
            if (found := find_anomaly(training.anomalies, self.state, result.gradient_norm, loss)) is not None:
                if (failure := self._answer_anomaly(step, batch, found)) is not None:
                    return failure
                agreement = Agreement(self.worker.rank, self.state["step"], self.device)
                interval = _Interval(self.writer)
                continue
            step = self._count(result, interval)
            last = step == end
            evaluated = (bool(training.evaluate_every_steps) and step % training.evaluate_every_steps == 0) or last
            save = last or (checkpoint.every_steps is not None and step % checkpoint.every_steps == 0)
            notice = Notice.NONE
            if agreement.due(step):
                seconds = time.monotonic() - saved_at
                wanted = checkpoint.every_seconds is not None and seconds >= checkpoint.every_seconds
                notice, timed = agreement.exchange(step, int(self.worker.notice()), wanted)
                save = save or timed or notice > Notice.NONE
            if step % training.log_every_steps == 0 or evaluated:
                metrics = self._metrics(result, interval)
                if evaluated:
                    metrics |= self._evaluate()
                    judge(self.state, training, metrics)
                if self.recorder is not None:
                    self.mirror.check_owner_at_times(self.job.attempt)
                    self.recorder.record(metrics, self.writer.committed)
                if evaluated:
                    self.worker.report(metrics)
                interval = _Interval(self.writer)
            improved = evaluated and self.state["without_improvement"] == 0
            best = improved and training.evaluate_every_steps is not None
            if save or best or self._should_stop():
                self._save(best=best)
                saved_at = time.monotonic()
            if notice > Notice.NONE:
                self._finish_save()
                self.worker.saved()
                if notice == Notice.LEAVE:
                    raise InterruptedError(f"a worker was told to end (SIGTERM); step {step} was saved first")
                if notice == Notice.STOP:
                    return f"stopped after step {step}, which was saved; the same command goes on"
        self._finish_save()
        return None

    def _count(self, result: StepResult, interval: _Interval) -> int:
        """Note that a step was made; returns its number, from 1."""
        self.state["step"] += 1
        self.state["tokens"] += result.tokens
        interval.tokens += result.tokens
        if self.averages is not None:
            self.averages.update(self.state["step"])
        self.worker.progress(self.state["step"])
        return self.state["step"]

    def _set_rates(self, step: int) -> None:
        training, factor = self.config.training, self.state["plateau"]["factor"]
        self.engine.set_learning_rate(learning_rate_factor(training, step, self.total_steps, factor), step)
        if (momentum := scheduled_momentum(training, step, self.total_steps)) is not None:
            set_momentum(self.engine.optimizer, momentum)

    def _batches(self, step: int, batch: int) -> list[Batch]:
        """The micro-batches of a step, with the samples that ``batch`` is the number of."""
        batches = step_batches(
            self.samples, batch, self.config.training.batch_size, self.engine.data_rank, self.engine.data_size,
            self.micro_batch_size, self.device,
        )  # fmt: skip
        if self.sample_log is not None:
            self.sample_log.write(step, batch, self.config.training.batch_size)
        return batches

    def check_owner(self) -> None:
        """Stop where a later start of the run has taken over."""
        self.mirror.check_owner(self.job.attempt)

    def _finish_save(self) -> None:
        self.writer.wait()
        dist.barrier()

    def _answer_anomaly(self, step: int, batch: int, found: str) -> str | None:
        """Go back to the last checkpoint without the ``batch``; returns why not, or None."""
        section, skipped, count = self.config.training.anomalies, self.state["skipped"], self.state["anomalies"] + 1
        self._finish_save()
        text = f"step {step + 1}: {found}; training.anomalies.policy is {section.policy}"
        if section.policy == "stop" or count > section.limit:
            many = f" and the limit is {section.limit}" if section.policy != "stop" else ""
            return f"{text}{many}; the last checkpoint is {self.newest or 'none'}"
        self.load(CheckpointReader(self.writer.root / str(self.newest)))
        first = batch if section.policy == "skip" else batch_of_step(self.state["step"], skipped)
        self.state["skipped"] = leave_out(skipped, first, batch + 1)
        self.state["anomalies"] = count
        if self.worker.rank == 0:
            back = f"back to {self.newest}, batches {first} to {batch} are left out"
            self.job.note("anomaly", step + 1, f"{text}; {back}")
        self._record_from_here()
        return None

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
            "checkpoint_seconds": self.writer.stall_seconds - interval.stalled,
            "memory_bytes": self.worker.memory_bytes(),
            **({"stage_idle": idle} if len(idle := self.engine.idle_fractions()) > 1 else {}),
        }

    def _evaluate(self) -> dict[str, float]:
        training = self.config.training
        batches = evaluation_batches(
            self.validation, training.evaluation_batches, self.micro_batch_size,
            self.engine.data_rank, self.engine.data_size, self.device,
        )  # fmt: skip
        with self.averaged():
            found = self.engine.evaluate(batches)
        return {"validation_loss": found.mean, **{f"{VALIDATION}{name}": v for name, v in found.measures.items()}}

    def _should_stop(self) -> bool:
        return is_patience_over(self.state, self.config.training)


class _Interval:
    """What is counted between two lines of metrics."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self.began = time.perf_counter()
        self.tokens = 0
        self.data_wait = 0.0
        self.stalled = writer.stall_seconds


def _gpu(worker: Worker) -> torch.device:
    if worker.device is not None:
        return torch.device("cuda", worker.device)
    import ray.train.torch

    return ray.train.torch.get_device()
