"""Sampling settings of a bundle: the vendor's post_config.json, and the checkpoint's generation_config.json.

The default is post_config.json, which a build writes as greedy. generation_config.json is applied on request; otherwise
one line reports its settings that are not applied. Its suppress_tokens are always suppressed.
https://huggingface.co/docs/transformers/main_classes/text_generation#transformers.GenerationConfig
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.sampling import Sampling
from axrun.text.hf_files import read_json

NAME = "generation_config.json"
MOST_SUPPRESSED = 1 << 20
# Defaults of transformers for absent keys and null.
DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
DRAWING = ("temperature", "top_k", "top_p", "min_p")  # without effect unless do_sample is set
# Settings that change the output and are not supported: key, and the neutral value.
OTHERS: Mapping[str, Any] = {
    **dict.fromkeys(("num_beams", "typical_p", "top_h", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha"), 0),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "constraints", "force_words_ids", "watermarking_config")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "dola_layers")),
    **dict.fromkeys(("exponential_decay_length_penalty", "stop_strings")),
}


def sampling_of(bundle: Bundle, follow: bool = False, **given: Any) -> tuple[Sampling, str]:
    """The sampling settings for a bundle, and a line about settings of its checkpoint that are not applied, or "".

    `follow`: apply generation_config.json instead of post_config.json. `given` overrides both.
    Raises BadInput for a value out of range, in `given` or in a file that is applied.
    """
    path = bundle.hf / NAME
    config = read_json(path)
    suppressed = _suppressed(config, path)
    asked = _asked(config)
    base = Sampling.from_post_config(bundle.post_config)
    if follow:
        try:
            base = Sampling(**asked)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
    sampling = base.override(suppress=suppressed, **given)
    return sampling, _remark(sampling, asked, config, follow)


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The supported settings of generation_config.json."""
    found = {key: default if config.get(key) is None else config[key] for key, default in DEFAULTS.items()}
    if not config.get("do_sample"):
        found.update(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    return found


def _suppressed(config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    tokens = config.get("suppress_tokens") or []
    if not isinstance(tokens, list) or len(tokens) > MOST_SUPPRESSED or any(type(token) is not int for token in tokens):
        raise BadInput(f"{path}: suppress_tokens is {tokens!r:.60}, expected a list of token ids")
    return tuple(sorted({token for token in tokens if token >= 0}))  # older configs use -1 for none


def _remark(sampling: Sampling, asked: Mapping[str, Any], config: Mapping[str, Any], follow: bool) -> str:
    keys = [*(DRAWING if asked["temperature"] else ()), "repetition_penalty"]
    ours = [f"{key} {asked[key]!r:.20}" for key in keys if getattr(sampling, key) != asked[key]]
    if follow:
        ours = []  # differences are overrides by the caller
    others = [f"{key} {config[key]!r:.40}" for key, none in OTHERS.items() if config.get(key) not in (None, none, [])]
    if not (ours or others):
        return ""
    advice = "; apply it with --generation-config" if ours else ""
    return f"settings of the checkpoint's {NAME} that are not applied: {', '.join([*ours, *others])}{advice}"
