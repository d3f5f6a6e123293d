"""Faults of the runner and its engines, patched in for one test; the bundle is unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axrun import decoder
from axrun.decoder import Decoder
from axrun.kv_cache import KVCache, fill_mask
from axrun.model import Embedding, Model, Post
from axrun.sampling.processors import RepetitionPenalty
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence
from axrun.session import CACHES, ax_engine, ort
from axrun.text.tokenizer import Tokenizer
from tests.doctor.fault import RunnerFault

Patch = pytest.MonkeyPatch
Arrays = dict[str, Any]
Hook = Callable[[Arrays], object]
Plant = Callable[[Patch], None]


def around(before: Hook = lambda arrays: None, after: Hook = lambda arrays: None) -> Plant:
    """Patches both engines: `before` and `after` get the arrays of a run."""

    class Faulty:
        def __init__(self, binding: Any, arrays: Arrays) -> None:
            self.binding, self.arrays = binding, arrays

        def run(self) -> None:
            undo = before(self.arrays)
            try:
                self.binding.run()
            finally:
                if callable(undo):
                    undo()
            after(self.arrays)

    def plant(patch: Patch) -> None:
        for session in (ax_engine.AxSession, ort.OrtSession):

            def bind(self: Any, group: int, arrays: Arrays, bind: Any = session.bind) -> Any:
                return Faulty(bind(self, group, arrays), dict(arrays))

            patch.setattr(session, "bind", bind)

    return plant


def tokens_and_history(arrays: Arrays) -> tuple[int, int]:
    if "indices" not in arrays:
        return 0, 0
    return arrays["indices"].shape[1], arrays["K_cache"].shape[1] if "K_cache" in arrays else 0


def late_in_decode(arrays: Arrays) -> Any:
    """A single token gets the position of the previous one."""
    tokens, history = tokens_and_history(arrays)
    if tokens != 1 or not history or not arrays["indices"][0, 0]:
        return None
    arrays["indices"] -= 1
    return lambda: np.add(arrays["indices"], 1, out=arrays["indices"])


def from_zero_behind_history(arrays: Arrays) -> Any:
    """The positions of a chunk after a history start at 0."""
    tokens, history = tokens_and_history(arrays)
    if tokens == 1 or not history:
        return None
    kept = arrays["indices"].copy()
    arrays["indices"][0] = np.maximum(kept[0].astype(np.int64) - int(kept[0, 0]), 0)
    return lambda: np.copyto(arrays["indices"], kept)


def first_row_is_lost(arrays: Arrays) -> Any:
    """The engine reads zeros for the first cached row."""
    if not tokens_and_history(arrays)[1]:
        return None
    kept = [arrays[name][:, 0].copy() for name in CACHES]

    def undo() -> None:
        for name, rows in zip(CACHES, kept, strict=True):
            arrays[name][:, 0] = rows

    for name in CACHES:
        arrays[name][:, 0] = 0
    return undo


def coarse(arrays: Arrays) -> None:
    """Outputs are rounded to bfloat16, whatever their type."""
    for name in ("output", "logits"):
        if name in arrays and arrays[name].dtype == np.float32:
            arrays[name].view(np.uint32)[...] &= np.uint32(0xFFFF0000)


def mask(change: Callable[[Any, int, int, Any, Any], None]) -> Callable[[Patch], None]:
    """Patches the masks."""

    def plant(patch: Patch, fill: Any = fill_mask) -> None:
        def filled(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
            fill(rows, past, count, visible, blocked)
            change(rows, past, count, visible, blocked)

        patch.setattr(decoder, "fill_mask", filled)

    return plant


def hide_the_last(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    if past > 192:
        rows[0, :count, past - 1] = blocked


def hide_the_last_cached(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    if past:
        rows[0, :count, past - 1] = blocked


def see_the_next(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    at = np.arange(count - 1)
    rows[0, at, rows.shape[2] - rows.shape[1] + at + 1] = visible


def see_behind_the_cache(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    history = rows.shape[2] - rows.shape[1]
    if past < history:
        rows[0, :count, past] = visible


def hide_the_last_in_decode(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    """Hides the last row in decode, in the middle of a context."""
    if count == 1 and 40 <= past <= 250:
        rows[0, 0, past - 1] = blocked


def hide_the_last_in_chunks(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    """Hides the last row in later chunks of a long prompt."""
    if count == rows.shape[1] > 1 and past >= 64 and past % 32 == 0:
        rows[0, :count, past - 1] = blocked


def see_the_next_at_a_border(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    if past == 128 and count > 1:
        rows[0, 0, rows.shape[2] - rows.shape[1] + 1] = visible


def hide_one_row_once(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    if past == 77:
        rows[0, :count, 5] = blocked


def padding_sees_nothing(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    rows[0, count:] = blocked


def miss_oneself(rows: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    if past:
        rows[0, 0, rows.shape[2] - rows.shape[1]] = blocked


def writes(change: Callable[..., tuple[int, int, Any, Any]]) -> Callable[[Patch], None]:
    """Patches writes to the cache."""

    def plant(patch: Patch, write: Any = KVCache.write) -> None:
        def written(self: KVCache, layer: int, position: int, keys: Any, values: Any) -> None:
            write(self, *change(self, layer, position, keys, values))

        patch.setattr(KVCache, "write", written)

    return plant


def one_row_late(cache: KVCache, layer: int, position: int, keys: Any, values: Any) -> Any:
    late = keys.shape[1] == 1 and position + 1 < cache.keys[0].shape[1]
    return layer, position + late, keys, values


def exchanged(cache: KVCache, layer: int, position: int, keys: Any, values: Any) -> Any:
    return layer, position, values, keys


def next_layers(cache: KVCache, layer: int, position: int, keys: Any, values: Any) -> Any:
    return (layer + 1) % len(cache.keys), position, keys, values


def one_layer_early(cache: KVCache, layer: int, position: int, keys: Any, values: Any) -> Any:
    """Of one layer, at a late position."""
    return layer, position - (layer == 2 and position > 200), keys, values


def last_is_lost(cache: KVCache, layer: int, position: int, keys: Any, values: Any) -> Any:
    """Loses the last row of a full chunk after a history."""
    whole = keys.shape[1] == 32 and position > 0
    return (layer, position, keys[:, :-1], values[:, :-1]) if whole else (layer, position, keys, values)


def forget_too_much(patch: Patch, truncate: Any = KVCache.truncate) -> None:
    """A rollback also clears the previous row."""

    def forget(self: KVCache, length: int) -> None:
        if 0 < length < self.length:
            self.keys[-1][:, length - 1] = 0
        truncate(self, length)

    patch.setattr(KVCache, "truncate", forget)


def chunks_of_another_group(patch: Patch, chunks: Any = decoder.chunks) -> None:
    """Uses a group with a too short history at one boundary."""

    def cut(groups: Any, position: int, count: int, flexible: bool = False) -> Any:
        for chunk in chunks(groups, position, count, flexible):
            short = next((group.index for group in groups if group.tokens > 1 and group.history == 32), chunk.group)
            wrong = chunk.position == 64 and chunk.count > 1
            yield dataclasses.replace(chunk, group=short) if wrong else chunk

    patch.setattr(decoder, "chunks", cut)


def layers_in_another_order(patch: Patch, run: Any = Decoder._bind) -> None:
    """For single tokens after 128 rows."""

    def bind(self: Decoder, group: int, tokens: int, history: int) -> Any:
        step = run(self, group, tokens, history)
        if tokens == 1 and history >= 192 and len(step.bindings) > 2:
            step.bindings[0], step.bindings[1] = step.bindings[1], step.bindings[0]
        return step

    patch.setattr(Decoder, "_bind", bind)


def positions_stop(patch: Patch, run: Any = Decoder._run) -> None:
    """Positions above 200 are set to 200; short answers do not show it."""

    def ran(self: Decoder, chunk: Any, hidden: Any) -> Any:
        step = self._step(chunk)
        arange = np.arange

        def least(*given: int) -> Any:
            return np.minimum(arange(*given), 200) if len(given) == 2 else arange(*given)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(np, "arange", least)
            return run(self, chunk, hidden) if step else None

    patch.setattr(Decoder, "_run", ran)


def first_of_the_last_chunk(patch: Patch) -> None:
    """Logits are those of the first token of a prompt's last chunk."""
    run = Decoder.run

    def reversed_rows(self: Decoder, hidden: Any, position: int) -> Any:
        for chunk, output in run(self, hidden, position):
            yield chunk, output[::-1]

    patch.setattr(Decoder, "run", reversed_rows)


def reuse_too_much(patch: Patch, reusable: Any = Sequence.reusable) -> None:
    """Reuses one row too many for a prompt that shares a prefix with the previous one."""

    def more(self: Sequence, ids: Any) -> int:
        reused = int(reusable(self, ids))
        return reused + (1 < reused < min(len(ids) - 1, self.length))

    patch.setattr(Sequence, "reusable", more)


def keep_stale_rows(patch: Patch, write: Any = KVCache.write) -> None:
    """After a rollback, new rows do not replace the old ones."""

    def truncate(self: KVCache, length: int) -> None:
        self.length = length

    def written(self: KVCache, layer: int, position: int, keys: Any, values: Any) -> None:
        there = self.keys[layer][0, position : position + keys.shape[1]].any(axis=1)
        free = keys.shape[1] if not there.any() else int(there.argmax())
        write(self, layer, position, keys[:, :free], values[:, :free])

    patch.setattr(KVCache, "truncate", truncate)
    patch.setattr(KVCache, "write", written)


def chooses(change: Callable[[Any], int]) -> Callable[[Patch], None]:
    """Patches the choice of the greedy token."""

    def plant(patch: Patch, call: Any = Sampler.__call__) -> None:
        def sample(self: Sampler, logits: Any, ids: Any = (), start: int = 0) -> int:
            return change(np.asarray(logits)) if not self.sampling.temperature else int(call(self, logits, ids, start))

        patch.setattr(Sampler, "__call__", sample)

    return plant


def second_best(logits: Any) -> int:
    return int(np.argsort(-logits, kind="stable")[1])


def last_of_equals(logits: Any) -> int:
    return len(logits) - 1 - int(logits[::-1].argmax())


def penalise(patch: Patch, processed: Any = Sampler.processed) -> None:
    """Applies a repetition penalty without being asked to."""

    def always(self: Sampler, logits: Any, ids: Any = (), start: int = 0) -> Any:
        out = processed(self, logits, ids, start).copy()
        RepetitionPenalty(1.5)(out, ids, start)
        return out

    patch.setattr(Sampler, "processed", always)


def shift_ids(patch: Patch, call: Any = Embedding.__call__) -> None:
    patch.setattr(Embedding, "__call__", lambda self, ids: call(self, [(token + 1) % 640 for token in ids]))


def last_logits_first(patch: Patch, call: Any = Post.__call__) -> None:
    """In a batch, each row gets the logits of the previous one."""
    patch.setattr(Post, "__call__", lambda self, hidden: np.roll(call(self, hidden), 1, axis=0))


def another_row(patch: Patch, call: Any = Embedding.__call__) -> None:
    """One token gets the embedding of another."""
    patch.setattr(Embedding, "__call__", lambda self, ids: call(self, [5 if token == 411 else token for token in ids]))


def ninth_row(patch: Patch, call: Any = Post.__call__) -> None:
    """In a batch, row 8 gets the logits of row 7."""

    def repeat(self: Post, hidden: Any) -> Any:
        logits = call(self, hidden).copy()
        logits[8:9] = logits[7:8] if len(logits) > 8 else logits[8:9]
        return logits

    patch.setattr(Post, "__call__", repeat)


def other_prompt(patch: Patch, forward: Any = Model.forward) -> None:
    """The last token of a long prompt is replaced by the one before."""

    def repeat(self: Model, ids: Any, *more: Any, **options: Any) -> Any:
        ids = list(ids)
        return forward(self, [*ids[:-1], ids[-2]] if len(ids) > 65 else ids, *more, **options)

    patch.setattr(Model, "forward", repeat)


def cut_logits(patch: Patch, call: Any = Post.__call__) -> None:
    """The upper half of the logits is missing."""

    def half(self: Post, hidden: Any) -> Any:
        logits = call(self, hidden).copy()
        logits[:, logits.shape[1] // 2 :] = 0
        return logits

    patch.setattr(Post, "__call__", half)


def never_stop(patch: Patch) -> None:
    find = Tokenizer.find

    def endless(hf: Path) -> Tokenizer | None:
        tokenizer = find(hf)
        if tokenizer is not None:
            tokenizer.stop_ids = frozenset()
        return tokenizer

    patch.setattr(Tokenizer, "find", endless)


def runner() -> list[RunnerFault]:
    seen, rows = "layers|cache", "layers|cache|answer"
    return [
        RunnerFault("the last cached row is hidden", "s8", seen, mask(hide_the_last_cached), says="mask|row|history"),
        RunnerFault("the last row is hidden after 192 rows", "s8", seen, mask(hide_the_last), says="mask|row|history"),
        RunnerFault("a token sees the next", "s8", seen, mask(see_the_next), says="mask|next"),
        RunnerFault("a token sees a row after the cache", "fp32", seen, mask(see_behind_the_cache), says="mask|row"),
        RunnerFault("a token does not see itself", "s8", seen, mask(miss_oneself), says="mask|history|row"),
        RunnerFault("decode hides the last row from 40", "s8", "cache", mask(hide_the_last_in_decode), says="row 39"),
        RunnerFault("chunks from 64 hide the last row", "s4", "cache", mask(hide_the_last_in_chunks), says="row 63"),
        RunnerFault("token 128 sees the next", "s8", "cache", mask(see_the_next_at_a_border), says="129"),
        RunnerFault("row 5 is hidden from token 77", "s4", "cache", mask(hide_one_row_once), says="row 5.*77"),
        RunnerFault("padding sees nothing", "s8", "cache", mask(padding_sees_nothing), says="padding"),
        RunnerFault("a layer writes one row early from 200 on", "s4", "cache", writes(one_layer_early), part="layer 2"),
        RunnerFault("the last row of a chunk is not written", "s8", "cache", writes(last_is_lost), says="not written"),
        RunnerFault("a rollback clears a row too many", "s8", "cache", forget_too_much, part="layer 3", says="cleared"),
        RunnerFault("a chunk is in another group's shape", "s8", "cache", chunks_of_another_group, says="group|shape"),
        RunnerFault("layers run in another order", "s4", "cache", layers_in_another_order, says="order"),
        RunnerFault("positions are capped at 200", "s8", "cache", positions_stop, says="201|positions"),
        RunnerFault("outputs of a chunk are reversed", "s8", "cache", first_of_the_last_chunk, says="order|another"),
        RunnerFault("a prompt reuses one row too many", "s8", "cache", reuse_too_much, says="other tokens|reused"),
        RunnerFault("a token has the embedding of another", "s8", "cache", another_row, part="411"),
        RunnerFault("the last token of a long prompt is wrong", "s8", "cache", other_prompt, says="other tokens"),
        RunnerFault("one row of a batch of logits is wrong", "s8", "post", ninth_row, part="row 8", alone=False),
        RunnerFault("positions are off by one in decode", "s8", seen, around(late_in_decode), part="decode"),
        RunnerFault("positions restart after a history", "s8", seen, around(from_zero_behind_history)),
        RunnerFault("the first cached row reads as zero", "s8", seen, around(first_row_is_lost), says="history|row"),
        RunnerFault("the engine computes in bfloat16", "fp32", "layers", around(after=coarse)),
        RunnerFault("decode writes its row one position late", "s8", rows, writes(one_row_late), says="row|decode"),
        RunnerFault("the cache has K instead of V", "s8", rows, writes(exchanged), says="K"),
        RunnerFault("the cache has the rows of another layer", "s8", rows, writes(next_layers)),
        RunnerFault("a rollback keeps stale rows", "s8", rows, keep_stale_rows, says="roll|stale|row"),
        RunnerFault("token ids are shifted", "s8", "cache|embedding|answer", shift_ids),
        RunnerFault("logits are those of the previous row", "s8", "post|answer", last_logits_first),
        RunnerFault("half of the logits are missing", "s8", "post", cut_logits),
        RunnerFault("the second best token is chosen", "s8", "sampling", chooses(second_best)),
        RunnerFault("the last of equal logits is chosen", "s8", "sampling", chooses(last_of_equals)),
        RunnerFault("repetition is penalised", "s8", "sampling", penalise),
        RunnerFault("stop tokens are ignored", "s8", "template|answer", never_stop, says="stop"),
    ]  # fmt: skip
