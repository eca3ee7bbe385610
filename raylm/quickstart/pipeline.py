"""The whole pipeline on the embedded corpus, each stage the command that a user would type.

Runs prepare, pretrain, finetune, tune, evaluate and compress as subprocesses with the recipes of
``jobs/recipes/quickstart``, then serves the compressed model and asks it over HTTP. A stage that is done already says
so and is passed over.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylm.config import load_config
from raylm.data.sources.stdlib import question_about
from raylm.doctor.network import holder, port_error
from raylm.errors import RunFailure, UserError
from raylm.quickstart.display import Display, choose_display
from raylm.quickstart.questions import (
    HeldOutAnswers,
    ask_held_out,
    ask_question,
    described,
    shown_names,
    streamed_answer,
)
from raylm.quickstart.running import Command, MemoryWatch
from raylm.quickstart.screen import last_screen
from raylm.quickstart.stages import SERVE, STAGES, Stage
from raylm.recipes import recipes_directory

START_SECONDS, STAGE_SECONDS = 180.0, 3600.0
# Ports tried after the recipe's own.
OTHER_PORTS = 20
FAILURE_LINES = 15
# What a stage says that finds a run of other settings (raylm.config.run_directory).
OTHER_CONFIGURATION = "was started with another configuration"
RESULTS = Path("runs") / "quickstart"


@dataclass
class Run:
    """One run of the quickstart.

    Attributes:
        directory: working directory of all stages.
        display: what is told of them.
        overrides: by stage, ``dotted.key=value`` beside its recipe.
        results: of the finished stages, in a few words.
    """

    directory: Path
    display: Display
    overrides: Mapping[str, Sequence[str]]
    recipes: Path = field(default_factory=lambda: recipes_directory() / "quickstart")
    results: dict[str, str] = field(default_factory=dict)

    def arguments(self, stage: Stage) -> list[str]:
        """Of the stage's command."""
        return [stage.name, str(self.recipes / f"{stage.name}.yaml"), *self.overrides.get(stage.name, ())]

    def config(self, stage: Stage) -> Any:
        """The stage's configuration."""
        name, recipe, *overrides = self.arguments(stage)
        return load_config(name, recipe, overrides)

    def report(self, stage: Stage) -> dict[str, Any] | None:
        """The stage's ``report.json``; None before it is done."""
        section = self.config(stage).run
        path = self.directory / section.storage / section.name / "report.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @contextlib.contextmanager
    def started(self, stage: Stage) -> Iterator[Command]:
        """The stage's command while the block lasts; it logs to ``runs/quickstart/logs/STAGE.log`` if not shown."""
        log = None if self.display.shows_output else self.directory / RESULTS / "logs" / f"{stage.name}.log"
        self.display.begin(stage, " ".join(["raylm", *self.arguments(stage)]))
        with Command([sys.executable, "-m", "raylm.cli", *self.arguments(stage)], self.directory, log) as command:
            try:
                yield command
            except KeyboardInterrupt:
                self.display.poll(None, f"stopping {stage.name} ...")
                raise

    def poll(self, command: Command) -> None:
        """Tell the display what the command is at."""
        self.display.poll(command.progress(), "".join(command.last_lines(1)))

    def failure(self, stage: Stage, command: Command, what: str) -> RunFailure:
        """With the last of the stage's output, where it went to a log."""
        if command.log is None:
            return RunFailure(f"quickstart: {stage.name} {what}; see above")
        lines = command.last_lines(FAILURE_LINES)
        if any(OTHER_CONFIGURATION in line for line in lines):
            what += f" ({self.directory / RESULTS} is of another version: remove it, or give another --directory)"
        text = "\n".join(f"  {line}" for line in lines)
        return RunFailure(f"quickstart: {stage.name} {what}; the last lines of {command.log}:\n{text}")


def run_quickstart(
    directory: Path, *, keep_serving: bool = False, overrides: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Run everything with ``directory`` as the working directory; its ``runs/quickstart`` holds the results.

    Args:
        keep_serving: leave the server running at the end, until Ctrl-C.
        overrides: by stage, ``dotted.key=value`` beside its recipe.

    Raises:
        UserError: the directory cannot be written, or the server's port cannot be taken; nothing was started.
        RunFailure: a stage failed; the same command goes on from there.
    """
    run = Run(directory, choose_display(STAGES), dict(overrides or {}))
    _make_writable(directory / RESULTS / "logs")
    _find_port(run)
    began = time.monotonic()
    *stages, serve = STAGES
    with _told_of_interrupts(), MemoryWatch() as memory, contextlib.ExitStack() as server:
        with run.display:
            for stage in stages:
                _run_stage(run, stage)
            url, command = server.enter_context(_server(run, serve))
        answers = _ask(url, directory / RESULTS)
        run.results["questions"] = f"{answers.with_passage} of {len(answers.answers)} right"
        seconds = time.monotonic() - began
        print(last_screen(run.results, url, seconds, memory.peak, directory, serving=keep_serving), flush=True)
        if keep_serving:
            _wait_for_ctrl_c(run, serve, command)


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"\0")
    except OSError as error:
        raise UserError(
            f"{folder.parent.resolve()} cannot be written: {error.strerror}; "
            "start in another directory, or give one: raylm quickstart --directory DIRECTORY"
        ) from None


def _find_port(run: Run) -> None:
    """Move the server to a free port where its own is taken, and say so.

    Raises:
        UserError: no port nearby is free.
    """
    serving = run.config(STAGES[-1]).serving
    error = port_error(serving.port, serving.host)
    if not error:
        return
    who = holder(serving.port)
    taken = f"port {serving.port} is {error}{f' by {who}' if who else ''}"
    for port in range(serving.port + 1, min(serving.port + 1 + OTHER_PORTS, 2**16)):
        if not port_error(port, serving.host):
            print(f"quickstart: {taken}; the server takes port {port}", file=sys.stderr, flush=True)
            run.overrides = {**run.overrides, SERVE: [*run.overrides.get(SERVE, ()), f"serving.port={port}"]}
            return
    raise UserError(f"{taken}, and so are the {OTHER_PORTS} after it; end the process that listens there")


@contextlib.contextmanager
def _told_of_interrupts() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("\nquickstart: stopped; the same command goes on from here", file=sys.stderr, flush=True)
        raise


def _run_stage(run: Run, stage: Stage) -> None:
    done_before = run.report(stage) is not None
    deadline = time.monotonic() + STAGE_SECONDS
    with run.started(stage) as command:
        status = command.wait(lambda: run.poll(command), until=lambda: time.monotonic() > deadline)
        if status is None:
            raise run.failure(stage, command, f"did not end within {STAGE_SECONDS:.0f} s")
        if status:
            raise run.failure(stage, command, f"ended with status {status}")
        report = run.report(stage)
        if report is None:
            raise run.failure(stage, command, "wrote no report")
    run.results[stage.name] = stage.result(report)
    run.display.finish(run.results[stage.name], worked=not done_before)


@contextlib.contextmanager
def _server(run: Run, stage: Stage) -> Iterator[tuple[str, Command]]:
    """The running server, and its address ``http://HOST:PORT``."""
    _find_port(run)  # it was free some minutes ago
    serving = run.config(stage).serving
    url = f"http://{serving.host}:{serving.port}"
    with run.started(stage) as command:
        deadline = time.monotonic() + START_SECONDS
        status = command.wait(lambda: run.poll(command), until=lambda: _healthy(url) or time.monotonic() > deadline)
        if status is not None:
            raise run.failure(stage, command, f"ended with status {status}")
        if not _healthy(url):
            raise run.failure(stage, command, f"did not answer within {START_SECONDS:.0f} s")
        run.display.finish(f"{url}/")
        yield url, command


def _wait_for_ctrl_c(run: Run, stage: Stage, command: Command) -> None:
    """Until Ctrl-C, which is this command's ordinary end.

    Raises:
        RunFailure: the server ended by itself.
    """
    with contextlib.suppress(KeyboardInterrupt):
        status = command.wait(lambda: None)
        raise run.failure(stage, command, f"ended with status {status}")


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _ask(url: str, runs: Path) -> HeldOutAnswers:
    """Show answers, the last one as it streams, and the figures of the held-out questions."""
    pairs = runs / "finetune" / "data"
    *whole, streamed = shown_names(pairs, runs / "data")
    for name in whole:
        print("\n".join(f"   {line}" for line in described(name, ask_question(url, question_about(name)))), flush=True)
    print(f"   question: {question_about(streamed)}\n   streamed: ", end="", flush=True)
    for piece in streamed_answer(url, question_about(streamed)):
        print(piece, end="", flush=True)
    print(flush=True)
    answers = ask_held_out(url, pairs)
    (runs / "answers.json").write_text(json.dumps(answers.as_dict(), indent=2), encoding="utf-8")
    for line in answers.lines():
        print(f"   {line}", flush=True)
    return answers
