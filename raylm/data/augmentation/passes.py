"""``data.augmentation``: training documents of each part, without duplicates, to the same with their variants.

Between deduplication and the tokenizer. A task takes a part and writes ``work/augmented/PART.parquet``, which
stands in for the part from there on; its record, ``PART.json``, says that it is done, and ``PART.answers.jsonl`` keeps
what a served model has said. Documents of the validation side pass through as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from raylm.config.augmentation import AugmentationSection, MethodSection
from raylm.config.data import DataSection
from raylm.data.augmentation.jobs import augment_part, count_classes
from raylm.data.augmentation.maker import MOST_EXAMPLES
from raylm.data.augmentation.served_model import find_key, find_model
from raylm.data.augmentation.word_edits import make_variant, read_synonyms
from raylm.data.prepare.jobs import run_jobs
from raylm.data.prepare.parts import WORK
from raylm.data.sources.documents import Kind
from raylm.data.tokens.tokenization import AUGMENTED
from raylm.errors import UserError
from raylm.progress import ProgressBar


def check_augmentation(data: DataSection) -> None:
    """Refuse what can be seen to be wrong before anything is read: dictionaries, the served model, its key.

    Raises:
        UserError: one line.
    """
    section = data.augmentation
    if section is None:
        return
    for method in section.methods:
        if method.dictionary is not None:
            read_synonyms(method.dictionary)
        if method.segmenter == "jieba":
            make_variant("字", MethodSection(method="swap", segmenter="jieba"), None, "")
    if section.balance is not None and section.balance.by == "label" and data.fields.label is None:
        raise UserError("data.augmentation.balance.by: found label, which needs data.fields.label: the column's name")
    if section.served:
        find_model(section.model)


def dictionaries_hash(section: AugmentationSection) -> str:
    """Hash of the dictionaries: another content is another input."""
    paths = [Path(m.dictionary).expanduser() for m in section.methods if m.dictionary]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


class Augmentation:
    """The pass over all parts, on the driver.

    Args:
        directory: the prepared set.
        data: the section of the configuration.
        kind: what the set holds.
        parts: all parts in order, as :class:`~raylm.data.prepare.passes.Pipeline` has them.
        duplicates: files of duplicates in the work directory.
        cpus: most tasks at a time; None takes all CPUs.
    """

    def __init__(
        self,
        directory: Path,
        data: DataSection,
        kind: Kind,
        parts: list[dict[str, Any]],
        duplicates: list[str],
        cpus: int | None,
    ) -> None:
        self._section, self._work, self._cpus = data.augmentation, directory / WORK, cpus
        self._parts = parts
        self._arguments = {
            "directory": str(self._work),
            "data": data.model_dump(),
            "kind": kind,
            "duplicates": duplicates,
        }
        if kind == "conversations":
            raise UserError("data.augmentation: allowed where the input holds documents or pairs, not conversations")
        if kind != "pairs":
            for number, method in enumerate(self._section.methods):
                if method.part is not None:
                    raise UserError(
                        f"data.augmentation.methods[{number}].part: found {method.part}, allowed where the input holds "
                        "documents, not pairs: none"
                    )
            if self._section.balance is not None and self._section.balance.by == "answer":
                raise UserError("data.augmentation.balance.by: found answer, allowed for documents: label")

    def run(self) -> dict[str, Any]:
        """Write what is not written yet; returns the account for the report.

        Raises:
            RunFailure: a task failed, or too many requests; what is done stays.
        """
        folder = self._work / AUGMENTED
        targets, seen = self._targets()
        done = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
        jobs = [
            {key: part[key] for key in ("name", "first", "documents")} | {"seen": before}
            for part, before in zip(self._parts, seen, strict=True)
        ]
        pending = [job for job in jobs if job["name"] not in done]
        made = self._ask(pending, targets) if self._section.served else self._make(pending, targets)
        done |= {job["name"]: record for job, record in zip(pending, made, strict=True)}
        return self._account([done[job["name"]] for job in jobs], targets)

    def _make(self, jobs: list[dict[str, Any]], targets: dict[str, list[int]]) -> list[dict[str, Any]]:
        arguments = {**self._arguments, "targets": targets, "model": None, "api_key": None}
        weights = [max(1, job["documents"]) for job in jobs]
        return run_jobs("augmenting", augment_part, jobs, cpus=self._cpus, arguments=arguments, weights=weights,
                        unit="documents")  # fmt: skip

    def _ask(self, jobs: list[dict[str, Any]], targets: dict[str, list[int]]) -> list[dict[str, Any]]:
        """One part after the other in this process, which waits for the server and shows each document's progress."""
        if not jobs:
            return []
        model, api_key = find_model(self._section.model), find_key(self._section.model)
        made: list[dict[str, Any]] = []
        before = 0
        with ProgressBar("augmenting", sum(job["documents"] for job in jobs), "documents") as bar:
            for job in jobs:
                made.append(
                    augment_part(
                        job, **self._arguments, targets=targets, model=model, api_key=api_key,
                        progress=lambda done, before=before: bar.update(before + done),
                    )
                )  # fmt: skip
                before += job["documents"]
        return made

    def _targets(self) -> tuple[dict[str, list[int]], list[dict[str, int]]]:
        """Of each class (documents, documents wanted); and of each part, documents of each class before it."""
        balance = self._section.balance
        if balance is None:
            return {}, [{} for _ in self._parts]
        jobs = [{key: part[key] for key in ("name", "first", "documents")} for part in self._parts]
        counts = run_jobs("counting classes", count_classes, jobs, cpus=self._cpus, arguments=self._arguments)
        before, total = [], Counter[str]()
        for count in counts:
            before.append(dict(total))
            total.update(count)
        if len(total) < 2:
            raise UserError(f"data.augmentation.balance: found {len(total)} class, allowed: 2 or more")
        most, least = max(total.values()), min(total.values())
        wanted = {
            name: least if balance.method == "undersample" else min(most, balance.max_copies * count)
            for name, count in total.items()
        }
        return {name: [total[name], wanted[name]] for name in sorted(total)}, before

    def _account(self, records: list[dict[str, Any]], targets: dict[str, list[int]]) -> dict[str, Any]:
        """What the report says, added up in the order of the parts."""
        account: dict[str, Any] = {"originals": sum(record["originals"] for record in records)}
        for name in ("made", "dropped", "failed"):
            total = Counter[str]()
            for record in records:
                total.update(record[name])
            account[name] = dict(sorted(total.items()))
        account["requests"] = sum(record["requests"] for record in records)
        if targets:
            account["classes"] = {name: {"before": before, "after": after} for name, (before, after) in targets.items()}
        examples: dict[str, list[dict[str, str]]] = {}
        for record in records:
            for name, found in record["examples"].items():
                examples[name] = [*examples.get(name, []), *found][:MOST_EXAMPLES]
        return account | {"examples": examples}
