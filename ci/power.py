"""python -m ci.power on|off BOARD [SECONDS]: the board's power port, and for `on` a board that answers.

A stage of the nightly, in a process of its own so that it can be given up.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence

from board.errors import BadInput, CheckFailed, Failure
from ci import place
from ci.place import Address, Board

POLL_SECONDS = 0.5


def on(board: Board, boot_seconds: float = 180.0) -> None:
    """Cuts the board's power, switches it on again, and waits until its sshd greets.

    Raises CheckFailed when it does not within `boot_seconds`, BadInput for a board without a power port.
    """
    with place.power(board) as switch:
        switch.off()
        switch.on()
    at = place.address(board)
    deadline = time.monotonic() + boot_seconds
    while not greets(at):
        if time.monotonic() > deadline:
            raise CheckFailed(
                f"{board.name} was switched on and does not answer: no sshd at {at.host} port {at.port} "
                f"in {boot_seconds:.0f} s\nLook at its console, its cable and its power."
            )
        time.sleep(POLL_SECONDS)
    print(f"{board.name} answers at {at.host} port {at.port}")


def off(board: Board) -> None:
    """Cuts the board's power. Raises BadInput, CheckFailed."""
    with place.power(board) as switch:
        switch.off()
    print(f"{board.name} is off")


def greets(at: Address) -> bool:
    """Whether a server of SSH is there."""
    try:
        with socket.create_connection((at.host, at.port), timeout=5) as link:
            return link.recv(4) == b"SSH-"
    except OSError:
        return False


def main(argv: Sequence[str]) -> int:
    try:
        switch, name, *boot_seconds = argv
        if switch not in ("on", "off"):
            raise BadInput(f"{switch!r} is neither on nor off")
        found = place.find(name)
        off(found) if switch == "off" else on(found, *map(float, boot_seconds))
    except Failure as failure:
        print(f"error: {failure}")
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
