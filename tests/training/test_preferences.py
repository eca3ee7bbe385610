"""DPO: the losses of a plain PyTorch loop, under any number of workers and ZeRO stage, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylm.config import load_config
from raylm.config.data import DataSection
from raylm.data.samples.preferences import PreferenceInput, PreferenceSamples, read_preferences, shortened
from raylm.data.samples.token_samples import IGNORED
from raylm.errors import UserError
from raylm.tasks.preference import PreferenceObjective, reference_file
from raylm.training.inputs import validate
from raylm.training.reports.metrics import read_metrics
from tests.training.loops import run_case, run_loops

WORDS = ["river", "mountain", "cloud", "stone", "sings", "falls", "over", "under", "the", "a", "quiet", "old"]
STEPS, BATCH, LENGTH, BETA = 5, 4, 48, 0.3


def rows(count: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)

    def said(most: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, most)))

    return [{"prompt": f"{number} {said(6)}?", "chosen": f"yes {said(6)}", "rejected": f"no {said(9)}"}
            for number in range(count)]  # fmt: skip


def write(directory: Path, model: Path, name: str = "run", **sections: Any) -> Path:
    source = directory / "rows.jsonl"
    if not source.exists():
        source.write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    values = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(source), "validation_fraction": 0.2},
        "model": {"path": str(model)},
        "objective": {"type": "preference", "beta": BETA},
        "training": {
            "steps": STEPS, "batch_size": BATCH, "sequence_length": LENGTH, "learning_rate": 0.001, "weight_decay": 0.0,
            "schedule": "constant", "log_every_steps": 1, "gradient_clipping": 0.0,
        },
    }  # fmt: skip
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**values, **sections}))
    return path


def summed(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One sequence at a time, without padding, from whole logits."""
    count = int((labels != IGNORED).nonzero().max()) + 1
    likely = model(input_ids=ids[None, :count]).logits[0].log_softmax(dim=-1)
    kept = labels[:count] != IGNORED
    return likely[kept].gather(1, labels[:count][kept][:, None]).sum()


def plain_loop(model_path: Path, data: Path) -> list[float]:
    """The losses of the same batches, as the paper writes them."""
    model, reference = (AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32) for _ in range(2))
    samples = PreferenceSamples(data, "train", 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = {k: torch.from_numpy(v) for k, v in samples.batch(np.arange(step * BATCH, (step + 1) * BATCH)).items()}
        total = torch.zeros(())
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            found = [summed(model, ids[side], labels[side]) for side in (0, 1)]
            with torch.no_grad():
                known = [summed(reference, ids[side], labels[side]) for side in (0, 1)]
            ratio = (found[0] - known[0]) - (found[1] - known[1])
            total = total - functional.logsigmoid(BETA * ratio)
        loss = total / BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_losses_are_those_of_a_plain_loop(ray_instance, tiny_model: Path, tmp_path: Path) -> None:
    places = [(1, 0), (2, 1), (2, 3)]
    names = [f"workers-{workers}-zero-{zero}" for workers, zero in places]
    files = [
        write(tmp_path, tiny_model, name, parallel={"zero_stage": zero})
        for name, (_, zero) in zip(names, places, strict=True)
    ]
    cases = [run_case(file, workers=count, stage="finetune") for file, (count, _) in zip(files, places, strict=True)]
    finals = run_loops(*cases)
    expected = plain_loop(tiny_model, tmp_path / names[0] / "data")
    assert expected[0] == pytest.approx(np.log(2), abs=1e-5) and expected[-1] < expected[0] - 0.02
    for name, final in zip(names, finals, strict=True):
        found = [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5, name
        assert final["validation_loss"] < np.log(2)
    last = read_metrics(tmp_path / names[0] / "metrics.jsonl")[-1]
    assert last["validation_preferred"] > 0.5 and last["validation_margin"] > 0
    reference = np.load(reference_file(tmp_path / names[0] / "data", "train"))
    assert reference.shape == (PreferenceSamples(tmp_path / names[0] / "data", "train", 0).count, 2)


def test_the_logits_of_few_tokens_at_a_time(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the log-probabilities in chunks are those of whole logits."""
    from raylm.tasks import chunked

    monkeypatch.setattr(chunked, "MOST_ELEMENTS", 2000)
    samples = prepared(tiny_model, tmp_path)
    batch = {name: torch.from_numpy(values) for name, values in samples.batch(np.arange(3)).items()}
    batch["reference"] = torch.zeros(3, 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    objective = PreferenceObjective()
    gradients = []
    for plain in (True, False):
        monkeypatch.setattr(PreferenceObjective, "plain_head", lambda self, config, plain=plain: plain)
        model.zero_grad()
        objective.summed_loss(model, batch).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients, strict=True))
    # A pair that fills up a batch counts for nothing.
    whole = objective.summed_loss(model, batch).item()
    batch["targets"][2] = IGNORED
    assert objective.summed_loss(model, batch).item() < whole


def prepared(model: Path, directory: Path, length: int = LENGTH, **data: Any) -> PreferenceSamples:
    write(directory, model)
    section = DataSection(train=str(directory / "rows.jsonl"), validation_fraction=0.2, **data)
    PreferenceInput(section).write(directory / "set", AutoTokenizer.from_pretrained(model), length)
    return PreferenceSamples(directory / "set", "train", 0)


def test_samples_are_the_templates_words(tiny_model: Path, tmp_path: Path) -> None:
    samples = prepared(tiny_model, tmp_path, 200, chat_template="plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "set" / "tokenizer")
    batch = samples.batch(np.arange(samples.count))
    by_prompt = {row["prompt"]: row for row in rows(40)}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        answers = [tokenizer.decode(side[side != IGNORED]) for side in labels]
        asked = tokenizer.decode(ids[0]).partition("Question: ")[2].partition("\n")[0]
        assert answers == [by_prompt[asked][side] + tokenizer.eos_token for side in ("chosen", "rejected")]


def test_pairs_of_about_the_same_length_lie_together(tiny_model: Path, tmp_path: Path) -> None:
    samples = prepared(tiny_model, tmp_path, 200, chat_template="plain")

    def places() -> int:
        return sum(samples.batch(np.arange(first, first + 4))["input_ids"].size for first in range(0, 28, 4))

    before = places()
    samples.group_by_length(4)
    assert places() < before
    # Both answers are padded to the longer one.
    widths = [samples.batch(np.array([number]))["input_ids"].shape[2] for number in range(samples.count)]
    lengths = samples.lengths()[samples.numbers(np.arange(samples.count))]
    assert widths == [-(-(length - 1) // 8) * 8 for length in lengths.tolist()]


def test_long_ones_lose_what_was_asked_first(tiny_model: Path) -> None:
    ids = np.arange(20)
    (one, at), (other, there) = shortened([(ids, 15), (ids[:18], 15)], 12)
    assert one.tolist() == list(range(8, 20)) and at == 7
    assert other.tolist() == list(range(8, 18)) and there == 7
    (cut, first), _ = shortened([(ids, 2), (ids[:5], 2)], 12)
    assert cut.tolist() == list(range(1, 13)) and first == 1
    assert [len(one) for one, _ in shortened([(ids, 15), (ids, 15)], 30)] == [20, 20]


def test_forms_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    asked = [{"role": "user", "content": "q"}]
    forms = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": asked, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
        {side: [*asked, {"role": "assistant", "content": said}] for side, said in (("chosen", "a"), ("rejected", "b"))},
    ]
    path.write_text("".join(json.dumps(form) + "\n" for form in forms))
    found = [row for _, row in read_preferences(DataSection(train=str(path), validation_fraction=0))]
    assert [[turn["content"] for turn in row.chosen.turns] for row in found] == [["q", "a"]] * 3
    assert [[turn["content"] for turn in row.rejected.turns] for row in found] == [["q", "b"]] * 3


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a"}, "no column 'rejected'; columns found: prompt, chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "the same answer twice"),
        ({"prompt": "q", "chosen": " ", "rejected": "a"}, "column 'chosen': allowed: an answer of the assistant that"),
        (
            {"chosen": "a", "rejected": "b"},
            "column 'chosen': allowed: an answer of the assistant that says something, to",
        ),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "column 'chosen': found int, allowed: a text, or messages"),
    ],
)
def test_bad_rows_are_one_line(tiny_model: Path, tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*rows(3), row]))
    with pytest.raises(UserError, match=f"rows.jsonl:4: .*{expected}"):
        validate(load_config("finetune", write(tmp_path, tiny_model)))
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tiny_model, parallel={"tensor": 2}, resources={"workers": 2})
    with pytest.raises(UserError, match=r"objective\.type"):
        validate(load_config("finetune", path))
