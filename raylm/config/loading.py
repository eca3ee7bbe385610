"""YAML file and dotted overrides in, one validated stage configuration out.

Every mistake becomes a one-line :class:`~raylm.errors.UserError` that names the key, the value found and what is
allowed. Also here: the comparison that decides whether a run of the same name may resume.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raylm.config.base import Section, may_change
from raylm.config.credentials import refuse_credentials
from raylm.config.mistakes import as_written, cut, describe, kind_of, shown
from raylm.config.stages import STAGES
from raylm.config.yaml_text import DEEPEST, Parsed, Place, parse_value, parse_yaml
from raylm.errors import UserError

ConfigType = TypeVar("ConfigType", bound=Section)

LARGEST_FILE_BYTES = 1 << 20
# Tab, line feed and carriage return are text; the other control characters and lone surrogates are not.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def load_config(stage: str, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Any:
    """Read the configuration of ``stage`` from ``path`` and apply ``dotted.key=value`` overrides.

    Raises:
        UserError: the file is missing or wrong; one line.
    """
    parsed = parse_yaml(read_configuration(Path(path)), str(path))
    if parsed.values is None:
        parsed = Parsed({}, {})
    if not isinstance(parsed.values, dict):
        raise UserError(f"{path}: found {kind_of(parsed.values)}, allowed: sections such as 'run:' and 'data:'")
    for override in overrides:
        apply_override(parsed, override)
    # As in Compose files: a place for what `<<: *name` repeats.
    for key in [key for key in parsed.values if key.startswith("x-")]:
        del parsed.values[key]
    found = validate(STAGES[stage], parsed.values, str(path), parsed.written)
    _note_folder(found, Path(path))
    return found


def _note_folder(config: Any, path: Path) -> None:
    """Say where code that the file names is imported from: a worker, or a later start, does not know the file."""
    objective, tuning = getattr(config, "objective", None), getattr(config, "tuning", None)
    if objective is None or objective.imports_from is not None:
        return
    searched = () if tuning is None else tuning.space
    if objective.loss is not None or ":" in objective.head or {"objective.loss", "objective.head"} & set(searched):
        objective.imports_from = str(path.resolve().parent)


def read_configuration(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        UserError: there is none that can be read, or it is larger than any configuration.
    """
    try:
        if path.is_file() and (size := path.stat().st_size) > LARGEST_FILE_BYTES:
            raise UserError(f"{path}: found {size} bytes, allowed: a YAML file of at most {LARGEST_FILE_BYTES} bytes")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: found a directory, allowed: a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}), allowed: a YAML file in UTF-8") from None
    except OSError as error:
        raise UserError(f"{cut(str(path))}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{str(path)!r}: found a NUL character, allowed: the path of a YAML file") from None


def apply_override(parsed: Parsed, override: str) -> None:
    """Set one ``dotted.key=value``, the value read by :func:`parse_value`.

    Raises:
        UserError: no ``=``, or a key that runs through something that is no section.
    """
    key, separator, text = override.partition("=")
    # Before any message shows it; what is no key may be a part of it.
    refuse_credentials(override, f"override {shown(key)}" if re.fullmatch(r"[\w.-]+", key) else "override")
    if not separator or not key:
        raise UserError(
            f"override {shown(override)}: found no KEY=VALUE, allowed: a key with its value, as training.steps=1"
        )
    found = parse_value(text, f"override {shown(override)}")
    set_key(parsed.values, key, found.values)
    place = tuple(key.split("."))
    for stale in [other for other in parsed.written if other[: len(place)] == place]:
        del parsed.written[stale]
    parsed.written.update({(*place, *inner): written for inner, written in found.written.items()})


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted ``key`` in nested dictionaries, making the sections on the way; a number is a place in a list.

    Raises:
        UserError: there is no such place, or the key goes on below a value.
    """
    *parents, last = key.split(".")
    if len(parents) >= DEEPEST:
        raise UserError(f"override {shown(key)}: found {len(parents) + 1} keys, allowed: at most {DEEPEST}")
    section: Any = values
    for parent in parents:
        place = _place(section, parent, key)
        if not isinstance(section, list) and section.get(place) is None:
            section[place] = {}
        section = section[place]
        if not isinstance(section, dict | list):
            raise UserError(f"override {shown(key)}: {shown(parent)} is a value and has no keys of its own")
    section[_place(section, last, key)] = value


def _place(section: dict[str, Any] | list[Any], part: str, key: str) -> Any:
    """What a ``part`` of a dotted key is in a section: its key, or a place in the list that it is."""
    if not isinstance(section, list):
        return part
    if not (part.isascii() and part.isdigit() and int(part) < len(section)):
        many = f"0 to {len(section) - 1}" if section else "none, as the list is empty"
        raise UserError(f"override {shown(key)}: found {shown(part)} in a list, allowed: {many}")
    return int(part)


def validate(
    model: type[ConfigType], values: dict[str, Any], origin: str, written: dict[Place, str] | None = None
) -> ConfigType:
    """Validate nested ``values`` as ``model``.

    Args:
        written: the text of unquoted scalars, by place: what a key that takes text gets, where YAML reads another type
            (``run.name=2024``).

    Raises:
        UserError: the first mistake, in one line, with the number of further ones.
    """
    refuse_credentials(values, origin)
    if refusal := _unusable(values, ()):
        raise UserError(f"{origin}: {refusal}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        if written and as_written(values, mistakes, written):
            return validate(model, values, origin)
        raise UserError(f"{origin}: {describe(model, mistakes)}") from None


def _unusable(value: Any, place: Place) -> str:
    """What no key takes, wherever it stands; empty where there is nothing."""
    key = ".".join(cut(str(part)) for part in place)
    if isinstance(value, dict):
        bad = next((name for name in value if isinstance(name, str) and _NO_TEXT.search(name)), None)
        if bad is not None:
            return f"{key}: found the key {shown(bad)}, allowed: text without control characters".removeprefix(": ")
        return next(filter(None, (_unusable(inner, (*place, name)) for name, inner in value.items())), "")
    if isinstance(value, list | tuple):
        return next(filter(None, (_unusable(inner, (*place, number)) for number, inner in enumerate(value))), "")
    if isinstance(value, str) and _NO_TEXT.search(value):
        return f"{key}: found {shown(value)}, allowed: text without control characters"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key}: found {value}, allowed: a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{key}: found {shown(value)}, allowed: an integer of 64 bits"
    return ""


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML: running it again repeats the run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differing_keys(model: type[Section], saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Dotted keys, with both values, in which two resolved configurations differ and may not; the fields say which."""
    return [
        f"{key} (was {old!r}, now {new!r})"
        for key, (old, new) in sorted(_compare(saved, current, "").items())
        if not may_change(model, key, new)
    ]


def _compare(old: Any, new: Any, prefix: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in old.keys() | new.keys():
            found |= _compare(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return {} if old == new else {prefix: (old, new)}
