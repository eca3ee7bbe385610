"""Character, jieba-word and BPE tokenizers on Chinese text, and how many tokens each needs for held-out documents.

``python tests/benchmarks/chinese_tokenizers.py OUTPUT.json FILE...`` takes the poems of npm ``chinese-poetry``
(``quantangshi/poet.tang.*.json``) or files in the SQuAD format, as one corpus; ``raylm prepare`` makes it simplified,
drops duplicates and trains each tokenizer with 16,384 entries at most. Prints a table of each report's figures on the
first two megabytes of the set; a word of the fertility is a character.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

TOKENIZERS = {
    "character": {"type": "character"},
    "word, jieba": {"type": "word", "segmenter": "jieba", "vocab_size": 16384},
    "BPE": {"type": "bpe", "vocab_size": 16384},
}
PATIENCE_SECONDS = 600.0


def documents(path: Path) -> list[str]:
    """The poems, or the contexts, of one file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, list):
        return ["\n".join(poem["paragraphs"]) for poem in content]
    return [paragraph["context"] for article in content["data"] for paragraph in article["paragraphs"]]


def prepare(directory: Path, name: str, tokenizer: dict) -> dict:
    values = {
        "run": {"name": name, "storage": str(directory)},
        "data": {
            "train": str(directory / "corpus.jsonl"),
            "cleaning": {"chinese": "simplified"},
            "deduplication": {"shingle_words": 3},
        },
        "tokenizer": tokenizer,
    }
    path = directory / "prepare.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "raylm.cli", "prepare", str(path)]
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS, stdout=sys.stderr)
    return json.loads((directory / name / "report.json").read_text(encoding="utf-8"))


def main() -> None:
    output, *files = map(Path, sys.argv[1:])
    texts = [text for path in files for text in documents(path) if text.strip()]
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (directory / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
        for place, (name, tokenizer) in enumerate(TOKENIZERS.items()):
            reports[name] = prepare(directory, f"set{place}", tokenizer)
    output.write_text(json.dumps(reports, indent=2, ensure_ascii=False))
    print("| tokenizer | entries | tokens a word | bytes a token | unknown |\n| --- | --- | --- | --- | --- |")
    for name, report in reports.items():
        found = report["vocabulary"]
        print(
            f"| {name} | {report['vocab_size']:,} | {found['fertility']:.3f} | {found['bytes_per_token']:.2f} "
            f"| {found['unknown_rate']:.2%} |"
        )


if __name__ == "__main__":
    main()
