"""The stages ``pretrain`` and ``finetune``: validate, prepare the data where it is raw, train, report."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow.lib import ArrowException

from raylm.cluster.session import ray_session
from raylm.cluster.waiting import live_capacity, nodes_for
from raylm.config.families import is_counted
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import FinetuneConfig, PretrainConfig, TrainConfig
from raylm.interrupts import ended_at_once
from raylm.progress import Activity
from raylm.tasks.measures import measured, shown
from raylm.training.driver_log import DriverLog, driver_log
from raylm.training.inputs import Checked, check_done, ensure_data, shared_inputs, validate
from raylm.training.loop.worker import new_attempt
from raylm.training.ray_train.places import LOGS

if TYPE_CHECKING:
    from raylm.parallel.plan.precision import Precision
    from raylm.tasks.objective import Objective
    from raylm.training.checkpoints.mirror import Mirror
    from raylm.training.loop.worker import TrainingJob


def pretrain(config: PretrainConfig) -> None:
    """Train a new model; see :func:`run_training`."""
    run_training("pretrain", config)


def finetune(config: FinetuneConfig) -> None:
    """Go on training an existing model; see :func:`run_training`."""
    run_training("finetune", config)


def bits_per_byte(
    config: TrainConfig, objective: Objective, directory: Path, final: dict[str, Any]
) -> dict[str, float | int]:
    """The exported model's validation loss in bits per byte of text, with the bytes; empty where only a part counted.

    The windows of the packed validation stream do not overlap, so ``raylm evaluate``, which gives each token more
    context, finds less on the same bytes.
    """
    from raylm.data.tokens.shards import TokenShards

    if not objective.counts_text:
        return {}
    shards = TokenShards(directory, "validation")
    if shards.kind != "documents" or config.training.evaluation_batches is not None:
        return {}
    whole = final["exported_step"] == final["step"]
    loss = final["validation_loss"] if whole else final["best_validation_loss"]
    nats = loss * (shards.token_count - 1)
    return {"bits_per_byte": nats / math.log(2) / shards.byte_count, "validation_bytes": shards.byte_count}


def run_training(stage: str, config: TrainConfig) -> None:
    """Train to the end, or go on where an interrupted start of the same run stopped.

    Raises:
        UserError: configuration or input is wrong; nothing was started.
        RunFailure: the run failed; the same command goes on from its last checkpoint.
    """
    from raylm.data.prepare.inputs import note_inputs, run_stamps
    from raylm.training.checkpoints.mirror import SUMMARY, Mirror
    from raylm.training.checkpoints.storage import Storage
    from raylm.training.reports.events import EVENTS

    run = RunDirectory(stage, config)
    mirror = Mirror(Storage(config.run.uri), run.path)
    # A mirror is written from here on, a directory only after everything is checked.
    with run.held() if mirror.remote else contextlib.nullcontext(), logged(mirror) as log:
        mirror.open_run()
        run.check()
        if (done := run.report()) is not None and done.get("training") == config.training.model_dump(mode="json"):
            check_done(config)
            print(f"{stage}: {run.path} is done already\n{describe(stage, run, done)}")
            return
        with Activity(f"{stage}: checking the data and the model"), ended_at_once():
            checked = validate(config)
            stamps = run_stamps(config.data, config.model.path)

        with run.held():
            start = Start(stage, run, mirror, log)
            with ray_session():
                trained = (_count if is_counted(config.model.family) else _train)(config, checked, start)
            mirror.check_owner(start.attempt)
            final = trained.final | bits_per_byte(config, checked.model.objective, trained.data, trained.final)
            (run.path / SUMMARY).write_text(trained.summary(final), encoding="utf-8")
            if not config.run.remote:
                note_inputs(run.path, stamps)
            run.write_report({**final, **trained.facts, "training": config.training.model_dump(mode="json")})
            # The report goes last, here and to the storage: it says that the run is done.
            mirror.send(SUMMARY, EVENTS, "report.json")
    print(describe(stage, run, final))


@contextlib.contextmanager
def logged(mirror: Mirror) -> Iterator[DriverLog]:
    """Keep what the driver says within the block in the run's logs, and in its storage."""
    try:
        with driver_log() as log:
            yield log
    finally:
        # Whatever ends the run, or none, comes before a copy that fails.
        with contextlib.suppress(OSError, ArrowException):
            mirror.send(LOGS)


@dataclass(frozen=True)
class Start:
    """One start of a stage's driver.

    Attributes:
        attempt: a token that no other start has.
    """

    stage: str
    run: RunDirectory
    mirror: Mirror
    log: DriverLog
    attempt: str = field(default_factory=new_attempt)

    def begin(self, resolved: TrainConfig) -> None:
        """Make the run directory, whose owner is this start from here on.

        Args:
            resolved: what stands in ``config.yaml``.
        """
        self.run.create(resolved)
        self.mirror.own(self.attempt)
        self.log.begin(self.run.path, self.attempt)


@dataclass(frozen=True)
class Trained:
    """What a trainer gives back. A trainer makes a model of checked input on the joined cluster.

    One trains by gradient, the other counts.

    Attributes:
        final: the run's last figures.
        data: directory of the shards.
        summary: from the last figures to the run in words.
        facts: what else the report holds.
    """

    final: dict[str, Any]
    data: Path
    summary: Callable[[dict[str, Any]], str]
    facts: dict[str, Any] = field(default_factory=dict)


def _count(config: TrainConfig, checked: Checked, start: Start) -> Trained:
    """Prepare the data on the joined cluster, and count it here."""
    from raylm.training.counting import count_model, summarize_counting

    run, mirror = start.run, start.mirror
    start.begin(config)
    data_directory, tokenizer_directory = ensure_data(config, run.path, checked)
    mirror.check_owner(start.attempt)
    run.keep()
    mirror.send("config.yaml")
    mirror.send_data()
    final = count_model(config, run, data_directory, tokenizer_directory)
    mirror.check_owner(start.attempt)
    mirror.send("model")
    return Trained(final, data_directory, functools.partial(summarize_counting, config.run.name))


def _train(config: TrainConfig, checked: Checked, start: Start) -> Trained:
    """Plan on the joined cluster and train there."""
    from raylm.training.checkpoints.mirror import METRICS
    from raylm.training.ray_train.launch import launch
    from raylm.training.reports.metrics import read_metrics
    from raylm.training.reports.summary import summarize

    job, precision = _make_job(config, checked, start)
    final = launch(job)

    def summary(final: dict[str, Any]) -> str:
        return summarize(start.stage, config.run.name, read_metrics(start.run.path / METRICS), final)

    return Trained(final, job.data_directory, summary, {"precision": precision.record()})


def _make_job(config: TrainConfig, checked: Checked, start: Start) -> tuple[TrainingJob, Precision]:
    """Decide precision and layout, wait for the nodes that they need, and have the data ready."""
    from raylm.data.loading import resolve_model
    from raylm.parallel.plan.planning import apply_layout, plan_training, recorded
    from raylm.parallel.plan.precision import with_precision
    from raylm.training.loop.worker import TrainingJob
    from raylm.training.precision import FILE, note_precision, run_precision, slower_in_bf16
    from raylm.training.ray_train.sharing import check_shared
    from raylm.training.teacher import check_tokenizers
    from raylm.training.teacher_rows import keep_rows

    stage, run, mirror, resources = start.stage, start.run, start.mirror, config.resources
    model_config, resumed = checked.model.config, run.saved() is not None
    capacity = live_capacity(stage, resources, lambda capacity: plan_training(config, capacity, checked.model))
    precision = run_precision(run, config, model_config, capacity)
    planned = with_precision(config, precision)
    plan = plan_training(planned, capacity, checked.model)
    layout = plan.layout
    just_measured = bool(precision.times) and not resumed
    slower = "" if just_measured else slower_in_bf16(planned, model_config, capacity)
    for warning in filter(None, (plan.warning, slower)):
        print(f"{stage}: {warning}", file=sys.stderr, flush=True)
    precision = replace(precision, name=layout.precision)
    least = layout.workers if resources.elastic is None else resources.elastic[0]
    with nodes_for(stage, least, resources, capacity):
        check_shared(None if config.run.remote else run.path.parent, shared_inputs(config))
        start.begin(recorded(planned, layout))
        note_precision(run, precision)
        # Before the configuration reaches the storage, as it may be taken back here.
        data_directory, tokenizer_directory = ensure_data(config, run.path, checked)
        if config.distillation is not None and config.model.path is None:
            check_tokenizers(config.distillation.teacher, tokenizer_directory, "distillation.teacher")
        if config.distillation is not None and config.distillation.top_k is not None:
            kind, decided = model_config.model_type, with_precision(config, precision)
            keep_rows(stage, decided, kind, run.path, data_directory, use_gpu=layout.use_gpu)
    mirror.check_owner(start.attempt)
    run.keep()
    mirror.send("config.yaml", FILE)
    mirror.send_data()
    return TrainingJob(
        config=apply_layout(planned, layout),
        stage=stage,
        directory=run.path,
        storage=config.run.uri,
        data_directory=data_directory,
        tokenizer_directory=tokenizer_directory,
        model_source=resolve_model(config.model.path) if config.model.path else None,
        use_gpu=layout.use_gpu,
        attempt=start.attempt,
    ), precision


def describe(stage: str, run: RunDirectory, final: dict[str, Any]) -> str:
    """What came of the run, where it lies and what to type next, for people."""
    counted = "entries" in final
    done = f"{final['tokens']:,} tokens counted" if counted else f"{final['step']:,} steps, {final['tokens']:,} tokens"
    per_byte = f", {final['bits_per_byte']:.4f} bits per byte of text" if "bits_per_byte" in final else ""
    others = "".join(f", {one.name} {shown(metric, final[metric])}" for metric, one in measured(final).items())
    result = f"validation loss {final['validation_loss']:.4f} nats a target{per_byte} (lower is better){others}"
    return (
        f"{stage}: {done}\n"
        f"  result     {result}\n"
        f"  check      the saved model was loaded again; its logits differ by {final['logits_difference']:.1e}\n"
        f"  model      {run.path / 'model'}\n"
        f"  next       {'figures' if counted else 'curves'} on one page: raylm report {run.path}"
    )
