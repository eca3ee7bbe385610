#!/usr/bin/env bash
# The one test command: makes .venv if needed, runs the linter and the tests. Arguments go to pytest.
# Two processes take a file of tests each at a time: Ray's starts and waits in one leave the CPUs to the other. `-n 0`
# runs all in one process. One that dies (a test over its time limit ends it) is not replaced, which would run that test
# again and again.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/environment.sh --test
ruff check .
ruff format --check .
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec python -m pytest -n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder "$@"
