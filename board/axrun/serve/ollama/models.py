"""What /api/tags and /api/show tell about a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from axrun.format.bundle import MANIFEST, Bundle
from axrun.format.pooling import Pooling
from axrun.serve.ollama import TAG
from axrun.serve.ollama.reply import timestamp
from axrun.serve.order import Reader
from axrun.text.hf_files import template_file

# field of Sampling: Ollama's name
SAMPLING = {name: name for name in ("temperature", "top_k", "top_p", "min_p")} | {
    "repetition_penalty": "repeat_penalty"
}


def tags(models: Iterable[tuple[str, Bundle]]) -> dict[str, Any]:
    """The list of models, by their names."""
    return {"models": [_entry(name, bundle) for name, bundle in models]}


def show(reader: Reader, body: Mapping[str, Any]) -> dict[str, Any]:
    """One model."""
    bundle, sampling, family = reader.bundle, reader.sampling, reader.bundle.model_type
    template = template_file(bundle.hf)
    return {
        "modified_at": _modified(bundle),
        "details": _details(bundle),
        "template": template[1] if template else "",
        "parameters": "\n".join(f"{theirs} {getattr(sampling, ours)}" for ours, theirs in SAMPLING.items()),
        "model_info": {
            "general.architecture": family,
            "general.basename": bundle.name,
            f"{family}.block_count": bundle.layers,
            f"{family}.context_length": bundle.kv_cache_len,
            f"{family}.embedding_length": bundle.hidden_size,
            f"{family}.vocab_size": bundle.vocab_size,
        },
        "capabilities": list(_capabilities(reader)),
    }


def _capabilities(reader: Reader) -> Iterable[str]:
    if not Pooling.of(reader.bundle.manifest).only:
        yield "completion"
        if reader.template is not None:
            yield "tools"
        if reader.marks is not None:
            yield "thinking"
    if reader.bundle.flag("ret_postnorm") == str(True):
        yield "embedding"


def _entry(name: str, bundle: Bundle) -> dict[str, Any]:
    return {
        "name": f"{name}{TAG}",
        "model": f"{name}{TAG}",
        "modified_at": _modified(bundle),
        "size": sum(entry["size"] for entry in bundle.manifest["files"].values()),
        "digest": bundle.digest,
        "details": _details(bundle),
    }


def _details(bundle: Bundle) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "axmodel",
        "family": bundle.model_type,
        "families": [bundle.model_type],
        "parameter_size": "",  # a bundle does not have it
        "quantization_level": bundle.flag("weight_type"),
    }


def _modified(bundle: Bundle) -> str:
    """0 if the bundle was deleted while the server runs."""
    try:
        return timestamp((bundle.path / MANIFEST).stat().st_mtime)
    except OSError:
        return timestamp(0)
