"""Fine-tuning with adapters, frozen layers and conversations, to the model that is loaded and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from raylm.config import load_config
from raylm.config.adapter import AdapterSection, FreezingSection
from raylm.config.data import DataSection, TokenizerSection
from raylm.data.prepare.stage import prepare_directory
from raylm.errors import UserError
from raylm.models.depth import Freezing, Rate, depths
from raylm.models.lora import adapter_tokenizer, check_lora, load_lora
from raylm.training.inputs import validate
from tests.data.test_conversations import talks
from tests.data.test_conversations import write as write_talks
from tests.tagging import write_columns
from tests.training.classifiers import write_encoder
from tests.training.loops import run_case, run_loops

WORDS = ["river", "mountain", "cloud", "stone", "sings", "falls", "over", "under", "the", "a", "quiet", "old"]


@pytest.fixture(scope="module")
def data(ray_instance, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in the tiny model's tokens."""
    draw = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("text")
    (root / "text.txt").write_text("\n".join(" ".join(draw.choice(WORDS, 30)) for _ in range(80)))
    section = DataSection(train=str(root / "text.txt"), text_unit="line", validation_fraction=0.1)
    prepare_directory(root / "set", section, TokenizerSection(path=str(tiny_model)))
    return root / "set"


def write(directory: Path, name: str, model: Path, train: Path, /, **sections: Any) -> Path:
    values = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(train)},
        "model": {"path": str(model)},
        "parallel": {"zero_stage": 1},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "sequence_length": 32,
            "learning_rate": 0.01,
            "schedule": "constant",
        },
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**values, **sections}))
    return path


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4},
        {"type": "dora", "rank": 4, "targets": ["q_proj", "down_proj"]},
        {"rank": 8, "rank_stabilized": True},
    ],
)
def test_the_adapter_loads_in_peft_and_the_model_has_it(
    data: Path, tiny_model: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    from peft import PeftModel

    half, whole = (write(tmp_path, name, tiny_model, data, adapter=adapter) for name in ("half", "whole"))
    stopped, final, once = run_loops(
        run_case(half, "training.steps=2", workers=2, stage="finetune"),
        run_case(half, workers=1, stage="finetune"),
        run_case(whole, workers=2, stage="finetune"),
    )
    # Goes on from adapters alone, on another number of workers.
    assert stopped["step"] == 2 and final["validation_loss"] == pytest.approx(once["validation_loss"], abs=1e-5)
    ids = torch.arange(5, 45).view(2, 20)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = logits_of(base, ids)
    model = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "half" / "model"), ids)
    found = logits_of(PeftModel.from_pretrained(base, tmp_path / "half" / "adapter"), ids)
    assert float((found - before).abs().max()) > 0.05
    assert float((found - model).abs().max()) < 1e-5
    # What the server reads; DoRA it does not.
    if "type" not in adapter:
        layers = load_lora(tmp_path / "half", "key")
        check_lora(layers, AutoModelForCausalLM.from_pretrained(tiny_model), "half", "key")
        assert {layer.scale for layer in layers.values()} == {AdapterSection(**adapter).scale}
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "half" / "model")
        assert adapter_tokenizer(tmp_path / "half", "key", tokenizer) is not tokenizer
    settings = json.loads((tmp_path / "half" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model) and settings["r"] == adapter["rank"]
    (newest,) = (tmp_path / "half" / "checkpoints").glob("step-00000004/*.safetensors")
    assert newest.stat().st_size < 0.6 * (tiny_model / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{"rank": 4}, {"rank": 4, "bits": 4}])
def test_a_classifier_with_an_adapter_trains_its_head(tmp_path: Path, adapter: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import BertConfig, BertModel, BertTokenizerFast

    if "bits" in adapter:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra qlora)")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=17, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "encoder")
    draw = np.random.default_rng(0)
    rows = [
        (" ".join(draw.choice(WORDS[:6] if number % 2 else WORDS[6:], 8)), "ab"[number % 2]) for number in range(64)
    ]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    path = write(
        tmp_path, "run", tmp_path / "encoder", tmp_path / "rows.csv", adapter=adapter,
        objective={"type": "classification"},
        training={"steps": 80, "batch_size": 16, "sequence_length": 16, "learning_rate": 0.003},
    )  # fmt: skip
    (final,) = run_loops(run_case(path, "data.validation_fraction=0.25", stage="finetune"))
    assert final["validation_loss"] < 0.5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    right = [
        model.config.id2label[int(logits_of(model, torch.tensor([ids]))[0].argmax())] == label
        for ids, label in ((range(5, 11), "b"), (range(11, 17), "a"))
    ]
    assert all(right)
    # Stock peft has the same: the adapter on the encoder, and the head that was trained beside it.
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=2, dtype=torch.float32)
    ids = torch.arange(5, 17).view(2, 6)
    merged = logits_of(model, ids)
    found = logits_of(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter"), ids)
    assert float((found - merged).abs().max()) < 1e-5


@pytest.mark.slow
def test_a_tagger_with_an_adapter_loads_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForTokenClassification

    write_encoder(tmp_path / "encoder", dropout=0.0)
    draw = np.random.default_rng(0)
    rows = [[str(word) for word in draw.choice(WORDS, 6)] for _ in range(32)]
    tagged = [(words, ["B-X" if word in WORDS[:4] else "O" for word in words]) for words in rows]
    path = write(
        tmp_path, "run", tmp_path / "encoder", write_columns(tmp_path / "rows.conll", tagged), adapter={"rank": 4},
        objective={"type": "tagging"},
        training={"steps": 20, "batch_size": 8, "sequence_length": 16, "learning_rate": 0.01},
    )  # fmt: skip
    run_loops(run_case(path, "data.validation_fraction=0.25", stage="finetune"))
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "encoder", num_labels=model.config.num_labels, dtype=torch.float32
    )
    ids = torch.arange(5, 17).view(2, 6)
    expected = logits_of(model, ids)
    found = logits_of(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter"), ids)
    assert float((found - expected).abs().max()) < 1e-5
    # The head was trained: it is no more what the base model's was drawn as.
    assert float(model.classifier.bias.detach().abs().max()) > 0.01


@pytest.mark.slow
def test_frozen_layers_stay_and_open_in_turn(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()

    def changed(name: str) -> set[str]:
        state = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
        return {key for key, value in state.items() if not torch.equal(value, base[key])}

    asked = {
        "norms": {"train": ["*norm.weight"]},
        "upper": {"layers": 1},
        "opening": {"unfreeze_every_steps": 2},
    }
    finals = run_loops(
        *(
            run_case(write(tmp_path, n, tiny_model, data, freezing=f), workers=2, stage="finetune")
            for n, f in asked.items()
        )
    )
    assert all(final["finished"] for final in finals)
    names, count = depths(AutoModelForCausalLM.from_pretrained(tiny_model)), max(depths_of(base))
    assert changed("norms") == {name for name in base if name.endswith("norm.weight")}
    assert all(names[name] > 1 for name in changed("upper") if name in names) and changed("upper")
    # Four steps: what stands above the blocks, and after two the last block.
    assert {names[name] for name in changed("opening") if name in names} == {count + 1, count}


def depths_of(state: dict[str, torch.Tensor]) -> list[int]:
    return [int(name.split(".")[2]) + 1 for name in state if name.startswith("model.layers.")]


def test_rates_fall_with_the_depth(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    blocks = model.config.num_hidden_layers
    freezing = Freezing(FreezingSection(layer_decay=0.5, unfreeze_every_steps=10), model)
    assert freezing.rate("model.norm.weight") == Rate(0, 1.0)
    assert freezing.rate(f"model.layers.{blocks - 1}.mlp.up_proj.weight") == Rate(10, 0.5)
    assert freezing.rate("model.embed_tokens.weight") == Rate(10 * (blocks + 1), 0.5 ** (blocks + 1))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"adapter": {"targets": ["nothing"]}},
            "adapter.targets: found 'nothing', allowed: all_linear, or of down_proj",
        ),
        ({"adapter": {"targets": "q_proj"}}, "adapter.targets: .*allowed: all_linear, or a list"),
        (
            {"adapter": {"type": "dora"}, "parallel": {"zero_stage": 3}},
            "zero_stage: found 3, allowed with adapter.type",
        ),
        ({"adapter": {}, "parallel": {"tensor": 2}}, "adapter: allowed with parallel.tensor and parallel.pipeline 1"),
        ({"adapter": {"bits": 8}}, "adapter.bits: found 8, allowed: 4"),
        (
            {"adapter": {"bits": 4}, "parallel": {"zero_stage": 3}},
            "zero_stage: found 3, allowed with adapter.bits 4: 0, 1, 2",
        ),
        (
            {"adapter": {"bits": 4}, "parallel": {"pipeline": 2}},
            "adapter: allowed with parallel.tensor and parallel.pipeline 1",
        ),
        ({"adapter": {"bits": 4, "type": "dora"}}, "adapter.bits: found 4, allowed with adapter.type lora"),
        (
            {"adapter": {"bits": 4}, "objective": {"type": "preference"}},
            "adapter.bits: found 4, allowed with objective.type preference: leave it out",
        ),
        (
            {"adapter": {"bits": 4}, "training": {"steps": 4, "compile": True}},
            "training.compile: found true, allowed with adapter.bits 4: false",
        ),
        ({"adapter": {}, "freezing": {"layers": 1}}, "freezing: allowed without adapter"),
        ({"freezing": {"layers": 9}}, "freezing.layers: found 9, allowed: at most the model's "),
        (
            {"freezing": {"train": ["x.*"]}},
            "freezing.train: found 'x.*', which fits no parameter; allowed: names such as",
        ),
        ({"freezing": {"train": ["*layers.0.*"], "layers": 1}}, "freezing: nothing is left that is trained"),
        ({"freezing": {}}, "freezing: found nothing, allowed: train, layers"),
    ],
)
def test_what_does_not_fit_is_refused(
    data: Path, tiny_model: Path, tmp_path: Path, sections: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected.replace("[", r"\[")):
        validate(load_config("finetune", write(tmp_path, "run", tiny_model, data, **sections)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_learns_to_end_its_turn(ray_instance, tmp_path: Path) -> None:
    """A base model with ChatML's tokens and no template, on conversations; what is served stops."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from raylm.data.tokens.tokenizers import make_tokenizer

    made = make_tokenizer(TokenizerSection(type="bpe", vocab_size=300), iter([" ".join(WORDS) * 20]))
    made.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.chat_template = None
    made.save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    conversations = [
        [{"role": "user", "content": turn[-2]["content"][:12]}, {"role": "assistant", "content": "the river sings"}]
        for turn in talks(60)
    ]
    write_talks(tmp_path / "talks.jsonl", conversations)
    section = DataSection(train=str(tmp_path / "talks.jsonl"), chat_template="chatml", validation_fraction=0.1)
    path = write(
        tmp_path, "run", tmp_path / "base", tmp_path / "talks.jsonl", data=section.model_dump(),
        training={"steps": 60, "batch_size": 4, "sequence_length": 128, "learning_rate": 0.005},
    )  # fmt: skip
    (final,) = run_loops(run_case(path, stage="finetune"))
    assert final["validation_loss"] < 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in model.generation_config.eos_token_id
    given = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7 the old"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**given, max_new_tokens=40, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert written[-1] == end and tokenizer.decode(written[:-1]) == "the river sings"
