"""`moleblend prepare` as a script: `ray job submit -- python jobs/prepare.py KEY=VALUE ...`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
