"""axrun on a machine whose free memory is always $FREE bytes.

With $HOLD the engine waits for SIGUSR1 before its first run, so that a test knows that an answer goes on.
"""

import os
import signal
import sys
import threading
from typing import Any
from unittest.mock import patch

from axrun.cli import main
from axrun.serve.scheduler import Scheduler

if __name__ == "__main__":
    go, run = threading.Event(), Scheduler._run
    if "HOLD" in os.environ:
        signal.signal(signal.SIGUSR1, lambda number, frame: go.set())
    else:
        go.set()

    def held(*given: Any) -> None:
        go.wait()
        run(*given)

    free = int(os.environ["FREE"])
    with (
        patch("axrun.memory.available", lambda meminfo: free),
        patch("axrun.serve.slots.available", lambda: free),
        patch.object(Scheduler, "_run", held),
    ):
        sys.exit(main())
