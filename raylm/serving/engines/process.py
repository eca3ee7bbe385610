"""The process that owns a model: loads it, and then decodes, scores and embeds what comes down the pipe.

One thread does everything, so nothing of the replica's waits for the interpreter's lock while a step computes
(OpenVINO GenAI holds it throughout). The process ends when the pipe does: it cannot outlive its replica.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from multiprocessing.connection import Connection

import numpy as np

from raylm.errors import UserError
from raylm.serving.engines.base import (
    Alive,
    Backend,
    Cancel,
    Close,
    Command,
    Embed,
    Encode,
    EngineFailure,
    EngineRefusal,
    Event,
    Generate,
    Load,
    Ping,
    Reading,
    Ready,
    Score,
    TokenScores,
)  # fmt: skip
from raylm.serving.engines.encoder import EncoderBackend

# Between two messages about the cache.
LOAD_SECONDS = 0.5
# A step takes all of the replica's CPUs, and each process that passes a token on waits for one: a first token gets this
# long to leave before the next step. Later ones are passed on in groups, and can wait.
FIRST_TOKEN_SECONDS = 0.003
# Logits that scores are computed from together: 4 MB of them.
LOGITS_AT_ONCE = 1 << 20


class Decoding:
    """Everything that one backend has in work, and the loop that advances it.

    Args:
        backend: the model.
        connection: commands come from here, lists of events go there.
    """

    def __init__(self, backend: Backend, connection: Connection) -> None:
        self._backend, self._connection = backend, connection
        self._generating: set[int] = set()
        self._silent: set[int] = set()
        self._reading: deque[Score | Embed | Encode] = deque()
        self._load, self._load_due = Load(0.0), 0.0

    def run(self) -> None:
        """Work until told to close, or until nobody is at the other end."""
        try:
            while self._take_commands():
                if self._generating:
                    events = self._backend.advance()
                    self._deliver(events)
                    self._make_way(events)
                if self._reading:
                    self._deliver(self._read_next())
                self._tell_load()
        except (EOFError, ConnectionError):
            return

    def _read_next(self) -> list[Event]:
        """Read the text that has waited longest; an encoder takes others along."""
        if isinstance(self._backend, EncoderBackend):
            return _encode(self._backend, self._backend.next_batch(self._reading))
        # One text between two steps: those that generate wait for it no longer than for a prompt.
        return [_read(self._backend, self._reading.popleft())]

    def _take_commands(self) -> bool:
        """Do what was asked for; wait for it while there is nothing in work. False to stop."""
        while not (self._generating or self._reading) or self._connection.poll():
            if not self._connection.poll():
                # Nothing is left to do: a cancelled text has given its blocks back.
                self._tell_load()
            command: Command = self._connection.recv()
            if isinstance(command, Close):
                return False
            if isinstance(command, Generate):
                self._join(command)
            elif isinstance(command, Cancel):
                self._drop(command.number)
            elif isinstance(command, Ping):
                self._connection.send(Alive())
            else:
                self._reading.append(command)
        return True

    def _make_way(self, events: list[Event]) -> None:
        """Leave the CPUs to first tokens for a moment."""
        first = {event.number for event in events} & self._silent
        if first:
            self._silent -= first
            if self._generating:
                time.sleep(FIRST_TOKEN_SECONDS)

    def _tell_load(self) -> None:
        """Say how full the cache is: now and then, and when nothing is left to do."""
        now = time.monotonic()
        if self._generating and now < self._load_due:
            return
        usage = self._backend.cache_usage()
        if usage is not None and usage != self._load.cache_usage:
            self._load, self._load_due = Load(usage), now + LOAD_SECONDS
            self._connection.send(self._load)

    def _join(self, request: Generate) -> None:
        try:
            self._backend.admit(request)
        except EngineRefusal as error:
            self._deliver([Event(request.number, error=str(error), refused=True)])
        except (RuntimeError, ValueError) as error:
            self._deliver([Event(request.number, error=str(error))])
        else:
            self._generating.add(request.number)
            self._silent.add(request.number)

    def _drop(self, number: int) -> None:
        self._silent.discard(number)
        if number in self._generating:
            self._generating.discard(number)
            self._backend.drop(number)
        else:
            self._reading = deque(command for command in self._reading if command.number != number)

    def _deliver(self, events: list[Event]) -> None:
        if events:
            self._generating.difference_update(event.number for event in events if event.last)
            self._connection.send(events)


def _encode(backend: EncoderBackend, batch: list[Encode | Embed]) -> list[Event]:
    try:
        outputs = backend.encode(batch)
    except (RuntimeError, ValueError, IndexError) as error:
        return [Event(command.number, error=str(error)) for command in batch]
    return [
        Event(command.number, result=pool(output, command.pooling) if isinstance(command, Embed) else output)
        for command, output in zip(batch, outputs, strict=True)
    ]


def _read(backend: Backend, command: Score | Embed | Encode) -> Event:
    try:
        if isinstance(command, Encode):
            raise ValueError("this model generates text: it is no reader and no classifier")
        reading = backend.read(command.ids, command.adapter)
        if isinstance(command, Embed):
            return Event(command.number, result=pool(reading.hidden(), command.pooling))
        return Event(command.number, result=score(reading, command.ids, command.top))
    except (EngineFailure, RuntimeError, ValueError, IndexError) as error:
        return Event(command.number, error=str(error))


def score(reading: Reading, ids: list[int], top: int) -> TokenScores:
    """Log-probabilities of ``ids`` and of the ``top`` likeliest tokens at each place; of all where there are fewer."""
    parts: list[TokenScores] = []
    place = 0
    for logits in reading.logits():
        # What is computed from logits takes several times their memory: that of a few rows at a time.
        rows = max(1, LOGITS_AT_ONCE // logits.shape[1])
        for start in range(0, len(logits), rows):
            some = logits[start : start + rows]
            parts.append(_score_rows(some, ids[place + 1 : place + 1 + len(some)], min(top, some.shape[1])))
            place += len(some)
    return TokenScores(
        np.concatenate([part.chosen for part in parts]),
        np.concatenate([part.top_ids for part in parts]),
        np.concatenate([part.top for part in parts]),
    )


def _score_rows(logits: np.ndarray, targets: list[int], top: int) -> TokenScores:
    """Scores of consecutive places from ``logits`` fp32 [places, vocabulary]; ``targets`` may lack the last place's."""
    highest = logits.max(axis=1, keepdims=True)
    normalizer = highest + np.log(np.exp(logits - highest).sum(axis=1, keepdims=True, dtype=np.float64))
    rows = np.arange(len(targets))
    chosen = logits[rows, np.array(targets, dtype=np.int64)] - normalizer[rows, 0]
    best = np.argpartition(-logits, top - 1, axis=1)[:, :top]
    values = np.take_along_axis(logits, best, axis=1)
    # Of equals the lowest id comes first, as argmax has it.
    order = np.lexsort((best, -values), axis=1)
    likeliest = np.take_along_axis(values, order, axis=1) - normalizer
    return TokenScores(chosen.astype(np.float32), np.take_along_axis(best, order, axis=1), likeliest.astype(np.float32))


def pool(hidden: np.ndarray, pooling: str) -> np.ndarray:
    """One vector of length 1 from hidden states fp32 [tokens, hidden size]."""
    vector = {"mean": lambda: hidden.mean(axis=0), "first": lambda: hidden[0], "last": lambda: hidden[-1]}[pooling]()
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


def main(descriptor: int) -> None:
    """Load what the first message says, answer ``Ready`` or the reason against it, and work.

    Args:
        descriptor: of the pipe's end, inherited from the replica.
    """
    # Ctrl-C in a terminal reaches every process; the replica decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(descriptor) as connection:
        from raylm.models.loading import load_config
        from raylm.models.own_heads import usable_head
        from raylm.models.stops import end_token_ids
        from raylm.serving.engines.opening import choose_engine, load_backend, load_encoder, load_encoder_decoder
        from raylm.tasks import find_task

        source, serving, threads, name, trusted = connection.recv()
        task = find_task(name)
        try:
            network = task.head.network
            if network == "decoder" and choose_engine(source, serving) == "vllm":
                from raylm.serving.engines import vllm

                vllm.run(connection, source, serving, end_token_ids(source))
                return
            if network == "encoder_decoder":
                backend = load_encoder_decoder(source, serving, threads=threads)
            elif network == "decoder":
                backend = load_backend(source, serving, threads=threads)
            else:
                head = usable_head(task.head, load_config(source), source, "model.path", trusted=trusted)
                backend = load_encoder(source, serving, head, threads=threads)
        except (UserError, RuntimeError, ValueError, OSError) as error:
            connection.send(EngineFailure(str(error)))
            return
        connection.send(Ready(backend.name))
        try:
            Decoding(backend, connection).run()
        except Exception as error:  # said to the replica, then raised: nobody may wait for a dead engine
            connection.send(EngineFailure(f"{type(error).__name__}: {error}"))
            raise


if __name__ == "__main__":
    main(int(sys.argv[1]))
    sys.stdout.flush()
    # Leave without the interpreter's farewell: libraries' threads may still compute.
    os._exit(0)
