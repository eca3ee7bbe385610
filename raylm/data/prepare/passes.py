"""The two passes of ``prepare`` over the blocks of a corpus, with what must be known in between.

Parts (read, clean, sign) -> duplicates -> tokenizer -> files (tokenize, pack). Everything that is finished lies in the
set's ``work`` directory under a name of its own, so the same command goes on where a killed one stopped; the directory
is removed when the manifest stands.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from raylm.config.data import DataSection, TokenizerSection
from raylm.config.run_directory import write_atomically
from raylm.data.cleaning.contamination import collect
from raylm.data.cleaning.duplicates import FOLDER, dropped_documents, duplicate_jobs, find_duplicates
from raylm.data.prepare.card import describe_duplicates
from raylm.data.prepare.jobs import run_jobs
from raylm.data.prepare.parts import SAMPLE_PURPOSE, WORK, make_parts
from raylm.data.sources.corpus import BlockCount, Corpus, Survey
from raylm.data.sources.documents import Split, hash_share, read_row_groups
from raylm.data.sources.readers import read_block
from raylm.data.sources.streams import InputErrors
from raylm.data.tokens.tokenization import AUGMENTED, is_taken, make_files, surviving

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIPELINE_VERSION = 3
# More is sampled than a tokenizer needs, as cleaning and deduplication take some away.
SAMPLE_MARGIN = 1.5


class Pipeline:
    """Makes the files of a prepared set.

    Args:
        directory: the set; shared by all nodes.
        data, tokenizer: sections of the configuration.
        corpus: the opened input.
        cpus: most tasks at a time; None takes all CPUs.

    Attributes:
        records: one a block, after :meth:`make_parts`.
        survey: what is in the parts, after :meth:`make_parts`.
        duplicates: one a task, after :meth:`find_duplicates`.
    """

    def __init__(
        self, directory: Path, data: DataSection, tokenizer: TokenizerSection, corpus: Corpus, cpus: int | None
    ) -> None:
        self.directory, self.work = directory, directory / WORK
        self._data, self._tokenizer, self._corpus, self._cpus = data, tokenizer, corpus, cpus
        self._rate = SAMPLE_MARGIN * tokenizer.sample_bytes / max(1, corpus.bytes)
        self.records: list[dict[str, Any]] = []
        self.survey: Survey | None = None
        self.duplicates: list[dict[str, Any]] = []

    def open_work(self, parts: tuple[str, ...]) -> None:
        """Go on with the work directory of the same input and configuration; else begin anew."""
        values = [_dump(self._data), _dump(self._tokenizer), self._corpus.identity(), PIPELINE_VERSION]
        if self._data.augmentation is not None:
            from raylm.data.augmentation.passes import dictionaries_hash

            values.append(dictionaries_hash(self._data.augmentation))
        identity = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        plan = self.work / "plan.json"
        if not plan.is_file() or json.loads(plan.read_text(encoding="utf-8")) != identity:
            for part in parts:
                shutil.rmtree(self.directory / part, ignore_errors=True)
            for name in ("parts", "blocks", "files", FOLDER, AUGMENTED):
                (self.work / name).mkdir(parents=True)
            write_atomically(plan, json.dumps(identity))

    def make_parts(self) -> Survey:
        """The first pass.

        Raises:
            UserError: bad input, or nothing is left of it.
            RunFailure: a task failed.
        """
        if self._data.decontamination is not None and not (self.work / "contamination.npy").is_file():
            collect(self.work, self._evaluation_texts(), self._data.decontamination)
        blocks = self._corpus.blocks
        done = _finished(self.work / "blocks")
        pending = [block for block in blocks if block.number not in done]
        made = run_jobs(
            "reading and cleaning",
            make_parts,
            [block.to_json() for block in pending],
            cpus=self._cpus,
            arguments={
                "directory": str(self.work),
                "data": self._data.model_dump(),
                "source_names": [source.name for source in self._corpus.sources],
                "part_bytes": self._corpus.block_bytes,
                "rate": self._rate,
            },
            weights=[max(1, block.size) for block in pending],
            unit="bytes",
        )
        done |= {record["block"]: record for record in made}
        self.records = [done[block.number] for block in blocks]
        self.survey = self._corpus.summarize(BlockCount(**record["count"]) for record in self.records)
        return self.survey

    def _evaluation_texts(self) -> Iterator[str]:
        section = self._data.model_copy(
            update={"train": self._data.decontamination.sources, "validation": None, "format": "auto"}
        )
        for block in Corpus(section).blocks:
            for document in read_block(block, section, InputErrors("strict", encoding=section.encoding)):
                # Of a pair the answer alone is often a word; the whole of it is what must not be trained on.
                if document.text.strip():
                    yield document.text

    @property
    def parts(self) -> list[dict[str, Any]]:
        """All parts in order: name, documents, number of the first document, source, documents by split."""
        found, first = [], 0
        for block, record in zip(self._corpus.blocks, self.records, strict=True):
            for part in record["parts"]:
                count = part["train"] + part["validation"]
                found.append({**part, "documents": count, "first": first, "source": block.source})
                first += count
        return found

    def find_duplicates(self) -> None:
        """Find what is there twice, over all parts."""
        section = self._data.deduplication
        if section is None:
            return
        parts = self.parts
        shutil.rmtree(self.work / FOLDER, ignore_errors=True)
        (self.work / FOLDER).mkdir()
        jobs = duplicate_jobs(section, sum(part["documents"] for part in parts))
        arguments = {
            "directory": self.work,
            "parts": [f"parts/{part['name']}" for part in parts],
            "counts": [part["documents"] for part in parts],
            "section": section,
        }
        self.duplicates = run_jobs("finding duplicates", find_duplicates, jobs, cpus=self._cpus, arguments=arguments)

    @property
    def _duplicate_files(self) -> list[str]:
        return [record["file"] for record in self.duplicates]

    def augment(self) -> dict[str, Any]:
        """Make further training documents where that is asked for; returns what the report says about it.

        Raises:
            UserError: the documents are not such as the section is for.
            RunFailure: a task failed, or too many requests to a served model.
        """
        if self._data.augmentation is None:
            return {}
        # Brings an HTTP client with it, which other sets need not wait for.
        from raylm.data.augmentation.passes import Augmentation

        augmentation = Augmentation(
            self.directory, self._data, self.survey.kind, self.parts, self._duplicate_files, self._cpus
        )
        return {"augmentation": augmentation.run()}

    def dropped(self, part: dict[str, Any]) -> np.ndarray:
        """Rows of a part that are duplicates, sorted."""
        last = part["first"] + part["documents"]
        return dropped_documents(self.work, self._duplicate_files, part["first"], last) - part["first"]

    def sample(self) -> Iterator[str]:
        """Training texts for the tokenizer, at most about ``tokenizer.sample_bytes`` of them, in order."""
        parts = self.parts
        total = sum(part["bytes"] for part in parts)
        if self._rate >= 1:
            share = self._tokenizer.sample_bytes / max(1, total)
            for part in parts:
                for documents in surviving(self.work, part["name"], self.dropped(part)):
                    for document in documents:
                        if document.split == "train" and (
                            share >= 1 or hash_share(document.text, SAMPLE_PURPOSE) < share
                        ):
                            yield document.text
            return
        share = self._tokenizer.sample_bytes / max(1, total)
        for part in parts:
            dropped = set(self.dropped(part).tolist())
            for group in read_row_groups(self.work / "parts" / f"{part['name']}.sample.parquet"):
                for document in group:
                    if int(document.title) not in dropped and hash_share(document.text, SAMPLE_PURPOSE) < share:
                        yield document.text

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """Train or copy the tokenizer, unless that is done."""
        from raylm.data.tokens.tokenizers import make_tokenizer, reuse_tokenizer

        final = self.directory / "tokenizer"
        if not final.is_dir():
            partial = self.work / "tokenizer"
            shutil.rmtree(partial, ignore_errors=True)
            make_tokenizer(self._tokenizer, self.sample(), self._data.chat_template).save_pretrained(partial)
            partial.replace(final)
        return reuse_tokenizer(str(final))

    def make_files(self, layout: dict[str, Any]) -> list[dict[str, Any]]:
        """The second pass; returns the result of every task, in order.

        Raises:
            RunFailure: a task failed.
        """
        jobs = self._file_jobs(layout)
        done = _finished(self.work / "files")
        pending = [job for job in jobs if job["number"] not in done]
        made = run_jobs(
            "tokenizing",
            make_files,
            pending,
            cpus=self._cpus,
            arguments={
                "directory": str(self.directory),
                "layout": layout,
                "duplicates": self._duplicate_files,
                "weights": [source.weight for source in self._corpus.sources],
            },
            weights=[max(1, job["bytes"]) for job in pending],
            unit="bytes",
        )
        done |= {job["number"]: result for job, result in zip(pending, made, strict=True)}
        return [done[job["number"]] for job in jobs]

    def _file_jobs(self, layout: dict[str, Any]) -> list[dict[str, Any]]:
        parts, weights = self.parts, [source.weight for source in self._corpus.sources]
        copies = max(-(-weight // 1) for weight in weights)
        jobs = []
        for copy in range(int(copies)):
            for part in parts:
                if copy < weights[part["source"]]:
                    keys = ("source", "first", "documents", "bytes")
                    job = {"number": len(jobs), "part": part["name"], "copy": copy, "leading": []}
                    jobs.append(job | {key: part[key] for key in keys})
        for split in ("train", "validation"):
            leading = next((job for job in jobs if self._is_leading(job, split, weights)), None)
            if leading is not None:
                leading["leading"].append(split)
        return jobs

    def _is_leading(self, job: dict[str, Any], split: Split, weights: list[float]) -> bool:
        """Whether something of the split is left in a part."""
        weight = weights[job["source"]] if split == "train" else 1.0
        for documents in surviving(self.work, job["part"], self.dropped(job)):
            if any(document.split == split and is_taken(document, weight, job["copy"]) for document in documents):
                return True
        return False

    def account(self, duplicates: int) -> dict[str, Any]:
        """What the report says about cleaning, duplicates and bad input, added up over all blocks in their order."""
        account: dict[str, Any] = {"documents_read": sum(record["read"] for record in self.records)}
        account["cleaning"] = _add_up([record["cleaning"] for record in self.records])
        if self._data.deduplication is not None:
            account["duplicates"] = {"dropped": duplicates, "compared": sum(r["compared"] for r in self.duplicates)}
            account["duplicates"] |= describe_duplicates(self.work, self._duplicate_files, self.parts)
        account["errors"] = {"policy": self._data.errors, **_add_up([record["errors"] for record in self.records])}
        account["lengths"] = np.sum([record["lengths"] for record in self.records], axis=0).tolist()
        return account

    def close_work(self) -> None:
        """Remove what only a resumed prepare needs."""
        shutil.rmtree(self.work, ignore_errors=True)
        for path in self.directory.glob("*/.*.partial"):
            path.unlink(missing_ok=True)


def _dump(section: BaseModel) -> dict[str, Any]:
    return section.model_dump(mode="json")


def _finished(folder: Path) -> dict[int, dict[str, Any]]:
    """The records that an earlier start has left, by number."""
    return {int(path.stem): json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("[0-9]*.json"))}


def _add_up(values: list[Any], examples: int = 5) -> Any:
    """Numbers are added, dictionaries merged, and of lists the first items kept."""
    first = values[0]
    if isinstance(first, dict):
        names = list(dict.fromkeys(name for value in values for name in value))
        return {name: _add_up([value[name] for value in values if name in value], examples) for name in names}
    if isinstance(first, list):
        return [item for value in values for item in value][:examples]
    return sum(values)
