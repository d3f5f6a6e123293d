"""Parts of layers and the post model, as operators of a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from axc import rope
from axc.families.blocks.config import DecoderConfig
from axc.families.family import ModelConfig
from axc.graph import Graph, Value
from axc.rope import Rope
from axc.stored import EMBEDDING, HEAD

Norm = Callable[[Graph, Value, str], Value]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a layer's axmodel: `x` [1, M, H] cast to float32, the others as in docs/axmodel.md."""

    k_cache: Value
    v_cache: Value
    indices: Value
    x: Value
    mask: Value


def inputs(config: ModelConfig, graph: Graph, scale: float = 1.0) -> Inputs:
    """Declares the inputs. `scale` multiplies x: for the first layer of families that scale the embedding."""
    hid = graph.hidden_type
    k_cache = graph.input("K_cache", hid, 1, "T", config.kv_size)
    v_cache = graph.input("V_cache", hid, 1, "T", config.kv_size)
    indices = graph.input("indices", "UINT32", 1, "M")
    x = graph.input("input", hid, 1, "M", config.hidden_size)
    mask = graph.input("mask", hid, 1, "M", "T+M")
    x = graph.scale(graph.cast(x, "FLOAT"), "embedding.scale", scale)
    return Inputs(k_cache, v_cache, indices, x, mask)


def plain_input(config: ModelConfig, graph: Graph, scale: float = 1.0) -> Value:
    """Declares the only input, x [1, M, H] in float32, of a layer that keeps nothing between tokens."""
    x = graph.input("input", graph.hidden_type, 1, "M", config.hidden_size)
    return graph.scale(graph.cast(x, "FLOAT"), "embedding.scale", scale)


def rms(epsilon: float) -> Norm:
    """RMSNorm with the weight `name`.weight."""
    return lambda graph, x, name: graph.rms_norm(x, f"{name}.weight", epsilon)


def layer_norm(epsilon: float) -> Norm:
    """LayerNorm with `name`.weight and `name`.bias if there is one."""
    return lambda graph, x, name: graph.layer_norm(x, name, epsilon)


def bare_layer_norm(epsilon: float) -> Norm:
    """LayerNorm without weight or bias."""
    return lambda graph, x, name: graph.standardized(x, epsilon)


@dataclass(frozen=True)
class Rotation:
    """How q and k are rotated. `positions`: upper bound of position ids. `interleaved`: rotates adjacent elements,
    instead of elements half a head apart.
    """

    rope: Rope
    positions: int
    interleaved: bool = False


def angles(graph: Graph, rotation: Rotation, head_dim: int, indices: Value) -> tuple[Value, Value, Value | None]:
    """cos, sin and position ids for RotaryEmbedding; without ids (None), cos and sin have a row per token.

    A table of all positions would grow with the context, in every layer. Two small tables suffice, with position
    p = high * n + low, cos(a + b) = cos a cos b - sin a sin b, sin(a + b) = sin a cos b + cos a sin b.
    """
    made = rope.tables(rotation.rope, head_dim, rotation.positions)
    position_ids = graph.cast(indices, "INT64")
    if made.low is None:
        cos, sin = made.high
        return graph.constant("rotary.cos", cos), graph.constant("rotary.sin", sin), position_ids
    rows = []
    places = graph.divided(position_ids, "rotary.low.rows", len(made.low[0]))
    for part, arrays, at in zip(("high", "low"), (made.high, made.low), places, strict=True):
        for name, array in zip(("cos", "sin"), arrays, strict=True):
            rows.append(graph.rows(graph.constant(f"rotary.{part}.{name}", array), at))
    cos_high, sin_high, cos_low, sin_low = rows
    cosine = graph.sub(graph.mul(cos_high, cos_low), graph.mul(sin_high, sin_low))
    return cosine, graph.add(graph.mul(sin_high, cos_low), graph.mul(cos_high, sin_low)), None


@dataclass(frozen=True)
class HeadNorm:
    """A norm of q and k, with the names of their weights: of each head, or of all heads as one row (`whole`)."""

    norm: Norm
    names: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    whole: bool = False
    rotated_first: bool = False

    def __call__(self, graph: Graph, x: Value, name: str, heads: int) -> Value:
        if self.whole:
            return self.norm(graph, x, name)
        return graph.flat(self.norm(graph, graph.heads(x, heads), name))


def attention(
    graph: Graph,
    given: Inputs,
    x: Value,
    layer: str,
    config: ModelConfig,
    rotation: Rotation | None,
    *,
    head_norm: HeadNorm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    clip: float | None = None,
    output: str = "self_attn.o_proj",
) -> Value:
    """Grouped-query attention of x [1, M, H]; declares the K and V outputs. No `rotation`: positions are not told.

    Scores are multiplied by `scale` and capped by `softcap`; `clip` bounds q, k and v as they are projected.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k, v = (graph.linear(x, f"{layer}self_attn.{part}_proj") for part in "qkv")
    if clip is not None:
        q, k, v = (graph.clip(part, "qkv.clip", clip) for part in (q, k, v))

    def normed(q: Value, k: Value) -> tuple[Value, Value]:
        assert head_norm is not None
        names = [layer + name for name in head_norm.names]
        return head_norm(graph, q, names[0], heads), head_norm(graph, k, names[1], kv_heads)

    if head_norm is not None and not head_norm.rotated_first:
        q, k = normed(q, k)
    if rotation is not None:
        cos, sin, position_ids = angles(graph, rotation, config.head_dim, given.indices)
        q = graph.rotary(q, cos, sin, position_ids, heads, rotation.interleaved)
        k = graph.rotary(k, cos, sin, position_ids, kv_heads, rotation.interleaved)
    if head_norm is not None and head_norm.rotated_first:
        q, k = normed(q, k)
    # Attention reads the new rows rounded as in the cache, so that results do not depend on the chunk size.
    k = graph.output("K_cache_out", k, graph.hidden_type)
    v = graph.output("V_cache_out", v, graph.hidden_type)
    keys = graph.cast(graph.concat(given.k_cache, k, "T+M"), "FLOAT")
    values = graph.cast(graph.concat(given.v_cache, v, "T+M"), "FLOAT")
    attended = graph.attention(q, keys, values, given.mask, heads, kv_heads, scale, softcap)
    # A reordered o_proj gathers its input. Rows of v_proj could only follow its columns if those kept to their heads,
    # in one order for all heads that share a K/V head; an order by activation mixes all heads.
    return graph.linear(attended, layer + output)


def gated_mlp(graph: Graph, x: Value, layer: str, kind: str = "silu") -> Value:
    """activation(gate) * up, then down. Rows of gate and up are in the order of down's columns: no Gather between."""
    down = f"{layer}mlp.down_proj"
    order = graph.reorders(down)
    gate, up = (graph.linear(x, f"{layer}mlp.{part}_proj", rows_as=order) for part in ("gate", "up"))
    return graph.linear(graph.mul(activate(graph, gate, kind), up), down, reordered=True)


def mlp(graph: Graph, x: Value, first: str, second: str, kind: str) -> Value:
    """Two linears with an activation between, the rows of the first in the order of the second's columns."""
    inner = activate(graph, graph.linear(x, first, rows_as=graph.reorders(second)), kind)
    return graph.linear(inner, second, reordered=True)


def plain_mlp(graph: Graph, x: Value, layer: str, kind: str) -> Value:
    """activation(up), then down."""
    return graph.linear(activate(graph, graph.linear(x, f"{layer}mlp.up_proj"), kind), f"{layer}mlp.down_proj")


Mlp = Callable[[Graph, Value, str], Value]


def pre_norm_layer(
    graph: Graph,
    config: DecoderConfig,
    index: int,
    rotation: Rotation | None,
    *,
    norm: Norm | None = None,
    mlp: Mlp = gated_mlp,
    head_norm: HeadNorm | None = None,
    clip: float | None = None,
) -> None:
    """The layer that Llama made common: a norm before attention and one before the MLP, each added to its input.

    RMSNorm and SwiGLU, unless `norm` or `mlp` is another.
    """
    prefix, norm = f"model.layers.{index}.", norm or rms(config.rms_norm_eps)
    given = inputs(config, graph)
    normed = norm(graph, given.x, f"{prefix}input_layernorm")
    attended = attention(graph, given, normed, prefix, config, rotation, head_norm=head_norm, clip=clip)
    x = graph.add(given.x, attended)
    normed = norm(graph, x, f"{prefix}post_attention_layernorm")
    graph.output("output", graph.add(x, mlp(graph, normed, prefix)), graph.hidden_type)


def post_norm_layer(
    graph: Graph, config: DecoderConfig, index: int, rotation: Rotation | None, head_norm: HeadNorm
) -> None:
    """A layer with norms after attention and after SwiGLU, but none before them."""
    prefix, norm = f"model.layers.{index}.", rms(config.rms_norm_eps)
    given = inputs(config, graph)
    attended = attention(graph, given, given.x, prefix, config, rotation, head_norm=head_norm)
    x = graph.add(given.x, norm(graph, attended, f"{prefix}post_attention_layernorm"))
    x = graph.add(x, norm(graph, gated_mlp(graph, x, prefix), f"{prefix}post_feedforward_layernorm"))
    graph.output("output", x, graph.hidden_type)


def post_rms(config: DecoderConfig, top_k: int, graph: Graph) -> None:
    """Final RMSNorm and head."""
    post(config, rms(config.rms_norm_eps), top_k, graph)


def post(
    config: ModelConfig,
    norm: Norm,
    top_k: int,
    graph: Graph,
    *,
    name: str = "model.norm",
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Final norm and head: `output` and float32 `logits` [1, M, vocab]; with `top_k` also `indices` and `prob`, and
    with the graph's `ret_postnorm` also `postnorm` [1, M, hidden].

    Logits are multiplied by `scale` and then capped: softcap * tanh(logits / softcap).
    """
    x = graph.cast(graph.input("input", graph.hidden_type, 1, "M", config.hidden_size), "FLOAT")
    x = norm(graph, x, name)
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    logits = graph.scale(graph.linear(x, head.removesuffix(".weight")), "logits.scale", scale)
    if softcap is not None:
        logits = graph.tanh(graph.scale(logits, "logits.softcap.inverse", 1 / softcap))
        logits = graph.scale(logits, "logits.softcap", softcap)
    graph.output("output", logits, graph.hidden_type)
    if top_k:
        probability, indices = graph.top_k(logits, top_k)
        graph.output("indices", indices, "INT32")
        graph.output("prob", probability, graph.hidden_type)
    if graph.ret_postnorm:
        graph.output("postnorm", x, graph.hidden_type)
    graph.output("logits", logits, "FLOAT")


def activate(graph: Graph, x: Value, kind: str) -> Value:
    """The activation that `activation` named."""
    if kind.startswith("relu"):
        x = graph.relu(x)
        return graph.mul(x, x) if kind == "relu squared" else x
    return graph.silu(x) if kind == "silu" else graph.gelu(x, tanh=kind == "gelu tanh")
