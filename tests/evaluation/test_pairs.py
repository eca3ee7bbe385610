"""Models on pairs: what both forms of an encoder-decoder write, what a next-token model writes, and the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from raylm.compression.exporters.openvino import export_model
from raylm.config import load_config
from raylm.data.loading import load_tokenizer
from raylm.errors import RunFailure, UserError
from raylm.evaluation.generation import generate_text
from raylm.evaluation.stage import evaluate
from raylm.models.heads import SEQUENCE_TO_SEQUENCE
from raylm.models.pairs import open_pair_model
from raylm.models.writing import TransformersWriter, write_greedily
from raylm.tasks import find_task
from raylm.tasks.sequence_to_sequence.scores import compare
from tests.pairs import write_model, write_pairs

TASK = find_task("sequence_to_sequence")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 30)


@pytest.fixture(scope="module")
def models(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A T5, a BART and a GPT-2 with weights that were drawn, large enough that no two tokens are nearly alike."""
    root = tmp_path_factory.mktemp("models")
    found = {"t5": write_model(root / "t5", *files, initializer_factor=3.0)}
    tokenizer = load_tokenizer(found["t5"])
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(1)
    bart = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.5,
        decoder_start_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id, forced_eos_token_id=None,
        **ids,
    )  # fmt: skip
    gpt2 = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        **ids,
    )
    for name, model in (("bart", BartForConditionalGeneration(bart)), ("gpt2", GPT2LMHeadModel(gpt2))):
        found[name] = root / name
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def write_config(directory: Path, files: tuple[Path, Path], model: Path, **values: Any) -> Path:
    given = {
        "run": {"name": "measured", "storage": str(directory)},
        "data": {"train": [{"path": str(files[0]), "target": str(files[1])}]},
        "model": {"path": str(model)},
        "objective": {"type": "sequence_to_sequence"},
        "evaluation": {"new_tokens": 8, "batch_size": 4},
        "resources": {"workers": 1},
    }
    path = directory / "evaluate.yaml"
    path.write_text(yaml.safe_dump(given | values))
    return path


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_both_forms_write_what_transformers_writes(
    models: dict[str, Path], files: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    path = models[kind]
    directory = tmp_path / "exported"
    export_model(str(path), directory / "openvino", SEQUENCE_TO_SEQUENCE, None)
    for file in ("config.json", "generation_config.json"):
        (directory / file).write_bytes((path / file).read_bytes())
    examples = TASK.evaluation.open(load_config("evaluate", write_config(tmp_path, files, path)), str(path))
    forms = [
        open_pair_model(str(path), TASK.head, 1),
        open_pair_model(str(directory), TASK.head, 1, engine="openvino"),
    ]
    found = [[form.outputs(batch) for batch in examples.batches] for form in forms]
    plain = AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    tokenizer = load_tokenizer(path)
    for number, batch in enumerate(examples.batches):
        one, other = (outputs[number] for outputs in found)
        assert np.abs(one["losses"] - other["losses"]).max() < 1e-2
        assert one["written"].tolist() == other["written"].tolist()
        given = {name: torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            expected = plain.generate(
                **given, do_sample=False, num_beams=1, max_new_tokens=8, bad_words_ids=[[tokenizer.pad_token_id]]
            )[:, 1:]
            labels = torch.from_numpy(batch["targets"])
            loss = float(plain(**given, labels=labels).loss)
        for row, record in zip(expected.tolist(), one, strict=True):
            ids = record["written"][record["written"] >= 0].tolist()
            assert ids == [token for token in row if token not in (tokenizer.pad_token_id, tokenizer.eos_token_id)]
        counted = batch["targets"] >= 0
        assert one["losses"][counted].mean() == pytest.approx(loss, rel=1e-4)
        assert not one["losses"][~counted].any()
    assert TASK.evaluation.closeness(examples, *found) == {"losses_correlation": pytest.approx(1), "same_texts": 1.0}
    shuffled = [records.copy() for records in found[1]]
    for records in shuffled:
        records["losses"] = records["losses"][::-1, ::-1]
    with pytest.raises(RunFailure, match="losses do not agree with the model's"):
        TASK.evaluation.closeness(examples, found[0], shuffled)


def test_a_text_that_ends_leaves_the_others(models: dict[str, Path], files: tuple[Path, Path]) -> None:
    """Whatever is written beside a text, and however long, it is the same; a beam of several finds likelier texts."""
    path = models["t5"]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(path), load_tokenizer(path)
    writer = TransformersWriter(model, str(path))
    sources = [tokenizer(line)["input_ids"] for line in files[0].read_text().splitlines()[:6]]
    whole = write_greedily(writer, sources, 12)
    # Let a token that comes early in some texts end them.
    chosen = next(token for row in whole for token in row[1:] if any(token not in other for other in whole))
    writer.end_ids = frozenset({chosen})
    cut = [row[: row.index(chosen)] if chosen in row else row for row in whole]
    assert {len(row) for row in cut} != {12}
    assert write_greedily(writer, sources, 12) == cut
    assert [write_greedily(writer, [source], 12)[0] for source in sources] == cut
    writer.end_ids = frozenset({tokenizer.eos_token_id})

    def likelihood(row: list[int], source: list[int]) -> float:
        labels = torch.tensor([row])
        with torch.inference_mode():
            return -float(model(input_ids=torch.tensor([source]), labels=labels).loss)

    searched = writer.search(sources, 12, 4)
    better = [likelihood(a, s) - likelihood(b, s) for a, b, s in zip(searched, whole, sources, strict=True)]
    assert np.mean(better) > 0


def test_a_next_token_model_is_asked_as_it_is_served(
    models: dict[str, Path], files: tuple[Path, Path], tmp_path: Path
) -> None:
    path, tokenizer = models["gpt2"], load_tokenizer(models["gpt2"])
    examples = TASK.evaluation.open(load_config("evaluate", write_config(tmp_path, files, path)), str(path))
    form = open_pair_model(str(path), TASK.head, 1)
    outputs = [form.outputs(batch) for batch in examples.batches]
    model = GPT2LMHeadModel.from_pretrained(path).eval()
    rows = list(examples.rows(outputs))
    for row in rows[:5]:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["source"]}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["reference"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            written = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert row["loss"] == pytest.approx(float(losses[-len(answer) :].mean()), rel=1e-4)
        assert row["hypothesis"] == tokenizer.decode(written, skip_special_tokens=True).strip()
    assert examples.figures(outputs)["target_loss"] > 0


def test_generate_answers_a_text(models: dict[str, Path], files: tuple[Path, Path]) -> None:
    path, text = models["t5"], files[0].read_text().splitlines()[0]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(path).eval(), load_tokenizer(path)
    ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert generate_text(path, text, max_new_tokens=8) == expected
    drawn = [generate_text(path, text, max_new_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(UserError, match=r"^PROMPT: found \d+ tokens, and 64 new ones, allowed: at most the model's 64"):
        generate_text(models["bart"], text, max_new_tokens=64)


def test_figures_are_those_of_the_libraries() -> None:
    same = compare(["the old house stands", "a bird sings here"], ["the old house stands", "a bird sings here"], None)
    assert [same[key] for key in ("bleu", "chrf", "rouge1", "rouge2", "rouge_l")] == pytest.approx([100.0] * 5)
    assert same["bleu_interval"] == pytest.approx([100, 100])
    assert "tok:13a" in same["bleu_signature"]
    # Lin 2004: 3 of 4 words, 1 of 3 pairs of words, and the longest common subsequence of 3 words.
    found = compare(["police killed the gunman"], ["Police kill the gunman!"], None)
    assert (found["rouge1"], found["rouge2"], found["rouge_l"]) == pytest.approx((75.0, 100 / 3, 75.0))
    assert found["bleu"] < 50 and 50 < found["chrf"] < 100
    # Without a space between them, characters are counted: 5 of 6.
    chinese = compare(["今天天气不好"], ["今天天气很好"], "zh")
    assert "tok:zh" in chinese["bleu_signature"]
    assert chinese["rouge1"] == pytest.approx(500 / 6)
    assert chinese["bleu"] > compare(["今天天气不好"], ["今天天气很好"], None)["bleu"]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("t5", {"objective": {"type": "causal"}}, r"objective\.type: found causal, allowed for .*t5, a sequence-to"),
        ("t5", {"objective": {}, "evaluation": {"beams": 4}}, r"evaluation\.beams: found 4, allowed with objective"),
        ("bart", {"evaluation": {"new_tokens": 64}}, r"evaluation\.new_tokens: found 64, allowed: at most 63, as the"),
        ("bart", {"evaluation": {"sequence_length": 65}}, r"evaluation\.sequence_length: found 65, allowed: at most"),
        ("gpt2", {"evaluation": {"new_tokens": 60}}, r"evaluation\.new_tokens: found 60, allowed: at most \d+, as the"),
    ],
)
def test_what_does_not_fit_is_refused(
    models: dict[str, Path], files: tuple[Path, Path], tmp_path: Path, kind: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(load_config("evaluate", write_config(tmp_path, files, models[kind], **values)))
    assert not (tmp_path / "measured").exists()


@pytest.mark.slow
def test_the_stage_gives_the_same_with_one_worker_and_two(
    ray_instance, models: dict[str, Path], files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for workers in (1, 2):
        directory = tmp_path / str(workers)
        directory.mkdir()
        values = {"resources": {"workers": workers}, "evaluation": {"new_tokens": 8, "batch_size": 4, "beams": 2}}
        evaluate(load_config("evaluate", write_config(directory, files, models["t5"], **values)))
        reports.append(json.loads((directory / "measured" / "report.json").read_text()))
    assert all(reports[0][key] == reports[1][key] for key in ("bleu", "chrf", "rouge_l", "target_loss", "pairs"))
    rows = [json.loads(line) for line in (tmp_path / "1" / "measured" / "translations.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == files[0].read_text().splitlines()
    assert [row["reference"] for row in rows] == files[1].read_text().splitlines()
    assert all(set(row) == {"source", "reference", "hypothesis", "loss"} for row in rows)
    assert "BLEU" in capsys.readouterr().out
