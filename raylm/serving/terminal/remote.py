"""A model behind an OpenAI-compatible server that answers over HTTP."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

from raylm.errors import UserError
from raylm.serving.terminal.chat import Messages

PATIENCE_SECONDS = 300.0
KEYS = ("RAYLM_API_KEY", "OPENAI_API_KEY")
EVENT, LAST = b"data:", "[DONE]"


class RemoteModel:
    """See :class:`raylm.serving.terminal.chat.Answerer`.

    Args:
        url: of the server, with ``/v1`` or without. The variables of ``KEYS`` hold its API key.
        model: name of the model; None for the first that the server offers.

    Raises:
        UserError: the server cannot be reached, or refuses.
    """

    def __init__(self, url: str, model: str | None, max_new_tokens: int, temperature: float, seed: int) -> None:
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._options = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        if model is None:
            with self._open("/models") as response:
                offered = json.load(response).get("data") or []
            if not offered:
                raise UserError(f"MODEL: {url} offers no model")
            model = offered[0]["id"]
        self.name = str(model)

    def answer(self, messages: Messages) -> Iterator[str]:
        """See :class:`raylm.serving.terminal.chat.Answerer`."""
        body = {"model": self.name, "messages": messages, "stream": True, **self._options}
        with self._open("/chat/completions", body) as response:
            for line in response:
                if not line.startswith(EVENT):
                    continue
                content = line.removeprefix(EVENT).strip().decode()
                if content == LAST:
                    return
                event = json.loads(content)
                if "error" in event:
                    raise UserError(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices", ()):
                    yield choice.get("delta", {}).get("content") or ""

    def _open(self, route: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if key := next(filter(None, map(os.environ.get, KEYS)), None):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._base + route, data, headers)
            return urllib.request.urlopen(request, timeout=PATIENCE_SECONDS)
        except urllib.error.HTTPError as error:
            raise UserError(f"{self._base}: {_message(error)}") from None
        except (urllib.error.URLError, ValueError, OSError) as error:
            raise UserError(f"MODEL: {self._base} cannot be reached: {getattr(error, 'reason', error)}") from None


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says went wrong."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {error.code}"
