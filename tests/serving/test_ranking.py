"""Scores of pairs of texts, and what embeddings take: sentence encoders and a cross-encoder, served in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from raylm.config.serving import ServingSection
from raylm.errors import UserError
from raylm.serving.http.access import check_origins
from raylm.serving.http.browsers import allow_origins
from raylm.serving.http.gate import Gate, Limits
from raylm.serving.http.metrics import ServerMetrics
from tests.reading import write_encoder
from tests.serving.in_process import Application, opened

QUERY = "where does anna live"
DOCUMENTS = ["anna lives in berlin", "bert works as a baker", "the job of carl is sailor in lima"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny BERT: bare, as two classifiers with one label, one of whose scores is the logit itself, and with two."""
    root = tmp_path_factory.mktemp("encoders")
    found = {"bare": write_encoder(root / "bare")}
    tokenizer = AutoTokenizer.from_pretrained(found["bare"])
    for name, labels, settings in (
        ("cross", 1, {}),
        ("raw", 1, {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}),
        ("classifier", 2, {}),
    ):
        torch.manual_seed(2)
        model = AutoModelForSequenceClassification.from_pretrained(found["bare"], num_labels=labels)
        # The tiny model's own logits are all the same.
        torch.nn.init.normal_(model.classifier.weight, std=300.0)
        with torch.inference_mode():
            given = tokenizer([QUERY] * len(DOCUMENTS), DOCUMENTS, return_tensors="pt", padding=True)
            model.classifier.bias -= model.eval()(**given).logits.mean(dim=0)
        for key, value in settings.items():
            setattr(model.config, key, value)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def served(encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    more = {name: {"path": str(path)} for name, path in encoders.items() if name != "bare"}
    with opened(encoders["bare"], tmp_path_factory.mktemp("runs"), models=more, max_queued_requests=40) as application:
        yield application


def vector(directory: Path, text: str) -> np.ndarray:
    model, tokenizer = AutoModel.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    with torch.inference_mode():
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0).numpy()
    return hidden / np.linalg.norm(hidden)


def logit(directory: Path, first: str, second: str) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.inference_mode():
        return float(model(**tokenizer(first, second, return_tensors="pt")).logits[0, 0])


def test_a_sentence_encoder_ranks_by_cosine(served: Application, encoders: dict[str, Path]) -> None:
    expected = [float(vector(encoders["bare"], QUERY) @ vector(encoders["bare"], one)) for one in DOCUMENTS]
    answer = served.post("/v1/rerank", model="tiny", query=QUERY, documents=DOCUMENTS)
    found = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert [found[place] for place in range(3)] == pytest.approx(expected, abs=1e-4)
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert [result["document"]["text"] for result in answer["results"]] == [
        DOCUMENTS[result["index"]] for result in answer["results"]
    ]
    best = served.post("/rerank", model="tiny", query=QUERY, documents=[{"text": one} for one in DOCUMENTS], top_n=1)
    assert best["results"] == answer["results"][:1]
    bare = served.post("/v2/rerank", model="tiny", query=QUERY, documents=DOCUMENTS, return_documents=False, top_n=0)
    assert [set(result) for result in bare["results"]] == [{"index", "relevance_score"}] * 3
    tokens = AutoTokenizer.from_pretrained(encoders["bare"])
    assert answer["usage"]["total_tokens"] == sum(len(tokens(one)["input_ids"]) for one in [QUERY, *DOCUMENTS])


def test_a_cross_encoder_reads_both_texts_together(served: Application, encoders: dict[str, Path]) -> None:
    logits = [logit(encoders["cross"], QUERY, one) for one in DOCUMENTS]
    through = [1 / (1 + np.exp(-value)) for value in logits]
    assert np.std(through) > 0.01
    # The one that answers by default.
    for model in ({"model": "cross"}, {}):
        answer = served.post("/score", text_1=QUERY, text_2=DOCUMENTS, **model)
        assert answer["model"] == "cross"
        assert [entry["score"] for entry in answer["data"]] == pytest.approx(through, abs=1e-3)
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    plain = served.post("/v1/score", model="cross", text_1=QUERY, text_2=DOCUMENTS, use_activation=False)
    assert [entry["score"] for entry in plain["data"]] == pytest.approx(logits, abs=1e-2)
    raw = served.post("/score", model="raw", text_1=[QUERY, DOCUMENTS[1]], text_2=DOCUMENTS[:2])
    expected = [logit(encoders["raw"], QUERY, DOCUMENTS[0]), logit(encoders["raw"], DOCUMENTS[1], DOCUMENTS[1])]
    assert [entry["score"] for entry in raw["data"]] == pytest.approx(expected, abs=1e-2)
    ranked = served.post("/v1/rerank", model="cross", query=QUERY, documents=DOCUMENTS)
    assert [result["index"] for result in ranked["results"]] == sorted(range(3), key=lambda place: -logits[place])


def test_more_documents_than_the_queue_holds(served: Application) -> None:
    answer = served.post("/v1/rerank", query=QUERY, documents=DOCUMENTS * 100)
    assert len(answer["results"]) == 300


def test_what_cannot_be_scored(served: Application) -> None:
    assert "classifier with 2 labels" in served.refused("/score", model="classifier", text_1="a", text_2="b")["message"]
    long = served.refused("/v1/rerank", model="tiny", query=QUERY, documents=["anna " * 600])
    assert (long["param"], long["code"]) == ("documents", "context_length_exceeded")
    cut = served.post("/v1/rerank", model="tiny", query=QUERY, documents=["anna " * 600], truncate_prompt_tokens=-1)
    assert cut["results"][0]["document"]["text"] == "anna " * 600


def test_ids_of_another_tokenizer_are_refused(served: Application, encoders: dict[str, Path], tmp_path: Path) -> None:
    """LangChain's default sends cl100k's: vectors were wrong, and the status 200."""
    for given in ([5, 6], [[5, 6]], ["a", [5]]):
        error = served.refused("/v1/embeddings", input=given)
        assert (error["param"], error["code"]) == ("input", "token_ids_not_allowed")
        assert "check_embedding_ctx_length=False" in error["message"]
    with opened(encoders["bare"], tmp_path, token_ids=True) as taking:
        ids = AutoTokenizer.from_pretrained(encoders["bare"])(QUERY)["input_ids"]
        (entry,) = taking.post("/v1/embeddings", input=[ids])["data"]
        assert entry["embedding"] == pytest.approx(vector(encoders["bare"], QUERY).tolist(), abs=1e-4)


def test_many_texts_and_the_models_own_width(served: Application, encoders: dict[str, Path]) -> None:
    width = AutoModel.from_pretrained(encoders["bare"]).config.hidden_size
    answer = served.post("/v1/embeddings", input=[QUERY, *DOCUMENTS] * 512, dimensions=width, encoding_format=None)
    assert len(answer["data"]) == 2048
    expected = vector(encoders["bare"], DOCUMENTS[2]).tolist()
    assert answer["data"][2047]["embedding"] == pytest.approx(expected, abs=1e-4)
    error = served.refused("/v1/embeddings", input=QUERY, dimensions=width + 1)
    assert error["param"] == "dimensions"
    assert f"found {width + 1}, allowed: {width}" in error["message"]
    keep = len(AutoTokenizer.from_pretrained(encoders["bare"])(QUERY)["input_ids"])
    cut = served.post("/v1/embeddings", input="anna " * 50 + QUERY, truncate_prompt_tokens=keep)["data"][0]["embedding"]
    # Of the text the last words, of what stands around it all.
    assert cut == pytest.approx(vector(encoders["bare"], QUERY).tolist(), abs=1e-4)


def test_pages_of_allowed_origins_may_ask(served: Application) -> None:
    """A browser asks first, without a key, and has to be let to read what is refused."""
    gate = Gate(served.app, Limits(10**6, None), {"0" * 64: "somebody"}, ServerMetrics(export=False))
    page = Application(allow_origins(gate, ["https://chat.example.org"]), served.models)
    asked = {
        "origin": "https://chat.example.org",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    answer = page.ask("OPTIONS", "/v1/chat/completions", **asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    refused = page.ask("GET", "/v1/models", origin="https://chat.example.org")
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example.org")
    strange = page.ask("OPTIONS", "/v1/chat/completions", **asked | {"origin": "https://elsewhere.example.org"})
    assert strange.status_code == 400
    assert "access-control-allow-origin" not in strange.headers


def test_every_page_may_ask_only_with_keys() -> None:
    anybody = ServingSection(allowed_origins=["*"])
    with pytest.raises(UserError, match=r"serving\.allowed_origins: found \*, allowed: origins"):
        check_origins(anybody, {})
    check_origins(anybody, {"0": "somebody"})
    check_origins(ServingSection(allowed_origins=["http://localhost:3000"]), {})
    for wrong in ("localhost", "https://a.org/path", ""):
        with pytest.raises(ValueError, match="allowed_origins"):
            ServingSection(allowed_origins=[wrong])
