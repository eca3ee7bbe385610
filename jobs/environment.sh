# Sourced by the scripts of the repository: makes or repairs .venv with the locked packages, and activates it.
#     source jobs/environment.sh          what trains and serves
#     source jobs/environment.sh --test   what tests as well
# RAYLM_PYTHON names the interpreter to make it with, else the first of these that is 3.11 to 3.14.
raylm_python=""
for candidate in ${RAYLM_PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
        raylm_python="$candidate"
        break
    fi
done
if [ -z "$raylm_python" ]; then
    echo "raylm: error: ${RAYLM_PYTHON:-python3}: found $("${RAYLM_PYTHON:-python3}" --version 2>&1 | tail -n 1)," \
        "allowed: Python 3.11 to 3.14 (RAYLM_PYTHON names one)" >&2
    return 2
fi
"$raylm_python" jobs/environment.py "$@" || return $?
source .venv/bin/activate
