"""Who may talk to the Ray that raylm starts on this machine: its own processes, and whoever can read their token.

Ray runs whatever it is sent, and its processes listen on all addresses of the machine unless told otherwise. Two doors
are shut: the processes listen on the loopback address, where Ray lets them; and every call needs a token, so that other
users of the machine stay out too. In: nothing. Out: environment variables, which the processes of Ray inherit. Relies
on Ray's token authentication (https://docs.ray.io/en/latest/ray-security/token-auth.html). Needs the standard library
only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator

from raylm.cluster.environment import default_environment

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
# By its name for other systems. On Linux, where the default is 1, it decides as well whether a local Ray takes the
# machine's address or the loopback address as its own; all its processes then listen on that one.
CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextlib.contextmanager
def local_access() -> Iterator[None]:
    """Environment in which a local Ray is started, used and stopped.

    The token is in a file that only this user can read, and goes with it at the end of the block. A mode or token that
    the user chose with Ray's own variables stays. Ray's default, a token in ``~/.ray/auth_token``, would outlive the
    run and be as readable as the umask says.
    """
    variables = {CLUSTERS: "0"}
    with contextlib.ExitStack() as stack:
        if MODE not in os.environ:
            variables[MODE] = "token"
            if not (os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH)):
                variables[TOKEN_PATH] = stack.enter_context(_token_file())
        stack.enter_context(default_environment(variables))
        reread_environment()
        yield


def reread_environment() -> None:
    """Let a Ray that is imported already look at the variables again, for which it has no public way.

    It keeps the first token that it saw, and reads :data:`CLUSTERS` when it is imported.
    """
    if "ray" in sys.modules:
        from ray._private import ray_constants
        from ray._raylet import AuthenticationTokenLoader, Config

        ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(CLUSTERS, not ray_constants.IS_WINDOWS_OR_OSX)
        # In this order: threads of an earlier session may still ask for a token, which the mode says must be there.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _token_file() -> Iterator[str]:
    """Path of a new token, mode 0600."""
    with tempfile.NamedTemporaryFile("w", prefix="raylm-ray-", suffix=".token") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        yield file.name
