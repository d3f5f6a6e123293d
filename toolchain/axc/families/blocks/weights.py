"""The weights of decoders with the usual names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from axc.families.blocks.config import DecoderConfig
from axc.families.family import ModelConfig
from axc.stored import EMBEDDING, HEAD
from axc.weights import Source
from axc.weights.sources import Stored, split

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

Sources = dict[str, Source]


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
