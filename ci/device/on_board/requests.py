"""The loop of every program that a board is sent: one JSON object a line asks, one answers."""

from __future__ import annotations

import json
import select
import signal
import sys
from typing import Any

IDLE_SECONDS = 3600  # without a request, the other side is gone, whatever the network says


class Refused(Exception):
    """What is asked cannot be done: a kind for the program that asked, and a text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def answer(program: Any) -> None:
    """Calls the method that a request's `do` names, with the rest of the request, until no more come.

    A signal to end is an end of the input.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit())
    _say({"ok": "ready"})
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            break
        request = json.loads(line)
        verb = request.pop("do")
        try:
            answer = {"ok": getattr(program, verb)(**request)}
        except Refused as refused:
            answer = {"error": refused.kind, "text": str(refused)}
        except OSError as error:
            kind = "space" if error.errno in (28, 122) else "system"  # ENOSPC, EDQUOT
            answer = {"error": kind, "text": f"{error.strerror}: {error.filename}"}
        _say(answer)


def leave_if_asked_to(seconds: float) -> None:
    """Waits, and ends the program where the input ends meanwhile: while a request is answered, none is to come."""
    if select.select([sys.stdin], [], [], seconds)[0]:
        sys.exit()


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
