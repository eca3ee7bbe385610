"""The process in which JSON schemas are tried: each in a fork that may die, of time, of memory or of the library.

Schemas come down the pipe with the model's directory; what is wrong with them goes back. The grammar library is loaded
once, and so is each model's tokenizer: a fork begins with both. The process ends when the pipe does.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from raylm.serving.engines.base import reason_of

# Of processor time, so that a busy machine refuses nothing; ordinary schemas take milliseconds, with a vocabulary of
# 50,000 a tenth of a second.
COMPILE_SECONDS = 2.0
# Beyond what the process holds when it begins.
COMPILE_BYTES = 2 << 30
# Of what the library says, which may quote the schema.
LONGEST_REASON = 300


class Trials:
    """Tries schemas, one at a time.

    Args:
        seconds: of processor time that a schema may take.
    """

    def __init__(self, seconds: float = COMPILE_SECONDS) -> None:
        self._seconds = seconds
        # For each model's directory: what the library knows of its tokenizer; None where it does not know the kind.
        self._vocabularies: dict[str, Any] = {}

    def mistake_in(self, schema: str, source: str | None) -> str | None:
        """Why the schema cannot be followed; None where it can.

        Args:
            schema: as JSON.
            source: directory of the model whose tokens the grammar is compiled for; None only makes the grammar.
        """
        try:
            import xgrammar  # noqa: F401
        except ImportError:
            return "this server cannot force JSON: it lacks xgrammar (pip install 'raylm[cpu]')"
        vocabulary = self._vocabulary(source) if source is not None else None
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reading)
            # Whatever happens, this copy of the process must not go on as the process itself.
            try:
                self._limit()
                os.write(writing, _try(schema, vocabulary).encode())
            except MemoryError:
                os.abort()
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read().decode()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            if os.WTERMSIG(status) == signal.SIGPROF:
                return f"the schema takes more than {self._seconds:g} s to compile; make it smaller"
            return "the schema is more than the grammar library can take; make it smaller"
        if said == "yes":
            return None
        return said.removeprefix("no: ") or "the schema cannot be followed"

    def _limit(self) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + COMPILE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Nobody handles the signal, so the kernel ends the process, whatever the library does.
        signal.setitimer(signal.ITIMER_PROF, self._seconds)

    def _vocabulary(self, source: str) -> Any:
        if source not in self._vocabularies:
            import xgrammar

            from raylm.data.loading import load_tokenizer

            try:
                self._vocabularies[source] = xgrammar.TokenizerInfo.from_huggingface(load_tokenizer(source))
            except (RuntimeError, ValueError, AttributeError, OSError):
                # The engine says so itself: the schema is not at fault.
                self._vocabularies[source] = None
        return self._vocabularies[source]


def _try(schema: str, vocabulary: Any) -> str:
    """``yes``, or ``no`` and the reason."""
    import xgrammar

    try:
        if vocabulary is None:
            xgrammar.Grammar.from_json_schema(schema)
        else:
            compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
            # A text without an end token ends with the last brace.
            matcher = xgrammar.GrammarMatcher(
                compiler.compile_json_schema(schema), terminate_without_stop_token=not vocabulary.stop_token_ids
            )
            allowed = xgrammar.allocate_token_bitmask(1, vocabulary.vocab_size)
            matcher.fill_next_token_bitmask(allowed)
            if not allowed.any():
                return "no: the schema allows no text"
    except (RuntimeError, ValueError) as error:
        return f"no: the schema cannot be followed: {reason_of(error)[:LONGEST_REASON]}"
    return "yes"


def main(descriptor: int) -> None:
    """Answer what comes down the pipe until it ends.

    Args:
        descriptor: of the pipe's end, inherited from the replica.
    """
    # Ctrl-C in a terminal reaches every process; the replica decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trials = Trials()
    with Connection(descriptor) as connection:
        while True:
            try:
                schema, source = connection.recv()
            except (EOFError, OSError):
                return
            connection.send(trials.mistake_in(schema, source))


if __name__ == "__main__":
    main(int(sys.argv[1]))
