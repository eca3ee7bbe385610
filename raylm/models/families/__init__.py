"""The families of models that raylm makes: each has one record, in the module of its name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from raylm.config.families import FAMILIES

if TYPE_CHECKING:
    from raylm.models.families.base import Family, Outline


def find_family(model_type: str) -> Family | None:
    """The record of the family of transformers' ``model_type``; None where raylm knows none."""
    if model_type not in FAMILIES:
        return None
    family: Family = importlib.import_module(f"raylm.models.families.{model_type.replace('-', '_')}").FAMILY
    if family.own is not None:
        family.own.register()
    return family


def all_families() -> list[Family]:
    """The records of all families."""
    return [family for name in FAMILIES if (family := find_family(name)) is not None]


def find_outline(model_type: str) -> Outline | None:
    """How models of transformers' ``model_type`` are split over ranks; None where raylm does not know."""
    family = find_family(model_type)
    return None if family is None else family.outline
