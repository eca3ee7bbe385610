"""What YAML and values on the command line are read as, and what is refused before it costs time or memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from raylm.config import load_config
from raylm.config.yaml_text import parse_value, parse_yaml
from raylm.errors import UserError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
        ("007", "007"),
        ("12:30", "12:30"),
        ("1:30.5", "1:30.5"),
        ("7", 7),
        ("-7", -7),
        ("1_000", 1000),
        ("0x10", 16),
        ("0", 0),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("2.", 2.0),
        (".inf", float("inf")),
        ("1e400", float("inf")),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("~/runs", "~/runs"),
        ("1.2.3", "1.2.3"),
        ("0b12", "0b12"),
        ("=", "="),
    ],
)
def test_scalars_in_a_file_and_on_the_command_line(text: str, expected: Any) -> None:
    assert parse_yaml(f"key: {text}", "file").values == {"key": expected}
    assert parse_value(text, "override").values == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*.txt", "*.txt"),
        ("&x", "&x"),
        ("!x", "!x"),
        ("a: b #c.txt", "a: b #c.txt"),
        ("[x].txt", "[x].txt"),
        ("<<", "<<"),
        ("- a", "- a"),
        ("[1, '2']", [1, "2"]),
        ("{a: 007}", {"a": "007"}),
        ('"7"', "7"),
        ("'it''s'", "it's"),
    ],
)
def test_a_value_on_the_command_line_is_yaml_in_brackets_or_quotes_only(text: str, expected: Any) -> None:
    assert parse_value(text, "override").values == expected


def test_merge_keys_and_a_place_for_what_they_repeat(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(
        "x-common: &common {batch_size: 4, sequence_length: 64}\n"
        "run: {name: a}\n"
        "data: {train: stdlib-docs}\n"
        "model: {path: x}\n"
        "evaluation: {<<: *common, stride: 32, batch_size: 2}\n"
    )
    section = load_config("evaluate", path).evaluation
    assert (section.batch_size, section.sequence_length, section.stride) == (2, 64, 32)


def test_text_stays_as_written_where_a_key_takes_text(tmp_path: Path) -> None:
    path = tmp_path / "prepare.yaml"
    path.write_text(
        "run: {name: 2024}\n"
        "data: {train: [2023, 1e5], fields: {text: yes}, cleaning: {language: {keep: [en, no]}}}\n"
    )  # fmt: skip
    config = load_config("prepare", path)
    assert config.run.name == "2024"
    assert config.data.train == ["2023", "1e5"]
    assert config.data.fields.text == "yes"
    assert config.data.cleaning.language.keep == ["en", "no"]
    for name in ("2024-01-01", "007", "1e5", "0x1f", "true", "1_0"):
        assert load_config("prepare", path, [f"run.name={name}"]).run.name == name
    assert load_config("prepare", path, ["data={train: 7}"]).data.train == "7"
    assert load_config("prepare", path, ["data.train=*.txt"]).data.train == "*.txt"
    # Of the section that an override replaced nothing stays.
    with pytest.raises(UserError, match=r"run\.name: missing"):
        load_config("prepare", path, ["run={seed: 3}"])
    with pytest.raises(UserError, match=r"resources\.workers: found '007', allowed: "):
        load_config("prepare", path, ["resources.workers=007"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: " + "[" * 50_000, "file: more than 32 sections or lists inside of each other"),
        ("a: " + "[" * 40 + "]" * 40, "file:1: not valid YAML: more than 32 sections"),
        ("a: &a [*a]", "file:1: not valid YAML: more than 32 sections"),
        ("a: &a {<<: *a}", "file:1: not valid YAML: more than 32 sections"),
        (BOMB, "not valid YAML: more than 100000 values, those repeated by aliases included"),
        ("a: " + "9" * 5000, "file:1: not valid YAML: a number of 5000 characters"),
        ("a: !!int x", "file:1: not valid YAML: the tag !!int does not fit 'x'"),
        ("a: !!bool x", "file:1: not valid YAML: the tag !!bool does not fit 'x'"),
        ("a: !!timestamp x", "file:1: not valid YAML: the tag !!timestamp does not fit 'x'"),
        ("a: !!binary aGk=", "file:1: not valid YAML: the tag !!binary does not fit"),
        ("a: !!set {x}", "file:1: not valid YAML: could not determine a constructor for the tag"),
        ("a: !!python/object:os.system {}", "file:1: not valid YAML: could not determine a constructor"),
        ("a: !!map [x]", "file:1: not valid YAML: expected keys with values"),
        ("? [a]\n: b", "file:1: not valid YAML: a key must be text"),
        ("a: 1\nb: {c: 1, c: 2}", "file:2: not valid YAML: key 'c' is given twice"),
        ("a: *.txt", "; text that begins with * or & needs quotes"),
        ("a: \0", "file: not valid YAML: unacceptable character"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused_at_once_in_one_line(text: str, expected: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "file")
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.monotonic() - start < 5
