"""`python -m axc` is `axc`."""

import sys

from axc.cli import main

if __name__ == "__main__":
    sys.exit(main())
