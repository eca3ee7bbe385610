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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.config.data import MASK_TOKEN, SPECIAL_TOKENS, TokenizerSection
from raylm.data.chat import CHAT_TEMPLATE, PLAIN_TEMPLATE, find_template
from raylm.data.loading import load_tokenizer
from raylm.data.tokens.encoding import load_backend
from raylm.data.tokens.tokenizer_training import UNKNOWN, train_jieba_words, train_unigram, train_wordpiece, train_words
from raylm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, PAD, USER, ASSISTANT = SPECIAL_TOKENS
# What transformers 5 and 4 call a tokenizer that is all in tokenizer.json.
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


@dataclass
class TokenizerFiles:
    """A tokenizer that is nothing but its files, with what ``prepare`` asks of one of transformers.

    Importing that library, with torch behind it, takes longer than to prepare some megabytes of text.

    Attributes:
        backend: the tokenizer itself.
        settings: content of ``tokenizer_config.json``.
        chat_template: content of ``chat_template.jinja``.
    """

    backend: Tokenizer
    settings: dict[str, Any]
    chat_template: str | None
    is_fast: bool = True

    @classmethod
    def load(cls, directory: Path) -> TokenizerFiles | None:
        """The tokenizer of a directory; None where its configuration asks for more than these files."""
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        rules, settings, template = (directory / name for name in names)
        if not (rules.is_file() and settings.is_file()) or (directory / "config.json").is_file():
            return None
        try:
            found = json.loads(settings.read_text(encoding="utf-8"))
            named = [value for key, value in found.items() if key.endswith("_token")]
            named += list(found.get("extra_special_tokens", []))
            if found.get("tokenizer_class") not in GENERIC_CLASSES or {"auto_map", "chat_template"} & set(found):
                return None
            backend = load_backend(directory)
            if not all(token is None or backend.token_to_id(token) is not None for token in named):
                return None
        except Exception:  # noqa: BLE001 - tokenizers raises bare ones; transformers will say what is wrong
            return None
        return cls(backend, found, template.read_text(encoding="utf-8") if template.is_file() else None)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def _id(self, name: str) -> int | None:
        token = self.settings.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the token that fills up, or None."""
        return self._id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """Id of the token for what is unknown, or None."""
        return self._id("unk_token")

    def save_pretrained(self, directory: Path | str) -> None:
        """Write the files, as ``AutoTokenizer`` reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        settings = json.dumps(self.settings, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def make_tokenizer(
    section: TokenizerSection, texts: Iterator[str], chat_template: str | None = None
) -> TokenizerFiles | PreTrainedTokenizerFast:
    """Train the tokenizer that ``section`` asks for on ``texts``, or load the one at its path.

    Args:
        chat_template: name or file; None for the tokenizer's own.

    Raises:
        UserError: the path holds no usable tokenizer.
    """
    if section.path is not None:
        return reuse_tokenizer(section.path, chat_template)
    return with_template(_trained(section, texts), chat_template)


def _trained(section: TokenizerSection, texts: Iterator[str]) -> TokenizerFiles:
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


def with_template(
    tokenizer: TokenizerFiles | PreTrainedTokenizerFast, chat_template: str | None
) -> TokenizerFiles | PreTrainedTokenizerFast:
    """The tokenizer with the chat template of that name or file; where it has none and none is named, with ours."""
    if chat_template is not None:
        tokenizer.chat_template = find_template(chat_template, _added_tokens(tokenizer))
    elif not tokenizer.chat_template:
        ours = {USER, ASSISTANT} <= _special_tokens(tokenizer)
        tokenizer.chat_template = CHAT_TEMPLATE if ours else PLAIN_TEMPLATE
    return tokenizer


def reuse_tokenizer(path: str, chat_template: str | None = None) -> TokenizerFiles | PreTrainedTokenizerFast:
    """The tokenizer of a model, run, prepared or tokenizer directory, or of a hub name.

    One without a chat template gets ours where it knows our special tokens, else one of plain words: its vocabulary
    never changes, as that of a model may hang on it. Where there is no EOS token, as in BERT's, the separator is it.

    Args:
        chat_template: name or file of another one; None for its own.

    Raises:
        UserError: there is none, or it has no fast implementation, or neither EOS token nor separator.
    """
    key = "tokenizer.path"
    nested = Path(path).expanduser() / "tokenizer"
    directory = nested if (nested / "tokenizer_config.json").is_file() else Path(path).expanduser()
    found = TokenizerFiles.load(directory) or load_tokenizer(nested if directory == nested else path, key)
    if not found.is_fast:
        raise UserError(f"{key}: {path} has no tokenizer.json; a fast tokenizer is needed")
    if found.eos_token_id is None:
        if isinstance(found, TokenizerFiles):
            found.settings["eos_token"] = found.settings.get("sep_token")
        elif found.sep_token is not None:
            found.eos_token = found.sep_token
    if found.eos_token_id is None:
        raise UserError(f"{key}: {path} has neither an EOS token nor a separator, one of which ends documents")
    if isinstance(found, TokenizerFiles):
        found.settings["clean_up_tokenization_spaces"] = False
    else:
        found.clean_up_tokenization_spaces = False
    return with_template(found, chat_template)


def _added_tokens(tokenizer: TokenizerFiles | PreTrainedTokenizerFast) -> set[str]:
    backend = tokenizer.backend if isinstance(tokenizer, TokenizerFiles) else tokenizer.backend_tokenizer
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _special_tokens(tokenizer: TokenizerFiles | PreTrainedTokenizerFast) -> set[str]:
    if isinstance(tokenizer, TokenizerFiles):
        return {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}
    return set(tokenizer.all_special_tokens)


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


def _wrap(backend: Tokenizer, special: list[str], unk_token: str | None = None) -> TokenizerFiles:
    """A tokenizer's files; with a mask token, end-of-text is also what begins and ends a sequence of BERT's."""
    settings = {
        "backend": "tokenizers",
        "tokenizer_class": GENERIC_CLASSES[0],
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "unk_token": unk_token,
        "extra_special_tokens": [token for token in special if token not in (END_OF_TEXT, PAD, MASK_TOKEN)],
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    if MASK_TOKEN in special:
        settings |= {"mask_token": MASK_TOKEN, "cls_token": END_OF_TEXT, "sep_token": END_OF_TEXT}
    return TokenizerFiles(backend, settings, CHAT_TEMPLATE)


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


def reused_hash(path: str, chat_template: str | None) -> str:
    """:func:`tokenizer_hash` of a set that would be prepared with ``tokenizer.path: path`` and ``data.chat_template``.

    Raises:
        UserError: see :func:`reuse_tokenizer`.
    """
    with tempfile.TemporaryDirectory() as directory:
        reuse_tokenizer(path, chat_template).save_pretrained(directory)
        return tokenizer_hash(Path(directory))
