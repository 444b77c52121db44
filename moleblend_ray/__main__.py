"""`python -m moleblend_ray`: the command `moleblend`."""

import sys

from moleblend_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
