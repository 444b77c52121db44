"""`moleblend samples` as a script: `python jobs/samples.py out=URI`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["samples", *sys.argv[1:]]))
