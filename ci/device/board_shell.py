"""A shell or one command on a board, over the ssh wrapper that checks the host key."""

from __future__ import annotations

import subprocess
import sys

from ci.device import commands, ssh
from ci.device.place import Address, Board


def shell(board: Board, at: Address, command: str = "") -> int:
    """Runs an interactive session, or `command` in the user's shell there; returns the exit code."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    words = [*ssh.command(at, "-t" if terminal else "-T"), at.host]
    sys.stdout.flush()
    done = subprocess.run([*words, *([command] if command else [])], env=ssh.environment(board), check=False)
    if done.returncode == ssh.FAILED:  # or the command's own exit code; ssh has printed its error
        why = commands.invoke("board.status", "--board", board.argument)
        print(f"note: if the login failed, this command says why: {why}", file=sys.stderr)
    return done.returncode
