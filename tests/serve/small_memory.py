"""axrun on a machine whose free memory is always $FREE bytes."""

import os
import sys

from axrun import memory
from axrun.cli import main

if __name__ == "__main__":
    memory.available = lambda meminfo=None: int(os.environ["FREE"])
    sys.exit(main())
