"""Population based training: who takes over from whom, with which values, and that an interrupt changes nothing."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from raylm.config import load_config
from raylm.config.run_directory import read_object
from raylm.config.stages import TuneConfig
from raylm.config.tuning import Distribution, TuningSection
from raylm.errors import RunFailure, UserError
from raylm.reports.report import write_report
from raylm.training.checkpoints.store import CheckpointReader, checkpoint_name
from raylm.training.reports.events import read_events
from raylm.training.reports.metrics import read_metrics
from raylm.tuning.population.evolution import Evolution
from raylm.tuning.population.explore import chosen, explored, perturbed
from raylm.tuning.population.handover import hand_over
from raylm.tuning.population.state import STATE, Population, begun, read, schedule
from raylm.tuning.population.turn import Outcome
from raylm.tuning.stage import tune
from tests.cpus import become_free, holders_of_cpus
from tests.processes import start
from tests.reading import write_encoder
from tests.tuning.test_search import write_config

RATE, DECAY, DROPOUT = "training.learning_rate", "training.weight_decay", "training.dropout"
SPACE = {RATE: {"log_uniform": [1e-4, 1e-1]}, DECAY: {"choice": [0.0, 0.05, 0.1]}}


def tuning(space: dict[str, Any] | None = None, **values: Any) -> TuningSection:
    kinds = {key: Distribution(**one) for key, one in (space or SPACE).items()}
    return TuningSection(space=kinds, **{"scheduler": "pbt", **values})


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def population_of(*figures: float | None) -> Population:
    """Members after a turn; None failed."""
    population = begun([{RATE: 0.01 * (1 + number)} for number in range(len(figures))])
    for member, figure in zip(population.members, figures, strict=True):
        member.turns, member.step = 1, 4
        if figure is None:
            member.failure = "no number"
        else:
            member.figures = {"validation_loss": figure}
    return population


@pytest.mark.parametrize(
    ("kind", "value", "allowed"),
    [
        ({"log_uniform": [1e-4, 1e-1]}, 0.01, {0.008, 0.012}),
        ({"log_uniform": [1e-4, 1e-1]}, 0.09, {0.072, 0.1}),
        ({"uniform": [0.1, 0.3], "step": 0.1}, 0.2, {0.1, 0.3}),
        ({"uniform": [0.0, 1.0], "step": 0.1}, 0.9, {0.7, 1.0}),
        ({"uniform": [-2.0, -1.0]}, -1.5, {-1.2, -1.8}),
        ({"integer": [1, 20]}, 10, {8, 12}),
        ({"integer": [1, 20]}, 2, {1, 3}),
        ({"integer": [0, 100], "step": 10}, 50, {40, 60}),
        ({"choice": ["a", "b", "c"]}, "b", {"a", "c"}),
        ({"choice": ["a", "b", "c"]}, "c", {"b"}),
        ({"choice": ["a"]}, "a", {"a"}),
    ],
)
def test_a_value_moves_and_stays_inside(kind: dict[str, Any], value: Any, allowed: set[Any]) -> None:
    distribution, numbers = Distribution(**kind), generator()
    found = {perturbed(distribution, value, numbers) for _ in range(40)}
    assert len(found) == len(allowed)
    for one in found:
        assert type(one) is type(value) and distribution.has(one)
        assert any(one == other or (isinstance(one, float) and math.isclose(one, other)) for other in allowed)


def test_values_are_resampled_and_conditions_hold() -> None:
    space = {
        "training.schedule": {"choice": ["cosine", "plateau"]},
        "training.plateau.patience": {"integer": [1, 9], "when": {"training.schedule": "plateau"}},
    }
    point = {"training.schedule": "plateau", "training.plateau.patience": 5}
    near = tuning(space, resample_probability=0.0)
    # The only neighbour of plateau is cosine, without which there is no patience.
    assert explored(near, point, generator()) == {"training.schedule": "cosine"}
    back = [explored(near, {"training.schedule": "cosine"}, np.random.default_rng(seed)) for seed in range(20)]
    assert {one["training.schedule"] for one in back} == {"plateau"}
    assert len({one["training.plateau.patience"] for one in back}) > 3
    anew = [explored(tuning(resample_probability=1.0), {RATE: 0.01, DECAY: 0.0}, generator()) for _ in range(2)]
    assert anew[0] == anew[1] and not any(math.isclose(anew[0][RATE], near) for near in (0.008, 0.012))
    numbers = generator()
    drawn = [explored(tuning(resample_probability=0.25), {RATE: 0.01, DECAY: 0.0}, numbers) for _ in range(400)]
    share = sum(not any(math.isclose(one[RATE], near) for near in (0.008, 0.012)) for one in drawn) / len(drawn)
    assert 0.18 < share < 0.32


def test_the_last_quarter_takes_over_from_the_first() -> None:
    numbers, eight = generator(), population_of(8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)

    def pairs(population: Population, *, minimised: bool = True, exploits: bool = True) -> list[tuple[int, int]]:
        return chosen(population, "validation_loss", numbers, minimised=minimised, exploits=exploits)

    several = [pairs(eight) for _ in range(20)]
    assert all([member for member, _ in one] == [0, 1] for one in several)
    assert {donor for one in several for _, donor in one} == {6, 7}
    assert [member for member, _ in pairs(eight, minimised=False)] == [6, 7]
    assert pairs(eight, exploits=False) == []
    assert pairs(population_of(2.0, 1.0)) == [(0, 1)]
    assert pairs(population_of(1.0, 3.0, 2.0)) == [(1, 0)]
    # Those that failed come last; all of them take over, whatever the quarter and the grace.
    assert pairs(population_of(1.0, None, 2.0, 3.0)) == [(1, 0)]
    assert pairs(population_of(1.0, None, None, 3.0), exploits=False) == [(1, 0), (2, 0)]
    assert pairs(population_of(None, None, 3.0)) == [(0, 2), (1, 2)]
    assert pairs(population_of(None, None)) == []


def write_checkpoint(member: Path, step: int, content: str) -> Path:
    folder = member / "checkpoints" / checkpoint_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint.json").write_text("{}")
    (folder / "rank-00000.safetensors").write_text(content)
    return folder


def test_checkpoints_are_handed_over_as_often_as_asked(tmp_path: Path) -> None:
    donor, member = tmp_path / "trial-001", tmp_path / "trial-002"
    write_checkpoint(donor, 8, "older")
    write_checkpoint(donor, 12, "good")
    for step in (4, 8, 12):
        write_checkpoint(member, step, "bad")
    for _ in range(2):
        hand_over(donor, member, 12)
        assert [path.name for path in sorted((member / "checkpoints").iterdir())] == ["LATEST", "step-00000012"]
        assert (member / "checkpoints" / "step-00000012" / "rank-00000.safetensors").read_text() == "good"
    # The donor's may go.
    (donor / "checkpoints" / "step-00000012" / "rank-00000.safetensors").unlink()
    assert (member / "checkpoints" / "step-00000012" / "rank-00000.safetensors").read_text() == "good"
    with pytest.raises(RunFailure, match=r"step-00000016 is not there, for trial-002 to go on from"):
        hand_over(donor, member, 16)


def plain_config(directory: Path, **changes: Any) -> TuneConfig:
    values = {
        "run": {"name": "search", "storage": str(directory), "seed": 3},
        "data": {"train": str(directory / "texts.csv"), "validation": str(directory / "texts.csv")},
        "model": {"path": str(directory / "encoder")},
        "objective": {"type": "classification"},
        "training": {"steps": 16, "batch_size": 4, "sequence_length": 16, "evaluate_every_steps": 2,
                     "log_every_steps": 1, "schedule": "constant"},
        "tuning": {"scheduler": "pbt", "trials": 4, "perturbation_evaluations": 2, "space": SPACE},
        "resources": {"workers": 1},
        "checkpoint": {"keep": 20, "every_steps": 1},
    }  # fmt: skip
    for section, keys in changes.items():
        values[section] |= keys
    path = directory / "tune.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config("tune", path)


def driven(run: Path, config: TuneConfig, stops: tuple[int, ...] = ()) -> Population:
    """A population whose figures follow from its values and steps; read from its file again after so many turns."""
    run.mkdir(parents=True)
    points = [{RATE: 10.0**-power, DECAY: 0.05} for power in (1, 2, 3, 4)]
    evolution, made = Evolution(run, config, begun(points)), 0
    while (order := evolution.next_order(())) is not None:
        last = min(16, order.turn.last)
        write_checkpoint(run / "trials" / f"trial-{order.member:03d}", last, f"{order.member} at {last}")
        loss = abs(math.log10(order.values[RATE]) + 2.5) + 1 / last
        if order.member == 3 and last == 8:
            outcome = Outcome(7, failure="no number")
        else:
            done = last == 16 or order.turn.exports
            outcome = Outcome(last, 64 * last, {"validation_loss": loss}, finished=done)
        evolution.record(order, outcome)
        made += 1
        if made in stops:
            found = read(run)
            assert found is not None
            evolution = Evolution(run, config, found)
    return evolution.population


def test_an_interrupted_population_decides_the_same(tmp_path: Path) -> None:
    config = plain_config(tmp_path)
    whole = driven(tmp_path / "whole", config)
    assert [member.step for member in whole.members] == [16] * 4 and all(member.finished for member in whole.members)
    taken = [(number, one.step, one.failure) for number, m in enumerate(whole.members) for one in m.takeovers]
    assert len(taken) == 3 and (3, 8, "no number") in taken
    for number in range(1, 16):
        again = driven(tmp_path / f"after-{number}", config, (number,))
        assert again.members == whole.members
    (tmp_path / "whole" / STATE).write_text('{"members": [{"values": 1}]}')
    with pytest.raises(UserError, match=r"population\.json: found no population that can go on"):
        read(tmp_path / "whole")


def test_the_schedule_of_values_follows_the_weights() -> None:
    population = population_of(1.0, 2.0, 3.0)
    from raylm.tuning.population.state import Takeover

    # 1 goes on from 0 at 4; 2 from 1 at 8; 1 from 0 at 12, which is no part of what 2 has.
    for number, step, donor in ((1, 4, 0), (2, 8, 1), (1, 12, 0)):
        population.members[number].takeovers.append(Takeover(step, donor, {RATE: step / 100}))
    for member in population.members:
        member.step = 16
    assert [(p["from_step"], p["to_step"], p["trial"], p["values"][RATE]) for p in schedule(population, 2)] == [
        (0, 4, 0, 0.01),
        (4, 8, 1, 0.04),
        (8, 16, 2, 0.08),
    ]
    assert [(p["from_step"], p["to_step"], p["trial"]) for p in schedule(population, 1)] == [(0, 12, 0), (12, 16, 1)]
    # What was taken over and not trained since.
    population.members[1].step = 12
    assert [(p["from_step"], p["to_step"], p["trial"]) for p in schedule(population, 1)] == [(0, 12, 0)]


def test_a_used_up_budget_exports_the_best_so_far(tmp_path: Path) -> None:
    config = plain_config(tmp_path, tuning={"budget": {"tokens": 2000}})
    population = driven(tmp_path / "spent", config, (3, 5, 7))
    # A turn is of 256 tokens: the eighth comes to 2048 less what the failed member's was.
    assert population.ended and population.tokens <= 2000 + 256
    assert [member.finished for member in population.members].count(True) == 1
    best = next(member for member in population.members if member.finished)
    assert best.figures == min((m.figures for m in population.members), key=lambda figures: figures["validation_loss"])
    assert 4 <= best.step < 16


PBT = "tuning.scheduler=pbt"
DRAWN = "tuning.space={training.learning_rate: {uniform: [0.1, 0.2]}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.batch_size: {choice: [2, 4]}"], "cannot change within training: the place in the data follows"),
        (["training.optimizer: {choice: [adamw, sgd]}"], "each optimizer keeps moments of its own"),
        (["training.steps: {choice: [8, 16]}"], "members are compared at the same steps"),
        (["adapter.rank: {choice: [4, 8]}"], "of what was trained would change; allowed: adapter.dropout"),
        (["adapter: {choice: [null, {rank: 4}]}"], "found 'adapter' with scheduler pbt"),
        (["parallel.zero_stage: {choice: [0, 1]}"], "the layout of others"),
        (["model.path: {choice: [a, b]}"], "members go on with each other's weights"),
        (["freezing.layers: {choice: [0, 1]}"], "it decides which weights have moments"),
        (["objective.answer_only: {choice: [true, false]}"], "allowed: objective.label_smoothing"),
        (["training.keep_zeros: {choice: [true, false]}"], "found 'training.keep_zeros'"),
        (["training.dropout: {grid: [0.0, 0.1]}"], "found a grid of training.dropout with scheduler pbt"),
        (["", "tuning.searcher=tpe"], "tuning.searcher: found tpe with scheduler pbt, allowed with it: random"),
        (["", "tuning.trials=1"], "tuning.trials: found 1 with scheduler pbt, allowed with it: 2 or more"),
        (["", "tuning.budget={trials: 1}"], "tuning.budget.trials: found 1"),
        (["", "training.evaluate_every_steps=null"], "training.evaluate_every_steps: missing; tuning.scheduler pbt"),
        (["", "tuning.perturbation_evaluations=3"], "tuning.perturbation_evaluations: found 3, a turn of 12 steps"),
        (["", "training.early_stopping={patience: 2}"], "training.early_stopping: leave it out"),
        (["", "training.restore_best=true"], "training.restore_best: found true"),
        (["training.momentum: {uniform: [0.0, 0.9]}", "training.optimizer=sgd"], "above 0; without momentum sgd"),
        (["training.momentun: {uniform: [0.1, 0.9]}"], "found 'training.momentun'"),
        (["training.betas.7: {uniform: [0.8, 0.9]}"], "'training.betas.7': found '7' in a list"),
        (["training.warmup_steps: {choice: [0, 99]}"], "warmup_steps: found 99"),
    ],
)  # fmt: skip
def test_refused_in_one_line(tiny_model: Path, tmp_path: Path, overrides: list[str], expected: str) -> None:
    path = write_config(tmp_path, tiny_model)
    key, *others = overrides
    space = f"{DRAWN}{', ' if key else ''}{key}}}"
    with pytest.raises(UserError) as caught:
        tune(load_config("tune", path, [PBT, space, *others]))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "search").exists()


def test_what_may_change_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    space = (
        "tuning.space={training.learning_rate: {log_uniform: [1.0e-4, 1.0e-2]}, training.dropout: {uniform: [0.0, 0.3]}"
        ", training.betas.1: {choice: [0.95, 0.99]}, training.schedule: {choice: [cosine, constant]}"
        ", training.gradient_clipping: {choice: [0.5, 1.0]}, objective.label_smoothing: {uniform: [0.0, 0.2]}}"
    )
    config = load_config("tune", write_config(tmp_path, tiny_model), [PBT, space])
    assert config.tuning.scheduler == "pbt" and len(config.tuning.space) == 6


def rows_config(directory: Path, **changes: Any) -> Path:
    """A population over classifiers, whose rows need no Ray."""
    rows = [f"{words},{label}" for label, words in (("person", "anna lives"), ("weather", "much rain fell"))] * 20
    (directory / "texts.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    write_encoder(directory / "encoder")
    plain_config(directory, **changes)
    return directory / "tune.yaml"


def make_turns(config: Path, *overrides: str, kill_when: Path | None = None) -> None:
    """All turns in a process without Ray; where a file is named, that is killed once it is there."""
    process = start(str(Path(__file__).with_name("population_process.py")), str(config), *overrides)
    try:
        while kill_when is not None and not kill_when.exists():
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.002)
        if kill_when is not None:
            process.kill()
        _, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    assert kill_when is not None or process.returncode == 0, errors[-3000:]


def weights_at(member: Path, step: int) -> dict[str, torch.Tensor]:
    """All weights and moments of a checkpoint."""
    reader = CheckpointReader(member / "checkpoints" / checkpoint_name(step))
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return {
        f"{kind}/{name}": reader.weight(name, kind)
        for name in reader.shapes
        for kind in kinds
        if reader.has(kind, name)
    }


def check_takeovers(run: Path, population: Population) -> int:
    """That each member went on from its donor's weights, moments and data, with its own values; how many did.

    A step's loss and gradient are of the weights before it: those of the first step after the takeover are the donor's.
    """
    found = 0
    for number, member in enumerate(population.members):
        for taken in member.takeovers:
            mine, donors = (run / "trials" / f"trial-{one:03d}" for one in (number, taken.donor))
            lines, theirs = ({line["step"]: line for line in read_metrics(p / "metrics.jsonl")} for p in (mine, donors))
            first = lines[taken.step + 1]
            assert first["learning_rate"] == pytest.approx(taken.values[RATE], rel=1e-6)
            later = [one.step for one in population.members[taken.donor].takeovers]
            for figure in ("loss", "gradient_norm"):
                assert first[figure] == pytest.approx(theirs[taken.step + 1][figure], rel=1e-5)
            # Later takeovers remove the checkpoints of earlier ones.
            if taken == member.takeovers[-1] and not any(step > taken.step for step in later):
                here, there = weights_at(mine, taken.step), weights_at(donors, taken.step)
                assert here.keys() == there.keys() and any(key.startswith("exp_avg_sq/") for key in here)
                assert all(torch.equal(here[key], there[key]) for key in here)
                after = weights_at(mine, taken.step + 1)
                moved = [key for key in here if key.startswith("weight/") and not torch.equal(here[key], after[key])]
                assert moved
            found += 1
    return found


def figures_of(run: Path) -> tuple[list[Any], dict[int, float]]:
    """What a search decided and found: its members, and the best one's losses by step."""
    population = read(run)
    assert population is not None
    lines = {line["step"]: line["loss"] for line in read_metrics(run / "trials" / "trial-000" / "metrics.jsonl")}
    return population.members, lines


@pytest.mark.slow
def test_members_go_on_from_their_donors_also_after_a_kill(tmp_path: Path) -> None:
    """One of four diverges at once and is taken in again; a search that is killed twice has the same members."""
    rates = {
        "space": {RATE: {"log_uniform": [1e-4, 1e30]}},
        "start": [{RATE: rate} for rate in (1e30, 1e-2, 1e-3, 1e-4)],
    }
    config = rows_config(tmp_path, tuning={**rates, "resample_probability": 0.0})
    make_turns(config)
    run = tmp_path / "search"
    population = read(run)
    assert population is not None and population.turn == 3
    assert [(member.step, member.finished, member.failure) for member in population.members] == [(16, True, None)] * 4
    first = population.members[0].takeovers[0]
    assert first.step == 4 and "finite" in str(first.failure)
    assert check_takeovers(run, population) >= 3
    assert "takeover" in [event["kind"] for event in read_events(run / "trials" / "trial-000")]
    trial = run / "trials" / "trial-001"
    for name, place in (("killed", trial / "checkpoints/step-00000003"), ("late", trial / "checkpoints/step-00000010")):
        killed = tmp_path / name
        make_turns(config, f"run.name={name}", kill_when=killed / place.relative_to(run))
        assert (read_object(killed / STATE) or {})["turn"] < 3
        make_turns(config, f"run.name={name}")
        assert figures_of(killed) == figures_of(run)


@pytest.mark.slow
def test_members_of_two_workers_take_turns_on_two_cpus(
    ray_instance, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one trial runs at a time, its ranks are the next one's; the report tells who went on from whom."""
    share = ray_instance.cluster_resources()["CPU"] / 2
    path = write_config(tmp_path, tiny_model, space={RATE: {"log_uniform": [1e-5, 3e-2]}}, trials=4, scheduler="pbt")
    overrides = ["resources.workers=2", f"resources.cpus_per_worker={share}", "training.schedule=constant"]
    logged = ["training.log_every_steps=1", "checkpoint.every_steps=1", "checkpoint.keep=20"]
    before = set(ray_instance.util.placement_group_table())
    tune(load_config("tune", path, [*overrides, *logged]))
    # One group of ranks made all twelve turns.
    assert len(set(ray_instance.util.placement_group_table()) - before) == 1
    run = tmp_path / "search"
    report, population = json.loads((run / "report.json").read_text()), read(run)
    assert report["concurrent_trials"] == 1 and population is not None
    assert [row["status"] for row in report["trials"]] == ["finished"] * 4
    assert check_takeovers(run, population) == 2
    best = report["best"]
    assert best["validation_loss"] == min(row["validation_loss"] for row in report["trials"])
    assert best["schedule"][0]["from_step"] == 0 and best["schedule"][-1]["to_step"] == 12
    assert best["schedule"][-1]["values"] == {RATE: best[RATE]}
    weights = (run / "trials" / f"trial-{best['trial']:03d}" / "model" / "model.safetensors").read_bytes()
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    again = load_config("finetune", run / "best.yaml")
    assert again.training.learning_rate == best[RATE]
    comments = [line for line in (run / "best.yaml").read_text().splitlines() if line.startswith("#   steps ")]
    assert len(comments) == len(best["schedule"])
    takers = [row for row in report["trials"] if row["lineage"]]
    assert f"trial {takers[0]['lineage'][0]['trial']} at {takers[0]['lineage'][0]['step']}" in capsys.readouterr().out
    assert "Members that went on from another" in write_report([run]).read_text()
    assert become_free(seconds=20), holders_of_cpus()


@pytest.mark.slow
def test_an_interrupted_search_goes_on_to_the_same_end(tiny_model: Path, tmp_path: Path) -> None:
    """Ctrl-C exports nothing, and the same command has the members of a search that was left alone."""
    path = write_config(tmp_path, tiny_model, space=SPACE, trials=4, scheduler="pbt", max_concurrent=1)
    command = ["-m", "raylm.cli", "tune", str(path), "training.steps=60", "training.evaluate_every_steps=20"]
    whole = start(*command, "run.name=whole")
    assert whole.wait(240) == 0, whole.communicate()[1][-2000:]
    first, run = start(*command), tmp_path / "search"
    try:
        until = time.monotonic() + 200
        while (read_object(run / STATE) or {}).get("turn") != 1:
            assert first.poll() is None and time.monotonic() < until, first.communicate()[1][-2000:]
            time.sleep(0.1)
        os.killpg(first.pid, 2)
        output, errors = first.communicate(timeout=60)
    finally:
        first.kill()
    assert (first.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "raylm: interrupted" and "Traceback" not in errors
    assert not {"report.json", "model"} & {found.name for found in run.iterdir()}
    again = start(*command)
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors[-2000:]
    left, right = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "search"))
    assert left == right
