"""axrun on a machine whose free memory is always $FREE bytes."""

import os
import sys
from unittest.mock import patch

from axrun.cli import main

if __name__ == "__main__":
    with patch("axrun.memory.available", lambda meminfo: int(os.environ["FREE"])):
        sys.exit(main())
