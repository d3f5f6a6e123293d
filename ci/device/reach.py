"""Checks within seconds whether a board answers, before any long work for it starts."""

from __future__ import annotations

import socket
import threading
import time

from axrun.errors import BadInput
from ci.device import commands, settings
from ci.device.place import Address, Board
from ci.device.progress import Say, took

PATIENCE = 7.0  # seconds for a board that is on
NAME_UNKNOWN = "its name does not resolve"
NO_SSH = "the port is open, but not an SSH server"


def require(board: Board, at: Address, say: Say = lambda line: None, patience: float = PATIENCE) -> None:
    """Waits up to `patience` seconds, name resolution included, for an SSH server at the board's address.

    Raises BadInput with the reason and advice.
    """
    started = time.monotonic()
    where = f"{at.user}@{at.host} port {at.port}"
    say(f"{board.title}: is it on? {where} ...")
    why = silence(at, patience)
    if why:
        raise BadInput(f"{board.name} does not answer at {where}: {why}\n{advice(board, why)}")
    say(f"{board.name} answers{took(started)}")


def advice(board: Board, why: str) -> str:
    """Advice for a board that does not answer."""
    file = settings.file(board.yaml.stem)
    if why == NAME_UNKNOWN:
        return f'Set its address: address = "192.168.1.50" in {file}, or LG_BOARD_ADDRESS.'
    if board.emulated or board.switch == "port":
        return f"Switch it on: {commands.invoke('board.up', '--board', board.argument)}"
    return f"Switch it on by hand (power is {board.switch!r}), and check its address; {file} can override it."


def silence(at: Address, patience: float = PATIENCE) -> str:
    """Why no SSH server answers; empty if one does. Takes at most `patience` seconds."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_silence(at, patience)), daemon=True)
    thread.start()
    thread.join(patience + 0.5)  # name resolution has no timeout of its own
    return found[0] if found else f"no answer in {patience:.0f} s"


def _silence(at: Address, patience: float) -> str:
    try:
        with socket.create_connection((at.host, at.port), timeout=patience) as link:
            said = link.recv(4)
            while said and len(said) < 4:
                more = link.recv(4 - len(said))
                if not more:
                    break
                said += more
    except socket.gaierror:
        return NAME_UNKNOWN
    except TimeoutError:
        return f"no answer in {patience:.0f} s"
    except OSError as error:
        return error.strerror or str(error)
    return "" if said == b"SSH-" else NO_SSH
