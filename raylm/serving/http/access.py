"""Who may ask. API keys are read from a file or the environment where the server is started, and hashed before they go
anywhere else. A server without keys answers only requests to a loopback name.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from pathlib import Path

from raylm.cluster.environment import API_KEYS_VARIABLE
from raylm.config.serving import ServingSection
from raylm.errors import UserError

_HASH = re.compile(r"sha256:([0-9a-f]{64})")
# Shorter keys could be guessed.
LEAST_CHARACTERS = 16


def hash_key(key: str) -> str:
    """SHA-256 of ``key``, hexadecimal. Keys are long and random, so a plain hash cannot be turned back."""
    return hashlib.sha256(key.encode()).hexdigest()


def names_loopback(host: str) -> bool:
    """Whether a ``Host`` header, with or without a port, is ``localhost`` or a loopback address.

    A page of the web may have its own name resolved to this machine (DNS rebinding), and its reader's browser then lets
    it ask whatever listens here. The name in ``Host`` stays the page's.
    """
    name = re.sub(r":\d*$", "", host.strip()).lower()
    if name == "localhost":
        return True
    try:
        # Only a literal in brackets is an IPv6 address here.
        return ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name).is_loopback
    except ValueError:
        return False


def load_key_hashes(serving: ServingSection) -> dict[str, str]:
    """Hashes of the keys in ``serving.api_keys_file`` and RAYLM_API_KEYS, and what logs call each.

    A line of the file is a key, or ``sha256:`` and its hash, then perhaps a name; ``#`` starts a comment. The variable
    holds the same entries, separated by commas.

    Raises:
        UserError: no such file, no key in it, or a key of fewer than 16 characters; never shows a key.
    """
    entries: list[tuple[str, str]] = []
    if serving.api_keys_file is not None:
        path = Path(serving.api_keys_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"serving.api_keys_file: {path} cannot be read: {type(error).__name__}") from None
        entries = [
            (f"{path}:{number}", line.partition("#")[0].strip())
            for number, line in enumerate(lines, 1)
            if line.partition("#")[0].strip()
        ]
        if not entries:
            raise UserError(f"serving.api_keys_file: {path} holds no key")
    variable = os.environ.get(API_KEYS_VARIABLE, "")
    entries += [(API_KEYS_VARIABLE, entry.strip()) for entry in variable.split(",") if entry.strip()]
    return dict(_read_entry(where, entry) for where, entry in entries)


def check_origins(serving: ServingSection, key_hashes: dict[str, str]) -> None:
    """Refuse to let every web page ask a server that asks nobody for a key.

    Raises:
        UserError: names the key.
    """
    if "*" in serving.allowed_origins and not key_hashes:
        raise UserError(
            "serving.allowed_origins: found *, allowed: origins such as https://chat.example.org, as there are no API "
            f"keys (serving.api_keys_file or {API_KEYS_VARIABLE})"
        )


def _read_entry(where: str, entry: str) -> tuple[str, str]:
    key, _, name = entry.partition(" ")
    found = _HASH.fullmatch(key)
    if found is None and len(key) < LEAST_CHARACTERS:
        raise UserError(f"{where}: found a key of {len(key)} characters, allowed: at least {LEAST_CHARACTERS}")
    hashed = found[1] if found else hash_key(key)
    return hashed, name.strip() or f"key-{hashed[:8]}"
