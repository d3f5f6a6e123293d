"""Shared by the command lines of axc and axrun: a table of verbs, short error messages, exit codes."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple, NoReturn

from axrun.errors import Failure

INTERRUPTED = 130  # the exit code that shells report after SIGINT


class Verb(NamedTuple):
    """A command: the function that adds its flags, the function that runs it, and its help texts."""

    flags: Callable[[argparse.ArgumentParser], None]
    command: Callable[[argparse.Namespace], None]
    summary: str
    examples: str


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line with a pointer to --help, instead of the whole usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\nSee `{self.prog} --help`.\n")


class ShowVersion(argparse.Action):
    """Prints the version returned by `const`, and exits."""

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
        sys.stdout.reconfigure(errors="backslashreplace")  # file contents in messages may not be printable
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        verbs[arguments.verb].command(arguments)
        sys.stdout.flush()
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt as interrupt:
        print("\n" + ": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
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
    """Raises KeyboardInterrupt once; a second signal must not interrupt the clean-up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _close_stdout() -> None:
    """Otherwise the interpreter reports the same error again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
