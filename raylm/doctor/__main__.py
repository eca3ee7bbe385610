"""``python -m raylm.doctor [--json]``: the same as ``raylm doctor``, where not even its own packages are there."""

import sys

from raylm.doctor.report import run_doctor

if __name__ == "__main__":
    sys.exit(run_doctor(as_json="--json" in sys.argv[1:]))
