"""Pairs for encoder-decoders: how they are read and batched, what is learnt of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration

from raylm.config import load_config
from raylm.config.data import DataSection, TokenizerSection
from raylm.config.model import ObjectiveSection
from raylm.data.loading import load_tokenizer
from raylm.data.prepare.stage import prepare_directory
from raylm.data.samples.text_pairs import (
    PairInput,
    PairSamples,
    TextPair,
    encode_sources,
    encode_targets,
    evaluation_pairs,
    pair_batch,
)
from raylm.data.samples.token_samples import IGNORED
from raylm.errors import UserError
from raylm.models.encoder_decoders import source_prefix
from raylm.tasks import make_objective, task_of
from raylm.tasks.objective import ObjectiveModule
from raylm.training.inputs import validate
from tests.pairs import write_model, write_pairs
from tests.training.loops import run_case, run_loops


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 240)


@pytest.fixture(scope="module")
def model(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("t5") / "model", *files)


def parallel(files: tuple[Path, Path], **values: object) -> dict[str, object]:
    return {"train": [{"path": str(files[0]), "target": str(files[1])}], "validation_fraction": 0.1, **values}


def write_config(directory: Path, data: dict[str, object], **sections: object) -> Path:
    values = {
        "run": {"name": "pairs", "storage": str(directory)},
        "data": data,
        "objective": {"type": "sequence_to_sequence"},
        "training": {
            "steps": 8, "batch_size": 8, "sequence_length": 16, "learning_rate": 0.01, "log_every_steps": 1,
            "evaluate_every_steps": 8, "precision": "fp32",
        },
    }  # fmt: skip
    path = directory / "pairs.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return path


def test_the_same_pairs_from_all_sources(files: tuple[Path, Path], tmp_path: Path) -> None:
    lines = [file.read_text().splitlines() for file in files]
    expected = [TextPair(*sides) for sides in zip(*lines, strict=True)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"en": pair.source, "de": pair.target}) + "\n" for pair in expected)
    )
    (tmp_path / "rows.csv").write_text("en,de\n" + "".join(f"{pair.source},{pair.target}\n" for pair in expected))
    (tmp_path / "columns.txt").write_text("".join(f"{pair.source}\t{pair.target}\n" for pair in expected))
    fields = {"prompt": "en", "answer": "de"}
    for section in (
        {"train": [{"path": str(files[0]), "target": str(files[1])}]},
        {"train": str(tmp_path / "rows.jsonl"), "fields": fields},
        {"train": str(tmp_path / "rows.csv"), "fields": fields},
        {"train": str(tmp_path / "columns.txt"), "format": "parallel"},
    ):
        assert evaluation_pairs(DataSection.model_validate(section)) == expected
    data = DataSection.model_validate(parallel(files))
    prepare_directory(tmp_path / "prepared", data, TokenizerSection(vocab_size=300))
    prepared = DataSection(train=str(tmp_path / "prepared"))
    found, read = PairInput(prepared), PairInput(data)
    assert {side: set(pairs) for side, pairs in found.pairs.items()} == {s: set(p) for s, p in read.pairs.items()}
    assert set(evaluation_pairs(prepared)) == set(read.pairs["validation"])


def test_ids_have_an_end_and_stay_whole_where_they_can(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    end = tokenizer.eos_token_id
    (short, long), cut = encode_sources(tokenizer, ["river", "river stone cloud tree"], 4, "say: ")
    plain = tokenizer("say: river stone cloud tree", add_special_tokens=False)["input_ids"]
    assert cut == 1 and long.tolist() == [*plain[:3], end]
    assert short.tolist()[-1] == end and short.tolist().count(end) == 1
    (target,), _ = encode_targets(tokenizer, ["fluss stein"])
    assert tokenizer.decode(target, skip_special_tokens=True) == "fluss stein"
    batch = pair_batch([short, long], [target, target[1:]], tokenizer.pad_token_id)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 8)
    assert batch["attention_mask"].sum(axis=1).tolist() == [len(short), len(long)]
    assert (batch["targets"] != IGNORED).sum(axis=1).tolist() == [len(target), len(target) - 1]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_loss_is_that_of_transformers_whatever_stands_beside(
    files: tuple[Path, Path], model: Path, tmp_path: Path, kind: str
) -> None:
    tokenizer = load_tokenizer(model)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(model)
    if kind == "bart":
        torch.manual_seed(0)
        loaded = BartForConditionalGeneration(
            BartConfig(
                vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                decoder_start_token_id=tokenizer.eos_token_id, forced_eos_token_id=None,
            )
        )  # fmt: skip
    PairInput(DataSection.model_validate(parallel(files))).write(tmp_path / "set", tokenizer, 16)
    objective = make_objective(ObjectiveSection(type="sequence_to_sequence"), kind)
    samples = objective.samples(tmp_path / "set", "validation", 16, 0)
    module = ObjectiveModule(loaded.eval(), objective)
    numbers = np.arange(6)

    def loss(chosen: np.ndarray) -> tuple[float, int, int]:
        batch = {name: torch.from_numpy(values) for name, values in samples.batch(chosen).items()}
        with torch.inference_mode():
            return float(module(**batch)), int((batch["targets"] != IGNORED).sum()), int(objective.tokens(batch))

    together, alone = loss(numbers), [loss(numbers[n : n + 1]) for n in numbers]
    assert together[0] == pytest.approx(sum(one[0] for one in alone), rel=1e-5)
    assert together[1:] == tuple(sum(one[n] for one in alone) for n in (1, 2))
    total = 0.0
    for pair in PairInput(DataSection.model_validate(parallel(files))).pairs["validation"][:6]:
        ids, labels = (
            torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
            for text in (pair.source, pair.target)
        )
        with torch.inference_mode():
            total += float(loaded(input_ids=ids, labels=labels).loss) * labels.shape[1]
    assert together[0] == pytest.approx(total, rel=1e-5)


def test_training_does_not_depend_on_workers_and_is_kept(files: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir(), (tmp_path / "new").mkdir()
    sections = {"objective": {"type": "sequence_to_sequence", "source_prefix": "say: ", "target_length": 12}}
    sections["model"] = {"path": str(model)}
    configs = [write_config(tmp_path / name, parallel(files), **sections) for name in ("one", "two")]
    new = {"family": "t5", "config": {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 64}}
    configs.append(
        write_config(tmp_path / "new", parallel(files), model=new, tokenizer={"type": "wordpiece", "vocab_size": 300})
    )
    found = run_loops(
        run_case(configs[0], stage="finetune"),
        run_case(configs[1], "parallel.zero_stage=2", workers=2, stage="finetune"),
        run_case(configs[2], "training.steps=60", "training.evaluate_every_steps=60"),
    )
    lines = [
        [json.loads(line) for line in (tmp_path / name / "pairs" / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two", "new")
    ]
    losses = [[line["loss"] for line in one if "loss" in line] for one in lines]
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert found[0]["validation_loss"] == pytest.approx(found[1]["validation_loss"], rel=1e-4)
    assert losses[2][-1] < 0.7 * losses[2][0]
    trained = tmp_path / "one" / "pairs" / "model"
    config = AutoConfig.from_pretrained(trained)
    assert source_prefix(config) == "say: " and task_of(config).name == "sequence_to_sequence"
    assert source_prefix(AutoConfig.from_pretrained(tmp_path / "new" / "pairs" / "model")) == ""
    assert AutoModelForSeq2SeqLM.from_pretrained(trained).generation_config.eos_token_id is not None
    manifest = json.loads((tmp_path / "one" / "pairs" / "data" / "manifest.json").read_text())
    assert (manifest["source_prefix"], manifest["target_length"]) == ("say: ", 12)


def test_the_order_of_samples_is_a_function_of_seed_and_number(
    files: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    PairInput(DataSection.model_validate(parallel(files))).write(tmp_path / "set", load_tokenizer(model), 16)
    one, other = (PairSamples(tmp_path / "set", "train", seed) for seed in (1, 2))
    whole, parts = one.batch(np.arange(8)), [one.batch(np.arange(n, n + 1)) for n in range(8)]
    for row, part in zip(whole["targets"], parts, strict=True):
        kept = part["targets"][0][part["targets"][0] != IGNORED]
        assert row[row != IGNORED].tolist() == kept.tolist()
    assert one.batch(np.arange(8))["input_ids"].tolist() != other.batch(np.arange(8))["input_ids"].tolist()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("a\nb\n", "x\n"), r"y\.txt: ends after line 1; allowed: as many lines as in the other file"),
        (("a\n\n", "x\n\n"), r"data: no pair with two sides is left for validation; allowed: more pairs"),
        (("\n\n", "x\ny\n"), r"data: no pair with two sides is left for train"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, lines: tuple[str, str], message: str) -> None:
    paths = tmp_path / "x.txt", tmp_path / "y.txt"
    for path, text in zip(paths, lines, strict=True):
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        PairInput(DataSection.model_validate(parallel(paths)))


def test_what_holds_no_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no pair at all")
    with pytest.raises(UserError, match=r"^data\.train: .*text\.txt: found documents, allowed: pairs: two aligned"):
        PairInput(DataSection(train=str(tmp_path / "text.txt")))
    (tmp_path / "pairs.txt").write_text("one\tuno\n\tdos\n")
    with pytest.raises(UserError, match="no pair with two sides is left for validation"):
        PairInput(DataSection(train=str(tmp_path / "pairs.txt"), format="parallel", validation_fraction=0.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=2", "resources.workers=2"], r"parallel\.tensor: found 2, allowed with objective\.type seq"),
        (["data.cleaning={html: true}"], r"data\.cleaning: leave it out, it is not for pairs"),
        (["objective.target_length=2"], r"objective\.target_length: found 2"),
        (["training.sequence_length=3"], r"training\.sequence_length: found 3, allowed: 4 or more"),
        (["training.early_stopping={metric: bleu, patience: 1}"], r"training\.early_stopping\.metric: found 'bleu'"),
    ],
)
def test_what_does_not_fit_is_refused(
    files: tuple[Path, Path], model: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    path = write_config(tmp_path, parallel(files), model={"path": str(model)})
    with pytest.raises(UserError, match=message):
        validate(load_config("finetune", path, overrides))
    assert not (tmp_path / "pairs").exists()


def test_a_causal_model_is_trained_on_pairs_by_its_own_task() -> None:
    with pytest.raises(UserError, match=r"objective\.type: found 'sequence_to_sequence', allowed for a llama"):
        make_objective(ObjectiveSection(type="sequence_to_sequence"), "llama")
