"""What the two command lines share: verbs in a table, errors in a few lines, exit codes."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple, NoReturn

from axrun.errors import Failure

INTERRUPTED = 130  # as a shell shows a program that SIGINT ended


class Verb(NamedTuple):
    """One command: what adds its flags to a parser, the function they are handed to, and what its help says."""

    flags: Callable[[argparse.ArgumentParser], None]
    command: Callable[[argparse.Namespace], None]
    summary: str
    examples: str


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line and where to look, instead of the whole usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\nSee `{self.prog} --help`.\n")


class ShowVersion(argparse.Action):
    """Prints the version, which `const` finds out, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"{parser.prog} {self.const()}")
        parser.exit()


def dispatch(
    argv: Sequence[str] | None,
    prog: str,
    version: Callable[[], str],
    description: str,
    epilog: str,
    verbs: Mapping[str, Verb],
) -> int:
    """Runs one verb and returns the exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    parser = Parser(prog=prog, description=description, epilog=epilog)
    shown = "show program's version number and exit"
    parser.add_argument("--version", action=ShowVersion, nargs=0, const=version, help=shown)
    listed = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands")
    for name, verb in verbs.items():
        verb.flags(listed.add_parser(name, help=verb.summary, description=verb.summary, epilog=verb.examples))
    arguments = parser.parse_args(argv)
    if arguments.verb is None:
        parser.print_help()
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what is shown of files may be anything
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        verbs[arguments.verb].command(arguments)
        sys.stdout.flush()
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        _close_stdout()
        return 2
    return 0


def _interrupt(signum: int, frame: object) -> None:
    """Once: what is cleaned up on the way out is not interrupted again."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _close_stdout() -> None:
    """Or the interpreter complains of the same failure when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
