"""Tokenizers: byte-level BPE, WordPiece, Unigram, bytes, characters, words, or one that exists.

In: the training documents' texts. Out: a Hugging Face directory that ``AutoTokenizer`` loads with identical ids, with
special tokens and a chat template; BPE, bytes and known characters decode without loss. ``<|endoftext|>`` begins and
ends every document, so it is both BOS and EOS.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from raylm.config.data import MASK_TOKEN, SPECIAL_TOKENS, TokenizerSection
from raylm.data.chat import CHAT_TEMPLATE, PLAIN_TEMPLATE
from raylm.data.vocabularies import UNKNOWN, train_jieba_words, train_unigram, train_wordpiece, train_words
from raylm.errors import UserError
from raylm.models.loading import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, PAD, USER, ASSISTANT = SPECIAL_TOKENS


def make_tokenizer(section: TokenizerSection, texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer that ``section`` asks for on ``texts``, or load the one at its path.

    Raises:
        UserError: the path holds no usable tokenizer.
    """
    if section.path is not None:
        return reuse_tokenizer(section.path)
    special = section.special_tokens
    if section.type == "character":
        return _wrap(_character_tokenizer(texts, [*special, UNKNOWN]), special, unk_token=UNKNOWN)
    if section.type == "byte":
        return _wrap(_byte_tokenizer(special), special)
    if section.type in ("wordpiece", "unigram", "word"):
        train = {"wordpiece": train_wordpiece, "unigram": train_unigram, "word": train_words}[section.type]
        train = train_jieba_words if section.segmenter == "jieba" else train
        return _wrap(train(texts, section.vocab_size, special), special, unk_token=UNKNOWN)
    return _wrap(_train_bpe(texts, section.vocab_size, special), special)


def reuse_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, run, prepared or tokenizer directory, or of a hub name.

    One without a chat template gets ours where it knows our special tokens, else one of plain words: its vocabulary
    never changes, as that of a model may hang on it.

    Raises:
        UserError: there is none, or it has no fast implementation or no EOS token.
    """
    key = "tokenizer.path"
    nested = Path(path).expanduser() / "tokenizer"
    found = load_tokenizer(nested if (nested / "tokenizer_config.json").is_file() else path, key)
    if not found.is_fast:
        raise UserError(f"{key}: {path} has no tokenizer.json; a fast tokenizer is needed")
    if found.eos_token_id is None:
        raise UserError(f"{key}: {path} has no EOS token, which must stand between documents")
    if not found.chat_template:
        ours = {USER, ASSISTANT} <= set(found.all_special_tokens)
        found.chat_template = CHAT_TEMPLATE if ours else PLAIN_TEMPLATE
    found.clean_up_tokenization_spaces = False
    return found


def _train_bpe(texts: Iterator[str], vocab_size: int | None, special: list[str]) -> Tokenizer:
    """Byte-level BPE as in GPT-2 (Radford et al. 2019), with its splitting into words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _byte_tokenizer(special: list[str]) -> Tokenizer:
    """The byte-level alphabet without a merge: a token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _character_tokenizer(texts: Iterable[str], special: list[str]) -> Tokenizer:
    """A token a character (code point) of the training texts; any other becomes ``<|unk|>``."""
    from tokenizers import Tokenizer, decoders, models

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    symbols = [*special, *sorted(characters)]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    # BPE without merges cuts into characters several times faster than a pre-tokenizer would.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    backend.add_special_tokens(special)
    backend.decoder = decoders.Fuse()
    return backend


def _wrap(backend: Tokenizer, special: list[str], unk_token: str | None = None) -> PreTrainedTokenizerFast:
    """A transformers tokenizer; with a mask token, end-of-text is also what begins and ends a sequence of BERT's."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        unk_token=unk_token,
        **(
            {"mask_token": MASK_TOKEN, "cls_token": END_OF_TEXT, "sep_token": END_OF_TEXT}
            if MASK_TOKEN in special
            else {}
        ),
        extra_special_tokens=[token for token in special if token not in (END_OF_TEXT, PAD, MASK_TOKEN)],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tokenizer_hash(directory: Path) -> str:
    """Hash of what decides ids in a tokenizer directory: vocabulary, rules and chat template.

    Left out is what saving again through transformers may rewrite without changing an id.
    """
    rules = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    rules = {key: rules.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")}
    template = directory / "chat_template.jinja"
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
    digest.update(template.read_bytes() if template.is_file() else b"")
    return digest.hexdigest()


def reused_hash(path: str) -> str:
    """:func:`tokenizer_hash` of a set that would be prepared with ``tokenizer.path: path``.

    Raises:
        UserError: see :func:`reuse_tokenizer`.
    """
    with tempfile.TemporaryDirectory() as directory:
        reuse_tokenizer(path).save_pretrained(directory)
        return tokenizer_hash(Path(directory))
