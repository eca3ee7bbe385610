"""lm-eval's ``local-completions`` against a served model, beside `raylm evaluate` of the same text and windows.

    pip install --target LM_EVAL_DIRECTORY lm_eval    # not part of the pinned set
    python tests/benchmarks/lm_eval_agreement.py MODEL_DIRECTORY OUT.json --lm-eval LM_EVAL_DIRECTORY

The text is a part of the Python language reference. lm-eval's task (``loglikelihood_rolling``, disjoint windows) is
written beside it, so that no hub is asked. Both count the same tokens: the text's and the end-of-text token after it,
in windows of the same length, after one end-of-text token. The text ends where a window does: lm-eval gives a last
window that is not full the context before it, `raylm evaluate` does not. Engine ``transformers`` computes what
`raylm evaluate` does; ``openvino`` serves the compressed weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

from serving_load import HttpArm, free_port, serve_command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK = """
task: served_text
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


def whole_windows(text: str, tokenizer: PreTrainedTokenizerBase, window: int) -> str:
    """The longest start of ``text`` that fills windows of ``window`` tokens together with an end token."""
    for end in range(len(text), 0, -1):
        start = text[:end]
        if start == start.strip() and (len(tokenizer(start, verbose=False)["input_ids"]) + 1) % window == 0:
            return start
    raise SystemExit(f"the text fills no window of {window} tokens; --characters takes more of it")


def evaluated(model: str, text: Path, window: int, directory: Path) -> dict:
    """The report of `raylm evaluate`."""
    values = {
        "run": {"name": "evaluate", "storage": str(directory)},
        "data": {"train": str(text), "validation": str(text)},
        "model": {"path": model},
        "evaluation": {"sequence_length": window, "stride": window},
    }
    recipe = directory / "evaluate.yaml"
    recipe.write_text(json.dumps(values))
    subprocess.run([sys.executable, "-m", "raylm.cli", "evaluate", str(recipe)], check=True, stdout=sys.stderr)
    return json.loads((directory / "evaluate" / "report.json").read_text())


def harness(model: str, port: int, window: int, task: Path, directory: Path, library: str) -> float:
    """Bits per byte as lm-eval has it."""
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(model).eos_token_id
    arguments = {
        "model": "model",
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": model,
        # lm-eval takes one off for a token to generate, and one for the context.
        "max_length": window + 2,
        "custom_prefix_token_id": end,
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "served_text"]
    command += ["--include_path", str(task), "--output_path", str(directory / "lm-eval")]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    environment = {**os.environ, "PYTHONPATH": library, "HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "cache")}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    (found,) = (directory / "lm-eval").rglob("results*.json")
    return json.loads(found.read_text())["results"]["served_text"]["bits_per_byte,none"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--lm-eval", required=True, help="where lm_eval was installed")
    parser.add_argument("--engines", default="transformers,openvino")
    parser.add_argument("--characters", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=512)
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = "\n\n".join(topics[name] for name in sorted(topics))[: arguments.characters].strip()
    text, end = whole_windows(text, tokenizer, arguments.window), tokenizer.eos_token
    result: dict = {"window": arguments.window}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        plain, marked = directory / "plain.jsonl", directory / "marked.jsonl"
        plain.write_text(json.dumps({"text": text}))
        marked.write_text(json.dumps({"text": text + end}))
        tasks = directory / "tasks"
        tasks.mkdir()
        (tasks / "served_text.yaml").write_text(TASK % marked)
        report = evaluated(arguments.model, plain, arguments.window, directory)
        assert report["bytes"] == len(text.encode()), "the text was changed on its way"
        result |= {"tokens": report["tokens"], "evaluate": report["bits_per_byte"]}
        for engine in arguments.engines.split(","):
            port = free_port()
            command = serve_command(arguments.model, os.cpu_count() or 1, port, directory / engine, engine=engine)
            server = HttpArm(engine, command, port, "/health", "model", chat=False, pausable=False)
            try:
                bits = harness(arguments.model, port, arguments.window, tasks, directory / engine, arguments.lm_eval)
            finally:
                server.stop()
            # lm-eval counts the bytes of the end token's name too.
            bits *= len((text + end).encode()) / len(text.encode())
            difference = (bits - report["bits_per_byte"]) * math.log(2) * report["bytes"] / report["tokens"]
            result[engine] = {"lm_eval": bits, "difference_nats_a_token": difference}
    arguments.output.write_text(json.dumps(result))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
