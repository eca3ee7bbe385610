"""Held-out questions are none of training's, and answers are scored as they should be."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raylm.data.sources.documents import Document, DocumentFile, make_pair, split_of
from raylm.data.sources.stdlib import opening_sentence
from raylm.errors import RunFailure
from raylm.quickstart.questions import (
    HeldOutAnswers,
    ScoredAnswer,
    ask_held_out,
    held_out_pairs,
    shown_names,
    word_f1,
)  # fmt: skip

FRACTION = 0.5


def pair(name: str) -> Document:
    context = f"{name}(path)\n\nOpen the {name} of a path. And close it."
    return make_pair(f"What does {name} do?", f"Open the {name} of a path.", context, title=name, split_key=name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared pairs of 40 names, split as ``raylm prepare`` splits them."""
    (tmp_path / "documents").mkdir()
    for split in ("train", "validation"):
        with DocumentFile(tmp_path / "documents" / f"{split}-00000.parquet", "pairs") as writer:
            for document in map(pair, (f"mod.name{number}" for number in range(40))):
                if split_of(document, FRACTION) == split:
                    writer.write(document)
    return tmp_path


def test_questions_are_held_out_and_the_same_every_time(data: Path) -> None:
    pairs = held_out_pairs(data, 5)
    assert len(pairs) == 5
    assert all(split_of(one, FRACTION) == "validation" for one in pairs)
    assert [one.title for one in held_out_pairs(data, 3)] == [one.title for one in pairs[:3]]
    with pytest.raises(RunFailure, match="no held-out pairs"):
        held_out_pairs(data / "absent", 5)


def test_shown_names_are_held_out_however_few_are_well_known(data: Path, tmp_path: Path) -> None:
    collection = tmp_path / "collection"
    (collection / "documents").mkdir(parents=True)
    held_out, in_training = held_out_pairs(data, 1)[0].title, "mod.trained"
    with DocumentFile(collection / "documents" / "train-00000.parquet", "documents") as writer:
        writer.write(Document("text", title=in_training, aliases="textwrap.shorten"))
        writer.write(Document("other text", title=held_out, aliases="os.path.join"))
    # What people call it, then any other held-out name.
    first, *others = shown_names(data, collection)
    assert first == "os.path.join"
    assert others and set(others) <= {one.title for one in held_out_pairs(data, 40)}


@pytest.mark.parametrize(
    ("found", "wanted", "f1"),
    [
        ("Join two paths.", "join TWO paths", 1.0),
        ("", "Join two paths.", 0.0),
        ("Split a file.", "Join two paths.", 0.0),
        # Three words in common, of 3 and 5.
        ("Join two paths.", "Join two paths of files.", 0.75),
        # A word counts as often as both have it.
        ("path path path path", "path", 0.4),
    ],
)
def test_word_f1(found: str, wanted: str, f1: float) -> None:
    assert word_f1(found, wanted) == pytest.approx(f1)


def test_opening_sentence() -> None:
    assert opening_sentence("Join two\npaths. Then stop.\n\nMore.") == "Join two paths."
    assert opening_sentence("See e.g. the docs\n\nMore.") == "See e.g. the docs"


def test_figures() -> None:
    right = ScoredAnswer("a", "Join two paths.", "Join two paths. [1]", "No idea.", "Join two paths.", "a")
    wrong = ScoredAnswer("b", "Split a path.", "Splash a math.", "Split a path.", "Something else.", "c")
    result = HeldOutAnswers((right, wrong, right))
    assert (result.with_passage, result.without_passage, result.by_rule, result.cited) == (2, 1, 2, 2)
    assert result.examples(1) == ([right], [wrong])
    text = "\n".join(result.lines())
    assert "2 of 3" in text and "1 of 3" in text
    assert "learned to copy the opening sentence of the passage it found" in text


class CopyingHandler(BaseHTTPRequestHandler):
    """Speaks the server's routes: answers from the passage rightly except about one name, and alone never."""

    wrong = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/qa":
            asked = pair(body["question"].removeprefix("What does ").removesuffix(" do?"))
            answer = "Nothing." if asked.title == self.wrong else f"{asked.answer} [1]"
            reply = {"answer": answer, "sources": [{"title": asked.title, "text": asked.context}]}
        else:
            reply = {"choices": [{"message": {"content": "It does."}}]}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def url(data: Path) -> Iterator[str]:
    handler = type("Handler", (CopyingHandler,), {"wrong": held_out_pairs(data, 1)[0].title})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_asking_a_server(url: str, data: Path) -> None:
    result = ask_held_out(url, data, count=6)
    assert (result.with_passage, result.without_passage, result.by_rule, result.cited) == (5, 0, 6, 5)
    assert [answer.name for answer in result.answers] == [one.title for one in held_out_pairs(data, 6)]
    assert json.loads(json.dumps(result.as_dict()))["right_with_passage"] == 5


def test_a_server_that_does_not_answer(data: Path) -> None:
    with pytest.raises(RunFailure, match="does not answer"):
        ask_held_out("http://127.0.0.1:1", data, count=1)
