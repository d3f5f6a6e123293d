"""The request loop of every program sent to a board: one JSON object per line is a request, one is its answer."""

from __future__ import annotations

import json
import select
import signal
import sys
from typing import Any

IDLE_SECONDS = 3600  # without a request for this long, the client is gone


class Refused(Exception):
    """A request cannot be fulfilled; has a kind for the client, and a text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def answer(program: Any) -> None:
    """Answers requests until the input ends: calls the method named by `do` with the other keys as arguments.

    SIGTERM and SIGHUP end the program like the end of the input.
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
    """Sleeps, and exits if the input ends meanwhile. (The client sends nothing while it waits for an answer.)"""
    if select.select([sys.stdin], [], [], seconds)[0]:
        sys.exit()


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
