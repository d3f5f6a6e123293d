"""One run for tokens of several sequences: the weights are read once for all of them.

The rows of the sequences are stacked; each layer's attention reads and extends the KV cache of each sequence. With our
engine a row has the same bits in any company, so that a batch never changes an answer.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import Any

import numpy as np

from axrun.decoder import Decoder, expect_room
from axrun.errors import CheckFailed, Failure, NotFinite
from axrun.format.axmodel import TensorInfo
from axrun.format.dtypes import DTYPES
from axrun.job import Computed, Job, logits_of
from axrun.kv_cache import fill_mask, hide_before_window
from axrun.model import Model, Post
from axrun.session import SEGMENT, Array


@dataclass(eq=False)
class _Part:
    """A job in a batch: `count` rows from `position` on, embedded, in the row `first` of the batch and behind."""

    place: int
    job: Job
    decoder: Decoder
    position: int
    rows: Array
    first: int = 0

    @property
    def count(self) -> int:
        return len(self.rows)


class Batch:
    """Memory for runs of up to `rows` tokens of sequences whose models share the sessions of `model`."""

    def __init__(self, model: Model, rows: int) -> None:
        """Raises ValueError for a model whose engine runs one sequence at a time; see `Decoder.stacks`."""
        decoder = model.decoder
        self.rows = rows
        self._model, self._dtype = model, decoder.dtype
        self._post = Post(model.post.session)  # of its own: results outlive runs of single sequences
        self._hidden = [self._allocate(name, 1, rows, decoder.hidden_size) for name in ("input", "output")]
        kept = [self._allocate(name, 1, rows, decoder.kv_size) for name in ("K_cache_out", "V_cache_out")]
        self._indices = self._allocate("indices", 1, rows, dtype="UINT32")
        self._bindings = []
        for layer, session in enumerate(decoder.sessions):
            arrays = {"input": self._hidden[layer % 2], "output": self._hidden[(layer + 1) % 2]}
            if decoder.caches[layer]:
                arrays |= {"indices": self._indices, "K_cache_out": kept[0], "V_cache_out": kept[1]}
            self._bindings.append(session.bind_stacked(arrays))
        self._output = self._hidden[len(self._bindings) % 2]
        windows = [session.window for session in decoder.sessions]
        # One mask for each attention window, and a row that sees everything, which most tokens need.
        self._masks = {window: _Masks(decoder, window, rows) for window in {*windows}}
        self._windows = windows

    def run(self, jobs: abc.Sequence[Job]) -> list[Computed | Failure]:
        """Computes all tokens of the jobs, at most `rows` together; their results in order.

        The next run overwrites the results. A job that fails does not change those of the others.
        """
        done: dict[int, Computed | Failure] = {}
        parts = []
        for place, job in enumerate(jobs):
            try:
                parts.append(self._part(place, job))
            except Failure as error:
                done[place] = error
        while parts:
            try:
                self._run(parts)
                break
            except _PartFailed as failed:
                parts.remove(failed.part)
                done[failed.part.place] = failed.error
        scored = [part.first + row for part in parts for row in range(part.job.last, part.count)]
        logits = self._logits(self._output[0, scored]) if scored else []
        taken = 0
        for part in parts:
            own = max(part.count - part.job.last, 0)
            hidden = self._output[0, part.first : part.first + part.count]
            done[part.place] = Computed(hidden, _each(logits[taken : taken + own]), alone=False)
            taken += own
        return [done[place] for place in range(len(jobs))]

    def _part(self, place: int, job: Job) -> _Part:
        """Raises BadInput for tokens that do not fit the context or are outside the vocabulary."""
        decoder, position = job.sequence.model.decoder, job.sequence.length
        expect_room(position + len(job.tokens), decoder.context)
        rows = self._model.embedding(job.tokens)
        decoder.cache.prepare(position, len(rows))
        return _Part(place, job, decoder, position, rows)

    def _run(self, parts: abc.Sequence[_Part]) -> None:
        """Raises _PartFailed if rows of one part are not finite; no part has changed its sequence then."""
        table = np.zeros((len(self._bindings), len(parts)), SEGMENT)
        first = 0
        for masks in self._masks.values():
            masks.begin()
        for place, part in enumerate(parts):
            rows, position, count = slice(first, first + part.count), part.position, part.count
            part.first = first
            self._hidden[0][0, rows] = part.rows
            self._indices[0, rows] = np.arange(position, position + count)
            column = table[:, place]
            column["tokens"], column["history"] = count, position
            column["K_cache"], column["V_cache"] = part.decoder.cache.addresses
            addresses = {window: masks.add(position, count) for window, masks in self._masks.items()}
            column["mask"] = [addresses[window] for window in self._windows]
            first += count
        address = table.ctypes.data
        for layer, binding in enumerate(self._bindings):
            try:
                binding.run(address + layer * len(parts) * SEGMENT.itemsize, len(parts))
            except NotFinite as error:
                part = next(part for part in reversed(parts) if part.first <= error.row)
                part.decoder.cache.clear(part.position, part.count)
                token = part.position + error.row - part.first
                raise _PartFailed(part, part.decoder.overflow(error, layer, token)) from None
        for part in parts:
            part.decoder.cache.length = part.position + part.count

    def _logits(self, hidden: Array) -> list[Any]:
        """Logits of hidden states [n, H], or a CheckFailed in the place of those that are not finite."""
        try:
            return list(self._post(hidden))
        except CheckFailed:
            found: list[Any] = []
            for row in hidden:
                try:
                    found += [rows.copy() for rows in logits_of(self._post, row[None])]
                except CheckFailed as error:
                    found.append(error)
            return found

    def _allocate(self, name: str, *shape: int, dtype: str = "") -> Array:
        return self._model.decoder.sessions[0].allocate(TensorInfo(name, dtype or self._dtype, shape))


class _PartFailed(Exception):
    def __init__(self, part: _Part, error: CheckFailed) -> None:
        super().__init__(str(error))
        self.part, self.error = part, error


class _Masks:
    """The masks of a batch for one attention window, and memory for them."""

    def __init__(self, decoder: Decoder, window: int, rows: int) -> None:
        self._decoder, self._window = decoder, window
        self._width = DTYPES[decoder.dtype].bits // 8
        most = rows * (decoder.context + rows)
        self._memory = decoder.sessions[0].allocate(TensorInfo("mask", decoder.dtype, (decoder.context + 1 + most,)))
        self._memory[: decoder.context + 1] = decoder.visible
        self._start, self._end = self._memory.ctypes.data, 0

    def begin(self) -> None:
        """Forgets the masks of the last run."""
        self._end = self._decoder.context + 1

    def add(self, position: int, count: int) -> int:
        """The address of a mask [count, position + count] for tokens from `position` on."""
        if count == 1 and (not self._window or position < self._window):
            return int(self._start)
        begin, self._end = self._end, self._end + count * (position + count)
        mask = self._memory[begin : self._end].reshape(1, count, position + count)
        fill_mask(mask, position, count, self._decoder.visible, self._decoder.blocked)
        if self._window:
            hide_before_window(mask, position, count, self._window, self._decoder.blocked)
        return int(self._start + begin * self._width)


def _each(found: abc.Iterable[Any]) -> abc.Iterator[Any]:
    """Yields arrays, and raises an exception in the place of one."""
    for item in found:
        if isinstance(item, Exception):
            raise item
        yield item
