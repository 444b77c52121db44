"""`moleblend pretrain` as a script: `ray job submit -- python jobs/pretrain.py KEY=VALUE ...`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
