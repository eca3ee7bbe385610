"""Stopping, and keeping the best weights, by any metric."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raylm.config import load_config
from raylm.config.training import TrainingSection
from raylm.errors import UserError
from raylm.tasks import all_tasks
from raylm.tasks.measures import MEASURES, improves
from raylm.training.inputs import validate
from raylm.training.loop.best import after_evaluation, initial_state, is_patience_over, judge
from raylm.training.reports.metrics import read_metrics
from raylm.training.reports.summary import facts
from tests.training.classifiers import LABELS, write_encoder, write_rows, write_run
from tests.training.loops import run_case, run_loops


def test_every_measure_has_its_direction_and_name() -> None:
    for task in all_tasks():
        if task.objective is not None:
            assert set(task.objective.measures) <= set(MEASURES), task.name


def test_direction_follows_from_the_metric() -> None:
    assert improves("validation_loss", 1.0, 2.0) and not improves("validation_loss", 2.0, 1.0)
    assert improves("validation_accuracy", 0.9, 0.8) and not improves("validation_accuracy", 0.8, 0.9)
    assert not improves("validation_accuracy", 0.81, 0.8, 0.05)
    assert improves("loss", 1.0, None) and not improves("loss", float("nan"), None)


def section(**keys: object) -> TrainingSection:
    return TrainingSection(steps=100, evaluate_every_steps=10, **keys)


def test_patience_counts_evaluations_by_the_metric() -> None:
    training = section(early_stopping={"metric": "validation_accuracy", "patience": 2})
    state, over = initial_state(), []
    for step, (loss, accuracy) in enumerate([(3.0, 0.5), (2.0, 0.4), (1.0, 0.6), (0.9, 0.6), (0.8, 0.5)]):
        judge(state, training, {"step": step, "loss": 1.0, "validation_loss": loss, "validation_accuracy": accuracy})
        over.append(is_patience_over(state, training))
    assert over == [False, False, False, False, True]
    assert (state["best"], state["best_step"], state["best_validation_loss"]) == (0.6, 2, 1.0)
    patient = section(early_stopping={"patience": None})
    assert not is_patience_over(state, patient)
    # Another metric begins anew, as values of two do not compare.
    judge(state, patient, {"step": 5, "loss": 1.0, "validation_loss": 2.5})
    assert (state["best"], state["without_improvement"]) == (2.5, 0)


@pytest.mark.parametrize("patience", [1, 3])
def test_plateau_is_torch_s(patience: int) -> None:
    training = section(
        schedule="plateau", final_learning_rate_fraction=0.05, plateau={"patience": patience, "factor": 0.3}
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    # torch lowers the rate after more than its patience.
    torch_s = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.3, patience=patience - 1, threshold=0.0, min_lr=0.05
    )
    plateau = initial_state()["plateau"]
    for value in torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist():
        plateau = after_evaluation(plateau, training, value)
        torch_s.step(value)
        assert plateau["factor"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert plateau["factor"] == 0.05


def scores(model: Path, rows: list[tuple[str, str]]) -> tuple[float, float]:
    """Accuracy and macro-F1, by transformers and scikit-learn alone."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForSequenceClassification.from_pretrained(model)
    given = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.inference_mode():
        found = [network.config.id2label[i] for i in network(**given).logits.argmax(dim=1).tolist()]
    expected = [label for _, label in rows]
    return accuracy_score(expected, found), f1_score(expected, found, average="macro", labels=LABELS)


@pytest.mark.slow
def test_best_weights_by_a_measure_are_exported(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder")
    write_rows(tmp_path / "train.csv", 300, 1)
    rows = write_rows(tmp_path / "dev.csv", 80, 2)
    stopping = {"early_stopping": {"metric": "validation_macro_f1", "patience": 3}, "steps": 120}
    path = write_run(tmp_path, "best", training=stopping, parallel={"zero_stage": 3})
    last = ["run.name=last", "training.restore_best=false", "parallel.zero_stage=1"]
    kept = ["run.name=kept", "training.early_stopping=null", "training.restore_best=true", "training.steps=60"]
    found = dict(
        zip(
            ("best", "last", "kept"),
            run_loops(*(run_case(path, *more, workers=2, stage="finetune") for more in ([], last, kept))),
            strict=True,
        )
    )
    lines = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in found}
    evaluated = {name: [one for one in of if "validation_loss" in one] for name, of in lines.items()}
    best = max(evaluated["best"], key=lambda line: line["validation_macro_f1"])
    assert found["best"]["stopped_early"] and found["best"]["exported_step"] == best["step"] < found["best"]["step"]
    assert found["best"]["best"]["metric"] == "validation_macro_f1"
    assert found["last"]["exported_step"] == found["last"]["step"]
    lowest = min(evaluated["kept"], key=lambda line: line["validation_loss"])
    assert (found["kept"]["exported_step"], found["kept"]["stopped_early"]) == (lowest["step"], False)
    for name in found:
        exported = next(line for line in lines[name] if line["step"] == found[name]["exported_step"])
        accuracy, f1 = scores(tmp_path / name / "model", rows)
        assert exported["validation_accuracy"] == pytest.approx(accuracy, abs=1e-9)
        assert exported["validation_macro_f1"] == pytest.approx(f1, abs=1e-6)
    words = facts(lines["best"], None)
    assert words["macro-F1"].endswith(f"{best['validation_macro_f1']:.1%} at best (step {best['step']})")


@pytest.mark.slow
def test_a_resumed_plateau_repeats_the_bits(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder")
    write_rows(tmp_path / "train.csv", 200, 1)
    write_rows(tmp_path / "dev.csv", 40, 2)
    plateau = {"schedule": "plateau", "plateau": {"metric": "validation_accuracy", "patience": 1}, "steps": 40}
    path = write_run(tmp_path, "whole", training=plateau, checkpoint={"every_steps": 8, "every_seconds": None})
    run_loops(run_case(path, stage="finetune"), run_case(path, "run.name=parts", "training.steps=23", stage="finetune"))
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000023")
    run_loops(run_case(path, "run.name=parts", stage="finetune"))
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for key in ("step", "loss", "learning_rate", "validation_accuracy"):
        assert [line.get(key) for line in whole] == [line.get(key) for line in parts]
    assert len({line["learning_rate"] for line in whole}) > 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.early_stopping.metric=validation_f1",
            "early_stopping.metric: found 'validation_f1', allowed with obj",
        ),
        (
            "training.early_stopping.metric=accuracy",
            "early_stopping.metric: found 'accuracy', allowed: loss, validation_",
        ),
        ("training.evaluate_every_steps=null", "training.evaluate_every_steps: missing; early_stopping needs it"),
    ],
)
def test_a_metric_that_the_task_does_not_give_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    write_encoder(tmp_path / "encoder")
    path = write_run(tmp_path, "refused", training={"early_stopping": {"patience": 3}})
    write_rows(tmp_path / "train.csv", 20, 1)
    write_rows(tmp_path / "dev.csv", 20, 2)
    with pytest.raises(UserError) as refused:
        validate(load_config("finetune", path, [override]))
    assert expected in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "refused").exists()
