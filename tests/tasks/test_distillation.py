"""Distillation losses against PyTorch's own, for every task; and what a batch is cut into does not matter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from raylm.config.distillation import DistillationSection
from raylm.config.model import ObjectiveSection
from raylm.tasks import make_objective
from raylm.tasks.distillation import ROWS, SoftenedDivergence, distilled_loss


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_softened_divergence_and_its_gradient(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # More rows than are in memory at a time.
    shape = (2 * ROWS + 7, 11)
    student = torch.randn(shape, generator=generator, requires_grad=True)
    teacher = torch.randn(shape, generator=generator)
    found = SoftenedDivergence.apply(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(2 * found, student)
    expected = temperature**2 * functional.kl_div(
        (student / temperature).log_softmax(dim=-1), (teacher / temperature).log_softmax(dim=-1), reduction="sum",
        log_target=True,
    )  # fmt: skip
    (wanted,) = torch.autograd.grad(2 * expected, student)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, wanted, atol=1e-5)


def encoder(kind: type, seed: int, layers: int = 2, **config: object):
    torch.manual_seed(seed)
    return kind(
        BertConfig(
            vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            attn_implementation="eager", **config,
        )
    )  # fmt: skip


def batch(targets: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 40, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids), "targets": targets}
    return found | {"candidates": mask.bool()}


def objective(name: str, **section: object):
    return make_objective(ObjectiveSection(type=name), "bert", DistillationSection(**section))


def test_a_classifier_learns_the_teachers_classes() -> None:
    student, teacher = (encoder(BertForSequenceClassification, seed, num_labels=3).train() for seed in (0, 1))
    given = batch(torch.tensor([[0], [2], [-100], [1]]))
    found = distilled_loss(objective("classification", targets=0.5), student, teacher, given)
    ask = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    rows, wanted = student(**ask).logits, teacher(**ask).logits
    counted = torch.tensor([0, 1, 3])
    expected = functional.kl_div(
        rows[counted].log_softmax(dim=-1), wanted[counted].log_softmax(dim=-1), reduction="sum", log_target=True
    ) + 0.5 * functional.cross_entropy(rows[counted], given["targets"][counted, 0], reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_reader_learns_where_the_teacher_points() -> None:
    student, teacher = (encoder(BertForQuestionAnswering, seed).train() for seed in (0, 1))
    given = batch(torch.tensor([[1, 2], [3, 4], [5, 5], [-100, -100]]))
    divergence = distilled_loss(objective("extractive_qa"), student, teacher, given)
    ask = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    total = torch.zeros(())
    for side in ("start_logits", "end_logits"):
        one, other = (
            getattr(model(**ask), side).masked_fill(~given["candidates"], -1e4)[:3] for model in (student, teacher)
        )
        total = total + functional.kl_div(
            one.log_softmax(dim=-1), other.log_softmax(dim=-1), reduction="sum", log_target=True
        )
    assert divergence.item() == pytest.approx(total.item(), rel=1e-4)


def test_layers_are_compared_with_those_of_the_map() -> None:
    student = encoder(BertForSequenceClassification, 0, layers=2, num_labels=2).train()
    teacher = encoder(BertForSequenceClassification, 1, layers=4, num_labels=2).eval()
    given = batch(torch.tensor([[0], [1], [-100], [1]]))
    ask = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    shown = {"output_hidden_states": True, "output_attentions": True}
    one, other = student(**ask, **shown), teacher(**ask, **shown)
    mask = given["attention_mask"].float()
    counted = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def mean(each: torch.Tensor) -> torch.Tensor:
        return ((each * mask).sum(dim=1) / mask.sum(dim=1) * counted).sum()

    states = [
        (one.hidden_states[i + 1] - other.hidden_states[j + 1]).square().mean(dim=-1) for i, j in ((0, 0), (1, 2))
    ]
    chances = [(one.attentions[i] - other.attentions[j]).square().sum(dim=-1).mean(dim=1) for i, j in ((0, 0), (1, 2))]
    section = {"logits": 0.0, "layer_map": [0, 2]}
    hidden = distilled_loss(objective("classification", hidden=1.0, **section), student, teacher, given)
    attention = distilled_loss(objective("classification", attention=1.0, **section), student, teacher, given)
    assert hidden.item() == pytest.approx(torch.stack([mean(each) for each in states]).mean().item(), rel=1e-5)
    assert attention.item() == pytest.approx(torch.stack([mean(each) for each in chances]).mean().item(), rel=1e-5)


def test_a_batch_may_be_cut_anywhere() -> None:
    student, teacher = (encoder(BertForSequenceClassification, seed, num_labels=3).eval() for seed in (0, 1))
    given = batch(torch.tensor([[0], [2], [-100], [1]]))
    task = objective("classification", hidden=1.0, attention=1.0, targets=1.0)
    whole = distilled_loss(task, student, teacher, given)
    parts = [distilled_loss(task, student, teacher, {n: v[i : i + 1] for n, v in given.items()}) for i in range(4)]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"logits": 0.0}, "found no weight above 0"),
        ({"layer_map": [0]}, "layer_map: leave it out, or give hidden or attention a weight"),
    ],
)
def test_refused(section: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        DistillationSection(**section)
