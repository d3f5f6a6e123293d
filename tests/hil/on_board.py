"""A board as the tests see it: commands of the current release, with time limits, and what they answered."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axrun.errors import CheckFailed
from ci.device import bounded, evidence, ssh, strict_json
from ci.device.evidence import Record
from ci.device.place import Board

WITNESS = Path(__file__).with_name("witness.py")
# One thread and one kind of kernel: OpenBLAS takes an emulated CPU for one with SVE, whose emulation is 20 x slower.
PLAIN_BLAS = ("OPENBLAS_NUM_THREADS=1", "OPENBLAS_CORETYPE=ARMV8")
SEEN = {"code", "stdout", "stderr", "cpu", "libraries", "variables", "peak", "available", "kernel"}

SPARE = 15.0  # seconds beyond a command's limit on the board until it is given up here
MOST_ANSWER = 1 << 21  # bytes
NOT_DONE = 124  # of timeout(1)
KILLED = (-9, 137)  # exit codes of a command that signal 9 ended
LOST = 255  # of ssh(1), which gives a silent board up after a minute


class Hanging(CheckFailed):
    """The board gave no answer; asking it more would only take longer."""


class Otherwise(CheckFailed):
    """The board does not hold, or does not run, what was deployed: figures would be of something else."""


@dataclass
class OnBoard:
    """The release that was deployed to a board, and what was measured with it.

    `shell` are the words before a command line that runs it there (ci/device/ssh.py), `root` is the folder of the
    releases, as the board's kernel names it.
    """

    board: Board
    shell: Sequence[str]
    limit: float
    record: Record
    root: str
    seen: dict[str, Any] = field(default_factory=lambda: {"figures": {}})

    @property
    def release(self) -> str:
        return f"{self.root}/releases/{self.record.release}"

    @property
    def maker(self) -> str:
        """Who made the axmodels; empty until a command has told."""
        return str(self.seen.get("maker", ""))

    def axrun(self, verb: str, *flags: str) -> tuple[dict[str, Any], float]:
        """What `axrun VERB` of the release says of its bundle as JSON, and its processor time in seconds.

        Raises CheckFailed; Otherwise when it loaded libraries that were not deployed.
        """
        what = f"axrun {verb}"
        words = [f"{self.release}/axrun", verb, f"{self.release}/model", "--json", "--engine", self.board.engine]
        done = self._watched(what, [*words, *flags])
        found = self._object(what, done["stdout"], "a JSON object")
        self.seen["maker"] = str(found.get("maker", ""))
        self._loaded(what, done)
        return found, float(done["cpu"])

    def _loaded(self, what: str, done: dict[str, Any]) -> None:
        """Raises Otherwise when a command loaded libraries that were not deployed."""
        ours = self.maker == "cpu" and self.board.engine.startswith("ax")
        faults = evidence.loaded(self.record, self.root, done["libraries"], done["variables"], ours)
        self.seen.setdefault("evidence", {})["library"] = evidence.engine(done["libraries"])
        self.require(what, faults)

    def require(self, what: str, faults: list[str]) -> None:
        """Keeps what is not as it was deployed. Raises Otherwise when there is something."""
        if faults:
            kept = self.seen.setdefault("evidence", {}).setdefault("faults", [])
            kept += [fault for fault in faults if fault not in kept]
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise Otherwise(f"{what} on {self.board.name} is not of what was deployed: {faults[0]}{more}")

    def python(self, what: str, code: str, *arguments: str, runs: bool = False) -> str:
        """What a program says that runs with the release's packages; `arguments` are its sys.argv[1:].

        `runs`: it runs the model, with the engine that was deployed. Raises CheckFailed.
        """
        package = f"{self.root}/packages/{self.record.package}"
        start = f"import sys\nsys.path.insert(0, {package!r})\n{code}"
        flags = ["-I", "-S", "-X", "utf8", "-X", f"pycache_prefix={package}.compiled"]
        words = ["env", *PLAIN_BLAS, "python3", *flags, "-c", start, *arguments]
        done = self._watched(what, words)
        if runs:
            self._loaded(what, done)
        return str(done["stdout"])

    def _watched(self, what: str, command: list[str]) -> dict[str, Any]:
        """What the witness saw of a command that ended well. Raises CheckFailed for one that did not."""
        said = self.run(what, shlex.join(["python3", "-I", "-S", "-c", WITNESS.read_text("utf-8"), *command]))
        done = self._object(what, said, "what was seen of it")
        if not done.keys() >= SEEN:
            raise CheckFailed(f"{what} on {self.board.name} answers {said[:80]!a}, expected what was seen of it")
        if done["code"] in KILLED:
            raise CheckFailed(
                f"{what} was killed on {self.board.name}: it had {done['peak'] / 1e6:.0f} MB, the least the board had "
                f"left was {done['available'] / 1e6:.0f} MB\n"
                + (f"The kernel says: {done['kernel']!a}" if done["kernel"] else "As the kernel does without memory.")
            )
        if done["code"]:
            raise CheckFailed(f"{what} on {self.board.name} ended with {done['code']}: {_error(done['stderr'])}")
        return done

    def _object(self, what: str, text: str, expected: str) -> dict[str, Any]:
        """A board's answer. Raises CheckFailed for what is none."""
        try:
            found = strict_json.loads(text)
        except json.JSONDecodeError:
            found = None
        except ValueError as error:  # a number that is none
            raise CheckFailed(f"{what} on {self.board.name} does not answer with {expected}: {error}") from None
        if not isinstance(found, dict):
            raise CheckFailed(f"{what} on {self.board.name} answers {text[:80]!a}, expected {expected}")
        return found

    def run(self, what: str, command: str) -> str:
        """Its stdout. Raises CheckFailed when it fails or the board gives no answer in time."""
        seconds = max(1, int(self.limit))
        words = [*self.shell, f"timeout -k 5 {seconds} sh -c {shlex.quote(command)}"]
        done = bounded.run(words, seconds=seconds + SPARE, most=MOST_ANSWER, environment=ssh.environment(self.board))
        code = done.code
        if done.flooded:
            raise CheckFailed(
                f"{what} on {self.board.name} answers with more than {MOST_ANSWER >> 20} MB, which begin with "
                f"{done.stdout[:40]!a}: it was ended"
            )
        if code is None:
            raise Hanging(f"{self.board.name} hangs: no answer to {what} in {seconds} s")
        if code == NOT_DONE:
            raise Hanging(f"{what} on {self.board.name} did not finish within {seconds} s")
        if code == LOST:
            raise Hanging(f"{self.board.name} hangs or is gone: ssh gave it up during {what}")
        out = done.stdout.decode("utf-8", "replace")
        if code:
            said = "\n".join([out, done.stderr.decode("utf-8", "replace")])
            raise CheckFailed(f"{what} on {self.board.name} ended with {code}: {_error(said)}")
        return out


def _error(said: str) -> str:
    """The last error a command told, or its last line."""
    lines = [line for line in said.splitlines() if line.strip()] or ["it printed nothing"]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    return f"{(errors or lines)[-1][:300]!a}"
