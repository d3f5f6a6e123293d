"""How many tokens of each answer run together, so that prompts are read without delaying the next tokens of others."""

from __future__ import annotations

from collections.abc import Sequence

from axrun.job import Job

GUESS_ROWS = 32  # rows of a run that answers share for their next tokens and guesses
LEAST = 8  # rows of prompts beside next tokens: reading goes on at any pace
FIRST = 16  # the same before any was measured
WEIGHT = 0.25  # of the newest run in a mean


class Pace:
    """Learns what rows of prompts cost, and cuts jobs so that a run with next tokens is not slowed down too much."""

    def __init__(self, slowdown: float, most: int) -> None:
        """A run with prompts takes up to about `slowdown` times as long as one without; `most` rows of prompts."""
        self._slowdown, self._most = slowdown, most
        self._plain: float | None = None  # mean seconds of a run without prompts
        self._row: float | None = None  # mean seconds that a row of a prompt adds

    def learn(self, seconds: float, steps: int, read: int) -> None:
        """A run of next tokens for `steps` answers and `read` rows of prompts took `seconds`."""
        if steps and not read:
            self._plain = _mean(self._plain, seconds)
        elif steps and self._plain is not None:
            self._row = _mean(self._row, max(seconds - self._plain, 0.01 * self._plain) / read)

    def rows(self) -> int:
        """Rows of prompts beside next tokens."""
        if self._plain is None or self._row is None:
            return min(FIRST, self._most)
        return max(min(int((self._slowdown - 1) * self._plain / self._row), self._most), min(LEAST, self._most))

    def cut(self, jobs: Sequence[Job]) -> list[Job | None]:
        """What of each job is in the next run; None: nothing. Jobs of one known token always are.

        Prompts share their rows evenly, so that a short one does not wait for a long one.
        """
        steps = [job for job in jobs if job.last == 0]
        guesses = max(GUESS_ROWS // len(steps), 1) if steps else 0
        left = self.rows() if steps else self._most
        counts = {place: min(len(job.tokens), guesses) for place, job in enumerate(jobs) if job.last == 0}
        prompts = sorted((len(job.tokens), place) for place, job in enumerate(jobs) if job.last)
        for number, (length, place) in enumerate(prompts):
            counts[place] = min(length, -(-left // (len(prompts) - number)))
            left -= counts[place]
        return [job.cut(counts[place]) if counts[place] else None for place, job in enumerate(jobs)]


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
