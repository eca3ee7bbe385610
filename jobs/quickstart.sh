#!/usr/bin/env bash
# Text to a served answer on this machine: installs the pinned set into .venv, then runs `raylm quickstart`.
# Run again, it goes on where it stopped. `--serve` keeps the server running at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/environment.sh
exec raylm quickstart "$@"
