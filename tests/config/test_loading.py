"""Configuration files and overrides: what is accepted, and the one line that a mistake gets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from raylm.config import load_config
from raylm.config.loading import differing_keys, to_yaml
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import PretrainConfig
from raylm.errors import UserError

PRETRAIN = """
run: {name: x}
data: {train: stdlib-docs}
model: {family: llama, config: {hidden_size: 64}}
training: {steps: 10, learning_rate: 1e-3}
"""


@pytest.fixture
def pretrain_file(tmp_path: Path) -> Path:
    path = tmp_path / "pretrain.yaml"
    path.write_text(PRETRAIN)
    return path


def test_numbers_with_exponent_are_numbers(pretrain_file: Path) -> None:
    config = load_config("pretrain", pretrain_file, ["training.weight_decay=1e-2", "parallel.zero_stage=2"])
    assert config.training.learning_rate == 1e-3
    assert config.training.weight_decay == 0.01
    assert config.parallel.zero_stage == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learnin_rate=3", "training.learnin_rate: unknown key; did you mean 'learning_rate'?"),
        ("training.batch_size=abc", "training.batch_size: found 'abc', allowed: a valid integer"),
        ("training.batch_size='8'", "training.batch_size: found '8', allowed: a valid integer"),
        ("training.tokens=5", "training: give exactly one of steps, tokens and epochs; found: steps, tokens"),
        ("tokenizer.vocab_size=100", "tokenizer.vocab_size: found 100, allowed: 260 or more"),
        ("model.family=gpt9", "model.family: found 'gpt9', allowed: gpt2, llama"),
        ("resources.workers=0", "resources.workers: found 0, allowed: 1 or more, or auto"),
        ("data.fields.foo=1", "data.fields.foo: unknown key; allowed: answer, context, label, messages, prompt, text"),
        ("foo=1", "foo: unknown key; allowed: checkpoint, data, model"),
        ("training.early_stopping.pa=1", "training.early_stopping.pa: unknown key; allowed: metric, minimum_change"),
        ("resources.elastic=[2, 1]", "resources.elastic: found [2, 1], allowed: [least, most]"),
        ("resources={elastic: [1, 2], workers: 2}", "resources.workers: found 2, allowed with elastic: auto"),
        ("parallel.data=2 resources.elastic=[1, 2]", "yaml: parallel.data: found 2, allowed with resources.elastic"),
        ("bad", "override 'bad': found no KEY=VALUE, allowed: a key with its value"),
    ],
)
def test_mistakes_name_key_found_and_allowed(pretrain_file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        # A second key of the same override follows a blank.
        load_config("pretrain", pretrain_file, re.split(r" (?=\w+\.\w+=)", override))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_training_stages_take_storage_by_uri(pretrain_file: Path) -> None:
    override = "run.storage=s3://bucket/runs?region=x"
    run = load_config("pretrain", pretrain_file, [override]).run
    assert run.uri == "s3://bucket/runs/x?region=x"
    with pytest.raises(
        UserError, match=r"run\.storage: found 's3://bucket/runs\?region=x', allowed: a local or shared directory"
    ):
        load_config("prepare", pretrain_file, [override])


def test_duplicate_key_and_bad_yaml_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("run: {name: x}\nrun: {name: y}\n")
    with pytest.raises(UserError, match=r"twice\.yaml:2: .*'run' is given twice"):
        load_config("prepare", path)
    path.write_text("run: [\n")
    with pytest.raises(UserError, match=r"twice\.yaml:\d+: not valid YAML"):
        load_config("prepare", path)


def test_resolved_configuration_round_trips(pretrain_file: Path, tmp_path: Path) -> None:
    config = load_config("pretrain", pretrain_file)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config("pretrain", again) == config


def test_resuming_may_change_layout_and_length_only(pretrain_file: Path) -> None:
    saved = load_config("pretrain", pretrain_file).model_dump(mode="json")
    free = load_config("pretrain", pretrain_file, ["training.steps=20", "parallel.zero_stage=3", "resources.workers=2"])
    assert differing_keys(PretrainConfig, saved, free.model_dump(mode="json")) == []
    other = load_config("pretrain", pretrain_file, ["training.learning_rate=0.5"])
    assert differing_keys(type(other), saved, other.model_dump(mode="json")) == [
        "training.learning_rate (was 0.001, now 0.5)"
    ]


def test_run_directory_refuses_another_configuration(pretrain_file: Path, tmp_path: Path) -> None:
    first = load_config("pretrain", pretrain_file, [f"run.storage={tmp_path}"])
    directory = RunDirectory("pretrain", first)
    directory.check()
    directory.create()
    RunDirectory("pretrain", first).check()
    # As a raylm that did not know the key yet would have left it.
    path = directory.path / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "weight_decay" not in line))
    RunDirectory("pretrain", first).check()
    other = load_config("pretrain", pretrain_file, [f"run.storage={tmp_path}", "run.seed=7"])
    with pytest.raises(UserError, match=r"run\.seed \(was 0, now 7\)"):
        RunDirectory("pretrain", other).check()
    with pytest.raises(UserError, match="belongs to a 'pretrain' run"):
        RunDirectory("finetune", first).check()


def test_command_line_exits_with_two_and_one_line(pretrain_file: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "raylm.cli", "pretrain", str(pretrain_file), "training.steps=x"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "training.steps" in result.stderr


def test_help_and_import_stay_light() -> None:
    code = "import sys, raylm, raylm.cli; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
