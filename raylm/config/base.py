"""What every configuration section shares: no unknown keys, no silent conversion of types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the YAML file. Unknown keys are errors, and ``"3"`` is not ``3``."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=())


@dataclass(frozen=True)
class MayChange:
    """Marks a field, with all below it, as free to differ between the first start of a run and its resumption.

    Attributes:
        to: the only values that it may change to; any by default.
    """

    to: tuple[Any, ...] | None = None


def may_change(section: type[BaseModel] | None, key: str, value: Any) -> bool:
    """Whether the dotted ``key`` below ``section`` may be ``value`` on resumption, by :class:`MayChange`."""
    for part in key.split("."):
        field = section.model_fields.get(part) if section is not None else None
        if field is None:
            return False
        for mark in field.metadata:
            if isinstance(mark, MayChange):
                return mark.to is None or value in mark.to
        section = nested_section(field.annotation)
    return False


def nested_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds; None where it holds none."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
