"""Progress in numbers: a bar that grows on a terminal, lines elsewhere."""

from __future__ import annotations

import subprocess
import sys

from tests.terminal import drawn

CODE = """
from axrun.progress import Progress, mention, show, show_on_terminal
show(Progress(1, 4, "windows"))
mention("inside")
show_on_terminal(Progress(3, 4, "more"))
show(Progress(4, 4, "windows"))
"""


def test_a_bar_grows_on_a_terminal() -> None:
    assert drawn(CODE) == [
        "",
        "[1/4] #####............... windows",
        "inside",
        "[3/4] ###############..... more",
        "[4/4] #################### windows\r\n",
    ]


def test_lines_go_anywhere_else() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], stderr=subprocess.PIPE, text=True, check=True)
    assert done.stderr.splitlines() == ["[1/4] windows", "[4/4] windows"]
