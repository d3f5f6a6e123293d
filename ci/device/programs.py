"""What a board is sent over SSH: a program of ci/device/on_board, with the modules there that it imports.

Nothing of it is stored on the board. It needs Python 3.9 and nothing else.
"""

from __future__ import annotations

import ast
import functools
import json
import shlex
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "on_board"
PACKAGE = "ci.device.on_board"
RELEASES, STATE, SERVER, ATTEND = "releases", "state", "server", "attend"  # those with a main()

# Reads the size of what is sent, then that; a Python too old for it says so instead.
START = """import sys
if sys.version_info < (3, 9):
    print('{"error": "old", "text": "%d.%d"}' % sys.version_info[:2])
    sys.exit()
import json, types
for name, source in json.loads(sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    exec(compile(source, name, "exec"), module.__dict__)
sys.exit(module.main(*sys.argv[1:]))
"""


def command(*arguments: str) -> str:
    """The board's command line, which reads what `sent` gives from its input; `arguments` are for main()."""
    return shlex.join(["exec", "python3", "-I", "-S", "-u", "-c", START, *arguments])


@functools.cache
def sent(program: str) -> bytes:
    """A program for the input of `command`."""
    parts = PACKAGE.split(".")
    packages = [(".".join(parts[:count]), "") for count in range(1, len(parts) + 1)]
    modules = [(f"{PACKAGE}.{name}", _source(name)) for name in needed(program)]
    text = json.dumps([*packages, *modules]).encode()
    return b"%d\n%s" % (len(text), text)


def needed(program: str) -> list[str]:
    """The modules of a program, each behind those that it imports."""
    found: list[str] = []
    for node in ast.walk(ast.parse(_source(program))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            inside = (node.module or "")[len(PACKAGE) + 1 :]
            for name in [inside] if inside else [alias.name for alias in node.names]:
                found += [other for other in needed(name) if other not in found]
    return [*found, program]


def _source(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text("utf-8")
