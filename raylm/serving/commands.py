"""The commands that try a model out. What they do is imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raylm.interrupts import ended_at_once

TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token each time; above, samples.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the sampling.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to ``raylm``."""
    for command in (generate, chat):
        app.command()(command)


def generate(
    model: Annotated[Path, typer.Argument(help="Model or run directory.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
) -> None:
    """Generate text from a prompt, without a server.

    Reads MODEL: a run directory, a Hugging Face directory or a hub name. Prints PROMPT's continuation.

    \b
    Example:
      raylm generate runs/quickstart/pretrain "Return the" --max-new-tokens 32
    """
    from raylm.evaluation.generation import generate_text

    with ended_at_once():
        text = generate_text(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    print(text)


def chat(
    model: Annotated[str, typer.Argument(help="Model or run directory, or URL of a server.", show_default=False)],
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    name: Annotated[str | None, typer.Option(help="Which model of the server.", show_default=False)] = None,
) -> None:
    """Talk with a model in the terminal, here or over HTTP.

    Answers appear as they are written. /system, /reset, /undo, /help and /quit are commands; Ctrl-C ends an answer. A
    server's API key is read from RAYLM_API_KEY or OPENAI_API_KEY.

    \b
    Examples:
      raylm chat runs/quickstart/finetune
      raylm chat http://127.0.0.1:8000 --system "Answer in one sentence."
    """
    from raylm.evaluation.generation import check_options
    from raylm.serving.terminal.chat import Chat

    check_options(system, max_new_tokens, temperature, seed, text="--system")
    if model.startswith(("http://", "https://")):
        from raylm.serving.terminal.remote import RemoteModel

        Chat(RemoteModel(model, name, max_new_tokens, temperature, seed), system).run()
        return
    from raylm.serving.terminal.local import LocalModel

    with ended_at_once():
        answerer = LocalModel(model, max_new_tokens, temperature, seed)
    Chat(answerer, system).run()
