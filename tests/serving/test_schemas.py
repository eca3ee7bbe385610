"""Schemas of response_format: bounded, tried in a process that may die, and remembered; a bad one hurts nobody."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raylm.config.serving import ServingSection
from raylm.serving.engines.base import Constraint, EngineRefusal, SamplingParameters
from raylm.serving.engines.client import start_engine
from raylm.serving.engines.schemas import MOST_WAITING, SchemaChecker, SchemasUnavailable
from raylm.serving.http.errors import RequestError
from raylm.serving.tasks.structured import ResponseFormat, excess_of, wanted_constraint

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


@pytest.fixture(scope="module")
def checker() -> Iterator[SchemaChecker]:
    checker = SchemaChecker()
    yield checker
    checker.close()


def mistake(checker: SchemaChecker, schema: dict[str, Any], source: Path | None = None) -> str | None:
    return asyncio.run(checker.mistake_in(Constraint("json", json.dumps(schema)), source and str(source)))


def properties(count: int) -> dict[str, Any]:
    return {f"p{number}": {"type": "integer"} for number in range(count)}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"pattern": "(" * 40_000 + "a" + ")" * 40_000}, "found a pattern of 80001 characters, allowed: at most 1000"),
        ({"pattern": "(" * 400 + "a" + ")" * 400}, "groups nested 400 deep, allowed: at most 32"),
        ({"patternProperties": {"(" * 400 + "a" + ")" * 400: {}}}, "groups nested 400 deep, allowed: at most 32"),
        (nested(900), "nested more than 64 deep, allowed: at most 64"),
        ({"properties": properties(1500)}, "more than 1000 properties"),
        ({"properties": properties(1500), "minProperties": 3}, "found minProperties: 3 of 1500 properties"),
        ({"properties": properties(200), "minProperties": 100}, "found minProperties: 100 of 200 properties"),
        ({"properties": properties(200), "maxProperties": 100}, "found maxProperties: 100 of 200 properties"),
        ({"items": {"maxLength": 10**9}}, r"found maxLength: 1e\+09, allowed: 0 to 1000000"),
        ({"minItems": -1}, "found minItems: -1, allowed: 0 to"),
        ({"maxItems": float("nan")}, "found maxItems: nan, allowed: 0 to"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_is_too_much_is_refused_before_anything_compiles_it(schema: dict, message: str) -> None:
    asked = ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"schema": schema}})
    untouched = SchemaChecker()
    with pytest.raises(RequestError, match=message) as refusal:
        asyncio.run(wanted_constraint(asked, None, untouched, None))
    assert (refusal.value.status, refusal.value.body["error"]["param"]) == (400, "response_format")
    assert untouched._process is None


@pytest.mark.parametrize(
    "schema",
    [
        PERSON,
        nested(60),
        {"type": "object", "properties": properties(1000), "required": [*properties(1000)]},
        {"type": "object", "properties": properties(50), "minProperties": 20},
        {"type": "string", "pattern": "^" + r"\(" * 100 + "$", "maxLength": 10_000},
        {"properties": {"pattern": {"type": "string"}, "minItems": {"type": "integer"}}},
    ],
    ids=["person", "deep", "wide", "counted", "escaped", "named as keywords are"],
)
def test_what_is_ordinary_is_not_too_much(schema: dict) -> None:
    assert excess_of(schema) is None


def test_a_large_schema_is_measured_in_a_moment() -> None:
    schema = {"enum": [{"a": [number]} for number in range(100_000)]}
    began = time.process_time()
    assert excess_of(schema) is None
    assert time.process_time() - began < 5


def test_schemas_are_tried_and_remembered(checker: SchemaChecker, tiny_model: Path) -> None:
    for source in (None, tiny_model):
        assert mistake(checker, PERSON, source) is None
        assert "nonsense" in mistake(checker, {"type": "nonsense"}, source)
    process = checker._process
    assert process is not None
    began = time.perf_counter()
    assert mistake(checker, PERSON, tiny_model) is None
    assert time.perf_counter() - began < 0.1
    # xgrammar does not look at it; the one within OpenVINO GenAI does, and its step failed with every request in it.
    wrong = {"type": "object", "propertyNames": {"$ref": {"a": 1}}}
    assert mistake(checker, wrong) == "no JSON schema at propertyNames/$ref: {'a': 1} is not of type 'string'"
    assert mistake(checker, {"$ref": "#"}, tiny_model) == "the schema allows no text"
    # What takes too long dies, and the process goes on.
    slow = {"type": "object", "properties": properties(600), "minProperties": 300}
    assert mistake(checker, slow, tiny_model) == "the schema takes more than 3 s to compile; make it smaller"
    assert mistake(checker, {"type": "boolean"}, tiny_model) is None
    assert checker._process is process
    assert psutil.pid_exists(process.pid)


def test_a_schema_that_ends_the_library_ends_a_fork_alone(checker: SchemaChecker) -> None:
    """What the bounds would refuse, given to the process without them."""
    depth, groups = 3000, 40_000
    deep = '{"type":"array","items":' * depth + "{}" + "}" * depth
    pattern = json.dumps({"pattern": "(" * groups + "a" + ")" * groups})
    for text in (deep, pattern):
        found = asyncio.run(checker.mistake_in(Constraint("json", text), None))
        assert found is None or any(
            said in found for said in ("make it smaller", "cannot be followed", "nested too deep")
        )
    assert mistake(checker, {"type": "null"}) is None


def test_a_killed_process_fails_its_request_and_is_replaced(checker: SchemaChecker) -> None:
    async def kill() -> None:
        assert await checker.mistake_in(Constraint("json", '{"type": "integer"}'), None) is None
        assert checker._process is not None
        first = checker._process
        os.kill(first.pid, signal.SIGSTOP)
        asked = asyncio.create_task(checker.mistake_in(Constraint("json", '{"type": "number"}'), None))
        await asyncio.sleep(0.2)
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(SchemasUnavailable, match="ended; try again"):
            await asked
        assert not psutil.pid_exists(first.pid)
        assert await checker.mistake_in(Constraint("json", '{"type": "number"}'), None) is None

    asyncio.run(kill())


def test_few_schemas_wait_and_nobody_waits_for_ever() -> None:
    async def ask() -> None:
        checker = SchemaChecker(answer_seconds=0.01)
        wanted = [Constraint("json", f'{{"const": {n}}}') for n in range(MOST_WAITING + 1)]
        asked = [asyncio.create_task(checker.mistake_in(one, None)) for one in wanted]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(error, SchemasUnavailable) for error in found)
        assert sum("too many schemas" in str(error) for error in found) == 1
        assert sum("it was not compiled within 0.01 s" in str(error) for error in found) >= 1
        checker.close()

    asyncio.run(ask())


def test_a_schema_without_a_text_ends_its_own_request_only(tiny_model: Path) -> None:
    """Sampling from no token at all ended the engine, and every request in it."""

    async def collect(schema: str | None) -> list[int]:
        stream = engine.submit(
            [5, 6, 7], SamplingParameters(8, temperature=1.0, seed=1, constraint=schema and Constraint("json", schema))
        )
        return [token async for piece in stream for token in piece]

    async def side_by_side() -> None:
        found = await asyncio.gather(collect(None), collect('{"$ref": "#"}'), return_exceptions=True)
        assert found[0] == alone
        assert isinstance(found[1], EngineRefusal)
        assert "allows no further token" in str(found[1])

    engine = start_engine(str(tiny_model), ServingSection(engine="transformers"), threads=1)
    try:
        alone = asyncio.run(collect(None))
        asyncio.run(side_by_side())
        assert asyncio.run(collect(None)) == alone
    finally:
        engine.close()
