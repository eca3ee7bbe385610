"""`raylm tune` as a job: `ray job submit --working-dir . -- python jobs/tune.py CONFIG.yaml [KEY=VALUE]`."""

import sys

from raylm.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
