"""Stop strings in text that comes in pieces: nothing is let through that may yet turn out to be one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """`found` once one was met; what comes before the first is let through, nothing of it or after it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is safe to show now."""
        self._held += text
        starts = [start for start in (self._held.find(stop) for stop in self._stops) if start >= 0]
        self.found = bool(starts)
        return self._let(min(starts) if starts else len(self._held) - self._longest_beginning())

    def finish(self) -> str:
        """What was held back, when no text follows."""
        return "" if self.found else self._let(len(self._held))

    def _let(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown

    def _longest_beginning(self) -> int:
        """Of a stop string, at the end of what is held."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0
