"""What every configuration section shares: no unknown keys, no silent conversion of types, no number without bounds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

# What fits the 32-bit integers of the libraries below.
LARGEST_COUNT = 2**31 - 1
MOST_WORKERS = 100_000
# 31 years. Timers overflow above 2^63 nanoseconds.
LONGEST_SECONDS = 1e9
# What file systems take.
LONGEST_NAME_BYTES = 255
LONGEST_PATH_BYTES = 4000


class Section(BaseModel):
    """A section of the YAML file. Unknown keys are errors, ``"3"`` is not ``3``, and numbers are finite."""

    model_config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def path_refusal(text: str) -> str:
    """Why ``text`` cannot be a path, glob, URI or hub name, as far as the text alone tells; empty where it can."""
    if not text.strip():
        return "allowed: a path that is not empty"
    if "\0" in text:
        return "allowed: a path without NUL characters"
    try:
        parts = [os.fsencode(part) for part in text.split("/")]
    except UnicodeEncodeError:
        return "allowed: a path in Unicode"
    if sum(map(len, parts)) + len(parts) > LONGEST_PATH_BYTES:
        return f"allowed: at most {LONGEST_PATH_BYTES} bytes"
    if "://" not in text and any(len(part) > LONGEST_NAME_BYTES for part in parts):
        return f"allowed: names of at most {LONGEST_NAME_BYTES} bytes"
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            return f"allowed: a home directory that exists; this machine has no user {text.split('/')[0][1:]}"
    return ""


def _usable_path(text: str) -> str:
    if refusal := path_refusal(text):
        raise ValueError(refusal)
    return text


def _count_or_auto(value: int | str) -> int | str:
    if isinstance(value, int) and not 1 <= value <= LARGEST_COUNT:
        raise ValueError(f"allowed: {'1 or more' if value < 1 else f'at most {LARGEST_COUNT}'}, or auto")
    return value


# Types of keys, with their limits.
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountFromZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
CountOrAuto = Annotated[int | Literal["auto"], AfterValidator(_count_or_auto)]
# Bytes or tokens: what a 64-bit float counts exactly.
Total = Annotated[int, Field(ge=1, le=2**53)]
Seconds = Annotated[float, Field(gt=0, le=LONGEST_SECONDS)]
# What NumPy's and scikit-learn's generators take.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Workers = Annotated[int, Field(ge=1, le=MOST_WORKERS)]
PathText = Annotated[str, AfterValidator(_usable_path)]


def is_path(field: FieldInfo) -> bool:
    """Whether a key, or what it lists, is the path of a file or directory."""
    mark = PathText.__metadata__[0]  # type: ignore[attr-defined]
    return mark in field.metadata or _has_mark(field.annotation, mark)


def _has_mark(annotation: Any, mark: object) -> bool:
    if mark in getattr(annotation, "__metadata__", ()):
        return True
    return any(_has_mark(part, mark) for part in getattr(annotation, "__args__", ()))


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
    """The section that a field of this type holds, also in a list, dictionary or union; None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(nested_section, getattr(annotation, "__args__", ()))), None)
