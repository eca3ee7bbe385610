"""YAML file and dotted overrides in, one validated stage configuration out.

Every mistake becomes a one-line :class:`~raylm.errors.UserError` that names the key, the value found and what is
allowed. Also here: the comparison that decides whether a run of the same name may resume.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raylm.config.base import Section, may_change, nested_section
from raylm.config.credentials import refuse_credentials
from raylm.config.stages import STAGES
from raylm.errors import UserError

ConfigType = TypeVar("ConfigType", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as text; users mean the number. A key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML ``text``; ``origin`` names it in errors.

    Raises:
        UserError: the text is not YAML; names origin and line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{origin}{where}: not valid YAML: {problem}") from None


def load_config(stage: str, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Any:
    """Read the configuration of ``stage`` from ``path`` and apply ``dotted.key=value`` overrides.

    Raises:
        UserError: the file is missing or wrong; one line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: found a directory, allowed: a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}), allowed: a YAML file in UTF-8") from None
    values = parse_yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {_kind(values)}, allowed: sections such as 'run:' and 'data:'")
    for override in overrides:
        apply_override(values, override)
    return validate(STAGES[stage], values, str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in ``values``, the value read as YAML.

    Raises:
        UserError: no ``=``, or a key that runs through something that is no section.
    """
    key, separator, text = override.partition("=")
    # Before any message shows it; what is no key may be a part of it.
    refuse_credentials(override, f"override '{key}'" if re.fullmatch(r"[\w.-]+", key) else "override")
    if not separator or not key:
        raise UserError(
            f"override '{override}': found no KEY=VALUE, allowed: a key with its value, as training.steps=1"
        )
    set_key(values, key, parse_yaml(text, f"override '{override}'"))


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted ``key`` in nested dictionaries, making the sections on the way."""
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise UserError(f"override '{key}': '{parent}' is a value and has no keys of its own")
    section[last] = value


def validate(model: type[ConfigType], values: dict[str, Any], origin: str) -> ConfigType:
    """Validate nested ``values`` as ``model``.

    Raises:
        UserError: the first mistake, in one line, with the number of further ones.
    """
    refuse_credentials(values, origin)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        raise UserError(f"{origin}: {_describe(model, mistakes[0])}{more}") from None


def _describe(model: type[BaseModel], mistake: Any) -> str:
    # Branches of a union add their type's name to the location; only real keys help the reader.
    location = [str(part) for part in mistake["loc"]]
    section, keys = _walk(model, location)
    key = ".".join(keys)
    found = mistake["input"]
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "extra_forbidden":
        allowed = sorted(section.model_fields) if section else []
        close = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        return f"{key}: unknown key; {hint}allowed: {', '.join(allowed)}"
    if mistake["type"] == "missing":
        return f"{key}: missing; this key is required"
    if isinstance(found, dict | list) or (found is None and mistake["type"] == "value_error"):
        return _under(key, message)
    return f"{key}: found {found!r}, {_allowed(message)}"


def _under(key: str, message: str) -> str:
    """What a check of the whole section ``key`` says; a message that begins with a key in it goes on with that key."""
    if not key:
        return message
    return f"{key}.{message}" if re.match(r"[a-z_]+(\.[a-z_]+)*: ", message) else f"{key}: {message}"


def _allowed(message: str) -> str:
    """Pydantic's "Input should be ..." in the words that all our errors use."""
    if message.startswith("Input should be "):
        return "allowed: " + message.removeprefix("Input should be ")
    return message[0].lower() + message[1:]


def _walk(model: type[BaseModel], location: list[str]) -> tuple[type[BaseModel] | None, list[str]]:
    """The section that holds the last key of ``location``, and the keys without a union's branch names."""
    section: type[BaseModel] | None = model
    keys: list[str] = []
    for position, part in enumerate(location):
        if section is None:
            if not part.isidentifier() or position == 0:
                keys.append(part)
            continue
        keys.append(part)
        if part.isdigit():
            # An item of a list of sections.
            continue
        if part not in section.model_fields:
            # The unknown key itself: its holder is what the caller wants.
            return section, keys
        if position < len(location) - 1:
            section = nested_section(section.model_fields[part].annotation)
    return section, keys


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", int: "a number", float: "a number"}.get(type(value), type(value).__name__)


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
