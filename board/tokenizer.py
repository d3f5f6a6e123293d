"""Text to token ids and back, by the checkpoint's own tokenizer files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from board.errors import BadInput

REPLACEMENT = "\ufffd"  # what bytes that are no UTF-8, or not yet, decode to
LONGEST_CHARACTER = 4  # bytes of one in UTF-8, and so tokens
CONTEXT = 8  # tokens without a text that may change the first one that has some
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# How Qwen2 cuts text before its merges, for a checkpoint that has vocab.json and merges.txt alone.
# https://huggingface.co/Qwen/Qwen2-0.5B-Instruct/blob/main/tokenizer.json
QWEN2_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level() -> dict[str, int]:
    """Bytes by the printable characters that byte-level BPE spells them with.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL = _byte_level()


class Tokenizer:
    """`stop_ids` end a generation: as generation_config.json, else config.json, else the tokenizer names them."""

    def __init__(self, backend: tokenizers.Tokenizer, stop_ids: frozenset[int]) -> None:
        self._backend, self.stop_ids = backend, stop_ids
        self._added = backend.get_added_tokens_decoder()
        self._byte_level = backend.token_to_id("\u0120") is not None  # how byte-level BPE spells a space

    @classmethod
    def find(cls, hf: Path) -> Tokenizer | None:
        """The tokenizer in a folder of Hugging Face files, None where there is none.

        Raises BadInput when its files are damaged, or of a kind that cannot be read.
        """
        settings = read_json(hf / "tokenizer_config.json")
        try:
            if (hf / "tokenizer.json").is_file():
                backend = tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json"))
                backend.no_truncation()
                backend.no_padding()
            elif str(settings.get("tokenizer_class", "")).startswith("Qwen2Tokenizer"):
                backend = _qwen2(hf, settings)
            elif any((hf / name).is_file() for name in ("vocab.json", "tokenizer.model", "vocab.txt")):
                raise BadInput(
                    f"{hf} has a tokenizer, but no tokenizer.json\n"
                    "Make one: python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('IN')"
                    ".save_pretrained('OUT')\""
                )
            else:
                return None
        except BadInput:
            raise
        except Exception as error:  # tokenizers raises nothing more particular
            raise BadInput(f"the tokenizer in {hf} is damaged: {error}\nBuild or copy the bundle again.") from None
        return cls(backend, _stop_ids(hf, backend))

    @classmethod
    def open(cls, hf: Path) -> Tokenizer:
        """As `find`. Raises BadInput where there is none, too."""
        found = cls.find(hf)
        if found is None:
            raise BadInput(f"{hf} has no tokenizer, so there is no way to ask; build from a checkpoint that has one")
        return found

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids. `special` False: without those that the tokenizer adds by itself, which a chat template writes.

        Raises BadInput for text that is no Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"the text is not UTF-8 at character {error.start}: {text[error.start]!a}") from None
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for inside a text, special ones spelled out; nothing for an id without a token."""
        piece = self._backend.id_to_token(token) or ""
        if token in self._added:
            return piece.encode()
        if self._byte_level:
            return bytes(BYTE_LEVEL[character] for character in piece if character in BYTE_LEVEL)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)  # SentencePiece's fallback
        return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()


class TextStream:
    """Text from tokens as they come: never half a character, and in time linear in their number."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # tokens before, as decoders treat the first word of a text in their own way
        self._before = ""  # their text
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that is complete with `token`; perhaps none."""
        self._held.append(token)
        text = self._text()
        if text.endswith(REPLACEMENT) and len(self._held) < LONGEST_CHARACTER:
            return ""
        return self._show(text)

    def finish(self) -> str:
        """What is left when no token follows."""
        return self._show(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._shown + self._held)[len(self._before) :]

    def _show(self, text: str) -> str:
        if text.endswith(REPLACEMENT):  # bytes that were no character must not join the next token's
            self._shown = []
        elif text:
            self._shown = self._held
        elif not self._before:
            self._shown = (self._shown + self._held)[-CONTEXT:]
        self._held = []
        self._before = self._tokenizer.decode(self._shown)
        return text


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises BadInput when it is damaged."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {path}: {error}\nBuild or copy the bundle again.") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def special_tokens(hf: Path) -> dict[str, str]:
    """The special tokens by the names that chat templates use, e.g. bos_token."""
    named = {**read_json(hf / "special_tokens_map.json"), **read_json(hf / "tokenizer_config.json")}
    found = {name: named[name] for name in SPECIAL if named.get(name)}
    return {name: str(token["content"] if isinstance(token, dict) else token) for name, token in found.items()}


def _stop_ids(hf: Path, backend: tokenizers.Tokenizer) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        ids = read_json(hf / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if ids and all(type(token) is int for token in ids):
            return frozenset(ids)
    token = backend.token_to_id(special_tokens(hf).get("eos_token", ""))
    return frozenset() if token is None else frozenset([token])


def _qwen2(hf: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(hf / "vocab.json"), str(hf / "merges.txt")))
    backend.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(tokenizers.Regex(QWEN2_CUT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    added = {int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()}
    for number in sorted(added):
        flags = {
            key: bool(added[number].get(key)) for key in ("lstrip", "normalized", "rstrip", "single_word", "special")
        }
        backend.add_tokens([tokenizers.AddedToken(added[number]["content"], **flags)])
        if backend.token_to_id(added[number]["content"]) != number:
            raise BadInput(f"{hf}: added token {added[number]['content']!r} cannot have id {number}; ids leave a gap")
    return backend
