"""Fixtures for all tests: the checkpoint in this repository, and bundles built from it once per session."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from onnx import TensorProto, helper

from axc import build

ROOT = Path(__file__).resolve().parents[1]
Builder = Callable[..., Path]

# Background jobs of a shell ignore SIGINT, and so would their children; some tests send SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
# torch reads this at import. With tiny models on busy cores, OpenMP threads mostly wait for each other: fifty times the
# time of the work itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for calibrations, which set the number of threads themselves
# The same examples in every run, without a deadline. For random ones: pytest --hypothesis-profile=default
settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_qwen2() -> Path:
    """The checkpoint in this repository."""
    return ROOT / "models" / "tiny-qwen2"


@pytest.fixture(scope="session")
def build_tiny(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Builds tiny-qwen2 with four groups (prefill 32; histories 0, 32, 128) and the given options."""

    def make(**options: Any) -> Path:
        output = tmp_path_factory.mktemp("bundle") / "tiny"
        defaults: dict[str, Any] = {"prefill_len": 32, "kv_cache_len": 255, "last_kv_cache_len": (32, 128)}
        defaults.update(input_path=tiny_qwen2, output_path=output)
        build.build(build.plan(build.Options(**{**defaults, **options})))
        return output

    return make


@pytest.fixture(scope="session")
def bundle_s8(build_tiny: Builder) -> Path:
    """bfloat16 hidden state, s8 weights: the defaults."""
    return build_tiny()


@pytest.fixture(scope="session")
def bundle_fp32(build_tiny: Builder) -> Path:
    """float32 hidden state and weights; the embedding table is bfloat16, as in the checkpoint."""
    return build_tiny(hidden_state_type="fp32", weight_type="fp32", post_weight_type="fp32")


@pytest.fixture(scope="session")
def bundle_long(tiny_qwen2: Path, build_tiny: Builder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context of 8191 tokens, so that an endless answer is still in progress when a test reacts to it."""
    config = json.loads((tiny_qwen2 / "config.json").read_text())
    longer = tmp_path_factory.mktemp("longer") / "config.json"
    longer.write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return build_tiny(model_config=longer, kv_cache_len=8191)


@pytest.fixture(scope="session")
def embedding_checkpoint(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint like Qwen3-Embedding."""
    from tests import embedding_models

    return embedding_models.write(tmp_path_factory.mktemp("embedding") / "checkpoint", tiny_qwen2)


@pytest.fixture(scope="session")
def embedding_bundle(embedding_checkpoint: Path) -> Path:
    """Its bundle in float32, named qwen3."""
    from tests import embedding_models

    return embedding_models.build_fp32(embedding_checkpoint, embedding_checkpoint.with_name("bundle"))


@pytest.fixture
def vendors_axmodel(tmp_path: Path) -> Path:
    """A file like those of the vendor's compiler: an ONNX container with one custom node."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("neu mode", ["x"], ["y"])], "vendor", values[:1], values[1:])
    path = tmp_path / "vendor.axmodel"
    path.write_bytes(helper.make_model(graph, producer_name="Pulsar2").SerializeToString())
    return path
