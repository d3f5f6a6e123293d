"""The pre-norm decoder that Llama made common: RMSNorm, rotary grouped-query attention, SwiGLU.

Each family that has it says in its own file what is particular to it.
"""

from __future__ import annotations

from axc import rope
from axc.checkpoint import EMBEDDING, HEAD
from axc.config import ROPE_KEYS, ModelConfig, Reader, read_rope
from axc.graph import Graph, Value
from axrun.errors import BadInput

REDUNDANT = ("rotary_emb.inv_freq",)
# every key of config.json that shapes such a model or its tensors
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


def read_config(
    reader: Reader, model_type: str, *, qkv_bias: bool, o_bias: bool, mlp_bias: bool, sliding_window: int | None
) -> ModelConfig:
    """What all of them read from config.json. Raises BadInput."""
    reader.expect("hidden_act", "silu", "swish")
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    positions = reader.integer("max_position_embeddings")
    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers", high=1024),
        num_attention_heads=heads,
        num_key_value_heads=reader.divisor("num_key_value_heads", heads),
        head_dim=reader.head_dim(hidden, heads),
        vocab_size=reader.integer("vocab_size"),
        max_position_embeddings=positions,
        rms_norm_eps=reader.number("rms_norm_eps", low=1e-12, high=1),
        rope=read_rope(reader, positions),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        sliding_window=sliding_window,
    )


def sliding_layers(reader: Reader) -> bool | None:
    """Whether `layer_types` has a layer whose window slides; None where it is not given. Raises BadInput."""
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
    return any(LAYER_TYPES[kind] for kind in kinds)


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint and its shape; matrices are [out, in]."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.kv_size
    linears = {
        "self_attn.q_proj": (heads, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, heads, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        expected[layer + "input_layernorm.weight"] = (hidden,)
        expected[layer + "post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            expected[f"{layer}{name}.weight"] = (rows, columns)
            if bias:
                expected[f"{layer}{name}.bias"] = (rows,)
    expected["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        expected[HEAD] = (config.vocab_size, hidden)
    return expected


def decoder_layer(config: ModelConfig, index: int, positions: int, graph: Graph) -> None:
    """Layer `index` with the inputs and outputs of the axmodel contract; position ids run below `positions`."""
    hidden, kv = config.hidden_size, config.kv_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    float_type = graph.hidden_type
    k_cache = graph.input("K_cache", float_type, 1, "T", kv)
    v_cache = graph.input("V_cache", float_type, 1, "T", kv)
    indices = graph.input("indices", "UINT32", 1, "M")
    x = graph.input("input", float_type, 1, "M", hidden)
    mask = graph.input("mask", float_type, 1, "M", "T+M")

    layer = f"model.layers.{index}."
    x = graph.cast(x, "FLOAT")
    normed = graph.rms_norm(x, layer + "input_layernorm.weight", config.rms_norm_eps)

    def linear(source: Value, name: str, out: int, bias: bool) -> Value:
        return graph.linear(source, f"{layer}{name}.weight", out, f"{layer}{name}.bias" if bias else None)

    q = linear(normed, "self_attn.q_proj", heads * config.head_dim, config.qkv_bias)
    k = linear(normed, "self_attn.k_proj", kv, config.qkv_bias)
    v = linear(normed, "self_attn.v_proj", kv, config.qkv_bias)
    cos_table, sin_table = rope.tables(config.rope, config.head_dim, positions)
    cos, sin = graph.constant("rotary.cos", cos_table), graph.constant("rotary.sin", sin_table)
    position_ids = graph.cast(indices, "INT64")
    q = graph.rotary(q, cos, sin, position_ids, heads)
    # attention reads the new rows as the cache will hold them: a token then sees the same K/V however it was chunked
    k = graph.output("K_cache_out", graph.rotary(k, cos, sin, position_ids, kv_heads), float_type)
    v = graph.output("V_cache_out", v, float_type)
    keys = graph.cast(graph.concat(k_cache, k, "T+M"), "FLOAT")
    values = graph.cast(graph.concat(v_cache, v, "T+M"), "FLOAT")
    attended = graph.attention(q, keys, values, mask, heads, kv_heads)
    x = graph.add(x, linear(attended, "self_attn.o_proj", hidden, config.o_bias))

    normed = graph.rms_norm(x, layer + "post_attention_layernorm.weight", config.rms_norm_eps)
    gate = linear(normed, "mlp.gate_proj", config.intermediate_size, config.mlp_bias)
    up = linear(normed, "mlp.up_proj", config.intermediate_size, config.mlp_bias)
    down = linear(graph.mul(graph.silu(gate), up), "mlp.down_proj", hidden, config.mlp_bias)
    graph.output("output", graph.add(x, down), float_type)


def post(config: ModelConfig, top_k: int, graph: Graph) -> None:
    """Final norm and lm_head: `output` and float32 `logits` [1, M, vocab]; with `top_k` also `indices` and `prob`."""
    x = graph.cast(graph.input("input", graph.hidden_type, 1, "M", config.hidden_size), "FLOAT")
    x = graph.rms_norm(x, "model.norm.weight", config.rms_norm_eps)
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    logits = graph.linear(x, head, config.vocab_size)
    graph.output("output", logits, graph.hidden_type)
    if top_k:
        probability, indices = graph.top_k(logits, top_k)
        graph.output("indices", indices, "INT32")
        graph.output("prob", probability, graph.hidden_type)
    graph.output("logits", logits, "FLOAT")
