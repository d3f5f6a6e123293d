"""What a bundle holds besides axmodels and embedding: configs for three runners, the tokenizer, the manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from board.bundle import MANIFEST, SCHEMA, read_manifest, sha256
from board.errors import BadInput
from toolchain import identity
from toolchain.axmodel.writer import Written
from toolchain.compile import Target
from toolchain.config import ModelConfig, read_json
from toolchain.embed import BFLOAT16_FILE

# copied into hf/ where the checkpoint has them
HF_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
# what `axllm` calls the tokenizers of our families
TOKENIZER_TYPES = {"qwen2": "Qwen2_5", "llama": "LLaMA"}
TOKENIZER_TXT = "tokenizer.txt"


def input_files(checkpoint: Path, weights: tuple[Path, ...]) -> tuple[Path, ...]:
    """Every file of a checkpoint that a bundle is made from."""
    return (*weights, *(checkpoint / name for name in HF_FILES if (checkpoint / name).is_file()))


def finish(
    folder: Path,
    checkpoint: Path,
    name: str,
    config: ModelConfig,
    target: Target,
    texts: Mapping[str, str],
    inputs: Mapping[str, Written],
    outputs: Mapping[str, Written],
    *,
    maker: str = "cpu",
    tools: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Adds the small files to `folder` and, last, the manifest over all; returns it.

    `texts`, `inputs` and `outputs` by file name, `outputs` being the axmodels and the embedding. `maker` is whose
    compiler made the axmodels; how accurate another's weights are is not known here, and not said.
    """
    (folder / "hf").mkdir(exist_ok=True)
    for file in HF_FILES:
        if (checkpoint / file).is_file():
            shutil.copyfile(checkpoint / file, folder / "hf" / file)
    for file, text in texts.items():
        (folder / file).write_text(text, "utf-8", newline="\n")
    files = {file: {"sha256": written.sha256, "size": written.nbytes} for file, written in outputs.items()}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = path.relative_to(folder).as_posix()
        if file not in files and not path.name.startswith(".") and not file.endswith(".done"):
            files[file] = {"sha256": sha256(path), "size": path.stat().st_size}
    axmodels = {file: written for file, written in outputs.items() if file != BFLOAT16_FILE}
    errors = {tensor: error for written in axmodels.values() for tensor, error in written.weight_error.items()}
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "maker": maker,
        "tools": dict(identity.tools() if tools is None else tools),
        "model": {
            "name": name,
            "model_type": config.model_type,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "kv_size": config.kv_size,
            "hidden_state_type": target.hidden_state_type,
            "kv_cache_len": target.kv_cache_len,
            "prefill_len": target.prefill_len,
            "groups": [{"tokens": group.tokens, "history": group.history} for group in target.groups],
            "layer_file": target.layer_file(config),
            "post_file": target.post_file(config),
            "embedding_file": BFLOAT16_FILE,
        },
        "flags": asdict(target),
        "inputs": {file: {"sha256": inputs[file].sha256, "size": inputs[file].nbytes} for file in sorted(inputs)},
        "files": {file: files[file] for file in sorted(files)},
        "memory": {
            "axmodels": sum(written.nbytes for written in axmodels.values()),
            "embedding": outputs[BFLOAT16_FILE].nbytes,
            "kv_cache": 2 * config.num_hidden_layers * target.kv_cache_len * config.kv_size * hidden_bytes(target),
        },
    }
    if maker == "cpu":
        # root of squared error over squared weights: deterministic, unlike what a check of the whole model measures
        manifest["accuracy"] = {
            "weight_error": {tensor: float(f"{errors[tensor]:.4g}") for tensor in sorted(errors)},
            "worst_weight_error": float(f"{max(errors.values(), default=0.0):.4g}"),
        }
    write_json(folder / MANIFEST, manifest)
    return manifest


def add_file(folder: Path, name: str, content: bytes) -> None:
    """Puts a file into a finished bundle, in place of one of its name, and into the manifest. Raises BadInput."""
    manifest = read_manifest(folder)
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest["files"] = {file: manifest["files"][file] for file in sorted(manifest["files"])}
    news = {name: folder / f".{name}.new", MANIFEST: folder / f".{MANIFEST}.new"}
    try:
        news[name].write_bytes(content)
        write_json(news[MANIFEST], manifest)
        for file, new in news.items():  # both are whole on the disk before the bundle changes
            new.replace(folder / file)
    except OSError as error:
        raise BadInput(f"cannot write into {folder}: {error.strerror or error}") from None
    finally:
        for new in news.values():
            new.unlink(missing_ok=True)


def hidden_bytes(target: Target) -> int:
    """Bytes of one value of the hidden state."""
    return 4 if target.hidden_state_type == "fp32" else 2


def to_json(values: Mapping[str, Any]) -> str:
    """The one way JSON is written: sorted, indented, a line feed at the end."""
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(to_json(values), "utf-8", newline="\n")


def texts(checkpoint: Path, name: str, config: ModelConfig, target: Target) -> dict[str, str]:
    """The small files that are made, not copied, by name. Raises BadInput for a damaged tokenizer or config."""
    tokenizer = tokenizer_txt(checkpoint)
    made = {
        "config.json": to_json(axllm_config(name, config, target, tokenizer is not None)),
        "post_config.json": to_json(post_config(checkpoint)),
    }
    return made if tokenizer is None else {**made, TOKENIZER_TXT: tokenizer}


def axllm_config(name: str, config: ModelConfig, target: Target, has_tokenizer_txt: bool) -> dict[str, Any]:
    """The config.json that the vendor's `axllm run DIR` reads."""
    return {
        "model_name": name,
        "tokenizer_type": TOKENIZER_TYPES[config.model_type],
        "url_tokenizer_model": TOKENIZER_TXT if has_tokenizer_txt else "hf/tokenizer.json",
        "template_filename_axmodel": target.layer_file(config),
        "axmodel_num": config.num_hidden_layers,
        "filename_post_axmodel": target.post_file(config),
        "filename_tokens_embed": BFLOAT16_FILE,
        "tokens_embed_num": config.vocab_size,
        "tokens_embed_size": config.hidden_size,
        "post_config_path": "post_config.json",
        "use_mmap_load_embed": True,
        "bos": config.model_type == "llama",
        "eos": False,
    }


def post_config(checkpoint: Path) -> dict[str, Any]:
    """Sampling: the model's own values, all switched off, as the vendor ships its models: greedy until asked."""
    path = checkpoint / "generation_config.json"
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


def tokenizer_txt(checkpoint: Path) -> str | None:
    """The vendor's text form of the tokenizer (type 3: BPE with its merges), or None where it would not be exact.

    Exact means: byte-level BPE whose ids run without a gap. The vendor's other BPE form drops the merges, encodes by
    longest match and gives other ids than the model was trained with.
    """
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return _bpe_txt(read_json(path), stop_ids(checkpoint))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is no tokenizer: {type(error).__name__} {error}\nDownload it again.") from None


def _bpe_txt(tokenizer: dict[str, Any], stops: list[int]) -> str | None:
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(tokenizer.get("pre_tokenizer")):
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


def stop_ids(checkpoint: Path) -> list[int]:
    """Ids that end a generation, as generation_config.json or config.json names them."""
    for name in ("generation_config.json", "config.json"):
        if (checkpoint / name).is_file():
            ids = read_json(checkpoint / name).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if ids and all(isinstance(number, int) for number in ids):
                return sorted(ids)
    return []
