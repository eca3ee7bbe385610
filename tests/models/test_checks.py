"""Models whose parts are missing, damaged, or do not fit together: one line before anything starts."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raylm.cli import main
from raylm.data.loading import load_tokenizer, resolve_model
from raylm.errors import UserError
from raylm.models.loading import load_model, load_parts


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def as_pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def cut_short(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def split(model: Path, **places: str) -> None:
    """The weights in two files with an index, of which ``places`` changes entries."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-0000{1 + (number > 3)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, model / file, {"format": "pt"})
    change(model / "model.safetensors.index.json", metadata={}, weight_map=files | places)


def without_shard(model: Path) -> None:
    split(model)
    (model / "model-00002-of-00002.safetensors").unlink()


WEIGHTS: list[tuple[Callable[[Path], object], str]] = [
    (as_pickle, "model.safetensors is missing; found pytorch_model.bin, allowed: safetensors"),
    (lambda model: (model / "model.safetensors").unlink(), "model.safetensors is missing"),
    (cut_short, "model.safetensors is damaged: "),
    (lambda model: (model / "model.safetensors").write_bytes(b""), "model.safetensors is damaged: "),
    (without_shard, "model-00002-of-00002.safetensors is missing"),
    (lambda model: split(model, extra="model-00001-of-00002.safetensors"), "is damaged: without extra, which"),
    (lambda model: split(model, extra="../x.safetensors"), "found the file '../x.safetensors', allowed: one beside it"),
    (lambda model: split(model, extra=7), "index.json is damaged: found no weight_map"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "expected"), WEIGHTS)
def test_weights_that_cannot_be_loaded(model: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(model)
    for load in (load_parts, load_model):
        with pytest.raises(UserError) as caught:
            load(model)
        assert str(caught.value).startswith("model.path: ")
        assert expected in str(caught.value)


def test_weights_in_several_files_are_loaded(model: Path) -> None:
    before = load_model(model).state_dict()
    split(model)
    load_parts(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_model(model).state_dict().items())


def test_weights_of_another_shape_are_one_line(model: Path) -> None:
    change(model / "config.json", intermediate_size=96)
    with pytest.raises(UserError, match=r"model\.path: .* cannot be loaded: "):
        load_model(model)


def test_a_tokenizer_larger_than_the_embedding_is_refused(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match=f"found a tokenizer with token ids up to {rows}, allowed: at most {rows - 1}"):
        load_parts(model)


def test_a_special_token_that_no_text_becomes_may_lie_beyond(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    assert max(load_parts(model)[1].get_vocab().values()) == rows
    tokenizer.add_special_tokens({"mask_token": "<image>"})
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match=f"found a tokenizer with token ids up to {rows}"):
        load_parts(model)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("key", "value"), [("pad_token_id", 320), ("eos_token_id", [0, 9999]), ("bos_token_id", -2)])
def test_special_ids_without_a_row_are_refused(model: Path, file: str, key: str, value: Any) -> None:
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    bad = rows if value == 320 else 9999 if isinstance(value, list) else value
    change(model / file, **{key: rows if value == 320 else value})
    with pytest.raises(UserError, match=rf"{file}: found {key} {bad}, allowed: 0 to {rows - 1}"):
        load_parts(model)


def test_a_padded_vocabulary_is_fine(model: Path) -> None:
    network = load_model(model)
    network.resize_token_embeddings(384)
    network.config.pad_token_id = 383
    network.save_pretrained(model)
    config, tokenizer = load_parts(model)
    assert (config.vocab_size, config.vocab_size - len(tokenizer)) == (384, 384 - len(load_tokenizer(model)))
    assert main(["generate", str(model), "the quick", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"model_type": 7}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}], "tokenizer_class": "PreTrainedTokenizerFast"}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[" * 5000),
        ("generation_config.json", "[]"),
    ],
)
def test_damaged_files_are_one_line(model: Path, name: str, content: str) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / name).write_text(content)
    with pytest.raises(UserError, match=r"^model\.path: [^\n]*$"):
        load_parts(model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: found 0, allowed: 1 to "),
        (["--max-new-tokens", "-3"], "--max-new-tokens: found -3, allowed: 1 to "),
        (["--temperature", "nan"], "--temperature: found nan, allowed: 0 to 2.0"),
        (["--temperature", "-1"], "--temperature: found -1.0, allowed: 0 to 2.0"),
        (["--seed", "-1"], "--seed: found -1, allowed: 0 to 4294967295"),
    ],
)
def test_options_of_generate_have_bounds(
    model: Path, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(model), "the quick", *options]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./nowhere", "./nowhere does not exist"),
        ("runs/pretrian", "runs/pretrian does not exist; did you mean runs/pretrain?"),
        ("a/b/c", "a/b/c does not exist"),
        ("nowhere/", "nowhere/ does not exist"),
        ("my model", "my model does not exist"),
        ("~no-such-user/x", "this machine has no user no-such-user"),
        ("runs/" + "a" * 300, "allowed: names of at most 255 bytes"),
        ("a\0b", "allowed: a path without NUL characters"),
        ("", "allowed: a path that is not empty"),
        (
            "nobody-here/no-such-model",
            "no-such-model is no directory, and as a hub name not in the cache: offline mode",
        ),
        ("pretrian", "is no directory, and as a hub name not in the cache"),
    ],
)
def test_a_mistyped_model_is_one_line_at_once(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "runs" / "pretrain").mkdir(parents=True)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        resolve_model(name)
    assert expected in str(caught.value)
    assert time.monotonic() - start < 5


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"not in the cache: the hub did not answer: "):
        resolve_model("nobody-here/no-such-model")
    assert time.monotonic() - start < 20
