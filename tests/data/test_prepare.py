from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raylm.config.data import DataSection, TokenizerSection
from raylm.data.prepare.baselines import compressed_sizes
from raylm.data.prepare.stage import Input, prepare_directory, prepared_directory
from raylm.data.samples.opening import open_samples
from raylm.data.sources.documents import read_documents
from raylm.data.tokens.shards import TokenShards, read_manifest, verify_prepared
from raylm.errors import UserError


def content_of(directory: Path) -> dict[str, str]:
    """Hash of every file that belongs to a prepared set."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("config.yaml", "report.json", "report.html")
    }


def raylm(*arguments: str | Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "raylm.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def write_config(directory: Path, data: dict, **sections) -> Path:
    path = directory / "prepare.yaml"
    run = {"name": "set", "storage": str(directory / "runs")}
    path.write_text(yaml.safe_dump({"run": run, "data": data, **sections}))
    return path


@pytest.fixture(scope="module")
def large_file(tmp_path_factory) -> Path:
    """3 MB of text, which makes several document files."""
    draw = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(500)] + ["猫", "🙂"])
    path = tmp_path_factory.mktemp("large") / "lines.txt"
    with path.open("w", encoding="utf-8") as stream:
        for number in range(20_000):
            stream.write(f"{number} {' '.join(draw.choice(words, 20))}\n")
    return path


@pytest.fixture(scope="module")
def large_prepared(ray_instance, large_file, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("large") / "set"
    data = DataSection(train=str(large_file), text_unit="line")
    prepare_directory(directory, data, TokenizerSection(vocab_size=600), cpus=1)
    return directory


def test_bytes_do_not_depend_on_the_number_of_workers(ray_instance, large_file, large_prepared, tmp_path):
    manifest = verify_prepared(large_prepared)
    assert len(manifest["splits"]["train"]["files"]) >= 3
    data = DataSection(train=str(large_file), text_unit="line")
    prepare_directory(tmp_path / "set", data, TokenizerSection(vocab_size=600), cpus=4)
    assert content_of(tmp_path / "set") == content_of(large_prepared)


def test_manifest_counts_what_is_there(large_file, large_prepared):
    manifest = read_manifest(large_prepared)
    lines = large_file.read_text(encoding="utf-8").splitlines()
    found = []
    for split in ("train", "validation"):
        part, shards = manifest["splits"][split], TokenShards(large_prepared, split)
        texts = [document.text for document in read_documents(large_prepared, split)]
        found += texts
        assert part["documents"] == len(texts) == shards.document_count
        assert part["bytes"] == sum(len(text.encode()) for text in texts)
        assert part["tokens"] == 1 + sum(len(tokens) for tokens in shards.documents())
    assert sorted(found) == sorted(lines)
    assert manifest["vocab_size"] == 600 and manifest["dtype"] == "uint16"
    assert manifest["corpus"]["sources"][0]["documents"] == len(lines)


@pytest.mark.slow
def test_cleaning_and_deduplication_do_not_depend_on_the_number_of_workers(ray_instance, large_file, tmp_path):
    lines = large_file.read_text(encoding="utf-8").splitlines()
    (tmp_path / "again.txt").write_text("\n".join(line.upper() for line in lines[5000:9000]))
    data = DataSection(
        train=[{"path": str(large_file), "weight": 1.5}, str(tmp_path / "again.txt")],
        text_unit="line",
        cleaning={"unicode": "NFC", "length": {"min_words": 5}},
        deduplication={"shingle_words": 2},
    )
    for workers in (1, 2, 4):
        prepare_directory(tmp_path / f"set{workers}", data, TokenizerSection(vocab_size=600), cpus=workers)
    first = content_of(tmp_path / "set1")
    assert first == content_of(tmp_path / "set2") == content_of(tmp_path / "set4")
    manifest = verify_prepared(tmp_path / "set1")
    validation = manifest["splits"]["validation"]["documents"]
    assert manifest["splits"]["train"]["documents"] == pytest.approx(1.5 * (20_000 - validation), rel=0.02)
    texts = {
        document.text for split in ("train", "validation") for document in read_documents(tmp_path / "set1", split)
    }
    assert texts == set(lines)


def test_a_whole_set_is_not_made_again(large_file, large_prepared):
    before = (large_prepared / "manifest.json").stat().st_mtime_ns
    prepare_directory(large_prepared, DataSection(train=str(large_file)), TokenizerSection())
    assert (large_prepared / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_killed_prepare_leaves_no_whole_set_and_the_same_command_completes_it(
    ray_instance, large_file, large_prepared, tmp_path
):
    config = write_config(
        tmp_path, {"train": str(large_file), "text_unit": "line"}, tokenizer={"type": "bpe", "vocab_size": 600}
    )
    environment = {**os.environ, "RAY_ADDRESS": ray_instance.get_runtime_context().gcs_address}
    directory = tmp_path / "runs" / "set"
    finished: dict[Path, int] = {}
    # Killed in the midst of reading, then of tokenizing.
    for record in ("work/blocks/*.json", "work/files/*.json"):
        process = raylm("prepare", config, env=environment)
        deadline = time.monotonic() + 240
        while not list(directory.glob(record)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (directory / "manifest.json").exists()
        with pytest.raises(UserError, match="not a prepared directory"):
            open_samples(directory, "train", 32, seed=0)
        # What was finished has not been made again.
        assert all(path.stat().st_mtime_ns == time_made for path, time_made in finished.items())
        finished = {path: path.stat().st_mtime_ns for path in directory.glob(record)}
        assert finished
    process = raylm("prepare", config, env=environment)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "prepare: done in" in output
    verify_prepared(directory)
    expected = content_of(large_prepared)
    assert {name: value for name, value in content_of(directory).items() if name in expected} == expected
    report = json.loads((directory / "report.json").read_text())
    assert report["documents"]["train"] + report["documents"]["validation"] == 20_000
    assert report["bytes_per_token"] > 1 and report["compressed"]["gzip -9"]["bits_per_byte"] > 1
    process = raylm("prepare", config, env=environment)
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0 and "is done already" in output
    # The same name with another configuration is refused.
    process = raylm("prepare", config, "tokenizer.vocab_size=700")
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 2 and "tokenizer.vocab_size (was 600, now 700)" in errors


def test_sigterm_ends_prepare_with_one_line_and_the_same_command_completes_it(ray_instance, large_file, tmp_path):
    config = write_config(tmp_path, {"train": str(large_file), "text_unit": "line"}, tokenizer={"vocab_size": 600})
    environment = {**os.environ, "RAY_ADDRESS": ray_instance.get_runtime_context().gcs_address}
    directory = tmp_path / "runs" / "set"
    process = raylm("prepare", config, env=environment)
    deadline = time.monotonic() + 240
    while not list(directory.glob("work/blocks/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    # In use: a second command is refused, in one line, and changes nothing.
    with raylm("prepare", config, env=environment) as second:
        process.send_signal(signal.SIGSTOP)
        _, errors = second.communicate(timeout=150)
        process.send_signal(signal.SIGCONT)
    assert second.returncode == 2, errors
    assert errors.splitlines()[-1].endswith(f"{directory} is in use by another command that is still running")
    assert errors.count("raylm: ") == 1 and "Traceback" not in errors
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 143 and output == "", errors
    *doing, last = errors.splitlines()
    assert last == "raylm: ended by SIGTERM"
    assert not re.search(r"Traceback|Error|SIG|\.cc|@ +0x", "\n".join(doing)), errors
    assert not (directory / "manifest.json").exists() and not (directory / "report.json").exists()
    process = raylm("prepare", config, env=environment)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    verify_prepared(directory)


def test_a_failed_prepare_leaves_what_others_have_finished(ray_instance, tmp_path):
    """The storage was missing when it began, so that it made the directories above its own too."""
    (tmp_path / "good.txt").write_text("a good document")
    storage = tmp_path / "new" / "runs"
    config = write_config(tmp_path, {"train": f"{tmp_path}/good.txt"})
    environment = {**os.environ, "RAY_ADDRESS": ray_instance.get_runtime_context().gcs_address}
    process = raylm("prepare", config, f"run.storage={storage}", env=environment)
    deadline = time.monotonic() + 240
    while not (storage / "set" / "work").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    (storage / "other").mkdir()
    (storage / "other" / "report.json").write_text("{}")
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 2 and "leaves none for validation" in errors
    assert [str(path.relative_to(storage)) for path in sorted(storage.rglob("*"))] == ["other", "other/report.json"]
    # The corrected file begins the run: it is not refused as another configuration.
    process = raylm("prepare", config, f"run.storage={storage}", "data.validation_fraction=0", env=environment)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    verify_prepared(storage / "set")
    # An input that has changed since is not done.
    (tmp_path / "good.txt").write_text("another good document")
    process = raylm("prepare", config, f"run.storage={storage}", "data.validation_fraction=0")
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 2 and output == ""
    assert errors.splitlines()[-1] == (
        f"raylm: error: data: {tmp_path}/good.txt has changed (15 bytes, now 21) since {storage}/set was made; "
        f"choose another run.name to take it as it is now, or remove {storage}/set first"
    )
    # A set whose sources are gone stands for them.
    (tmp_path / "good.txt").unlink()
    process = raylm("prepare", config, f"run.storage={storage}", "data.validation_fraction=0")
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0 and "is done already" in output


def test_prepared_directory_is_told_from_raw_sources(large_prepared, tmp_path):
    assert prepared_directory(DataSection(train=str(large_prepared))) == large_prepared.resolve()
    assert prepared_directory(DataSection(train="stdlib-docs")) is None
    assert prepared_directory(DataSection(train=[str(large_prepared), "stdlib-docs"])) is None
    with pytest.raises(UserError, match="not a prepared directory"):
        prepared_directory(DataSection(train=str(tmp_path), format="prepared"))


def test_input_is_checked_without_writing(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    data = DataSection(train=str(tmp_path / "a.txt"), text_unit="line", validation_fraction=0)
    assert Input(data, TokenizerSection()).survey.documents == {"train": 2, "validation": 0}
    with pytest.raises(UserError, match=r"tokenizer\.path"):
        Input(data, TokenizerSection(path=str(tmp_path / "none")))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(not (shutil.which("gzip") and shutil.which("xz")), reason="compares with gzip and xz")
def test_baselines_are_those_of_the_commands(tmp_path):
    texts = [f"text number {number}, {number**3}" for number in range(5000)]
    path = tmp_path / "text"
    path.write_text("\n".join(texts) + "\n")
    found = compressed_sizes(texts)
    for command in ("gzip -9", "xz -9"):
        with path.open("rb") as stream:
            size = len(subprocess.run(command.split(), stdin=stream, capture_output=True, check=True).stdout)
        # zlib and GNU gzip write the same format with slightly different heuristics.
        assert found[command]["compressed_bytes"] == pytest.approx(size, rel=0.005)
        bits = 8 * found[command]["compressed_bytes"] / sum(map(len, texts))
        assert found[command]["bits_per_byte"] == pytest.approx(bits, abs=1e-5)


BAD_INPUT = {
    "missing file": ({"train": "{}/no.txt"}, "{}/no.txt does not exist"),
    "glob without a match": ({"train": "{}/*.tsv"}, "no file matches '{}/*.tsv'"),
    "empty corpus": ({"train": "{}/empty.txt"}, "no document that is not empty"),
    "no validation document": ({"train": "{}/good.txt"}, "leaves none for validation"),
    "undecodable bytes": ({"train": "{}/latin.txt"}, "{}/latin.txt: not UTF-8 at byte 3: found 0xe9"),
    "malformed JSONL": ({"train": "{}/bad.jsonl"}, "{}/bad.jsonl:2: malformed JSON"),
    "missing column": ({"train": "{}/column.csv"}, "{}/column.csv: no column 'text'"),
    "file of zeros": ({"train": "{}/zeros.txt"}, "{}/zeros.txt: not UTF-8 at byte 0: found 0x00"),
    "Parquet without the field": ({"train": "{}/column.parquet"}, "{}/column.parquet: no column 'text'"),
    "unreachable URI": (
        {"train": "http://127.0.0.1:1/a.txt"},
        "data.train: http://127.0.0.1:1/a.txt cannot be reached: ",
    ),
    "vocabulary below the bytes": ({"train": "{}/good.txt"}, "tokenizer.vocab_size: found 200, allowed: 260 or more"),
    "not prepared": ({"train": "{}", "format": "prepared"}, "is not a prepared directory"),
    "tokenizer": ({"train": "{}/good.txt", "validation_fraction": 0}, "tokenizer.path: {}/none does not exist"),
}


# Those that Ray's tasks find, the first of them aside, take as long as Ray does to start.
BY_TASKS = ("no validation document", "undecodable bytes", "malformed JSONL", "missing column", "file of zeros")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if name in BY_TASKS[1:] else ()) for name in BAD_INPUT]
)
def test_bad_input_is_one_line_and_status_2_and_nothing_is_written(case, tmp_path, ray_instance):
    (tmp_path / "good.txt").write_text("a good document")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (tmp_path / "column.csv").write_text("id,body\n1,x\n")
    (tmp_path / "zeros.txt").write_bytes(bytes(3 << 20))
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "column.parquet")
    data, expected = BAD_INPUT[case]
    data = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in data.items()}
    tokenizer = {"vocab_size": 200} if case.startswith("vocabulary") else {}
    if case == "tokenizer":
        tokenizer = {"path": f"{tmp_path}/none"}
    config = write_config(tmp_path, data, tokenizer=tokenizer)
    address = ray_instance.get_runtime_context().gcs_address
    process = raylm("prepare", config, env={**os.environ, "RAY_ADDRESS": address})
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 2
    # Beside what the stage says it is doing, one line.
    *doing, error = errors.splitlines()
    assert output == "" and not re.search(r"raylm: |Traceback|Error", "\n".join(doing)), errors
    assert error.startswith("raylm: error: ") and expected.format(tmp_path) in error
    assert not (tmp_path / "runs").exists()
