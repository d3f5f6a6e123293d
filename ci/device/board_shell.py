"""A shell on a board, or one command, over the ssh that checks the board's host key."""

from __future__ import annotations

import subprocess
import sys

from ci.device import commands, ssh
from ci.device.place import Address, Board


def shell(board: Board, at: Address, command: str = "") -> int:
    """An interactive session, or `command` as the user's shell there reads it; returns its exit code."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    words = [*ssh.command(at, "-t" if terminal else "-T"), at.host]
    sys.stdout.flush()
    done = subprocess.run([*words, *([command] if command else [])], env=ssh.environment(board), check=False)
    if done.returncode == ssh.FAILED:  # or the command's own; ssh has said what it saw
        why = commands.invoke("board.status", "--board", board.argument)
        print(f"note: where ssh did not get in, this says why: {why}", file=sys.stderr)
    return done.returncode
