"""`moleblend export` as a script: `python jobs/export.py checkpoint=URI out=URI`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
