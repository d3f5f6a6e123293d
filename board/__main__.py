"""`python -m board` is `axrun`."""

import sys

from board.cli import main

if __name__ == "__main__":
    sys.exit(main())
