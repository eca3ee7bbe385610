# Sourced by the scripts of the repository: makes .venv with the pinned set where it is missing, and activates it.
# RAYLM_PYTHON names the interpreter to make it with (3.10 or newer; python3 by default).
if [ ! -x .venv/bin/raylm ] || ! cmp -s cluster/requirements.txt .venv/requirements.txt; then
    echo "raylm: installing the pinned set into .venv (about 3 GB, some minutes)" >&2
    "${RAYLM_PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r cluster/requirements.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    cp cluster/requirements.txt .venv/requirements.txt
fi
source .venv/bin/activate
