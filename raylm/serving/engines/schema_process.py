"""The process in which JSON schemas and other grammars are tried: each in a fork that may die, of time, of memory or of
the library.

They come down the pipe with the model's directory; what is wrong with them goes back. The grammar library is loaded
once, and so is each model's tokenizer: a fork begins with both. The process ends when the pipe does.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from raylm.serving.engines.base import Constraint, reason_of

# Of processor time, so that a busy machine refuses nothing; ordinary schemas take milliseconds, with a vocabulary of
# 50,000 a tenth of a second.
COMPILE_SECONDS = 3.0
# Beyond what the process holds when it begins.
COMPILE_BYTES = 2 << 30
HARMLESS = Constraint("json", '{"type": "boolean"}')
NAMES = {"json": "schema", "regex": "regular expression", "choice": "choice", "grammar": "grammar"}
# Of what the library says, which may quote the schema.
LONGEST_REASON = 300


class Trials:
    """Tries schemas, one at a time.

    Args:
        seconds: of processor time that a schema may take.
    """

    def __init__(self, seconds: float = COMPILE_SECONDS) -> None:
        self._seconds = seconds
        # For each model's directory, and for none.
        self._vocabularies: dict[str | None, Any] = {}

    def mistake_in(self, constraint: Constraint, source: str | None) -> str | None:
        """Why the schema or grammar cannot be followed; None where it can.

        Args:
            constraint: what a text is to be.
            source: directory of the model whose tokens the grammar is compiled for; None only makes the grammar.
        """
        try:
            # Loaded once, before any fork.
            import jsonschema  # noqa: F401
            import xgrammar  # noqa: F401
        except ImportError:
            return "this server cannot force a form: it lacks xgrammar (pip install 'raylm[cpu]')"
        if source not in self._vocabularies:
            self._vocabularies[source] = None if source is None else _load_vocabulary(source)
            # Libraries load parts of themselves at their first use; a fork would do so each time.
            _try(HARMLESS, self._vocabularies[source])
        vocabulary = self._vocabularies[source]
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reading)
            # Whatever happens, this copy of the process must not go on as the process itself.
            try:
                self._limit()
                os.write(writing, _try(constraint, vocabulary).encode())
            except MemoryError:
                os.abort()
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read().decode()
        _, status = os.waitpid(child, 0)
        name = NAMES[constraint.kind]
        if os.WIFSIGNALED(status):
            if os.WTERMSIG(status) == signal.SIGPROF:
                return f"the {name} takes more than {self._seconds:g} s to compile; make it smaller"
            return f"the {name} is more than the grammar library can take; make it smaller"
        if said == "yes":
            return None
        return said.removeprefix("no: ") or f"the {name} cannot be followed"

    def _limit(self) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + COMPILE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Nobody handles the signal, so the kernel ends the process, whatever the library does.
        signal.setitimer(signal.ITIMER_PROF, self._seconds)


def _load_vocabulary(source: str) -> Any:
    """What the library knows of a model's tokenizer; None where it does not know the kind."""
    import xgrammar

    from raylm.data.loading import load_tokenizer

    try:
        return xgrammar.TokenizerInfo.from_huggingface(load_tokenizer(source))
    except (RuntimeError, ValueError, AttributeError, OSError):
        # The engine says so itself: the schema is not at fault.
        return None


def _try(constraint: Constraint, vocabulary: Any) -> str:
    """``yes``, or ``no`` and the reason."""
    import xgrammar

    from raylm.serving.engines.grammar_text import grammar_of, plain_text

    if constraint.kind == "json" and (mistake := _mistake_of_schema(constraint.text)) is not None:
        return f"no: {mistake}"
    name = NAMES[constraint.kind]
    try:
        if vocabulary is None:
            xgrammar.Grammar.from_ebnf(plain_text(constraint))
        else:
            compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
            # A text without an end token ends with the last brace.
            matcher = xgrammar.GrammarMatcher(
                compiler.compile_grammar(grammar_of(constraint)),
                terminate_without_stop_token=not vocabulary.stop_token_ids,
            )
            allowed = xgrammar.allocate_token_bitmask(1, vocabulary.vocab_size)
            matcher.fill_next_token_bitmask(allowed)
            if not allowed.any():
                return f"no: the {name} allows no text"
    except (RuntimeError, ValueError) as error:
        return f"no: the {name} cannot be followed: {reason_of(error)[:LONGEST_REASON]}"
    return "yes"


def _mistake_of_schema(schema: str) -> str | None:
    """A keyword of the wrong type; None where there is none.

    Libraries differ in whether they look at it at all, and OpenVINO GenAI's does so in a step, which fails for every
    request in it.
    """
    import jsonschema

    try:
        jsonschema.Draft202012Validator.check_schema(json.loads(schema), format_checker=None)
    except jsonschema.SchemaError as error:
        place = "/".join(map(str, error.absolute_path)) or "its top"
        return f"no JSON schema at {place[:LONGEST_REASON]}: {error.message[:LONGEST_REASON]}"
    except RecursionError:
        return "the schema is nested too deep"
    return None


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
                constraint, source = connection.recv()
            except (EOFError, OSError):
                return
            connection.send(trials.mistake_in(constraint, source))


if __name__ == "__main__":
    main(int(sys.argv[1]))
