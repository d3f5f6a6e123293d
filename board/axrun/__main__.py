"""Entry point of `python -m axrun`."""

import sys

from axrun.cli import main

if __name__ == "__main__":
    sys.exit(main())
