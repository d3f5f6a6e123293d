"""What a program writes to a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys


def drawn(code: str) -> list[str]:
    """What Python code writes to stderr, a terminal, cut where it clears a line."""
    primary, secondary = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=secondary, check=True)
    os.close(secondary)
    seen = os.read(primary, 4096).decode()
    os.close(primary)
    return seen.split("\r\x1b[K")
