"""What a doctor says: the stages it walked, and the first thing that disagrees.

Every stage is compared with something that shares no code with it: the checkpoint as transformers reads it, or the
figures that a build left of that. The first stage that disagrees ends the walk, since what follows only inherits it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# In the order they are walked: each rests on those before it.
STAGES = {
    "files": "every file is there, as the manifest lists it",
    "versions": "the board, its driver, the engine and the compiler fit the bundle",
    "tokenizer": "texts become the token ids of the checkpoint's own tokenizer, and ids become its texts",
    "template": "chats become the prompt of the checkpoint's own template; it stops at the same tokens",
    "embedding": "the table has the checkpoint's rows",
    "layers": "each layer in prefill, with history and in decode, fed with the reference's hidden states",
    "cache": "the K/V rows in the cache, where the layers put them and where they read them",
    "post": "the post model's logits",
    "sampling": "the token that is chosen from known logits",
    "answer": "the greedy answer of the whole model",
}
HEALTHY, FAULTY, UNDECIDED = "healthy", "faulty", "undecided"
MOST_TEXT = 1000  # characters of a text in a report of another machine
AGREES, DISAGREES, LEFT = "agrees", "disagrees", "not examined"


@dataclass(frozen=True)
class Finding:
    """Where something disagrees, and what usually causes it.

    `part` says where inside the stage: "layer 3, prefill behind 64 rows, output". `file` is relative to the bundle or
    to the release, empty where no file is to blame. `cause` is what explains it, and says "probably" where it guesses.
    """

    stage: str
    part: str
    file: str
    expected: str
    seen: str
    cause: str
    advice: str

    def lines(self) -> Iterator[str]:
        yield f"{self.stage}: {self.part}" + (f" ({self.file})" if self.file else "")
        yield f"  expected: {self.expected}"
        yield f"  seen:     {self.seen}"
        yield f"  cause:    {self.cause}"
        yield f"  do:       {self.advice}"


@dataclass(frozen=True)
class Walked:
    """One stage: `outcome` is AGREES, DISAGREES or LEFT; `text` says how far it looked, or why it did not."""

    stage: str
    outcome: str
    text: str
    seconds: float


@dataclass
class Report:
    """What was walked so far. `place` is where: this machine, or a board's name; `engine` what computed the layers.

    `manifest` is the sha256 of the bundle's manifest, empty where that cannot be read: which bundle it was.
    """

    bundle: str
    maker: str
    place: str
    engine: str
    walked: list[Walked] = field(default_factory=list)
    finding: Finding | None = None
    manifest: str = ""

    @property
    def verdict(self) -> str:
        """Healthy only when every stage was examined and agrees."""
        if self.finding:
            return FAULTY
        done = {entry.stage for entry in self.walked if entry.outcome == AGREES}
        return HEALTHY if done == set(STAGES) else UNDECIDED

    @property
    def exit_code(self) -> int:
        return 1 if self.finding else 0

    def headline(self) -> str:
        """The one line that says it all."""
        if self.finding:
            return f"{FAULTY}: {next(self.finding.lines())}: {self.finding.cause}"
        seen = {entry.stage for entry in self.walked if entry.outcome != LEFT}
        left = ", ".join(stage for stage in STAGES if stage not in seen)
        return f"{UNDECIDED}: not examined: {left}" if left else f"{HEALTHY}: all {len(STAGES)} stages agree"

    def lines(self) -> Iterator[str]:
        """For a console: a line for each stage, then the finding or the verdict."""
        for entry in self.walked:
            yield f"  {entry.stage:<10} {entry.outcome:<13} {entry.text} ({entry.seconds:.1f} s)"
        if self.finding:
            yield from self.finding.lines()
        yield self.headline()

    @classmethod
    def parse(cls, values: object) -> Report:
        """A report from what `json` gave, which may come from another machine. Raises ValueError for anything else."""
        found = _object(values, "a report")
        report = cls(_text(found, "bundle"), _text(found, "maker"), _text(found, "place"), _text(found, "engine"))
        report.manifest = _text(found, "manifest") if "manifest" in found else ""  # older runners do not say
        stages = found.get("stages")
        if not isinstance(stages, list) or len(stages) > len(STAGES):
            raise ValueError(f"its stages are {stages!r:.60}")
        for entry in stages:
            walked = _object(entry, "a stage")
            stage, outcome, seconds = _text(walked, "stage"), _text(walked, "outcome"), walked.get("seconds")
            known = stage in STAGES and outcome in (AGREES, DISAGREES, LEFT)
            if not known or not isinstance(seconds, (int, float)):
                raise ValueError(f"it has the stage {walked!r:.60}")
            report.walked.append(Walked(stage, outcome, _text(walked, "text"), float(seconds)))
        if found.get("finding") is not None:
            finding = _object(found["finding"], "a finding")
            report.finding = Finding(*(_text(finding, field.name) for field in dataclasses.fields(Finding)))
            if report.finding.stage not in STAGES:
                raise ValueError(f"it finds something in the stage {report.finding.stage[:40]!r}")
        return report

    def json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "maker": self.maker,
            "place": self.place,
            "manifest": self.manifest,
            "engine": self.engine,
            "verdict": self.verdict,
            "stages": [dataclasses.asdict(entry) for entry in self.walked],
            "finding": dataclasses.asdict(self.finding) if self.finding else None,
        }


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r:.60}")
    return value


def _text(values: dict[str, Any], key: str) -> str:
    """A string, made printable and short. Raises ValueError for anything else."""
    value = values.get(key)
    if not isinstance(value, str):
        raise ValueError(f"its {key} is {value!r:.60}")
    return "".join(c if c.isprintable() else "\ufffd" for c in value[:MOST_TEXT])
