"""Runs the runner over every position of the context with dummy layers (see `ledger`).

Covers a prompt as long as the context; a single token at every position; chunks after a rollback; the hidden state that
becomes logits; and the prefix that a prompt reuses.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from axrun.decoder import Decoder
from axrun.doctor.ledger import WIDTH, DummySession, Fault, FaultFound, Ledger, narrow
from axrun.errors import Failure
from axrun.format import axmodel
from axrun.format.bundle import Bundle
from axrun.format.dtypes import FLOATS, bf16_to_f32, from_float32, to_float32
from axrun.model import Embedding, Model
from axrun.sequence import Sequence
from axrun.session import Array, Session, SessionGroup

MODEL, SEQUENCE = "board/axrun/model.py", "board/axrun/sequence.py"
ROWS = 4096  # rows of the embedding table per step
STARTS = 48  # number of rollback positions, besides those at the borders of groups


def runner(session: Session, bundle: Bundle) -> Fault | None:
    """The first fault of the runner with a bundle's layers, or None. All layers have the shapes of `session`."""
    files = (axmodel.read(bundle.layer_path(index)) for index in range(bundle.layers))
    windows = tuple(_window(file.metadata.get("axmodel.window", "")) for file in files)
    return examine(tuple(session.groups), session.flexible, windows) or _table(bundle)


def _table(bundle: Bundle) -> Fault | None:
    """Checks every row of the embedding that the runner reads from the file."""
    dtype = FLOATS[bundle.hidden_state_type]
    table = np.memmap(bundle.embedding_path, "<u2", "r", shape=(bundle.vocab_size, bundle.hidden_size))
    embedding = Embedding(bundle.embedding_path, bundle.vocab_size, bundle.hidden_size, dtype)
    for start in range(0, len(table), ROWS):
        rows = np.asarray(table[start : start + ROWS])
        wanted = rows if dtype == "BFLOAT16" else from_float32(bf16_to_f32(rows), dtype)
        bad = np.flatnonzero((embedding(range(start, start + len(rows))) != wanted).any(axis=1))
        if len(bad):
            cause = "the runner reads the wrong row of the embedding table"
            return Fault(f"token {start + bad[0]}", "its row of the table", "another row", cause, MODEL)
    return None


def _window(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def examine(groups: tuple[SessionGroup, ...], flexible: bool, windows: tuple[int, ...]) -> Fault | None:
    """Like `runner`, for shape groups, a flexible engine or not, and each layer's attention window (0: unlimited)."""
    groups = narrow(groups)
    dtype = next(info.dtype for info in groups[0].inputs if info.name == "input")
    context = max(group.history for group in groups if group.tokens == 1)
    ledger = Ledger(windows, context, dtype)
    sessions: list[Any] = [
        DummySession(groups, flexible, window, layer, ledger) for layer, window in enumerate(windows)
    ]
    decoder = Decoder(sessions)
    most = max(group.tokens for group in groups)
    try:
        _run(decoder, ledger, 0, context)
        decoder.cache.reset()
        for position in range(context):
            _run(decoder, ledger, position, 1)
        for turn, start in enumerate(_starts(groups, context)):
            _run(decoder, ledger, start, min(2 + turn % (2 * most), context - start))
        _model(decoder, ledger, sorted({1, min(most + 1, context), context}))
    except FaultFound as wrong:
        fault: Fault = wrong.args[0]
        return fault
    except (Failure, ValueError, IndexError) as failed:
        seen = f"{str(failed).partition(chr(10))[0]:.200}"
        part = f"tokens from position {ledger.position} on"
        return Fault(part, "no error", seen, "the runner refuses tokens that fit the context")
    return None


def _run(decoder: Decoder, ledger: Ledger, start: int, count: int) -> None:
    """Runs `count` tokens from `start` on, and checks the caches afterwards."""
    hidden = ledger.take(start, count)
    for chunk, output in decoder.run(hidden, start):
        ledger.chunk(chunk, output)
    if ledger.position != start + count or decoder.cache.length != start + count:
        seen = f"{ledger.position - start} tokens were run, the cache has {decoder.cache.length}"
        raise FaultFound(Fault(f"tokens {start} to {start + count - 1}", f"{count} tokens", seen, "tokens are skipped"))
    if count > 1 or start + count == decoder.context:
        ledger.kept((decoder.cache.keys, decoder.cache.values))


def _starts(groups: abc.Sequence[SessionGroup], context: int) -> Iterator[int]:
    """Descending positions, so that each is a rollback: spread over the context, and around the borders of groups."""
    spread = {int(at) for at in np.linspace(0, context - 1, min(STARTS, context))}
    borders = {group.history + step for group in groups for step in (-1, 0, 1)}
    borders |= {group.history + group.tokens + step for group in groups for step in (-1, 0, 1)}
    return iter(sorted({at for at in spread | borders if 0 <= at < context - 1}, reverse=True))


class _Rows:
    """Replaces the embedding: returns the hidden states of the ledger for the tokens `ids` from `start` on."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.start, self.ids = ledger, 0, list[int]()

    def __call__(self, ids: abc.Sequence[int]) -> Array:
        if list(ids) != self.ids:
            part, cause = f"a prompt of {len(self.ids)} tokens", "the runner uses other tokens than those given"
            raise FaultFound(Fault(part, f"{self.ids[-3:]} at its end", f"{list(ids)[-3:]}", cause, MODEL))
        return self.ledger.take(self.start, len(ids))


def _model(decoder: Decoder, ledger: Ledger, counts: abc.Sequence[int]) -> None:
    """Checks that logits come from the last hidden state, and that a prompt reuses only the shared prefix."""
    rows: Any = _Rows(ledger)
    post: Any = lambda hidden: to_float32(hidden, ledger.dtype).reshape(-1, WIDTH)  # noqa: E731
    model, run = Model(rows, decoder, post), decoder.run

    def followed(hidden: Array, position: int) -> Iterator[tuple[Any, Array]]:
        for chunk, output in run(hidden, position):
            ledger.chunk(chunk, output)
            yield chunk, output

    decoder.run = followed  # type: ignore[method-assign]
    kinds: tuple[tuple[Literal["last", "all"], bool], ...] = (("last", False), ("all", True))
    for count in counts:
        for kind, each in kinds:
            rows.start, rows.ids = 0, list(range(count))
            found = model.forward(range(count), 0, kind).reshape(-1, WIDTH)
            last = to_float32(ledger.last(), ledger.dtype)
            if len(found) != (count if each else 1) or not np.array_equal(found[-1], last):
                cause = "logits come from the hidden state of another token than the last one"
                part = f"logits after {count} tokens"
                raise FaultFound(Fault(part, f"those of token {count - 1}", "those of another token", cause, MODEL))
    _turns(Sequence(model), rows, counts[-1])


def _turns(sequence: Sequence, rows: _Rows, context: int) -> None:
    """Checks prompts that share a prefix with the cache."""
    before: list[int] = []
    for shared in sorted({0, 1, context // 3, context // 2 + 1, context - 1}):
        prompt = [*before[:shared], *range(1000 * (shared + 1), 1000 * (shared + 1) + context - len(before[:shared]))]
        part = f"a prompt that shares {shared} tokens with the previous one"
        reused = sequence.reusable(prompt)
        if reused >= len(prompt) or prompt[:reused] != sequence.ids[:reused]:
            cause = "rows of other tokens are reused from the cache"
            raise FaultFound(Fault(part, f"at most {shared} rows are reused", f"{reused}", cause, SEQUENCE))
        sequence.truncate(reused)
        rows.start, rows.ids = reused, prompt[reused:]
        for _ in sequence.extend(prompt[reused:]):
            pass
        if sequence.ids != prompt or sequence.model.length != len(prompt):
            cause = "the sequence holds other tokens than those given"
            raise FaultFound(Fault(part, f"{len(prompt)} tokens", f"{len(sequence.ids)}", cause, SEQUENCE))
        before = prompt


__all__ = ["examine", "runner"]
