"""The report of a diagnosis: the stages that were examined, and the first disagreement.

Every stage is compared with an independent reference: the checkpoint in transformers, or the figures derived from it.
The first stage that disagrees ends the examination, since later ones only inherit the error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# In the order of examination: each depends on the previous ones.
STAGES = {
    "files": "every file is as listed in the manifest",
    "versions": "the board, its driver, the engine and the compiler fit the bundle",
    "tokenizer": "texts give the token ids of the checkpoint's own tokenizer, and vice versa",
    "template": "chats give the prompt of the checkpoint's own template; the stop tokens are the same",
    "embedding": "the table has the checkpoint's rows",
    "layers": "each layer in prefill, with history and in decode, fed with the reference's hidden states",
    "cache": "the K/V rows in the cache are written and read correctly",
    "post": "the post model's logits",
    "sampling": "the token sampled from known logits",
    "answer": "the greedy answer of the whole model",
}
HEALTHY, FAULTY, UNDECIDED = "healthy", "faulty", "undecided"
MOST_TEXT = 1000  # maximum length of a text in a report from another machine
AGREES, DISAGREES, SKIPPED = "agrees", "disagrees", "not examined"


@dataclass(frozen=True)
class Finding:
    """A disagreement, with its usual cause.

    `part` says where inside the stage: "layer 3, prefill after 64 rows, output". `file` is relative to the bundle or
    to the release; empty if no file is at fault. `cause` says "probably" if it is a guess.
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
class StageResult:
    """The result of a stage: `outcome` is AGREES, DISAGREES or SKIPPED; `text` has details or the reason."""

    stage: str
    outcome: str
    text: str
    seconds: float


@dataclass
class Report:
    """The results so far. `place` is this machine or the name of a board; `engine` ran the layers.

    `manifest` is the sha256 of the manifest, which identifies the bundle; empty if it cannot be read.
    """

    bundle: str
    maker: str
    place: str
    engine: str
    results: list[StageResult] = field(default_factory=list)
    finding: Finding | None = None
    manifest: str = ""

    @property
    def verdict(self) -> str:
        """Healthy only if every stage was examined and agrees."""
        if self.finding:
            return FAULTY
        done = {entry.stage for entry in self.results if entry.outcome == AGREES}
        return HEALTHY if done == set(STAGES) else UNDECIDED

    @property
    def exit_code(self) -> int:
        return 1 if self.finding else 0

    def headline(self) -> str:
        """A one-line summary."""
        if self.finding:
            return f"{FAULTY}: {next(self.finding.lines())}: {self.finding.cause}"
        seen = {entry.stage for entry in self.results if entry.outcome != SKIPPED}
        left = ", ".join(stage for stage in STAGES if stage not in seen)
        return f"{UNDECIDED}: not examined: {left}" if left else f"{HEALTHY}: all {len(STAGES)} stages agree"

    def lines(self) -> Iterator[str]:
        """Lines for a console: one per stage, then the finding or the verdict."""
        for entry in self.results:
            yield f"  {entry.stage:<10} {entry.outcome:<13} {entry.text} ({entry.seconds:.1f} s)"
        if self.finding:
            yield from self.finding.lines()
        yield self.headline()

    @classmethod
    def parse(cls, values: object) -> Report:
        """The inverse of `json`. The values may come from another machine: raises ValueError if they are invalid."""
        found = _object(values, "a report")
        report = cls(_text(found, "bundle"), _text(found, "maker"), _text(found, "place"), _text(found, "engine"))
        report.manifest = _text(found, "manifest") if "manifest" in found else ""  # older runners do not send it
        stages = found.get("stages")
        if not isinstance(stages, list) or len(stages) > len(STAGES):
            raise ValueError(f"its stages are {stages!r:.60}")
        for entry in stages:
            result = _object(entry, "a stage")
            stage, outcome, seconds = _text(result, "stage"), _text(result, "outcome"), result.get("seconds")
            known = stage in STAGES and outcome in (AGREES, DISAGREES, SKIPPED)
            if not known or not isinstance(seconds, (int, float)):
                raise ValueError(f"it has the stage {result!r:.60}")
            report.results.append(StageResult(stage, outcome, _text(result, "text"), float(seconds)))
        if found.get("finding") is not None:
            finding = _object(found["finding"], "a finding")
            report.finding = Finding(*(_text(finding, field.name) for field in dataclasses.fields(Finding)))
            if report.finding.stage not in STAGES:
                raise ValueError(f"its finding is in the unknown stage {report.finding.stage[:40]!r}")
        return report

    def json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "maker": self.maker,
            "place": self.place,
            "manifest": self.manifest,
            "engine": self.engine,
            "verdict": self.verdict,
            "stages": [dataclasses.asdict(entry) for entry in self.results],
            "finding": dataclasses.asdict(self.finding) if self.finding else None,
        }


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r:.60}")
    return value


def _text(values: dict[str, Any], key: str) -> str:
    """A string, made printable and shortened. Raises ValueError for other types."""
    value = values.get(key)
    if not isinstance(value, str):
        raise ValueError(f"its {key} is {value!r:.60}")
    return "".join(c if c.isprintable() else "\ufffd" for c in value[:MOST_TEXT])
