"""The chat template of a tokenizer directory: conversations to text, as transformers and the server render them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from raylm.errors import UserError, first_line

Turns = Sequence[dict[str, Any]]
# With what a template marks what the assistant writes.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Renders conversations.

    Args:
        directory: of the tokenizer.
        tokenizer: its rules, which know the special tokens.

    Raises:
        UserError: it has several templates and none named default.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        template = directory / "chat_template.jinja"
        if not template.is_file():
            # So transformers saves a tokenizer with several, which it asks for by name.
            raise UserError(
                "tokenizer.path: it has several chat templates and none named default, which pairs and conversations "
                "are laid out with; name one of them default in its tokenizer_config.json"
            )
        self._text = template.read_text(encoding="utf-8")
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        # What transformers hands to a template: the named special tokens.
        self._named = {
            key: value if isinstance(value, str) else value["content"]
            for key, value in settings.items()
            if key.endswith("_token") and isinstance(value, str | dict)
        }
        self.special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self.marks_answers = GENERATION.search(self._text) is not None

    def render(
        self, conversations: Sequence[Turns], what: str, *, tools: list[Any] | None = None, ask: bool = False
    ) -> list[str]:
        """The text of each conversation.

        Args:
            what: they are, for the message.
            tools: that may be called in them.
            ask: end with what stands before an answer.

        Raises:
            UserError: the template refuses one.
        """
        return self._rendered(conversations, what, tools, add_generation_prompt=ask)[0]

    def render_marked(self, turns: Turns, what: str, tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the places, in characters, that the template marks as written by the
        assistant."""
        texts, marks = self._rendered([turns], what, tools, return_assistant_tokens_mask=True)
        return texts[0], [tuple(place) for place in marks[0]]

    def _rendered(self, conversations: Sequence[Turns], what: str, tools: list[Any] | None, **options: Any) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            return render_jinja_template(
                conversations=conversations, chat_template=self._text, tools=tools, **options, **self._named
            )
        except Exception as error:  # noqa: BLE001 - a template computes anything, and fails in as many ways
            raise UserError(f"tokenizer.path: its chat template refuses {what}: {first_line(error)}") from None
