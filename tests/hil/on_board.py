"""A board as the tests see it: commands of the current release, with time limits, and what they answered."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from typing import Any

from board.errors import CheckFailed
from ci.place import Board

SPARE = 15.0  # seconds beyond a command's limit on the board until it is given up here
MOST_ANSWER = 1 << 20  # characters
NOT_DONE = 124  # of timeout(1)
LOST = 255  # of ssh(1), which gives a silent board up after a minute


class Hanging(CheckFailed):
    """The board gave no answer; asking it more would only take longer."""


@dataclass
class OnBoard:
    """The release that is current on a board, and what was measured with it."""

    board: Board
    driver: Any
    limit: float
    seen: dict[str, Any] = field(default_factory=lambda: {"figures": {}})

    @property
    def release(self) -> str:
        return f"{self.board.root}/current"

    def axrun(self, verb: str, *flags: str) -> tuple[dict[str, Any], float]:
        """What `axrun VERB` of the current release says of its bundle as JSON, and its processor time in seconds.

        Raises CheckFailed.
        """
        words = [
            f"{self.release}/axrun",
            verb,
            f"{self.release}/model",
            "--json",
            "--engine",
            self.board.engine,
            *flags,
        ]
        answer, *rest = self.run(f"axrun {verb}", f"{shlex.join(words)} && times").split("\n", 1)
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise CheckFailed(f"axrun {verb} on {self.board.name} answers {answer[:80]!a}, expected a JSON object")
        return found, _cpu_seconds("".join(rest))

    def python(self, what: str, code: str) -> str:
        """What a program says that runs with the current release's packages."""
        packages = f"$(dirname $(readlink -f {self.release}/axrun))"
        return self.run(what, f"PYTHONPATH={packages} OPENBLAS_NUM_THREADS=1 python3 -c {shlex.quote(code)}")

    def run(self, what: str, command: str) -> str:
        """Its stdout. Raises CheckFailed when it fails or the board gives no answer in time."""
        seconds = max(1, int(self.limit))
        try:
            out, err, code = self.driver.run(
                f"timeout -k 5 {seconds} sh -c {shlex.quote(command)}", decodeerrors="replace", timeout=seconds + SPARE
            )
        except subprocess.TimeoutExpired:
            raise Hanging(f"{self.board.name} hangs: no answer to {what} in {seconds} s") from None
        if code == NOT_DONE:
            raise Hanging(f"{what} on {self.board.name} was not done after {seconds} s")
        if code == LOST:
            raise Hanging(f"{self.board.name} hangs or is gone: ssh gave it up during {what}")
        if code:
            said = [line for line in [*out, *err] if line.strip()] or ["it said nothing"]
            errors = [line.partition("error: ")[2] for line in said if line.startswith("error: ")]
            raise CheckFailed(f"{what} on {self.board.name} ended with {code}: {(errors or said)[-1][:300]!a}")
        return "\n".join(out)[:MOST_ANSWER]


def _cpu_seconds(times: str) -> float:
    """User and system time of the children, the second line of POSIX' `times`: 0m1.25s 0m0.50s"""
    found = re.findall(r"(\d{1,6})m(\d{1,2}(?:\.\d+)?)s", times)
    return sum(60 * int(minutes) + float(seconds) for minutes, seconds in found[2:4])
