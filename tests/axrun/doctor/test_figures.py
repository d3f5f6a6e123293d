"""Figures in a bundle are untrusted: invalid values are refused by name before they are used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrun.doctor import figures as stored
from axrun.doctor.figures import ARRAYS, NAME, Figures, packed, read, unpacked
from axrun.errors import BadInput
from axrun.format.bundle import Bundle


@pytest.fixture(scope="session")
def bundle(examined: Path) -> Bundle:
    return Bundle.open(examined)


@pytest.fixture(scope="session")
def figures(bundle: Bundle) -> Figures:
    return read(bundle.path / NAME, bundle)


@pytest.fixture(scope="session")
def content(bundle: Bundle) -> bytes:
    return (bundle.path / NAME).read_bytes()


def test_round_trip(figures: Figures, content: bytes) -> None:
    assert figures.encode() == content


def test_every_group_is_probed_with_a_full_history(figures: Figures, bundle: Bundle) -> None:
    visits = figures.visits.tolist()
    for group in bundle.groups:
        full = min(group.history, bundle.kv_cache_len - 1)
        assert [group.index, full, min(group.tokens, bundle.kv_cache_len - full)] in visits
    assert [stored.WALK, 0, bundle.kv_cache_len] in visits
    assert {int(visit) for visit in figures.probes[:, 0]} == set(range(len(visits)))


def test_packed_rows_have_a_relative_error_below_a_thousandth() -> None:
    rows = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) * np.array([[1e-6], [1], [1e3], [1e6]])
    again = unpacked(*packed(rows.astype(np.float32), exact=False))
    assert (np.linalg.norm(again - rows, axis=1) < 1e-4 * np.linalg.norm(rows, axis=1)).all()
    assert not packed(np.zeros((1, 3), np.float32), exact=False)[0].any()


def refused(file: Path, bundle: Bundle) -> str:
    with pytest.raises(BadInput, match=r"figures|cannot read") as error:
        read(file, bundle)
    return str(error.value)


def with_about(figures: Figures, **about: Any) -> Figures:
    return dataclasses.replace(figures, about={**figures.about, **about})


def beyond(array: Any) -> Any:
    array = array.copy()
    array.reshape(-1)[-1] = np.iinfo(array.dtype).max
    return array


def infinite(array: Any) -> Any:
    array = array.copy()
    array.reshape(-1)[0] = np.inf
    return array


SPOILED: dict[str, tuple[Callable[[Figures], Figures], str]] = {
    "another hidden type": (lambda f: with_about(f, hidden_state_type="fp32"), "hidden_state_type"),
    "another vocabulary": (lambda f: with_about(f, vocab_size=7), "vocab_size"),
    "exact types": (lambda f: with_about(f, exact=3), "exact"),
    "text": (lambda f: with_about(f, text=[]), "text"),
    "picks": (lambda f: dataclasses.replace(f, given=beyond(f.given)), "given"),
    "visit": (lambda f: dataclasses.replace(f, visits=beyond(f.visits)), "visits"),
    "probe": (lambda f: dataclasses.replace(f, probes=beyond(f.probes)), "probes"),
    "token": (lambda f: dataclasses.replace(f, answer=beyond(f.answer)), "answer"),
    "not finite": (lambda f: dataclasses.replace(f, updates_scale=infinite(f.updates_scale)), "updates_scale"),
    "layers": (lambda f: dataclasses.replace(f, updates=f.updates[:2]), "updates"),
    "carrier": (lambda f: dataclasses.replace(f, hidden=f.hidden.astype(np.float32)), "hidden"),
    "nothing": (lambda f: dataclasses.replace(f, visits=f.visits[:0], probes=f.probes[:0]), "visits"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_invalid_values_are_named(name: str, figures: Figures, bundle: Bundle, tmp_path: Path) -> None:
    change, word = SPOILED[name]
    (tmp_path / NAME).write_bytes(change(figures).encode())
    assert word in refused(tmp_path / NAME, bundle)


def test_malformed_files(bundle: Bundle, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / NAME
    for data in (b"", b"PK", content[: len(content) // 2], b"x" * 1000):
        file.write_bytes(data)
        refused(file, bundle)


def test_compressed_and_extra_arrays_are_refused(bundle: Bundle, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "whole.npz").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "whole.npz") as source, zipfile.ZipFile(tmp_path / NAME, "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info), zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(tmp_path / NAME, bundle)
    shutil.copy(tmp_path / "whole.npz", tmp_path / NAME)
    with zipfile.ZipFile(tmp_path / NAME, "a") as target:
        target.writestr("more.npy", b"")
    assert "it holds" in refused(tmp_path / NAME, bundle)


def test_a_too_large_file_is_not_read(bundle: Bundle, tmp_path: Path) -> None:
    with (tmp_path / NAME).open("wb") as stream:
        stream.truncate(stored.MOST_BYTES + 1)
    assert "bytes" in refused(tmp_path / NAME, bundle)


@given(data=st.data())
def test_changed_bytes_are_refused_with_a_message_or_accepted(
    data: st.DataObject, bundle: Bundle, content: bytes
) -> None:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    file = bundle.path.parent / "changed.npz"
    file.write_bytes(changed)
    with contextlib.suppress(BadInput):
        read(file, bundle)


@settings(max_examples=20)
@given(data=st.data())
def test_any_json_gives_no_traceback(data: st.DataObject, bundle: Bundle, figures: Figures, examined: Path) -> None:
    """Texts in the figures are passed to the tokenizer and the template."""
    from axrun.doctor import text
    from axrun.doctor.context import Context
    from axrun.doctor.installed import Installed
    from axrun.doctor.stages import NotExamined

    leaves = st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=3)
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner)
    )
    entry = st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("text", "ids", "decoded", "name", "messages", "given", "prompt"), values)
    )
    about = {
        "texts": data.draw(st.lists(entry, max_size=2)),
        "conversations": data.draw(st.lists(entry, max_size=2) | values),
        "template": data.draw(st.booleans() | values),
    }
    context = Context(bundle, "ax", None, Installed("", "", None, None, "", "", ""), lambda line: None)
    context.__dict__["figures"] = with_about(figures, text=about)
    for stage in (text.tokenizer, text.template):
        with contextlib.suppress(NotExamined):
            stage(context)


def test_the_file_has_exactly_the_listed_arrays(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    with zipfile.ZipFile(tmp_path / NAME) as archive:
        assert set(archive.namelist()) == {"about.json", *(f"{name}.npy" for name in ARRAYS)}
        about = json.loads(archive.read("about.json"))
    assert {"texts", "conversations", "template"} <= about["text"].keys()
