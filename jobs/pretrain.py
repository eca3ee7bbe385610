"""`raylm pretrain` as a job: `ray job submit --working-dir . -- python jobs/pretrain.py CONFIG.yaml [KEY=VALUE]`."""

import sys

from raylm.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
