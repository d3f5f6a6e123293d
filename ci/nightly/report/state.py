"""How a night stands, in a mark and words: not by colour alone, and what was not judged never as green."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ci.nightly.history import Night


@dataclass(frozen=True)
class State:
    """`word` is for a reader, `tone` one of good, bad, soft: the class of its mark."""

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
    """How a night stands; the second try and the quarantine are told apart from plain green and red."""
    if not night.green:
        return FLAKY_RED if night.flaky else RED
    if night.quarantined:
        return QUARANTINED
    if night.flaky:
        return FLAKY_GREEN
    return UNJUDGED if night.reason else GREEN


def reason(night: Night) -> str:
    """Why, without what the state says already."""
    return night.reason.removeprefix(f"{of(night).word}: ")


def remarks(night: Night) -> list[str]:
    """What a night has to say beside its reason, where it has."""
    found = [f"first try: {night.flaky}"] if night.flaky else []
    found += [f"in quarantine: {what}: {why}" for what, why in night.quarantined.items()]
    return [*found, *([f"culprit: {night.culprit}"] if night.culprit else [])]


def streak(nights: Sequence[Night]) -> tuple[str, int]:
    """The last night's verdict in short, and how many nights in a row had it; one that was not judged is not green."""
    words = [_short(night) for night in reversed(nights)]
    return words[0], next((count for count, word in enumerate(words) if word != words[0]), len(words))


def _short(night: Night) -> str:
    return "red" if not night.green else "not judged" if of(night) is UNJUDGED else "green"
