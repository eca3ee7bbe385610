"""The tasks of ``data.augmentation``: a part to its classes, and to its documents with their variants."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from raylm.config.augmentation import AugmentationSection, BalanceSection
from raylm.config.data import DataSection
from raylm.config.run_directory import write_atomically
from raylm.data.augmentation.maker import VariantMaker
from raylm.data.augmentation.served_model import AnswerLog, ServedModel
from raylm.data.cleaning.contamination import Contamination
from raylm.data.cleaning.duplicates import dropped_documents
from raylm.data.prepare.parts import EXTRA_COLUMNS
from raylm.data.sources.documents import Document, DocumentFile, Kind
from raylm.data.tokens.tokenization import AUGMENTED, without_duplicates
from raylm.errors import RunFailure


def class_of(document: Document, balance: BalanceSection) -> str:
    """The document's class."""
    return document.answer if balance.by == "answer" else document.label


def count_classes(
    job: dict[str, Any], directory: str, data: dict[str, Any], kind: Kind, duplicates: list[str]
) -> dict[str, int]:
    """A Ray Data task: training documents of each class in a part."""
    section, found = DataSection.model_validate(data), Counter[str]()
    for documents in _originals(job, Path(directory), duplicates):
        found.update(class_of(d, section.augmentation.balance) for d in documents if _is_original(d))
    return dict(found)


def augment_part(
    job: dict[str, Any],
    directory: str,
    data: dict[str, Any],
    kind: Kind,
    duplicates: list[str],
    targets: dict[str, list[int]],
    model: str | None,
    api_key: str | None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The task: a part to its augmented documents and their record.

    Args:
        job: ``name`` of the part; ``first``, number of its first document; ``documents``; ``seen``, documents of each
            class before it.
        directory: the work directory.
        data: the ``data`` section.
        kind: documents or pairs.
        duplicates: files of duplicates.
        targets: of each class (documents, documents wanted); empty where classes are not balanced.
        model, api_key: of the served model.
        progress: called with the number of documents that are done.

    Raises:
        RunFailure: too many requests to the model failed; its answers so far stay.
    """
    section, work = DataSection.model_validate(data), Path(directory)
    return asyncio.run(_augment_part(job, work, section, kind, duplicates, targets, model, api_key, progress))


async def _augment_part(
    job: dict[str, Any],
    work: Path,
    data: DataSection,
    kind: Kind,
    duplicates: list[str],
    targets: dict[str, list[int]],
    model: str | None,
    api_key: str | None,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    section, folder, name = data.augmentation, work / AUGMENTED, job["name"]
    maker = VariantMaker(section, Contamination.load(work, data.decontamination))
    seen = Counter(job["seen"])
    record: dict[str, Any] = {"originals": 0}
    done = 0
    log = AnswerLog(folder / f"{name}.answers.jsonl") if model is not None else None
    served = ServedModel(section.model, model, api_key, log) if log is not None else None
    try:
        if served is not None:
            maker.served = await served.__aenter__()
        with DocumentFile(folder / f"{name}.parquet", kind, with_split=True, columns=EXTRA_COLUMNS) as output:
            for group in _originals(job, work, duplicates):
                # A row group's requests are in flight together; what they give is written in order.
                wanted: list[tuple[Document, int, list[Any]]] = []
                for document in group:
                    copies = 1
                    if _is_original(document):
                        copies = _copies(document, section.balance, targets, seen)
                        record["originals"] += copies > 0
                    tasks = maker.start(document) if copies and _is_original(document) else []
                    wanted.append((document, copies, tasks))
                for document, copies, tasks in wanted:
                    _write_copies(document, copies, maker, output)
                    for variant in await maker.finish(document, tasks):
                        output.write(variant)
                    done += 1
                    if progress is not None:
                        progress(done)
                    if served is not None and served.too_many_failures:
                        await _give_up(task for _, _, tasks in wanted for _, _, task in tasks)
                        raise RunFailure(_too_many(served, section))
    finally:
        if served is not None:
            await served.__aexit__()
            log.close()
    record |= {
        "made": dict(maker.made),
        "dropped": dict(maker.dropped),
        "failed": served.reasons if served is not None else {},
        "requests": served.requests if served is not None else 0,
        "examples": maker.examples,
    }
    write_atomically(folder / f"{name}.json", json.dumps(record, ensure_ascii=False))
    return record


def _write_copies(document: Document, copies: int, maker: VariantMaker, output: DocumentFile) -> None:
    """Write an original and what balancing adds of it, or leave it out."""
    if not copies:
        maker.dropped["undersample"] += 1
        return
    output.write(document)
    for number in range(1, copies):
        output.write(replace(document, augmentation=f"oversample:{document.id}:{number}"))
        maker.made["oversample"] += 1


async def _give_up(tasks: Iterable[Any]) -> None:
    """End the requests that are in flight."""
    flying = [task for task in tasks if isinstance(task, asyncio.Future)]
    for task in flying:
        task.cancel()
    await asyncio.gather(*flying, return_exceptions=True)


def _too_many(served: ServedModel, section: AugmentationSection) -> str:
    reason = max(served.reasons, key=served.reasons.__getitem__)
    return (
        f"data.augmentation.model: {served.failures} of {served.requests} requests failed, allowed: a share of "
        f"{section.model.max_failures:g} (max_failures); most often: {reason}; the same command goes on with the others"
    )


def _is_original(document: Document) -> bool:
    """Whether a document is to be augmented: a training one that no earlier prepare has made."""
    return document.split == "train" and not document.augmentation


def _originals(job: dict[str, Any], work: Path, duplicates: list[str]) -> Iterator[list[Document]]:
    dropped = dropped_documents(work, duplicates, job["first"], job["first"] + job["documents"]) - job["first"]
    return without_duplicates(work, job["name"], dropped)


def _copies(
    document: Document, balance: BalanceSection | None, targets: dict[str, list[int]], seen: Counter[str]
) -> int:
    """How often a document is to be there; over its class the sum is exactly what is wanted, evenly spread."""
    if balance is None:
        return 1
    name = class_of(document, balance)
    count, wanted = targets[name]
    place, seen[name] = seen[name], seen[name] + 1
    return (place + 1) * wanted // count - place * wanted // count
