"""Documents that are packed into one sequence and told apart: as if each had been read alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from raylm.config import load_config
from raylm.config.data import DataSection, TokenizerSection
from raylm.config.model import ObjectiveSection
from raylm.data.prepare.stage import prepare_directory
from raylm.data.samples.token_samples import IGNORED
from raylm.data.tokens.shards import TokenShards
from raylm.errors import UserError
from raylm.models.families.build import build_model
from raylm.tasks import make_objective
from raylm.tasks.objective import ObjectiveModule

LENGTH = 64


@pytest.fixture(scope="module")
def shards(ray_instance, tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """Documents of 3 to 60 bytes, one of which says ``<|endoftext|>`` in its text."""
    root = tmp_path_factory.mktemp("boundaries")
    source = root / "documents.txt"
    source.write_text("\n".join(f"{i}: " + "ab cd <|endoftext|> e. "[: i % 7 * 9] for i in range(300)))
    data = DataSection(train=str(source), text_unit="line", validation_fraction=0.1)
    prepare_directory(root / "data", data, TokenizerSection(type="byte"))
    return TokenShards(root / "data", "validation")


def model_config(family: str, vocab_size: int) -> GPT2Config | LlamaConfig:
    if family == "gpt2":
        return GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=LENGTH, attn_pdrop=0.0,
                          resid_pdrop=0.0, embd_pdrop=0.0)  # fmt: skip
    return LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=1)  # fmt: skip


def batch_of(shards: TokenShards, boundaries: str, family: str) -> tuple[ObjectiveModule, dict[str, torch.Tensor]]:
    objective = make_objective(ObjectiveSection(document_boundaries=boundaries), family)
    samples = objective.samples(shards.directory, "validation", LENGTH, 0)
    batch = samples.batch(np.arange(samples.count))
    model = build_model(model_config(family, shards.manifest["vocab_size"]), seed=0).eval()
    return ObjectiveModule(model, objective), {name: torch.from_numpy(values) for name, values in batch.items()}


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_is_that_of_each_document_alone(shards: TokenShards, family: str) -> None:
    module, batch = batch_of(shards, "attention", family)
    # Each row is cut where the index, not the tokens, says that documents begin.
    ends = {int(start) - 1 for start in shards.index()[:, 0]}
    alone, pieces = 0.0, 0
    for row, (ids, targets) in enumerate(zip(batch["input_ids"], batch["targets"], strict=True)):
        cuts = [place for place in range(1, LENGTH) if row * LENGTH + place in ends]
        for piece in np.split(np.arange(LENGTH), cuts):
            logits = module.model(input_ids=ids[piece][None]).logits[0]
            alone += torch.nn.functional.cross_entropy(logits, targets[piece], ignore_index=IGNORED, reduction="sum")
            pieces += 1
    count = int((batch["targets"] != IGNORED).sum())
    assert count == shards.token_count - 1 and pieces > len(batch["targets"])
    assert float(module(**batch)) / count == pytest.approx(float(alone) / count, abs=1e-5)
    across, plain = batch_of(shards, "ignore", family)
    assert "position_ids" not in plain
    assert abs(float(across(**plain)) - float(alone)) / count > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("boundaries", "sees"), [("attention", False), ("positions", True)])
def test_what_a_token_sees_of_the_document_before(shards: TokenShards, boundaries: str, sees: bool) -> None:
    module, batch = batch_of(shards, boundaries, "gpt2")
    positions = batch["position_ids"][0]
    second = int((positions[1:] == 0).nonzero()[0]) + 1
    assert positions[: second + 2].tolist() == [*range(second), 0, 1]
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][0, 1] = (changed["input_ids"][0, 1] + 1) % 200
    before, after = (module.logits(values)[0] for values in (batch, changed))
    assert torch.equal(before[second:], after[second:]) != sees
    assert not torch.equal(before[1], after[1])


def test_the_order_of_samples_stays_the_same(shards: TokenShards) -> None:
    plain, told = (
        make_objective(ObjectiveSection(document_boundaries=kind), "llama").samples(shards.directory, "train", 32, 3)
        for kind in ("ignore", "attention")
    )
    numbers = np.array([5, 0, plain.count + 3, 7 * plain.count])
    whole = told.batch(numbers)
    for name, values in plain.batch(numbers).items():
        assert np.array_equal(values, whole[name])
    for row, number in enumerate(numbers):
        assert np.array_equal(told.batch(np.array([number]))["position_ids"][0], whole["position_ids"][row])


def test_what_cannot_tell_documents_apart_is_refused(shards: TokenShards, tmp_path: Path) -> None:
    section = ObjectiveSection(document_boundaries="attention")
    with pytest.raises(UserError, match=r"document_boundaries: found attention, allowed with objective.type masked"):
        make_objective(section, "bert")
    path = tmp_path / "pretrain.yaml"
    path.write_text(
        "run: {name: x}\ndata: {train: stdlib-docs}\nmodel: {family: gpt2}\ntraining: {steps: 1}\n"
        "objective: {document_boundaries: positions}\n"
    )
    assert load_config("pretrain", path).objective.document_boundaries == "positions"
    with pytest.raises(UserError, match=r"document_boundaries: found positions, allowed with parallel.tensor"):
        load_config("pretrain", path, ["parallel.pipeline=2", "resources.workers=2"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answers_alone_through_the_head_have_the_same_loss_and_gradients(
    ray_instance: object, tmp_path: Path, family: str
) -> None:
    rows = [{"prompt": "so many words to ask " + "with " * (i % 5), "answer": f"{i} yes"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(train=str(tmp_path / "pairs.jsonl"), validation_fraction=0.2)
    prepare_directory(tmp_path / "data", data, TokenizerSection(type="byte"))
    objective = make_objective(ObjectiveSection(), family)
    samples = objective.samples(tmp_path / "data", "train", LENGTH, 0)
    batch = {name: torch.from_numpy(values) for name, values in samples.batch(np.arange(4)).items()}
    share = (batch["targets"] != IGNORED).float().mean()
    assert 0 < share < 0.5
    config = model_config(family, TokenShards(tmp_path / "data", "train").manifest["vocab_size"])
    model = build_model(config, seed=0)
    widths: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, given: widths.append(given[0].shape[:-1]))
    found = []
    for one in (objective, make_objective(ObjectiveSection(), family)):
        model.zero_grad()
        loss = ObjectiveModule(model, one)(**batch)
        loss.backward()
        found.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert widths == [(int((batch["targets"] != IGNORED).sum()),), (batch["targets"].numel(),)]
    (loss, gradients), (expected, all_gradients) = found
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, all_gradients[name], rtol=1e-4, atol=1e-5, msg=name)
