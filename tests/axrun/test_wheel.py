"""The runner's wheel works with nothing but its declared dependencies: it answers, serves and measures."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from axc.logits import Options, write
from tests.conftest import Builder

ROOT = Path(__file__).parents[2]
ABSENT = ("torch", "transformers", "onnx", "safetensors", "axc")


def declared(requirements: list[str], extras: tuple[str, ...] = ("",)) -> Iterator[importlib.metadata.Distribution]:
    """The requirements on this machine, with their transitive dependencies."""
    pending, seen = [(Requirement(text), extras) for text in requirements], set()
    while pending:
        requirement, wanted = pending.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
            continue
        key = re.sub("[-_.]+", "-", requirement.name).lower()
        if key in seen:
            continue
        seen.add(key)
        found = importlib.metadata.distribution(requirement.name)
        yield found
        pending += [(Requirement(text), ("", *requirement.extras)) for text in found.requires or ()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages folder with the files of the wheel and links to its requirements."""
    folder, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT / "board")], check=True)
    (wheel,) = folder.glob("axrun-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requires = re.findall(r"^Requires-Dist: (.+)$", archive.read(metadata).decode(), re.MULTILINE)
    for found in declared(requires, ("", "ort")):
        tops = {file.parts[0] for file in found.files or () if ".." not in file.parts} - {"__pycache__"}
        for top in tops:
            link = site / top
            if not link.exists():
                link.symlink_to(str(found.locate_file(top)))
    return site


@pytest.fixture(scope="module")
def bundle(build_tiny: Builder, tiny_qwen2: Path) -> Path:
    """A bundle with reference logits."""
    made = build_tiny()
    write(Options(tiny_qwen2, tiny_qwen2 / "heldout.txt", bundle=made, tokens=100, window=50, greedy_tokens=2))
    return made


def python(site: Path, *arguments: object) -> list[str]:
    """A Python command line that can import only these packages."""
    start = f"import sys; sys.path.append({str(site)!r}); from axrun.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-I", "-S", "-c", start, *map(str, arguments)]


def axrun(site: Path, *arguments: object) -> str:
    command = python(site, *arguments)
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_other_packages_can_be_imported(site: Path) -> None:
    command = [*python(site)[:-1], f"import sys; sys.path.append({str(site)!r}); import numpy, axrun.cli"]
    subprocess.run(command, check=True)
    for name in ABSENT:
        done = subprocess.run([*command[:-1], f"{command[-1]}, {name}"], capture_output=True, text=True, check=False)
        assert f"No module named '{name}'" in done.stderr


@pytest.mark.parametrize("verb", ["run", "chat", "serve", "eval", "bench", "model"])
def test_every_command_has_help(site: Path, verb: str) -> None:
    assert verb in axrun(site, "--help")
    assert f"usage: axrun {verb}" in axrun(site, verb, "--help")


def test_it_answers_and_measures(site: Path, bundle: Path) -> None:
    assert axrun(site, "run", bundle, "--prompt", "12+30=") == "42\n"
    assert json.loads(axrun(site, "eval", bundle, "--json"))["top1_agreement"] > 0.9
    figures = json.loads(axrun(site, "bench", bundle, "--json", "--tokens", 2, "--repeat", 1, "--prompt-lengths", 9))
    assert figures["prompts"][0]["tokens_per_second"] > 0
    assert "group" in axrun(site, "model", bundle / "qwen2_post.axmodel", "--repeat", 1)


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=60) as response:
            return bool(response.status == 200)
    except urllib.error.URLError:  # not listening yet, or loading
        return False


def test_it_serves(site: Path, bundle: Path) -> None:
    command = python(site, "serve", bundle, "--port", 0)
    with subprocess.Popen(command, cwd=site, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        try:
            address = next(found[1] for line in lines if (found := re.search(r"starting on (http://\S+)", line)))
            deadline = time.monotonic() + 300
            while not healthy(address):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            body = json.dumps({"model": "qwen2", "prompt": "7+8=", "max_tokens": 2}).encode()
            request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                assert json.load(response)["choices"][0]["text"] == "15"
            with urllib.request.urlopen(address, timeout=60) as page:
                assert b"<script" in page.read()
        finally:
            process.terminate()
        assert process.wait(120) == 0
