"""The conversation of ``raylm chat``: lines in, answers out as they are written.

In: who answers (:class:`Answerer`), lines of the user. Out: the answers on a stream. A line that begins with a slash is
a command. Works without a terminal too, so that a script can hold a conversation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from raylm.errors import UserError

HELP = """\
  /system TEXT   what the model is told first; without TEXT nothing
  /reset         forget what was said
  /undo          take back the last question and its answer
  /help          this
  /quit          end, as Ctrl-D does; Ctrl-C ends an answer"""
PROMPT = "> "
Messages = list[dict[str, str]]


class Answerer(Protocol):
    """A model, here or on a server.

    Attributes:
        name: of the model.
    """

    name: str

    def answer(self, messages: Messages) -> Iterator[str]:
        """The answer to a conversation, piece by piece.

        Raises:
            UserError: there is none to this conversation.
        """


@dataclass
class Chat:
    """A conversation.

    Attributes:
        answerer: who answers.
        system: what it is told first; empty for nothing.
        turns: what was said, users and answers in turn.
        output: where answers go.
    """

    answerer: Answerer
    system: str = ""
    turns: Messages = field(default_factory=list)
    output: TextIO = field(default_factory=lambda: sys.stdout)

    def run(self) -> None:
        """Read lines of standard input to their end."""
        interactive = sys.stdin.isatty()
        if interactive:
            # Lines can be edited, and former ones called back.
            import readline  # noqa: F401

            self._say(f"{self.answerer.name}; /help shows the commands")
        while True:
            try:
                line = input(PROMPT if interactive else "")
            except EOFError:
                if interactive:
                    self._say("")
                return
            except KeyboardInterrupt:
                # A line that was begun is thrown away; at an empty one it says how to end.
                self._say("\nCtrl-D or /quit ends")
                continue
            if not self.take(line):
                return

    def take(self, line: str) -> bool:
        """Act on a line; False where it ends the conversation."""
        line = line.strip()
        if not line:
            return True
        if line.startswith("/"):
            return self._command(*line[1:].partition(" ")[::2])
        self._ask(line)
        return True

    def _command(self, name: str, text: str) -> bool:
        if name in ("quit", "exit"):
            return False
        if name == "system":
            self.system = text.strip()
            self._say("the model is told so first" if self.system else "the model is told nothing first")
        elif name == "reset":
            self.turns.clear()
            self._say("forgotten")
        elif name == "undo":
            del self.turns[-2:]
            self._say(f"{len(self.turns) // 2} questions are left")
        elif name == "help":
            self._say(HELP)
        else:
            self._say(f"/{name}: unknown; allowed: /system, /reset, /undo, /help, /quit")
        return True

    def _ask(self, question: str) -> None:
        asked: Messages = [*self.turns, {"role": "user", "content": question}]
        told: Messages = [{"role": "system", "content": self.system}] if self.system else []
        pieces: list[str] = []
        try:
            for piece in self.answerer.answer([*told, *asked]):
                pieces.append(piece)
                self.output.write(piece)
                self.output.flush()
        except KeyboardInterrupt:
            pieces.append("")
        except UserError as error:
            # The question is not kept: the next one may fit.
            self._say(str(error))
            return
        self._say("")
        self.turns = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _say(self, text: str) -> None:
        self.output.write(f"{text}\n")
        self.output.flush()
