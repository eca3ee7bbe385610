"""Words with tags: what is read, what schemes allow, and how sentences become windows of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raylm.config.data import DataSection
from raylm.data.loading import load_tokenizer
from raylm.data.samples.tag_schemes import Span, all_tags, mistake, scheme_of, spans
from raylm.data.samples.tagged import evaluation_tagged
from raylm.data.samples.tagged_sets import TaggedInput, TaggedSamples
from raylm.data.samples.token_samples import IGNORED
from raylm.data.samples.word_windows import WordWindows
from raylm.data.sources.streams import InputErrors
from raylm.errors import UserError
from tests.reading import write_encoder
from tests.tagging import tagged_rows, write_columns

ANNA = (("Anna", "lives", "in", "Berlin"), ("B-PER", "O", "O", "B-LOC"))
COLUMNS = "-DOCSTART- -X- O\n\nAnna NNP B-PER\nlives VBZ O\nin IN O\nBerlin NNP B-LOC\n\n\n# # O\n"
CONLLU = """# sent_id = 1
# text = Vámonos al mar
1-2\tVámonos\t_\t_\t_
1\tVamos\tir\tVERB\tx
2\tnos\tnosotros\tPRON\tx
2.1\tempty\t_\t_\t_
3\tdiez mil\tdiez\tNUM\tx
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "model")


def read(path: Path, **values: object) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    data = DataSection.model_validate({"train": str(path)} | values)
    return [(one.tokens, one.tags) for one in evaluation_tagged(data)]


def test_column_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(COLUMNS)
    # A word may be "#", which begins a comment elsewhere.
    assert read(path, format="conll") == [ANNA, (("#",), ("O",))]
    assert read(path, format="conll", fields={"tags": "2"})[0][1] == ("NNP", "VBZ", "IN", "NNP")
    named = tmp_path / "b.conll"
    named.write_text("# global.columns = FORM POS NER\n" + COLUMNS, encoding="utf-16")
    assert read(named, encoding="utf-16", fields={"tokens": "FORM", "tags": "POS"})[1] == (("#",), ("#",))
    universal = tmp_path / "c.conllu"
    universal.write_text(CONLLU)
    expected = (("Vamos", "nos", "diez mil"), ("VERB", "PRON", "NUM"))
    assert read(universal, fields={"tokens": "2", "tags": "4"}) == [expected]


def test_rows_of_lists(tmp_path: Path) -> None:
    rows = [{"tokens": list(ANNA[0]), "tags": list(ANNA[1])}]
    jsonl, listed, parquet = (tmp_path / f"a.{suffix}" for suffix in ("jsonl", "json", "parquet"))
    jsonl.write_text(json.dumps(rows[0]) + "\n")
    listed.write_text(json.dumps(rows))
    numbers = {"words": [list(ANNA[0])], "ner": [[1, 0, 0, 2]], "text": ["Anna lives in Berlin"]}
    pq.write_table(pa.table(numbers), parquet)
    assert read(jsonl) == read(listed) == [ANNA]
    fields = {"tokens": "words", "tags": "ner", "tag_names": ["O", "B-PER", "B-LOC"]}
    assert read(parquet, fields=fields) == [ANNA]
    with pytest.raises(UserError, match=r"row 1: column 'ner', value 4: found 2, allowed: 0 to 1 .*tag_names"):
        read(parquet, fields=fields | {"tag_names": ["O", "B-PER"]})
    with pytest.raises(UserError, match=r"value 1: found int, allowed: text; data\.fields\.tag_names names numbers"):
        read(parquet, fields={"tokens": "words", "tags": "ner"})


BAD_ROWS = {
    "no tags": ({"tokens": ["a"]}, r"no column 'tags'; columns found: tokens; name yours in data\.fields"),
    "no words": ({"tokens": [], "tags": []}, r"column 'tokens': found no word, allowed: one or more"),
    "lengths": ({"tokens": ["a", "b"], "tags": ["X"]}, r"found 2 words in 'tokens' and 1 tags in 'tags'"),
    "text": ({"tokens": "a b", "tags": ["X", "Y"]}, r"column 'tokens': found str, allowed: a list"),
    "none": ({"tokens": ["a", None], "tags": ["X", "Y"]}, r"column 'tokens', value 2: found NoneType, allowed: text"),
    "empty word": ({"tokens": ["a", " "], "tags": ["X", "Y"]}, r"column 'tokens', value 2: found an empty text"),
    "empty tag": ({"tokens": ["a"], "tags": [""]}, r"column 'tags', value 1: found an empty text"),
    "surrogate": ({"tokens": ["a\ud800"], "tags": ["X"]}, r"column 'tokens': not valid Unicode at character 1"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named_or_left_out(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, message = BAD_ROWS[name]
    path = tmp_path / "bad.jsonl"
    good = {"tokens": ["a"], "tags": ["X"]}
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, row)))
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: {message}"):
        read(path)
    assert read(path, errors="skip") == [(("a",), ("X",))]
    assert "1 malformed" in capsys.readouterr().err


BAD_COLUMNS = {
    "one": ("a O\nb\n", r"2: found one column, allowed: a word and its tag"),
    "more": ("a O\nb c O\n", r"2: found 3 columns, allowed: 2, as in the file's first sentence"),
    "empty word": ("a\tO\n\tO\n", r"2: found no word in column 1"),
    "empty tag": ("a\tO\nb\t\n", r"2: found no tag in column 2"),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_lines_are_named_or_cost_their_sentence(name: str, tmp_path: Path) -> None:
    content, message = BAD_COLUMNS[name]
    path = tmp_path / "bad.conll"
    path.write_text(f"{content}c O\n\nd O\n".replace("\nc O", "\nc\tO" if "\t" in content else "\nc O"))
    with pytest.raises(UserError, match=rf"bad\.conll:{message}"):
        read(path)
    assert read(path, errors="skip") == [(("d",), ("O",))]


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("a X O\n")
    with pytest.raises(UserError, match=r"a\.conll:1: data\.fields\.tags: found '4', allowed: a column from 1 to 3"):
        read(path, fields={"tags": "4"})
    path.write_text("# global.columns = FORM POS NER\na X O\n")
    with pytest.raises(UserError, match=r"found 'XPOS', allowed: a column from 1 to 3, or of FORM, POS, NER"):
        read(path, fields={"tags": "XPOS"})


def test_formats_without_tags_and_tags_for_text(tmp_path: Path) -> None:
    from raylm.data.sources.readers import READERS
    from raylm.data.sources.segments import open_sources

    csv, columns = tmp_path / "a.csv", tmp_path / "a.conll"
    csv.write_text("tokens,tags\na,b\n")
    columns.write_text("a O\n")
    with pytest.raises(UserError, match=r"found the format csv, allowed with tags: conll, .* of any suffix"):
        read(csv)
    data = DataSection(train=str(columns))
    (segment,) = open_sources(data, data.train_sections, "data.train")[0].segments
    with pytest.raises(UserError, match=r"a\.conll: found the format conll, words with tags, allowed for running text"):
        list(READERS[segment.format](segment, data, InputErrors.of(data)))


def test_what_tags_look_like() -> None:
    assert scheme_of({"O", "B-PER", "I-PER"}) == "bio"
    assert scheme_of({"O", "B-PER", "I-PER", "PER"}) == "bio"
    assert scheme_of({"O", "B-PER", "E-PER"}) == "bioes"
    assert scheme_of({"NN", "NN-TL", "FW-NN", "O"}) == scheme_of({"O", "PER"}) == scheme_of({"O"}) == "none"
    assert all_tags({"O", "B-b", "I-a"}, "bio") == ["O", "B-a", "I-a", "B-b", "I-b"]
    assert all_tags({"S-a"}, "bioes") == ["O", "B-a", "I-a", "E-a", "S-a"]
    assert all_tags({"b", "O", "a"}, "none") == ["O", "a", "b"]


@pytest.mark.parametrize(
    ("scheme", "tags", "number", "message"),
    [
        ("bio", "O I-PER", 1, "found the tag 'I-PER' behind 'O', .*: a span begins with B-PER"),
        ("bio", "I-PER", 0, "found the tag 'I-PER' at the beginning"),
        ("bio", "B-PER I-LOC", 1, "found the tag 'I-LOC' behind 'B-PER'"),
        ("bio", "B-PER E-PER", 1, "found the tag 'E-PER', allowed with objective.scheme bio: O, B-TYPE, I-TYPE"),
        ("bio", "O B-", 1, "found the tag 'B-', allowed"),
        ("bio", "O PER", 1, "found the tag 'PER', allowed"),
        ("bioes", "B-PER O", 1, "found the tag 'O' behind 'B-PER'"),
        ("bioes", "O B-PER", 1, "found the tag 'B-PER' at the end"),
        ("bioes", "E-PER", 0, "found the tag 'E-PER' at the beginning"),
        ("bioes", "S-PER I-PER", 1, "found the tag 'I-PER' behind 'S-PER'"),
        ("bioes", "B-PER L-PER", 1, "found the tag 'L-PER', allowed"),
    ],
)
def test_what_a_scheme_does_not_allow(scheme: str, tags: str, number: int, message: str) -> None:
    import re

    found = mistake(tags.split(), scheme)
    assert found is not None and found[0] == number
    assert re.match(message, found[1]), found[1]


def test_what_a_scheme_allows() -> None:
    assert mistake(["B-a", "I-a", "B-a", "O", "B-b"], "bio") is None
    assert mistake(["S-a", "B-a", "I-a", "E-a", "B-b", "E-b", "O"], "bioes") is None
    assert mistake(["I-a", "B-", "x"], "none") is None


def test_spans_of_tags_that_follow_no_scheme() -> None:
    """As seqeval 1.2.2's ``get_entities`` gives them."""
    assert spans(["B-a", "I-a", "I-b", "O", "I-b", "E-b", "I-b"]) == [
        Span(0, 1, "a"), Span(2, 2, "b"), Span(4, 5, "b"), Span(6, 6, "b"),
    ]  # fmt: skip
    assert spans(["B-a", "B-a", "S-a", "E-a", "O"]) == [Span(number, number, "a") for number in range(4)]


def test_scheme_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_columns(tmp_path / "train.conll", tagged_rows(20, 0))
    broken = tmp_path / "broken.conll"
    broken.write_text("Anna B-PER\nBert B-LOC\n\nlives O\nBerlin I-LOC\n")
    data = {"train": str(train), "validation": str(broken)}
    with pytest.raises(UserError, match=r"broken\.conll:5: found the tag 'I-LOC' behind 'O'"):
        TaggedInput(DataSection.model_validate(data))
    kept = TaggedInput(DataSection.model_validate(data | {"errors": "skip"}))
    assert [one.tokens for one in kept.sentences["validation"]] == [("Anna", "Bert")]
    assert "1 out of the scheme" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"train\.conll:\d+: found the tag '[OI].*' .*objective\.scheme bioes does not"):
        TaggedInput(DataSection.model_validate(data), "bioes")
    # Asked for, tags stand for themselves.
    alone = DataSection(train=str(train), validation=str(train))
    assert TaggedInput(alone, "none").labels == ["B-LOC", "B-PER", "I-PER", "O"]
    assert TaggedInput(alone).labels == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_unknown_and_single_tags(tmp_path: Path) -> None:
    train, other = tmp_path / "a.conll", tmp_path / "b.conll"
    train.write_text("a X\nb Y\n")
    other.write_text("a X\nb Z\n")
    data = DataSection(train=str(train), validation=str(other))
    with pytest.raises(
        UserError, match=r"b\.conll:2: found the tag 'Z', allowed: the tags that data\.train has \(X, Y"
    ):
        TaggedInput(data)
    with pytest.raises(UserError, match=r"a\.conll:2: found the tag 'Y', .* model\.path was trained with \(X, Z\)"):
        TaggedInput(data, known=["X", "Z"])
    train.write_text("a X\nb X\n")
    with pytest.raises(UserError, match=r"data\.train: found one tag only \('X'\)"):
        TaggedInput(DataSection(train=str(train), validation=str(train)))
    with pytest.raises(UserError, match="no sentence is left for validation"):
        TaggedInput(DataSection(train=str(train), validation_fraction=0))


def test_windows_hold_every_word_once(encoder: Path) -> None:
    tokenizer = load_tokenizer(encoder)
    words = ["anna", "zzz", "lives", "\u200b", "in", "abcdefghij", "berlin", "."]
    (whole,), (first, *rest) = (WordWindows(tokenizer, length).cut([words])[0] for length in (64, 8))
    ids = whole.ids.tolist()
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    # Sub-words of "zzz" and of ten letters; the word without a letter is unknown.
    assert whole.firsts.tolist() == [1, 2, 5, 6, 7, 8, 18, 19]
    assert ids[6] == tokenizer.unk_token_id
    text = tokenizer(" ".join(word for word in words if word != "\u200b"))["input_ids"]
    assert [one for number, one in enumerate(ids) if number != 6] == text
    windows = [first, *rest]
    assert all(len(window.ids) <= 8 for window in windows)
    assert [n for window in windows for n in range(window.start, window.start + len(window.firsts))] == list(range(8))
    firsts = [window.ids[place] for window in windows for place in window.firsts]
    assert firsts == whole.ids[whole.firsts].tolist()


def test_words_of_a_byte_level_tokenizer_stand_behind_a_space() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate([*letters, "<pad>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    ((window,),) = WordWindows(tokenizer, 16).cut([["ab", "c"]])
    assert window.ids.tolist() == tokenizer(" ab c")["input_ids"]
    assert window.firsts.tolist() == [0, 3]


def test_samples(encoder: Path, tmp_path: Path) -> None:
    rows = [(["anna", "lives", "in", "zzz"], ["B-PER", "O", "O", "B-LOC"]), (["bert"], ["B-PER"])]
    path = write_columns(tmp_path / "a.conll", rows)
    data = DataSection(train=str(path), validation=str(path))
    read = TaggedInput(data)
    manifest = read.write(tmp_path / "set", load_tokenizer(encoder), 8)
    assert manifest["labels"] == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert manifest["scheme"] == "bio"
    assert manifest["splits"]["train"]["words"] == 5 and manifest["splits"]["train"]["windows"] == 2
    batch = TaggedSamples(tmp_path / "set", "validation", 0).batch(np.arange(2))
    no = IGNORED
    assert batch["targets"].tolist() == [[no, 3, 0, 0, 1, no, no, no], [no, 3, no, no, no, no, no, no]]
    assert batch["input_ids"].shape == (2, 8)
    shuffled = TaggedSamples(tmp_path / "set", "train", 0)
    assert sorted(map(sum, (shuffled.batch(np.arange(2))["targets"] != no).tolist())) == [1, 4]
