"""A served model that ``data.augmentation`` asks: any server with OpenAI's ``/models`` and ``/chat/completions``.

In: prompts with a seed each. Out: answers. Requests are bounded in number and time and are tried again where the
failure may pass; each answer is written to a log at once, so that a prepare which goes on asks only what is left.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import aiohttp

from raylm.config.augmentation import ServedModelSection
from raylm.errors import UserError

CHECK_SECONDS = 20.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
PASSING = {408, 409, 425, 429}
MOST_REASON = 200


class Unanswered(Exception):
    """A request without a usable answer; the text says why."""


class AnswerLog:
    """Answers by request, a JSON object a line.

    Args:
        path: the log; what an earlier start wrote is read, a line that was cut off aside.
    """

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, str] = {}
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            row = json.loads(line)
            self.answers[row["request"]] = row["answer"]
        self._stream = path.open("r+b" if content else "wb")
        self._stream.truncate(len(whole))
        self._stream.seek(len(whole))

    def add(self, request: str, answer: str) -> None:
        """Keep one answer."""
        self.answers[request] = answer
        self._stream.write(json.dumps({"request": request, "answer": answer}).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class ServedModel:
    """Asks the model; use within ``async with``, as it holds connections.

    Args:
        section: where it is, and how it is asked.
        name: of the model.
        api_key: None where the server wants none.
        log: where answers are kept.

    Attributes:
        requests, failures: so far; answers of the log count as requests.
        reasons: why requests failed, with how often.
    """

    def __init__(self, section: ServedModelSection, name: str, api_key: str | None, log: AnswerLog) -> None:
        self._section, self._name, self._log = section, name, log
        self._headers = _headers(api_key)
        self.requests = self.failures = 0
        self.reasons: dict[str, int] = {}

    async def __aenter__(self) -> ServedModel:
        self._places = asyncio.Semaphore(self._section.concurrency)
        self._session = aiohttp.ClientSession(
            headers=self._headers, timeout=aiohttp.ClientTimeout(total=self._section.timeout_seconds)
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    @property
    def too_many_failures(self) -> bool:
        """Whether more requests failed than ``max_failures`` allows (of the first ten, than of ten)."""
        return self.failures > self._section.max_failures * max(10, self.requests)

    async def ask(self, prompt: str, seed: int) -> str:
        """The answer to ``prompt``, without white space around it.

        Raises:
            Unanswered: there is none, or it was cut off.
        """
        body = {
            "model": self._name,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self._section.temperature,
            "max_tokens": self._section.max_tokens,
            "seed": seed,
        }
        request = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        self.requests += 1
        if request in self._log.answers:
            return self._log.answers[request]
        async with self._places:
            answer = await self._try(body)
        self._log.add(request, answer)
        return answer

    def fail(self, reason: str) -> None:
        """Count a request that gave nothing usable."""
        self.failures += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    async def _try(self, body: dict[str, Any]) -> str:
        pause = FIRST_PAUSE
        for left in range(self._section.retries, -1, -1):
            try:
                async with self._session.post(
                    f"{self._section.base_url.rstrip('/')}/chat/completions", json=body
                ) as reply:
                    if reply.status == 200:
                        return _answer(await reply.json(content_type=None))
                    reason = f"status {reply.status}: {_message(await reply.text())}"
                    passing = reply.status in PASSING or reply.status >= 500
                    wished = reply.headers.get("Retry-After", "")
            except TimeoutError:
                reason, passing, wished = f"no answer within {self._section.timeout_seconds:g} s", True, ""
            except (aiohttp.ClientError, OSError) as error:
                reason, passing, wished = f"no connection: {error or type(error).__name__}", True, ""
            except ValueError:
                raise Unanswered("an answer that is no JSON") from None
            if not passing or not left:
                raise Unanswered(reason[:MOST_REASON])
            await asyncio.sleep(min(LONGEST_PAUSE, max(pause, float(wished) if wished.isdigit() else 0.0)))
            pause *= 2
        raise AssertionError("unreachable")


def _answer(reply: Any) -> str:
    try:
        choice = reply["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Unanswered("an answer without choices[0].message.content") from None
    if reason == "length":
        raise Unanswered("an answer longer than max_tokens")
    if not isinstance(text, str) or not text.strip():
        raise Unanswered("an empty answer")
    return text.strip()


def _message(text: str) -> str:
    """What OpenAI's error object says, else the beginning of the text."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:MOST_REASON]


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def find_key(section: ServedModelSection) -> str | None:
    """The key in this process's environment; None where none is asked for.

    Raises:
        UserError: the variable is not set.
    """
    name = section.api_key_environment
    if name is None:
        return None
    if not os.environ.get(name):
        raise UserError(f"data.augmentation.model.api_key_environment: found {name}, which is not set")
    return os.environ[name]


def find_model(section: ServedModelSection) -> str:
    """The name of the model, after the server was asked for what it has.

    Raises:
        UserError: it cannot be reached, refuses the key, or has another model, or several and none is named.
    """
    return asyncio.run(_find_model(section, find_key(section)))


async def _find_model(section: ServedModelSection, api_key: str | None) -> str:
    place = f"data.augmentation.model.base_url: {section.base_url}"
    timeout = aiohttp.ClientTimeout(total=min(CHECK_SECONDS, section.timeout_seconds))
    try:
        async with (
            aiohttp.ClientSession(headers=_headers(api_key), timeout=timeout) as session,
            session.get(f"{section.base_url.rstrip('/')}/models") as reply,
        ):
            if reply.status != 200:
                raise UserError(f"{place}/models: status {reply.status}: {_message(await reply.text())}")
            names = [str(model["id"]) for model in (await reply.json(content_type=None))["data"]]
    except TimeoutError:
        raise UserError(f"{place} does not answer within {timeout.total:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise UserError(f"{place} cannot be reached: {error or type(error).__name__}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place}/models: no list of models, as OpenAI's servers give") from None
    if section.name is None and len(names) == 1:
        return names[0]
    if section.name not in names:
        found = section.name or "none"
        raise UserError(f"data.augmentation.model.name: found {found}, allowed: {', '.join(names) or 'none'}")
    return section.name
