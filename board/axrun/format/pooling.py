"""How a bundle turns the hidden states of a text into its embedding, as the manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from axrun.errors import BadInput
from axrun.format.bundle import Bundle

LAST_TOKEN, MEAN = "lasttoken", "mean"  # as sentence-transformers names them


@dataclass(frozen=True)
class Pooling:
    """`mode`: the state of the last token, or the mean of all. `normalize`: to a length of 1.

    `max_tokens`: the longest text in tokens; None: as the context allows. `only`: the checkpoint makes embeddings, and
    its answers to a chat mean nothing.
    """

    mode: str = LAST_TOKEN
    normalize: bool = True
    max_tokens: int | None = None
    only: bool = False

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Pooling:
        """That of a bundle; the default one if its checkpoint has none. Raises BadInput."""
        entry = manifest.get("pooling")
        if entry is None:
            return cls()
        values: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
        mode, normalize, longest = (values.get(key) for key in ("mode", "normalize", "max_tokens"))
        fits = mode in (LAST_TOKEN, MEAN) and type(normalize) is bool
        if not fits or (longest is not None and (type(longest) is not int or longest < 1)):
            raise BadInput(f"the manifest's pooling is {entry!a:.80}\nBuild or copy the bundle again.")
        return cls(str(mode), bool(normalize), longest, only=True)


def refuse_text(bundle: Bundle) -> None:
    """Raises BadInput for a bundle that makes embeddings only."""
    if Pooling.of(bundle.manifest).only:
        raise BadInput(f"{bundle.path} makes embeddings, not text; use `axrun embed` or /v1/embeddings")
