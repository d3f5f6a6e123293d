"""Deploys runner and bundle to a board: check the board, transfer, verify, run a prompt, switch to the new release.

Until the last step the board keeps its old release; ci/device/on_board/releases.py describes the folders.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axrun.errors import BadInput, CheckFailed
from axrun.format import bundle as bundles
from axrun.format.bundle import Bundle
from axrun.memory import needs
from ci.device import evidence, reach, settings, strict_json
from ci.device.connection import Connection
from ci.device.evidence import Record
from ci.device.listing import Listing
from ci.device.place import Address, Board, owner
from ci.device.progress import took
from ci.device.wheelhouse import Package

KEEP = 3  # releases to keep on the board, including the current one
SMOKE_TOKENS = 4
SMOKE_SECONDS, VERIFY_SECONDS = 900, 1800
SPARE_BYTES = 8 << 20  # for the runner's own files, such as bytecode
GLIBC = (2, 31)  # the newest version that the wheels may need

Say = Callable[[str], None]


@dataclass(frozen=True)
class Deployed:
    """`release` is now current on the board, `was` the previous one (None: the first), `answer` its smoke test's.

    `wire` bytes went over the network, for a release of `size` bytes.
    """

    release: str
    was: str | None
    answer: str
    wire: int
    size: int


def deploy(
    board: Board,
    at: Address,
    package: Package | Callable[[], Package],
    bundle: Path,
    prompt: str,
    keep: int = KEEP,
    say: Say = lambda line: None,
    record: Path | None = None,
) -> Deployed:
    """Makes package and bundle the board's current release, and writes the deploy record to `record`.

    `package` may be a function that builds it; it is called only after the board passed its checks.
    Raises BadInput for a board that is unreachable or unsuitable, CheckFailed if the transfer is damaged or the answer
    differs from this machine's. The board then keeps its old release.
    """
    opened = Bundle.open(bundle)
    reach.require(board, at, say)
    with Connection(board, at) as link:
        facts = link.call("facts")
        say(_introduce(board, facts))
        _require(board, facts, opened)
        if around := evidence.wrapped(facts["interpreter"]):
            say(f"note: python3 on {board.name} is {around}; a night will be red because of it")
        manifest = bundles.verify(bundle)
        link.call("lock", owner=owner())
        made = package if isinstance(package, Package) else package()
        model = Listing.of(bundle)
        contents = (("packages", made.site, made.listing), ("models", bundle, model))
        release: dict[str, Any] = {"package": made.listing.id, "model": model.id, "name": opened.name}
        release |= {"prompt": prompt, "engine": board.engine}
        release["tokens"] = _tokens_here(bundle, prompt) if manifest["maker"] == "cpu" else None
        sent = [_send(link, board, store, source, listing, say) for store, source, listing in contents]
        name = hashlib.sha256(json.dumps(release, sort_keys=True).encode()).hexdigest()[:16]
        link.call("assemble", name=name, release=release)
        say(f"running {prompt!r} with release {name} ...")
        started = time.monotonic()
        answer = _smoke(link, board, name, release)
        say(f"release {name} answers {prompt!r} with {answer!r}{took(started)}")
        was = link.call("switch", name=name)
        say(f"current is {name}, {'unchanged' if was == name else f'was {was}' if was else 'the first'}")
        if record is not None:
            python = facts["interpreter"]
            evidence.write(record, _record(board, name, release, made.listing, model, python, opened.maker))
        for gone in link.call("prune", keep=keep):
            say(f"removed {gone}")
    return Deployed(name, was, answer, sum(sent), made.listing.size + model.size)


def _record(
    board: Board,
    name: str,
    release: Mapping[str, Any],
    package: Listing,
    model: Listing,
    python: Mapping[str, str],
    maker: str,
) -> Record:
    text = json.dumps(release, sort_keys=True)  # as ci/device/on_board/releases.py writes it
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Record(
        board.name, name, package.id, model.id, digest, evidence.files(package), evidence.files(model), python, maker
    )


def rollback(board: Board, at: Address, say: Say = lambda line: None) -> Deployed:
    """Switches back to the previous release, after checking that it still gives its recorded answer.

    Raises BadInput if there is none, CheckFailed if its answer differs; the current release then stays.
    """
    reach.require(board, at, say)
    with Connection(board, at) as link:
        link.call("lock", owner=owner())
        was, name = link.call("facts")["current"], link.call("previous")
        if name is None:
            raise BadInput(f"{board.name} has no release before {was or 'the first'}: nothing to roll back to")
        answer = _smoke(link, board, name, link.call("release", name=name))
        link.call("back", name=name)
        say(f"current is {name} again, was {was}; it answers {answer!r}")
    return Deployed(name, was, answer, 0, 0)


def _send(link: Connection, board: Board, store: str, source: Path, listing: Listing, say: Say) -> int:
    """Transfers and verifies a folder; returns the bytes over the wire. An existing folder is verified and repaired."""
    place: dict[str, Any] = {"store": store, "name": listing.id, "listing": [list(entry) for entry in listing.files]}
    found = link.call("survey", **place)
    what, started = f"{store[:-1]} {listing.id}, {listing.size / 1e6:.1f} MB", time.monotonic()
    if found["whole"] and not link.call("verify", VERIFY_SECONDS, **place):
        say(f"{what}: already there, verified{took(started)}")
        return 0
    if found["needed"] + SPARE_BYTES > found["free"]:
        raise BadInput(
            f"the disk of {board.name} has {found['free'] >> 20} MB free, the {store[:-1]} needs "
            f"{(found['needed'] + SPARE_BYTES) >> 20} MB\nMake room in {found['into'].partition('/incoming')[0]}."
        )
    say(f"{what}: sending {found['needed'] / 1e6:.1f} MB ...")
    try:
        moved = link.send(source, found["into"], found["like"])
    except BadInput:
        link.call("drop")
        raise
    faults = link.call("verify", VERIFY_SECONDS, **place)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckFailed(f"the {store[:-1]} on {board.name} differs from the one sent: {str(faults[0])[:200]!a}{more}")
    link.call("keep", VERIFY_SECONDS, **place)
    say(f"{what}: sent {moved.wire / 1e6:.2f} MB, verified{took(started)}")
    return moved.wire


def _smoke(link: Connection, board: Board, name: str, release: Mapping[str, Any]) -> str:
    """Smoke test: the release's answer, compared with this machine's. Raises CheckFailed."""
    question = {
        "prompt": release["prompt"],
        "tokens": SMOKE_TOKENS,
        "engine": release["engine"],
        "limit": SMOKE_SECONDS,
    }
    said = link.call("ask", SMOKE_SECONDS + 60, name=name, **question)
    return _answer(said, board, name, release)


def _answer(said: Any, board: Board, name: str, release: Mapping[str, Any]) -> str:
    kept = "The previous release stays current."
    if said["code"] is None:
        raise CheckFailed(f"release {name} did not answer in {SMOKE_SECONDS} s on {board.name}\n{kept}")
    if said["code"] != 0:
        lines = [line for line in said["stderr"].splitlines() if line.strip()] or ["it printed nothing"]
        errors = [line for line in lines if line.startswith("error:")] or lines
        raise CheckFailed(f"release {name} does not run on {board.name}: {ascii(errors[-1][:300])[1:-1]}\n{kept}")
    try:
        answer = strict_json.loads(said["stdout"])
        text, tokens = str(answer["text"]), [int(token) for token in answer["tokens"]]
    except (ValueError, KeyError, TypeError):
        raise CheckFailed(f"release {name} on {board.name} answers {said['stdout'][:80]!a}\n{kept}") from None
    if release["tokens"] is not None and tokens != release["tokens"]:
        raise CheckFailed(
            f"{board.name} answers {release['prompt']!r} with tokens {tokens}, expected {release['tokens']}\n{kept}"
        )
    return text


def _tokens_here(bundle: Path, prompt: str) -> list[int]:
    """The first greedy tokens on this machine."""
    from axrun.run import Options, Question, run

    greedy = Options(max_tokens=SMOKE_TOKENS, sampling={"temperature": 0.0})
    return list(run(bundle, Question(prompt, options=greedy)).ids)


def _introduce(board: Board, facts: Mapping[str, Any]) -> str:
    told = [
        f"{facts['architecture']}, Python {facts['python']}",
        f"{facts['free'] >> 20} MB of disk free",
        *([f"{facts['memory'] >> 20} MB of memory"] if facts["memory"] is not None else []),
        *([f"{facts['cmm'] >> 20} MB of CMM"] if facts["cmm"] is not None else []),
    ]
    return f"{board.name}: {', '.join(told)}"


def _unwritable(board: Board, facts: Mapping[str, Any]) -> str:
    root = f"{facts['root']!a} on {board.name} cannot be written"
    if facts["read_only"]:
        return f"{root}: its disk is mounted read-only\nAn unclean disk is: dmesg and mount say more, there."
    said = board.given["root"].source if "root" in board.given else board.yaml
    return f"{root}: is root right ({board.root}, from {said}), and does {board.name}'s user own it?"


def _require(board: Board, facts: Mapping[str, Any], bundle: Bundle) -> None:
    """Checks the board's requirements. Raises BadInput with the first one that is not met."""
    vendor = bundle.maker == "pulsar2"
    needed = needs(bundle, board.engine).total
    left, what = (facts["cmm"], "CMM") if vendor and facts["cmm"] is not None else (facts["memory"], "memory")
    seen = tuple(int(part) for part in str(facts["glibc"]).split(".")[:2] if part.isdigit())
    minor = ".".join(str(facts["python"]).split(".")[:2])
    wrong = [
        (
            facts["architecture"] != board.architecture,
            f"{board.name} has the architecture {facts['architecture']!a}, expected {board.architecture}",
        ),
        (
            minor != board.python,
            f"{board.name} has Python {minor!a}, its settings say {board.python}\n"
            f'Set it: python = "{minor}" in {settings.file(board.yaml.stem)}'
            if re.fullmatch(r"3\.\d{1,2}", minor)
            else f"{board.name} has Python {minor!a}, its settings say {board.python}",
        ),
        (
            len(seen) == 2 and seen < GLIBC,
            f"{board.name} has glibc {facts['glibc']!a}, the runner needs {GLIBC[0]}.{GLIBC[1]}",
        ),
        (not facts["rsync"], f"{board.name} has no rsync; on the board: apt-get install rsync"),
        (not facts["writable"], _unwritable(board, facts)),
        (
            vendor and not facts["engine_library"],
            f"{board.name} has no libax_engine.so in /soc/lib, and {bundle.name} is for the NPU",
        ),
        (
            left is not None and left < needed,
            f"{bundle.name} needs {needed >> 20} MB of {what}, {board.name} has {(left or 0) >> 20} MB left",
        ),
    ]
    for fault, text in wrong:
        if fault:
            raise BadInput(text)
