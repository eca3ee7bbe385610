"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="http://HOST:8265 of the cluster's dashboard; by default RAY_API_SERVER_ADDRESS, or else this machine.",
        show_default=False,
    ),
]
