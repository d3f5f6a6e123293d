"""Writes the files for the vendor's `axllm run DIR`: config.json, post_config.json, tokenizer.txt.

They depend on the tokenizer, not on the model type: a Llama may have a SentencePiece or a byte-level vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axc.checkpoints.json_files import read_json
from axc.compile import Target
from axc.embed import BFLOAT16_FILE
from axc.families import FAMILIES
from axc.families.family import ModelConfig
from axc.hf_folder import HfFolder
from axrun.errors import BadInput
from axrun.text.tokenizer import Tokenizer

TOKENIZER_TXT = "tokenizer.txt"
# axllm's tokenizer type for byte-level tokenizers of families that it does not know
OTHER_BYTE_LEVEL = "SmolLM2"
SENTENCEPIECE = "LLaMA"
BUILT_IN_END = "<|im_end|>"  # end of a turn in the built-in templates of all byte-level types


def files(hf: Path, made: HfFolder, name: str, config: ModelConfig, target: Target) -> dict[str, str]:
    """The files by name. Raises BadInput for a damaged tokenizer or generation_config.json."""
    text = None if made.tokenizer is None else tokenizer_txt(hf, made)
    written = {
        "config.json": to_json(axllm_config(hf, made.tokenizer, name, config, target, text is not None)),
        "post_config.json": to_json(post_config(hf)),
    }
    return written if text is None else {**written, TOKENIZER_TXT: text}


def to_json(values: Mapping[str, Any]) -> str:
    """JSON in canonical form: sorted, indented, with a final line feed."""
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def axllm_config(
    hf: Path, tokenizer: Tokenizer | None, name: str, config: ModelConfig, target: Target, has_tokenizer_txt: bool
) -> dict[str, Any]:
    """The config.json."""
    added = ([], []) if tokenizer is None else added_around(tokenizer)
    return {
        "model_name": name,
        "tokenizer_type": tokenizer_type(hf, config.model_type),
        "url_tokenizer_model": TOKENIZER_TXT if has_tokenizer_txt else "hf/tokenizer.json",
        "template_filename_axmodel": target.layer_file(config),
        "axmodel_num": config.num_hidden_layers,
        "filename_post_axmodel": target.post_file(config),
        "filename_tokens_embed": BFLOAT16_FILE,
        "tokens_embed_num": config.vocab_size,
        "tokens_embed_size": config.hidden_size,
        "post_config_path": "post_config.json",
        "use_mmap_load_embed": True,
        "bos": bool(added[0]),
        "eos": bool(added[1]),
    }


def tokenizer_type(hf: Path, model_type: str) -> str:
    """axllm's name of the tokenizer type; without a tokenizer, the usual one of the model type."""
    path = hf / "tokenizer.json"
    own = FAMILIES[model_type].axllm_tokenizer
    byte_level = _byte_level(read_json(path)) if path.is_file() else bool(own)
    return (own or OTHER_BYTE_LEVEL) if byte_level else SENTENCEPIECE


def added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer adds before and after a text."""
    text, whole = tokenizer.encode("a", special=False), tokenizer.encode("a")
    at = next(at for at in range(len(whole) + 1) if whole[at : at + len(text)] == text or at == len(whole))
    return whole[:at], whole[at + len(text) :]


def post_config(hf: Path) -> dict[str, Any]:
    """Sampling parameters of the model, all disabled as in the vendor's models: greedy by default."""
    path = hf / "generation_config.json"
    wanted = read_json(path) if path.is_file() else {}

    def number(key: str, default: float) -> float:
        value = wanted.get(key)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1e6:
            raise BadInput(f"{path}: {key} is {value!r:.60}; expected a number from 0 to 1000000")
        return value

    return {
        "enable_temperature": False,
        "temperature": number("temperature", 1.0),
        "enable_repetition_penalty": False,
        "repetition_penalty": number("repetition_penalty", 1.0),
        "penalty_window": 64,
        "enable_top_p_sampling": False,
        "top_p": number("top_p", 1.0),
        "enable_top_k_sampling": False,
        "top_k": int(number("top_k", 50)),
    }


def tokenizer_txt(hf: Path, made: HfFolder) -> str | None:
    """The vendor's text format of the tokenizer (type 3: BPE with merges), or None if it would not be exact.

    It is exact for byte-level BPE with contiguous ids and without a prefix space. The vendor's other BPE format drops
    the merges, encodes by longest match and gives other ids than those of training.
    """
    path = hf / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return _bpe_txt(read_json(path), list(made.stop_ids))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is not a valid tokenizer: {type(error).__name__} {error}\nDownload it again.") from None


def _byte_level(tokenizer: dict[str, Any]) -> bool:
    model = tokenizer.get("model") or {}
    return model.get("type") == "BPE" and "ByteLevel" in json.dumps(tokenizer.get("pre_tokenizer"))


def _bpe_txt(tokenizer: dict[str, Any], stops: list[int]) -> str | None:
    model = tokenizer.get("model") or {}
    if not _byte_level(tokenizer) or '"add_prefix_space": true' in json.dumps(tokenizer.get("pre_tokenizer")):
        return None
    added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []}
    by_id = {**{number: piece for piece, number in model["vocab"].items()}, **added}
    pieces = [by_id.get(number) for number in range(len(by_id))]
    if None in pieces or any("\n" in str(piece) for piece in pieces):
        return None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = sorted(token["id"] for token in tokenizer.get("added_tokens") or [] if token.get("special"))
    lines = ["430 3", f"{len(special)} {len(stops)} 0", " ".join(map(str, [*special, *stops]))]
    text = "\n".join([*lines, f"{len(pieces)} {len(merges)}", *map(str, pieces), *merges]) + "\n"
    text.encode("utf-8")  # raises for a lone surrogate
    return text
