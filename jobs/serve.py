"""`raylm serve` as a job: `ray job submit --working-dir . -- python jobs/serve.py CONFIG.yaml [KEY=VALUE]`."""

import sys

from raylm.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
