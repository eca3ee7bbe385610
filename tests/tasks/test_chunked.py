"""Cross-entropy in chunks: the loss and the gradients of the plain one, with less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from raylm.config.model import ObjectiveSection
from raylm.data.samples.token_samples import IGNORED
from raylm.tasks import chunked, make_objective
from raylm.tasks.objective import Objective


@pytest.mark.parametrize(("bias", "smoothing"), [(True, 0.0), (False, 0.0), (True, 0.2)])
@pytest.mark.parametrize("elements", [1 << 23, 500, 1])
def test_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, bias: bool, smoothing: float, elements: int) -> None:
    monkeypatch.setattr(chunked, "MOST_ELEMENTS", elements)
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 100, bias=bias), torch.randn(37, 16, requires_grad=True)
    targets = torch.randint(0, 100, (37,))
    targets[3:7] = IGNORED
    expected = functional.cross_entropy(head(hidden), targets, reduction="sum", label_smoothing=smoothing)
    wanted = torch.autograd.grad(3 * expected, [hidden, *head.parameters()])
    loss = chunked.head_loss(head, hidden, targets, smoothing)
    found = torch.autograd.grad(3 * loss, [hidden, *head.parameters()])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    # The head is as it was.
    assert head(hidden).shape == (37, 100)
    head.requires_grad_(False)
    (alone,) = torch.autograd.grad(chunked.head_loss(head, hidden, targets, smoothing), [hidden])
    assert torch.allclose(alone * 3, wanted[0], atol=1e-5)
    with torch.no_grad():
        assert chunked.head_loss(head, hidden[:0], targets[:0]) == 0


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(vocab_size=80, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, tie_word_embeddings=True)),
        GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=32, n_layer=1, n_head=2, n_positions=32)),
    ],
    ids=["llama", "gpt2"],
)  # fmt: skip
def test_a_models_loss_is_that_of_its_logits(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MOST_ELEMENTS", 300)
    objective = make_objective(ObjectiveSection(), model.config.model_type)
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(0, 80, (3, 12)), "targets": torch.randint(0, 80, (3, 12))}
    batch["targets"][0, :5] = IGNORED
    losses, gradients = [], []
    for way in (objective.summed_loss, lambda *given: Objective.summed_loss(objective, *given)):
        model.train().zero_grad()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loss = way(model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(*gradients, strict=True))
