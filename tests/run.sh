#!/usr/bin/env bash
# The one test command: makes .venv if needed, runs the linter and the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/environment.sh
ruff check .
ruff format --check .
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec python -m pytest "$@"
