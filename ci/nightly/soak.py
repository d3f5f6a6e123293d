"""python -m ci.nightly.soak BOARD DEPLOYED OUT [REQUESTS]: soak test of `axrun serve` of the deployed release with
concurrent users.

The server is started several times (its "lives"). With our engine and our axmodels an answer depends only on its
request: it must equal the first answer to the same question, from a fresh process. Other engines may round cached rows
from other prefill chunks differently, which rarely changes a token: such differences are counted, and only answers that
reused nothing must be equal.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axrun.errors import BadInput, CheckFailed, Failure
from ci.device import evidence, place
from ci.device.connection import Connection
from ci.device.place import Board
from ci.device.programs import SERVER
from ci.device.ssh import Lost
from ci.nightly import soak_load
from ci.nightly.soak_load import CUT, LOST, REFUSED, WHOLE, Client, Outcome, Question

SHORT, LONG = 40, 1000  # requests of every night, and with --soak
LIVES = {SHORT: 2}  # server starts by number of requests; LONG_LIVES for any other number
LONG_LIVES = 6
USERS, TOKENS, SEED = 4, 12, 10
LOAD_SECONDS, STOP_SECONDS, IDLE_SECONDS = 600.0, 60.0, 30.0
SAMPLES = 40  # of memory, per server life
WARM = 0.3  # share of a life's requests that counts as warm-up
# A leak: growth above MOST_SLOPE MB per 1000 requests by CERTAIN standard errors, and above LEAST_GROWTH MB per life.
MOST_SLOPE, LEAST_GROWTH, CERTAIN = 8.0, 4.0, 3.0
CMM_SLACK = 1 << 20  # bytes
MOST_DIFFERING = 0.1  # share of the answers with reused cache rows
MB = 1e6


@dataclass(frozen=True)
class Sample:
    """Memory in bytes after `requests` requests of a server life; None if the board does not report it."""

    life: int
    requests: int
    rss: int | None
    available: int | None
    cmm: int | None


@dataclass
class Soak:
    """The result of a soak test: counts of outcomes, memory samples, and `faults`, which make it fail."""

    requests: int
    users: int
    answers: int = 0
    cut: int = 0
    lost: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    compared: int = 0
    reused_differing: int = 0
    reused_compared: int = 0
    reused_tokens: int = 0
    starts: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    cmm: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, outcome: Outcome, exact: bool) -> None:
        """Counts a request, and compares its answer with the first one to the same question."""
        about = f"{outcome.question.text[:40]!a}"
        if outcome.kind == CUT:
            self.cut += 1
        elif outcome.kind == LOST:
            self.lost.append(f"{about}: {outcome.why}")
        elif outcome.kind == REFUSED:
            self.refused.append(f"{outcome.status} to {about}: {outcome.why}")
        else:
            self.answers += 1
            self.ttft.append(outcome.ttft)
            self.whole.append(outcome.seconds)
            self.reused_tokens += outcome.reused
            same = outcome.text == outcome.question.first
            if exact or not outcome.reused:
                self.compared += 1
                if not same:
                    was, now = outcome.question.first[:40], outcome.text[:40]
                    self.differing.append(f"{about} was answered with {was!a}, then with {now!a}")
            else:
                self.reused_compared += 1
                self.reused_differing += not same

    def figures(self) -> dict[str, float]:
        """The figures for the history."""
        found = {f"soak_ttft_{share}": 1e3 * percentile(self.ttft, share) for share in (50, 99) if self.ttft}
        found |= {f"soak_answer_{share}": 1e3 * percentile(self.whole, share) for share in (50, 99) if self.whole}
        if (trend := slope(self.samples)) is not None:
            found["soak_memory"] = trend.growth  # 40 requests are too few for a meaningful slope
        if self.reused_compared:
            found["soak_differing"] = 100 * self.reused_differing / self.reused_compared
        return found

    def lines(self) -> Iterator[str]:
        """The result in lines for a console."""
        yield (
            f"{self.answers} answers, {self.cut} cancelled requests, {self.users} concurrent users, "
            f"{len(self.starts)} server starts, {self.seconds:.0f} s"
        )
        yield (
            f"{self.compared} answers compared with the first to the same question: {len(self.differing)} differ; "
            f"{self.reused_compared} more with reused cache rows: {self.reused_differing} differ"
        )
        if self.ttft and self.whole:
            first, whole = ([percentile(times, share) for share in (50, 99)] for times in (self.ttft, self.whole))
            yield (
                f"first token {1e3 * first[0]:.0f} ms (99 %: {1e3 * first[1]:.0f}), "
                f"answer {1e3 * whole[0]:.0f} ms (99 %: {1e3 * whole[1]:.0f})"
            )
        if (trend := slope(self.samples)) is not None:
            yield f"memory of the server: {trend.text()}"


@dataclass(frozen=True)
class Trend:
    """Memory growth: MB per 1000 requests, its standard error, and the fitted growth in MB over the longest life."""

    slope: float
    error: float
    growth: float

    @property
    def leaks(self) -> bool:
        return self.slope - CERTAIN * self.error > MOST_SLOPE and self.growth > LEAST_GROWTH

    def text(self) -> str:
        return f"{self.slope:+.1f} ± {self.error:.1f} MB per 1000 requests, {self.growth:+.1f} MB per server life"


def soak(
    link: Connection,
    command: Sequence[str],
    requests: int = SHORT,
    users: int = USERS,
    say: Callable[[str], None] = lambda line: None,
    exact: bool = True,
) -> Soak:
    """Starts the server with `command` on the board and sends it `requests` questions.

    `exact`: reuse of the cache must not change an answer.
    Faults of the server are in `faults` of the result. Raises CheckFailed, BadInput or Lost for other failures.
    """
    found, started = Soak(requests, users), time.monotonic()
    lives = LIVES.get(requests, LONG_LIVES)
    asked: list[Question] = []
    for life in range(lives):
        share = requests // lives + (life < requests % lives)
        if not _live(link, command, found, life, exact, share, asked):
            break
        say(f"life {life + 1} of {lives}: {found.answers + found.cut} requests, {len(found.faults)} faults")
    found.seconds = time.monotonic() - started
    found.faults += judge(found)
    return found


def judge(found: Soak) -> Iterator[str]:
    """The faults, the worst first."""
    if found.lost:
        yield f"{len(found.lost)} requests were lost; the first: {found.lost[0]}"
    if found.refused:
        yield f"{len(found.refused)} requests were refused; the first: {found.refused[0]}"
    if found.differing:
        yield f"{len(found.differing)} of {found.compared} answers changed: {found.differing[0]}"
    if found.reused_compared and found.reused_differing > max(1, MOST_DIFFERING * found.reused_compared):
        yield (
            f"{found.reused_differing} of {found.reused_compared} answers with reused cache rows differ from the "
            f"first ones; rounding alone changes fewer than {MOST_DIFFERING:.0%}"
        )
    trend = slope(found.samples)
    if trend is not None and trend.leaks:
        yield f"axrun serve leaks memory: {trend.text()}; the limit is {MOST_SLOPE:.0f} MB per 1000 requests"
    if found.cmm and found.cmm[-1] < found.cmm[0] - CMM_SLACK:
        yield (
            f"CMM is not released: {found.cmm[0] / MB:.0f} MB were free before the first server started, "
            f"{found.cmm[-1] / MB:.0f} MB after the last one stopped"
        )


def slope(samples: Sequence[Sample]) -> Trend | None:
    """Least-squares fit of the server's resident memory: one slope for all lives, an offset for each.

    Warm-up samples (the share WARM of a life) are skipped. None for too few samples.
    """
    lives: dict[int, list[tuple[float, float]]] = {}
    for sample in samples:
        if sample.rss is not None:
            lives.setdefault(sample.life, []).append((sample.requests, sample.rss / MB))
    dx: list[float] = []
    dy: list[float] = []
    longest, used = 0.0, 0
    for points in lives.values():
        end = max(requests for requests, _ in points)
        warm = [point for point in points if point[0] >= WARM * end]
        if len(warm) < 3:
            continue
        used += 1
        x, y = statistics.fmean(point[0] for point in warm), statistics.fmean(point[1] for point in warm)
        dx += [point[0] - x for point in warm]
        dy += [point[1] - y for point in warm]
        longest = max(longest, warm[-1][0] - warm[0][0])
    spread = sum(value * value for value in dx)
    freedom = len(dx) - used - 1
    if freedom < 1 or not spread:
        return None
    per_request = sum(a * b for a, b in zip(dx, dy, strict=True)) / spread
    rest = sum((b - per_request * a) ** 2 for a, b in zip(dx, dy, strict=True))
    error = math.sqrt(rest / freedom / spread)
    return Trend(1000 * per_request, 1000 * error, per_request * longest)


def percentile(values: Sequence[float], share: int) -> float:
    """The percentile `share` by the nearest-rank method."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)]


def _live(
    link: Connection, command: Sequence[str], found: Soak, life: int, exact: bool, requests: int, asked: list[Question]
) -> bool:
    """One life of the server: start, load, stop. Returns whether to go on."""
    if not life and (left := link.call("sample")["cmm"]) is not None:
        found.cmm.append(left)
    began = link.call("start", LOAD_SECONDS + 60, command=list(command), limit=LOAD_SECONDS)
    if not 0 < began["port"] < 1 << 16:
        found.faults.append(f"axrun serve did not start (start {life + 1}): {began['why'][:300]!a}")
        return False
    found.starts.append(round(began["seconds"], 3))
    with link.forwarded(began["port"]) as port:
        client = Client(port, TOKENS)
        if not asked and not _first(client, found, asked):
            _died(link, found, life, 0)
            return False
        client.close()
        done = 0
        each = max(1, requests // SAMPLES)

        def told(outcome: Outcome) -> bool:
            nonlocal done
            found.note(outcome, exact)
            done += 1
            if outcome.kind == LOST and _died(link, found, life, done):
                return False
            if done % each == 0:
                seen = link.call("sample")
                found.samples.append(Sample(life, done, seen["rss"], seen["available"], seen["cmm"]))
            return True

        soak_load.load(lambda: Client(port, TOKENS, client.chat), asked, requests, found.users, SEED + life, told)
        if any("died" in fault for fault in found.faults):
            return False
        _settled(port, found, done + (len(asked) if not life else 0))
    ended = link.call("stop", STOP_SECONDS + 60, limit=STOP_SECONDS)
    if ended["code"] is None:
        found.faults.append(f"axrun serve did not end within {STOP_SECONDS:.0f} s of SIGTERM")
    elif ended["code"] != 0:
        found.faults.append(f"axrun serve exited with code {ended['code']} on SIGTERM: {ended['said'][:200]!a}")
    if ended["traceback"]:
        found.faults.append(f"axrun serve printed a traceback: {ended['traceback'][:200]!a}")
    if (left := link.call("sample")["cmm"]) is not None:
        found.cmm.append(left)
    return True


def _first(client: Client, found: Soak, asked: list[Question]) -> bool:
    """Collects the first answers, the baseline of all others. Returns whether there are any."""
    for outcome in soak_load.questions(client):
        if outcome.kind != WHOLE:
            found.note(outcome, True)
            return False
        asked.append(dataclasses.replace(outcome.question, first=outcome.text))
    return bool(asked)


def _died(link: Connection, found: Soak, life: int, requests: int) -> bool:
    """Whether the server died, which is a fault. Polls for a second: the connection breaks before the process ends."""
    for _ in range(10):
        seen = link.call("sample")
        if seen["code"] is not None:
            found.faults.append(
                f"axrun serve died in life {life + 1} after {requests} requests, exit code {seen['code']}: "
                f"{seen['said'][:200]!a}"
            )
            found.lost.clear()  # explained by the crash
            return True
        time.sleep(0.1)
    return False


def _settled(port: int, found: Soak, sent: int) -> None:
    """Checks that slots of disconnected clients become free, and that the server counted every request."""
    deadline, counted = time.monotonic() + IDLE_SECONDS, {}
    try:
        while time.monotonic() < deadline:
            counted = soak_load.counts(port)
            if not counted.get("axrun_slots_busy") and not counted.get("axrun_requests_waiting"):
                break
            time.sleep(0.1)
        else:
            found.faults.append(f"a slot of axrun serve is still busy {IDLE_SECONDS:.0f} s after the last request")
    except OSError as error:
        found.faults.append(f"axrun serve does not answer /metrics: {error}")
        return
    paths = ('path="/v1/chat/completions"', 'path="/v1/completions"')
    seen = sum(
        n for name, n in counted.items() if name.startswith("axrun_requests_total{") and any(p in name for p in paths)
    )
    if seen < sent:
        found.faults.append(f"axrun serve counted {seen:.0f} requests, {sent} were sent")


def on_board(board: Board, deployed: Path, requests: int, say: Callable[[str], None]) -> Soak:
    """Soak-tests the deployed release. Raises BadInput, CheckFailed."""
    if requests < 1:
        raise BadInput(f"{requests} requests: expected at least 1")
    record = evidence.read(deployed)
    if record.board != board.name:
        raise BadInput(f"{deployed} records a deploy to {record.board}, but this board is {board.name}")
    release = f"{board.root}/releases/{record.release}"
    patient = ["--threads", "1", "--read-timeout", "60"]  # for a busy host that emulates the board
    flags = ["--port", "0", "--engine", board.engine, *(patient if board.emulated else [])]
    command = ["sh", f"{release}/axrun", "serve", f"{release}/model", *flags]
    try:
        with Connection(board, place.address(board), SERVER) as link:
            return soak(link, command, requests, say=say, exact=board.engine == "ax" and record.maker == "cpu")
    except Lost as lost:
        raise CheckFailed(f"{board.name} was lost during the soak: {lost}") from None


def report(found: Soak, board: Board) -> Mapping[str, Any]:
    """The content of soak.json."""
    return {"board": board.name, **dataclasses.asdict(found), "figures": found.figures(), "told": list(found.lines())}


def main(argv: Sequence[str]) -> int:
    try:
        name, deployed, out, *more = argv
        board = place.find(name)
        found = on_board(board, Path(deployed), int(more[0]) if more else SHORT, lambda line: print(line, flush=True))
        Path(out).write_text(json.dumps(report(found, board)) + "\n", "utf-8")
        print("\n".join(found.lines()))
        if found.faults:
            more_faults = f" (and {len(found.faults) - 1} more)" if len(found.faults) > 1 else ""
            raise CheckFailed(found.faults[0] + more_faults)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr, flush=True)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
