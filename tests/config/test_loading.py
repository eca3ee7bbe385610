"""Configuration files and overrides: what is accepted, and the one line that a mistake gets."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylm.config import STAGES, load_config
from raylm.config.loading import differing_keys, to_yaml
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import PretrainConfig
from raylm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
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
        (
            "data.fields.foo=1",
            "data.fields.foo: unknown key; allowed: answer, chosen, context, label, messages, preset",
        ),
        ("foo=1", "foo: unknown key; allowed: adapter, checkpoint, data, distillation, freezing, model"),
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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.betas=[2, 3]", "training.betas.0: found 2, allowed: less than 1 (and 1 more)"),
        ("training.betas=0.9", "training.betas: found 0.9, allowed: a valid list"),
        ("training=3", "training: found 3, allowed: a section with keys"),
        ("training=[]", "training: found a list, allowed: a section with keys"),
        ("training.steps={}", "training.steps: found a section, allowed: a valid integer"),
        ("data.train=[{path: x, weight: 2, foo: 1}]", "data.train.0.foo: unknown key; allowed: format, path, target"),
        ("training.betas=[-0.1, 0.9]", "training.betas.0: found -0.1, allowed: greater than or equal to 0"),
        ("training.learning_rate=.inf", "training.learning_rate: found inf, allowed: a finite number"),
        ("training.learning_rate=.nan", "training.learning_rate: found nan, allowed: a finite number"),
        ("training.learning_rate=1e400", "training.learning_rate: found inf, allowed: a finite number"),
        ("training.learning_rate=1e31", "training.learning_rate: found 1e+31, allowed: less than or equal to 1e+30"),
        ("training.epsilon=2", "training.epsilon: found 2, allowed: less than or equal to 1"),
        ("run.seed=1e23", "run.seed: found 1e+23, allowed: a valid integer"),
        ("run.seed=1" + "0" * 23, "run.seed: found 100000000000000000000000, allowed: an integer of 64 bits"),
        ("run.seed=4294967296", "run.seed: found 4294967296, allowed: less than or equal to 4294967295"),
        ("training.batch_size=2147483648", "training.batch_size: found 2147483648, allowed: less than or equal to"),
        ("parallel.data=2147483648", "parallel.data: found 2147483648, allowed: at most 2147483647, or auto"),
        ("checkpoint.every_seconds=1e10", "checkpoint.every_seconds: found 10000000000.0, allowed: less than or equal"),
        ("tokenizer.sentinels=1000000000", "tokenizer.sentinels: found 1000000000, allowed: less than or equal to"),
        ("model.config.rms_norm_eps=.nan", "model.config.rms_norm_eps: found nan, allowed: a finite number"),
        ("run.name=" + "a" * 300, "aaa..., string should have at most 200 characters"),
        ('run.storage="a\\0b"', "run.storage: found 'a\\x00b', allowed: text without control characters"),
        ('data.train=["a\\x07"]', "data.train.0: found 'a\\x07', allowed: text without control characters"),
        ('run.storage="\\ud800"', "run.storage: found '\\ud800', allowed: text without control characters"),
        ("run.storage=runs/" + "a" * 300, "allowed: names of at most 255 bytes"),
        ("run.storage=" + "a/" * 3000, "allowed: at most 4000 bytes"),
        ("run.storage=~no-such-user/x", "allowed: a home directory that exists; this machine has no user no-such-user"),
        ("run.storage=", "run.storage: found None, allowed: a valid string"),
        ("run.storage=''", "run.storage: found '', allowed: a path that is not empty"),
        ("data.train=[{path: x, weight: .inf}]", "data.train.0.weight: found inf, allowed: a finite number"),
        ("data.train=[{path: x, weight: 0}]", "data.train.0.weight: found 0, allowed: greater than 0"),
        ("model.config." + "a." * 3000 + "b=1", "found 3003 keys, allowed: at most 32"),
        ("x" * 5000 + "=1", "xxx...: unknown key; allowed: "),
    ],
)  # fmt: skip
def test_numbers_and_texts_have_bounds(pretrain_file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("pretrain", pretrain_file, [override])
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 600


def test_every_number_of_every_section_is_bounded() -> None:
    """As the JSON Schema says, which lacks only the limits of ``CountOrAuto`` and the like."""
    unbounded = []
    for stage, model in STAGES.items():
        for name, schema in _objects(model.model_json_schema()):
            for key, value in schema.get("properties", {}).items():
                for branch in _branches(value):
                    limits = (
                        {"minimum", "exclusiveMinimum"} & set(branch),
                        {"maximum", "exclusiveMaximum"} & set(branch),
                    )
                    listed = {"const", "enum"} & set(branch)
                    if branch.get("type") in ("integer", "number") and not listed and not all(limits):
                        unbounded.append(f"{stage} {name}.{key}")
    assert {entry.split(".")[-1] for entry in unbounded} == {
        # Checked in the section: 1 or more, or auto; 0, 1 or auto; ordered bounds of a search, within the key's own.
        "workers", "data", "tensor", "pipeline", "micro_batch_size", "max_concurrent", "cpus_per_replica",
        "gpus_per_worker", "uniform", "log_uniform", "integer",
    }  # fmt: skip


def _objects(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield schema.get("title", ""), schema
    yield from schema.get("$defs", {}).items()


def _branches(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A value's types: itself, those of a union, and those of a list's items."""
    yield schema
    for inner in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())):
        yield from _branches(inner)


@pytest.mark.parametrize("value", ["0", "-1", "2147483648", "1.5", ".nan", "1e400", "[1]", "true"])
@pytest.mark.parametrize(
    ("stage", "key"),
    [
        *(("pretrain", f"parallel.{key}") for key in ("data", "tensor", "pipeline", "micro_batch_size")),
        ("pretrain", "resources.workers"),
        ("tune", "tuning.max_concurrent"),
    ],
)
def test_numbers_that_may_be_auto_are_bounded_too(stage: str, key: str, value: str) -> None:
    path = ROOT / "jobs" / "recipes" / "quickstart" / f"{stage}.yaml"
    with pytest.raises(UserError, match=rf"{key}: found"):
        load_config(stage, path, [f"{key}={value}"])


@pytest.mark.parametrize("value", ["0", "-1.0", "1e6", ".nan", ".inf"])
def test_cpus_of_a_replica_are_bounded(value: str) -> None:
    with pytest.raises(UserError, match=r"serving\.cpus_per_replica: found"):
        load_config("serve", ROOT / "jobs/recipes/quickstart/serve.yaml", [f"serving.cpus_per_replica={value}"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["tuning.searcher=grid", "tuning.space={training.batch_size: {integer: [1, 2000000000]}}"],
        [
            "tuning.trials=5001",
            "tuning.space={training.batch_size: {grid: [1, 2]}, training.momentum: {choice: [0]}}",
        ],
    ],
)
def test_a_search_has_a_bound_of_trials(overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"tuning\.space: found a grid of \d+ trials, allowed: at most 10000"):
        load_config("tune", ROOT / "jobs/recipes/quickstart/tune.yaml", overrides)


def test_configuration_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_bytes(b"\xff\xfer\0u\0n\0")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config("pretrain", path)
    path.write_bytes(b"# " + b"x" * (1 << 20))
    with pytest.raises(UserError, match="allowed: a YAML file of at most 1048576 bytes"):
        load_config("pretrain", path)
    path.write_bytes("\ufeff".encode() + PRETRAIN.encode())
    assert load_config("pretrain", path).run.name == "x"
    for name, expected in (("a" * 300, "cannot be read: File name too long"), ("a\0b", "found a NUL character")):
        with pytest.raises(UserError, match=expected):
            load_config("pretrain", tmp_path / name)
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        load_config("pretrain", path / "x.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x80\x00\xff", "not UTF-8"),
        (b"", "it holds no sections"),
        (b"- a\n", "it holds no sections"),
        (b"stage: [pretrain]\n", "it names no stage"),
        (b"stage: pretrain\nrun: {name: x, sto", "not valid YAML"),
        (b"stage: pretrain\nrun: {name: x}\n", "data: missing; this key is required"),
        (b"stage: pretrain\nfoo: 1\n", "config.yaml: "),
    ],
)
def test_a_damaged_config_of_a_run_is_one_line(
    pretrain_file: Path, tmp_path: Path, content: bytes, expected: str
) -> None:
    directory = RunDirectory("pretrain", load_config("pretrain", pretrain_file, [f"run.storage={tmp_path}"]))
    directory.create()
    (directory.path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.name: .*config\.yaml is damaged, or not of this version") as caught:
        directory.check()
    assert expected in str(caught.value)


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


def test_a_message_shows_no_characters_that_steer_a_terminal() -> None:
    assert str(UserError("a\u202eb\x1b[31m c\nd \u4e2d")) == "a\\u202eb\\x1b[31m c d \u4e2d"
