"""The verdict of a night: green, or red with a reason, from its stages, its gates and earlier nights."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ci.device import commands
from ci.nightly import metrics
from ci.nightly.gate import Gate, Judgement
from ci.nightly.health_log import ADVICE, BOARD
from ci.nightly.history import Night
from ci.nightly.pipeline import MEASURE
from ci.nightly.report.changes import other_bytes
from ci.nightly.stage import INTERRUPTED, Stage

TREND = 10  # green nights that a drift is measured against
FEWEST_FOR_TREND = 5
NO_GATE = "no gates for"
GREEN, RED, NOT_HELD = 0, 1, 2  # exit codes


@dataclass(frozen=True)
class Verdict:
    """`reason` says why the night is red or was not judged; empty for green by gates.

    `stage` is the failed stage, `code` the exit code.
    """

    reason: str
    advice: str = ""
    stage: str = ""
    code: int = GREEN

    @property
    def word(self) -> str:
        return "red" if self.code else "green"

    def after(self, first: str) -> Verdict:
        """The verdict of a retried night: if red, with the reason of the first attempt too."""
        reason = f"{self.reason} (on the second try; the first: {first})"
        return replace(self, reason=reason) if first and self.code else self


def verdict(
    stages: Sequence[Stage],
    judged: Sequence[Judgement],
    tests: Sequence[str],
    before: Sequence[Night],
    night: Night,
    mismatches: Sequence[str] = (),
    unjudged: str = "",
) -> Verdict:
    """Green, or red with the first reason, which usually explains the others.

    `tests` are the messages of failed board tests, `before` the earlier nights, `night` this one, `mismatches` the
    differences between the measured and the deployed release, `unjudged` why no gate judges it.
    """
    failed = [stage for stage in stages if stage.failed]
    first = failed[0] if failed else None
    if first is not None and (first.name != MEASURE or first.outcome != "failed"):
        reason, _, advice = first.reason.partition("\n")
        code = NOT_HELD if first.code in (NOT_HELD, INTERRUPTED) else RED
        if reason.startswith(BOARD):
            return Verdict(reason, advice or ADVICE.format(board=night.board), first.name, code)
        return Verdict(f"{first.name}: {reason}", advice, first.name, code)
    if mismatches:
        more = f" (and {len(mismatches) - 1} more)" if len(mismatches) > 1 else ""
        return Verdict(
            f"the measured release differs from the deployed one: {mismatches[0].partition(chr(10))[0]}{more}",
            "The figures do not belong to this build. Find what else writes to the board, then deploy again.",
            MEASURE,
            RED,
        )
    red = sorted((entry for entry in judged if entry.red), key=_weight)
    known = (*(entry.reason() for entry in red), NO_GATE)
    broken = [test for test in dict.fromkeys(tests) if not test.startswith(known)]
    reasons = broken + [entry.reason() for entry in red if not broken or entry.value is not None]
    ungated = bool(judged) and not unjudged and not any(entry.gate for entry in judged)
    if not reasons and first is not None and not ungated:
        reasons = [f"{first.name}: {first.reason}"]
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        first_line, _, rest = reasons[0].partition("\n")
        advice = _advice(night) if not broken and red and red[0].value is not None else ""
        return Verdict(first_line + more, rest or advice, MEASURE, RED)
    if not judged:
        return Verdict("nothing was measured on the board", "", MEASURE, RED)
    if ungated:
        return Verdict(f"{NO_GATE} {night.maker} bundles here", _recorded(night), MEASURE, RED)
    if twin := _earlier_build(before, night):
        files = other_bytes(twin, night)
        return Verdict(
            f"the build is not reproducible: on {twin.started[:10]} the same commit built other bytes: {files[0]}"
            + (f" (and {len(files) - 1} more)" if len(files) > 1 else ""),
            f"Builds must be reproducible: {commands.make('verify-reproducible')}",
            "build",
            RED,
        )
    return Verdict(unjudged, _recorded(night) if unjudged else "")


def drifts(figures: metrics.Figures, gates: Mapping[str, Gate], before: Sequence[Night], maker: str) -> Iterator[str]:
    """Figures within their gates, but worse than the median of green nights by more than half the tolerance."""
    green = [night for night in before if night.judged_green and night.maker == maker][-TREND:]
    for name, value in figures.items():
        past = [
            night.figures[name]
            for night in green
            if name in night.figures and f"figure {name}" not in night.quarantined
        ]
        if name not in gates or len(past) < FEWEST_FOR_TREND:
            continue
        usual, metric = statistics.median(past), metrics.find(name)
        worse = (usual - value) if metric.higher else (value - usual)
        if worse > gates[name].tolerance / 2:
            yield (
                f"{metric.label} is drifting: {metric.text(value)}, the last {len(past)} green nights had "
                f"{metric.text(usual)}; still within its gate"
            )


def _weight(judged: Judgement) -> tuple[int, int, int]:
    """Sort key: worse figures first, then suspiciously good ones, then missing ones."""
    outcome = ("worse", "too good", "not measured").index(judged.outcome) if judged.red else 3
    return (outcome, *metrics.rank(judged.metric.name))


def _advice(night: Night) -> str:
    return "Find the cause. If the change is intended, record new gates from nights that have it: " + _record(night)


def _recorded(night: Night) -> str:
    return "Once the figures of three nights are right, record them as gates: " + _record(night)


def _record(night: Night) -> str:
    """The command that records gates."""
    where = ("--board", night.board, "--model", night.model, "--maker", night.maker or "cpu")
    return commands.invoke("gate.record", *where)


def _earlier_build(before: Sequence[Night], night: Night) -> Night | None:
    """The last night whose build of the same commit and maker had other bytes; None for a bundle built elsewhere."""
    if not night.files or not night.commit or night.commit.endswith("+") or night.handed_in:
        return None
    same = [
        past
        for past in before
        if past.files and not past.handed_in and past.commit == night.commit and past.maker == night.maker
    ]
    return same[-1] if same and other_bytes(same[-1], night) else None
