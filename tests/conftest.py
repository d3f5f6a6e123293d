"""What every test may use: the shipped checkpoint, and bundles built from it once a session."""

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

# A shell that runs tests in the background has them, and all they start, ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Read when torch is loaded. Where models are tiny and cores busy, threads of OpenMP spend their time waiting for each
# other: fifty times what the work takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same examples in every run, and none too slow. Others: pytest --hypothesis-profile=default
settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_qwen2() -> Path:
    """The shipped checkpoint."""
    return ROOT / "models" / "tiny-qwen2"


@pytest.fixture(scope="session")
def build_tiny(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Builds tiny-qwen2 with four groups (prefill 32; histories 0, 32, 128) and whatever other options are given."""

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
    """float32 hidden state and weights; the embedding table is bfloat16, as the checkpoint has it."""
    return build_tiny(hidden_state_type="fp32", weight_type="fp32", post_weight_type="fp32")


@pytest.fixture(scope="session")
def bundle_long(tiny_qwen2: Path, build_tiny: Builder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context of 8191 tokens: an answer that only the context ends is still being written when a test gets to it."""
    config = json.loads((tiny_qwen2 / "config.json").read_text())
    longer = tmp_path_factory.mktemp("longer") / "config.json"
    longer.write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return build_tiny(model_config=longer, kv_cache_len=8191)


@pytest.fixture
def vendors_axmodel(tmp_path: Path) -> Path:
    """A file like the vendor's compiler makes: an ONNX container with one node of its own."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("neu mode", ["x"], ["y"])], "vendor", values[:1], values[1:])
    path = tmp_path / "vendor.axmodel"
    path.write_bytes(helper.make_model(graph, producer_name="Pulsar2").SerializeToString())
    return path
