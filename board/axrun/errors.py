"""The two ways a command can end badly.

A message says what was seen, what was expected and what to do next, in one to three lines.
"""

from __future__ import annotations


class Failure(Exception):
    """A failure a user can act on; `exit_code` is what the command exits with."""

    exit_code = 1


class BadInput(Failure):
    """What was handed in cannot be used: a file, a flag, a request. Exit code 2."""

    exit_code = 2


class CheckFailed(Failure):
    """The work was done and what came out is wrong or below its gate. Exit code 1."""

    exit_code = 1


class NotFinite(CheckFailed):
    """An axmodel gave an infinity or a NaN: in row `row` of `tensor`. `part` is what its file says it is."""

    def __init__(self, part: str, tensor: str, row: int) -> None:
        super().__init__(f"{part or 'the axmodel'} gave a value that is not finite in row {row} of {tensor}")
        self.part, self.tensor, self.row = part, tensor, row
