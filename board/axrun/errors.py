"""Exceptions that end a command with a message instead of a traceback.

The message says what was seen, what was expected and what to do next, in one to three lines.
"""

from __future__ import annotations


class Failure(Exception):
    """A failure the user can act on; the command exits with `exit_code`."""

    exit_code = 1


class BadInput(Failure):
    """Unusable input: a file, a flag, a request. Exit code 2."""

    exit_code = 2


class CheckFailed(Failure):
    """The result is wrong or misses its gate. Exit code 1."""

    exit_code = 1


class NotFinite(CheckFailed):
    """An axmodel returned an infinity or a NaN in row `row` of `tensor`. `part` of the model."""

    def __init__(self, part: str, tensor: str, row: int) -> None:
        super().__init__(f"{part or 'the axmodel'} returned a value that is not finite in row {row} of {tensor}")
        self.part, self.tensor, self.row = part, tensor, row
