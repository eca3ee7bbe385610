"""Hostile configurations: the recipes with changed keys, read and checked as the command line does, in this process.

    python tests/fuzz/configurations.py --seconds 600 [--seed 0]

A case is a function of its seed: a recipe whose keys, also those that it leaves out, get values that no key should
have, in the file, as an override, or as changed bytes. Each must be accepted, or refused by a UserError of one short
line, in short time; what is accepted must read the same again from its own config.yaml. Anything else is a finding,
printed with its seed; ``--seed N --cases 1`` repeats it. Ends with status 1 if there are findings.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from raylm.config import STAGES, load_config
from raylm.config.base import nested_section
from raylm.config.loading import to_yaml
from raylm.config.run_directory import RunDirectory
from raylm.config.yaml_text import parse_yaml
from raylm.data.loading import resolve_model
from raylm.errors import UserError
from raylm.recipes import Recipe, all_recipes

SLOWEST_SECONDS = 2.0
LONGEST_MESSAGE = 1500

# As YAML text, so that what only YAML can say is there too.
TEXTS = (
    "", "~", "null", "true", "no", "0", "-1", "1", "2", "007", "12:30", "2024-01-01", "2024-01-01T10:00:00Z", "1e-3",
    "1e23", "1e400", "-1e400", ".inf", "-.inf", ".nan", "0x10", "0b1", "1_000", "9" * 30, "9" * 5000, "-" + "9" * 30,
    "0x" + "f" * 90, "4294967296", "2147483648", "18446744073709551616", "9007199254740993", "0.1", "1.5", "-0.0",
    "1e-320", "5e-324", "[]", "{}", "[1]", "[1, 2]", "[2, 1]", "[.nan, .inf]", "[[]]", "[null]", "{a: 1}", "{a: {}}",
    "[{path: x}]", "[{path: '', weight: .nan}]", "{1: 2}", "{null: 1}", "{[a]: 1}", "{a: 1, a: 2}", "{<<: {a: 1}}",
    "[" * 30 + "]" * 30, "[" * 40 + "]" * 40, "[" * 5000, "{a: " * 5000, "'", '"', '"\\0"', '"\\x07"', '"\\ud800"',
    '"\\n"', '"a\\nb"', "'*.txt'", "*x", "&a [*a]", "&a {<<: *a}", "!!int x", "!!float x", "!!bool x", "!!null x",
    "!!binary aGk=", "!!set {a}", "!!timestamp x", "!!python/object/apply:os.system [ls]", "!x y", "| a", "> a", "%a",
    "@a", "`a`", "?", "-", ":", "a: b", "a #b", "auto", "none", "x" * 300, "x" * 5000, "\u4e2d\u6587" * 60, "\u202e",
    "\ufeff", "\U0001f600", "e\u0301", "..", "../..", "/", "/dev/null", "/dev/zero", "~", "~/x", "~no-such-user/x",
    "s3://KEY:SECRET@bucket/x", "://", "file://", "a/b/c", "http://127.0.0.1:1/v1", "127.0.0.1", "::1", "::", "[::1]",
    "256.256.256.256", "{text}", "{", "}", "%s", "$HOME", "stdlib-docs", "llama", "gpt2", "utf-16", "idna", "undefined",
    "zlib", "hex", "<<", "=", "training.steps", "..." , "---", "\t", "\t- a", "\r", "\x85", "\u2028",
)  # fmt: skip
# Bytes that are put anywhere into a file.
BYTES = (
    b"\0", b"\xff", b"\xfe\xff", b"\t", b"\r", b"\n", b":", b"- ", b"[", b"{", b"'", b'"', b"#", b"&a ", b"*a",
    b"!!", b"%",
)  # fmt: skip
# What some key takes, so that cases come further than the first mistake.
PLAUSIBLE = (
    "1", "2", "3", "8", "64", "0.5", "0.1", "1.0", "true", "false", "~", "auto", "[0.1, 0.9]", "[1, 2]", "name", "a/b",
    "x.txt", "[x.txt, y.txt]", "{}", "stdlib-docs", "2024", "on",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count on from it")
    parser.add_argument("--cases", type=int, default=None, help="most cases; no limit by default")
    arguments = parser.parse_args()
    # No case asks the hub; what decides that is imported before the first one is timed.
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.suppress(UserError):
        resolve_model("some-name")
    recipes, counts, findings = all_recipes(), Counter[str](), 0
    slowest, began, seed = 0.0, time.monotonic(), arguments.seed
    memory = None
    with tempfile.TemporaryDirectory() as directory:
        while time.monotonic() - began < arguments.seconds and seed - arguments.seed != arguments.cases:
            # Of the CPU: the machine may be busy with other things.
            start = time.process_time()
            outcome, problem = run_case(seed, recipes, Path(directory))
            seconds = time.process_time() - start
            slowest = max(slowest, seconds)
            if not problem and seconds > SLOWEST_SECONDS:
                problem = f"took {seconds:.1f} s"
            if problem:
                findings += 1
                print(f"seed {seed}: {outcome}: {problem}", flush=True)
            counts[outcome] += 1
            seed += 1
            if seed - arguments.seed == 1000:
                memory = peak_megabytes()
    grown = "" if memory is None else f", {peak_megabytes() - memory:.0f} MB more memory than after 1000 cases"
    print(
        f"{sum(counts.values())} cases from seed {arguments.seed}: "
        f"{', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}; {findings} findings; "
        f"slowest {slowest:.2f} s, peak {peak_megabytes():.0f} MB{grown}"
    )
    sys.exit(1 if findings else 0)


def peak_megabytes() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def run_case(seed: int, recipes: list[Recipe], directory: Path) -> tuple[str, str]:
    """What came of one case (accepted, refused, failed), and what is wrong with that; empty where nothing is."""
    draw = random.Random(seed)
    recipe = draw.choice(recipes)
    path = directory / f"{recipe.stage}.yaml"
    content, overrides = mutate(draw, recipe)
    path.write_bytes(content)
    try:
        config = load_config(recipe.stage, path, overrides)
        RunDirectory(recipe.stage, config).check()
        problem = check_again(recipe.stage, config, directory)
        if (model := getattr(config, "model", None)) is not None and model.path is not None:
            resolve_model(model.path)
        return "accepted", problem
    except UserError as error:
        message = str(error)
        bad = len(message.splitlines()) != 1 or len(message) > LONGEST_MESSAGE or not message.isprintable()
        return "refused", f"message of {len(message)} characters: {message[:200]!r}" if bad else ""
    except Exception:  # noqa: BLE001 - any other is what is looked for
        return "failed", traceback.format_exc(limit=-4)


def check_again(stage: str, config: Any, directory: Path) -> str:
    """Whether ``config.yaml`` of a run reads as what was accepted."""
    path = directory / "again.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    try:
        again = load_config(stage, path)
    except UserError as error:
        return f"its own config.yaml is refused: {error}"
    return "" if again == config else "its own config.yaml reads as another configuration"


def mutate(draw: random.Random, recipe: Recipe) -> tuple[bytes, list[str]]:
    """A changed recipe, and overrides."""
    text = recipe.path.read_text(encoding="utf-8")
    values = parse_yaml(text, str(recipe.path)).values
    keys = sorted({*keys_of(values), *fields_of(STAGES[recipe.stage])})
    overrides, marks = [], {}
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        key, value = draw.choice(keys), hostile(draw)
        if draw.random() < 0.1:
            key = strange_key(draw, key)
        if draw.random() < 0.5 and ".0" not in key:
            overrides.append(f"{key}={value}")
        else:
            # Dumped as a mark, which the YAML text then replaces: no value of Python is a tag or an alias.
            mark = f"MARK{len(marks)}MARK"
            put(values, key.split("."), mark)
            marks[mark] = value
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=draw.random() < 0.2)
    for mark, value in marks.items():
        text = text.replace(mark, value)
    content = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.15:
        content = damage(draw, content)
    return content, overrides


def hostile(draw: random.Random) -> str:
    """A value as YAML text."""
    kind = draw.random()
    if kind < 0.4:
        return draw.choice(PLAUSIBLE)
    if kind < 0.75:
        return draw.choice(TEXTS)
    if kind < 0.85:
        return repr(draw.uniform(-1, 1) * 10.0 ** draw.randint(-330, 300))
    if kind < 0.92:
        return str(draw.randint(-(2**70), 2**70) >> draw.randint(0, 70))
    letters = [draw.choice((draw.randint(0, 127), draw.randint(0, 0xD7FF))) for _ in range(draw.randint(1, 12))]
    return "".join(map(chr, letters))


def strange_key(draw: random.Random, key: str) -> str:
    """A key that no section has."""
    return draw.choice(
        (key + ".", "." + key, key + ".a.b", key.upper(), key + "x", "a." * 50 + "b", "", "x" * 4000, key[:-1])
    )


def damage(draw: random.Random, content: bytes) -> bytes:
    """The file with bytes added, left out, or cut off."""
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        kind = draw.random()
        if kind < 0.6:
            content = content[:place] + draw.choice(BYTES) + content[place:]
        elif kind < 0.9:
            content = content[:place] + content[place + draw.randint(1, 20) :]
        else:
            content = content[:place]
    return content


def put(values: dict[str, Any], key: list[str], value: Any) -> None:
    """Set a dotted key, whatever stands on the way."""
    for parent, below in pairwise(key):
        place = 0 if isinstance(values, list) else parent
        holder = values[0] if isinstance(values, list) else values.get(parent)
        if below == "0" and not (isinstance(holder, list) and holder):
            holder = [{}]
        elif below != "0" and not isinstance(holder, dict):
            holder = {}
        values[place] = holder
        values = holder
    values[0 if isinstance(values, list) else key[-1]] = value


def keys_of(values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a file, sections too."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from keys_of(value, f"{prefix}{key}.")


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys that a stage knows, those of the entries of lists and dictionaries too."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if (inner := nested_section(field.annotation)) is not None:
            text = str(field.annotation)
            entry = "0." if "list[" in text else "some-name." if "dict[" in text else ""
            yield from fields_of(inner, f"{prefix}{name}.{entry}")


if __name__ == "__main__":
    main()
