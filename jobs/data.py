"""`moleblend data` as a script: `python jobs/data.py URI [--verify]`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
