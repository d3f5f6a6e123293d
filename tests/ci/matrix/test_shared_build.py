"""A build that several nights share is used only if it is the one that each would build."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from axrun.errors import BadInput, CheckFailed
from ci.nightly import built, checkout, variant


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, built.Built]:
    folder = tmp_path / "made"
    (folder / "tiny-qwen2").mkdir(parents=True)
    (folder / "tiny-qwen2" / "manifest.json").write_text("{}")
    record = built.Built("tiny-qwen2", "AX650", checkout.commit(), built._manifest(folder / "tiny-qwen2"), 3.5, "")
    record.write(folder)
    return folder, record


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "tiny-qwen2@s4"}, "its model is 'tiny-qwen2@s4', expected 'tiny-qwen2'"),
        ({"chip": "AX620E"}, "its chip is 'AX620E', expected 'AX650'"),
        ({"commit": "0" * 40}, f"its commit is '{'0' * 40}', expected "),
        ({"manifest_sha256": ""}, "its manifest's sha256 is '', expected "),
        ({"seconds": "long"}, "is not the record of a build: expected strings, and a number"),
    ],
)
def test_a_shared_build_is_used_only_if_it_matches(
    change: dict[str, object], told: str, made: tuple[Path, built.Built]
) -> None:
    folder, record = made
    model = variant.find("tiny-qwen2")
    assert built.require(folder, model, "AX650") == record
    dataclasses.replace(record, **change).write(folder)  # type: ignore[arg-type]
    with pytest.raises(BadInput) as caught:
        built.require(folder, model, "AX650")
    assert told in str(caught.value)


def test_a_shared_build_that_failed_says_why(made: tuple[Path, built.Built], tmp_path: Path) -> None:
    folder, record = made
    dataclasses.replace(record, reason="layer 3 is worse").write(folder)
    with pytest.raises(CheckFailed, match="layer 3 is worse"):
        built.require(folder, variant.find("tiny-qwen2"), "AX650")
    (folder / built.RECORD).write_text("[]")
    with pytest.raises(BadInput, match="is not the record of a build"):
        built.read(folder)
    with pytest.raises(BadInput, match=r"built.json is not the record of a build: .*No such file"):
        built.read(tmp_path)
