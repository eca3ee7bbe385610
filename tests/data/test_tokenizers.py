from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from raylm.config.data import TokenizerSection
from raylm.data.chat import pair_messages, question_messages
from raylm.data.prepare.stage import check_template
from raylm.data.sources.documents import Document, make_pair
from raylm.data.tokens.encoding import DocumentEncoder, PairEncoder
from raylm.data.tokens.tokenizers import make_tokenizer, reuse_tokenizer, tokenizer_hash
from raylm.errors import UserError

TEXTS = [
    "Plain words, isn't it ?  Two spaces .",
    "中文文本，没有空格。\n第二行",
    "emoji 🙂 👨‍👩‍👧 and combining e\u0301",
    "tabs\t, \r\n line ends, trailing space ",
    "looks special: <|endoftext|><|user|>",
    " leading space",
    "\x00 control \u200b zero width",
]
KINDS = {
    "bpe": TokenizerSection(type="bpe", vocab_size=300),
    "byte": TokenizerSection(type="byte"),
    "character": TokenizerSection(type="character"),
}


@pytest.fixture(params=KINDS)
def directory(request, tmp_path: Path) -> Path:
    make_tokenizer(KINDS[request.param], iter(TEXTS)).save_pretrained(tmp_path)
    return tmp_path


def test_every_text_comes_back(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoder = DocumentEncoder(directory, tokenizer.eos_token_id)
    tokens, _ = encoder.encode([Document(text=text) for text in TEXTS])
    for ids, text in zip(tokens, TEXTS, strict=True):
        assert tokenizer.decode(ids[:-1]) == text
        # Only the end is an end-of-text token, whatever the text holds.
        assert (ids == tokenizer.eos_token_id).sum() == 1
        if "<|" not in text:
            assert tokenizer(text)["input_ids"] == ids[:-1].tolist()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_reloads_with_the_same_ids_beside_a_model(directory, model_type, tmp_path_factory):
    before = AutoTokenizer.from_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    after = AutoTokenizer.from_pretrained(directory)
    assert (after.bos_token, after.eos_token, after.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    assert len(after) == len(before)
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    again = tmp_path_factory.mktemp("again")
    after.save_pretrained(again)
    assert tokenizer_hash(again) == tokenizer_hash(directory)


def test_sizes_and_special_ids():
    assert len(make_tokenizer(KINDS["bpe"], iter(TEXTS * 5))) == 300
    assert len(make_tokenizer(KINDS["byte"], iter(()))) == 260
    character = make_tokenizer(KINDS["character"], iter(["ab", "ba 猫"]))
    assert len(character) == 4 + 5
    assert character.backend.encode("a🙂猫").ids.count(character.unk_token_id) == 1
    for tokenizer in (character, make_tokenizer(KINDS["byte"], iter(()))):
        special = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"]
        assert [tokenizer.backend.token_to_id(token) for token in special] == [0, 1, 2, 3]


def test_training_is_reproducible(tmp_path):
    for name in ("one", "two"):
        make_tokenizer(KINDS["bpe"], iter(TEXTS * 5)).save_pretrained(tmp_path / name)
    assert tokenizer_hash(tmp_path / "one") == tokenizer_hash(tmp_path / "two")
    make_tokenizer(KINDS["bpe"], iter(TEXTS[:1] * 5)).save_pretrained(tmp_path / "three")
    assert tokenizer_hash(tmp_path / "one") != tokenizer_hash(tmp_path / "three")


def test_pairs_are_laid_out_as_the_chat_template_renders_them(tmp_path):
    make_tokenizer(KINDS["bpe"], iter(TEXTS)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pairs = [make_pair("What?", "That 🙂."), make_pair("Why?", "So.", "A passage.\n\nOf two paragraphs.")]
    tokens, columns = PairEncoder(tmp_path).encode(pairs)
    for pair, ids, (answer, cut_start, cut_end) in zip(pairs, tokens, columns, strict=True):
        conversation = pair_messages(pair.prompt, pair.answer, pair.context)
        rendered = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
        assert ids.tolist() == rendered
        asked = question_messages(pair.prompt, pair.context)
        prompt = tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert ids[:answer].tolist() == prompt
        assert tokenizer.decode(ids[answer:]) == f"{pair.answer}<|endoftext|>"
        assert tokenizer.decode(ids[cut_start:cut_end]) == (pair.context or pair.prompt)


def test_a_reused_tokenizer_keeps_its_vocabulary_and_its_template(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={symbol: place for place, symbol in enumerate([*alphabet, "</s>"])}, merges=[])
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    foreign = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    foreign.save_pretrained(tmp_path / "plain")
    reused = reuse_tokenizer(str(tmp_path / "plain"))
    assert len(reused) == 257 and reused.pad_token_id is None
    reused.save_pretrained(tmp_path / "saved")

    def decode(ids) -> str:
        return reused.backend.decode(ids, skip_special_tokens=False)

    (ids,), _ = PairEncoder(tmp_path / "saved").encode([make_pair("Q?", "A.")])
    assert decode(ids) == "Question: Q?\nAnswer: A.</s>"
    # As BERT's.
    PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="</s>").save_pretrained(tmp_path / "separator")
    reuse_tokenizer(str(tmp_path / "separator")).save_pretrained(tmp_path / "saved again")
    assert reuse_tokenizer(str(tmp_path / "saved again")).eos_token_id == 256
    foreign.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        + ("{% if add_generation_prompt %}[assistant]{% endif %}")
    )
    foreign.save_pretrained(tmp_path / "own")
    reuse_tokenizer(str(tmp_path / "own")).save_pretrained(tmp_path / "saved")
    (ids,), ((answer, _, _),) = PairEncoder(tmp_path / "saved").encode([make_pair("Q?", "A.")])
    assert decode(ids[:answer]) == "[user]Q?</s>\n[assistant]"
    assert decode(ids[answer:]) == "A.</s>\n"
    foreign.chat_template = (
        "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    foreign.save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match="chat template does not write an answer after its own generation prompt"):
        PairEncoder(tmp_path / "odd").encode([make_pair("Q?", "A.")])


def test_a_path_without_a_usable_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.path: .* does not exist"):
        reuse_tokenizer(str(tmp_path / "nowhere"))
    make_tokenizer(KINDS["byte"], iter(())).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(UserError, match="has neither an EOS token nor a separator"):
        reuse_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ([{"name": "rag", "template": "x"}], "several chat templates and none named default"),
        ("{{ 1 / 0 }}", "its chat template refuses a question and an answer: division by zero"),
        ("{{ messages[9].role.name }}", "its chat template refuses a question and an answer: "),
        ("{% for", "its chat template refuses a question and an answer: "),
    ],
)
def test_chat_templates_that_cannot_lay_out_a_pair_are_refused(
    tiny_model: Path, tmp_path: Path, template: object, expected: str
) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (directory / "chat_template.jinja").unlink()
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    with pytest.raises(UserError, match=rf"^tokenizer\.path: .*{expected}"):
        check_template(reuse_tokenizer(str(directory)))


def test_of_several_chat_templates_the_default_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = directory / "chat_template.jinja"
    both = [{"name": "rag", "template": "x"}, {"name": "default", "template": template.read_text()}]
    template.unlink()
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": both}))
    check_template(reuse_tokenizer(str(directory)))
