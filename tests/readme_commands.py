"""The commands of a README, parsed by what would parse them; none is run.

``raylm`` by its typer application, overrides by the stage's pydantic model, requests by the routes' bodies. Benchmark
scripts are read, not imported: their arguments come from their source. A word with capitals (FILE.yaml, MODEL) stands
for what the reader fills in.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import typer
import yaml
from pydantic import BaseModel, ValidationError

from raylm.cli import app
from raylm.config import STAGES
from raylm.config.loading import apply_override, validate
from raylm.config.yaml_text import parse_yaml
from raylm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PLACEHOLDER = re.compile(r"[A-Z]{4,}")
RAY_OPTIONS = {"--working-dir", "--address", "--runtime-env-json"}
SEPARATORS = {";", "&&", "||", "|"}


class Mistake(Exception):
    """What is wrong with one command."""


def check_line(line: str, variables: dict[str, str], *, mention: bool = False) -> None:
    """A line of a shell; ``variables`` are those that earlier lines set."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if token not in SEPARATORS:
            words.append(token)
            continue
        while words and re.match(r"^[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if ">" in words:
            words = words[: words.index(">")]
        if words:
            check_command([_expand(word, variables) for word in words], mention)
        words = []


def _expand(word: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        word = word.replace(f"${name}", value)
    return word


def check_command(words: list[str], mention: bool = False) -> None:
    """One command: program and arguments; a ``mention`` in the text may leave arguments out."""
    program, arguments = words[0], words[1:]
    if program == "raylm":
        _check_raylm(arguments, mention)
    elif program == "bash":
        _check_script(arguments)
    elif Path(program).name == "python":
        _check_python(arguments, mention)
    elif program == "curl":
        _check_curl(arguments)
    elif program == "source":
        if arguments != [".venv/bin/activate"]:
            raise Mistake("only .venv/bin/activate is there to be sourced")
    elif program == "pip":
        _check_pip(arguments)
    elif program == "pre-commit":
        if not (ROOT / ".pre-commit-config.yaml").is_file():
            raise Mistake("there is no .pre-commit-config.yaml")
    elif program == "ray":
        _check_ray(arguments, mention)
    elif program == "serve":
        _check_serve(arguments, mention)
    else:
        raise Mistake(f"unknown program {program}")


def _check_raylm(arguments: list[str], mention: bool) -> None:
    arguments = ["prepare" if word == "STAGE" else word for word in arguments]
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where --help goes
            context = group.make_context("raylm", list(arguments))
            name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            if name is None or command is None or (mention and not rest):
                return
            parsed = command.make_context(name, rest, parent=context)
    except click.exceptions.Exit:
        return
    except click.ClickException as error:
        raise Mistake(error.format_message()) from None
    values = parsed.params
    if name == "schema" and not PLACEHOLDER.search(values["stage"]) and values["stage"] not in STAGES:
        raise Mistake(f"no such stage: {values['stage']}")
    if name == "recipes" and values["name"] and not PLACEHOLDER.search(values["name"]):
        _need_file(f"jobs/recipes/{values['name']}.yaml")
    if "config" in values:
        stage = {"plan": "pretrain", "submit": values.get("stage")}.get(name, name)
        if stage not in STAGES:
            raise Mistake(f"no such stage: {stage}")
        _check_stage(stage, str(values["config"]), values["overrides"] or [])


def _check_stage(stage: str, path: str, overrides: list[str]) -> None:
    """A recipe with overrides; a placeholder stands for any file, such as the quickstart's."""
    file = ROOT / path
    if PLACEHOLDER.search(path):
        file = ROOT / "jobs" / "recipes" / "quickstart" / f"{stage}.yaml"
    elif not file.is_file():
        raise Mistake(f"no such file: {path}")
    parsed = parse_yaml(file.read_text(encoding="utf-8"), path)
    try:
        for override in overrides:
            apply_override(parsed, override)
        validate(STAGES[stage], parsed.values, path, parsed.written)
    except UserError as error:
        raise Mistake(str(error)) from None


def _need_file(path: str) -> None:
    if not (ROOT / path).exists():
        raise Mistake(f"no such file: {path}")


def _check_script(arguments: list[str]) -> None:
    script, *rest = arguments
    _need_file(script)
    if script == "jobs/quickstart.sh":
        _check_raylm(["quickstart", *rest], mention=False)
    elif script == "tests/run.sh":
        parser = _Parser(prog="tests/run.sh", add_help=False, allow_abbrev=False)
        parser.add_argument("-m", dest="markers", default="")
        parser.add_argument("-n", type=int)
        parser.add_argument("-k")
        parser.add_argument("-x", action="store_true")
        parser.add_argument("--help", action="store_true")
        parser.add_argument("paths", nargs="*")
        values = parser.parse_args(rest)
        for path in values.paths:
            _need_file(path.partition("::")[0])
        unknown = set(re.findall(r"\w+", values.markers)) - registered_markers() - {"and", "or", "not", "MARKER"}
        if unknown:
            raise Mistake(f"no such marker: {', '.join(sorted(unknown))}")


def registered_markers() -> set[str]:
    """Names of the markers in pyproject.toml."""
    return {line.partition(":")[0] for line in project_file()["tool"]["pytest"]["ini_options"]["markers"]}


def project_file() -> dict[str, Any]:
    """pyproject.toml."""
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise Mistake(message)


def _check_python(arguments: list[str], mention: bool) -> None:
    script, *rest = arguments
    if script.startswith("jobs/"):
        if "STAGE" in script:
            return
        _need_file(script)
        _check_raylm([Path(script).stem, *rest], mention)
        return
    if script == "-m" and rest[0] in ("venv", "pip"):
        return
    if script == "-m" and rest[0].startswith("tests."):
        script, *rest = rest[0].replace(".", "/") + ".py", *rest[1:]
    _need_file(script)
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    # The parser of several scripts may stand in a module that they import.
    helpers = (
        ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests.fuzz.")
        and (path := ROOT / f"{node.module.replace('.', '/')}.py").is_file()
    )  # fmt: skip
    parser = next((found for each in (tree, *helpers) if (found := _parser_of(each, script)) is not None), None)
    if parser is not None:
        parser.parse_args(rest)
        return
    most = _most_arguments(tree)
    if flags := [word for word in rest if word.startswith("-")]:
        raise Mistake(f"{script} has no option {flags[0]}")
    if most is not None and len(rest) > most:
        raise Mistake(f"{script} takes at most {most} arguments, found {len(rest)}")


def _parser_of(tree: ast.Module, script: str) -> argparse.ArgumentParser | None:
    """The script's argument parser, made again from its ``add_argument`` calls; None where it has none."""
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
    ]  # fmt: skip
    if not calls:
        return None
    parser = _Parser(prog=script, allow_abbrev=False)
    for call in calls:
        settings: dict[str, Any] = {}
        for keyword in call.keywords:
            value = keyword.value
            if keyword.arg == "type" and isinstance(value, ast.Name) and value.id in ("int", "float"):
                settings["type"] = {"int": int, "float": float}[value.id]
            elif keyword.arg in ("nargs", "action", "required", "dest", "choices") and isinstance(
                value, ast.Constant | ast.List | ast.Tuple
            ):
                settings[keyword.arg] = ast.literal_eval(value)
        parser.add_argument(*(ast.literal_eval(argument) for argument in call.args), **settings)
    return parser


def _most_arguments(tree: ast.Module) -> int | None:
    """How many arguments a script reads from ``sys.argv``; None where it takes any number."""
    most = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.argv":
            if isinstance(node.slice, ast.Slice) and node.slice.upper is None:
                return None
            index = node.slice.upper if isinstance(node.slice, ast.Slice) else node.slice
            number = ast.literal_eval(index) - (1 if isinstance(node.slice, ast.Slice) else 0)
            most = max(most, number)
    return most


def _check_pip(arguments: list[str]) -> None:
    extras = set(project_file()["project"]["optional-dependencies"])
    for word in arguments[1:]:
        for extra in re.findall(r"^raylm\[([\w,]+)\]", word):
            if unknown := set(extra.split(",")) - extras:
                raise Mistake(f"no such extra: {', '.join(unknown)}")


def _check_ray(arguments: list[str], mention: bool) -> None:
    if mention and len(arguments) <= 2:
        arguments = [*arguments, "--", "raylm", "--help"]
    if arguments[:2] != ["job", "submit"] or "--" not in arguments:
        raise Mistake("expected ray job submit ... -- COMMAND")
    split = arguments.index("--")
    for word in arguments[2:split]:
        if word.startswith("--") and word not in RAY_OPTIONS:
            raise Mistake(f"unknown option {word}")
    check_command(arguments[split + 1 :])


def _check_serve(arguments: list[str], mention: bool) -> None:
    action, *files = arguments
    if action not in ("deploy", "run"):
        raise Mistake(f"no such command: serve {action}")
    if mention and not files:
        return
    file = files[0]
    _need_file(file)
    for application in yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["applications"]:
        validate(STAGES["serve"], application["args"], file)


def _check_curl(arguments: list[str]) -> None:
    parser = _Parser(prog="curl", add_help=False)
    parser.add_argument("-s", action="store_true")
    parser.add_argument("-X")
    parser.add_argument("-H")
    parser.add_argument("-d")
    parser.add_argument("url")
    values = parser.parse_args(arguments)
    path = "/" + values.url.partition("://")[2].partition("/")[2]
    body = find_route(values.X or ("POST" if values.d else "GET"), path)
    if values.d:
        try:
            value = json.loads(values.d)
        except json.JSONDecodeError as error:
            raise Mistake(f"not JSON: {error}") from None
        try:
            body_model(body).model_validate(value)
        except ValidationError as error:
            raise Mistake(f"{body}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None


def find_route(method: str, path: str) -> str | None:
    """The class of the request's body of the route that answers ``method`` and ``path``; None where it has none."""
    for route, body in routes().items():
        wanted = re.sub(r"\\\{\w+(?::path)?\\\}", "[^/]+", re.escape(route[1]).replace("\\:", ":"))
        if route[0] == method and re.fullmatch(wanted, path):
            return body
    raise Mistake(f"no such route: {method} {path}")


def routes() -> dict[tuple[str, str], str | None]:
    """(method, path) -> class of the body, read from the source of the routes."""
    found: dict[tuple[str, str], str | None] = {("GET", "/openapi.json"): None}
    for name in ("http/routes", "retrieval/collections"):
        tree = ast.parse((ROOT / "raylm" / "serving" / f"{name}.py").read_text(encoding="utf-8"))
        prefixes = [
            ast.literal_eval(keyword.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "APIRouter"
            for keyword in node.keywords
            if keyword.arg == "prefix"
        ]
        for node in ast.walk(tree):
            if not isinstance(node, ast.AsyncFunctionDef):
                continue
            bodies = [ast.unparse(a.annotation) for a in node.args.args if a.arg == "request" and a.annotation]
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute):
                    path = "".join(prefixes) + ast.literal_eval(decorator.args[0])
                    found[decorator.func.attr.upper(), path] = bodies[0] if bodies else None
    return found


def body_model(name: str | None) -> type[BaseModel]:
    """The class of a request's body."""
    tasks = ("tasks.classification", "tasks.ranking", "tasks.tagging", "tasks.tokenization")
    for module in ("http.requests", "retrieval.collections", *tasks):
        found = getattr(importlib.import_module(f"raylm.serving.{module}"), name or "", None)
        if found is not None:
            return found
    raise Mistake("this route takes no body")
