"""The data-parallel engine against a plain PyTorch loop: same losses and gradient norms at every ZeRO stage, on one
rank and on two; checkpoints from stage to stage."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from families import plain_loop
from layouts import case, largest_difference, run_cases

TOLERANCE = 1e-5
COUNTS = ("one", "dp2")
# tests/benchmarks/parity_table.py takes all of them.
SOME = 10
HALF = SOME // 2


@pytest.mark.slow
def test_parity_with_plain_loop(tmp_path: Path) -> None:
    # Two workers cut the batch; the families differ in how they are called.
    places = [("llama", "one", optimizer, zero) for optimizer in ("adamw", "sgd") for zero in range(4)]
    for family in ("llama", "bert", "t5"):
        places += [(family, "dp2", optimizer, zero) for optimizer in ("adamw", "sgd") for zero in range(4)]
    # Documents this short make SGD at its rate jump, and a jump enlarges rounding differences a thousand times.
    packed = ("llama-documents", "gpt2-documents")
    places += [(family, layout, "adamw", zero) for layout in COUNTS for family in packed for zero in (0, 3)]
    # Those of as many processes share a start.
    places.sort(key=lambda place: COUNTS.index(place[1]))
    cases = [case(family, layout, zero, optimizer, steps=[0, SOME]) for family, layout, optimizer, zero in places]
    for (family, layout, optimizer, zero), found in zip(places, run_cases(cases, tmp_path), strict=True):
        expected = plain_loop(family, optimizer, SOME)
        assert expected["loss"][-1] < expected["loss"][0]
        assert largest_difference(found["loss"], expected["loss"]) < TOLERANCE, (family, layout, optimizer, zero)
        # Norms are some hundred times larger than the differences in loss.
        norms = largest_difference(found["gradient_norm"], expected["gradient_norm"])
        assert norms < 10 * TOLERANCE, (family, layout, optimizer, zero)


@pytest.mark.slow
def test_muon_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    places = [(layout, family, zero) for layout in COUNTS for family in ("llama", "gpt2") for zero in range(4)]
    results = run_cases(
        [case(family, layout, zero, "muon", steps=[0, SOME]) for layout, family, zero in places], tmp_path
    )
    losses = {place: found["loss"] for place, found in zip(places, results, strict=True)}
    for (layout, family, zero), found in losses.items():
        expected = losses["one", family, 0]
        assert expected[-1] < expected[0]
        # Five rounds of a steep polynomial enlarge rounding differences.
        assert largest_difference(found, expected) < 1e-3, (layout, family, zero)


@pytest.mark.slow
def test_checkpoints_fit_any_stage_and_any_number_of_workers(tmp_path: Path) -> None:
    stores = {zero: str(tmp_path / f"zero{zero}") for zero in range(4)}
    muon = str(tmp_path / "muon")
    first, second = [0, HALF], [HALF, SOME]
    whole = [case("llama", "dp2", zero, "adamw", steps=[0, SOME]) for zero in range(4)]
    saves = [case("llama", "dp2", zero, "adamw", steps=first, save=store) for zero, store in stores.items()]
    muons = [case("llama", "dp2", 2, "muon", steps=[0, SOME]), case("llama", "dp2", 2, "muon", steps=first, save=muon)]
    ways = [(layout, source, target) for layout in reversed(COUNTS) for source in range(4) for target in range(4)]
    loads = [case("llama", layout, to, "adamw", steps=second, load=stores[source]) for layout, source, to in ways]
    moved = [case("llama", "one", zero, "muon", steps=second, load=muon) for zero in (0, 3)]
    results = [found["loss"] for found in run_cases([*whole, *saves, *muons, *loads, *moved], tmp_path)]
    expected = [losses[HALF:] for losses in results[:4]]
    expected_muon = results[8][HALF:]
    for (layout, source, target), found in zip(ways, results[10:-2], strict=True):
        assert largest_difference(found, expected[0]) < TOLERANCE, (layout, source, target)
        if layout == "dp2" and source == target:
            # The same layout repeats the bits.
            assert found == expected[source], source
    for found in results[-2:]:
        assert largest_difference(found, expected_muon) < 1e-3
