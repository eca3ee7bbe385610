"""The records of the families, what one more of them takes, and what a model's matrices are for."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from raylm.config.families import FAMILIES, FamilyTraits
from raylm.config.model import ModelSection, ObjectiveSection
from raylm.config.training import ParallelSection
from raylm.errors import UserError
from raylm.models.families import all_families, find_family, find_outline, llama
from raylm.models.families.base import Family, Outline, Split
from raylm.models.families.build import build_config, build_empty, build_model
from raylm.models.heads import CAUSAL
from raylm.parallel.layout.pipeline_stages import StageLayer
from raylm.parallel.layout.tensor import TensorGroup
from raylm.parallel.plan.refusals import check_splits
from raylm.tasks import find_task, make_objective
from raylm.training.loop.flops import flops_per_token
from raylm.training.optimizers.build import hidden_matrices

LAYER = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
CONFIGS = {
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2},
    "llama": {**LAYER, "intermediate_size": 32},
    "bert": {**LAYER, "intermediate_size": 32},
    "t5": {"num_layers": 1, "d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 32},
}


class Tokenizer:
    """What a configuration takes of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __len__(self) -> int:
        return 97


def config_of(family: str, **values: object) -> PretrainedConfig:
    return build_config(family, {**CONFIGS.get(family, CONFIGS["llama"]), **values}, Tokenizer(), 24)


def empty(family: str, **values: object) -> PreTrainedModel:
    return build_empty(config_of(family, **values), find_task(FAMILIES[family].tasks[0]).objective.head)


def test_each_family_has_a_record_of_its_name() -> None:
    assert (
        [family.model_type for family in all_families()] == list(FAMILIES) == ["gpt2", "llama", "bert", "t5", "ngram"]
    )
    assert find_family("mistral") is None
    assert find_outline("mistral") is None


def by_steps(model: PreTrainedModel, outline: Outline, ids: torch.Tensor) -> torch.Tensor:
    steps, group = outline.steps(model), TensorGroup(0, 1)
    values = ids
    for step in [*steps.before, *steps.blocks, *steps.after]:
        values = StageLayer(step, model, outline, group)(values)
    return values


def test_a_new_family_is_a_module_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    name, known = "qwen2", llama.FAMILY.outline
    module = ModuleType(f"raylm.models.families.{name}")
    module.FAMILY = Family(
        model_type=name,
        heads_key="num_attention_heads",
        width_key="hidden_size",
        positions_key="max_position_embeddings",
        plain_head=True,
        outline=Outline(
            splits={"embed_tokens": Split("vocabulary"), "q_proj": Split("column"), "o_proj": Split("row")},
            steps=known.steps,
            shared_out={"num_attention_heads": lambda config: config.num_attention_heads},
            block_count=lambda config: config.num_hidden_layers,
        ),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FAMILIES, name, FamilyTraits(("causal",)))
    assert ModelSection(family=name).family == name
    objective = make_objective(ObjectiveSection(), name)
    config = config_of(name, num_hidden_layers=2, num_key_value_heads=2)
    assert (config.model_type, config.vocab_size, config.max_position_embeddings) == (name, 97, 24)
    model = build_model(config, 0, objective.head).eval()
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(by_steps(model, find_outline(name), ids), expected)
    check_splits(config, ParallelSection(tensor=2), objective)
    with pytest.raises(UserError, match="divisor of the model's num_attention_heads"):
        check_splits(config, ParallelSection(tensor=3), objective)
    assert not {n for n in hidden_matrices(dict(model.named_parameters()), model) if "embed" in n or "head" in n}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_steps_of_a_decoder_are_its_forward_pass(family: str, tied: bool) -> None:
    model = build_model(config_of(family, tie_word_embeddings=tied), 0, CAUSAL).eval()
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(by_steps(model, find_outline(family), ids), model(input_ids=ids).logits)


EXPECTED_OUTER = {
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "bert": {
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "cls.predictions.transform.dense.weight",
    },
    "t5": {
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    },
}


@pytest.mark.parametrize("family", EXPECTED_OUTER)
def test_muon_leaves_what_is_looked_up_and_read_out_to_adamw(family: str) -> None:
    model = empty(family)
    named = dict(model.named_parameters())
    matrices = {name for name, p in named.items() if p.ndim == 2}
    assert matrices - set(hidden_matrices(named, model)) == EXPECTED_OUTER[family]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_an_output_embedding_of_its_own_is_left_to_adamw(family: str) -> None:
    model = empty(family, tie_word_embeddings=False)
    head = "cls.predictions.decoder.weight" if family == "bert" else "lm_head.weight"
    named = dict(model.named_parameters())
    assert head in named
    assert set(named) - set(hidden_matrices(named, model)) >= EXPECTED_OUTER[family] | {head}


# As they were before structure and records said which weights are looked up and which read the encoder.
FLOPS = {"gpt2": 30048.0, "llama": 26976.0, "bert": 27744.0, "t5": 29984.0}


@pytest.mark.parametrize("family", FLOPS)
def test_the_operations_of_a_token_are_counted_by_family(family: str) -> None:
    lengths = (24, 8) if family == "t5" else (24,)
    assert flops_per_token(empty(family), *lengths) == FLOPS[family]


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "num_hidden_layers", 10**9),
        ("llama", "num_hidden_layers", 0),
        ("llama", "intermediate_size", -1),
        ("llama", "intermediate_size", 2.5),
        ("llama", "hidden_size", 10**12),
        ("llama", "num_attention_heads", True),
        ("llama", "max_position_embeddings", 2**40),
        ("gpt2", "n_layer", "2"),
        ("t5", "d_ff", 0),
        ("bert", "hidden_act", "nothing"),
        ("llama", "hidden_act", 7),
        ("llama", "num_key_value_heads", -1),
        ("gpt2", "n_inner", "x"),
    ],
)
def test_values_that_no_layer_is_built_from_are_refused(family: str, key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"model\.config\.{key}: found '?{value}'?, allowed: "):
        config_of(family, **{key: value})


@pytest.mark.parametrize("family", [family.model_type for family in all_families() if family.outline])
def test_what_a_step_gives_can_be_sent(family: str) -> None:
    """A stage may end behind any step; T5's position bias is a view in another order."""
    outline = find_outline(family)
    head = find_task(FAMILIES[family].tasks[0]).objective.head
    model = build_model(config_of(family), 0, head).eval()
    entries = tuple(torch.full((2, 9), 5) for _ in outline.inputs)
    values = entries if len(entries) > 1 else entries[0]
    steps, group = outline.steps(model), TensorGroup(0, 1)
    for step in [*steps.before, *steps.blocks, *steps.after]:
        values = StageLayer(step, model, outline, group)(values)
        assert all(value.is_contiguous() for value in (values if isinstance(values, tuple) else (values,)))
