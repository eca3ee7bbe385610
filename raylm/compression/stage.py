"""The stage ``compress``: a model through its steps to an export, and the comparison of all its forms.

``<run>/model`` is the Hugging Face directory of the model that comes out, with the form that an engine runs in its
``openvino/`` folder. The stage succeeds only after the export was loaded again and its outputs were compared with those
of the model that it was made from. Steps that are done are not done again (:mod:`raylm.compression.chain`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.cluster.session import ray_session
from raylm.compression.card import write_card
from raylm.compression.chain import run_steps
from raylm.compression.material import Material
from raylm.compression.measuring import Variant
from raylm.compression.methods import Steps
from raylm.compression.methods.base import Candidate
from raylm.compression.models import parameters_of
from raylm.compression.table import table
from raylm.config.compression import TargetSection
from raylm.config.families import is_counted
from raylm.config.model import ModelSection
from raylm.config.quantization import QuantizeSection
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import CompressConfig
from raylm.data.prepare.inputs import check_run_unchanged, note_inputs, run_stamps
from raylm.errors import UserError
from raylm.interrupts import ended_at_once, insistent
from raylm.models.heads import Head
from raylm.progress import Activity

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.compression.encoders import ExampleComparison
    from raylm.compression.generators import Comparison
    from raylm.tasks.base import ScoredSet, Task

WEIGHTS, EXPORT_WEIGHTS = "*.safetensors", "openvino_*model.bin"


def compress(config: CompressConfig) -> None:
    """Run the stage.

    Raises:
        UserError: configuration or input is wrong; nothing was started.
        RunFailure: a step failed, the export's outputs do not agree with the model's, or measuring failed.
    """
    from raylm.models.loading import load_parts
    from raylm.tasks import chosen_task

    run = RunDirectory("compress", config)
    run.check()
    if (report := run.report()) is not None:
        check_run_unchanged(run.path, config.data, config.model.path)
        print(f"compress: {run.path} is done already\n{table(report)}\n{_next(run)}")
        return
    source, model_config = open_source(config.model)
    task, steps = chosen_task(model_config, config.objective), Steps(config)
    material = Material(config, task, source)
    work = Work(config, run.path, source, task, steps, material)
    with Activity("compress: checking the model and the data"), ended_at_once():
        outcome = steps.check(model_config, task.head)
        check_target(config.compression.target, outcome, task.head, steps)
        load_parts(source)
        stamps = run_stamps(config.data, source)
        if steps.need_material:
            material.check(steps.trainings)
        comparison = work.open_comparison(model_config)
    with run.held(resumes=steps.need_material):
        run.create()
        report = work.run(comparison, run.keep)
        note_inputs(run.path, stamps)
        run.write_report(report)
    print(
        f"compress: {config.model.path} to {steps.describe()}, {report['threads']} CPU threads\n"
        f"{table(report)}\n{_next(run)}"
    )


def open_source(section: ModelSection) -> tuple[str, PretrainedConfig]:
    """The directory of the model that is to be compressed, and its configuration.

    Raises:
        UserError: there is none on disk, or it cannot be compressed.
    """
    from raylm.data.loading import resolve_model
    from raylm.models.loading import load_config
    from raylm.models.own_heads import refuse_own_head
    from raylm.tasks import task_of

    if section.path is None:
        raise UserError("model.path: missing; compress needs an existing model")
    source = resolve_model(section.path)
    if not Path(source).is_dir():
        raise UserError(f"model.path: {section.path} is not on disk; download the model first")
    model_config = load_config(source)
    if is_counted(model_config.model_type):
        raise UserError(
            f"model.path: found {section.path}, whose family {model_config.model_type} is counted and has no "
            "weights to compress; allowed: a model that was trained by gradient"
        )
    refuse_own_head(model_config, task_of(model_config).head, source, "model.path", "compress")
    return source, model_config


def check_target(target: TargetSection | None, outcome: PretrainedConfig, head: Head, steps: Steps) -> None:
    """Refuse a size that the steps cannot come to, whatever the data.

    Args:
        outcome: configuration of the model that comes out.

    Raises:
        UserError: one line.
    """
    if target is None or target.megabytes is None:
        return
    parameters = parameters_of(outcome, head)
    quantized = next((step.section for step in steps if isinstance(step.section, QuantizeSection)), None)
    bits = 32 if quantized is None else quantized.bits
    if (least := parameters * bits / 8e6) > target.megabytes:
        raise UserError(
            f"compression.target.megabytes: found {target.megabytes:g}, allowed: {least:.4g} or more, as the model has "
            f"{parameters:,} parameters of {bits} bits after the steps"
        )


def _next(run: RunDirectory) -> str:
    return (
        f"  model      {run.path / 'model'} (with the form that OpenVINO runs in openvino/)\n"
        f"  next       the comparison as a page: raylm report {run.path}"
    )


@dataclass(frozen=True)
class Work:
    """What a run makes, once everything is checked.

    Attributes:
        directory: the run's.
        source: directory of the model that it begins with.
        material: the data, prepared where a step needs it.
    """

    config: CompressConfig
    directory: Path
    source: str
    task: Task
    steps: Steps
    material: Material

    def open_comparison(self, model_config: PretrainedConfig) -> Comparison | ExampleComparison:
        """What all forms of the model are measured on."""
        threads, outside = os.cpu_count() or 1, self.config.compression.outside
        if (evaluation := self.task.evaluation) is None:
            from raylm.compression.generators import open_comparison

            return open_comparison(self.config, self.source, model_config, threads)
        from raylm.compression.encoders import ExampleComparison

        def open_sets(source: str) -> dict[str, ScoredSet]:
            sets = {"": evaluation.open(self.config, source)}
            if outside is not None:
                sets["outside_"] = evaluation.open(self.config.model_copy(update={"data": outside}), source)
            return sets

        sets = open_sets(self.source)
        return ExampleComparison(self.config.compression, self.task, self.source, sets, open_sets, threads)

    def make(self) -> Made:
        """Take the model through its steps, and export it."""
        candidate = Candidate(Path(self.source), Path(self.source), self.task.head, self.material)
        reports = run_steps(self.steps, candidate, self.directory)
        return Made(reports, candidate.directory, _assemble(candidate, self.directory))

    def run(self, comparison: Comparison | ExampleComparison, keep: Callable[[], None]) -> dict[str, Any]:
        """Make the model and measure all its forms; returns the report.

        Args:
            keep: called when the data is prepared.
        """
        if self.steps.need_material:
            # Ray's processes take CPU and memory, so speed is measured without it.
            with ray_session():
                self.material.prepare()
                keep()
                made = self.make()
        else:
            with insistent():
                made = self.make()
        with Activity("compress: comparing the outputs of the export and its model"):
            closeness = self.check_export(comparison, made)
        variants = self._variants(made)
        figures = [sized(one, found) for one, found in zip(variants, comparison.figures(variants), strict=True)]
        between = iter(figures[1:-1])
        for report in made.reports:
            if "model" in report:
                report["figures"] = next(between)
        report = {
            "model": self.config.model.path,
            "task": self.task.name,
            "steps": made.reports,
            "threads": comparison.threads,
            **closeness,
            "before": figures[0],
            "after": figures[-1],
        }
        write_card(made.directory, report)
        put_in_place(made.directory, self.directory / "model")
        return report

    def check_export(self, comparison: Comparison | ExampleComparison, made: Made) -> dict[str, Any]:
        """How close the export is to the model that it was made from.

        Raises:
            RunFailure: they do not agree.
        """
        from raylm.compression.encoders import ExampleComparison
        from raylm.compression.generators import check_export

        if isinstance(comparison, ExampleComparison):
            return comparison.check_export(made.model, made.directory)
        bits = quantized.bits if (quantized := self.quantized) is not None else 8
        prompts = comparison.reading_of(made.model).prompts
        return {"logits_cosine": check_export(made.model, made.directory, prompts, bits, comparison.threads)}

    @property
    def quantized(self) -> QuantizeSection | None:
        """How the export stores the weights; None for as they are."""
        return next((step.section for step in self.steps if isinstance(step.section, QuantizeSection)), None)

    def result(self, made: Made) -> Variant:
        """The export as a variant."""
        from raylm.compression.exporters import openvino

        return Variant("the result", "openvino", str(made.directory), openvino.describe(self.quantized))

    def _variants(self, made: Made) -> list[Variant]:
        between = [
            Variant(report["describe"], "transformers", str(self.directory / report["model"]), "transformers fp32")
            for report in made.reports
            if "model" in report
        ]
        original = Variant("the original", "transformers", self.source, "transformers fp32")
        return [original, *between, self.result(made)]


@dataclass(frozen=True)
class Made:
    """What came of the steps.

    Attributes:
        reports: of the steps.
        model: directory of the model that the export was made from.
        directory: the model with its export, not yet under its own name.
    """

    reports: list[dict[str, Any]]
    model: Path
    directory: Path


def put_in_place(partial: Path, model: Path) -> None:
    """Give a directory its own name."""
    shutil.rmtree(model, ignore_errors=True)
    partial.rename(model)


def _assemble(candidate: Candidate, run: Path) -> Path:
    """The model with its export in ``openvino/``, not yet under its own name."""
    from raylm.compression.exporters import openvino

    partial = run / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(candidate.directory, partial, ignore=shutil.ignore_patterns("openvino"))
    if candidate.export is not None:
        shutil.copytree(candidate.export, partial / "openvino")
        return partial
    with Activity("compress: exporting for OpenVINO"), insistent():
        openvino.export_model(partial, partial / "openvino", candidate.head, None)
    return partial


def sized(variant: Variant, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures with what the files of a variant say: weights on disk, and parameters."""
    path = Path(variant.path)
    folder, pattern = (path / "openvino", EXPORT_WEIGHTS) if variant.engine == "openvino" else (path, WEIGHTS)
    return {
        "engine": variant.describe,
        "parameters": _parameters(path),
        "weight_bytes": sum(found.stat().st_size for found in folder.glob(pattern)),
        **figures,
    }


def _parameters(directory: Path) -> int:
    """Numbers in the weights of a Hugging Face directory; reads none of them."""
    import math

    from safetensors import safe_open

    total = 0
    for path in directory.glob(WEIGHTS):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
