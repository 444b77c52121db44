"""`moleblend download` as a script: `python jobs/download.py NAME out=URI`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["download", *sys.argv[1:]]))
