"""Matrix files, and stand-ins for the nights and builds of a run."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ci.device import place
from ci.device.place import Board
from ci.nightly.matrix import Cell
from ci.nightly.matrix_run import Commands
from ci.nightly.summary import Judged, Summary
from tests.ci.test_history import night

ROOT = Path(__file__).resolve().parents[3]
MARK = "MATRIX_OF_A_TEST"  # in the environment of everything a run starts
SECONDS = 120  # on a machine that does ten other things
PLAIN = """# nights
boards = ["virtual", "ax650"]
models = ["tiny-qwen2"]
weight_type = [
  "s8",
  "s4",
]

[[exclude]]
board = "ax650"
weight_type = "s4"
reason = "not yet"
"""


def written(folder: Path, text: str = PLAIN) -> Path:
    file = folder / "matrix.toml"
    file.write_text(text)
    return file


def board_yaml(folder: Path, number: int) -> str:
    """A user's board without a power port."""
    text = (place.BOARDS / "virtual.yaml").read_text().replace("board: virtual", f"board: virtual-{number}")
    file = folder / f"v{number}.yaml"
    lines = [
        f"        {line.split(':')[0].strip()}: /bin/true" if "cmd_o" in line else line for line in text.splitlines()
    ]
    file.write_text("\n".join(lines))
    return file.name


# A stand-in for a night or a build: records when it began and ended, and ends on a signal. It takes
# some seconds; where they are negative, so many at most until two nights have begun.
ACTOR = """
import json, os, signal, sys, time
what, seconds, log, then = sys.argv[1], float(sys.argv[2]), sys.argv[3], sys.argv[4:]
def note(word):
    with open(log, "a") as file:
        file.write(json.dumps([what, word, time.monotonic(), os.getpid()]) + "\\n")
def nights():
    return sum(word == "begins" and not what.startswith("build") for what, word, *_ in map(json.loads, open(log)))
def end(number, frame):
    note(signal.Signals(number).name)
    sys.exit(2)
signal.signal(signal.SIGTERM, end)
note("begins")
print(f"{what} speaks", file=sys.stderr, flush=True)
deadline = time.monotonic() + abs(seconds)
while time.monotonic() < deadline and not (seconds < 0 and nights() >= 2):
    time.sleep(0.02)
note("ends")
if then:
    file, text, code = then
    if file:
        open(file, "w").write(text)
    else:
        print(text, file=sys.stderr)
    sys.exit(int(code))
"""


def said_of(cell: Cell, code: int = 0, **other: object) -> Summary:
    word = "red" if code else "green"
    reason = str(other.pop("reason", "it is slow" if code else ""))
    held = night(3, board=cell.board.name, model=cell.model.name, verdict=word, reason=reason, **other)
    figures = (Judged("mean_kld", "within", "8e-06 nats", "8e-06 ± 4e-07 nats"),)
    headline = f"{word}: {cell.name}: {reason or '1 figures within their gates'}"
    return Summary(headline, word, code, reason, "", figures, (), "", dataclasses.asdict(held))


def acting(log: Path, seconds: float, codes: Callable[[Cell], int | None]) -> Commands:
    """Those of a night, which writes a summary with `codes` of its cell (None: an error instead), and of a build."""
    python = [sys.executable, "-c", ACTOR]

    def hold(cell: Cell, folder: Path, file: Path) -> Sequence[str]:
        code = codes(cell)
        told = ["", "error: no such thing", "2"]
        if code is not None:
            told = [str(file), json.dumps(dataclasses.asdict(said_of(cell, code))), str(code)]
        return [*python, f"{cell.board.name} {cell.model.name}", str(seconds), str(log), *told]

    def build(model: str, chip: str, folder: Path) -> Sequence[str]:
        return [*python, f"build {model} {chip}", str(max(seconds, 0.1)), str(log)]

    def package(board: Board) -> Sequence[str]:
        return build("package", board.name, log)

    return Commands(hold, build, package)


def noted(log: Path) -> list[tuple[str, str, float, int]]:
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def until(check: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def left(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
