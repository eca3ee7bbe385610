"""Collections on disk: changes are found by every process, survive a killed one, and never half."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.errors import CollectionDamaged, CollectionExists, NoSuchCollection
from raylm.serving.retrieval.records import StoredDocument


def titles(store: CollectionStore, question: str, name: str = "animals") -> list[str]:
    return [match.passage.title for match in store.get(name).search(question, 5)]


@pytest.fixture
def store(tmp_path: Path) -> CollectionStore:
    return CollectionStore(tmp_path / "collections")


@pytest.fixture
def animals(store: CollectionStore) -> CollectionStore:
    collection = store.create("animals")
    collection.add([StoredDocument("1", "Zebra", "It has stripes."), StoredDocument("2", "Lion", "It has a mane.")])
    collection.build()
    return store


def test_other_processes_see_changes(animals: CollectionStore) -> None:
    other = CollectionStore(animals.root)
    assert titles(other, "stripes") == ["Zebra"]
    animals.get("animals").add(
        [StoredDocument("3", "Tiger", "It has stripes, too."), StoredDocument("1", "Ass", "Ears.")]
    )
    animals.get("animals").build()
    assert titles(other, "stripes") == ["Tiger"]
    assert titles(other, "ears") == ["Ass"]
    assert other.get("animals").remove("3")
    assert not other.get("animals").remove("3")
    other.get("animals").build()
    assert titles(animals, "stripes") == []
    other.delete("animals")
    with pytest.raises(NoSuchCollection):
        titles(animals, "stripes")
    animals.create("animals")
    assert titles(animals, "stripes") == []
    assert titles(other, "stripes") == []


def test_refusals(animals: CollectionStore) -> None:
    with pytest.raises(CollectionExists):
        animals.create("animals")
    for name in ("absent", "../animals", ".", "", "Animals"):
        with pytest.raises(NoSuchCollection):
            animals.get(name)
    (animals.root / "animals" / "documents.sqlite").write_bytes(b"damaged" * 1000)
    with pytest.raises(CollectionDamaged, match=r"'animals' is damaged \(file is not a database\); delete it"):
        animals.get("animals").facts()


def test_vectors_rank_beside_words(animals: CollectionStore) -> None:
    collection = animals.get("animals")
    rows = collection.to_embed("an encoder", 10)
    assert [text for _, text in rows] == ["Zebra\nIt has stripes.", "Lion\nIt has a mane."]
    collection.keep_vectors("an encoder", [(rows[0][0], np.array([1, 0], np.float32))])
    collection.build()
    # One vector is missing: words alone decide.
    assert titles(animals, "hair") == []
    collection.keep_vectors("an encoder", [(rows[1][0], np.array([0.6, 0.8], np.float32))])
    collection.build()
    (first, second) = collection.search("hair", 5, np.array([0, 1], np.float32))
    assert (first.passage.title, second.passage.title) == ("Lion", "Zebra")
    assert first.relevance == pytest.approx(0.4)
    (first, _) = collection.search("stripes", 5, np.array([0, 1], np.float32), dense_weight=0.4)
    assert first.passage.title == "Zebra"
    # Vectors of different encoders cannot be compared.
    assert len(collection.to_embed("another encoder", 10)) == 2
    assert collection.facts().embedded == 0


def test_writers_take_turns(animals: CollectionStore) -> None:
    """Eight threads with stores of their own, as replicas have them."""

    def fill(number: int) -> None:
        collection = CollectionStore(animals.root).get("animals")
        for part in range(3):
            collection.add([StoredDocument(f"{number}-{part}", f"word{number}x{part}", "Text.")])
            collection.build()

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert animals.get("animals").facts().documents == 26
    assert all(titles(animals, f"word{number}x{part}") for number in range(8) for part in range(3))
    assert len(list((animals.root / "animals").glob("index-*"))) <= 2


KILLED = """
import sys, threading
from pathlib import Path
from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.records import StoredDocument
collection = CollectionStore(Path(sys.argv[1])).get("animals")
print("ready", flush=True)
number = 0
while True:
    collection.add([StoredDocument(f"k{number}", "", "Killed words. " * 50)])
    collection.build()
    number += 1
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_collection(animals: CollectionStore) -> None:
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(animals.root)], stdout=subprocess.PIPE, env={**os.environ}
        )
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert titles(animals, "stripes") == ["Zebra"]
        collection = animals.get("animals")
        collection.build()
        facts = collection.facts()
        assert len(collection.index()) == facts.passages >= facts.documents > 3
