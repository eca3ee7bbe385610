"""A rotated residual stream computes the same, and its first channels have most of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
)

from raylm.compression.pruning.importance import watched
from raylm.compression.pruning.rotation import rotate
from raylm.models.families import find_family
from tests.compression.small_models import batches, build, cutter, logits, objective, of_heads, reloaded


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_computes_the_same(tied: bool, tmp_path: Path) -> None:
    model = build("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    rotated = rotate(model, find_family("llama"), objective("llama"), batches("llama"))
    expected = logits("llama", model)
    assert (logits("llama", reloaded("llama", rotated, tmp_path)) - expected).abs().max() < 1e-4 * expected.abs().max()
    # The channels are uncorrelated, and the first have most.
    seen: list[torch.Tensor] = []
    with watched(rotated, ["model.norm"], lambda name, given: seen.append(given.flatten(0, -2))):
        logits("llama", rotated)
    squares = seen[0].square().mean(dim=0)
    assert float(squares[:64].sum()) > 2 * float(squares[64:].sum())


def test_a_stream_in_fewer_directions_is_cut_exactly() -> None:
    """A model whose stream uses 64 directions of 128, none of them a channel, is one of width 64."""
    narrow = of_heads(2, 64)
    with torch.no_grad():
        for parameter in narrow.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        # So that the norms' epsilon is nothing beside it.
        narrow.model.embed_tokens.weight.mul_(100.0)
    config = copy.deepcopy(narrow.config)
    config.hidden_size, config.head_dim = 128, 32
    basis = torch.linalg.qr(torch.randn(128, 128))[0][:, :64]
    state = {}
    for name, value in narrow.state_dict().items():
        if value.dim() == 1:
            # The mean square over twice as many channels is half.
            state[name] = torch.full((128,), 0.5**0.5)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            state[name] = basis @ value
        elif "embed" in name:
            state[name] = value @ basis.t()
        else:
            norm = {"mlp": "post_attention_layernorm", "self_attn": "input_layernorm"}
            prefix, _, rest = name.partition(".layers.")
            gain = narrow.state_dict()["model.norm.weight"]
            if rest:
                number, part = rest.split(".")[:2]
                gain = narrow.state_dict()[f"{prefix}.layers.{number}.{norm[part]}.weight"]
            state[name] = value * gain @ basis.t()
    wide = LlamaForCausalLM(config).eval()
    wide.load_state_dict(state)
    assert torch.allclose(logits("llama", wide), logits("llama", narrow), atol=1e-5)
    found, _ = cutter("llama", width=64, rotate=True).shapes(wide)
    assert found.config.hidden_size == 64
    assert torch.allclose(logits("llama", found), logits("llama", narrow), atol=1e-4)
    plain, _ = cutter("llama", width=64).shapes(wide)
    assert (logits("llama", plain) - logits("llama", narrow)).abs().max() > 0.05
