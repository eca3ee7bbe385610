"""An encoder-decoder as an engine: what waits is read together, and each such group is written together.

A group never takes others in: newcomers make a group of their own, which takes turns with those before it. A text that
has ended leaves its group.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from raylm.errors import first_line
from raylm.models.writing import Writer, Writing
from raylm.serving.engines.base import Backend, EngineFailure, EngineRefusal, Event, Generate, Reading
from raylm.serving.engines.sampling import Sampler

# Padded tokens of the sources of one group, so that reading them does not hold up those that are written for long.
TOKENS_PER_GROUP = 4096
# What a model raises where it cannot read a source; among them is that memory does not suffice.
READING_ERRORS = (RuntimeError, ValueError, IndexError)


@dataclass
class _Group:
    """Requests that are written together.

    Attributes:
        numbers: of the requests, in the order of the rows.
        tokens: that each row goes on with, int64 [rows, time].
    """

    numbers: list[int]
    writing: Writing
    tokens: np.ndarray

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows."""
        if len(rows) < len(self.numbers):
            self.numbers, self.tokens = [self.numbers[row] for row in rows], self.tokens[rows]
            if rows:
                self.writing.keep(rows)


class EncoderDecoderBackend(Backend):
    """Serves a loaded encoder-decoder. The prompt of a request is the encoder's input, an end token included.

    Args:
        writer: the model.
        sequences: requests in work together.
    """

    def __init__(self, writer: Writer, *, sequences: int) -> None:
        super().__init__(sequences)
        self.name, self._writer = writer.name, writer
        self._waiting: deque[Generate] = deque()
        self._samplers: dict[int, Sampler] = {}
        self._groups: list[_Group] = []

    def admit(self, request: Generate) -> None:
        if (constraint := request.parameters.constraint) is not None:
            raise EngineRefusal(f"{constraint.parameter}: a sequence-to-sequence model follows no schema")
        self._waiting.append(request)

    def advance(self) -> list[Event]:
        if newcomers := self._next_newcomers():
            # Those that are written pause for this step: the first token is what its sender waits for.
            return self._begin(newcomers)
        events = [event for group in self._groups for event in self._step(group)]
        self._groups = [group for group in self._groups if group.numbers]
        return events

    def drop(self, number: int) -> None:
        self._waiting = deque(request for request in self._waiting if request.number != number)
        self._samplers.pop(number, None)
        for group in self._groups:
            group.keep([row for row, known in enumerate(group.numbers) if known != number])
        self._groups = [group for group in self._groups if group.numbers]

    def read(self, ids: list[int], adapter: str | None = None) -> Reading:
        raise ValueError("a sequence-to-sequence model gives no probabilities of its source, and no vector")

    def _next_newcomers(self) -> list[Generate]:
        """The waiting requests that there is room for, oldest first."""
        newcomers: list[Generate] = []
        longest = 0
        while self._waiting and len(self._samplers) + len(newcomers) < self.sequences:
            longest = max(longest, len(self._waiting[0].prompt_ids))
            if newcomers and longest * (len(newcomers) + 1) > TOKENS_PER_GROUP:
                break
            newcomers.append(self._waiting.popleft())
        return newcomers

    def _begin(self, newcomers: list[Generate]) -> list[Event]:
        """Read the sources, and write each text's first token."""
        try:
            writing = self._writer.begin([request.prompt_ids for request in newcomers])
        except READING_ERRORS as error:
            if len(newcomers) > 1:
                # Find whose source cannot be read, and end that request alone.
                return [event for request in newcomers for event in self._begin([request])]
            return [Event(newcomers[0].number, error=f"the source cannot be read: {first_line(error)}")]
        for request in newcomers:
            self._samplers[request.number] = Sampler(request.parameters, self._writer.end_ids)
        tokens = np.array([self._writer.start] * len(newcomers), dtype=np.int64)
        group = _Group([request.number for request in newcomers], writing, tokens)
        events = self._step(group)
        if group.numbers:
            self._groups.append(group)
        return events

    def _step(self, group: _Group) -> list[Event]:
        """One more token for every row of a group; rows that end leave it."""
        logits = group.writing.step(group.tokens)
        likeliest, finite = logits.argmax(axis=-1).tolist(), np.isfinite(logits.max(axis=-1)).tolist()
        events, tokens = [], []
        for row, number in enumerate(group.numbers):
            sampler = self._samplers[number]
            try:
                if not finite[row]:
                    raise EngineFailure("the model's output is not finite here")
                token = likeliest[row] if sampler.plain else sampler.draw(torch.from_numpy(logits[row]))
                events.append(Event(number, [token], sampler.account(token), cached=0))
            except EngineFailure as error:
                token = 0
                events.append(Event(number, error=str(error), refused=isinstance(error, EngineRefusal)))
            tokens.append(token)
        group.tokens = np.array(tokens, dtype=np.int64)[:, None]
        for event in events:
            if event.last:
                del self._samplers[event.number]
        group.keep([row for row, event in enumerate(events) if not event.last])
        return events
