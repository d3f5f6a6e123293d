"""Damaged and malicious files: each is refused with an error code and a reason, without a crash."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axrun.errors import BadInput, NotFinite
from axrun.format.bundle import Bundle
from axrun.session import SEGMENT
from tests.engine.compare import filled
from tests.engine.conftest import SOURCE


def load(ax: Any, path: Path) -> Any:
    """Loads a file in the engine, without the checks of the Python reader."""
    import ctypes

    handle = ctypes.c_void_p()
    ax.library().call("axc_open", ctypes.byref(handle), str(path).encode())
    return handle


CORPUS = sorted((SOURCE / "fuzz" / "corpus").iterdir())


def test_files_found_by_the_fuzzer(ax: Any) -> None:
    """Each is refused with a reason, or loads and runs."""
    loaded = 0
    assert len(CORPUS) > 20
    for path in CORPUS:
        try:
            session = ax.open_session(path)
            group = min(session.groups, key=lambda group: group.tokens)
            session.bind(group.index, filled(session, group.index)).run()
            loaded += 1
        except NotFinite:
            loaded += 1
        except (BadInput, ValueError, KeyError, MemoryError, TypeError, IndexError, AssertionError):
            load_alone(ax, path)
    assert loaded >= 9  # valid seeds


def load_alone(ax: Any, path: Path) -> None:
    """Loads a file without the checks of the Python reader; any result is fine, except a crash."""
    with contextlib.suppress(BadInput):
        ax.library().call("AX_ENGINE_DestroyHandle", load(ax, path))


@pytest.fixture(scope="session")
def good(bundle_s8: Path) -> bytes:
    return Bundle.open(bundle_s8).layer_path(0).read_bytes()


EDITS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "empty or cannot be mapped"),
    "noise": (lambda data: bytes(range(1, 250)) * 9, "0x8006"),
    "truncated": (lambda data: data[: len(data) // 2], "bytes where"),
    "cut inside the nodes": (lambda data: data[:600], "bytes where"),
    "another producer": (lambda data: data.replace(b"\x12\x03axc", b"\x12\x03abc", 1), "an axmodel of abc"),
    "unknown operator": (lambda data: data.replace(b"Sigmoid", b"Sigmojd"), "operator Sigmojd"),
    "unknown attribute": (lambda data: data.replace(b"epsilon", b"epsilom"), "with attribute epsilom"),
    "another version": (
        lambda data: data.replace(b"axmodel.version\x12\x011", b"axmodel.version\x12\x012"),
        "version 2",
    ),
    "other groups": (lambda data: data.replace(b'{"tokens"', b'{"tokenz"', 1), "axmodel.groups"),
    "scales of another matrix": (
        lambda data: data.replace(b"mlp.up_proj.weight_scale", b"mlp.down_proj.weight_sca", 1),
        "0x8006",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_damaged_file_is_refused_with_a_reason(name: str, good: bytes, ax: Any, tmp_path: Path) -> None:
    edit, words = EDITS[name]
    damaged = edit(good)
    assert damaged != good
    path = tmp_path / "damaged.axmodel"
    path.write_bytes(damaged)
    with pytest.raises(BadInput, match=words):
        load(ax, path)


def test_a_missing_file(ax: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"0x80060017.*No such file"):
        load(ax, tmp_path / "none.axmodel")


def test_every_truncation_of_the_head_is_refused(good: bytes, ax: Any, tmp_path: Path) -> None:
    path = tmp_path / "cut.axmodel"
    for length in (*range(1, 700), *range(701, len(good), 3001)):
        path.write_bytes(good[:length])
        with pytest.raises(BadInput):
            load(ax, path)


def test_flipped_bits_never_crash(good: bytes, ax: Any, tmp_path: Path) -> None:
    """Files that still load must also run."""
    random = np.random.default_rng(0)
    head = good.index(b"raw") if b"raw" in good else 4000
    path = tmp_path / "flipped.axmodel"
    refused = 0
    for _ in range(600):
        data = bytearray(good)
        for at in random.integers(0, min(max(head, 4000), len(good)), random.integers(1, 4)):
            data[at] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(data)
        try:
            session = ax.open_session(path)
            for group in session.groups[:2]:
                if group.tokens <= 64 and group.history <= 512:
                    session.bind(group.index, filled(session, group.index)).run()
        except NotFinite:
            pass
        except (BadInput, ValueError, KeyError, MemoryError, TypeError, IndexError):
            refused += 1
    assert 200 < refused < 600


def test_segments_are_checked_before_a_run(ax: Any, bundle_s8: Path) -> None:
    session = ax.open_session(Bundle.open(bundle_s8).layer_path(0))
    shapes = {info.name: info for info in session.groups[0].inputs + session.groups[0].outputs}
    wanted = ("indices", "input", "K_cache_out", "V_cache_out", "output")
    sized = {
        name: dataclasses.replace(
            shapes[name], shape=tuple(8 if at == 1 else n for at, n in enumerate(shapes[name].shape))
        )
        for name in wanted
    }
    binding = session.bind_stacked({name: session.allocate(info) for name, info in sized.items()})
    for tokens, history, memory, words in (
        (0, 0, 1, "a segment of no shape"),
        (1, 1 << 24, 1, "a segment of no shape"),
        (1, 0, 0, "a null pointer"),
        ((1 << 24) - 1, 0, 1, "tokens|buffer of"),
        (9, 0, 1, "buffer of"),
    ):
        segments = np.array([(tokens, history, memory, memory, memory)], SEGMENT)
        with pytest.raises(BadInput, match=words):
            binding.run(segments.ctypes.data, 1)
    with pytest.raises(BadInput, match="0 segments"):
        binding.run(segments.ctypes.data, 0)
    with pytest.raises(BadInput, match="a null pointer"):
        binding.run(0, 1)
