"""Building blocks of decoders: common keys of config.json, weights with the usual names, and parts of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from axc import rope
from axc.config_json import Reader
from axc.config_rope import PARTIAL, ROPE_KEYS, read_rope, written
from axc.families.family import Keeps, ModelConfig
from axc.graph import Graph, Value
from axc.rope import Rope
from axc.stored import EMBEDDING, HEAD
from axc.weights import Source
from axc.weights.sources import Stored, split
from axrun.errors import BadInput

# Keys of config.json that every decoder has.
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
}
WINDOW = frozenset(("sliding_window", "layer_types"))  # keys of decoders with sliding-window attention
LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}  # value: has a window

# Names of a pre-norm layer's modules in GGUF files.
GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Norm = Callable[[Graph, Value, str], Value]
Sources = dict[str, Source]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """The config of the decoders here. `sliding`: for each layer, whether its attention is limited to the window."""

    intermediate_size: int
    rms_norm_eps: float
    rope: Rope
    sliding: tuple[bool, ...] = ()


def decoder(reader: Reader, *, epsilon: str | float = "rms_norm_eps", partial: bool = False) -> dict[str, Any]:
    """The fields of DecoderConfig but `sliding` and the window. Raises BadInput.

    `epsilon` is the key of the norms' epsilon, or its value where no key has it; `partial`: the architecture reads
    partial_rotary_factor.
    """
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    positions, head_dim = reader.integer("max_position_embeddings"), reader.head_dim(hidden, heads)
    return {
        "hidden_size": hidden,
        "intermediate_size": reader.integer("intermediate_size"),
        "num_hidden_layers": reader.integer("num_hidden_layers", high=1024),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.divisor("num_key_value_heads", heads),
        "head_dim": head_dim,
        "vocab_size": reader.integer("vocab_size"),
        "max_position_embeddings": positions,
        "rms_norm_eps": epsilon if isinstance(epsilon, float) else reader.number(epsilon, low=1e-12, high=1),
        "rope": read_rope(reader, positions, head_dim, partial=partial),
        "tie_word_embeddings": reader.flag("tie_word_embeddings"),
    }


def written_decoder(config: DecoderConfig, **more: Any) -> dict[str, Any]:
    """config.json of a decoder without windows, from which `decoder` reads these fields; with the keys `more`."""
    same = READS - ROPE_KEYS - {"hidden_act"}
    return {
        **{key: getattr(config, key) for key in sorted(same)},
        "hidden_act": "silu",
        "rope_parameters": written(config.rope),
        PARTIAL: config.rope.partial,
        **{f"{token}_token_id": None for token in ("bos", "eos", "pad")},  # some defaults are beyond the vocabulary
        **more,
    }


def without_ropes(reader: Reader) -> Reader:
    """For `decoder`, which knows one rope for all layers; `rope_by_layer_type` reads those of each type."""
    plain = {"rope_scaling": None, "rope_parameters": None, "rope_theta": reader.get("rope_theta")}
    return Reader({**reader.values, **plain}, reader.path, reader.defaults)


def keeps(config: DecoderConfig, index: int) -> Keeps:
    """The window of a layer, according to `sliding`."""
    return Keeps(config.sliding_window if config.sliding and config.sliding[index] else None)


def window(reader: Reader, sliding: tuple[bool, ...]) -> dict[str, Any]:
    """The fields `sliding` and `sliding_window`; none if no layer has a window. Raises BadInput."""
    if not any(sliding):
        return {}
    if reader.get("sliding_window") is None:
        raise BadInput(f"{reader.path}: layer_types has sliding_attention, but there is no sliding_window")
    return {"sliding": sliding, "sliding_window": reader.integer("sliding_window")}


# Values of hidden_act, and the activation that computes them.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu tanh",
    "gelu_pytorch_tanh": "gelu tanh",
    "gelu_fast": "gelu tanh",
    "relu": "relu",
    "relu2": "relu squared",
}


def activation(reader: Reader, key: str = "hidden_act") -> str:
    """One of `silu`, `gelu`, `gelu tanh`, `relu`, `relu squared`. Raises BadInput."""
    value = reader.get(key)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise BadInput(f"{reader.path}: {key} is {value!r:.60}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def activate(graph: Graph, x: Value, kind: str) -> Value:
    """The activation that `activation` named."""
    if kind.startswith("relu"):
        x = graph.relu(x)
        return graph.mul(x, x) if kind == "relu squared" else x
    return graph.silu(x) if kind == "silu" else graph.gelu(x, tanh=kind == "gelu tanh")


def sliding_layers(reader: Reader) -> tuple[bool, ...] | None:
    """Which layers have a window according to `layer_types`; None without that key. Raises BadInput."""
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
    """`name`.weight [rows, columns], and `name`.bias [rows] if `bias`."""
    found: Sources = {f"{name}.weight": Stored(f"{name}.weight", (rows, columns))}
    if bias:
        found[f"{name}.bias"] = Stored(f"{name}.bias", (rows,))
    return found


def vector(name: str, size: int, bias: bool = False) -> Sources:
    """`name`.weight [size] of a norm, and `name`.bias [size] if `bias`."""
    found: Sources = {f"{name}.weight": Stored(f"{name}.weight", (size,))}
    if bias:
        found[f"{name}.bias"] = Stored(f"{name}.bias", (size,))
    return found


def fused(name: str, parts: dict[str, int], columns: int, bias: bool = False) -> Sources:
    """Projections stored as one matrix `name`.weight, one after the other: {name of a part: rows}."""
    rows = sum(parts.values())
    found: Sources = {}
    for kind, shape in (("weight", (rows, columns)), *([("bias", (rows,))] if bias else [])):
        pieces = split(Stored(f"{name}.{kind}", shape), *parts.values())
        found |= {f"{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
    return found


def attention_weights(layer: str, config: ModelConfig, qkv_bias: bool = False, o_bias: bool = False) -> Sources:
    """The four projections of attention."""
    hidden, heads, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.kv_size
    return {
        **matrix(f"{layer}self_attn.q_proj", heads, hidden, qkv_bias),
        **matrix(f"{layer}self_attn.k_proj", kv, hidden, qkv_bias),
        **matrix(f"{layer}self_attn.v_proj", kv, hidden, qkv_bias),
        **matrix(f"{layer}self_attn.o_proj", hidden, heads, o_bias),
    }


def gated_mlp_weights(layer: str, hidden: int, inner: int, bias: bool = False) -> Sources:
    """Gate, up and down projections."""
    return {
        **matrix(f"{layer}mlp.gate_proj", inner, hidden, bias),
        **matrix(f"{layer}mlp.up_proj", inner, hidden, bias),
        **matrix(f"{layer}mlp.down_proj", hidden, inner, bias),
    }


def plain_mlp_weights(layer: str, hidden: int, inner: int, bias: bool = False) -> Sources:
    """Up and down projections of an MLP without a gate."""
    return {
        **matrix(f"{layer}mlp.up_proj", inner, hidden, bias),
        **matrix(f"{layer}mlp.down_proj", hidden, inner, bias),
    }


MlpWeights = Callable[[str, int, int, bool], Sources]


def norm_weights(layer: str, size: int, *names: str, bias: bool = False) -> Sources:
    """The weights of several norms of a layer."""
    found: Sources = {}
    for name in names:
        found |= vector(f"{layer}{name}", size, bias)
    return found


def decoder_weights(
    config: ModelConfig,
    layer: Callable[[str, int], Sources],
    norm: str | None = "model.norm",
    norm_bias: bool = False,
    head_bias: bool = False,
) -> Sources:
    """Embedding, the weights that `layer(prefix, index)` names for each layer, final norm (if it has any) and head."""
    found: Sources = {EMBEDDING: Stored(EMBEDDING, (config.vocab_size, config.hidden_size))}
    for index in range(config.num_hidden_layers):
        found |= layer(f"model.layers.{index}.", index)
    if norm is not None:
        found |= vector(norm, config.hidden_size, norm_bias)
    if not config.tie_word_embeddings:
        found[HEAD] = Stored(HEAD, (config.vocab_size, config.hidden_size))
    if head_bias:
        found["lm_head.bias"] = Stored("lm_head.bias", (config.vocab_size,))
    return found


def pre_norm_weights(
    config: DecoderConfig,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    mlp: MlpWeights = gated_mlp_weights,
    head_norms: Sequence[str] = (),
) -> Sources:
    """The weights of a decoder whose layers are `pre_norm_layer`; `head_norms`: names of norms of each head."""
    hidden = config.hidden_size

    def layer(prefix: str, index: int) -> Sources:
        return {
            **norm_weights(prefix, hidden, "input_layernorm", "post_attention_layernorm"),
            **attention_weights(prefix, config, qkv_bias, o_bias),
            **mlp(prefix, hidden, config.intermediate_size, mlp_bias),
            **norm_weights(prefix, config.head_dim, *head_norms),
        }

    return decoder_weights(config, layer)


# Layers


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
