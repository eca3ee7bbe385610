"""Served models that read and generate nothing: readers, classifiers, taggers, and encoders that embed."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raylm.config.reading import ReadingSection
from raylm.data.samples.windows import Window, Windows
from raylm.serving.deploy.service import ModelService
from raylm.serving.engines.base import EngineFailure
from raylm.serving.engines.deadline import AT_ONCE, all_in_time
from raylm.serving.http import request_log
from raylm.serving.http.errors import RequestError
from raylm.serving.http.metrics import TextTiming
from raylm.tasks.extractive_qa.spans import AnswerSpan, best_answer
from raylm.tasks.tagging.decoding import Decoder

# Windows of one question: with the default ones some 30,000 tokens of context.
MOST_WINDOWS = 128


@dataclass
class EncoderService(ModelService):
    """A served encoder.

    Attributes:
        labels: of a classifier, in the order of its logits.
        sigmoid: of a classifier with one label, whether its score is the logit's sigmoid.
        decoder: of a tagger, how its logits are read.
        reading: of a reader, how it looks for answers.
    """

    labels: Sequence[str] = ()
    sigmoid: bool = True
    decoder: Decoder | None = None
    reading: ReadingSection = field(default_factory=ReadingSection)
    # A tokenizer's own truncation is a setting of it: two threads would change it for each other.
    _cutting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    async def logits(self, texts: Sequence[list[int]]) -> list[np.ndarray]:
        """Logits fp32: of each text's labels, [labels], or of those of each of its tokens, [T, labels].

        Raises:
            RequestError: the queue is full.
            EngineFailure: the engine has stopped, or took too long.
        """
        return await self._read([self.engine.encode(ids) for ids in self._admitted(texts)])

    async def pair_logits(self, pairs: Sequence[tuple[list[int], list[int] | None]]) -> list[np.ndarray]:
        """Logits fp32 [labels] of pairs of texts: their ids together, and which of the two each belongs to.

        They wait in the queue in groups, each as long as a request may take: one request may bring more than fit.

        Raises:
            RequestError: the queue is full.
            EngineFailure: the engine has stopped, or a group took too long.
        """
        self.admit(min(len(pairs), AT_ONCE))
        request_log.note(model=self.name)
        request_log.count(texts=len(pairs), prompt_tokens=sum(len(ids) for ids, _ in pairs))
        found: list[np.ndarray] = []
        for start in range(0, len(pairs), AT_ONCE):
            group = pairs[start : start + AT_ONCE]
            found += await self._read([self.engine.encode(ids, types) for ids, types in group])
        return found

    async def windows(self, question: str, context: str) -> list[Window]:
        """The windows of a question; none where the context has no token.

        Raises:
            RequestError: there are too many.
        """

        def cut() -> list[Window]:
            with self._cutting:
                cutter = Windows(self.tokenizer, self.reading.sequence_length, self.reading.overlap)
                return list(itertools.islice(cutter.cut(question, context), MOST_WINDOWS + 1))

        self.admit(1)
        windows = await self.text_work.run(len(question) + len(context), 1, cut)
        for window in windows:
            self.check_ids(window.input_ids.tolist(), "context")
        if len(windows) > MOST_WINDOWS:
            raise RequestError(
                f"The context needs more than {MOST_WINDOWS} windows of {self.reading.sequence_length} tokens, "
                f"allowed: at most {MOST_WINDOWS}; shorten it, or put it into a collection",
                parameter="context",
                code="context_length_exceeded",
            )
        return windows

    async def find(
        self, question: str, contexts: Sequence[str], null_threshold: float | None
    ) -> tuple[list[AnswerSpan], int]:
        """The best answer in each of the ``contexts``, and how many tokens were read.

        Raises:
            RequestError: a context is too long, or the queue is full.
            EngineFailure: the engine has stopped, or took too long.
        """
        cuts = [await self.windows(question, context) for context in contexts]
        windows = [window for cut in cuts for window in cut]
        texts = self._admitted([window.input_ids.tolist() for window in windows])
        jobs = zip(texts, windows, strict=True)
        scores = await self._read([self.engine.encode(ids, window.token_types.tolist()) for ids, window in jobs])

        def search() -> list[AnswerSpan]:
            rest = iter(scores)
            return [
                best_answer(context, cut, [next(rest) for _ in cut], self.reading.max_answer_tokens, null_threshold)
                for context, cut in zip(contexts, cuts, strict=True)
            ]

        return await asyncio.to_thread(search), sum(map(len, texts))

    def _admitted(self, texts: Sequence[list[int]]) -> Sequence[list[int]]:
        self.admit(len(texts))
        request_log.note(model=self.name)
        request_log.count(texts=len(texts), prompt_tokens=sum(map(len, texts)))
        return texts

    async def _read(self, texts: list[Coroutine[Any, Any, np.ndarray]]) -> list[np.ndarray]:
        """Wait for what the engine says of each text, and count how long that took."""
        began, reason = time.monotonic(), "abort"
        try:
            found = await all_in_time(texts, self.request_seconds)
            reason = "stop"
            return found
        except EngineFailure:
            reason = "error"
            raise
        finally:
            if self.metrics is not None:
                for _ in texts:
                    self.metrics.text(self.name, TextTiming(reason, None, time.monotonic() - began, 0))
