"""Trains the tokenizers whose vocabulary is found by counting: WordPiece, Unigram and whole words.

In: texts. Out: a backend of the ``tokenizers`` library that needs nothing else, jieba least of all, once it is trained.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from raylm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "<|unk|>"
# A word in a word tokenizer of a text without spaces, and the spaces themselves, which are tokens of their own.
_SPACES = r"\s+"


def train_wordpiece(texts: Iterator[str], vocab_size: int, special: list[str]) -> Tokenizer:
    """WordPiece as in BERT (Devlin et al. 2019), cased: words and signs, Chinese characters on their own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    words = Counter[str]()
    backend = Tokenizer(models.BPE())
    normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    splitter = pre_tokenizers.BertPreTokenizer()
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter

    def counted() -> Iterator[str]:
        for text in texts:
            words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
            yield text

    backend.train_from_iterator(counted(), trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    # The library's own WordPiece trainer numbers its tokens in another order each time. What it does, too, is to merge
    # like BPE; here the pieces that BPE cuts the words into are counted, and the most frequent ones kept.
    pieces: Counter[str] = Counter()
    alphabet: set[str] = set()
    for word, count in words.items():
        for place, token in enumerate(backend.model.tokenize(word)):
            pieces[token.value if place == 0 else f"##{token.value}"] += count
        alphabet.update(character if place == 0 else f"##{character}" for place, character in enumerate(word))
    heads = [*special, UNKNOWN]
    letters = _most_frequent(Counter({letter: pieces.get(letter, 0) for letter in alphabet}), vocab_size - len(heads))
    kept = dict(letters)
    longer = (item for item in _most_frequent(pieces, len(pieces)) if item[0] not in kept)
    kept |= dict(islice(longer, vocab_size - len(heads) - len(kept)))
    vocab = {token: number for number, token in enumerate([*heads, *kept])}
    backend.model = models.WordPiece(vocab, unk_token=UNKNOWN)
    backend.add_special_tokens(heads)
    backend.decoder = decoders.WordPiece()
    return backend


def train_unigram(texts: Iterator[str], vocab_size: int, special: list[str]) -> Tokenizer:
    """Unigram (Kudo 2018) with SentencePiece's sign for spaces.

    The library sums in another order each time: log-probabilities differ in their last digits and pieces of the same
    one change places. They are rounded and put in order here, so that two trainings give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    heads = [*special, UNKNOWN]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=heads, unk_token=UNKNOWN, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    pieces = json.loads(backend.to_str())["model"]["vocab"][len(heads) :]
    least = min((score for _, score in pieces), default=0.0)
    scores = {piece: least if _is_filled_in(piece, score, least) else score for piece, score in pieces}
    ordered = sorted(
        ((piece, round(score, 3)) for piece, score in scores.items()), key=lambda item: (-item[1], item[0])
    )
    backend.model = models.Unigram([*((head, 0.0) for head in heads), *ordered], len(heads) - 1, False)
    backend.add_special_tokens(heads)
    return backend


def _is_filled_in(piece: str, score: float, least: float) -> bool:
    """Whether a character got its score for want of one: the least, plus a ten-thousandth for each such one before."""
    steps = (score - least) * 1e4
    return len(piece) == 1 and abs(steps - round(steps)) < 1e-5


def train_words(texts: Iterator[str], vocab_size: int, special: list[str]) -> Tokenizer:
    """The most frequent words between white space and signs; any other word is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="", cleanup=True)
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=[*special, UNKNOWN], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def train_jieba_words(texts: Iterator[str], vocab_size: int, special: list[str]) -> Tokenizer:
    """The most frequent words that jieba finds, with their frequencies, and the single characters.

    jieba takes the segmentation whose words are most likely together; a Unigram model over jieba's words and their
    frequencies does the same in the tokenizer itself, so that nothing has to be segmented before it.

    Raises:
        UserError: jieba is not installed.
    """
    try:
        import rjieba
    except ImportError:
        raise UserError("tokenizer.segmenter: jieba needs rjieba; install raylm[chinese]") from None
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for text in texts:
        words.update(rjieba.cut(text))
        characters.update(text)
    heads = [*special, UNKNOWN]
    # Characters first, so that rare words come apart instead of being unknown.
    most_characters = max(0, vocab_size - len(heads)) // 2
    kept: dict[str, int] = dict(_most_frequent(characters, most_characters))
    left = vocab_size - len(heads) - len(kept)
    longer = (
        (word, count) for word, count in _most_frequent(words, len(words)) if len(word) > 1 and not word.isspace()
    )
    kept |= dict(islice(longer, left))
    total = sum(words.values()) or 1
    # A character that jieba never leaves alone is worth less than any word.
    scores = [
        (word, math.log((words.get(word, 0) if len(word) == 1 else count) / total + 1e-8))
        for word, count in kept.items()
    ]
    backend = Tokenizer(models.Unigram([*((head, 0.0) for head in heads), *scores], len(heads) - 1, False))
    backend.add_special_tokens(heads)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_SPACES), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _most_frequent(counted: Counter[str], most: int) -> Iterable[tuple[str, int]]:
    """The most frequent ones, those of the same frequency in the order of their text."""
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:most]
