"""Reference logits on disk: round trip, readable with numpy, damaged files are refused."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrun.errors import BadInput
from axrun.format.logits import ARRAYS, ReferenceLogits, read

VOCABULARY, WINDOWS, LENGTH = 11, 3, 7


def sample(top: int = 4) -> ReferenceLogits:
    """Random probabilities over a vocabulary of eleven tokens."""
    random = np.random.default_rng(0)
    weights = random.random((WINDOWS, LENGTH - 1, VOCABULARY))
    logprobs = np.log(weights / weights.sum(axis=2, keepdims=True))
    order = np.argsort(-logprobs, axis=2)
    kept = np.take_along_axis(logprobs, order, axis=2)
    with np.errstate(divide="ignore"):
        rest = np.log(np.exp(kept[..., top:]).sum(axis=2))
    return ReferenceLogits(
        tokens=random.integers(0, VOCABULARY, (WINDOWS, LENGTH)).astype(np.uint32),
        ids=order[..., :top].astype(np.uint16),
        logprobs=kept[..., :top].astype(np.float32),
        rest=rest.astype(np.float32),
        following=kept[..., 0].astype(np.float32),
        continuations=random.integers(0, VOCABULARY, (2, 3)).astype(np.uint32),
        about={"vocab_size": VOCABULARY, "prompt": 3},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "reference.npz"
    path.write_bytes(sample().encode())
    return path


@pytest.mark.parametrize("top", [1, 4, VOCABULARY])
def test_round_trip(tmp_path: Path, top: int) -> None:
    written, path = sample(top), tmp_path / "x.npz"
    path.write_bytes(written.encode())
    again = read(path)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(written, name), strict=True)
    assert again.exact == (top == VOCABULARY)
    assert again.about["divergence"] == ("exact" if top == VOCABULARY else "lower bound")
    assert again.prompt == 3
    assert again.encode() == written.encode()


def test_numpy_opens_it_without_pickle(path: Path) -> None:
    with np.load(path, allow_pickle=False) as arrays:
        assert set(arrays) == {*ARRAYS, "about.json"}
        np.testing.assert_array_equal(arrays["ids"], sample().ids)


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=True)
    return buffer.getvalue()


def _with(**members: bytes) -> Callable[[Path], None]:
    return lambda path: _write(path, {**_members(path), **{f"{name}.npy": data for name, data in members.items()}})


def _change(**fields: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(dataclasses.replace(sample(), **fields).encode())

    return damage


def _promising(shape: str) -> bytes:
    """An array with a header that claims more data than there is."""
    header = f"{{'descr': '<u4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b""), "not a zip file"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "not a zip file"),
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: _write(path, {}), "it holds"),
        (lambda path: _write(path, {**_members(path), "more": b""}), "it holds"),
        (lambda path: _write(path, _members(path), zipfile.ZIP_DEFLATED), "is compressed"),
        (_with(tokens=b"not one"), "magic"),
        (_with(tokens=_npy(np.array([[None]], object))), "tokens.npy is object"),
        (_with(tokens=_npy(np.zeros((3, 7), "<i4"))), "tokens.npy is int32"),
        (_with(tokens=_npy(np.zeros((3, 7), "<u8"))), "tokens.npy is uint64"),
        (_with(tokens=_npy(np.zeros(21, "<u4"))), r"tokens.npy is uint32\[21\]"),
        (_with(tokens=_promising("(1000000, 1000000)")), r"tokens.npy is uint32\[1000000, 1000000\] in 0 bytes"),
        (_with(tokens=_promising("(-1, -1)")), r"uint32\[-1, -1\] in 0 bytes"),
        (_change(about={"vocab_size": "many", "prompt": 3}), "its vocab_size is 'many'"),
        (_change(about={"vocab_size": 8, "prompt": 3}), "outside the vocabulary of 8"),
        (_change(about={"vocab_size": 3, "prompt": 3}), "4 most likely of 3"),
        (_change(about={"vocab_size": VOCABULARY, "prompt": 7}), "continuations of 7 tokens"),
        (_change(about={"vocab_size": VOCABULARY}), "continuations of None tokens"),
        (_change(continuations=np.zeros((4, 3), np.uint32)), "4 continuations"),
        (_change(tokens=sample().tokens[:, :1]), "windows of 1 tokens"),
        (_change(tokens=sample().tokens[:, :5]), "its ids are"),
        (_change(rest=sample().rest + 1), "do not add up to 1"),
        (_change(rest=sample().rest * np.float32(np.nan)), "do not add up to 1"),
        (_change(following=sample().following + 5), "do not add up to 1"),
        (_change(following=sample().following * np.float32(np.inf)), "do not add up to 1"),
        (_change(logprobs=sample().logprobs[..., ::-1], ids=sample().ids[..., ::-1]), "do not come first"),
        (lambda path: _write(path, {**_members(path), "about.json": b"[]"}), "schema"),
        (lambda path: _write(path, {**_members(path), "about.json": b'{"schema": 2}'}), "schema 2"),
        (lambda path: _write(path, {**_members(path), "about.json": b"[" * 100_000}), "has no valid reference logits"),
    ],
)
def test_damage_gives_a_short_error(path: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(path)
    with pytest.raises(BadInput, match=words) as caught:
        read(path)
    assert str(caught.value).count("\n") <= 1


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_changed_byte_raises_at_most_bad_input(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "x.npz"
    content = bytearray(sample().encode())
    content[place % len(content)] = value
    path.write_bytes(content)
    try:
        found = read(path)
    except BadInput:
        return
    assert found.ids.shape == sample().ids.shape


def test_the_provenance_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    about = {**sample().about, "text": {"sha256": "0" * 64}}
    path.write_bytes(dataclasses.replace(sample(), about=about).encode())
    assert json.loads(_members(path)["about.json"])["text"] == read(path).about["text"] == {"sha256": "0" * 64}
