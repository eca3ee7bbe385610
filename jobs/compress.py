"""`raylm compress` as a job: `ray job submit --working-dir . -- python jobs/compress.py CONFIG.yaml [KEY=VALUE]`."""

import sys

from raylm.cli import main

if __name__ == "__main__":
    sys.exit(main(["compress", *sys.argv[1:]]))
