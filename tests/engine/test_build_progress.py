"""Building the engine shows how far ninja is, on a terminal."""

from __future__ import annotations

import subprocess
import sys

from tests.terminal import drawn

CODE = """
import os, sys
from engine.build import run, shown
lines = ["Re-checking globbed directories", "[1/4] Building onnx.cc.o", "a.cc:1: warning: [2/4] no", "[4/4] Linking"]
run([sys.executable, "-c", f"print({chr(10).join(lines)!r})"], dict(os.environ), shown())
"""


def test_the_bar_follows_ninja_on_a_terminal() -> None:
    assert drawn(CODE) == [
        "",
        "[1/4] #####............... engine\r",
        "[4/4] #################### engine\r\n",
    ]


def test_nothing_is_shown_anywhere_else() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
