"""`moleblend status` as a script: `python jobs/status.py URI`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["status", *sys.argv[1:]]))
