"""A model of a directory that answers in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from raylm.data.chat import neutralize
from raylm.errors import UserError
from raylm.serving.terminal.chat import Messages

if TYPE_CHECKING:
    import torch

# Of what has been written, how long a piece is waited for.
PATIENCE_SECONDS = 300.0


class LocalModel:
    """See :class:`raylm.serving.terminal.chat.Answerer`.

    Args:
        path: run directory, model directory or hub name.
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws.

    Raises:
        UserError: there is no such model, it writes no text, or it has no chat template.
    """

    def __init__(self, path: str, max_new_tokens: int, temperature: float, seed: int) -> None:
        import torch

        from raylm.models.loading import load_model, load_parts

        _, self._tokenizer = load_parts(path, "MODEL")
        if not self._tokenizer.chat_template:
            raise UserError(f"MODEL: {path} has no chat template, allowed: a model that was trained on conversations")
        self.name, self._most = path, max_new_tokens
        self._model = load_model(path, key="MODEL").eval()
        self._sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        self._special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        torch.manual_seed(seed)

    def answer(self, messages: Messages) -> Iterator[str]:
        """See :class:`raylm.serving.terminal.chat.Answerer`; stops at the model's stop tokens."""
        from transformers import TextIteratorStreamer

        ids = self._encode(messages)
        streamer = TextIteratorStreamer(
            self._tokenizer, skip_prompt=True, timeout=PATIENCE_SECONDS, skip_special_tokens=True
        )
        stop = threading.Event()
        options: dict[str, Any] = {"streamer": streamer, "stopping_criteria": [lambda *_: stop.is_set()]}
        work = threading.Thread(target=self._write, args=(ids, options, streamer), daemon=True)
        work.start()
        try:
            for piece in streamer:
                if piece:
                    yield piece
        finally:
            stop.set()
            work.join(PATIENCE_SECONDS)

    def _write(self, ids: torch.Tensor, options: dict[str, Any], streamer: Any) -> None:
        import torch

        try:
            with torch.inference_mode():
                self._model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._most,
                    pad_token_id=self._tokenizer.pad_token_id, **self._sampling, **options,
                )  # fmt: skip
        finally:
            streamer.end()

    def _encode(self, messages: Messages) -> torch.Tensor:
        """The conversation as the server renders it, int64 [1, tokens]."""
        import torch

        safe = [message | {"content": neutralize(message["content"], self._special)} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"the chat template refuses this: {error}") from None
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        positions = getattr(self._model.config, "max_position_embeddings", None)
        if positions is not None and len(ids) >= positions:
            raise UserError(f"the conversation has {len(ids)} tokens, the model {positions} positions; /reset or /undo")
        return torch.tensor([ids])
