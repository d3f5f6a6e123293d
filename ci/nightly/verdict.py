"""Green, or red with the reason: what the stages, the gates and the nights before say of a night."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ci.device import commands
from ci.nightly import metrics
from ci.nightly.course import MEASURE
from ci.nightly.gate import Gate, Judgement
from ci.nightly.health_log import ADVICE, BOARD
from ci.nightly.history import Night
from ci.nightly.report.changes import other_bytes
from ci.nightly.stage import INTERRUPTED, Stage

TREND = 10  # green nights a drift is told from
FEWEST_FOR_TREND = 5
NO_GATE = "no gate says"
GREEN, RED, NOT_HELD = 0, 1, 2  # exit codes


@dataclass(frozen=True)
class Verdict:
    """`reason` is empty when green by gates, else why it is red or was not judged.

    `stage` is the one that failed, `code` what the nightly exits with.
    """

    reason: str
    advice: str = ""
    stage: str = ""
    code: int = GREEN

    @property
    def word(self) -> str:
        return "red" if self.code else "green"

    def after(self, first: str) -> Verdict:
        """Of a night whose first try failed for that reason: a red one has both."""
        reason = f"{self.reason} (on the second try; the first: {first})"
        return replace(self, reason=reason) if first and self.code else self


def verdict(
    stages: Sequence[Stage],
    judged: Sequence[Judgement],
    tests: Sequence[str],
    before: Sequence[Night],
    night: Night,
    unlike: Sequence[str] = (),
    unjudged: str = "",
) -> Verdict:
    """The first reason to be red, the one that explains the others; green where there is none.

    `tests` are the board tests that failed, `before` the nights of history, `night` what is known of this one,
    `unlike` where what was measured is not what was built and deployed, `unjudged` why no gate judges it.
    """
    failed = [stage for stage in stages if stage.failed]
    first = failed[0] if failed else None
    if first is not None and (first.name != MEASURE or first.outcome != "failed"):
        reason, _, advice = first.reason.partition("\n")
        code = NOT_HELD if first.code in (NOT_HELD, INTERRUPTED) else RED
        if reason.startswith(BOARD):
            return Verdict(reason, advice or ADVICE.format(board=night.board), first.name, code)
        return Verdict(f"{first.name}: {reason}", advice, first.name, code)
    if unlike:
        more = f" (and {len(unlike) - 1} more)" if len(unlike) > 1 else ""
        return Verdict(
            f"what was measured is not what was deployed: {unlike[0].partition(chr(10))[0]}{more}",
            "The figures are of something else. Find who writes to the board beside the deploys, then deploy again.",
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
        return Verdict(f"{NO_GATE} what {night.maker} bundles must measure here", _recorded(night), MEASURE, RED)
    if twin := _twin(before, night):
        files = other_bytes(twin, night)
        return Verdict(
            f"the bundle is not the one that the same commit built on {twin.started[:10]}: {files[0]} has other bytes"
            + (f" (and {len(files) - 1} more)" if len(files) > 1 else ""),
            f"Builds must be reproducible: {commands.make('verify-reproducible')}",
            "build",
            RED,
        )
    return Verdict(unjudged, _recorded(night) if unjudged else "")


def drifts(figures: metrics.Figures, gates: Mapping[str, Gate], before: Sequence[Night], maker: str) -> Iterator[str]:
    """Figures within their gates that have moved by more than half a tolerance from what green nights had."""
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
                f"{metric.label} is drifting: {metric.text(value)}, while the last {len(past)} green nights had "
                f"{metric.text(usual)}; its gate still holds"
            )


def _weight(judged: Judgement) -> tuple[int, int, int]:
    """What was measured and is worse says more than what was not measured."""
    outcome = ("worse", "too good", "not measured").index(judged.outcome) if judged.red else 3
    return (outcome, *metrics.rank(judged.metric.name))


def _advice(night: Night) -> str:
    return "Look at what changed. If the jump is right, record the gates anew from the nights that show it: " + _record(
        night
    )


def _recorded(night: Night) -> str:
    return "When the figures of three nights are right, record them: " + _record(night)


def _record(night: Night) -> str:
    where = ("--board", night.board, "--model", night.model, "--maker", night.maker or "cpu")
    return commands.invoke("gate.record", *where)


def _twin(before: Sequence[Night], night: Night) -> Night | None:
    """The last night that built the same commit with the same maker to other bytes; none of a bundle handed in."""
    if not night.files or not night.commit or night.commit.endswith("+") or night.handed_in:
        return None
    same = [
        past
        for past in before
        if past.files and not past.handed_in and past.commit == night.commit and past.maker == night.maker
    ]
    return same[-1] if same and other_bytes(same[-1], night) else None
