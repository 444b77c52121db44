"""`moleblend checkpoints` as a script: `python jobs/checkpoints.py RUN [--verify]`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["checkpoints", *sys.argv[1:]]))
