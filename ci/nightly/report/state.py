"""The state of a night as a mark and a word, not by colour alone. A night that was not judged is never plain green."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ci.nightly.history import Night


@dataclass(frozen=True)
class State:
    """`word` is shown, `tone` (good, bad, soft) is the CSS class of the mark."""

    word: str
    mark: str
    tone: str


GREEN, RED = State("green", "✓", "good"), State("red", "✗", "bad")
UNJUDGED = State("recorded, not judged", "○", "soft")
QUARANTINED = State("green, with figures in quarantine", "◐", "soft")
FLAKY_GREEN, FLAKY_RED = State("green on the second try", "↻", "soft"), State("red, flaky", "✗", "bad")
NOT_HELD = State("not held", "✗", "bad")
EXCLUDED = State("excluded", "-", "soft")


def of(night: Night) -> State:
    """The state of a night; retried and quarantined nights have states of their own."""
    if not night.green:
        return FLAKY_RED if night.flaky else RED
    if night.quarantined:
        return QUARANTINED
    if night.flaky:
        return FLAKY_GREEN
    return UNJUDGED if night.reason else GREEN


def reason(night: Night) -> str:
    """The reason without the words that the state already shows."""
    return night.reason.removeprefix(f"{of(night).word}: ")


def remarks(night: Night) -> list[str]:
    """Remarks on retry, quarantine and bisection, if any."""
    found = [f"first try: {night.flaky}"] if night.flaky else []
    found += [f"in quarantine: {what}: {why}" for what, why in night.quarantined.items()]
    return [*found, *([f"culprit: {night.culprit}"] if night.culprit else [])]


def streak(nights: Sequence[Night]) -> tuple[str, int]:
    """The last night's verdict, and the length of its streak; a night that was not judged is not green."""
    words = [_short(night) for night in reversed(nights)]
    return words[0], next((count for count, word in enumerate(words) if word != words[0]), len(words))


def _short(night: Night) -> str:
    return "red" if not night.green else "not judged" if of(night) is UNJUDGED else "green"
