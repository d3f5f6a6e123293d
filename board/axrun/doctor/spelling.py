"""Checksums over the whole vocabulary of a tokenizer: no sample of texts covers every merge rule."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import tokenizers

BLOCK = 64  # ids per checksum


def vocabulary(backend: tokenizers.Tokenizer) -> list[int]:
    """CRC-32 per BLOCK of ids: spelling, flags, and the ids of the token's text alone and within a text."""
    size = backend.get_vocab_size(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    return [_checksum(backend, added, range(start, min(start + BLOCK, size))) for start in range(0, size, BLOCK)]


def different(listed: Sequence[Any], seen: Sequence[int]) -> tuple[str, str, str] | None:
    """Part, expected and seen of the first block that differs, or None."""
    if list(listed) == list(seen):
        return None
    if len(listed) != len(seen):
        return "the vocabulary", f"{len(listed)} times {BLOCK} tokens", f"{len(seen)} times {BLOCK}"
    at = next(i for i, (a, b) in enumerate(zip(listed, seen)) if a != b) * BLOCK
    part = f"tokens {at} to {at + BLOCK - 1}"
    return part, "the spelling, flags and segmentation of transformers' tokenizer", "at least one differs"


def _checksum(backend: tokenizers.Tokenizer, added: dict[int, Any], numbers: range) -> int:
    texts = [backend.decode([number], skip_special_tokens=False) for number in numbers]
    around = [f"a {text} {text}" for text in texts]
    ids = [encoded.ids for encoded in backend.encode_batch([*texts, *around], add_special_tokens=False)]
    rows = [
        (
            backend.id_to_token(number),
            _flags(added.get(number)),
            texts[place],
            backend.decode([number]),
            ids[place],
            ids[len(numbers) + place],
        )
        for place, number in enumerate(numbers)
    ]
    return zlib.crc32(repr(rows).encode("utf-8", "surrogatepass"))


def _flags(token: Any) -> Any:
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return None if token is None else [getattr(token, name) for name in names]
