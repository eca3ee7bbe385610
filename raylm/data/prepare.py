"""The ``prepare`` stage: sources to documents, tokenizer, token shards and manifest.

In: a validated ``PrepareConfig``. Out: a prepared directory, whole when its ``manifest.json`` stands. All input is read
and checked before the first byte is written. A prepare that was killed leaves no manifest; the same command starts over
and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.cluster import ray_session
from raylm.config.data import DataSection, TokenizerSection
from raylm.config.run_directory import RunDirectory, write_atomically
from raylm.config.stages import PrepareConfig
from raylm.data.baselines import compressed_sizes
from raylm.data.corpus import Corpus, Survey
from raylm.data.documents import DocumentWriter, Split, document_files, make_pair, read_documents
from raylm.data.shards import FORMAT_VERSION, read_manifest, token_dtype
from raylm.data.sources import MANIFEST
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PARTS = ("documents", "tokenizer", "train", "validation")
SMALLEST_FILE, LARGEST_FILE = 1 << 20, 64 << 20


class Input:
    """The checked input of a prepared directory: make one before anything is written.

    Attributes:
        survey: what the sources hold.

    Raises:
        UserError: a source or the tokenizer is wrong.
    """

    def __init__(self, data: DataSection, tokenizer: TokenizerSection) -> None:
        self.tokenizer = tokenizer
        self.corpus = Corpus(data)
        self.survey: Survey = self.corpus.survey()
        if tokenizer.path is not None:
            from raylm.data.tokenizers import reuse_tokenizer

            found = reuse_tokenizer(tokenizer.path)
            if self.survey.kind == "pairs":
                _check_template(found)


def _check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Lay out one pair with a reused tokenizer's own template, so that one which cannot is refused early."""
    import tempfile

    from raylm.data.encoding import PairEncoder

    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        PairEncoder(Path(directory)).encode([make_pair("question", "answer", "context")])


def prepared_directory(data: DataSection) -> Path | None:
    """The prepared directory that ``data.train`` names, or None where it names raw sources.

    Raises:
        UserError: ``data.format`` is prepared and it is none; or it is one among several sources.
    """
    sources = data.train_sources
    if data.format not in ("auto", "prepared") or len(sources) != 1:
        if data.format == "prepared":
            raise UserError(f"data.train: found {len(sources)} sources, allowed with format prepared: one directory")
        return None
    directory = Path(sources[0]).expanduser()
    if data.format == "auto" and not (directory / MANIFEST).is_file():
        return None
    read_manifest(directory)
    return directory.resolve()


def prepare(config: PrepareConfig) -> None:
    """Run the stage.

    Raises:
        UserError: bad configuration or input; nothing was written.
        RunFailure: tokenizing failed.
    """
    run = RunDirectory("prepare", config)
    run.check()
    report = run.report()
    if report is not None:
        print(f"prepare: {run.path} is done already ({report['tokens']['train']:,} training tokens)")
        return
    checked = Input(config.data, config.tokenizer)
    run.create()
    workers = config.resources.workers
    report = _build(run.path, checked, cpus=None if workers == "auto" else workers)
    run.write_report(report)
    print(describe(run.path, report))


def prepare_directory(
    directory: Path,
    data: DataSection,
    tokenizer: TokenizerSection,
    *,
    cpus: int | None = None,
    checked: Input | None = None,
) -> None:
    """Make ``directory`` a prepared one, for a stage that was given raw sources; returns at once where it is whole.

    Args:
        directory: on storage that all nodes share.
        data, tokenizer: the sections of the stage's configuration.
        cpus: most tokenizing tasks at a time; None takes every CPU.
        checked: ``Input(data, tokenizer)`` where the stage has made it already, to check before it writes.

    Raises:
        UserError: bad input; nothing was written.
        RunFailure: tokenizing failed.
    """
    if (directory / MANIFEST).is_file():
        read_manifest(directory)
        return
    _build(directory, checked or Input(data, tokenizer), cpus=cpus)


def _build(directory: Path, checked: Input, *, cpus: int | None) -> dict[str, Any]:
    """Write the whole set, the manifest last; returns the report."""
    from raylm.data.tokenization import Layout, tokenize_documents
    from raylm.data.tokenizers import make_tokenizer, tokenizer_hash

    began = time.monotonic()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.monotonic() - began - sum(seconds.values()), 3)

    survey = checked.survey
    for part in PARTS:
        # What a killed prepare has left.
        shutil.rmtree(directory / part, ignore_errors=True)
    _write_documents(directory, checked)
    lap("documents")
    tokenizer = make_tokenizer(checked.tokenizer, _texts(directory))
    tokenizer.save_pretrained(directory / "tokenizer")
    lap("tokenizer")
    vocab_size = len(tokenizer)
    layout = Layout(
        kind=survey.kind,
        dtype=token_dtype(vocab_size).str,
        eos_id=tokenizer.eos_token_id,
        unknown_id=tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None,
    )
    files: list[tuple[Split, Path]] = [
        (split, path) for split in ("train", "validation") for path in document_files(directory, split)
    ]
    with ray_session():
        lap("ray_start")
        entries = tokenize_documents(directory, files, layout, cpus=cpus)
        lap("tokens")
    baselines = compressed_sizes(document.text for document in read_documents(directory, "validation"))
    lap("baselines")
    pad_id = tokenizer.pad_token_id
    manifest = {
        "version": FORMAT_VERSION,
        "kind": survey.kind,
        "tokenizer_hash": tokenizer_hash(directory / "tokenizer"),
        "vocab_size": vocab_size,
        "eos_id": layout.eos_id,
        "pad_id": layout.eos_id if pad_id is None else pad_id,
        "dtype": "uint16" if layout.dtype.endswith("2") else "uint32",
        "splits": {split: _split_entry(entries, split) for split in ("train", "validation")},
        "corpus": {"sources": survey.sources},
    }
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    splits = manifest["splits"]
    tokens, size = (sum(split[name] for split in splits.values()) for name in ("tokens", "bytes"))
    return {
        "stage": "prepare",
        "kind": survey.kind,
        "documents": {name: split["documents"] for name, split in splits.items()},
        "tokens": {name: split["tokens"] for name, split in splits.items()},
        "bytes": {name: split["bytes"] for name, split in splits.items()},
        "bytes_per_token": round(size / tokens, 4),
        "vocab_size": vocab_size,
        "unknown_tokens": sum(entry["unknown_tokens"] for entry in entries),
        "compressed": baselines,
        "sources": survey.sources,
        "seconds": {**seconds, "total": round(time.monotonic() - began, 3)},
    }


def _write_documents(directory: Path, checked: Input) -> None:
    survey = checked.survey
    total = sum(survey.bytes.values())
    # At least some files to share out even of a small set, and few enough of a large one to keep them all mapped.
    file_bytes = min(max(total // 16, SMALLEST_FILE), max(LARGEST_FILE, total // 256))
    folder = directory / "documents"
    folder.mkdir(parents=True)
    with (
        DocumentWriter(folder, "train", survey.kind, file_bytes) as train,
        DocumentWriter(folder, "validation", survey.kind, file_bytes) as validation,
    ):
        writers = {"train": train, "validation": validation}
        for split, document in checked.corpus.documents():
            writers[split].write(document)
    for split, writer in writers.items():
        if (writer.documents, writer.bytes) != (survey.documents[split], survey.bytes[split]):
            raise UserError(f"data: the {split} sources changed while they were read; start again")


def _texts(directory: Path) -> Iterator[str]:
    return (document.text for document in read_documents(directory, "train"))


def _split_entry(entries: list[dict[str, Any]], split: Split) -> dict[str, Any]:
    files = [
        {key: entry[key] for key in ("path", "tokens", "sha256", "documents", "index", "text")}
        for entry in entries
        if entry["split"] == split
    ]
    totals = {key: sum(entry[key] for entry in entries if entry["split"] == split) for key in ("tokens", "bytes")}
    return {"documents": sum(file["documents"] for file in files), **totals, "files": files}


def describe(directory: Path, report: dict[str, Any]) -> str:
    """The stage's summary for people, some lines of text."""
    lines = []
    for source in report["sources"]:
        version = f" of Python {source['python']}" if "python" in source else ""
        empty = f", {source['empty']:,} empty left out" if source["empty"] else ""
        lines.append(
            f"  source      {source['source']}{version}: {source['documents']:,} {report['kind']}, "
            f"{source['bytes']:,} bytes{empty}, content hash {source['sha256'][:16]}"
        )
    for split in ("train", "validation"):
        lines.append(
            f"  {split:<11} {report['documents'][split]:,} {report['kind']}, {report['tokens'][split]:,} tokens, "
            f"{report['bytes'][split]:,} bytes"
        )
    unknown = f", {report['unknown_tokens']:,} unknown" if report["unknown_tokens"] else ""
    lines.append(
        f"  tokenizer   {report['vocab_size']:,} entries, {report['bytes_per_token']:.2f} bytes a token{unknown}"
    )
    if report["compressed"]:
        figures = ", ".join(f"{name} {entry['bits_per_byte']:.3f}" for name, entry in report["compressed"].items())
        lines.append(f"  baselines   bits per byte of the validation text: {figures}")
    lines.append(f"  files       {directory}")
    return f"prepare: done in {report['seconds']['total']:.1f} s\n" + "\n".join(lines)
