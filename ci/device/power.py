"""python -m ci.device.power on|off BOARD [SECONDS]: switches the board's power port; `on` waits for its sshd.

A separate process, so that the nightly can kill it after a timeout. Boards without a port (`power: none`, or
`power: manual`, where the nightly asks the user once) are not switched here.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from axrun.errors import BadInput, CheckFailed, Failure
from ci.device import place, reach
from ci.device.place import Address, Board
from ci.device.progress import Say, took

POLL_SECONDS = 0.5
TELL_SECONDS = 15.0  # between two lines while a board boots
UNSHOWN = "no cold start is tested, and it stays on after the night"


def on(board: Board, boot_seconds: float = 180.0) -> None:
    """Power-cycles the board and waits for its sshd.

    Raises CheckFailed if it does not answer within `boot_seconds`, BadInput for a board without a power port.
    """
    with place.power(board) as switch:
        switch.off()
        switch.on()
    at = place.address(board)
    wait(board, at, boot_seconds, "was switched on", print)
    print(f"{board.name} answers at {at.host} port {at.port}")


def up(board: Board, say: Say, boot_seconds: float = 180.0) -> None:
    """Switches the board's port on and waits until the board answers; does nothing if it already does.

    Raises the same errors as `on`.
    """
    at = place.address(board)
    if greets(at):
        say(f"{board.name} is on: {at.user}@{at.host} port {at.port}")
        return
    with place.power(board) as switch:
        switch.on()
    wait(board, at, boot_seconds, "was switched on", say)
    say(f"{board.name} is on: {at.user}@{at.host} port {at.port}")


def off(board: Board) -> None:
    """Cuts the board's power. Raises BadInput, CheckFailed."""
    with place.power(board) as switch:
        switch.off()
    print(f"{board.name} is off")


def unable(board: Board) -> Iterator[str]:
    """Notes on what a night cannot test with this board's power."""
    if board.switch == "none":
        yield f"power: none: {board.name} is not power-cycled: {UNSHOWN}"
    elif board.switch == "manual" and not _terminal():
        yield f"power: manual, but no terminal to ask the user: {board.name} is not power-cycled: {UNSHOWN}"
    elif board.switch == "manual":
        yield f"power: manual: {board.name} is switched by its user, once, and stays on after the night"


def by_hand(board: Board, say: Say, boot_seconds: float, stop: Callable[[], str] = str, ask: bool | None = None) -> str:
    """For a board without a port: asks the user at the terminal, if there is one, and waits until the board answers.

    Returns a text for the report. Raises BadInput, CheckFailed.
    """
    at = place.address(board)
    if board.switch != "manual" or not (_terminal() if ask is None else ask):
        reach.require(board, at, say)
        return "".join(unable(board)) or f"{board.name} was on and was not switched"
    say(f"switch {board.name} off and on again, now; then press Enter")
    started = time.monotonic()
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        if reason := stop():
            raise BadInput(reason)
    sys.stdin.readline()
    wait(board, at, boot_seconds, "was switched by hand", say)
    return f"{board.name} was switched off and on by its user, as they say, and answers{took(started)}"


def wait(board: Board, at: Address, boot_seconds: float, what: str, say: Say) -> None:
    """Waits for the board's sshd. Raises CheckFailed after `boot_seconds`."""
    started = told = time.monotonic()
    while not greets(at):
        now = time.monotonic()
        if now - started > boot_seconds:
            raise CheckFailed(
                f"{board.name} {what} and does not answer: no sshd at {at.host} port {at.port} "
                f"in {boot_seconds:.0f} s\nCheck its console, network cable and power."
            )
        if now - told >= TELL_SECONDS:
            told = now
            say(f"{board.name} {what}; no sshd at {at.host} port {at.port} yet: {now - started:.0f} s")
        time.sleep(POLL_SECONDS)


def greets(at: Address) -> bool:
    """Whether an SSH server answers."""
    return not reach.silence(at, 5.0)


def _terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def main(argv: Sequence[str]) -> int:
    try:
        switch, name, *boot_seconds = argv
        if switch not in ("on", "off"):
            raise BadInput(f"{switch!r}: expected on or off")
        found = place.find(name)
        off(found) if switch == "off" else on(found, *map(float, boot_seconds))
    except Failure as failure:
        print(f"error: {failure}")
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
