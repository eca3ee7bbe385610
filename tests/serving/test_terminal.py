"""``raylm chat``: its commands and its answers; test_command.py has the same answers over HTTP, beside its server."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylm.cli import main
from raylm.errors import UserError
from raylm.serving.terminal.chat import Chat
from raylm.serving.terminal.local import LocalModel


def said(chat: Chat, *lines: str) -> list[str]:
    """What each line is answered with."""
    found = []
    for line in lines:
        chat.output = io.StringIO()
        chat.take(line)
        found.append(chat.output.getvalue())
    return found


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> LocalModel:
    return LocalModel(str(tiny_model), 8, 0.0, 0)


def test_an_answer_is_what_the_model_writes_after_its_template(local: LocalModel, tiny_model: Path) -> None:
    chat = Chat(local, "be kind")
    (answer,) = said(chat, "hello there")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        written = model.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :]
    expected = tokenizer.decode(written, skip_special_tokens=True)
    assert answer == f"{expected}\n"
    assert [turn["content"] for turn in chat.turns] == ["hello there", expected]
    # What was said before is given again.
    (second,) = said(chat, "and then")
    assert len(chat.turns) == 4 and second.endswith("\n")


def test_commands(local: LocalModel) -> None:
    chat = Chat(local)
    said(chat, "one", "two")
    answers = said(chat, "/undo", "/system  Be brief. ", "/nonsense", "/reset", "/help", "  ")
    assert answers[0] == "1 questions are left\n" and chat.system == "Be brief." and chat.turns == []
    assert answers[2].startswith("/nonsense: unknown; allowed: /system, /reset")
    assert "/undo" in answers[4] and answers[5] == ""
    assert not chat.take("/quit")


def test_a_conversation_that_is_too_long_loses_nothing(local: LocalModel) -> None:
    chat = Chat(local)
    said(chat, "one")
    before = list(chat.turns)
    (answer,) = said(chat, "word " * 2000)
    assert "tokens, the model" in answer and "/reset or /undo" in answer and chat.turns == before


def test_lines_of_a_pipe(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "raylm.cli", "chat", str(tiny_model), "--max-new-tokens", "4"]
    result = subprocess.run(command, input="hello\n/undo\n", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.endswith("0 questions are left\n"), result.stderr


def test_mistakes_are_one_line(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        ([str(tmp_path / "nothing")], "MODEL: "),
        (["http://127.0.0.1:9"], "MODEL: http://127.0.0.1:9/v1 cannot be reached"),
        ([str(tiny_model), "--temperature", "9"], "--temperature: found 9.0, allowed: 0 to 2.0"),
    ):
        assert main(["chat", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and expected in error


def test_a_model_without_a_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    for path in tiny_model.iterdir():
        if not (tmp_path / path.name).exists() and path.suffix != ".jinja" and path.is_file():
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match="has no chat template"):
        LocalModel(str(tmp_path), 8, 0.0, 0)
