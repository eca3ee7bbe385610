"""A loss of the user's own: what it may be, what is refused before anything is made, and a run against plain torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from raylm.config import load_config
from raylm.config.model import ObjectiveSection
from raylm.data.samples.labelled import LabelledSamples
from raylm.data.samples.token_samples import IGNORED
from raylm.errors import RunFailure, UserError
from raylm.launcher.package import own_modules, packaged
from raylm.tasks import make_objective
from raylm.tasks.own_loss import OwnLoss
from raylm.training.inputs import labels_of, validate
from raylm.training.reports.metrics import read_metrics
from raylm.tuning.checking import check_space
from tests.training.classifiers import write_run, write_with_module
from tests.training.loops import run_case, run_loops

LOSSES = """
import torch
from torch.nn import functional


class Focal:
    # Lin et al. 2017, arXiv:1708.02002.
    def __init__(self, gamma=2.0):
        self.gamma = gamma

    def __call__(self, logits, targets):
        plain = functional.cross_entropy(logits, targets, reduction="none")
        return (1 - (-plain).exp()) ** self.gamma * plain


class Learned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, logits, targets):
        return self.scale * functional.cross_entropy(logits, targets, reduction="none")


def plain(logits, targets, scale=1.0):
    return scale * functional.cross_entropy(logits, targets, reduction="none")


def averaged(logits, targets):
    return functional.cross_entropy(logits, targets)


def accuracy(logits, targets):
    return (logits.argmax(dim=1) == targets).float()


def for_five(logits, targets):
    return functional.cross_entropy(logits, targets, torch.ones(5), reduction="none")


def logarithm(logits, targets):
    return (logits[:, 0] - 1e9).log()


SCALE = 3
"""
PLAIN = {"steps": 12, "evaluate_every_steps": None, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.05,
         "gradient_clipping": 0.0, "weight_decay": 0.0}  # fmt: skip


def write_all(directory: Path) -> None:
    """An encoder, texts, and a module of losses of which each directory has its own."""
    write_with_module(directory, module_of(directory), LOSSES)


def module_of(directory: Path) -> str:
    return f"losses_{directory.name}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own")
    write_all(directory)
    (directory / "broken_losses.py").write_text("def loss(:\n")
    return directory


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"loss": "plain"}, r"objective.loss: found 'plain', allowed: module:attribute"),
        ({"loss": "nowhere_to_be_found:x"}, r"cannot import nowhere_to_be_found from \S+ or the PYTHONPATH: ModuleNot"),
        ({"loss": "broken_losses:loss"}, r"objective.loss: cannot import broken_losses .*SyntaxError"),
        ({"loss": "MODULE:Fokal"}, r"objective.loss: found '\S+:Fokal', allowed: what \S+\.py has; it has no 'Fokal'"),
        ({"loss": "MODULE:SCALE"}, r"objective.loss: found '\S+:SCALE' of type int, allowed: a function"),
        ({"loss": "MODULE:averaged"}, r"returned the shape \[\], allowed: .*\[4\] \(reduction='none'\)"),
        ({"loss": "MODULE:accuracy"}, r"returned losses without a gradient"),
        ({"loss": "MODULE:logarithm"}, r"returned a loss that is not finite"),
        ({"loss": "MODULE:for_five"}, r"on 4 example logits \[4, 3\] and targets \[4\]: RuntimeError: weight tensor"),
        ({"loss": "MODULE:Learned"}, r"which has parameters of its own, allowed: none"),
        ({"loss": "MODULE:Focal", "loss_options": {"gama": 1}}, r"objective.loss_options: found \{'gama': 1\}, which"),
        ({"loss_options": {"gamma": 1}}, r"objective.loss_options: allowed with loss"),
        ({"loss": "MODULE:plain", "label_smoothing": 0.1}, r"objective.label_smoothing: found 0.1, allowed with loss"),
        ({"loss": "MODULE:plain", "type": "extractive_qa"}, r"objective.loss: leave it out; objective.type extractive"),
        ({"loss": "MODULE:plain", "type": "tagging", "head": "crf"}, r"objective.head: found crf, allowed with loss"),
    ],
)
def test_what_is_no_loss_is_refused_in_one_line(folder: Path, objective: dict, message: str) -> None:
    if "loss" in objective:
        objective = {**objective, "loss": objective["loss"].replace("MODULE", module_of(folder))}
    path = write_run(folder, "refused", objective=objective)
    with pytest.raises(UserError, match=message):
        validate(load_config("finetune", path))
    assert not (folder / "refused").exists()


def test_the_sum_counts_only_targets_that_count() -> None:
    seen = []

    def function(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append((logits.dtype, targets.tolist()))
        return functional.cross_entropy(logits, targets, reduction="none")

    loss, logits = OwnLoss("here:function", function), torch.randn(4, 3, requires_grad=True)
    targets, weights = torch.tensor([2, IGNORED, 0, 1]), torch.tensor([1.0, 2.0, 0.5])
    expected = functional.cross_entropy(logits, targets, weights, ignore_index=IGNORED, reduction="sum")
    assert loss.summed(logits.bfloat16().detach(), targets).item() > 0
    assert loss.summed(logits, targets, weights).item() == pytest.approx(expected.item(), abs=1e-6)
    assert seen == [(torch.float32, [2, 0, 1])] * 2
    # A batch that only fills up: zero, with a gradient, and nothing for the function.
    empty = loss.summed(logits, torch.full((4,), IGNORED))
    empty.backward()
    assert len(seen) == 2 and empty.item() == 0 and not logits.grad.any()
    with pytest.raises(RunFailure, match=r"objective.loss: here:mean returned the shape \[\]"):
        OwnLoss("here:mean", functional.cross_entropy).summed(logits, targets)


def test_taggers_take_one_too(folder: Path) -> None:
    values = {"type": "tagging", "loss": f"{module_of(folder)}:plain", "loss_options": {"scale": 3.0}}
    objective = make_objective(ObjectiveSection(**values, imports_from=str(folder)), "bert")
    logits, targets = torch.randn(2, 5, 3), torch.tensor([[0, 1, IGNORED, 2, IGNORED], [IGNORED] * 5])
    assert objective.training_loss(logits, targets).item() == pytest.approx(3 * objective.loss(logits, targets).item())


def test_every_loss_of_a_search_is_tried(folder: Path) -> None:
    path, module = write_run(folder, "search"), module_of(folder)
    for losses, refused in (([f"{module}:plain", f"{module}:Focal"], False), ([f"{module}:averaged"], True)):
        space = {"objective.loss": {"grid": losses}}
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "tuning": {"space": space}}))
        config = load_config("tune", path)
        checked = validate(config)
        labels = labels_of(config, checked.data)
        assert labels == ["calm", "loud", "rare"]
        if refused:
            with pytest.raises(UserError, match=r"objective.loss: \S+:averaged on 4 example .*reduction='none'"):
                check_space(config, checked.model.objective, labels)
        else:
            assert [point["objective.loss"] for point in check_space(config, checked.model.objective, labels)] == losses
        with packaged(path, own_modules(config, path)) as directory:
            assert (directory / f"{module}.py").read_text() == LOSSES


@pytest.mark.slow
def test_a_run_with_a_loss_of_ones_own_is_a_plain_loop(tmp_path: Path) -> None:
    write_all(tmp_path)
    module = module_of(tmp_path)
    focal = {"loss": f"{module}:Focal", "loss_options": {"gamma": 1.5}, "class_weights": {"rare": 3.0}}
    path = write_run(tmp_path, "focal", training=PLAIN, objective=focal)
    same = write_run(tmp_path, "same", training=PLAIN, objective={"loss": f"{module}:plain"})
    given = write_run(tmp_path, "given", training=PLAIN)
    cut = ["run.name=cut", "parallel.zero_stage=2", "parallel.micro_batch_size=2"]
    runs = [run_case(one, stage="finetune") for one in (path, same, given)]
    *_, one, other, _ = run_loops(*runs, run_case(path, *cut, workers=2, stage="finetune"))
    assert one["validation_loss"] == pytest.approx(other["validation_loss"], abs=2e-6)
    lines = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("focal", "same", "given", "cut")}
    losses = {name: [line["loss"] for line in found] for name, found in lines.items()}
    assert losses["same"] == pytest.approx(losses["given"], abs=2e-6)
    assert losses["cut"] == pytest.approx(losses["focal"], abs=2e-6)
    # The loss of one more step, from the exported weights by torch alone.
    samples = LabelledSamples(tmp_path / "focal" / "data", "train", 0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "focal" / "model").train()
    batch = {name: torch.from_numpy(v) for name, v in samples.batch(np.arange(12 * 16, 13 * 16)).items()}
    targets = batch.pop("targets")[:, 0]
    plain = functional.cross_entropy(model(**batch).logits, targets, reduction="none")
    weights = torch.tensor([1.0, 1.0, 3.0])[targets]
    expected = ((1 - (-plain).exp()) ** 1.5 * plain * weights).sum().item() / 16
    run_loops(run_case(path, "training.steps=13", stage="finetune"))
    assert read_metrics(tmp_path / "focal" / "metrics.jsonl")[-1]["loss"] == pytest.approx(expected, abs=2e-6)
