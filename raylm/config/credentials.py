"""Refuses addresses that hold a password or a key.

In: the values of a configuration as they were read. A run writes its configuration to ``config.yaml``, to reports and
to its storage, and messages show what was found: what must stay secret may not be in it.
"""

from __future__ import annotations

import re
from typing import Any

from raylm.config.base import LONGEST_PATH_BYTES
from raylm.config.mistakes import cut
from raylm.errors import UserError

# The user information of an address (RFC 3986, section 3.2.1) is in front of its host. A secret of AWS may hold slashes
# that should be encoded and are not. HOST:PORT is none.
_PASSWORD = re.compile(r"(?<![a-z])([a-z][a-z0-9+.-]{0,31})://[^/?#@\s:]*:(?!\d{1,5}(?:[/?#\s]|$))\S*@", re.IGNORECASE)
# Here a name alone is a key or a token; to hdfs:// it is a user, to abfs:// a container.
_TOKEN = re.compile(r"((?:[a-z0-9.-]{1,31}\+)?(?:s3[an]?|https?))://[^/?#@\s]+@", re.IGNORECASE)
_PARAMETER = re.compile(
    r"(?<![a-z])([a-z][a-z0-9+.-]{0,31})://\S*[?&]"
    r"([\w.-]*(?:secret|password|signature|security-token|session_token|(?:access|account|secret|api)[_-]?key)[\w.-]*"
    r"|token|sas_token|sig|x-(?:amz|goog)-credential)=",
    re.IGNORECASE,
)
_INSTEAD = {
    "s3": "the environment variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws",
    "gs": "the environment variable GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "the environment variables AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
    "http": "an environment variable where the key has a sibling for it (api_key_environment), or a local copy",
}
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs", "https": "http"}


def refuse_credentials(value: Any, origin: str, key: str = "") -> None:
    """Refuse an address with a user and a password, or with a secret as a parameter, anywhere in ``value``.

    Args:
        value: dictionaries, lists and plain values.
        origin: file or override that the message names.
        key: dotted key of ``value``.

    Raises:
        UserError: there is one; shows its scheme and no more of it.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            refuse_credentials(name, origin, key)
            refuse_credentials(inner, origin, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_credentials(inner, origin, key)
    elif isinstance(value, str) and (found := _scheme(value)) is not None:
        scheme, what = found
        kind = scheme.lower().rpartition("+")[2]
        instead = _INSTEAD.get(
            _ALIASES.get(kind, kind), "the environment or the configuration of the library that reads it"
        )
        place = f"{cut(key)}: " if key else ""
        raise UserError(
            f"{origin}: {place}found {what} in an address ({scheme}://...), allowed: an address without it; "
            f"credentials come from {instead}"
        )


def _scheme(text: str) -> tuple[str, str] | None:
    """Scheme of the address in ``text`` with a secret, and what holds it; None where there is none."""
    for word in text.split():
        if "://" not in word:
            continue
        # No address is longer, and the patterns are not linear.
        address = word[:LONGEST_PATH_BYTES]
        if match := _PASSWORD.search(address) or _TOKEN.search(address):
            return match[1], "a key or password"
        if match := _PARAMETER.search(address):
            return match[1], f"the secret parameter '{match[2]}'"
    return None
