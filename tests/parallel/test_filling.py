"""Weights without a whole model: what is drawn and what is read, against transformers' own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from families import FAMILIES, build

from raylm.errors import UserError
from raylm.models.heads import CAUSAL, MASKED, READER, SEQUENCE_TO_SEQUENCE
from raylm.models.weights import DrawnWeights, make_outline, saved_weights
from raylm.parallel.engines.filling import fill
from raylm.parallel.layout.slicing import cut_evenly

HEADS = {"bert": MASKED, "t5": SEQUENCE_TO_SEQUENCE}
CPU = torch.device("cpu")


def outline_of(family: str):
    return make_outline(build(family).config, HEADS.get(family, CAUSAL))


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_weights_follow_the_family_rules(family: str) -> None:
    whole, outline = build(family), outline_of(family)
    weights = DrawnWeights(outline, 0)
    names = [name for name, _ in outline.model.named_parameters()]
    assert names == [name for name, _ in whole.named_parameters()]
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    for name, expected in whole.named_parameters():
        drawn = weights.open(name)
        assert torch.equal(drawn, weights.open(name))
        if expected.std() == 0:
            assert torch.equal(drawn, expected), name
        else:
            assert float(drawn.std()) == pytest.approx(float(expected.detach().std()), rel=0.25), name
            assert not torch.equal(drawn, DrawnWeights(outline, 1).open(name))
            # A padding row is zero in both, or in none.
            assert torch.equal((drawn == 0).all(-1), (expected == 0).all(-1)), name
    matrices = [weights.open(name).flatten()[:64] for name in names if name.endswith(("q_proj.weight", "q.weight"))]
    assert len({tuple(values.tolist()) for values in matrices}) == len(matrices)
    for (name, expected), (_, found) in zip(whole.named_buffers(), outline.model.named_buffers(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_filled_model_is_the_saved_one(family: str, tmp_path: Path) -> None:
    whole, head = build(family).eval(), HEADS.get(family, CAUSAL)
    whole.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    outline = outline_of(family)
    weights = saved_weights(str(tmp_path), outline, head, 0)
    fill(outline.model, {p: name for name, p in outline.model.named_parameters()}, weights, CPU)
    ids = torch.arange(12).reshape(2, 6)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if family == "t5" else {})}
    assert torch.equal(outline.model.eval()(**inputs).logits, whole(**inputs).logits)
    # Tied parameters are one.
    assert sum(p.numel() for p in outline.model.parameters()) == sum(p.numel() for p in whole.parameters())


def test_parts_come_out_of_the_file_and_names_of_other_classes_are_known(tmp_path: Path) -> None:
    whole = build("bert")
    whole.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    # As the hub's older files have it: the network's own class, gamma and beta.
    old = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): values
        for name, values in tensors.items()
        if name.startswith("bert.")
    }
    save_file(old, file)
    outline = make_outline(whole.config, READER)
    weights = saved_weights(str(tmp_path), outline, READER, 3)
    name = "bert.encoder.layer.1.output.dense.weight"
    expected = tensors[name]
    for dimension in (0, 1):
        cut = cut_evenly(tuple(expected.shape), dimension, 1, 2)
        assert torch.equal(cut.read(weights.open(name)), cut.take(expected))
    norm = "bert.embeddings.LayerNorm.weight"
    assert torch.equal(weights.open(norm)[...], tensors[norm])
    # The head is new.
    assert torch.equal(weights.open("qa_outputs.weight"), DrawnWeights(outline, 3).open("qa_outputs.weight"))
    save_file({**old, "embeddings.position_embeddings.weight": torch.zeros(7, 32)}, file)
    with pytest.raises(UserError, match=r"embeddings.position_embeddings.weight in the shape \[7, 32\]"):
        saved_weights(str(tmp_path), outline, READER, 3).open("bert.embeddings.position_embeddings.weight")
    save_file({**old, "embeddings.position_embeddings.weight": torch.zeros(32, 32, dtype=torch.int8)}, file)
    with pytest.raises(UserError, match=r"position_embeddings.weight as I8, allowed for training: F64, F32, F16, BF16"):
        saved_weights(str(tmp_path), outline, READER, 3).open("bert.embeddings.position_embeddings.weight")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model\.path: .* cannot be loaded"):
        saved_weights(str(tmp_path), outline, READER, 3)
