"""OpenVINO's engine alone: what its own grammar library cannot take harms nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylm.serving.engines.base import Constraint, Event, Generate, SamplingParameters
from raylm.serving.engines.openvino import OpenVinoBackend
from raylm.serving.engines.schema_process import Trials

# The library in OpenVINO GenAI 2026.4 has no such function; the one that grammars are tried with has.
UNFOLLOWED = Constraint("grammar", 'root ::= Regex("ab")', "structured_outputs")
NUMBERS = Constraint("json", '{"type": "array", "items": {"type": "integer"}, "minItems": 50}')


@pytest.fixture
def backend(exported_model: Path) -> OpenVinoBackend:
    return OpenVinoBackend(exported_model, frozenset(), sequences=4, cache_gigabytes=1, threads=1)


def advance(backend: OpenVinoBackend, steps: int) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for _ in range(steps):
        for event in backend.advance():
            found.setdefault(event.number, []).append(event)
    return found


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


@pytest.mark.parametrize("beside", [True, False])
def test_a_schema_that_the_library_cannot_take_ends_its_own_request(backend: OpenVinoBackend, beside: bool) -> None:
    """Others in work go on where they were, in a new pipeline: the failed step ended the engine."""
    assert Trials().mistake_in(UNFOLLOWED, None) is None
    greedy = SamplingParameters(30, temperature=0)
    backend.admit(Generate(1, [5, 6, 7], greedy))
    alone = tokens(advance(backend, 40)[1])
    assert len(alone) == 30
    before: dict[int, list[Event]] = {}
    if beside:
        backend.admit(Generate(2, [5, 6, 7], greedy))
        backend.admit(Generate(3, [9, 10], SamplingParameters(40, temperature=0, constraint=NUMBERS)))
        before = advance(backend, 8)
        assert len(tokens(before[3])) > 2
        assert 0 < len(tokens(before[2])) < 30
    backend.admit(Generate(4, [5], SamplingParameters(5, constraint=UNFOLLOWED)))
    after = advance(backend, 50)
    (refusal,) = after[4]
    assert refusal.refused
    assert refusal.error is not None
    assert refusal.error.startswith("structured_outputs: cannot be followed by this engine: ")
    if beside:
        # As a request goes on that has the same tokens as its prompt: reading rounds in another way than writing does.
        given = tokens(before[2])
        backend.admit(Generate(6, [5, 6, 7, *given], SamplingParameters(30 - len(given), temperature=0)))
        assert tokens(after[2]) == tokens(advance(backend, 40)[6])
        assert after[2][-1].finish_reason == "length"
        # What follows a schema is written once more, and what was given before is not given again.
        text = tokens(before[3]) + tokens(after[3])
        backend.admit(Generate(7, [9, 10], SamplingParameters(40, temperature=0, constraint=NUMBERS)))
        assert text == tokens(advance(backend, 50)[7])
        assert after[3][-1].finish_reason == "length"
    backend.admit(Generate(5, [5, 6, 7], greedy))
    assert tokens(advance(backend, 40)[5]) == alone
    assert backend._requests == backend._generated == backend._repeated == backend._handles == {}
