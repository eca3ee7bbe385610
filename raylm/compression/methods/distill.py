"""Distillation: a smaller model learns from the original.

The student is some of the original's layers, a model of another configuration, an existing model, or what the steps
before have made. It learns the teacher's distributions, and its layers where the section asks for that
(:mod:`raylm.tasks.distillation`).
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.compression.methods.base import Candidate, Outlook, Recovery
from raylm.compression.models import open_model, parameters_of, save_model
from raylm.compression.sequences import write_texts, written_data
from raylm.config.compression import DistillSection
from raylm.config.distillation import StudentSection
from raylm.errors import UserError
from raylm.models.heads import CAUSAL
from raylm.models.layers import evenly, find_blocks, keep_layers, with_layers
from raylm.training.teacher import check_layers, check_tokenizers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from raylm.models.heads import Head

KEY = "compression.steps: distill"


class Distill:
    """See :class:`raylm.compression.methods.base.Method`."""

    exports = False

    def check(self, section: DistillSection, outlook: Outlook) -> PretrainedConfig:
        """Refuse a student that is none of this teacher."""
        from raylm.models.loading import load_config

        student = _student_config(section.student, outlook.config, outlook.head)
        teacher = section.distillation.teacher
        taught = outlook.original if teacher is None else load_config(teacher, f"{KEY}.distillation.teacher")
        check_pair(student, taught, outlook.head)
        if section.sequences is not None and outlook.head != CAUSAL:
            raise UserError(f"{KEY}.sequences: allowed for a text generator; found a {outlook.head.what}")
        if section.student.path is not None:
            check_tokenizers(section.student.path, str(outlook.run.model.path), f"{KEY}.student.path")
        if teacher is not None:
            check_tokenizers(teacher, str(outlook.run.model.path), f"{KEY}.distillation.teacher")
        check_layers(section.distillation, student, taught, outlook.head, f"{KEY}.")
        return student

    def needs_material(self, section: DistillSection) -> bool:
        """It trains."""
        return True

    def apply(self, section: DistillSection, candidate: Candidate, output: Path) -> dict[str, Any]:
        """Make the student."""
        student = section.student
        if section.sequences is not None:
            teacher = section.distillation.teacher or str(candidate.original)
            write_texts(section.sequences, teacher, candidate.material, output.parent)
        if student.path is not None:
            from raylm.data.loading import resolve_model

            shutil.copytree(resolve_model(student.path), output, ignore=shutil.ignore_patterns("openvino"))
            return {}
        if student == StudentSection():
            shutil.copytree(candidate.directory, output, ignore=shutil.ignore_patterns("openvino"))
            return {}
        model = open_model(candidate.directory, candidate.head)
        numbers = _kept(student, model)
        if numbers:
            model = keep_layers(model, numbers)
        drawn: list[str] = []
        if student.config:
            model, drawn = _reshaped(model, _student_config(student, model.config, candidate.head, layers=False))
        save_model(model, candidate.directory, output)
        return {"layers": numbers} | ({"drawn_weights": len(drawn)} if drawn else {})

    def recovery(self, section: DistillSection, candidate: Candidate, work: Path) -> Recovery:
        """All of it is training."""
        return Recovery(section, data=None if section.sequences is None else written_data(work))

    def describe(self, section: DistillSection) -> str:
        """``distillation into 20 layers``."""
        student = section.student
        if student.path is not None:
            return f"distillation into {student.path}"
        kept = student.layers or (len(student.keep_layers) if student.keep_layers else None)
        parts = [f"{kept} layers"] if kept else []
        parts += [f"{key} {value}" for key, value in student.config.items()]
        return f"distillation into {', '.join(parts)}" if parts else "distillation"


def _kept(section: StudentSection, model: PreTrainedModel) -> dict[str, list[int]]:
    """Configuration key of each list of blocks -> numbers of those that remain; empty where all do."""
    if section.keep_layers is not None:
        return {blocks.key: section.keep_layers for blocks in find_blocks(model)}
    if section.layers is None:
        return {}
    return {blocks.key: evenly(len(blocks.modules), section.layers) for blocks in find_blocks(model)}


def _student_config(
    section: StudentSection, config: PretrainedConfig, head: Head, *, layers: bool = True
) -> PretrainedConfig:
    """The student's configuration.

    Args:
        config: of the model that it is made of.
        layers: whether the layers that go are to be counted too.

    Raises:
        UserError: a layer is not there, or a key is none of the configuration.
    """
    from raylm.models.families.build import why_invalid
    from raylm.models.loading import load_config
    from raylm.models.weights import make_outline

    if section.path is not None:
        return load_config(section.path, f"{KEY}.student.path")
    if layers and (section.layers is not None or section.keep_layers is not None):
        outline = make_outline(config, head).model
        for blocks in find_blocks(outline):
            _check_layers(section, len(blocks.modules))
        config = with_layers(config, _kept(section, outline))
    changed = copy.deepcopy(config)
    for key, value in section.config.items():
        if not hasattr(config, key) or key in ("vocab_size", "model_type"):
            raise UserError(
                f"{KEY}.student.config: found '{key}', allowed: keys of a {config.model_type} configuration"
            )
        setattr(changed, key, value)
    if section.config and (reason := why_invalid(changed)) is not None:
        raise UserError(f"{KEY}.student.config: found {section.config}, which transformers does not take: {reason}")
    return changed


def _check_layers(section: StudentSection, count: int) -> None:
    if section.layers is not None and section.layers > count:
        raise UserError(f"{KEY}.student.layers: found {section.layers}, allowed: at most {count}, which the model has")
    if section.keep_layers is not None:
        kept = section.keep_layers
        if kept != sorted(set(kept)) or kept[-1] >= count:
            raise UserError(f"{KEY}.student.keep_layers: found {kept}, allowed: rising numbers from 0 to {count - 1}")


def _reshaped(model: PreTrainedModel, config: PretrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """A model of ``config`` with the weights of ``model`` that have the same name and shape; the names of others."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = type(model)(config)
    old, new = model.state_dict(), student.state_dict()
    same = {name: old[name] for name in new if name in old and old[name].shape == new[name].shape}
    student.load_state_dict({**new, **same})
    return student, [name for name in new if name not in same]


def check_pair(student: PretrainedConfig, teacher: PretrainedConfig, head: Head) -> None:
    """Refuse a student that is larger than its teacher, or has another vocabulary.

    Raises:
        UserError: one line.
    """
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"{KEY}: found a student with {student.vocab_size:,} tokens and a teacher with {teacher.vocab_size:,}, "
            "allowed: two models of one tokenizer"
        )
    sizes = [parameters_of(config, head) for config in (student, teacher)]
    if sizes[0] > sizes[1]:
        raise UserError(
            f"{KEY}.student: found {sizes[0]:,} parameters, allowed: at most {sizes[1]:,}, which the teacher has"
        )


METHOD = Distill()
