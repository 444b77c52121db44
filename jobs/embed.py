"""`moleblend embed` as a script: `ray job submit -- python jobs/embed.py KEY=VALUE ...`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))
