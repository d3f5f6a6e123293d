"""Checkpoints to modify, and a large one for builds that are interrupted."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from axc import shapes, synth
from tests.axc import hub_server
from tests.axc.as_transformers import AS_ITSELF, SMALL, random_model, theirs
from tests.axc.axc import ROOT

Breakable = Callable[..., Path]

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="session")
def pristine(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shipped checkpoint without its scripts."""
    folder = tmp_path_factory.mktemp("pristine") / "tiny-qwen2"
    folder.mkdir()
    for name in CHECKPOINT_FILES:
        shutil.copyfile(tiny_qwen2 / name, folder / name)
    return folder


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Breakable:
    """Makes the test's own copy of the shipped checkpoint, with keys of its config.json replaced."""

    def make(**config: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(pristine, folder)
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return make


@pytest.fixture(scope="session")
def other_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of axc and axrun whose compiler rounds weights to s8 and s4 differently."""
    checkout = tmp_path_factory.mktemp("other") / "checkout"
    for package in (ROOT / "board" / "axrun", ROOT / "toolchain" / "axc"):
        shutil.copytree(package, checkout / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    quantizer = checkout / "axc" / "quantizer" / "round_to_nearest.py"
    source = quantizer.read_text()
    assert "np.rint(" in source
    quantizer.write_text(source.replace("np.rint(", "np.trunc("))
    return checkout


@pytest.fixture(scope="session")
def many_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in 24 layers: building takes long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("synth") / "many-layers"
    config = shapes.config_json("qwen2-0.5b")
    config |= {"hidden_size": 256, "intermediate_size": 1536, "num_attention_heads": 4, "vocab_size": 1024}
    synth.synth("qwen2-0.5b", folder, config=config)
    return folder


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose dimensions are not powers of two, with an untied lm_head."""
    folder = tmp_path_factory.mktemp("synth") / "uneven"
    config = shapes.config_json("llama-2-7b")
    config |= {"hidden_size": 192, "intermediate_size": 336, "num_hidden_layers": 2, "vocab_size": 501}
    config |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    synth.synth("llama-2-7b", folder, config=config)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A tiny checkpoint of some families."""
    made = {}
    for kind in AS_ITSELF:
        particular = {"sliding_window": None} if kind == "mistral" else {}
        config = transformers.AutoConfig.for_model(kind, **SMALL, **particular, tie_word_embeddings=True)
        folder = tmp_path_factory.mktemp(kind) / kind
        random_model(config).save_pretrained(folder)
        made[kind] = (folder, theirs(folder))
    return made


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture
def client(tmp_path: Path) -> hub_server.Client:
    return hub_server.Client(tmp_path)


@pytest.fixture
def dead_end() -> str:
    """An address without a listener."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"
