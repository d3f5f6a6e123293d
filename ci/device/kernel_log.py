"""python -m ci.device.kernel_log BOARD FILE: reads the board's kernel log since boot over SSH.

A separate process, so that the nightly can kill it after a timeout. An unreadable log is a note, not a failure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from axrun.errors import BadInput, Failure
from ci.device import place
from ci.device.connection import Connection
from ci.device.console import printable
from ci.device.place import Address, Board
from ci.device.programs import STATE

NAME = "dmesg.log"
SECONDS = 40.0
EMULATED = "an emulated board has no kernel of its own and no kernel log"


def read(board: Board, connect: Callable[[Board, Address, str], Connection] = Connection) -> str:
    """The end of the log, printable. Raises BadInput if it cannot be read."""
    if board.emulated:
        raise BadInput(EMULATED)
    with connect(board, place.address(board), STATE) as link:
        found = link.call("log", SECONDS)
    if not found["text"]:
        raise BadInput(
            f"the kernel log of {board.name} cannot be read: {printable(found['why'].encode())}\n"
            "As root on the board, once: sysctl kernel.dmesg_restrict=0, or add the user to the group adm"
        )
    return "".join(f"{printable(line.encode())}\n" for line in found["text"].splitlines())


def main(argv: Sequence[str]) -> int:
    name, file = argv
    try:
        Path(file).write_text(read(place.find(name)), "utf-8")
    except Failure as failure:
        print(f"error: {failure}")
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
