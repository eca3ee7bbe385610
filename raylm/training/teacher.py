"""Whether a model can learn from a teacher: the same tokens, the same task, layers that can be compared.

In: two configurations, or two directories. Out: nothing, or a refusal in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raylm.config.distillation import DistillationSection
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.config.run import RunSection
    from raylm.models.heads import Head
    from raylm.tasks.objective import Objective


def check_teacher(section: DistillationSection, student: PretrainedConfig, head: Head, key: str = "") -> None:
    """Refuse a teacher that is none for ``student``; reads configurations alone.

    Args:
        head: of the student.
        key: what stands before ``distillation`` in the file.

    Raises:
        UserError: one line.
    """
    from raylm.data.loading import resolve_model
    from raylm.models.families.build import check_head
    from raylm.models.loading import load_config
    from raylm.models.own_heads import refuse_own_head

    name = f"{key}distillation.teacher"
    path = str(section.teacher)
    teacher = load_config(resolve_model(path, name), name)
    check_head(teacher, head, path, name)
    refuse_own_head(teacher, head, path, name, "teach")
    check_layers(section, student, teacher, head, key)


def check_tokenizers(one: str | Path, other: str | Path, key: str) -> None:
    """Refuse two models whose tokens have other numbers.

    Raises:
        UserError: one line.
    """
    from raylm.data.loading import same_tokens

    if not same_tokens(one, other):
        raise UserError(f"{key}: found {one}, whose tokenizer is another than that of {other}; allowed: the same one")


def check_kept(top_k: int, objective: Objective, run: RunSection) -> None:
    """Refuse to keep what the teacher says where it cannot be kept.

    Raises:
        UserError: one line.
    """
    if objective.choices_vary:
        raise UserError(
            f"distillation.top_k: found {top_k} for {objective.name}, whose choices differ from text to text, "
            "allowed: null, with which the teacher computes beside the model"
        )
    if run.remote:
        raise UserError(
            f"distillation.top_k: found {top_k} with run.storage {run.storage}, allowed with a folder that all nodes "
            "share"
        )


def check_layers(
    section: DistillationSection, student: PretrainedConfig, teacher: PretrainedConfig, head: Head, key: str = ""
) -> None:
    """Refuse to compare layers that cannot be.

    Raises:
        UserError: one line.
    """
    from raylm.models.layers import find_blocks
    from raylm.models.weights import make_outline

    key = f"{key}distillation"
    if section.hidden and student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"{key}.hidden: found {section.hidden:g} with widths of {student.hidden_size} and {teacher.hidden_size}, "
            "allowed with the teacher's width only; compare logits or attention"
        )
    heads = [config.num_attention_heads for config in (student, teacher)]
    if section.attention and heads[0] != heads[1]:
        raise UserError(
            f"{key}.attention: found {section.attention:g} with {heads[0]} and {heads[1]} heads, allowed with the "
            "teacher's number of heads only"
        )
    if section.layer_map is not None:
        counts = [len(find_blocks(make_outline(config, head).model)[0].modules) for config in (student, teacher)]
        if len(section.layer_map) != counts[0] or max(section.layer_map) >= counts[1]:
            raise UserError(
                f"{key}.layer_map: found {section.layer_map}, allowed: {counts[0]} numbers from 0 to {counts[1] - 1}"
            )
