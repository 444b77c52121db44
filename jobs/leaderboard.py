"""`moleblend leaderboard` as a script: `python jobs/leaderboard.py URI out=URI`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["leaderboard", *sys.argv[1:]]))
