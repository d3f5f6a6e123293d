"""Check of the stop token ids, in the stage `template`."""

from __future__ import annotations

from axrun.doctor.report import Finding
from axrun.errors import Failure
from axrun.format.bundle import MANIFEST, Bundle
from axrun.text.tokenizer import Tokenizer

STAGE, PART = "template", "stop ids"


def stops(bundle: Bundle) -> Finding | None:
    """Compares the stop ids with those in the manifest; returns the finding, if any."""
    try:
        tokenizer = Tokenizer.find(bundle.hf)
    except Failure:
        return None  # reported by the stage tokenizer
    if tokenizer is None:
        return None
    listed = _listed(bundle)
    seen = sorted(token for token in tokenizer.stop_ids if token < bundle.vocab_size)  # the build omits others
    if listed is not None and sorted(listed) != seen:
        missing, other = sorted(set(listed) - set(seen)), sorted(set(seen) - set(listed))
        cause = "answers do not end, or end too early: " + " and ".join(
            [f"{missing} no longer stop"] * bool(missing) + [f"{other} stop"] * bool(other)
        )
        named = tokenizer.stop_sources[other[0]][0] if other else listed[missing[0]]
        advice = "hf/ differs from the build's: copy or build the bundle again."
        return Finding(
            STAGE, PART, _file(bundle, named), f"{sorted(listed)}, recorded by the build", f"{seen}", cause, advice
        )
    return None


def recorded(bundle: Bundle, known: object) -> Finding | None:
    """Compares the manifest's stop ids with `known`, those stored in the figures."""
    listed = _listed(bundle)
    if not isinstance(known, list) or listed is None or sorted(listed) == known:
        return None
    cause = "the manifest was edited, or belongs to another build: answers end too early, or not at all"
    return Finding(STAGE, PART, MANIFEST, f"{known!s:.80}", f"{sorted(listed)!s:.80}", cause, "Build the bundle again.")


def _listed(bundle: Bundle) -> dict[int, str] | None:
    """The stop ids in the manifest, each with the first file that names it."""
    text = bundle.manifest.get("text")
    ids = text.get("stop_ids") if isinstance(text, dict) else None
    if not isinstance(ids, dict) or not all(number.isdecimal() and len(number) < 10 for number in ids):
        return None
    return {int(number): str(named[0]) if isinstance(named, list) and named else "" for number, named in ids.items()}


def _file(bundle: Bundle, named: str) -> str:
    """The file of the bundle that names a stop id."""
    return f"hf/{named}" if (bundle.hf / named).is_file() else "hf/tokenizer_config.json"
