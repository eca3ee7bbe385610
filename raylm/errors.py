"""The one exception that a user's mistake raises.

Every stage validates before it starts; what it finds wrong becomes a :class:`UserError` whose text is one
line naming the key or the file and line, the value found and what is allowed. The command line prints it and
exits with status 2. Everything else that goes wrong is a failure at run time, status 1.
"""


class UserError(Exception):
    """The configuration or the input is wrong; nothing was started and nothing was written."""

    def __init__(self, message: str) -> None:
        # What a user named may hold characters that steer a terminal, or turn the direction of what follows.
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


class RunFailure(Exception):
    """A run failed after it had started; the text names the first failing rank's own error and its log."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for one-line messages; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
