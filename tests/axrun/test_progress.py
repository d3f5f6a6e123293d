"""Progress in numbers: a bar that grows on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

CODE = """
from axrun.progress import Progress, mention, show, show_on_terminal
show(Progress(1, 4, "windows"))
mention("inside")
show_on_terminal(Progress(3, 4, "more"))
show(Progress(4, 4, "windows"))
"""


def test_a_bar_grows_on_a_terminal() -> None:
    primary, secondary = pty.openpty()
    subprocess.run([sys.executable, "-c", CODE], stderr=secondary, check=True)
    os.close(secondary)
    seen = os.read(primary, 4096).decode()
    os.close(primary)
    assert seen.split("\r\x1b[K") == [
        "",
        "[1/4] #####............... windows",
        "inside",
        "[3/4] ###############..... more",
        "[4/4] #################### windows\r\n",
    ]


def test_lines_go_anywhere_else() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], stderr=subprocess.PIPE, text=True, check=True)
    assert done.stderr.splitlines() == ["[1/4] windows", "[4/4] windows"]
