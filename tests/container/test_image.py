"""The content of the image: the recorded Debian packages, the locked Python packages, our commands, and no more."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import docker
import pytest
from docker.errors import ContainerError

from axrun.format.bundle import sha256
from ci.container import base, image, wheels
from ci.container.archive import config_of
from engine import build as shipped
from requirements.install import LOCKS

pytestmark = pytest.mark.system


def ask(client: docker.DockerClient, axc: str, *command: str) -> str:
    """The output of a command in the unmodified image: its default user, no mounts, no network."""
    return str(client.containers.run(axc, command, network_mode="none", remove=True).decode())


def test_the_debian_packages_are_the_recorded_ones(client: docker.DockerClient, axc: str) -> None:
    rows = ask(client, axc, "dpkg-query", "--show", "--showformat=${Package} ${Version} ${Architecture}\n").splitlines()
    recorded = base.Record.read().packages.values()
    assert rows == sorted(f"{package.name} {package.version} {package.architecture}" for package in recorded)


def test_the_python_packages_are_the_locked_ones(client: docker.DockerClient, axc: str) -> None:
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = {name.lower().replace("_", "-").replace(".", "-"): version for name, version in json.loads(
        ask(client, axc, "python", "-c", code)
    ).items()}  # fmt: skip
    locks = [*(LOCKS / f"{name}.txt" for name in wheels.SETS), LOCKS / "torch.txt"]
    pins = dict(entry.split(" ")[0].split("==") for lock in locks for entry in wheels.entries(lock.read_text()))
    assert {name: found.get(name) for name in pins} == pins
    assert set(found) - set(pins) == {"axc", "axrun", "pip", "setuptools"} - set(pins)


def test_compiler_and_runner_work_as_an_arbitrary_user(client: docker.DockerClient, axc: str) -> None:
    code = """
        set -e
        id -u
        axc llm_build --input_path /axc/models/tiny-qwen2 --output_path /tmp/bundle --prefill_len 32 -c 1 >/tmp/log
        axc embed extract --input_path /axc/models/tiny-qwen2 --output_path /tmp/embedding >/tmp/log
        axc embed float32 --input_path /tmp/embedding/*.npy --output_path /tmp/embedding/table >/tmp/log
        axc embed bfloat16 --input_path /tmp/embedding/table --output_path /tmp/embedding/short >/tmp/log
        cmp /tmp/embedding/short /tmp/bundle/model.embed_tokens.weight.bfloat16.bin
        axrun run /tmp/bundle --prompt 12+30= 2>/tmp/log
    """
    assert ask(client, axc, "sh", "-c", code).split() == ["1000", "42"]


def test_its_engine_equals_the_one_built_here(client: docker.DockerClient, axc: str) -> None:
    """Built at another path, by the compiler of another environment, without a cache."""
    here = shipped.build()
    said = ask(client, axc, "sh", "-c", f"cd /axc/board/engine/lib && sha256sum {' '.join(shipped.LIBRARIES)}").split()
    assert dict(zip(said[1::2], said[::2], strict=True)) == {name: sha256(here / name) for name in shipped.LIBRARIES}


def test_it_compiles_for_a_board(client: docker.DockerClient, axc: str) -> None:
    code = """
        set -e
        cd /tmp
        export ZIG_GLOBAL_CACHE_DIR=/tmp/zig ZIG_LOCAL_CACHE_DIR=/tmp/zig
        echo 'int main() { return 7; }' >seven.cc
        python -m ziglang c++ -target aarch64-linux-gnu.2.31 seven.cc -o seven
        od -An -tx1 -N20 seven
    """
    header = bytes.fromhex("".join(ask(client, axc, "sh", "-c", code).split()))
    assert header[:4] == b"\x7fELF"
    assert header[18:20] == b"\xb7\x00"  # e_machine: EM_AARCH64


def test_python_is_precompiled_and_read_only(client: docker.DockerClient, axc: str) -> None:
    kept = ask(client, axc, "find", "/opt/axc", "-path", "*/torch/__pycache__/__init__.*.pyc").split()
    assert len(kept) == 1
    with pytest.raises(ContainerError):
        ask(client, axc, "touch", "/opt/axc/new")


def test_no_layer_has_host_paths_or_names(client: docker.DockerClient, axc: str) -> None:
    with tempfile.TemporaryFile() as saved:
        saved.writelines(client.api.get_image(axc, chunk_size=1 << 20))
        saved.seek(0)
        paths = list(_paths(saved))
    assert len(paths) > 10_000
    assert [path for path in paths if path.startswith("extra/") or "container/extra/wheels" in path] == []
    assert [path for path in paths if path.endswith(".whl") and not path.startswith("usr/share/python-wheels/")] == []
    assert [path for path in paths if path.startswith(("tmp/", "root/.cache", "var/lib/apt/lists/deb"))] == []


def _paths(saved: IO[bytes]) -> Iterator[str]:
    with tarfile.open(fileobj=saved) as archive:
        for name in json.load(archive.extractfile("manifest.json") or saved)[0]["Layers"]:
            with tarfile.open(fileobj=archive.extractfile(name)) as layer:
                yield from layer.getnames()


def test_the_config_does_not_name_the_builder(client: docker.DockerClient, axc: str, tmp_path: Path) -> None:
    with (tmp_path / "saved.tar").open("wb") as file:
        file.writelines(client.api.get_image(axc, chunk_size=1 << 20))
    config = config_of(tmp_path / "saved.tar")
    assert set(config) == {"architecture", "config", "created", "history", "os", "rootfs"}
    assert config["config"]["User"] == "1000:1000"
    assert config["config"]["Labels"][image.LABEL] == image.environment()
