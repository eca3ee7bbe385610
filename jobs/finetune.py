"""`raylm finetune` as a job: `ray job submit --working-dir . -- python jobs/finetune.py CONFIG.yaml [KEY=VALUE]`."""

import sys

from raylm.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
