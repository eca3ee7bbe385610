"""The data card of a prepared set as one HTML page, ``report.html``: what came in, what was left out and why, what the
set holds, what the tokenizer makes of it, its files with checksums, and the configuration that made it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import yaml

from raylm.config.run_directory import write_atomically
from raylm.data.tokens.shards import read_manifest
from raylm.pages import bars, curve, folded, histogram, number, page, quote, side_by_side, size, table, tiles

MOST_ROWS = 200


def write_card(directory: Path, report: dict[str, Any], path: Path | None = None) -> Path:
    """Write the card of a prepared directory from its manifest and ``report``; returns the path.

    Args:
        path: of the file; ``report.html`` in the directory by default.

    Raises:
        UserError: the directory is not prepared.
    """
    manifest = read_manifest(directory)
    sections = {
        "Sources": _sources(report),
        "From input to set": _funnel(report),
        "Left out by filters": _filters(report),
        "Changed": _changed(report),
        "Duplicates": _duplicates(report),
        "Augmentation": _augmentation(report),
        "Input that could not be read": _errors(report),
        "Lengths": _lengths(report),
        "Languages": _languages(report),
        "Tokenizer": _tokenizer(report),
        "Examples": "".join(quote(text) for text in report.get("examples", [])),
        "Compressed": _compressed(report),
        "Time": bars({name: value for name, value in report["seconds"].items() if name != "total"}),
        "Files": _files(manifest),
        "Configuration": _pre(yaml.safe_dump(manifest["configuration"], sort_keys=False, allow_unicode=True)),
    }
    parts = [_summary(directory, report)]
    parts += [f"<h2>{html.escape(title)}</h2>{content}" for title, content in sections.items() if content]
    path = path or directory / "report.html"
    write_atomically(path, page(f"Data card: {directory.name}", parts))
    return path


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _note(text: str) -> str:
    return f"<p class=dim>{html.escape(text)}</p>"


def _summary(directory: Path, report: dict[str, Any]) -> str:
    kind, documents, tokens = report["kind"], report["documents"], report["tokens"]
    validation = f"of which validation: {documents['validation']:,} {kind}, {tokens['validation']:,} tokens"
    figures = {
        kind: number(sum(documents.values())),
        "tokens": number(sum(tokens.values())),
        "of text": size(sum(report["bytes"].values())),
        "entries of the vocabulary": number(report["vocab_size"]),
        "bytes a token": f"{report['bytes_per_token']:.2f}",
    }
    return _note(str(directory)) + tiles(figures) + _note(validation)


def _sources(report: dict[str, Any]) -> str:
    rows = [{**source, "sha256": source["sha256"][:16]} for source in report["sources"]]
    return table(rows[:MOST_ROWS]) + _more(len(rows))


def _more(count: int) -> str:
    return _note(f"and {count - MOST_ROWS:,} more, in report.json") if count > MOST_ROWS else ""


def _funnel(report: dict[str, Any]) -> str:
    """Where the documents went: one bar for each reason to be left out, and what is left."""
    dropped = {name: sum(reasons.values()) for name, reasons in report["cleaning"]["dropped"].items()}
    steps = {"read": report["documents_read"]}
    empty = sum(source["empty"] for source in report["sources"])
    steps |= {"empty": empty} if empty else {}
    steps |= {f"dropped: {name}": count for name, count in dropped.items()}
    if "duplicates" in report:
        steps["dropped: duplicates"] = report["duplicates"]["dropped"]
    account = report.get("augmentation")
    if account is not None:
        steps |= {f"added: {name}": count for name, count in account["made"].items()}
        steps |= {f"dropped: {name}": n for name, n in account["dropped"].items() if name == "undersample"}
    kept = f"in the set ({'weights of sources counted' if _weighted(report) else report['kind']})"
    steps[kept] = sum(report["documents"].values())
    return bars(steps, soft=[name for name in steps if name.startswith(("dropped", "empty"))])


def _weighted(report: dict[str, Any]) -> bool:
    return any("weight" in source for source in report["sources"])


def _filters(report: dict[str, Any]) -> str:
    cleaning, parts = report["cleaning"], []
    for name, reasons in cleaning["dropped"].items():
        parts.append(f"<h3>{html.escape(name)}: {sum(reasons.values()):,}</h3>")
        ordered = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:30])
        parts.append(bars(ordered, soft=list(ordered)))
        examples = cleaning["examples"].get(name, [])
        shown = "".join(f"<div class=dim>{html.escape(e['reason'])}</div>{quote(e['text'])}" for e in examples)
        parts.append(folded(f"{len(examples)} examples", shown) if examples else "")
    return "".join(parts)


def _changed(report: dict[str, Any]) -> str:
    changed = report["cleaning"]["changed"]
    return _note("documents that each change of data.cleaning touched") + bars(changed) if changed else ""


def _duplicates(report: dict[str, Any]) -> str:
    found = report.get("duplicates")
    if found is None or "same" not in found:
        return ""
    parts = [bars({"same words as an earlier one": found["same"], "nearly the same": found["near"]})]
    if found["near_by_similarity"]:
        values = found["near_by_similarity"]
        parts.append(histogram(list(values), list(values.values()), "Jaccard similarity of what was left out"))
    examples = "".join(
        side_by_side((f"left out, similarity {e['similarity']:.3f}", e["dropped"]), ("repeats this one", e["kept"]))
        for e in found["examples"]
    )
    return "".join([*parts, folded(f"{len(found['examples'])} examples", examples) if examples else ""])


def _augmentation(report: dict[str, Any]) -> str:
    found = report.get("augmentation")
    if found is None:
        return ""
    parts = [_note(f"{found['originals']:,} originals of the training side; what was made of them, by method:")]
    parts.append(bars(found["made"]) if found["made"] else "")
    if found["requests"]:
        failed = sum(found["failed"].values())
        parts.append(_note(f"{found['requests']:,} requests to the served model, {failed:,} of them failed"))
    for title, values in (("Variants left out", found["dropped"]), ("Failed requests", found["failed"])):
        parts.append(f"<h3>{title}</h3>{bars(values, soft=list(values))}" if values else "")
    if "classes" in found:
        rows = [{"class": name, **counts} for name, counts in found["classes"].items()]
        parts.append(f"<h3>Classes, training originals</h3>{table(rows[:MOST_ROWS])}{_more(len(rows))}")
    for name, examples in found["examples"].items():
        shown = "".join(side_by_side(("original", e["original"]), (name, e["variant"])) for e in examples)
        parts.append(folded(f"{name}: {len(examples)} examples", shown))
    return "".join(parts)


def _errors(report: dict[str, Any]) -> str:
    errors = report["errors"]
    if not errors["counts"]:
        return ""
    return bars(errors["counts"], soft=list(errors["counts"])) + "".join(quote(text) for text in errors["samples"])


def _lengths(report: dict[str, Any]) -> str:
    lengths = report.get("tokens_per_document")
    if lengths is None:
        return ""
    names = ("mean", "percentile_5", "median", "percentile_95", "longest")
    figures = {name.replace("_", " "): number(lengths[name]) for name in names}
    unit = f"tokens of a document ({report['kind']}: {sum(report['documents'].values()):,})"
    labels = [f"{edge:,}" for edge in lengths["from"]]
    return histogram(labels, lengths["documents"], unit) + tiles(figures)


def _languages(report: dict[str, Any]) -> str:
    found = report.get("languages")
    if not found or not found["documents"]:
        return ""
    shown = dict(list(found["documents"].items())[:20])
    note = (
        f"identified (py3langid) in a sample of {found['sampled']:,} training documents; short texts are often mistaken"
    )
    return bars(shown) + _note(note)


def _tokenizer(report: dict[str, Any]) -> str:
    found = dict(report["vocabulary"])
    if not found:
        return ""
    ranks, frequent = found.pop("ranks", []), found.pop("most_frequent", [])
    parts = [table({"entries": report["vocab_size"], "unknown tokens in the set": report["unknown_tokens"], **found})]
    parts.append(_note("fertility: tokens a word, a Chinese character counting as one; entropy in bits a token"))
    parts.append(curve([tuple(point) for point in ranks], "rank of a token", "times that it occurs"))
    if frequent:
        parts.append("<h3>Most frequent tokens</h3>" + bars({repr(row["token"]): row["count"] for row in frequent}))
    return "".join(parts)


def _compressed(report: dict[str, Any]) -> str:
    found = report["compressed"]
    note = _note("bits per byte of the validation text, which a model has to beat")
    return note + bars({name: entry["bits_per_byte"] for name, entry in found.items()}) if found else ""


def _files(manifest: dict[str, Any]) -> str:
    rows = []
    for split in manifest["splits"].values():
        for entry in split["files"]:
            rows.append({"file": entry["path"], "documents": entry["documents"], "tokens": entry["tokens"],
                         "sha256": entry["sha256"]})  # fmt: skip
            rows += [{"file": entry[part]["path"], "sha256": entry[part]["sha256"]} for part in ("index", "text")]
    figures = {"tokenizer, hash of its rules": manifest["tokenizer_hash"], "dtype": manifest["dtype"],
               "end-of-text token": manifest["eos_id"], "version": manifest["version"]}  # fmt: skip
    listed = folded(f"{len(rows):,} files with checksums", table(rows[:MOST_ROWS]) + _more(len(rows)))
    return table(figures) + listed
