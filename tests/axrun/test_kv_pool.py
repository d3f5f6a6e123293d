"""The pool of KV caches against lists: rows, blocks, users; and the same logits as with memory of its own."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axrun import kv_pool
from axrun.errors import CheckFailed
from axrun.format.bundle import Bundle
from axrun.kv_pool import NoRoom, Pool, PooledCache, pool_of
from axrun.model import Model
from axrun.sequence import Sequence, common_prefix

CACHES, BLOCKS, TOKENS = 4, 9, 64


@pytest.fixture(scope="module")
def model(bundle_s8: Path) -> Model:
    """A context of 255 tokens: 4 blocks."""
    return Model.load(Bundle.open(bundle_s8), threads=1)


@pytest.fixture(scope="module")
def hf_ids(tiny_qwen2: Path) -> list[int]:
    text = tiny_qwen2.joinpath("heldout.txt").read_text()
    return list(transformers.AutoTokenizer.from_pretrained(tiny_qwen2).encode(text)[:200])


def expect_whole(pool: Pool, caches: list[PooledCache], rows: list[list[int]]) -> None:
    """The caches hold the rows, and the pool counts what their tables say."""
    for cache, expected in zip(caches, rows, strict=True):
        assert cache.length == len(expected)
        for array in (*cache.keys, *cache.values):
            assert (array[0, : cache.length] == np.array(expected, array.dtype)[:, None]).all()
            assert (array[0, len(cache.blocks) * TOKENS :] == 0).all()
        assert len(cache.blocks) * TOKENS >= cache.length
        assert len(set(cache.blocks)) == len(cache.blocks)
    tables = [block for cache in caches for block in cache.blocks]
    assert [pool.users(block) for block in range(pool.count)] == [tables.count(block) for block in range(pool.count)]
    assert pool.free == pool.count - len(set(tables))
    assert pool.shared == sum(tables.count(block) > 1 for block in set(tables))
    runs = sum(1 for cache in caches for one, two in zip((-9, *cache.blocks), cache.blocks) if two != one + 1)  # noqa: B905
    assert pool.available == min(pool.free, pool.most * 5 - runs)


def write(cache: PooledCache, expected: list[int], position: int, new: list[int]) -> None:
    """What a run of the engine does."""
    cache.prepare(position, len(new))
    del expected[position:]
    for array in (*cache.keys, *cache.values):
        array[0, position : position + len(new)] = np.array(new, array.dtype)[:, None]
    cache.length = position + len(new)
    expected += new


@contextlib.contextmanager
def refusing(number: int) -> Iterator[None]:
    """The system refuses to map blocks for the `number`th time; as at vm.max_map_count."""
    left, mmap = number, kv_pool._mmap

    def refuse(start: int | None, size: int, access: int, flags: int, file: int, offset: int) -> int:
        nonlocal left
        left -= file >= 0
        if file >= 0 and not left:
            raise CheckFailed("mmap: Cannot allocate memory")
        return mmap(start, size, access, flags, file, offset)

    with patch.object(kv_pool, "_mmap", refuse):
        yield


@contextlib.contextmanager
def refusing_zeros() -> Iterator[None]:
    """The system refuses to map zeros in place of blocks that a cache gives back."""
    given = kv_pool._mmap

    def refuse(start: int | None, size: int, access: int, flags: int, file: int, offset: int) -> int:
        if file < 0:
            raise CheckFailed("mmap: Cannot allocate memory")
        return given(start, size, access, flags, file, offset)

    with patch.object(kv_pool, "_mmap", refuse):
        yield


def test_blocks_that_stay_mapped_are_given_back_all_the_same(model: Model) -> None:
    pool = Pool(model.decoder, TOKENS, BLOCKS, 5 * 4)
    one, two = caches = [pool.cache(), pool.cache()]
    rows: list[list[int]] = [[], []]
    write(one, rows[0], 0, list(range(1, 251)))
    with refusing_zeros():
        one.keep(70)
    del rows[0][70:]
    assert pool.free == BLOCKS - 2
    write(two, rows[1], 0, list(range(300, 550)))  # in the blocks given back, which `one` has mapped still
    write(one, rows[0], 70, list(range(600, 780)))
    expect_whole(pool, caches, rows)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_caches_hold_their_rows_and_no_block_is_lost(model: Model, data: st.DataObject) -> None:
    pool = Pool(model.decoder, TOKENS, BLOCKS, 5 * 4)
    caches = [pool.cache() for _ in range(CACHES)]
    rows: list[list[int]] = [[] for _ in range(CACHES)]
    number = 0
    for _ in range(data.draw(st.integers(1, 14))):
        one, other = data.draw(st.permutations(range(CACHES)))[:2]
        cache, expected, free = caches[one], rows[one], pool.free
        kind = data.draw(st.sampled_from(["write", "write", "truncate", "keep", "adopt", "adopt"]))
        position = data.draw(st.integers(0, len(expected)))
        refused = data.draw(st.sampled_from([0, 0, 1, 2, 5, 8, 9]))  # 8 mappings for a range of blocks
        failed: Exception | None = None
        try:
            with refusing(refused):
                if kind == "write":
                    count = data.draw(st.integers(1, 255 - position)) if position < 255 else 0
                    new, number = [number % 999 + 1 + i for i in range(count)], number + count
                    needed = -(-(position + count) // TOKENS)
                    write(cache, expected, position, new)
                elif kind == "adopt":
                    source = rows[other]
                    common = common_prefix(expected, source)
                    kept = data.draw(st.integers(0, common))
                    count = data.draw(st.integers(kept, len(source)))
                    needed = 2
                    cache.adopt(caches[other], kept, count)
                    expected[:] = source[:count]
                else:
                    getattr(cache, kind)(position)
                    del expected[position:]
        except (NoRoom, CheckFailed) as error:
            failed = error
        if failed is not None:
            assert free < needed if isinstance(failed, NoRoom) else refused
            if kind == "adopt":  # whole blocks may be there already
                expected[:] = rows[other]
                assert len(cache.blocks) == -(-cache.length // TOKENS)
            assert cache.length <= len(expected)
            del expected[cache.length :]
        expect_whole(pool, caches, rows)
    for cache, expected in zip(caches, rows, strict=True):
        cache.reset()
        expected.clear()
    expect_whole(pool, caches, rows)
    assert pool.free == BLOCKS


@pytest.mark.parametrize("number", [1, 2, 8])
def test_a_refused_mapping_leaves_rows_and_blocks_whole(model: Model, number: int) -> None:
    pool = Pool(model.decoder, TOKENS, BLOCKS, 5 * 4)
    one, two = caches = [pool.cache(), pool.cache()]
    rows: list[list[int]] = [[], []]
    write(one, rows[0], 0, list(range(1, 151)))
    two.adopt(one, 0, 150)
    refused: tuple[Callable[[], None], ...] = (
        lambda: two.prepare(100, 10),  # copies the rows before from a shared block
        lambda: two.adopt(one, 64, 150),
        lambda: two.prepare(64, 64),
    )
    rows[1] = rows[0][:64]
    for change in refused:
        with refusing(number), pytest.raises(CheckFailed):
            change()
        assert len(two.blocks) == 1
        expect_whole(pool, caches, rows)
    two.adopt(one, 64, 150)
    rows[1] = rows[0][:150]
    write(two, rows[1], 100, [7] * 100)
    expect_whole(pool, caches, rows)


def test_a_shared_block_that_cannot_be_copied_keeps_its_rows(model: Model) -> None:
    pool = Pool(model.decoder, TOKENS, BLOCKS, 5 * 4)
    one, two, *others = caches = [pool.cache() for _ in range(4)]
    rows: list[list[int]] = [[] for _ in caches]
    write(one, rows[0], 0, list(range(1, 151)))
    two.adopt(one, 0, 128)
    for place, (cache, count) in enumerate(zip(others, (255, 128), strict=True), 2):
        write(cache, rows[place], 0, [place] * count)
    assert pool.free == 0
    with pytest.raises(NoRoom):
        two.prepare(100, 10)
    rows[1] = rows[0][:100]
    expect_whole(pool, caches, rows)


def read(model: Model, sequence: Sequence, ids: list[int]) -> bytes:
    """The logits after each token."""
    return b"".join(rows.tobytes() for rows in sequence.score(ids))


def test_logits_are_those_of_memory_of_its_own(model: Model, hf_ids: list[int]) -> None:
    plain, pool = Sequence(model.another()), pool_of(model.decoder, 2)
    assert pool is not None
    one, two = (Sequence(model.another(pool.cache())) for _ in range(2))
    expected = read(model, plain, hf_ids)
    assert (read(model, one, hf_ids), read(model, two, hf_ids)) == (expected, expected)
    assert pool.shared == 0
    assert isinstance(two.model.decoder.cache, PooledCache)
    assert isinstance(one.model.decoder.cache, PooledCache)
    two.reset()
    two.model.decoder.cache.adopt(one.model.decoder.cache, 0, 150)
    two.ids = hf_ids[:150]
    assert pool.shared == 2
    tail = [token ^ 1 for token in hf_ids[100:]]
    one.truncate(100)  # in a block that two reads, too
    plain.truncate(100)
    assert read(model, one, tail) == read(model, plain, tail)
    plain.truncate(100)
    read(model, plain, hf_ids[100:150])
    assert read(model, two, hf_ids[150:]) == read(model, plain, hf_ids[150:])


def test_memory_is_taken_by_blocks_and_returned(model: Model) -> None:
    gc.collect()
    files, before = len(os.listdir("/proc/self/fd")), memory()  # also of other tests
    pool = pool_of(model.decoder, CACHES)
    assert pool is not None
    caches = [pool.cache() for _ in range(CACHES)]
    assert memory() == before
    assert pool.promised == pool.nbytes
    caches[0].prepare(0, TOKENS + 1)
    assert memory() == before + 2 * pool.block_bytes
    assert pool.promised == pool.nbytes - 2 * pool.block_bytes
    caches[1].adopt(caches[0], 0, 0)
    assert memory() == before + 2 * pool.block_bytes
    del pool, caches
    gc.collect()
    assert (memory(), len(os.listdir("/proc/self/fd"))) == (before, files)


def memory() -> int:
    """Bytes that pools take."""
    files = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    found = {
        os.stat(path).st_ino: os.stat(path).st_blocks
        for path in files
        if os.path.islink(path) and "K/V" in os.readlink(path)
    }
    return 512 * sum(found.values())


@pytest.mark.parametrize(("page", "tokens"), [(4096, 64), (65536, 512)])
def test_a_block_is_whole_pages(model: Model, monkeypatch: pytest.MonkeyPatch, page: int, tokens: int) -> None:
    monkeypatch.setattr("mmap.PAGESIZE", page)
    pool = pool_of(model.decoder, 3)
    assert pool is not None
    assert (pool.tokens, pool.most, pool.count) == (tokens, -(-255 // tokens), 3 * -(-255 // tokens))


def test_the_limit_of_mappings_is_kept(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kv_pool, "MAX_MAP_COUNT", tmp_path / "count")
    streams = 2 * len(model.decoder.sessions)
    for runs, tokens in ((4, 64), (3, 128), (1, 256), (0, None)):
        (tmp_path / "count").write_text(str(2 * streams * (3 + runs)))
        pool = pool_of(model.decoder, 3)
        assert (pool and pool.tokens) == tokens
        if runs == 4 and pool is not None:
            one, two = pool.cache(), pool.cache()
            for length in (64, 128):  # alternating blocks: nothing is in a row
                one.prepare(one.length, 64)
                two.prepare(two.length, 64)
                one.length = two.length = length
            with pytest.raises(NoRoom):
                one.prepare(128, 64)
            three = pool.cache()
            with pytest.raises(NoRoom):
                three.adopt(two, 0, 128)
            two.reset()
            one.prepare(128, 64)


def test_other_engines_have_no_pool(bundle_s8: Path) -> None:
    assert pool_of(Model.load(Bundle.open(bundle_s8), "ort").decoder, 2) is None
