"""The published shapes of well-known models, enough to make a checkpoint of their size."""

from __future__ import annotations

from typing import Any

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "hidden_act": "silu"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "head_dim": 128,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 1e4,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name: family, hidden, intermediate, layers, heads, kv heads, vocabulary, positions, rope theta, tied, rope scaling
Shape = tuple[dict[str, Any], int, int, int, int, int, int, int, float, bool, dict[str, Any] | None]
SHAPES: dict[str, Shape] = {
    "qwen2-0.5b": (QWEN2, 896, 4864, 24, 14, 2, 151936, 32768, 1e6, True, None),
    "qwen2-1.5b": (QWEN2, 1536, 8960, 28, 12, 2, 151936, 32768, 1e6, True, None),
    "qwen2-7b": (QWEN2, 3584, 18944, 28, 28, 4, 152064, 32768, 1e6, False, None),
    "qwen3-0.6b": (QWEN3, 1024, 3072, 28, 16, 8, 151936, 40960, 1e6, True, None),
    "gemma-3-1b": (GEMMA3, 1152, 6912, 26, 4, 1, 262144, 32768, 1e6, True, None),
    "llama-3.2-1b": (LLAMA, 2048, 8192, 16, 32, 8, 128256, 131072, 5e5, True, LLAMA3_ROPE),
    "llama-2-7b": (LLAMA, 4096, 11008, 32, 32, 32, 32000, 4096, 1e4, False, None),
    "tinyllama-1.1b": (LLAMA, 2048, 5632, 22, 32, 4, 32000, 2048, 1e4, False, None),
    "smollm-135m": (LLAMA, 576, 1536, 30, 9, 3, 49152, 2048, 1e4, True, None),
}


def config_json(model: str) -> dict[str, Any]:
    """config.json of a named model's shapes."""
    family, hidden, inner, layers, heads, kv_heads, vocab, positions, theta, tied, scaling = SHAPES[model]
    return {
        **family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
