"""The section ``data.augmentation``: further training documents, or pairs, made from those that there are."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylm.config.base import Count, PathText, Seconds, Section, Seed

SERVED_METHODS = ("paraphrase", "back_translation", "generate")
# Method -> the keys that are for it alone.
_KEYS = {
    "swap": ("share", "segmenter"),
    "delete": ("share", "segmenter"),
    "synonym": ("share", "segmenter", "dictionary"),
    "span_mask": ("share", "segmenter", "span_words", "mask"),
    "paraphrase": ("template",),
    "back_translation": ("template", "back_template", "language", "original_language"),
    "generate": ("template",),
}
_SPECIFIC = sorted({key for keys in _KEYS.values() for key in keys})


class MethodSection(Section):
    """One item of ``data.augmentation.methods``."""

    method: Literal["copy", "swap", "delete", "synonym", "span_mask", "paraphrase", "back_translation", "generate"]
    """copy: the document again. swap, delete, synonym: change some words (Wei & Zou 2019). span_mask: replace
    runs of words by ``mask``. paraphrase, back_translation (Sennrich et al. 2016), generate: ask a served model."""
    times: int = Field(default=1, ge=1, le=100)
    """Number of variants of each document."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the documents that the method is applied to, chosen by hash."""
    part: Literal["prompt", "answer", "context"] | None = None
    """Part of a pair that is changed; the prompt by default."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the words that is changed, at least one; 0.1 by default, 0.15 for span_mask."""
    segmenter: Literal["characters", "jieba"] | None = None
    """What a Chinese word is: a character (default), or what jieba finds."""
    dictionary: PathText | None = None
    """synonym: a UTF-8 file with a word, a tab and its synonyms, separated by tabs, on each line."""
    span_words: Count | None = None
    """span_mask: words of a run; 3 by default."""
    mask: str | None = Field(default=None, min_length=1)
    """span_mask: text that replaces a run; [MASK] by default."""
    template: str | None = Field(default=None, min_length=1)
    """Prompt for the model. {text} is replaced by the document; generate on pairs has {prompt}, {answer} and {context}
    instead. back_translation: {language} is replaced by the language to translate into."""
    back_template: str | None = Field(default=None, min_length=1)
    """back_translation: prompt for the translation back; ``template`` by default."""
    language: str | None = Field(default=None, min_length=1)
    """back_translation: the language in between; by default English for a Chinese text, else French."""
    original_language: str | None = Field(default=None, min_length=1)
    """back_translation: the language of the documents; by default Chinese if half of the letters are Chinese, else
    English."""

    @model_validator(mode="after")
    def _fitting(self) -> MethodSection:
        allowed = _KEYS.get(self.method, ())
        for key in _SPECIFIC:
            if getattr(self, key) is not None and key not in allowed:
                methods = ", ".join(method for method, keys in _KEYS.items() if key in keys)
                raise ValueError(f"{key}: found with the method {self.method}, allowed with: {methods}")
        if self.part is not None and self.method in ("copy", "generate"):
            raise ValueError(f"part: leave it out with the method {self.method}, which takes the whole pair")
        if self.method == "synonym" and self.dictionary is None:
            raise ValueError("dictionary: missing; the method synonym needs a file with synonyms")
        if self.template is not None and self.method != "generate" and "{text}" not in self.template:
            raise ValueError(f"template: found '{self.template}', allowed: a text with {{text}}")
        return self


class ServedModelSection(Section):
    """``data.augmentation.model``: any server with OpenAI's routes, such as ``raylm serve``."""

    base_url: str = Field(pattern=r"^https?://\S+$")
    """Address of the server, up to and including /v1: http://127.0.0.1:8000/v1."""
    name: str | None = None
    """Name of the model; needed if the server has several."""
    api_key_environment: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the key."""
    concurrency: int = Field(default=4, ge=1, le=1024)
    """Requests that are sent at a time."""
    timeout_seconds: Seconds = 120.0
    """Longest wait for an answer, in seconds."""
    retries: int = Field(default=3, ge=0, le=20)
    """Attempts after a first failure that may be temporary: no connection, a timeout, status 408, 429 or 5xx."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    """Sampling temperature; 0 takes the likeliest token each time."""
    max_tokens: Count = 256
    """Most tokens of an answer."""
    max_failures: float = Field(default=0.1, ge=0, le=1)
    """Share of the requests that may fail. If more fail, prepare stops; the same command continues later."""


class BalanceSection(Section):
    """``data.augmentation.balance``: as many documents of every class."""

    by: Literal["label", "answer"] = "label"
    """What a class is: a value of the column ``data.fields.label``, or an answer of pairs."""
    method: Literal["oversample", "undersample"] = "oversample"
    """oversample repeats documents until every class has as many as the largest; undersample leaves some out until
    every class has as many as the smallest."""
    max_copies: Count = 10
    """oversample: most copies of a document, the original included."""


class AugmentationSection(Section):
    """``data.augmentation``: for training documents only, after deduplication; originals stay.

    A variant is a function of (seed, text, method, number), a served model's answers aside. What is made says so in the
    column ``augmentation``: the method, the original's id, the number.
    """

    methods: list[MethodSection] = Field(default_factory=list)
    """Methods. Each is applied to the original documents, not to variants."""
    model: ServedModelSection | None = None
    """Server of the model that paraphrase, back_translation and generate ask."""
    balance: BalanceSection | None = None
    """Make all classes of the original documents the same size, before the methods."""
    seed: Seed = 0
    """Seed of the random choices; another seed changes other words."""

    @property
    def served(self) -> bool:
        """Whether any method asks a model."""
        return any(method.method in SERVED_METHODS for method in self.methods)

    @model_validator(mode="after")
    def _consistent(self) -> AugmentationSection:
        if not self.methods and self.balance is None:
            raise ValueError("give methods, balance, or both; found neither")
        if self.served and self.model is None:
            name = next(method.method for method in self.methods if method.method in SERVED_METHODS)
            raise ValueError(
                f"model: missing; the method {name} needs a served model, as {{base_url: http://127.0.0.1:8000/v1}}"
            )
        return self
