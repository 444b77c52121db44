"""`moleblend plan` as a script: `python jobs/plan.py molecules=1e9 gpus=64 KEY=VALUE ...`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
