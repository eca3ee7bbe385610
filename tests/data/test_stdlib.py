from __future__ import annotations

import json

import pytest

from raylm.data.samples.passages import passage_spans
from raylm.data.sources.documents import split_of
from raylm.data.sources.stdlib import stdlib_documents, stdlib_pairs


@pytest.fixture(scope="module")
def documents():
    return {document.title: document for document in stdlib_documents()}


def test_documents_hold_signature_and_docstring(documents):
    text = documents["json.dumps"].text
    assert text.startswith("json.dumps(obj, *, skipkeys=False, ")
    assert text.split("\n\n", 1)[1].startswith(json.dumps.__doc__.strip()[:40])
    assert documents["json"].text.startswith("module json\n\n")
    assert documents["json.decoder.JSONDecoder"].text.startswith("class json.decoder.JSONDecoder\n\n")
    assert documents["asyncio.tasks.gather"].text.startswith("asyncio.tasks.gather(*coros_or_futures, ")
    assert documents["lambda"].text.startswith("topic lambda\n\n")
    # From the Python twin of a C module, under the public name.
    assert documents["decimal.Decimal.sqrt"].text.startswith("decimal.Decimal.sqrt(self, context=None)")


def test_size_and_uniqueness(documents):
    assert len(documents) > 5000
    assert sum(document.byte_count for document in documents.values()) > 1_500_000
    bodies = [document.text.split("\n\n", 1)[1] for document in documents.values()]
    assert len(set(bodies)) == len(bodies)
    assert not any(title.startswith(("test.", "idlelib.")) or "site-packages" in title for title in documents)


def test_pairs_answer_with_the_first_sentence(documents):
    pairs = {pair.title: pair for pair in stdlib_pairs(list(documents.values()), with_context=True)}
    assert len(pairs) > 4000
    pair = pairs["json.dumps"]
    assert (pair.prompt, pair.answer) == ("What does json.dumps do?", "Serialize ``obj`` to a JSON formatted ``str``.")
    for pair in pairs.values():
        assert pair.answer in " ".join(documents[pair.title].text.split())
        assert split_of(pair, 0.05) == split_of(documents[pair.title], 0.05)
        assert not any(part.startswith("_") for part in pair.title.split("."))
        # The passage with the answer, as retrieval cuts it.
        text = documents[pair.title].text
        assert pair.context in {text[start:end] for start, end in passage_spans(text)}
        assert pair.answer in " ".join(pair.context.split())
    assert not any(pair.context for pair in stdlib_pairs(list(documents.values()), with_context=False))


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("os.path.join", "posixpath.join"),
        # One docstring in both twins: kept under the first, found under either.
        ("os.path.basename", "ntpath.basename"),
        ("posixpath.basename", "ntpath.basename"),
        ("asyncio.run", "asyncio.runners.run"),
        ("asyncio.Queue.get", "asyncio.queues.Queue.get"),
        ("unittest.TestCase.assertEqual", "unittest.case.TestCase.assertEqual"),
        ("collections.abc.Mapping.get", "_collections_abc.Mapping.get"),
    ],
)
def test_aliases_are_what_people_call_it(documents, name, title):
    assert [document.title for document in documents.values() if name in document.aliases.split()] == [title]


def test_aliases_name_nothing_that_a_module_merely_uses(documents):
    assert "contextlib.wraps" not in documents["functools.wraps"].aliases.split()
    for document in documents.values():
        # A name with a document of its own belongs to that document.
        assert not set(document.aliases.split()) & documents.keys()
