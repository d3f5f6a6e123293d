"""One pool of memory for the KV caches of several sequences, in blocks of tokens that they may share.

A cache keeps a range of addresses for its whole context, so that the engine sees one array per layer as ever. Blocks of
the pool, a file in memory, are mapped into the range as the cache grows. Rows without a block read as zeros and cannot
be written. Caches with a common prefix map the same blocks; a block with several users is never written.

Linux only: https://man7.org/linux/man-pages/man2/memfd_create.2.html
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import weakref
from contextlib import suppress
from ctypes import c_int, c_long, c_size_t, c_uint8, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.decoder import Decoder
from axrun.errors import CheckFailed, Failure
from axrun.format.dtypes import DTYPES
from axrun.kv_cache import KVCache

Array = NDArray[Any]

LEAST_TOKENS = 64  # of a block
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000  # not in Python's mmap, or only in newer ones
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")  # mappings of a process
MAPPINGS_SHARE = 2  # the pool uses one in two


class NoRoom(Failure):
    """The pool has too few free blocks."""


class Pool:
    """Blocks of `tokens` rows of all layers that keep rows, with the number of their users.

    `count` blocks in all, `free` of them without users. `most`: blocks of a cache that is full.
    """

    def __init__(self, decoder: Decoder, tokens: int, count: int, most_runs: int) -> None:
        """Caches for models that share the sessions of `decoder`.

        `most_runs` of blocks in a row may be in use: the system limits the number of mappings. Raises OSError if the
        system has no such files.
        """
        self.tokens, self.count, self.free = tokens, count, count
        self.rows, self.width = decoder.history, decoder.kv_size
        self.dtype = np.dtype(DTYPES[decoder.dtype].numpy)
        self.layers = decoder.caches
        self.most = -(-self.rows // tokens)
        self._streams = 2 * sum(self.layers)  # keys and values
        self._part = tokens * self.width * self.dtype.itemsize  # bytes of a block in a stream
        self._users = [0] * count
        self._runs, self._most_runs = 0, most_runs
        self._file = os.memfd_create("axrun K/V")
        weakref.finalize(self, os.close, self._file).atexit = False  # a thread may still run
        os.ftruncate(self._file, self._streams * count * self._part)  # takes no memory yet

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers."""
        return self._streams * self._part

    @property
    def nbytes(self) -> int:
        return self.count * self.block_bytes

    @property
    def promised(self) -> int:
        """Bytes that blocks will take when they are first written; the system still counts them as free memory."""
        return self.nbytes - 512 * os.fstat(self._file).st_blocks

    @property
    def shared(self) -> int:
        """Number of blocks with several users."""
        return sum(users > 1 for users in list(self._users))

    def cache(self) -> PooledCache:
        """A new, empty cache."""
        return PooledCache(self)

    def users(self, block: int) -> int:
        return self._users[block]

    @property
    def available(self) -> int:
        """Number of blocks that can be taken, wherever they are."""
        return min(self.free, self._most_runs - self._runs)

    def expect(self, count: int, mapped: int = 0) -> None:
        """Raises NoRoom if `count` free blocks cannot be taken, or `mapped` others be shared."""
        if count > self.available or mapped > self._most_runs - self._runs:
            raise NoRoom(f"the K/V pool has room for {self.available} more blocks of {self.tokens} tokens")

    def range(self) -> Any:
        """Addresses for a cache, as a ctypes array: zeros, unmapped together with its last view."""
        size = self._streams * self.most * self._part
        start = _mmap(None, size, mmap.PROT_READ, ANONYMOUS, -1, 0)
        memory = (c_uint8 * size).from_address(start)
        weakref.finalize(memory, _libc().munmap, start, size).atexit = False
        return memory

    def grow(self, table: list[int], start: int, count: int) -> None:
        """Appends free blocks to the table of a cache at the address `start` until it has `count`.

        Raises NoRoom, or CheckFailed if the system has no memory; the table is then as before.
        """
        before = len(table)
        self.expect(count - before)
        try:
            while len(table) < count:
                self._add(table, self._free_block(table))
            self._map(table, start, before)
        except BaseException:
            self.shrink(table, start, before)
            raise

    def share(self, table: list[int], start: int, blocks: list[int]) -> None:
        """Appends blocks of another cache. Raises as `grow`; the table is then as before."""
        before = len(table)
        self.expect(0, len(blocks))
        try:
            for block in blocks:
                self._add(table, block)
            self._map(table, start, before)
        except BaseException:
            self.shrink(table, start, before)
            raise

    def shrink(self, table: list[int], start: int, count: int) -> None:
        """Gives the blocks from the place `count` on back."""
        dropped = len(table) - count
        if dropped <= 0:
            return
        for stream in range(self._streams):
            place = start + (stream * self.most + count) * self._part
            with suppress(CheckFailed):  # rows behind the table are not read, and `grow` maps over them
                _mmap(place, dropped * self._part, mmap.PROT_READ, ANONYMOUS | MAP_FIXED, -1, 0)
        while len(table) > count:
            block = table.pop()
            self._users[block] -= 1
            self.free += not self._users[block]
            self._runs -= _begins_run(table, block)

    def _free_block(self, table: list[int]) -> int:
        """The one behind the last one if possible, since blocks in a row are one mapping."""
        block = table[-1] + 1 if table else 0
        return self._users.index(0) if block == self.count or self._users[block] else block

    def _add(self, table: list[int], block: int) -> None:
        self._runs += _begins_run(table, block)
        self.free -= not self._users[block]
        self._users[block] += 1
        table.append(block)

    def _map(self, table: list[int], start: int, begin: int) -> None:
        """Maps the blocks from the place `begin` of a table on."""
        while begin < len(table):
            end = begin + 1
            while end < len(table) and table[end] == table[end - 1] + 1:
                end += 1
            for stream in range(self._streams):
                place = start + (stream * self.most + begin) * self._part
                offset = (stream * self.count + table[begin]) * self._part
                access = mmap.PROT_READ | mmap.PROT_WRITE
                _mmap(place, (end - begin) * self._part, access, mmap.MAP_SHARED | MAP_FIXED, self._file, offset)
            begin = end


class PooledCache(KVCache):
    """A KV cache whose rows are in blocks of a pool."""

    def __init__(self, pool: Pool) -> None:
        memory = pool.range()
        whole = np.frombuffer(memoryview(memory), pool.dtype)
        arrays = [rows[: pool.rows * pool.width] for rows in whole.reshape(2 * sum(pool.layers), -1)]
        kept = iter([rows.reshape(1, pool.rows, pool.width) for rows in arrays])
        empty = np.zeros((1, pool.rows, 0), pool.dtype)
        keys, values = ([next(kept) if keeps else empty for keeps in pool.layers] for _ in range(2))
        super().__init__(keys, values)
        self.pool, self._start = pool, ctypes.addressof(memory)
        self._table: list[int] = []

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks of its rows, in order."""
        return tuple(self._table)

    def prepare(self, position: int, count: int) -> None:
        pool, end = self.pool, self.length
        if not 0 <= position <= end:
            raise ValueError(f"cannot truncate a cache of {end} tokens to {position}")
        self.length = position
        first, last = position // pool.tokens, -(-(position + count) // pool.tokens)
        for place in range(first, len(self._table)):
            if pool.users(self._table[place]) > 1:
                self._leave(place, position - place * pool.tokens)
                break
        if position < end:
            self._zero(position, end)
        if last > len(self._table):
            held = len(self._table)
            pool.grow(self._table, self._start, last)
            self._zero(held * pool.tokens, pool.rows)

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length
        self.pool.shrink(self._table, self._start, -(-length // self.pool.tokens))
        if length % self.pool.tokens and self.pool.users(self._table[-1]) == 1:
            self._zero(length, self.pool.rows)

    def keep(self, length: int) -> None:
        self.truncate(min(length, self.length))

    def adopt(self, other: PooledCache, kept: int, count: int) -> None:
        """Takes the rows from `kept` to `count` of another cache of the pool, which has the same tokens up to there.

        Whole blocks are shared, a rest is copied. Raises NoRoom or CheckFailed; the cache then holds fewer rows, at
        least `kept` or those of whole blocks.
        """
        pool = self.pool
        if not kept <= count <= other.length:
            raise ValueError(f"tokens {kept} to {count} of a cache of {other.length}")
        self.truncate(kept)
        first, whole = kept // pool.tokens, count // pool.tokens
        if whole > first:
            shared = other._table[first:whole]
            self.truncate(first * pool.tokens)
            pool.share(self._table, self._start, shared)
            self.length = whole * pool.tokens
        rest = slice(self.length, count)
        if self.length < count:
            self.prepare(self.length, count - self.length)
            for mine, others in zip((*self.keys, *self.values), (*other.keys, *other.values)):
                mine[:, rest] = others[:, rest]
            self.length = count

    def _leave(self, place: int, rows: int) -> None:
        """Replaces a shared block by a copy of its first rows, and drops those behind. Raises NoRoom."""
        pool, begin = self.pool, place * self.pool.tokens
        if rows <= 0:
            pool.shrink(self._table, self._start, place)
            return
        arrays = (*self.keys, *self.values)
        pool.shrink(self._table, self._start, place + 1)
        pool.expect(1)
        saved = [array[:, begin : begin + rows].copy() for array in arrays]
        pool.shrink(self._table, self._start, place)
        try:
            pool.grow(self._table, self._start, place + 1)
        except CheckFailed:
            self.length = begin
            raise
        for array, copied in zip(arrays, saved):
            array[:, begin : begin + rows] = copied
        self._zero(begin + rows, pool.rows)

    def _zero(self, begin: int, end: int) -> None:
        """Zeroes rows that have a block."""
        end = min(end, len(self._table) * self.pool.tokens)
        if begin < end:
            for array in (*self.keys, *self.values):
                array[:, begin:end] = 0


def pool_of(decoder: Decoder, caches: int, limit: int | None = None) -> Pool | None:
    """A pool for `caches` caches, of up to `limit` bytes; None if the engine or the system has none.

    Without a limit all of them can be full. Blocks are as small as the size of a page and the limit of mappings allow.
    """
    row = decoder.kv_size * DTYPES[decoder.dtype].bits // 8
    streams = 2 * sum(decoder.caches)
    if not (decoder.stacks and streams and hasattr(os, "memfd_create") and sys.platform == "linux"):
        return None
    tokens = LEAST_TOKENS
    while tokens * row % mmap.PAGESIZE:
        tokens *= 2
    most_runs = _max_map_count() // MAPPINGS_SHARE // streams - caches
    while -(-decoder.history // tokens) > most_runs:  # one full cache, all blocks scattered
        if tokens >= decoder.history:
            return None
        tokens *= 2
    count = caches * -(-decoder.history // tokens)
    if limit is not None:
        count = min(count, limit // (streams * tokens * row))
    try:
        return Pool(decoder, tokens, count, most_runs)
    except OSError:  # not permitted in this container
        return None


def _begins_run(table: list[int], block: int) -> bool:
    return not table or table[-1] + 1 != block


def _max_map_count() -> int:
    try:
        return int(MAX_MAP_COUNT.read_text())
    except (OSError, ValueError):
        return 65530  # the kernel's default


@functools.lru_cache(1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes, libc.mmap.restype = (c_void_p, c_size_t, c_int, c_int, c_int, c_long), c_void_p
    libc.munmap.argtypes = (c_void_p, c_size_t)
    return libc


def _mmap(start: int | None, size: int, access: int, flags: int, file: int, offset: int) -> int:
    """mmap(2) at a given address, which Python's mmap cannot. Raises CheckFailed."""
    found = _libc().mmap(start, size, access, flags, file, offset)
    if found is None or found == c_void_p(-1).value:
        reason = os.strerror(ctypes.get_errno())
        raise CheckFailed(f"mmap of {size} bytes for keys and values: {reason}; try fewer slots or more memory")
    return int(found)
