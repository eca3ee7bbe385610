"""`raylm tune` as a job: `ray job submit --working-dir . -- python jobs/tune.py CONFIG.yaml [KEY=VALUE]`."""

import sys

from raylm.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit(["tune", *sys.argv[1:]])
