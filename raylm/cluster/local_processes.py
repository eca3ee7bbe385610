"""Processes of a local Ray that nobody asks for anything, and which are not started: a third of what its start costs.

Ray has no public option for either: the monitor, which hands the workers' output to a driver that wants it
(``log_to_driver``; raylm does not), and without a dashboard its server, which then counts usage statistics only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def only_what_is_used(*, dashboard: bool) -> Iterator[None]:
    """Let a Ray that starts within the block do without them.

    Args:
        dashboard: start its server.
    """
    from ray._private.node import Node

    names = ["start_log_monitor", *([] if dashboard else ["start_api_server"])]
    # Another version of Ray may have others: it starts all of its own.
    kept = {name: getattr(Node, name) for name in names if hasattr(Node, name)}
    for name in kept:
        setattr(Node, name, _nothing)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


def _nothing(self: object, **options: object) -> None:
    """In place of a start."""
