"""Detection of stop strings in streamed text: holds back text that may become a stop string.

Special tokens are not shown, but a stop string may spell one; they are matched as hidden text.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """`found` is set once a stop string was found. Only the text before the first one is released."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # (start, stop) of hidden text in the buffer
        self.found = False

    def push(self, text: str, hidden: str = "") -> str:
        """Adds text; returns what can be shown now. `hidden` follows `text` and is matched but never shown."""
        self._held += text
        if hidden and self._stops:
            self._hidden.append((len(self._held), len(self._held) + len(hidden)))
            self._held += hidden
        starts = [start for start in (self._held.find(stop) for stop in self._stops) if start >= 0]
        self.found = bool(starts)
        return self._let(min(starts) if starts else len(self._held) - self._longest_beginning())

    def finish(self) -> str:
        """The text that is still held back, at the end of the answer."""
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
        """Length of the longest prefix of a stop string at the end of the buffer."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0
