"""axrun trace: digests of what every layer computes, to find where two machines begin to differ.

With our engine and integer weights, all machines compute the same bits. The first layer whose digests differ is where
one of them goes wrong: the layers behind it only pass the difference on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.decoder import Decoder
from axrun.errors import BadInput
from axrun.format import logits as reference_logits
from axrun.format.bundle import MANIFEST, Bundle, sha256
from axrun.load import DEFAULTS, Loading
from axrun.model import Model
from axrun.progress import Progress, Show, unseen

POST = "post"
DIGITS = 16  # of a hexadecimal digest: 64 bits
STRIDE = 7919  # a prime: tokens of a bundle without reference are multiples of it, modulo the vocabulary
FIXED = "a fixed sequence"

Rows = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Trace:
    """Digests of one run over `tokens` tokens, which come from `source`: equal bundles have equal sources.

    `parts`: for each part of the model ("layer 0" ..., "post") and each of its tensors (K, V, output; logits) the
    digest of all rows. `rows`: for one part on request, the digest of each token's row.
    """

    bundle: str
    manifest_sha256: str
    engine: str
    tokens: int
    source: str
    parts: dict[str, dict[str, str]]
    rows: dict[str, list[str]]

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Iterator[str]:
        """Lines for a terminal, or for diff(1)."""
        yield f"{self.bundle}, {self.tokens} tokens of {self.source}, manifest {self.manifest_sha256[:DIGITS]}"
        for part, tensors in self.parts.items():
            yield "  ".join([f"{part:<10}", *(f"{name} {digest}" for name, digest in tensors.items())])
        for name, digests in self.rows.items():
            yield from (f"{name} {token:<6} {digest}" for token, digest in enumerate(digests))


def trace(path: Path, part: str = "", count: int | None = None, loading: Loading = DEFAULTS) -> Trace:
    """Runs the layers of a bundle one by one over `count` tokens (default: as many as fit the context).

    The tokens are those of the reference in the bundle, or a fixed sequence if it has none or is too short. `part`: add
    the digests of each row of a part. Raises BadInput for an unusable bundle and for a part that it does not have,
    CheckFailed for values that are not finite.
    """
    bundle = loading.open(path)
    names = [*(f"layer {index}" for index in range(bundle.layers)), POST]
    if part and part not in names:
        raise BadInput(
            f"{bundle.path} has no {part!a:.40}; its parts are layer 0 to layer {bundle.layers - 1}, and post"
        )
    tokens, source = _tokens(bundle, count)
    parts: dict[str, dict[str, str]] = {}
    rows: dict[str, list[str]] = {}
    for name, pieces in _run(loading.load(bundle), tokens, loading.progress):
        whole: dict[str, Any] = {}
        for piece in pieces:
            for tensor, values in piece.items():
                whole.setdefault(tensor, hashlib.sha256()).update(values.tobytes())
                if name == part:
                    rows.setdefault(tensor, []).extend(_text(hashlib.sha256(row.tobytes())) for row in values)
        parts[name] = {tensor: _text(digest) for tensor, digest in whole.items()}
    return Trace(bundle.name, sha256(path / MANIFEST), loading.engine, len(tokens), source, parts, rows)


def _run(model: Model, tokens: Sequence[int], progress: Show = unseen) -> Iterator[tuple[str, Iterable[Rows]]]:
    """The tensors [n, ...] that each part of the model computes, in pieces of some tokens."""
    hidden, sessions = model.embedding(tokens), model.decoder.sessions
    for index, session in enumerate(sessions):
        layer = Decoder([session])
        hidden = np.concatenate([output.copy() for _, output in layer.run(hidden, 0)])
        tensors = {"output": hidden}
        if layer.kv_size:
            keys, values = (cache[0][0, : len(tokens)] for cache in (layer.cache.keys, layer.cache.values))
            tensors = {"K": keys, "V": values, **tensors}
        yield f"layer {index}", [tensors]
        progress(Progress(index + 1, len(sessions) + 1, "layers"))
    yield POST, ({"logits": logits} for logits in model.logits(hidden))
    progress(Progress(len(sessions) + 1, len(sessions) + 1, POST))


def _tokens(bundle: Bundle, count: int | None) -> tuple[list[int], str]:
    """The tokens, and where they come from."""
    wanted = bundle.kv_cache_len if count is None else count
    if not 0 < wanted <= bundle.kv_cache_len:
        raise BadInput(f"{wanted} tokens: expected 1 to {bundle.kv_cache_len}, the context of {bundle.path}")
    if reference_logits.NAME in bundle.manifest["files"]:
        tokens = reference_logits.read(bundle.path / reference_logits.NAME).tokens
        if tokens.size and int(tokens.max()) < bundle.vocab_size and tokens.size >= wanted:
            return [int(token) for token in tokens.reshape(-1)[:wanted]], reference_logits.NAME
    return [place * STRIDE % bundle.vocab_size for place in range(wanted)], FIXED


def _text(digest: Any) -> str:
    return str(digest.hexdigest())[:DIGITS]
