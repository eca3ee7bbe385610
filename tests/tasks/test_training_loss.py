"""What training minimises with smoothed labels and weighted classes, against plain torch; how batches are cut does not
matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from raylm.config.model import ObjectiveSection
from raylm.errors import UserError
from raylm.tasks import make_objective
from raylm.tasks.classification.objective import label_weights
from raylm.tasks.extractive_qa.objective import EXCLUDED

IGNORED = -100


def draw(*shape: int) -> torch.Tensor:
    return 2.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "model_type"), [("causal", "llama"), ("masked", "bert"), ("span", "t5")])
def test_tokens_are_smoothed_as_in_torch(name: str, model_type: str) -> None:
    objective = make_objective(ObjectiveSection(type=name, label_smoothing=0.1), model_type)
    logits, targets = draw(3, 5, 11), torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    targets[0, 2:] = IGNORED
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction="sum")
    assert objective.training_loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    parts = sum(objective.training_loss(logits[i : i + 1], targets[i : i + 1]) for i in range(3))
    assert parts.item() == pytest.approx(expected.item(), rel=1e-6)
    plain = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert objective.loss(logits, targets).item() == pytest.approx(plain.item(), rel=1e-6)


def test_classes_are_weighted_and_smoothed_as_in_torch() -> None:
    section = ObjectiveSection(type="classification", label_smoothing=0.2, class_weights="balanced")
    objective = make_objective(section, "bert")
    logits, targets = draw(6, 3), torch.tensor([[0], [0], [2], [1], [IGNORED], [0]])
    objective._weights = weights = label_weights("balanced", ["a", "b", "c"], [3, 1, 1])
    expected = functional.cross_entropy(logits, targets[:, 0], weights, label_smoothing=0.2, reduction="sum")
    assert objective.training_loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    plain = functional.cross_entropy(logits, targets[:, 0], reduction="sum")
    assert objective.loss(logits, targets).item() == pytest.approx(plain.item(), rel=1e-6)


def test_balanced_weights_are_scikit_learn_s() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 7 + [1] * 2 + [3]
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels).tolist()
    found = label_weights("balanced", ["a", "b", "c", "d"], [7, 2, 0, 1]).tolist()
    assert found == pytest.approx([expected[0], expected[1], 1.0, expected[2]])
    assert label_weights({"b": 3}, ["a", "b"], [1, 1]).tolist() == [1.0, 3.0]


def test_an_answer_s_places_are_smoothed_over_what_can_be_pointed_at() -> None:
    objective = make_objective(ObjectiveSection(type="extractive_qa", label_smoothing=0.1), "bert")
    candidates = torch.tensor([[1, 0, 1, 1, 1], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    logits = draw(3, 5, 2).masked_fill(~candidates[:, :, None], EXCLUDED).requires_grad_()
    targets = torch.tensor([[2, 3], [0, 0], [IGNORED, IGNORED]])
    expected = torch.zeros(())
    for row in range(2):
        for side in range(2):
            kept = logits[row, candidates[row], side]
            place = int(candidates[row, : targets[row, side]].sum())
            expected = expected + functional.cross_entropy(kept[None], torch.tensor([place]), label_smoothing=0.1)
    found = objective.training_loss(logits, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "model_type"), [("causal", "gpt2"), ("extractive_qa", "bert")])
def test_weights_of_classes_are_for_classes(name: str, model_type: str) -> None:
    with pytest.raises(UserError, match=f"objective.class_weights: leave it out; objective.type {name} has no place"):
        make_objective(ObjectiveSection(type=name, class_weights="balanced"), model_type)


def test_labels_that_look_like_numbers_are_names() -> None:
    assert ObjectiveSection(class_weights={0: 1.0, 1: 2.5}).class_weights == {"0": 1.0, "1": 2.5}
