"""Readers, classifiers and encoders that embed, served over HTTP: exported to int8, several in one application."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from raylm.compression.exporters.openvino import export_model
from raylm.config.loading import validate
from raylm.config.serving import ServingSection
from raylm.config.stages import ServeConfig
from raylm.data.loading import load_tokenizer
from raylm.data.padding import encoder_batch
from raylm.data.samples.tag_schemes import spans
from raylm.data.samples.windows import Windows, pad
from raylm.data.samples.word_windows import WordWindows
from raylm.errors import UserError
from raylm.models.encoders import OpenVinoEncoder, TransformersEncoder
from raylm.models.heads import CLASSIFIER, NONE, READER, TAGGER
from raylm.serving.engines.base import Encode
from raylm.serving.engines.client import start_engine
from raylm.serving.engines.encoder import EncoderBackend
from raylm.serving.stage import check_model, running_server
from raylm.serving.tasks.extraction import best_of
from raylm.tasks import find_task
from raylm.tasks.classification.texts import softmax
from raylm.tasks.extractive_qa.spans import AnswerSpan, best_answer
from raylm.tasks.tagging.entities import cut_words
from tests.reading import write_encoder
from tests.serving.conftest import free_port

pytestmark = pytest.mark.slow

LABELS = ["sport", "weather", "work"]
TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
CONTEXT = "Anna lives in Berlin . " + "Much rain fell on that . " * 20 + "Bert works as a baker in Paris ."
QUESTION = "Where does Anna live?"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A reader, a classifier, taggers and a bare encoder over one tiny BERT; all but the last with an int8 export."""
    root = tmp_path_factory.mktemp("encoders")
    bare = write_encoder(root / "bare")
    torch.manual_seed(1)
    made = {
        "extractive_qa": AutoModelForQuestionAnswering.from_pretrained(bare),
        "classification": AutoModelForSequenceClassification.from_pretrained(
            bare, id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)}
        ),
        "tagging": AutoModelForTokenClassification.from_pretrained(
            bare, id2label=dict(enumerate(TAGS)), label2id={tag: i for i, tag in enumerate(TAGS)}
        ),
    }
    made["tagging"].config.tagging_scheme = "bio"
    for task, model in made.items():
        # Random heads say next to nothing: larger weights make the outputs differ.
        with torch.no_grad():
            (model.qa_outputs if task == "extractive_qa" else model.classifier).weight.mul_(20)
        model.save_pretrained(root / task)
        load_tokenizer(bare).save_pretrained(root / task)
        export_model(str(root / task), root / task / "openvino", find_task(task).head)
    # The same tagger, whose tags are each for itself.
    shutil.copytree(root / "tagging", root / "words")
    config = json.loads((root / "words" / "config.json").read_text())
    (root / "words" / "config.json").write_text(json.dumps(config | {"tagging_scheme": "none"}))
    return SimpleNamespace(
        bare=bare, reader=root / "extractive_qa", classifier=root / "classification", tagger=root / "tagging",
        words=root / "words",
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(
    ray_instance: object, encoders: SimpleNamespace, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A server of a generator, an encoder, and int8 readers, classifiers and taggers; gives ``url`` and ``client``."""
    values = {
        "run": {"name": "tiny", "storage": str(tmp_path_factory.mktemp("runs"))},
        "model": {"path": str(tiny_model)},
        "serving": {
            "port": free_port(),
            "cpus_per_replica": 1.0,
            "models": {
                "reader": {"path": str(encoders.reader)},
                "classifier": {"path": str(encoders.classifier)},
                "tagger": {"path": str(encoders.tagger)},
                "words": {"path": str(encoders.words)},
                "bare": {"path": str(encoders.bare)},
            },
            "reading": {"sequence_length": 48, "overlap": 12},
            "least_relevance": 0.0,
        },
    }
    with running_server(validate(ServeConfig, values, "test")) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield SimpleNamespace(url=url, client=client)


def expected_answer(reader: OpenVinoEncoder, directory: Path, context: str) -> AnswerSpan:
    """What evaluation makes of the same model."""
    tokenizer = load_tokenizer(directory)
    windows = list(Windows(tokenizer, 48, 12).cut(QUESTION, context))
    logits = reader.outputs(pad(windows, tokenizer.pad_token_id))
    return best_answer(context, windows, list(logits), 30)


def test_exports_agree(encoders: SimpleNamespace) -> None:
    batch = {
        "input_ids": np.random.default_rng(0).integers(5, 60, (3, 24)),
        "attention_mask": np.ones((3, 24), dtype=np.int64),
        "token_type_ids": np.zeros((3, 24), dtype=np.int64),
    }
    batch["attention_mask"][1, 10:] = 0
    shapes = {"extractive_qa": (3, 24, 2), "classification": (3, 3), "tagging": (3, 24, 5)}
    paths = {"extractive_qa": encoders.reader, "classification": encoders.classifier, "tagging": encoders.tagger}
    for task, path in paths.items():
        plain = TransformersEncoder(str(path), find_task(task).head).outputs(batch)
        exported = OpenVinoEncoder(path, find_task(task).head, 1).outputs(batch)
        assert plain.shape == exported.shape == shapes[task]
        assert np.abs(plain - exported).max() < 0.1 * plain.std() + 0.05
    with pytest.raises(UserError, match="not the export of a classifier"):
        OpenVinoEncoder(encoders.reader, CLASSIFIER, 1)
    with pytest.raises(UserError, match=r"model\.path: found .*, a BertModel, allowed: a reader"):
        TransformersEncoder(str(encoders.bare), READER)


def test_waiting_texts_are_read_together(encoders: SimpleNamespace) -> None:
    backend = EncoderBackend(TransformersEncoder(str(encoders.classifier), CLASSIFIER), pad_id=0)
    lengths = [20, 21, 90, 19, 3, 22, 20, 20, 20, 20, 20]
    waiting = deque(Encode(number, [7] * length) for number, length in enumerate(lengths))
    batches = []
    while waiting:
        batches.append([command.number for command in backend.next_batch(waiting)])
    assert batches == [[0, 1, 3, 5, 6, 7, 8, 9], [2], [4], [10]]


def test_batches_do_not_change_answers(encoders: SimpleNamespace) -> None:
    asyncio.run(_batches_do_not_change_answers(encoders))


async def _batches_do_not_change_answers(encoders: SimpleNamespace) -> None:
    texts = [[2, *range(5, 5 + length), 3] for length in (4, 30, 6, 12, 28, 40, 5, 11, 13, 3)]
    engine = start_engine(str(encoders.classifier), ServingSection(), threads=1, task="classification")
    try:
        alone = [await engine.encode(ids) for ids in texts]
        together = await asyncio.gather(*(engine.encode(ids) for ids in texts))
        assert engine.name == "openvino"
        assert engine.stats().finished == 2 * len(texts)
        np.testing.assert_allclose(alone, together, atol=1e-3)
    finally:
        engine.close()


def test_extractive_answers_from_a_context(server: SimpleNamespace, encoders: SimpleNamespace) -> None:
    reader = OpenVinoEncoder(encoders.reader, READER, 1)
    expected = expected_answer(reader, encoders.reader, CONTEXT)
    found = server.client.post("/v1/qa", json={"question": QUESTION, "context": CONTEXT}).raise_for_status().json()
    assert (found["mode"], found["model"], found["answered"]) == ("extractive", "reader", True)
    assert (found["answer"], found["start"], found["end"]) == (expected.text, expected.start, expected.end)
    assert found["score"] == pytest.approx(expected.score, abs=0.02)
    assert CONTEXT[found["start"] : found["end"]] == found["answer"]
    # Several windows were read.
    assert found["usage"]["prompt_tokens"] > 100
    # A threshold that every null score is above.
    body = {"question": QUESTION, "context": CONTEXT, "null_threshold": -1e6}
    none = server.client.post("/v1/qa", json=body).raise_for_status().json()
    assert (none["answered"], none["answer"], none["start"], none["end"]) == (False, "", None, None)
    body = {"question": QUESTION, "context": CONTEXT, "stream": True}
    lines = server.client.post("/v1/qa", json=body).text.split("\n\n")
    assert json.loads(lines[0].removeprefix("data: "))["answer"] == expected.text
    assert lines[1] == "data: [DONE]"
    # Asked for by name, a generator writes an answer to the same.
    body = {"question": QUESTION, "context": CONTEXT[:60], "mode": "generative", "max_tokens": 4}
    written = server.client.post("/v1/qa", json=body).raise_for_status().json()
    assert (written["mode"], written["model"], written["usage"]["completion_tokens"]) == ("generative", "tiny", 4)
    assert written["sources"][0]["text"] == CONTEXT[:60]


def test_extractive_answers_from_a_collection(server: SimpleNamespace) -> None:
    server.client.post("/v1/collections", json={"name": "people"}).raise_for_status()
    body = {"question": "Where does Anna live?", "collection": "people", "mode": "extractive"}
    nothing = server.client.post("/v1/qa", json=body).raise_for_status().json()
    assert (nothing["answered"], nothing["sources"]) == (False, [])
    text = "Much rain fell on that . " * 60 + "\n\nAnna lives in Berlin ."
    documents = [{"id": "anna", "text": text}, {"id": "bert", "text": "Bert works as a baker in Paris ."}]
    server.client.post("/v1/collections/people/documents", json={"documents": documents}).raise_for_status()
    found = server.client.post("/v1/qa", json=body).raise_for_status().json()
    source = found["sources"][found["source"]]
    document = next(document for document in documents if document["id"] == source["id"])
    assert found["answer"]
    assert document["text"][found["start"] : found["end"]] == found["answer"]
    assert source["start"] <= found["start"] < found["end"] <= source["end"]
    assert 0 < found["score"] <= 1


def test_the_best_of_several_passages() -> None:
    weak, strong = AnswerSpan("a", 0, 1, 0.9, False, 0.0, 2.0, 2.1), AnswerSpan("b", 0, 1, 0.6, False, 0.0, 5.0, 5.5)
    none = AnswerSpan("", 0, 0, 0.99, True, 3.0, 9.0, 9.01)
    place, score = best_of([weak, strong], [0.5, 0.5])
    assert place == 1
    assert score == pytest.approx(np.exp(5.0) / (np.exp(2.1) + np.exp(5.5)))
    # Relevance can outweigh the reader; a passage without an answer does not hide one that has it.
    assert best_of([weak, strong], [1.0, 0.01])[0] == 0
    assert best_of([none, strong], [0.5, 0.5])[0] == 1


def test_classify(server: SimpleNamespace, encoders: SimpleNamespace) -> None:
    texts = ["much rain fell", "bert works as a baker", "anna"]
    found = server.client.post("/v1/classify", json={"input": texts}).raise_for_status().json()
    model = AutoModelForSequenceClassification.from_pretrained(encoders.classifier).eval()
    tokenizer = load_tokenizer(encoders.classifier)
    for index, (text, row) in enumerate(zip(texts, found["data"], strict=True)):
        with torch.inference_mode():
            scores = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(dim=-1).tolist()
        assert row["index"] == index
        assert [row["scores"][label] for label in LABELS] == pytest.approx(scores, abs=0.05)
        assert row["label"] == max(row["scores"], key=row["scores"].get)
        assert row["score"] == max(row["scores"].values())
    assert found["usage"]["prompt_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    one = server.client.post("/v1/classify", json={"input": texts[0], "model": "classifier", "top": 1}).json()
    assert len(one["data"][0]["scores"]) == 1


TEXT = "Anna  lives in Berlin, and zzz works. " + "Much rain fell on that. " * 10 + "它在lima"


def expected_tags(path: Path, text: str) -> tuple[list[tuple[int, int]], list[str], np.ndarray]:
    """Of each word its place, tag and probability, by the export in windows of the model's 96 tokens."""
    words = cut_words(text)
    windows = WordWindows(load_tokenizer(path), 96).cut([[text[start:end] for start, end in words]])[0]
    encoder = OpenVinoEncoder(path, TAGGER, 1)
    rows = [encoder.outputs(encoder_batch([one.ids], 0))[0][one.firsts] for one in windows]
    scores = softmax(np.concatenate(rows))
    return words, [TAGS[number] for number in scores.argmax(axis=1)], scores.max(axis=1)


def test_tags(server: SimpleNamespace, encoders: SimpleNamespace) -> None:
    text = f"{TEXT} {TEXT}"
    body = {"input": [text, "", "\u200b anna"]}
    found = server.client.post("/v1/tag", json=body).raise_for_status().json()
    assert (found["model"], [row["index"] for row in found["data"]]) == ("tagger", [0, 1, 2])
    words, tags, scores = expected_tags(encoders.tagger, text)
    # Both windows of the text were read.
    assert found["usage"]["prompt_tokens"] > 96
    expected = [(span.type, words[span.first][0], words[span.last][1]) for span in spans(tags)]
    assert len(expected) > 3
    given = found["data"][0]["entities"]
    assert [(one["label"], one["start"], one["end"]) for one in given] == expected
    assert all(one["text"] == text[one["start"] : one["end"]] and 0.2 <= one["score"] <= 1 for one in given)
    assert found["data"][1]["entities"] == []
    # Where tags are no spans, each word has one.
    answer = server.client.post("/v1/tag", json={"input": text, "model": "words"}).raise_for_status().json()
    tokens = answer["data"][0]["tokens"]
    assert [(one["start"], one["end"]) for one in tokens] == words
    assert [one["tag"] for one in tokens] == tags
    assert [one["score"] for one in tokens] == pytest.approx(scores.tolist(), abs=0.02)
    assert [one["text"] for one in tokens[:7]] == ["Anna", "lives", "in", "Berlin", ",", "and", "zzz"]
    assert [one["text"] for one in tokens[-3:]] == ["它", "在", "lima"]


def test_embeddings_of_an_encoder(server: SimpleNamespace, encoders: SimpleNamespace) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        vector = client.embeddings.create(model="bare", input="much rain fell").data[0].embedding
    ids = load_tokenizer(encoders.bare)("much rain fell")["input_ids"]
    batch = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
    hidden = TransformersEncoder(str(encoders.bare), NONE).outputs(batch)[0].mean(axis=0)
    assert vector == pytest.approx(hidden / np.linalg.norm(hidden), abs=1e-4)


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("classify", {"input": "x", "model": "reader"}, 400, "is a reader; this needs a classifier"),
        ("classify", {"input": "x", "model": "no"}, 404, "does not exist"),
        ("tag", {"input": "x", "model": "classifier"}, 400, "is a classifier; this needs a tagger"),
        ("tag", {"input": []}, 400, "found 0 texts"),
        ("tag", {"input": "rain " * 12_100}, 400, "more than 128 windows of 96 tokens"),
        ("tag", {"text": "x"}, 400, "input"),
        ("classify", {"input": []}, 400, "found 0 texts"),
        ("classify", {"input": "rain " * 200}, 400, "maximum context length is 96"),
        ("completions", {"prompt": "x", "model": "classifier"}, 400, "this needs a text generator"),
        ("embeddings", {"input": "x", "model": "reader"}, 400, "this needs a text generator or an encoder"),
        ("qa", {"question": "x", "context": "y", "collection": "z"}, 400, "leave out collection"),
        ("qa", {"question": "x", "context": "rain " * 8000}, 400, "windows of 48 tokens, allowed: at most 128"),
        ("qa", {"question": "x", "mode": "extractive", "collection": "none"}, 404, "does not exist"),
    ],
)
def test_refusals(server: SimpleNamespace, route: str, body: dict, status: int, message: str) -> None:
    answer = server.client.post(f"/v1/{route}", json=body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]


def test_models_say_what_they_do(server: SimpleNamespace) -> None:
    tasks = {model["id"]: model["task"] for model in server.client.get("/v1/models").json()["data"]}
    assert tasks == {
        "tiny": "generation", "reader": "extractive_qa", "classifier": "classification", "bare": "embedding",
        "tagger": "tagging", "words": "tagging",
    }  # fmt: skip
    engines = {name: load["engine"] for name, load in server.client.get("/health").json()["models"].items()}
    assert engines["reader"] == engines["classifier"] == engines["tagger"] == "openvino"
    assert engines["bare"] == "transformers"


def test_checks_before_the_start(encoders: SimpleNamespace, tmp_path: Path) -> None:
    def config(path: Path, **serving: object) -> ServeConfig:
        values = {"run": {"name": "x", "storage": str(tmp_path)}, "model": {"path": str(path)}, "serving": serving}
        return validate(ServeConfig, values, "test")

    check_model(config(encoders.reader))
    with pytest.raises(UserError, match=r"serving\.reading\.sequence_length: found 200, allowed: at most .* 96"):
        check_model(config(encoders.reader, reading={"sequence_length": 200, "overlap": 32}))
    broken = tmp_path / "broken"
    shutil.copytree(encoders.classifier, broken)
    (broken / "openvino" / "openvino_model.bin").unlink()
    with pytest.raises(UserError, match=r"openvino_model\.bin is missing"):
        check_model(config(broken))
