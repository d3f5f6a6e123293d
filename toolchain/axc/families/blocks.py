"""What decoders are made of: the keys of config.json that all have, weights by their usual names, parts of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from axc import rope
from axc.checkpoint import EMBEDDING, HEAD
from axc.config_json import Reader
from axc.config_rope import ROPE_KEYS
from axc.families.family import ModelConfig
from axc.graph import Graph, Value
from axc.rope import Rope
from axc.weights import Source
from axc.weights.sources import Stored
from axrun.errors import BadInput

# keys of config.json that every decoder has
READS = ROPE_KEYS | {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "sliding_window",
    "layer_types",
}
LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}  # whether a window slides

Norm = Callable[[Graph, Value, str], Value]
Sources = dict[str, Source]


def dimensions(reader: Reader) -> dict[str, Any]:
    """The fields of ModelConfig that all decoders read alike. Raises BadInput."""
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": reader.integer("num_hidden_layers", high=1024),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.divisor("num_key_value_heads", heads),
        "head_dim": reader.head_dim(hidden, heads),
        "vocab_size": reader.integer("vocab_size"),
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "tie_word_embeddings": reader.flag("tie_word_embeddings"),
    }


def epsilon(reader: Reader, key: str = "rms_norm_eps") -> float:
    """The epsilon of norms. Raises BadInput."""
    return reader.number(key, low=1e-12, high=1)


def sliding_layers(reader: Reader) -> tuple[bool, ...] | None:
    """Which layers see a window only, by `layer_types`; None where it is not given. Raises BadInput."""
    kinds = reader.values.get("layer_types")
    if kinds is None:
        return None
    layers = reader.integer("num_hidden_layers", high=1024)
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in LAYER_TYPES for kind in kinds):
        raise BadInput(
            f"{reader.path}: layer_types is {kinds!r:.60}; expected {' or '.join(LAYER_TYPES)} for each layer"
        )
    if len(kinds) != layers:
        raise BadInput(f"{reader.path}: layer_types has {len(kinds)} entries; expected num_hidden_layers {layers}")
    return tuple(LAYER_TYPES[kind] for kind in kinds)


# Weights


def matrix(name: str, rows: int, columns: int, bias: bool = False) -> Sources:
    """`name`.weight [rows, columns], and `name`.bias where there is one."""
    found: Sources = {f"{name}.weight": Stored(f"{name}.weight", (rows, columns))}
    if bias:
        found[f"{name}.bias"] = Stored(f"{name}.bias", (rows,))
    return found


def vector(name: str, size: int) -> Sources:
    """`name`.weight [size], of a norm."""
    return {f"{name}.weight": Stored(f"{name}.weight", (size,))}


def attention_weights(layer: str, config: ModelConfig, qkv_bias: bool, o_bias: bool) -> Sources:
    """The four projections of attention."""
    hidden, heads, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.kv_size
    return {
        **matrix(f"{layer}self_attn.q_proj", heads, hidden, qkv_bias),
        **matrix(f"{layer}self_attn.k_proj", kv, hidden, qkv_bias),
        **matrix(f"{layer}self_attn.v_proj", kv, hidden, qkv_bias),
        **matrix(f"{layer}self_attn.o_proj", hidden, heads, o_bias),
    }


def gated_mlp_weights(layer: str, hidden: int, inner: int, bias: bool) -> Sources:
    """Gate, up and down projections."""
    return {
        **matrix(f"{layer}mlp.gate_proj", inner, hidden, bias),
        **matrix(f"{layer}mlp.up_proj", inner, hidden, bias),
        **matrix(f"{layer}mlp.down_proj", hidden, inner, bias),
    }


def decoder_weights(config: ModelConfig, layer: Callable[[str, int], Sources]) -> Sources:
    """Embedding, the weights that `layer(prefix, index)` names for each layer, final norm and head."""
    found: Sources = {EMBEDDING: Stored(EMBEDDING, (config.vocab_size, config.hidden_size))}
    for index in range(config.num_hidden_layers):
        found |= layer(f"model.layers.{index}.", index)
    found |= vector("model.norm", config.hidden_size)
    if not config.tie_word_embeddings:
        found[HEAD] = Stored(HEAD, (config.vocab_size, config.hidden_size))
    return found


# Layers


@dataclass(frozen=True)
class Inputs:
    """The inputs of a layer's axmodel: `x` [1, M, H] in float32, the others as the contract has them."""

    k_cache: Value
    v_cache: Value
    indices: Value
    x: Value
    mask: Value


def inputs(config: ModelConfig, graph: Graph) -> Inputs:
    """Declares them."""
    hid = graph.hidden_type
    k_cache = graph.input("K_cache", hid, 1, "T", config.kv_size)
    v_cache = graph.input("V_cache", hid, 1, "T", config.kv_size)
    indices = graph.input("indices", "UINT32", 1, "M")
    x = graph.input("input", hid, 1, "M", config.hidden_size)
    mask = graph.input("mask", hid, 1, "M", "T+M")
    return Inputs(k_cache, v_cache, indices, graph.cast(x, "FLOAT"), mask)


def rms(epsilon: float) -> Norm:
    """RMSNorm with the weight `name`.weight."""
    return lambda graph, x, name: graph.rms_norm(x, f"{name}.weight", epsilon)


def attention(
    graph: Graph, given: Inputs, x: Value, layer: str, config: ModelConfig, turn: Rope, positions: int
) -> Value:
    """Grouped-query attention of x [1, M, H], already normed, with rotary embedding; declares the K and V outputs."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k, v = (graph.linear(x, f"{layer}self_attn.{part}_proj") for part in "qkv")
    cos_table, sin_table = rope.tables(turn, config.head_dim, positions)
    cos, sin = graph.constant("rotary.cos", cos_table), graph.constant("rotary.sin", sin_table)
    position_ids = graph.cast(given.indices, "INT64")
    q = graph.rotary(q, cos, sin, position_ids, heads)
    # attention reads the new rows as the cache will hold them: a token then sees the same K/V however it was chunked
    k = graph.output("K_cache_out", graph.rotary(k, cos, sin, position_ids, kv_heads), graph.hidden_type)
    v = graph.output("V_cache_out", v, graph.hidden_type)
    keys = graph.cast(graph.concat(given.k_cache, k, "T+M"), "FLOAT")
    values = graph.cast(graph.concat(given.v_cache, v, "T+M"), "FLOAT")
    attended = graph.attention(q, keys, values, given.mask, heads, kv_heads)
    return graph.linear(attended, f"{layer}self_attn.o_proj")


def gated_mlp(graph: Graph, x: Value, layer: str) -> Value:
    """SwiGLU: silu(gate) * up, then down."""
    gate, up = graph.linear(x, f"{layer}mlp.gate_proj"), graph.linear(x, f"{layer}mlp.up_proj")
    return graph.linear(graph.mul(graph.silu(gate), up), f"{layer}mlp.down_proj")


def post(config: ModelConfig, norm: Norm, top_k: int, graph: Graph) -> None:
    """Final norm and head: `output` and float32 `logits` [1, M, vocab]; with `top_k` also `indices` and `prob`."""
    x = graph.cast(graph.input("input", graph.hidden_type, 1, "M", config.hidden_size), "FLOAT")
    x = norm(graph, x, "model.norm")
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    logits = graph.linear(x, head.removesuffix(".weight"))
    graph.output("output", logits, graph.hidden_type)
    if top_k:
        probability, indices = graph.top_k(logits, top_k)
        graph.output("indices", indices, "INT32")
        graph.output("prob", probability, graph.hidden_type)
    graph.output("logits", logits, "FLOAT")
