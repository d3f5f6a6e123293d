"""python -m ci.nightly.health BOARD HISTORY WORK OUT [--renew] [--bundle DIR]: the board's health check, run before any
new code.

A known-good runner and bundle are stored on the board under <root>/health. They are deployed and verified once; a night
never replaces them. The check compares their files with the deployed ones, runs a fixed prompt, and compares the answer
with the known one, and speed, memory and disk with earlier checks of this board. None of this changes with the code, so
a failure is the board's.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axc import build
from axc.fetch import fetch
from axc.models import load_model
from axrun.errors import BadInput, CheckFailed, Failure
from axrun.run import Options, Question, run
from ci.device import deploy, evidence, place, strict_json, wheelhouse
from ci.device.connection import Connection
from ci.device.evidence import Record
from ci.device.place import Address, Board
from ci.device.programs import STATE
from ci.device.ssh import Lost
from ci.device.wheelhouse import Package
from ci.nightly import health_log
from ci.nightly.health_log import FIRST, HEALTHY, UNHEALTHY, Check

FOLDER = "health"  # under the root of the releases
MODEL = "tiny-qwen2"
PROMPT, TOKENS = "who are you?", 40
# The greedy answer of the float32 checkpoint, by transformers; a test recomputes it.
ANSWER = (40, 486, 258, 264, 88, 12, 80, 86, 297, 17, 11, 256, 220, 505, 88, 271, 76, 64, 337, 275, 265, 70, 84, 64,
          475, 566, 535, 572, 563, 82, 13)  # fmt: skip
ASKED = 3  # runs for the best speed; one on an emulated board, whose speed is the host's
ASK_SECONDS, LISTING_SECONDS = 900, 900
KIT = "kit.json"
SCHEMA = 1

Say = Callable[[str], None]


class NotMade(CheckFailed):
    """The known-good bundle cannot be built on this machine: not the board's fault."""


@dataclass(frozen=True)
class Kit:
    """The known-good release on the board: its deploy record, its prompt, and its answer (None: not known yet)."""

    record: Record
    prompt: str
    tokens: tuple[int, ...] | None

    def write(self, file: Path) -> None:
        """Raises BadInput when it cannot be written."""
        kept = {"schema": SCHEMA, **dataclasses.asdict(self)}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(kept, sort_keys=True) + "\n", "utf-8")
        except OSError as error:
            raise BadInput(f"cannot write {file}: {error.strerror or error}") from None

    @classmethod
    def read(cls, file: Path) -> Kit | None:
        """None if the file is missing or unusable; the caller then deploys a new kit."""
        try:
            kept = strict_json.read(file)
            if kept.pop("schema") != SCHEMA:
                return None
            tokens = None if kept["tokens"] is None else tuple(map(int, kept["tokens"]))
            return cls(Record(**kept["record"]), str(kept["prompt"]), tokens)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass
class Observed:
    """What a check found on a board, before judging it."""

    state: Mapping[str, Any]
    sent: bool = False  # the kit was built and deployed by this check
    faults: list[str] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    speed: dict[str, float] = field(default_factory=dict)


def check(
    board: Board,
    history: Path,
    work: Path,
    say: Say = lambda line: None,
    *,
    renew: bool = False,
    bundle: Path | None = None,
    package: Callable[[], Package] | None = None,
    at: Address | None = None,
) -> Check:
    """Checks a board that is on, and appends the result to its log in `history`.

    If the board has no known-good bundle yet, or on `renew`, a new one is deployed: MODEL, or `bundle` (for example one
    for the NPU). `package` builds the runner for it, by default in `work`. `at` is the board's address.
    Raises BadInput for a board that is unreachable or full, CheckFailed if the connection was lost.
    """
    folder = health_log.place(history, board.name)
    before = health_log.read(folder)
    at = at or place.address(board)
    mine = dataclasses.replace(board, root=f"{board.root}/{FOLDER}")
    kit = None if renew or bundle else Kit.read(folder / KIT)
    try:
        with Connection(board, at, STATE) as link:
            state = link.call("state")
        there = kit is not None and _is_on_board(mine, at, kit)
        if kit is None or not there:
            say(f"{'deploying again' if renew else 'first check of this board: deploying'} the known-good bundle")
            kit = _send(mine, at, package or (lambda: wheelhouse.cross(board.python, work)), bundle, say)
            kit.write(folder / KIT)
        seen = _inspect(mine, at, kit, Observed(state, sent=not there))
    except Lost as lost:
        raise CheckFailed(f"{board.name} was lost during its health check: {lost}") from None
    if kit.tokens is None and seen.tokens and not seen.faults:
        kit = dataclasses.replace(kit, tokens=seen.tokens)
        kit.write(folder / KIT)
    found = judge(board, kit, seen, before)
    health_log.append(folder, found)
    return found


def judge(board: Board, kit: Kit, seen: Observed, before: Sequence[Check]) -> Check:
    """The check of what was seen; `before` are the board's earlier checks."""
    faults = list(seen.faults)
    if not faults and kit.tokens is not None and seen.tokens != kit.tokens:
        made = "; it was just built from this checkout, which may be at fault too" if seen.sent else ""
        faults.append(_answer_difference(kit, seen.tokens) + made)
    state = seen.state
    sizes = {name: float(state[name]) for name in ("memory", "cmm", "disk") if state[name] is not None}
    found = Check(
        started=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        word=UNHEALTHY,
        kit=kit.record.release,
        tokens=seen.tokens,
        speed=seen.speed,
        sizes=sizes,
        versions=_strings(state["versions"]),
    )
    kept = sum(1 for past in before if past.kit == found.kit)
    notes = list(health_log.changes(before, found))
    if board.emulated:
        notes.append("speed, memory and disk of an emulated board are the host's: recorded, not judged")
    else:
        faults += health_log.worse(before, found)
        notes += health_log.trends(before, found)
    word = UNHEALTHY if faults else HEALTHY if kept else FIRST
    if word == FIRST:
        notes.insert(0, "first check with this bundle: no baseline for speed and memory yet")
    return dataclasses.replace(found, word=word, faults=tuple(faults), notes=tuple(notes))


def _is_on_board(board: Board, at: Address, kit: Kit) -> bool:
    """Whether the board has the known-good bundle, intact or not; a new disk does not."""
    with Connection(board, at) as link:
        seen = link.call("inventory", LISTING_SECONDS, **_names(kit.record))
    return bool(seen["current"] or seen["release"] or seen["package"] or seen["model"])


def _send(board: Board, at: Address, make: Callable[[], Package], bundle: Path | None, say: Say) -> Kit:
    """Deploys a known-good bundle under its own root. Raises BadInput, CheckFailed, NotMade."""
    with tempfile.TemporaryDirectory() as scratch:
        prompt, tokens = load_model(MODEL).prompt, None
        try:
            package = make()
            if bundle is None:
                bundle, prompt, tokens = Path(scratch) / MODEL, PROMPT, ANSWER
                _build(bundle)
        except Failure as failure:
            raise NotMade(f"cannot build the known-good bundle on this machine: {failure}") from None
        record = Path(scratch) / "record.json"
        deploy.deploy(board, at, package, bundle, prompt, keep=1, say=say, record=record)
        return Kit(evidence.read(record), prompt, tokens)


def _build(bundle: Path) -> None:
    """Builds the known-good bundle and checks that it answers like the checkpoint on this machine. Raises Failure."""
    spec = load_model(MODEL)
    options = build.Options(input_path=fetch(spec), output_path=bundle, model_name=MODEL, **spec.build.given())
    build.build(build.plan(options))
    greedy = Options(max_tokens=TOKENS, sampling={"temperature": 0.0})
    answer = tuple(run(bundle, Question(PROMPT, options=greedy)).ids)
    if answer != ANSWER:
        raise CheckFailed(
            f"on this machine it answers {PROMPT!r} with {list(answer)[:8]} ..., the checkpoint with "
            f"{list(ANSWER)[:8]} ..."
        )


def _inspect(board: Board, at: Address, kit: Kit, seen: Observed) -> Observed:
    """Compares the files of the known-good release, and runs its prompt."""
    with Connection(board, at) as link:
        there = link.call("inventory", LISTING_SECONDS, **_names(kit.record))
        if around := evidence.wrapped(there["python"]):
            seen.faults.append(f"python3 is {around}, expected the interpreter itself")
            return seen
        faults = evidence.compare(dataclasses.replace(kit.record, python={}), there)  # a new Python is only a note
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            seen.faults.append(f"the known-good bundle differs from the deployed one: {FOLDER}/{faults[0]}{more}")
            return seen
        rates: list[Mapping[str, Any]] = []
        for _ in range(1 if board.emulated else ASKED):
            question = {"prompt": kit.prompt, "tokens": TOKENS, "engine": board.engine, "limit": ASK_SECONDS}
            said = link.call("ask", ASK_SECONDS + 60, name=kit.record.release, **question)
            try:
                answer = strict_json.loads(said["stdout"])
                seen.tokens = tuple(int(token) for token in answer["tokens"])
                rates.append({name: float(answer[name]) for name in ("ttft_ms", "decode_tokens_per_s")})
            except (ValueError, KeyError, TypeError):
                seen.faults.append(f"the known-good bundle does not answer: {_failure_text(said)}")
                return seen
            if kit.tokens is not None and seen.tokens != kit.tokens:
                break
    seen.speed = {
        "ttft_ms": min(rate["ttft_ms"] for rate in rates),
        "decode_tokens_per_s": max(rate["decode_tokens_per_s"] for rate in rates),
    }
    return seen


def _names(record: Record) -> dict[str, str]:
    return {"release": record.release, "package": record.package, "model": record.model}


def _answer_difference(kit: Kit, tokens: Sequence[int]) -> str:
    """The first token that differs from the known answer, in words."""
    assert kit.tokens is not None
    both = zip(tokens, kit.tokens, strict=False)
    same = next((place for place, (one, other) in enumerate(both) if one != other), min(len(tokens), len(kit.tokens)))
    return (
        f"its answer to {kit.prompt!r} differs from token {same + 1} on: "
        f"{list(tokens[same : same + 4])}, expected {list(kit.tokens[same : same + 4])}"
    )


def _failure_text(said: Mapping[str, Any]) -> str:
    if said["code"] is None:
        return f"no answer within {ASK_SECONDS} s"
    lines = [line for line in str(said["stderr"]).splitlines() if line.strip()] or ["it printed nothing"]
    errors = [line for line in lines if line.startswith("error:")] or lines
    return f"exit code {said['code']}, {errors[-1][:200]!a}"


def _strings(found: Any) -> dict[str, str]:
    """The versions in a board's answer, as printable text."""
    entries = list(found.items())[:20] if isinstance(found, dict) else []
    return {_plain(name): _plain(value) for name, value in entries}


def _plain(value: object) -> str:
    return "".join(c if c.isprintable() else "�" for c in str(value)[:200])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ci.nightly.health")
    parser.add_argument("board")
    for name in ("history", "work", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--renew", action="store_true")
    parser.add_argument("--bundle", type=Path)
    given = parser.parse_args(argv)
    try:
        board = place.find(given.board)
        try:
            found = check(
                board, given.history, given.work, lambda line: print(line, flush=True),
                renew=given.renew, bundle=given.bundle,
            )  # fmt: skip
        except NotMade:
            raise
        except Failure as failure:
            raise type(failure)(f"{health_log.BOARD}{failure}") from None
        given.out.write_text(json.dumps(dataclasses.asdict(found)) + "\n", "utf-8")
        print("\n".join(found.lines()))
        if found.faults:
            raise CheckFailed(found.reason(board.name))
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr, flush=True)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
