"""Compares what the board computed with what this machine computes from the same bundle, bit by bit.

Our engine gives the same bits on every CPU if all weights are integers, so a difference is a fault: of a kernel, of a
compiler, of memory. `axrun eval` gives a digest of all logits; where that differs, `axrun trace` finds the place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from axrun.errors import BadInput
from axrun.format.bundle import MANIFEST, Bundle, sha256
from axrun.load import Loading
from axrun.measure.evaluate import evaluate

DIGEST = "logits_sha256"
EXACT = ("s8", "s4")  # weight types whose results do not depend on the instruction set

Trace = Callable[[str], Mapping[str, Any]]  # part -> axrun trace --json --rows PART


def incomparable(bundle: Bundle, engine: str) -> str:
    """Why results of the bundle may differ from machine to machine; empty if they may not."""
    if bundle.maker != "cpu":
        return f"axmodels made by {bundle.maker} run only on the board"
    if not engine.startswith("ax"):
        return f"engine {engine} sums in an order of its own"
    floats = {bundle.flag(name) for name in ("weight_type", "post_weight_type")} - set(EXACT)
    return f"sums with {', '.join(sorted(floats))} weights depend on the instruction set" if floats else ""


def host_digest(path: Path, manifest_sha256: str, engine: str) -> str:
    """The digest of all logits on this machine. Raises BadInput for another bundle than the one with that manifest."""
    here = sha256(path / MANIFEST) if (path / MANIFEST).is_file() else "none"
    if here != manifest_sha256:
        raise BadInput(
            f"{path} has the manifest {here[:12]}, the board's bundle {manifest_sha256[:12]!a}\n"
            "Name this machine's copy of the deployed bundle with --hil-bundle."
        )
    return evaluate(path, loading=Loading(engine=engine)).quality.logits_sha256


def first_difference(here: Trace, there: Trace) -> str:
    """The first part, token and tensor that differ: "layer 3, token 17, K"; empty if none does.

    Raises BadInput for a trace of the board that has not the shape of the one here.
    """
    ours, theirs = here(""), there("")
    if [ours["manifest_sha256"], ours["tokens"]] != [theirs.get("manifest_sha256"), theirs.get("tokens")]:
        raise BadInput("the board traced another bundle, or another number of tokens")
    for part, tensors in ours["parts"].items():
        seen = _table(theirs, "parts").get(part)
        if seen != tensors:
            return f"{part}{_first_row(here(part)['rows'], _table(there(part), 'rows'))}"
    return ""


def _first_row(ours: Mapping[str, list[str]], theirs: Mapping[str, Any]) -> str:
    """The first token whose rows differ, and the tensor; empty if the digests of all rows are equal."""
    for name, rows in ours.items():
        if not isinstance(theirs.get(name), list) or len(theirs[name]) != len(rows):
            raise BadInput(f"axrun trace on the board has no digests of {len(rows)} rows of {name}")
    for token, digests in enumerate(zip(*ours.values(), strict=True)):
        for name, digest in zip(ours, digests, strict=True):
            if theirs[name][token] != digest:
                return f", token {token}, {name}"
    return ""


def _table(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = found.get(key)
    if not isinstance(table, Mapping):
        raise BadInput(f"axrun trace on the board has {table!a:.40} for {key}, expected a table")
    return table
