"""What the page says about a run beside its curves: headline figures and tables, by stage."""

from __future__ import annotations

import html
from typing import Any

from raylm.compression.table import chain, notes, rows
from raylm.pages import folded, size, table
from raylm.reports import searches
from raylm.reports.confusion import confusion
from raylm.reports.runs import Run
from raylm.reports.trade_offs import forms, search
from raylm.tasks.measures import measured, shown
from raylm.training.reports.summary import clock, facts, interval_seconds, peak_memory, utilisation, validation_losses

MOST_ROWS = 64
EVENT_NAMES = {
    "resume": "went on",
    "restart": "workers restarted",
    "anomaly": "anomaly, rolled back",
    "takeover": "went on from another trial",
    "interrupted": "interrupted",
    "failure": "failed",
}


def headline(run: Run) -> dict[str, str]:
    """The figures that matter most, name with unit -> value; of a run that goes on, those known so far."""
    if run.stage in ("pretrain", "finetune"):
        return _training_headline(run)
    if run.report is None:
        return {}
    return {"tune": _tune_headline, "evaluate": _evaluate_headline, "compress": _compress_headline,
            "serve": _serve_headline}[run.stage](run.report)  # fmt: skip


def _training_headline(run: Run) -> dict[str, str]:
    lines, report = run.metrics, run.report or {}
    if "entries" in report:
        return _counted_headline(report)
    if not lines:
        return {}
    found, last = {}, lines[-1]
    if (validation := validation_losses(lines)) is not None:
        found["validation loss, nats a target"] = f"{validation[0]:.4f}"
        if validation[1] < validation[0]:
            found[f"best validation loss, step {validation[2]:,}"] = f"{validation[1]:.4f}"
    else:
        found["training loss, nats a target"] = f"{last['loss']:.4f}"
    if "bits_per_byte" in report:
        found["validation loss, bits per byte"] = f"{report['bits_per_byte']:.4f}"
    evaluated = [line for line in lines if "validation_loss" in line]
    for metric, measure in measured(evaluated[-1]).items() if evaluated else ():
        found[f"validation {measure.name}"] = shown(metric, evaluated[-1][metric])
    seconds = max(1e-9, sum(interval_seconds(lines)))
    wanted = run.wanted_steps
    of = f" of {wanted:,}" if run.report is None and wanted else ""
    found["steps"] = f"{last['step']:,}{of}"
    found["tokens"] = f"{last['tokens']:,}"
    found["tokens/s"] = f"{last['tokens'] / seconds:,.0f}"
    found["training time, h:min:s"] = clock(seconds)
    if (peak := utilisation(lines)) is not None:
        found["MFU, median"] = f"{peak:.1%}"
    if memory := peak_memory(lines):
        found["peak memory of a worker"] = size(max(memory))
        found["workers"] = str(len(memory))
    restarts = sum(event["kind"] == "restart" for event in run.events)
    return found | ({"restarts": str(restarts)} if restarts else {})


def _counted_headline(report: dict[str, Any]) -> dict[str, str]:
    found = {"validation loss, nats a token": f"{report['validation_loss']:.4f}"}
    if "bits_per_byte" in report:
        found["validation loss, bits per byte"] = f"{report['bits_per_byte']:.4f}"
    found["tokens, counted once"] = f"{report['tokens']:,}"
    return found | {"numbers in the tables": f"{report['entries']:,}", "seconds": f"{report['seconds']:,.1f}"}


def _tune_headline(report: dict[str, Any]) -> dict[str, str]:
    best, trials = report["best"], report["trials"]
    if "front" in report:
        names, original = report["objectives"], report["original"]
        found = {f"{name} (original {original[name]:.4g})": f"{best[name]:.4g}" for name in names}
        counts = {"trial taken": best["trial"], "trials": len(trials), "on the front": len(report["front"])}
        return found | {name: str(count) for name, count in counts.items()}
    metric = searches.metric_of(report)
    name = "validation loss, nats a target" if metric == "validation_loss" else metric.replace("_", " ")
    found = {f"best {name}": f"{best[metric]:.4f}", "best trial": str(best["trial"])}
    found |= {f"best {key}": searches.value_text(best[key]) for key in searches.keys_of(report) if key in best}
    ends = [row["status"] for row in trials]
    counts = {end: str(ends.count(end)) for end in ("finished", "stopped", "failed") if end in ends}
    return found | {"trials": str(len(trials)), **counts, "trials at a time": str(report["concurrent_trials"])}


def _evaluate_headline(report: dict[str, Any]) -> dict[str, str]:
    names = {
        "perplexity": ("perplexity (lower is better)", "{:.2f}"),
        "cross_entropy": ("cross-entropy, nats a token", "{:.4f}"),
        "bits_per_byte": ("bits per byte", "{:.4f}"),
        "exact_match": ("exact match (higher is better)", "{:.2f}%"),
        "f1": ("F1", "{:.2f}%"),
        "accuracy": ("accuracy (higher is better)", "{:.2f}%"),
        "bleu": ("BLEU (higher is better)", "{:.2f}"),
        "chrf": ("chrF", "{:.2f}"),
        "rouge_l": ("ROUGE-L", "{:.2f}%"),
        "target_loss": ("loss, nats a token of references (lower is better)", "{:.4f}"),
        "macro_f1": ("macro-F1", "{:.2f}%"),
        "token_accuracy": ("token accuracy (higher is better)", "{:.2f}%"),
        "span_precision": ("precision of spans", "{:.2f}%"),
        "span_recall": ("recall of spans", "{:.2f}%"),
        "span_f1": ("F1 of spans", "{:.2f}%"),
        "documents": ("documents", "{:,}"),
        "questions": ("questions", "{:,}"),
        "texts": ("labelled texts", "{:,}"),
        "pairs": ("pairs", "{:,}"),
        "sentences": ("tagged sentences", "{:,}"),
        "words": ("words", "{:,}"),
        "tokens": ("tokens", "{:,}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        "questions_per_second": ("questions/s", "{:,.1f}"),
        "texts_per_second": ("texts/s", "{:,.0f}"),
        "pairs_per_second": ("pairs/s", "{:,.1f}"),
        "sentences_per_second": ("sentences/s", "{:,.0f}"),
        "workers": ("workers", "{:,}"),
        "seconds": ("seconds", "{:,.1f}"),
    }
    return {name: form.format(report[key]) for key, (name, form) in names.items() if key in report}


def _compress_headline(report: dict[str, Any]) -> dict[str, str]:
    return {
        f"{row.name}, before {row.before:,.{row.decimals}f}": f"{row.after:,.{row.decimals}f}"
        for row in rows(report)
        if row.name.startswith(("weights", "speed, 1 ", "time for 1 ", "loss", "F1", "accuracy", "BLEU"))
    }


def _serve_headline(report: dict[str, Any]) -> dict[str, str]:
    found = {"requests": f"{report['requests']:,}"}
    found |= {"failed": f"{report['failed']:,}"} if report.get("failed") else {}
    found |= {"tokens generated": f"{report['generated_tokens']:,}", "tokens read": f"{report['prompt_tokens']:,}"}
    return found | {"until the server was up, s": f"{report['start_seconds']:.1f}",
                    "time up, h:min:s": clock(report["served_seconds"])}  # fmt: skip


def sections(run: Run) -> dict[str, str]:
    """Further sections of a single run's page, title -> content; those without content are left out by the page."""
    found = {"Events": events_table([run])}
    if run.metrics:
        found["In words"] = definitions(facts(run.metrics, run.report))
        found["Memory"] = _memory(run.metrics)
    if run.report is None:
        return found
    if run.stage == "tune":
        found = (_searched(run) if "front" not in run.report else {"Trials": search(run.report, run.beside)}) | found
    elif run.stage == "compress":
        found = {
            "Before and after": _comparison(run.report),
            "Quality, size and speed": forms(run.report, run.beside),
        } | found
    elif run.stage == "evaluate":
        found = {
            "By label": _labels(run.report),
            "Confusion": confusion(run.report),
            "Answerable and unanswerable": _sides(run.report),
        } | found
    return found


def _searched(run: Run) -> dict[str, str]:
    assert run.report is not None
    return {
        "Trials": searches.trials(run.report),
        "Lineage": searches.lineage(run.report),
        "All keys": searches.parallel_coordinates(run.report),
        "What matters": searches.importance_section(run.report),
    }


def definitions(values: dict[str, str]) -> str:
    """Titles with their texts."""
    pairs = "".join(f"<dt>{html.escape(title)}</dt><dd>{html.escape(text)}</dd>" for title, text in values.items())
    return f"<dl>{pairs}</dl>" if pairs else ""


def events_table(runs: list[Run]) -> str:
    """Restarts, anomalies, failures of all ``runs``, in the order of time."""
    found = [(event.get("time", 0.0), run, event) for run in runs for event in run.events]
    listed = []
    for _, run, event in sorted(found, key=lambda item: item[0]):
        row = {"run": run.label} if len(runs) > 1 else {}
        row |= {"step": event["step"], "event": EVENT_NAMES.get(event["kind"], event["kind"]), "what": event["text"]}
        listed.append(row)
    return table(listed) if listed else ""


def _memory(lines: list[dict[str, Any]]) -> str:
    """One line a rank."""
    peaks, last = peak_memory(lines), lines[-1].get("memory_bytes") or []
    listed = [
        {"rank": rank, "largest": size(peak), "at the last point": size(end)}
        for rank, (peak, end) in enumerate(zip(peaks, last, strict=True))
    ]
    if not listed:
        return ""
    shown = table(listed)
    return shown if len(listed) <= MOST_ROWS // 4 else folded(f"{len(listed)} ranks", shown)


def _comparison(report: dict[str, Any]) -> str:
    listed = []
    for row in rows(report):
        listed.append(
            {"figure": row.name, report["before"]["engine"]: f"{row.before:,.{row.decimals}f}",
             report["after"]["engine"]: f"{row.after:,.{row.decimals}f}", "change": row.change, "better is": row.better}
        )  # fmt: skip
    shown = [*notes(report), *chain(report)]
    return table(listed) + "".join(f"<p>{html.escape(note)}</p>" for note in shown)


def _labels(report: dict[str, Any]) -> str:
    if not isinstance(report.get("labels"), dict):
        return ""
    listed = [
        {"label": label, "texts": values["texts"], "precision, %": round(values["precision"], 2),
         "recall, %": round(values["recall"], 2), "F1, %": round(values["f1"], 2)}
        for label, values in report["labels"].items()
    ]  # fmt: skip
    shown = table(listed)
    return shown if len(listed) <= MOST_ROWS else folded(f"{len(listed)} labels", shown)


def _sides(report: dict[str, Any]) -> str:
    listed = []
    for side in ("answerable", "unanswerable"):
        if f"{side}_f1" in report:
            exact, f1 = (round(report[f"{side}_{name}"], 2) for name in ("exact_match", "f1"))
            count = f"{report[f'{side}_questions']:,} {side}"
            listed.append({"questions": count, "exact match, %": exact, "F1, %": f1})
    return table(listed) if listed else ""
