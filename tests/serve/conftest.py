"""Fixtures of the server tests: running servers, and transformers' model of the served checkpoint."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from axc import build
from tests.serve import saying
from tests.serve.server import Server, Start


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers for one test and stops them after it."""
    started = []

    def begin(bundle: Path, *flags: object, **environment: str) -> Server:
        started.append(Server(bundle, *flags, **environment))
        return started[-1]

    yield begin
    for server in started:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def server(bundle_s8: Path) -> Iterator[Server]:
    """bfloat16 and s8, four slots."""
    server = Server(bundle_s8).ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(scope="session")
def server_long(bundle_long: Path) -> Iterator[Server]:
    """Two slots, and a context of 8191 tokens."""
    server = Server(bundle_long, "--slots", 2).ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(scope="session")
def bundle_saying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers with the texts of tests.serve.saying.TEXTS; a context of 1023 tokens."""
    folder = tmp_path_factory.mktemp("saying")
    checkpoint = saying.write(folder / "checkpoint", saying.TEXTS, endless="e")
    options: dict[str, Any] = {"prefill_len": 64, "kv_cache_len": 1023, "last_kv_cache_len": (256, 512)}
    options.update(dict.fromkeys(("weight_type", "post_weight_type", "hidden_state_type"), "fp32"))
    build.build(build.plan(build.Options(input_path=checkpoint, output_path=folder / "bundle", **options)))
    return folder / "bundle"


@pytest.fixture(scope="session")
def server_saying(bundle_saying: Path) -> Iterator[Server]:
    """Answers with the texts of tests.serve.saying.TEXTS; named qwen2, as the other servers."""
    server = Server(bundle_saying, "--name", "qwen2").ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(scope="session")
def bundle_thinking(bundle_saying: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a template that has thoughts."""
    bundle = tmp_path_factory.mktemp("thinker") / "bundle"
    shutil.copytree(bundle_saying, bundle)
    (bundle / "hf" / "chat_template.jinja").write_text(saying.THINKING)
    return bundle


@pytest.fixture(scope="session")
def thinker(bundle_thinking: Path) -> Iterator[Server]:
    """Answers with saying.TEXTS; the template has thoughts."""
    server = Server(bundle_thinking, "--name", "qwen2", "--reasoning-budget", 100).ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(scope="session")
def server_fp32(bundle_fp32: Path) -> Iterator[Server]:
    """float32 throughout."""
    server = Server(bundle_fp32).ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(scope="session")
def reference(tiny_qwen2: Path) -> Any:
    """The served checkpoint in transformers, float32."""
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def endless(tiny_qwen2: Path) -> dict[str, int]:
    """A logit_bias that prevents answers from ending before the context is full."""
    settings = json.loads((tiny_qwen2 / "generation_config.json").read_text())
    return {str(token): -100 for token in settings["eos_token_id"]}


@pytest.fixture(scope="session")
def hf_tokenizer(tiny_qwen2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_qwen2)


@pytest.fixture(scope="session")
def heldout(tiny_qwen2: Path) -> str:
    """A text the model was not trained on."""
    return tiny_qwen2.joinpath("heldout.txt").read_text()
