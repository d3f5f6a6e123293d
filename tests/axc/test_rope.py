"""Rotary tables against transformers' own frequencies and the C library's cosines, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from axc import rope
from axc.families import blocks
from axc.graph import Graph
from axc.quantizer import WEIGHT_TYPES
from axc.rope import Rope
from axrun.format.axmodel import OPSET, PRODUCER, encode
from axrun.session import open_session

ROPES = {
    "default": (Rope(1e6), {"rope_type": "default", "rope_theta": 1e6}),
    "linear": (Rope(1e4, "linear", 4.0), {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama3": (
        Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192),
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_match_transformers(kind: str) -> None:
    ours, parameters = ROPES[kind]
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=8, rope_parameters=parameters)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert kind == "default" or kind in ROPE_INIT_FUNCTIONS
    np.testing.assert_allclose(rope.frequencies(ours, 64), rotary.inv_freq.numpy(), rtol=3e-7)


LONG = 131072
EVERY = {
    **{kind: ours for kind, (ours, _) in ROPES.items()},
    "partial": Rope(1e4, partial=0.75),
    "yarn": Rope(1e4, "yarn", 16.0, original_max_position_embeddings=8192, attention_factor=1.2772588722239782),
    "longrope": Rope(
        1e4,
        "longrope",
        original_max_position_embeddings=4096,
        attention_factor=1.19,
        divisors=(1.0,) * 32,
        long_divisors=(1.0,) * 16 + (40.7,) * 16,
    ),
}


def exact(ours: Rope, positions: int) -> tuple[Any, Any]:
    """cos and sin of every position times the float32 frequencies, in float64."""
    ours = replace(ours, divisors=ours.long_divisors)
    angles = np.arange(positions)[:, None] * rope.frequencies(ours, 64).astype(np.float64)
    return np.cos(angles) * ours.attention_factor, np.sin(angles) * ours.attention_factor


@pytest.mark.parametrize("kind", EVERY)
def test_tables_are_correctly_rounded(kind: str) -> None:
    ours = EVERY[kind]
    made = rope.tables(ours, 64, LONG)
    assert made.low is not None
    assert (len(made.high[0]), len(made.low[0])) == (512, 256)
    for table, wanted in zip(made.high, exact(ours, LONG), strict=True):
        assert (table == wanted[:: len(made.low[0])].astype(np.float32)).all()
    for table, wanted in zip(made.low, exact(replace(ours, attention_factor=1.0), 256), strict=True):
        assert (table == wanted.astype(np.float32)).all()


@pytest.mark.parametrize("positions", [1, 2, 3, 4, 5, 127, 128, 129, 8192, LONG])
def test_tables_are_split_if_that_is_smaller(positions: int) -> None:
    made = rope.tables(Rope(1e4), 8, positions)
    rows = len(made.high[0]) + (len(made.low[0]) if made.low else 0)
    assert rows <= positions
    assert (made.low is None) == (positions < 6)
    assert rows <= 2.2 * positions**0.5 + 2


@pytest.mark.parametrize("engine", ["ax", "ort"])
@pytest.mark.parametrize("kind", EVERY)
def test_every_position_has_its_angle(kind: str, engine: str, tmp_path: Path) -> None:
    """Rotating (1, 0) gives cos and sin."""
    ours, tokens = EVERY[kind], 32768
    half = ours.width(64) // 2
    session = open_session(angles_of(ours, tokens, tmp_path), engine)
    arrays = {info.name: session.allocate(info) for info in session.groups[0].inputs + session.groups[0].outputs}
    arrays["input"][0, :, :half] = 1
    binding = session.bind(0, arrays)
    wanted = exact(ours, LONG)
    for first in range(0, LONG, tokens):
        arrays["indices"][0] = np.arange(first, first + tokens)
        binding.run()
        for at, table in enumerate(wanted):
            seen = arrays["output"][0, :, at * half : (at + 1) * half]
            np.testing.assert_allclose(seen, table[first : first + tokens], rtol=0, atol=1e-6)


def angles_of(ours: Rope, tokens: int, folder: Path) -> Path:
    """An axmodel that rotates one head of 64."""
    graph = Graph("angles", WEIGHT_TYPES["s8"], "FLOAT", {})
    x, indices = graph.input("input", "FLOAT", 1, "M", 64), graph.input("indices", "UINT32", 1, "M")
    cos, sin, ids = blocks.angles(graph, blocks.Rotation(ours, LONG), 64, indices)
    graph.output("output", graph.rotary(x, cos, sin, ids, 1), "FLOAT")
    groups = f'[{{"tokens":{tokens},"history":0}}]'
    metadata = {"axmodel.version": "1", "axmodel.kind": "post", "axmodel.groups": groups}
    model = graph.axmodel("test", OPSET, PRODUCER, metadata)
    stored = {
        name: replace(tensor, raw=memoryview(np.ascontiguousarray(graph.parameters[name]).tobytes()))
        for name, tensor in model.initializers.items()
    }
    path = folder / "angles.axmodel"
    path.write_bytes(encode(replace(model, initializers=stored)))
    return path
