from __future__ import annotations

import pytest

from raylm.config.cleaning import CleaningSection, DecontaminationSection
from raylm.data.cleaning.changes import chinese_converter, html_to_text, mask_addresses, mask_emails, mask_phones
from raylm.data.cleaning.cleaner import Account, Cleaner
from raylm.data.cleaning.contamination import Contamination, collect
from raylm.data.cleaning.quality import c4_lines, gopher_quality
from raylm.data.sources.documents import Document, make_pair
from raylm.data.words import words_of

PROSE = (
    "The committee met on Tuesday to discuss the plans that were drawn up in the spring. Several members had "
    "questions about the cost of the work, and the chair asked that a report be written before the next meeting. It "
    "was agreed to have the report ready in May. The minutes of this meeting will be sent to all who were there, with "
    "a list of the open points."
)


def cleaned(text: str, **options) -> str | None:
    (found,) = Cleaner(CleaningSection(**options), Account()).clean([Document(text=text)])
    return None if found is None else found.document.text


def test_html_to_text():
    page = (
        "<html><head><title>T</title><style>p{}</style></head><body><script>var x;</script><h1>Head</h1>"
        "<p>One <b>bold</b>ly&nbsp;said &amp; done.</p><ul><li>a</li><li>b</li></ul></body></html>"
    )
    assert html_to_text(page).split("\n") == ["Head", "", "One boldly\xa0said & done.", "", "a", "", "b"]
    assert html_to_text("no markup") == "no markup"
    assert html_to_text("1 < 2 and so on") == "1 < 2 and so on"


def test_unicode_controls_and_widths():
    assert cleaned("ﬁne e\u0301", unicode="NFC") == "ﬁne é"
    assert cleaned("ﬁne", unicode="NFKC") == "fine"
    assert cleaned("a\u200b\x00b\r\nc\td\ufeff", control_characters=True) == "ab\nc\td"
    assert cleaned("ＡＢＣ１２３％　你好，世界！", full_width=True) == "ABC123% 你好，世界！"


def test_chinese_scripts():
    pytest.importorskip("opencc")
    assert chinese_converter("simplified")("漢字與臺灣") == "汉字与台湾"
    assert cleaned("汉字", chinese="traditional") == "漢字"


def test_personal_data_is_masked_and_what_looks_like_it_stays():
    assert mask_emails("to ann.lee+x@mail.example.co.uk, @home") == "to <email>, @home"
    assert mask_addresses("10.0.0.1 and 2001:db8::1, not 1.2.3.4.5, 999.1.1.1 or 12:30:45") == (
        "<ip> and <ip>, not 1.2.3.4.5, 999.1.1.1 or 12:30:45"
    )
    phones = "+1 (555) 123-4567, 020 7946 0958, +4915112345678, 13812345678"
    assert mask_phones(phones) == "<phone>, <phone>, <phone>, <phone>"
    for kept in ("2024-01-02", "3.14159", "in 1984 and 2001", "pages 100-200", "12345", "192.168.0.1"):
        assert mask_phones(kept) == kept


def test_gopher_quality():
    assert gopher_quality(PROSE, words_of(PROSE)) is None
    for text, reason in [
        ("Too short to be of use.", "fewer than 50 words"),
        ("aa bb " * 60, "mean length of words"),
        (PROSE.replace(" ", " # "), "mean length of words"),
        (PROSE.replace("the", "the #tag"), "symbols"),
        ("\n".join(f"- {PROSE}" for _ in range(3)), "bullets"),
        ("\n".join(f"{PROSE[:-1]}..." for _ in range(3)), "ellipses"),
        ("12345 6789 " * 30, "words without letters"),
        ("lorem ipsum dolor amet " * 20, "stop words"),
    ]:
        assert gopher_quality(text, words_of(text)) == reason


def test_gopher_repetition():
    lines = "\n".join(["A line that is there again and again."] * 5 + [PROSE])
    repeated = " ".join(PROSE.split()[10:28])
    cases = [
        (PROSE, None),
        (lines, "repeated lines"),
        ("buy now " * 30, "most frequent 2-gram"),
        (f"{PROSE} {repeated}", "repeated 5-grams"),
        ("word", None),
        (f"{lines}\n\n{lines}", "repeated lines"),
    ]
    account = Account()
    found = Cleaner(CleaningSection(repetition=True), account).clean([Document(text=text) for text, _ in cases])
    assert [each is None for each in found] == [reason is not None for _, reason in cases]
    assert account.dropped["repetition"] == {"repeated lines": 2, "most frequent 2-gram": 1, "repeated 5-grams": 1}
    # What a document repeats does not hang on those that are judged with it.
    for text, reason in cases:
        assert (cleaned(text, repetition=True) is None) == (reason is not None)


def test_c4():
    body = "This is the first of the sentences. Here is the second one of them. And a third one ends it."
    assert c4_lines(f"Menu | Home\n{body}\nPlease enable JavaScript to see this page.\nShort one.") == (body, None)
    assert c4_lines("Lorem ipsum dolor sit amet.")[1] == "lorem ipsum"
    assert c4_lines("if (x) { return; }")[1] == "curly bracket"
    assert c4_lines("Only one sentence is in this text.")[1] == "fewer than 3 sentences"


def test_languages():
    keep = {"language": {"keep": ["en"]}}
    assert cleaned(PROSE, **keep) == PROSE
    assert cleaned("Der Ausschuss traf sich am Dienstag, um über die Pläne zu sprechen.", **keep) is None
    assert cleaned("委员会周二开会讨论春季制定的计划。", language={"keep": ["zh"]}) is not None
    # Which py3langid takes for Wu.
    assert cleaned("该镇位于江苏省苏州市吴江区，面积五十平方公里，人口三万。", language={"keep": ["zh"]}) is not None


def test_the_account_counts_changes_and_shows_what_was_dropped():
    account = Account()
    section = CleaningSection(unicode="NFC", pii=["email"], length={"min_words": 3, "max_characters": 60})
    cleaner = Cleaner(section, account)
    texts = ["write to me@example.org now", "two words", "e\u0301 is one letter", "x " * 40]
    kept = [each.document.text for each in cleaner.clean([Document(text=text) for text in texts]) if each is not None]
    assert kept == ["write to <email> now", "é is one letter"]
    assert account.changed == {"unicode": 1, "pii email": 1}
    assert account.dropped == {"length": {"fewer than 3 words": 1, "more than 60 characters": 1}}
    assert account.examples["length"][0] == {"reason": "fewer than 3 words", "text": "two words"}


def test_repetition_of_a_pair_is_that_of_its_answer():
    """A question rightly repeats words of its context, and so does the answer."""
    answer = " ".join(f"word{number}" for number in range(60))
    asked = make_pair("What is the name of the first of the kings of the land?", answer, f"{answer} {PROSE}")
    looping = make_pair("What?", "over and over again " * 20, PROSE)
    short = make_pair("What?", "no no no", PROSE)
    account = Account()
    found = Cleaner(CleaningSection(repetition=True), account).clean(
        [asked, looping, short, Document(text="a b " * 40)]
    )
    assert [each is not None for each in found] == [True, False, True, False]
    assert sum(account.dropped["repetition"].values()) == 2


def test_pairs_are_cleaned_part_by_part():
    cleaner = Cleaner(CleaningSection(full_width=True, pii=["email"]), Account())
    pair = cleaner.clean([make_pair("Ｑ?", "a@b.org", "Ｃ")])[0].document
    assert (pair.prompt, pair.answer, pair.context, pair.text) == ("Q?", "<email>", "C", "C\n\nQ?\n<email>")


def test_decontamination(tmp_path):
    section = DecontaminationSection(sources=["x"], ngram_words=5)
    assert collect(tmp_path, [PROSE, "short one"], section) > 50
    contamination = Contamination.load(tmp_path, section)
    assert contamination.found_in("They wrote: the Chair asked that a REPORT be written.")
    assert not contamination.found_in("They wrote that the chair asked for a report.")
    assert contamination.found_in("Short one") and not contamination.found_in("a short one of many")
    assert not Contamination.load(tmp_path, section.model_copy(update={"max_overlap": 0.9})).found_in(PROSE[:60] + " x")
    assert Contamination.load(tmp_path, None) is None
