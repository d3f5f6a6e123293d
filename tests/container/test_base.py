"""The record of Debian packages, and the error if a mirror differs from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from axrun.errors import BadInput, CheckFailed
from ci.container import base

OTHER = "0" * 64


def test_the_record_names_every_package_by_version_and_digest() -> None:
    record = base.Record.read()
    assert set(base.INCLUDE) <= set(record.packages)
    assert all(len(package.sha256) == 64 and package.version for package in record.packages.values())


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "packages.txt").write_text("SOURCE_DATE_EPOCH 1\napt 2.6.1\n")
    with pytest.raises(BadInput, match="is damaged\nRestore it"):
        base.Record.read(tmp_path / "packages.txt")


def test_source_date_epoch_is_validated_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert base.epoch() == base.Record.read().epoch
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert base.epoch() == 86400
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(BadInput, match="'yesterday'; expected seconds since 1970"):
        base.epoch()


@pytest.mark.system
def test_packages_that_differ_from_the_record_are_named(tmp_path: Path) -> None:
    """Against the record, one package is older, one has another digest, one is missing and one is extra."""
    lines = base.RECORD.read_text("utf-8").splitlines()
    apt = next(line for line in lines if line.startswith("apt "))
    bash = next(line for line in lines if line.startswith("bash "))
    dash = next(line for line in lines if line.startswith("dash "))
    changed = [apt.replace(apt.split()[1], "1.0"), bash.replace(bash.split()[3], OTHER), f"zoo 1 all {OTHER}"]
    record = tmp_path / "packages.txt"
    record.write_text("\n".join([*(line for line in lines if line not in (apt, bash, dash)), *changed]) + "\n")
    with pytest.raises(CheckFailed) as error:
        base.make(tmp_path / "base.tar", "", record=record)
    said = str(error.value)
    assert said.startswith(f"4 packages of {base.OWN} differ from the record: apt 1.0 -> {apt.split()[1]}; ")
    assert "; bash 5" in said
    assert "-> other content; dash is new; zoo is gone\n" in said
    assert [path.name for path in tmp_path.iterdir()] == ["packages.txt"]


@pytest.mark.system
def test_an_unreachable_mirror_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"mmdebstrap failed: .*\nIs http://127.0.0.1:9/debian a Debian mirror"):
        base.make(tmp_path / "base.tar", "http://127.0.0.1:9/debian")
