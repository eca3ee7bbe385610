"""The ``prepare`` stage: sources to documents, tokenizer, token shards and manifest.

In: a validated ``PrepareConfig``. Out: a prepared directory, whole when its ``manifest.json`` stands. On bad input
nothing stays. A prepare that was killed leaves no manifest; the same command goes on from what is finished and ends
with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.cluster.session import ray_session
from raylm.config.data import DataSection, TokenizerSection
from raylm.config.run_directory import RunDirectory, write_atomically
from raylm.config.stages import PrepareConfig
from raylm.data.cleaning.changes import changes_of
from raylm.data.prepare.baselines import compressed_sizes
from raylm.data.prepare.card import describe_set
from raylm.data.prepare.card_page import write_card
from raylm.data.prepare.inputs import FILE, check_unchanged, note_inputs, open_inputs, stamps_of, tokenizer_stamps
from raylm.data.prepare.summary import describe, warning
from raylm.data.sources.corpus import Corpus, Survey
from raylm.data.sources.documents import Split, make_pair, read_documents
from raylm.data.sources.segments import MANIFEST
from raylm.data.tokens.shards import BESIDE, FORMAT_VERSION, read_manifest, token_dtype
from raylm.errors import UserError
from raylm.progress import Activity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from raylm.data.prepare.passes import Pipeline
    from raylm.data.tokens.tokenization import ShardFormat

PARTS = ("documents", "tokenizer", "train", "validation", "work")


class Input:
    """The checked input of a prepared directory: make one before anything is written.

    Attributes:
        data, tokenizer: the sections.
        corpus: the opened sources.
        survey: what the sources hold; None where they were not read.

    Args:
        data, tokenizer: sections of the configuration.
        read: read all of the input on this machine, so that a mistake in its last row is found here. Without it, the
            tasks of ``prepare`` find it.

    Raises:
        UserError: a source or the tokenizer is wrong.
    """

    def __init__(self, data: DataSection, tokenizer: TokenizerSection, read: bool = True) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.corpus = Corpus(data)
        changes_of(data.cleaning)
        if data.augmentation is not None:
            from raylm.data.augmentation.passes import check_augmentation

            check_augmentation(data)
        self.survey: Survey | None = self.corpus.survey() if read else None
        if tokenizer.path is not None:
            from raylm.data.tokens.tokenizers import reuse_tokenizer

            found = reuse_tokenizer(tokenizer.path, data.chat_template)
            if self.survey is not None and self.survey.kind != "documents":
                check_template(found)


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Lay out one pair with a reused tokenizer's own template, so that one which cannot is refused early."""
    import tempfile

    from raylm.data.tokens.encoding import PairEncoder

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
    if data.augmentation is not None:
        raise UserError(f"data.augmentation: leave it out, {directory} is prepared already; augment where it is made")
    return directory.resolve()


def prepare(config: PrepareConfig) -> None:
    """Run the stage.

    Raises:
        UserError: bad configuration or input; nothing was written.
        RunFailure: tokenizing failed.
    """
    run = RunDirectory("prepare", config)
    run.check()
    if (report := run.report()) is not None:
        check_unchanged(run.path, config.data, run.path, config.tokenizer.path)
        print(f"prepare: {run.path} is done already\n{describe(run.path, report)}")
        return
    with Activity("prepare: looking at the sources"):
        checked = Input(config.data, config.tokenizer, read=False)
    workers, laps = config.resources.workers, _Laps()
    with run.held(), ray_session(), _nothing_half_written(run.path, "config.yaml"):
        laps.end("ray_start")
        # Another command may have finished it since.
        if (report := run.report()) is None:
            run.create()
            report = _build(run.path, checked, laps, cpus=None if workers == "auto" else workers)
            run.write_report(report)
            write_card(run.path, report)
    print(describe(run.path, report), flush=True)
    if (text := warning(report)) is not None:
        print(f"prepare: {text}", file=sys.stderr)


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
    checked, laps = checked or Input(data, tokenizer, read=False), _Laps()
    with ray_session(), _nothing_half_written(directory):
        laps.end("ray_start")
        report = _build(directory, checked, laps, cpus=cpus)
        write_atomically(directory / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_card(directory, report)
    if (text := warning(report)) is not None:
        print(f"data.train: {text}", file=sys.stderr)


class _Laps:
    """Seconds of the parts of the work, in order."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """Note the time since the last part's end."""
        self.seconds[name] = round(time.monotonic() - self._began - sum(self.seconds.values()), 3)

    def with_total(self) -> dict[str, float]:
        """The parts and their sum."""
        return {**self.seconds, "total": round(time.monotonic() - self._began, 3)}


def _build(directory: Path, checked: Input, laps: _Laps, *, cpus: int | None) -> dict[str, Any]:
    """Write the whole set, the manifest last; returns the report. On the Ray that is running."""
    from raylm.data.prepare.passes import Pipeline
    from raylm.data.tokens.tokenizers import tokenizer_hash

    stamps = stamps_of(open_inputs(checked.data)) | tokenizer_stamps(checked.tokenizer.path)
    pipeline = Pipeline(directory, checked.data, checked.tokenizer, checked.corpus, cpus)
    made = _tokenize(pipeline, checked, laps)
    entries = [entry for result in made.results for entry in result["entries"]]
    with Activity("measuring what the set holds, for its data card"):
        baselines = compressed_sizes(document.text for document in read_documents(directory, "validation"))
        laps.end("baselines")
        splits = {split: _split_entry(entries, split) for split in ("train", "validation")}
        card = describe_set(directory, splits)
        laps.end("card")
    layout = made.layout
    manifest = {
        "version": FORMAT_VERSION,
        "kind": layout.kind,
        "tokenizer_hash": tokenizer_hash(directory / "tokenizer"),
        "vocab_size": made.vocab_size,
        "eos_id": layout.eos_id,
        "pad_id": layout.eos_id if made.pad_id is None else made.pad_id,
        "dtype": "uint16" if layout.dtype.endswith("2") else "uint32",
        "splits": splits,
        "corpus": {"sources": made.sources},
        "configuration": {
            "data": checked.data.model_dump(mode="json"),
            "tokenizer": checked.tokenizer.model_dump(mode="json"),
        },
    }
    report = {
        **_counts(directory, made, splits, sum(entry["unknown_tokens"] for entry in entries)),
        "compressed": baselines,
        "sources": made.sources,
        **card,
        **made.augmented,
        **pipeline.account(sum(result["duplicates"] for result in made.results)),
        "seconds": laps.with_total(),
    }
    pipeline.close_work()
    note_inputs(directory, stamps)
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return report


@dataclass(frozen=True)
class _Made:
    """What tokenizing gives."""

    layout: ShardFormat
    vocab_size: int
    pad_id: int | None
    sources: list[dict[str, Any]]
    augmented: dict[str, Any]
    results: list[dict[str, Any]]


def _tokenize(pipeline: Pipeline, checked: Input, laps: _Laps) -> _Made:
    """From the sources to files of tokens."""
    from raylm.data.tokens.tokenization import ShardFormat
    from raylm.data.tokens.tokenizers import reuse_tokenizer

    pipeline.open_work(PARTS)
    survey = pipeline.make_parts()
    if survey.kind != "documents" and checked.tokenizer.path is not None:
        check_template(reuse_tokenizer(checked.tokenizer.path, checked.data.chat_template))
    laps.end("parts")
    pipeline.find_duplicates()
    laps.end("duplicates")
    augmented = pipeline.augment()
    if augmented:
        laps.end("augmentation")
    with Activity("training the tokenizer" if checked.tokenizer.path is None else "copying the tokenizer"):
        tokenizer = pipeline.make_tokenizer()
    laps.end("tokenizer")
    layout = ShardFormat(
        kind=survey.kind,
        dtype=token_dtype(len(tokenizer)).str,
        eos_id=tokenizer.eos_token_id,
        unknown_id=tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None,
        labels=checked.data.fields.label is not None,
    )
    results = pipeline.make_files(asdict(layout))
    laps.end("tokens")
    return _Made(layout, len(tokenizer), tokenizer.pad_token_id, survey.sources, augmented, results)


def _counts(directory: Path, made: _Made, splits: dict[str, Any], unknown_tokens: int) -> dict[str, Any]:
    """What the report says of the set's size and of its tokenizer."""
    from raylm.data.tokens.tokenizer_statistics import describe_vocabulary

    tokens, size = (sum(split[name] for split in splits.values()) for name in ("tokens", "bytes"))
    return {
        "stage": "prepare",
        "kind": made.layout.kind,
        "documents": {name: split["documents"] for name, split in splits.items()},
        "tokens": {name: split["tokens"] for name, split in splits.items()},
        "bytes": {name: split["bytes"] for name, split in splits.items()},
        "bytes_per_token": round(size / tokens, 4),
        "vocab_size": made.vocab_size,
        "unknown_tokens": unknown_tokens,
        "vocabulary": describe_vocabulary(directory / "tokenizer", _measured(directory), made.layout.unknown_id),
    }


def _measured(directory: Path) -> Iterator[str]:
    """Texts to measure a tokenizer on: those that it was not trained on, and then the others."""
    for split in ("validation", "train"):
        for document in read_documents(directory, split):
            yield document.text


@contextmanager
def _nothing_half_written(directory: Path, *files: str) -> Iterator[None]:
    """On bad input take back what was written into ``directory``, an interrupted start's too, and the directory.

    Others may have written beside it since, so that nothing else is removed.

    Args:
        directory: of the set.
        files: what else there is of it.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        yield
    except UserError:
        for part in PARTS:
            shutil.rmtree(directory / part, ignore_errors=True)
        for name in (FILE, *files):
            (directory / name).unlink(missing_ok=True)
        with suppress(OSError):
            for path in missing:
                path.rmdir()
        raise


def _split_entry(entries: list[dict[str, Any]], split: Split) -> dict[str, Any]:
    files = [
        {key: entry[key] for key in ("path", "tokens", "sha256", "documents", *BESIDE) if key in entry}
        for entry in entries
        if entry["split"] == split
    ]
    totals = {key: sum(entry[key] for entry in entries if entry["split"] == split) for key in ("tokens", "bytes")}
    return {"documents": sum(file["documents"] for file in files), **totals, "files": files}
