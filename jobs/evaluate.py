"""`raylm evaluate` as a job: `ray job submit --working-dir . -- python jobs/evaluate.py CONFIG.yaml [KEY=VALUE]`."""

import sys

from raylm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
