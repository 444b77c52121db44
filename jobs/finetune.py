"""`moleblend finetune` as a script: `ray job submit -- python jobs/finetune.py KEY=VALUE ...`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
