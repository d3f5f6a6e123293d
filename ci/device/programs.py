"""Sends a program of ci/device/on_board over SSH, with the modules of that folder that it imports.

Nothing is stored on the board. The board needs only Python 3.9.
"""

from __future__ import annotations

import ast
import functools
import json
import shlex
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "on_board"
PACKAGE = "ci.device.on_board"
RELEASES, STATE, SERVER, ATTEND = "releases", "state", "server", "attend"  # modules with a main()

# Bootstrap: reads the size, then the modules, and runs them; too old a Python answers with an error.
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
    """The command line for the board; it reads the output of `sent` from stdin. `arguments` are for main()."""
    return shlex.join(["exec", "python3", "-I", "-S", "-u", "-c", START, *arguments])


@functools.cache
def sent(program: str) -> bytes:
    """A program, encoded for the stdin of `command`."""
    parts = PACKAGE.split(".")
    packages = [(".".join(parts[:count]), "") for count in range(1, len(parts) + 1)]
    modules = [(f"{PACKAGE}.{name}", _source(name)) for name in needed(program)]
    text = json.dumps([*packages, *modules]).encode()
    return b"%d\n%s" % (len(text), text)


def needed(program: str) -> list[str]:
    """The modules of a program, each after those that it imports."""
    found: list[str] = []
    for node in ast.walk(ast.parse(_source(program))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            inside = (node.module or "")[len(PACKAGE) + 1 :]
            for name in [inside] if inside else [alias.name for alias in node.names]:
                found += [other for other in needed(name) if other not in found]
    return [*found, program]


def _source(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text("utf-8")
