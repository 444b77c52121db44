"""`moleblend refit` as a script: `ray job submit -- python jobs/refit.py KEY=VALUE ...`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["refit", *sys.argv[1:]]))
