"""Stop strings in text that comes in pieces: nothing is let through that may yet turn out to be one.

Special tokens of an answer are not shown, and yet a stop string may spell one: they are looked at as hidden text.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """`found` once one was met; what comes before the first is let through, nothing of it or after it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # of what is held: not to be shown, (start, stop)
        self.found = False

    def push(self, text: str, hidden: str = "") -> str:
        """The text that is safe to show now. `hidden` follows `text` and is only looked at."""
        self._held += text
        if hidden and self._stops:
            self._hidden.append((len(self._held), len(self._held) + len(hidden)))
            self._held += hidden
        starts = [start for start in (self._held.find(stop) for stop in self._stops) if start >= 0]
        self.found = bool(starts)
        return self._let(min(starts) if starts else len(self._held) - self._longest_beginning())

    def finish(self) -> str:
        """What was held back, when no text follows."""
        return "" if self.found else self._let(len(self._held))

    def _let(self, count: int) -> str:
        shown, at = "", 0
        for start, stop in self._hidden:
            shown += self._held[at : max(min(start, count), at)]
            at = min(stop, count)
        shown += self._held[at:count]
        self._held = self._held[count:]
        self._hidden = [(max(start - count, 0), stop - count) for start, stop in self._hidden if stop > count]
        return shown

    def _longest_beginning(self) -> int:
        """Of a stop string, at the end of what is held."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0
