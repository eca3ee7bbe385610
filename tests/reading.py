"""A tiny BERT encoder with a WordPiece tokenizer, and questions that a reader of it can learn to answer."""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = [
    "anna",
    "bert",
    "carl",
    "dora",
    "emil",
    "fred",
    "gina",
    "hans",
    "ivan",
    "jane",
    "kurt",
    "lena",
    "mara",
    "nils",
    "olga",
    "paul",
    "rosa",
    "sven",
    "tina",
    "udo",
]
TOWNS = [
    "berlin",
    "paris",
    "london",
    "madrid",
    "vienna",
    "prague",
    "warsaw",
    "dublin",
    "athens",
    "lisbon",
    "ankara",
    "moscow",
    "delhi",
    "tokyo",
    "lima",
]
JOBS = [
    "baker",
    "painter",
    "doctor",
    "farmer",
    "lawyer",
    "sailor",
    "tailor",
    "teacher",
    "butcher",
    "miner",
    "singer",
    "driver",
    "writer",
    "judge",
]
WORDS = [
    "lives",
    "in",
    "and",
    "works",
    "as",
    "a",
    "who",
    "where",
    "does",
    "what",
    "is",
    "the",
    "job",
    "of",
    "before",
    "that",
    "much",
    "rain",
    "fell",
    "on",
    ".",
    "?",
]


def write_encoder(directory: Path) -> Path:
    """A BERT of 2 layers without a head, its vocabulary the words above and single characters."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    words = list(dict.fromkeys([*special, *WORDS, *NAMES, *TOWNS, *JOBS, *characters]))
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", words.index("[SEP]")), ("[CLS]", words.index("[CLS]")))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=96, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(directory)  # fmt: skip
    tokenizer.save_pretrained(directory)
    return directory


def write_questions(path: Path, paragraphs: int, seed: int, without_answer: bool = False) -> Path:
    """A file in the SQuAD format: who lives where, whose job is what; with contexts that do not say it, SQuAD 2."""
    draw = random.Random(seed)
    article = []
    for number in range(paragraphs):
        town, job = draw.choice(TOWNS).title(), draw.choice(JOBS).title()
        names = [name.title() for name in draw.sample(NAMES, 2)]
        parts = [f"{names[0]} lives in {town} .", f"{names[1]} works as a {job} ."]
        draw.shuffle(parts)
        context = " ".join(parts)
        asked = [(f"Where does {names[0]} live?", town), (f"What is the job of {names[1]}?", job)]
        rows = []
        for place, (question, text) in enumerate(asked):
            answer = {"text": text, "answer_start": context.index(text)}
            rows.append({"id": f"{number}-{place}", "question": question, "answers": [answer]})
        article.append({"context": context, "qas": rows})
        if without_answer:
            rows = [{"id": f"{number}-none", "question": asked[0][0], "answers": [], "is_impossible": True}]
            article.append({"context": next(part for part in parts if "works" in part), "qas": rows})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "towns", "paragraphs": article}]}))
    return path
