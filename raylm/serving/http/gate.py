"""What every request passes before it reaches a route: host name or API key, rate, body size, and its line in the log.

Plain ASGI, so that streams pass through untouched. Limits are those of one replica.
"""

from __future__ import annotations

import math
import re
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raylm.cluster.environment import API_KEYS_VARIABLE
from raylm.config.serving import ServingSection
from raylm.serving.http import request_log
from raylm.serving.http.access import hash_key, names_loopback
from raylm.serving.http.errors import RequestError
from raylm.serving.http.metrics import ServerMetrics

# Open to everybody: load balancers ask for the first, browsers open the second before they have a key to send.
OPEN_PATHS = frozenset({"/health", "/"})
# Of a path, as the log has it.
LONGEST_PATH = 200
# In a request's scope: the SHA-256 of its key, hexadecimal; not there where there are no keys.
OWNER = "raylm.owner"
_REQUEST_ID = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    Attributes:
        body_bytes: longest body.
        requests_per_minute: of one key (of all clients together where there are no keys); None without a limit.
    """

    body_bytes: int
    requests_per_minute: int | None

    @classmethod
    def of(cls, serving: ServingSection) -> Limits:
        """As the configuration has them."""
        return cls(int(serving.max_body_megabytes * 1e6), serving.requests_per_minute)


class Gate:
    """ASGI middleware around the application.

    Args:
        app: the application.
        limits: what one client may ask for.
        key_hashes: SHA-256 of each key and its name; empty lets in whoever asks for a loopback name.
        metrics: counts the answers.
    """

    def __init__(self, app: ASGIApp, limits: Limits, key_hashes: dict[str, str], metrics: ServerMetrics) -> None:
        self._app, self._limits, self._key_hashes, self._metrics = app, limits, key_hashes, metrics
        self._allowances: dict[str, Allowance] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        entry: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": request_id,
            "method": scope["method"],
            "path": scope["path"][:LONGEST_PATH],
            "status": None,
        }
        request_log.begin(entry)
        began = time.monotonic()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                # Serve names a request that has no id, and says the id it came with in the answer, behind HAProxy too.
                if request_id != given:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            try:
                self._check(scope, headers, entry)
            except RequestError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, sending)
            else:
                await self._app(scope, self._limited(receive), sending)
        finally:
            # A status of None says that the client left before there was an answer.
            entry["milliseconds"] = round((time.monotonic() - began) * 1e3, 1)
            request_log.write(entry)
            # Of a path that no route has, only that it was none: anybody can invent names.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.http(route, entry["status"])

    def _check(self, scope: Scope, headers: Headers, entry: dict[str, Any]) -> None:
        """Refuse a strange host name, a wrong key, too many requests, and a body that says it is too long.

        Notes whose request it is.
        """
        if not self._key_hashes:
            _check_host(headers)
        if scope["path"] in OPEN_PATHS:
            return
        name, hashed = self._identify(headers)
        if hashed is not None:
            scope[OWNER] = hashed
        entry["key"] = name
        if self._limits.requests_per_minute is not None:
            allowance = self._allowances.setdefault(name, Allowance(self._limits.requests_per_minute))
            wait = allowance.take(time.monotonic())
            if wait:
                allowed = f"{self._limits.requests_per_minute} requests a minute"
                raise RequestError(
                    f"Rate limit reached: {allowed}; try again in {wait:.1f} s",
                    status=429,
                    code="rate_limit_exceeded",
                    kind="rate_limit_error",
                    headers={"Retry-After": str(math.ceil(wait))},
                )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            raise RequestError(self._too_long, status=413, code="body_too_large", headers={"Connection": "close"})

    def _identify(self, headers: Headers) -> tuple[str, str | None]:
        """The name of the request's key, and its hash where there are keys."""
        if not self._key_hashes:
            return "anyone", None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Looked up by hash: how long it takes says nothing about any key.
        hashed = hash_key(key.strip())
        name = self._key_hashes.get(hashed) if scheme.lower() == "bearer" else None
        if name is None:
            raise RequestError(
                "Incorrect API key; send it as 'Authorization: Bearer KEY'"
                if key
                else "No API key; send it as 'Authorization: Bearer KEY'",
                status=401,
                code="invalid_api_key",
                kind="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return name, hashed

    @property
    def _too_long(self) -> str:
        return f"The body is too large; allowed: at most {self._limits.body_bytes} bytes"

    def _limited(self, receive: Receive) -> Receive:
        """``receive`` that refuses a body longer than allowed, whatever its header says."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limits.body_bytes:
                raise HTTPException(413, self._too_long)
            return message

        return limited


def _check_host(headers: Headers) -> None:
    """Refuse a name that is none of this machine's own; a client without one (HTTP/1.0) is no browser."""
    for host in headers.getlist("host"):
        if not names_loopback(host):
            raise RequestError(
                f"Host: found {host[:LONGEST_PATH]!r}, allowed: localhost or a loopback address (127.0.0.1), as the "
                f"server has no API keys (serving.api_keys_file or {API_KEYS_VARIABLE})",
                status=421,
                code="unknown_host",
            )


class Allowance:
    """Requests that one key may still send: they come back evenly over a minute (a token bucket).

    Args:
        per_minute: allowed in a minute, and at once after a minute of rest.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._left, self._seen = float(per_minute), -math.inf

    def take(self, now: float) -> float:
        """Take one at ``now`` seconds; the seconds to wait where there is none, else 0."""
        returned = max(0.0, now - self._seen) * self._per_minute / 60
        self._left, self._seen = min(float(self._per_minute), self._left + returned), now
        if self._left < 1:
            return (1 - self._left) * 60 / self._per_minute
        self._left -= 1
        return 0.0
