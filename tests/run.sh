#!/usr/bin/env bash
# The one test command: makes .venv if needed, runs the linter and the tests. Arguments go to pytest.
# Two processes take a file of tests each at a time: Ray's starts and waits in one leave the CPUs to the other. `-n 0`
# runs all in one process. One that dies (a test over its time limit ends it) is not replaced, which would run that test
# again and again.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1-}" in
-h | --help)
    cat <<'HELP'
Usage: bash tests/run.sh [ARGUMENTS OF PYTEST]

Makes .venv if it is missing, then runs the linter (ruff) and the tests (pytest).
On two slow cores all tests take up to 55 minutes, those that are not slow up to 9; fast cores need half of it.

  bash tests/run.sh                              all tests
  bash tests/run.sh -m "not slow"                the fast tests (below 20 seconds each)
  bash tests/run.sh -m serving                   the tests of one topic
  bash tests/run.sh -m "training and not slow"   the fast tests of one topic
  bash tests/run.sh tests/config                 one folder
  bash tests/run.sh tests/config/test_loading.py one file
  bash tests/run.sh -k resuming                  tests whose name contains a word
  bash tests/run.sh -n 0                         in one process (for a debugger); two by default
  bash tests/run.sh -x                           stop at the first failure

HELP
    echo "Markers (a folder of tests/ is a topic):"
    # The entries of `markers` in pyproject.toml.
    sed -n '/^markers = \[/,/^\]/s/^ *"\([^:]*\): *\(.*\)",$/  \1:\2/p' pyproject.toml |
        while IFS=: read -r name meaning; do printf '  %-14s%s\n' "${name#"${name%%[! ]*}"}" "$meaning"; done
    echo
    echo "Exit status: 0 all passed, 1 a test or the linter failed. More options: .venv/bin/python -m pytest --help"
    exit 0
    ;;
esac
source jobs/environment.sh --test
ruff check .
ruff format --check .
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec python -m pytest -n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder "$@"
