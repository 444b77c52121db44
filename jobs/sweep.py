"""`moleblend sweep` as a script: `ray job submit -- python jobs/sweep.py KEY=VALUE ...`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
