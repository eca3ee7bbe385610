"""`raylm prepare` as a job: `ray job submit --working-dir . -- python jobs/prepare.py CONFIG.yaml [KEY=VALUE]`."""

import sys

from raylm.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
