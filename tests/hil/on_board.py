"""The board for the tests: runs commands of the current release with time limits and parses their output."""

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
# One thread and generic kernels: OpenBLAS detects SVE on an emulated CPU, whose emulation is 20 x slower.
PLAIN_BLAS = ("OPENBLAS_NUM_THREADS=1", "OPENBLAS_CORETYPE=ARMV8")
SEEN = {"code", "stdout", "stderr", "cpu", "libraries", "variables", "peak", "available", "kernel"}

SPARE = 15.0  # extra seconds of the local timeout over the one on the board
MOST_ANSWER = 1 << 21  # bytes
NOT_DONE = 124  # exit code of timeout(1)
KILLED = (-9, 137)  # exit codes after SIGKILL
LOST = 255  # exit code of ssh(1), which gives up on a silent board after a minute


class Hanging(CheckFailed):
    """The board does not answer; the session stops."""


class Otherwise(CheckFailed):
    """The board does not have, or did not run, the deployed release; the session stops."""


@dataclass
class OnBoard:
    """The deployed release on a board, and the results measured with it.

    `shell` is the ssh command that runs a command line there (ci/device/ssh.py), `root` the real path of the releases.
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
        """The JSON output of `axrun VERB` for the release's bundle, and its processor time in seconds.

        Raises CheckFailed, or Otherwise if it loaded libraries that were not deployed.
        """
        what = f"axrun {verb}"
        words = [f"{self.release}/axrun", verb, f"{self.release}/model", "--json", "--engine", self.board.engine]
        done = self._watched(what, [*words, *flags])
        found = self._object(what, done["stdout"], "a JSON object")
        self.seen["maker"] = str(found.get("maker", ""))
        self._loaded(what, done)
        return found, float(done["cpu"])

    def _loaded(self, what: str, done: dict[str, Any]) -> None:
        """Raises Otherwise if a command loaded libraries that were not deployed."""
        ours = self.maker == "cpu" and self.board.engine.startswith("ax")
        faults = evidence.loaded(self.record, self.root, done["libraries"], done["variables"], ours)
        self.seen.setdefault("evidence", {})["library"] = evidence.engine(done["libraries"])
        self.require(what, faults)

    def require(self, what: str, faults: list[str]) -> None:
        """Records differences from the deploy. Raises Otherwise if there are any."""
        if faults:
            kept = self.seen.setdefault("evidence", {}).setdefault("faults", [])
            kept += [fault for fault in faults if fault not in kept]
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise Otherwise(f"{what} on {self.board.name} differs from the deploy: {faults[0]}{more}")

    def python(self, what: str, code: str, *arguments: str, runs: bool = False) -> str:
        """The output of Python `code` run with the release's packages; `arguments` are its sys.argv[1:].

        `runs`: it runs the model, so the loaded engine is checked too. Raises CheckFailed.
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
        """Runs a command under witness.py and returns its report. Raises CheckFailed if the command failed."""
        said = self.run(what, shlex.join(["python3", "-I", "-S", "-c", WITNESS.read_text("utf-8"), *command]))
        done = self._object(what, said, "the witness's report")
        if not done.keys() >= SEEN:
            raise CheckFailed(f"{what} on {self.board.name} answers {said[:80]!a}, expected the witness's report")
        if done["code"] in KILLED:
            raise CheckFailed(
                f"{what} was killed on {self.board.name}: it used {done['peak'] / 1e6:.0f} MB, the board had at least "
                f"{done['available'] / 1e6:.0f} MB left\n"
                + (f"Kernel log: {done['kernel']!a}" if done["kernel"] else "Perhaps by the kernel, out of memory.")
            )
        if done["code"]:
            raise CheckFailed(f"{what} on {self.board.name} ended with {done['code']}: {_error(done['stderr'])}")
        return done

    def _object(self, what: str, text: str, expected: str) -> dict[str, Any]:
        """Parses a JSON object from the board. Raises CheckFailed for anything else."""
        try:
            found = strict_json.loads(text)
        except json.JSONDecodeError:
            found = None
        except ValueError as error:  # an invalid number
            raise CheckFailed(f"{what} on {self.board.name} does not answer with {expected}: {error}") from None
        if not isinstance(found, dict):
            raise CheckFailed(f"{what} on {self.board.name} answers {text[:80]!a}, expected {expected}")
        return found

    def run(self, what: str, command: str) -> str:
        """Runs a command line on the board and returns its stdout. Raises CheckFailed on a failure or timeout."""
        seconds = max(1, int(self.limit))
        words = [*self.shell, f"timeout -k 5 {seconds} sh -c {shlex.quote(command)}"]
        done = bounded.run(words, seconds=seconds + SPARE, most=MOST_ANSWER, environment=ssh.environment(self.board))
        code = done.code
        if done.flooded:
            raise CheckFailed(
                f"{what} on {self.board.name} printed more than {MOST_ANSWER >> 20} MB, starting with "
                f"{done.stdout[:40]!a}: it was killed"
            )
        if code is None:
            raise Hanging(f"{self.board.name} hangs: no answer to {what} in {seconds} s")
        if code == NOT_DONE:
            raise Hanging(f"{what} on {self.board.name} did not finish within {seconds} s")
        if code == LOST:
            raise Hanging(f"{self.board.name} hangs or is gone: ssh lost it during {what}")
        out = done.stdout.decode("utf-8", "replace")
        if code:
            said = "\n".join([out, done.stderr.decode("utf-8", "replace")])
            raise CheckFailed(f"{what} on {self.board.name} ended with {code}: {_error(said)}")
        return out


def _error(said: str) -> str:
    """The last `error:` line of a command, or its last line."""
    lines = [line for line in said.splitlines() if line.strip()] or ["it printed nothing"]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    return f"{(errors or lines)[-1][:300]!a}"
