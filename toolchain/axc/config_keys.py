"""Keys of config.json that a family does not read: which may be ignored, and which must be refused.

transformers stores a key that an architecture does not know as an attribute and never reads it. So if a checkpoint is
built as its own model_type, only keys read by transformers' shared code matter: SHARED. If it is built as another one
(`--model_type`), a key must be known to be harmless, or have a value that changes nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from axrun.errors import BadInput


def _keys(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Not read by modelling code: names and versions, token ids, dtypes, training, caching, labels, outputs; and switches
# that can only disable a sliding_window.
HARMLESS = _keys(
    """
    model_type architectures auto_map transformers_version transformers_weights_only name_or_path torch_dtype dtype
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id cls_token_id mask_token_id
    tokenizer_class prefix task_specific_params finetuning_task problem_type num_labels id2label label2id
    attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob embd_pdrop resid_pdrop attn_pdrop
    dropout embedding_dropout residual_dropout classifier_dropout initializer_range initializer_factor
    init_std pretraining_tp
    use_cache cache_implementation gradient_checkpointing attn_implementation experts_implementation return_dict
    use_return_dict output_attentions output_hidden_states output_scores return_dict_in_generate torchscript
    tf_legacy_loss use_bfloat16 is_decoder is_encoder_decoder tie_encoder_decoder add_cross_attention
    cross_attention_hidden_size chunk_size_feed_forward pruned_heads bad_words_ids begin_suppress_tokens suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
    eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty
    temperature top_k top_p typical_p max_new_tokens generation_config keys_to_ignore_at_inference
    assistant_confidence_threshold assistant_lookbehind num_assistant_tokens num_assistant_tokens_schedule
    target_lookbehind neuron onnx_config quantization_config compression_config quantization
    use_sliding_window max_window_layers
    """
)
HARMLESS_BEGINNINGS = ("_", "unsloth", "transformers.js")
NEAR = 0.75  # similarity of a misspelt key; no two keys of a model_type in transformers are so similar

Neutral = Callable[[Any], bool]


def _is(*values: Any) -> Neutral:
    """Tests for one of these values; true does not equal 1."""
    return lambda value: any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def _all(*values: Any) -> Neutral:
    single = _is(*values)
    return lambda value: value is None or (isinstance(value, list) and all(single(item) for item in value))


_none, _one, _zero = _is(None), _is(None, 1), _is(None, 0)
_off, _on = _is(None, False), _is(None, True)

# Read by transformers' code for all architectures: masks, caches, the loader. Other values than these are refused.
SHARED: dict[str, Neutral] = {
    "is_causal": _is(True),
    "sliding_window": _none,
    "layer_types": _all("full_attention", "attention"),
    "attention_chunk_size": _none,
    "kv_sharing_modes": _none,
    "partial_rotary_factor": _one,
    "per_layer_config": _is(None, {}),
    "fusion_config": _is(None, {}),
    "transformers_weights": _none,
    "configuration_files": lambda value: False,
    "text_config": _none,
    "text_encoder": _none,
    "decoder": _none,
    "generator": _none,
}

# Keys that change the arithmetic of other architectures, and the values that do not.
ARITHMETIC: dict[str, Neutral] = {
    **dict.fromkeys(
        _keys("""
        embedding_multiplier residual_multiplier logits_scaling logit_scale scale_emb residual_scale embedding_scale
        rotary_pct rotary_emb_scale_factor rope_ratio mup_multiplier lm_head_multiplier key_multiplier
        logits_mup_width_multiplier num_experts_per_tok
        """),
        _one,
    ),
    **dict.fromkeys(
        _keys("""
        final_logit_softcapping attn_logit_softcapping query_pre_attn_scalar attention_multiplier scale_depth
        dim_model_base clip_qkv original_max_position_embeddings rope_local_base_freq
        global_rope_theta local_rope_theta rotary_dim rotary_emb_base
        layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon hidden_activation activation_function head_dims
        unpadded_vocab_size attention_softmax_in_fp32_scale vision_config audio_config sliding_window_pattern
        num_experts num_local_experts n_routed_experts n_shared_experts moe_intermediate_size kv_lora_rank q_lora_rank
        qk_rope_head_dim v_head_dim attention_scale softmax_scale state_size conv_kernel linear_num_value_heads
        """),
        _none,
    ),
    **dict.fromkeys(
        _keys("""
        use_qk_norm qk_layernorm qk_norm use_bidirectional_attention alibi parallel_attn use_parallel_residual
        parallel_residual rope_interleaved rope_interleave rotary_interleaved use_post_norm
        scale_embedding normalize_embedding attn_temperature_tuning add_qkv_bias use_logn_attn use_dynamic_ntk
        use_mrope enable_bias no_bias use_bias qkv_bias bias attention_out_bias attention_output_bias lm_head_bias
        """),
        _off,
    ),
    "no_rope_layers": _all(1),
    "no_rope_layer_interval": _zero,
    "num_kv_shared_layers": _zero,
    "num_nextn_predict_layers": _zero,
    "position_embedding_type": _is(None, "rope", "rotary"),
    "norm_type": _is(None, "rms_norm", "rmsnorm"),
    "use_rope": _on,
    "is_gated": _on,
}


def _harmless(key: str) -> bool:
    return key in HARMLESS or key.startswith(HARMLESS_BEGINNINGS)


def refuse_shared(values: dict[str, Any], path: Path, reads: Iterable[str] = ()) -> None:
    """Raises BadInput for keys that transformers' shared code reads but neither the family nor the build supports."""
    kinds, layers = values.get("layer_types"), values.get("num_hidden_layers")
    if isinstance(kinds, list) and isinstance(layers, int) and len(kinds) != layers:
        raise BadInput(f"{path}: layer_types has {len(kinds)} entries; expected num_hidden_layers {layers}")
    whole = bool(kinds) and SHARED["layer_types"](kinds)  # then a sliding_window is of no layer
    for key, neutral in SHARED.items():
        if key in values and key not in reads and not neutral(values[key]) and not (whole and key == "sliding_window"):
            raise BadInput(
                f"{path}: {key} is {_shown(values[key])}, which changes what the model computes and is not supported\n"
                "Give a checkpoint without it."
            )


def misspelt(values: Mapping[str, Any], reads: Iterable[str]) -> dict[str, str]:
    """Unknown keys that have a value and resemble an absent one of `reads`, with that key."""
    known = frozenset(reads)
    nested = [values.get(key) for key in ("rope_scaling", "rope_parameters")]
    absent = known.difference(values, *(each for each in nested if isinstance(each, dict)))
    unknown = (
        key
        for key, value in values.items()
        if value is not None and not (key in known or key in SHARED or key in ARITHMETIC or _harmless(key))
    )
    found = {}
    for key in islice(unknown, 1000):
        if near := difflib.get_close_matches(key[:60], sorted(absent), n=1, cutoff=NEAR):
            found[key] = near[0]
    return found


def unread(values: dict[str, Any], reads: Iterable[str]) -> list[str]:
    """`key value` of keys that change the arithmetic of other architectures, but are not read by this one."""
    known = frozenset(reads)
    return [
        f"{key} {_shown(value)}"
        for key, value in values.items()
        if key not in known and key in ARITHMETIC and not ARITHMETIC[key](value)
    ]


def unread_rope(values: dict[str, Any], reads: Mapping[str, Iterable[str]]) -> list[str]:
    """Like `unread`, for the keys within rope_scaling or rope_parameters; `reads` by rope type."""
    where = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    nested = values.get(where) or {}
    known = frozenset(reads.get(nested.get("rope_type", nested.get("type", "default")), nested))
    return [
        f"{where}.{key} {_shown(value)}"
        for key, value in nested.items()
        if key not in known and value is not None and not isinstance(value, dict)
    ]


def refuse_unknown(values: dict[str, Any], reads: Iterable[str], path: Path, source: object, family: str) -> None:
    """Raises BadInput for unknown keys of a model_type `source` that is built as another `family`."""
    known = frozenset(reads) | SHARED.keys()
    odd = [
        f"{key} {_shown(value)}"
        for key, value in values.items()
        if key not in known and not _harmless(key) and not (key in ARITHMETIC and ARITHMETIC[key](value))
    ]
    if odd:
        raise BadInput(
            f"{path}: {', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''} of model_type {_shown(source)} may change "
            f"what the model computes, and {family} does not know {'it' if len(odd) == 1 else 'them'}\n"
            "If the arithmetic is the same, give a config.json without such keys as --model_config."
        )


def refuse_unknown_rope(values: dict[str, Any], reads: Iterable[str], path: Path, source: object, family: str) -> None:
    """Like `refuse_unknown`, for the keys within rope_scaling and rope_parameters."""
    known = frozenset(reads)
    for where in ("rope_scaling", "rope_parameters"):
        nested = values.get(where) or {}
        odd = [f"{key} {_shown(value)}" for key, value in nested.items() if key not in known and value is not None]
        if odd:
            raise BadInput(
                f"{path}: {', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''} in {where} of model_type "
                f"{_shown(source)} may change what the model computes, and {family} does not read it\n"
                "If the arithmetic is the same, give a config.json without it as --model_config."
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
