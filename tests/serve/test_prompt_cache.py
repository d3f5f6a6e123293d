"""`axrun serve --prompt-cache`: prompts that were read before a restart are not read again."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axrun.format.bundle import Bundle
from axrun.kv_pool import Pool
from axrun.model import Model
from axrun.prompt_cache import BLOCK, PromptCache
from axrun.sequence import Sequence
from tests.serve.server import ROOT, Start

PROMPT = 200  # tokens: three blocks and a rest


@pytest.fixture(scope="module")
def model(bundle_s8: Path) -> Model:
    return Model.load(Bundle.open(bundle_s8), threads=1)


@pytest.fixture(scope="module")
def ids(hf_tokenizer: Any, heldout: str) -> list[int]:
    return list(hf_tokenizer.encode(heldout)[:PROMPT])


def read(model: Model, ids: list[int]) -> Sequence:
    sequence = Sequence(model.another())
    for _ in sequence.extend(ids):
        pass
    return sequence


def stored(model: Model, ids: list[int], folder: Path, identity: str = "a") -> list[Path]:
    cache = PromptCache(folder, identity, 1 << 30, print)
    cache.save(read(model, ids), len(ids))
    cache.close()
    return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)


def restored(model: Model, ids: list[int], folder: Path, identity: str = "a") -> tuple[int, Sequence, list[str]]:
    said: list[str] = []
    cache, sequence = PromptCache(folder, identity, 1 << 30, said.append), Sequence(model.another())
    count = cache.restore(sequence, ids)
    cache.close()
    return count, sequence, said


def test_restored_rows_equal_computed_ones(model: Model, ids: list[int], tmp_path: Path) -> None:
    stored(model, ids, tmp_path)
    count, sequence, _ = restored(model, ids, tmp_path)
    assert (count, sequence.ids) == (3 * BLOCK, ids[: 3 * BLOCK])
    whole = read(model, ids).model.decoder.cache
    mine = sequence.model.decoder.cache
    for one, other in zip((*whole.keys, *whole.values), (*mine.keys, *mine.values), strict=True):
        assert np.array_equal(one[:, : 3 * BLOCK], other[:, : 3 * BLOCK])
        assert not other[:, 3 * BLOCK :].any()


def test_the_last_token_is_always_computed(model: Model, ids: list[int], tmp_path: Path) -> None:
    stored(model, ids, tmp_path)
    assert restored(model, ids[: 2 * BLOCK], tmp_path)[0] == BLOCK
    assert restored(model, ids[: 2 * BLOCK + 1], tmp_path)[0] == 2 * BLOCK


def test_blocks_are_read_as_far_as_there_is_room(model: Model, ids: list[int], tmp_path: Path) -> None:
    stored(model, ids, tmp_path)
    pool = Pool(model.decoder, BLOCK, 4, 99)
    other, sequence = pool.cache(), Sequence(model.another(pool.cache()))
    other.prepare(0, 2 * BLOCK)
    cache = PromptCache(tmp_path, "a", 1 << 30, print)
    assert cache.restore(sequence, ids) == 2 * BLOCK
    assert sequence.ids == ids[: 2 * BLOCK]
    other.reset()
    assert cache.restore(sequence, ids) == BLOCK
    assert sequence.ids == ids[: 3 * BLOCK]
    cache.close()


def test_prompts_share_the_blocks_of_a_common_prefix(model: Model, ids: list[int], tmp_path: Path) -> None:
    assert len(stored(model, ids, tmp_path)) == 3
    other = [*ids[:100], *reversed(ids[:92])]
    assert len(stored(model, other, tmp_path)) == 5
    assert restored(model, other, tmp_path)[0] == 2 * BLOCK  # 192 tokens: the last block holds the last token
    assert restored(model, [*ids[:64], 1, *ids[65:]], tmp_path)[0] == BLOCK


def test_a_block_behind_another_beginning_is_another_block(model: Model, ids: list[int], tmp_path: Path) -> None:
    """Its rows depend on all tokens before it."""
    other = [*ids[BLOCK : 2 * BLOCK], *ids[BLOCK:PROMPT]]
    assert len(stored(model, ids[: 2 * BLOCK], tmp_path)) == 2
    assert len(stored(model, other[: 2 * BLOCK], tmp_path)) == 4
    count, sequence, _ = restored(model, other, tmp_path)
    assert count == 2 * BLOCK
    whole, mine = (each.model.decoder.cache for each in (read(model, other), sequence))
    assert whole.read(0, 2 * BLOCK) == mine.read(0, 2 * BLOCK)


def test_rows_in_the_slot_are_not_read_again(model: Model, ids: list[int], tmp_path: Path) -> None:
    stored(model, ids, tmp_path)
    cache, sequence = PromptCache(tmp_path, "a", 1 << 30, print), read(model, ids[:150])
    assert cache.restore(sequence, ids) == BLOCK
    assert sequence.ids == ids[: 3 * BLOCK]
    cache.close()


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "empty", "renamed", "folder", "unreadable magic"])
def test_a_damaged_block_is_ignored_with_a_warning(model: Model, ids: list[int], tmp_path: Path, damage: str) -> None:
    first, second, _ = stored(model, ids, tmp_path)
    data = bytearray(second.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    elif damage == "unreadable magic":
        data[0] ^= 1
    elif damage == "renamed":
        data = bytearray(first.read_bytes())
    second.unlink()
    if damage == "folder":
        second.mkdir()
    else:
        sizes = {"cut": bytes(data[:-1]), "longer": bytes(data) + b"\0", "empty": b""}
        second.write_bytes(sizes.get(damage, bytes(data)))
    said: list[str] = []
    cache, sequence = PromptCache(tmp_path, "a", 1 << 30, said.append), Sequence(model.another())
    assert cache.restore(sequence, ids) == BLOCK
    assert sequence.ids == ids[:BLOCK]
    assert len(said) == (damage != "empty")  # without content it counts as not stored
    cache.save(read(model, ids), len(ids))
    cache.close()
    if damage != "folder":
        assert restored(model, ids, tmp_path)[0] == 3 * BLOCK


def test_blocks_of_another_model_are_not_found(model: Model, ids: list[int], tmp_path: Path) -> None:
    stored(model, ids, tmp_path)
    assert restored(model, ids, tmp_path, "b")[0] == 0


@pytest.mark.parametrize("restarts", [False, True])
def test_the_least_recently_used_blocks_are_evicted(
    model: Model, ids: list[int], tmp_path: Path, restarts: bool
) -> None:
    named = {
        stored(model, ids[start : start + BLOCK], tmp_path / str(start))[0].name: ids[start : start + BLOCK]
        for start in (0, 10, 20, 30, 40)
    }
    prompts, folder = [named[name] for name in sorted(named, reverse=True)], tmp_path / "cache"  # not in order of age
    one = stored(model, prompts[0], folder)[0].stat().st_size
    caches = [PromptCache(folder, "a", 3 * one, print)]

    def restart() -> None:
        if restarts:
            caches[-1].close()
            caches.append(PromptCache(folder, "a", 3 * one, print))
        time.sleep(0.02)  # the times of files differ

    def save(prompt: list[int]) -> None:
        caches[-1].save(read(model, prompt), BLOCK)
        end = time.monotonic() + 60
        while not all(caches[-1]._sizes.values()):
            assert time.monotonic() < end
            time.sleep(0.01)
        restart()

    for prompt in prompts[1:3]:
        save(prompt)
    assert caches[-1].restore(Sequence(model.another()), [*prompts[0], 1]) == BLOCK  # used: not the oldest any more
    restart()
    for prompt in prompts[3:]:
        save(prompt)
    caches[-1].close()
    assert len(list(folder.iterdir())) == 3
    kept = [place for place, prompt in enumerate(prompts) if restored(model, [*prompt, 1], folder)[0]]
    assert kept == [0, 3, 4]


def test_a_full_disk_is_reported_once(
    model: Model, ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own file /dev/full has no room: https://man7.org/linux/man-pages/man4/full.4.html"""
    said: list[str] = []
    cache = PromptCache(tmp_path / "cache", "a", 1 << 30, said.append)

    def full(prefix: str, dir: Path) -> tuple[int, str]:
        return os.open("/dev/full", os.O_WRONLY), str(tmp_path / "none")

    with monkeypatch.context() as patched:
        patched.setattr("tempfile.mkstemp", full)
        cache.save(read(model, ids), len(ids))
        end = time.monotonic() + 60
        while cache._sizes:  # blocks that are not given up yet
            assert time.monotonic() < end
            time.sleep(0.01)
    assert said == ["warning: prompt cache: blocks cannot be written: No space left on device"]
    cache.save(read(model, ids), len(ids))
    cache.close()
    assert said[1:] == ["note: prompt cache: blocks can be written again"]
    assert restored(model, ids, tmp_path / "cache")[0] == 3 * BLOCK


def test_blocks_that_cannot_be_deleted_are_reported_once(
    model: Model, ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    cache = PromptCache(tmp_path / "cache", "a", 1, said.append)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        cache.save(read(model, ids), len(ids))
        cache.close()
    assert said == ["warning: prompt cache: blocks cannot be deleted: Operation not permitted"]
    assert len(cache._sizes) == len(ids) // BLOCK  # new ones, too, are known
    assert restored(model, ids, tmp_path / "cache")[0] == 3 * BLOCK
    again = PromptCache(tmp_path / "cache", "a", 1, said.append)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        again.save(read(model, ids[10:]), BLOCK)
        end = time.monotonic() + 60
        while len(said) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    again.save(read(model, ids[20:]), BLOCK)
    again.close()
    assert said[2:] == ["note: prompt cache: blocks can be deleted again"]


def test_a_folder_that_cannot_be_written_is_refused(bundle_s8: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [
        sys.executable,
        "-m",
        "axrun",
        "serve",
        str(bundle_s8),
        "--port",
        "0",
        "--prompt-cache",
        str(tmp_path / "file"),
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "board"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the prompt cache")


def test_a_restarted_server_reads_the_system_prompt_from_disk(
    bundle_s8: Path, heldout: str, tmp_path: Path, start: Start
) -> None:
    folder, prompt = tmp_path / "cache", heldout[:400]
    flags = "--prompt-cache", folder
    first = start(bundle_s8, *flags).ready()
    fresh = first.complete(prompt, max_tokens=20)
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert first.stop() == 0
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}

    second = start(bundle_s8, *flags).ready()
    again = second.complete(prompt, max_tokens=20)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= BLOCK
    assert again["choices"][0]["text"] == fresh["choices"][0]["text"]
    second.stop(signal.SIGKILL)
    for path in folder.iterdir():
        shutil.copy(path, path.with_name(f"partial-{path.name}"))
        os.utime(path.with_name(f"partial-{path.name}"), (0, 0))

    third = start(bundle_s8, *flags).ready()
    assert third.complete(prompt, max_tokens=20)["choices"] == again["choices"]
    assert not list(folder.glob("partial-*"))
    third.stop()

    rounding = start(bundle_s8, *flags, "--engine", "ax-int8").ready()  # computes other rows from the same bundle
    found = rounding.complete(prompt, max_tokens=20)
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
