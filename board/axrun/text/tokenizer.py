"""The tokenizer of a checkpoint: text to token ids and back."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from axrun.errors import BadInput
from axrun.text import stop_ids
from axrun.text.hf_files import read_json
from axrun.text.template import ChatTemplate

# Pre-tokenizer of Qwen2, for a checkpoint that has only vocab.json and merges.txt.
# https://huggingface.co/Qwen/Qwen2-0.5B-Instruct/blob/main/tokenizer.json
QWEN2_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level() -> dict[str, int]:
    """Map from the printable characters of byte-level BPE to bytes.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL = _byte_level()


class Tokenizer:
    """`stop_ids` end a generation; `stop_sources` maps each to the files that name it.

    `special_ids` are the tokens that `decode` omits.
    """

    def __init__(self, backend: tokenizers.Tokenizer, stop_sources: Mapping[int, tuple[str, ...]]) -> None:
        self._backend, self.stop_sources = backend, dict(stop_sources)
        self.stop_ids = frozenset(self.stop_sources)
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in self._added.items() if token.special)
        self._patterns: dict[frozenset[int], re.Pattern[str] | None] = {}  # compiled patterns by set of added tokens
        self._characters: dict[str, list[int]] = {}  # cache of `_character`
        self._byte_level = backend.token_to_id("\u0120") is not None  # byte-level BPE spells a space so

    @classmethod
    def find(cls, hf: Path) -> Tokenizer | None:
        """The tokenizer in a folder of Hugging Face files, or None.

        Raises BadInput if its files are damaged or of an unsupported kind.
        """
        settings = read_json(hf / "tokenizer_config.json")
        try:
            if (hf / "tokenizer.json").is_file():
                backend = tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json"))
                backend.no_truncation()
                backend.no_padding()
            elif str(settings.get("tokenizer_class", "")).startswith("Qwen2Tokenizer") and all(
                (hf / name).is_file() for name in ("vocab.json", "merges.txt")
            ):
                backend = _qwen2(hf, settings)
            elif any((hf / name).is_file() for name in ("vocab.json", "tokenizer.model", "vocab.txt")):
                raise BadInput(
                    f"{hf} has a tokenizer, but no tokenizer.json\n"
                    "Make one: python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('IN')"
                    ".save_pretrained('OUT')\""
                )
            else:
                return None
            sources = stop_ids.find(hf, backend, _template(hf))
        except BadInput:
            raise
        except Exception as error:  # tokenizers has no more specific exception
            name = "tokenizer.json" if (hf / "tokenizer.json").is_file() else "vocab.json"
            raise BadInput(f"{hf / name} is damaged: {error}\nBuild or copy the bundle again.") from None
        return cls(backend, sources)

    @classmethod
    def open(cls, hf: Path) -> Tokenizer:
        """Like `find`, but raises BadInput if there is none."""
        found = cls.find(hf)
        if found is None:
            raise BadInput(f"{hf} has no tokenizer; build the bundle from a checkpoint that has one")
        return found

    @property
    def added_tokens(self) -> Mapping[int, tokenizers.AddedToken]:
        """Added tokens, which are matched in the text before the rest is tokenised."""
        return self._added

    @property
    def vocabulary(self) -> dict[str, int]:
        """All tokens in the spelling of the vocabulary, with their ids."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer object of the library. Threads share it, so do not modify it."""
        return self._backend

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text. `special` False: the tokenizer adds no special tokens, as after a chat template.

        Raises BadInput for text that is not valid Unicode.
        """
        return list(self._encode(text, special).ids)

    def beginning(self, text: str, length: int) -> list[int]:
        """At most `length` token ids of the beginning of a text, with the special tokens that the tokenizer adds."""
        encoding = self._encode(text, False)
        encoding.truncate(max(length - self._backend.num_special_tokens_to_add(False), 0))
        return list(self._backend.post_process(encoding, None, True).ids)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of token ids, with special tokens only if `special`. Ids without a token are skipped."""
        return str(self._backend.decode(list(ids), skip_special_tokens=not special))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token inside a text, special tokens spelled out; empty for an id without a token."""
        piece = self._backend.id_to_token(token) or ""
        if token in self._added:
            return piece.encode()
        if self._byte_level:
            return bytes(BYTE_LEVEL[character] for character in piece if character in BYTE_LEVEL)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)  # byte fallback of SentencePiece
        return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()

    @functools.lru_cache(maxsize=8)  # noqa: B019  (one tokenizer lives as long as the process)
    def containing(self, texts: tuple[str, ...]) -> frozenset[int]:
        """The tokens whose text contains one of these texts."""
        found = [text.encode() for text in texts if text]
        pieces = ((token, self.token_bytes(token)) for token in range(self._backend.get_vocab_size()))
        return frozenset(token for token, piece in pieces if any(text in piece for text in found))

    def expect_within(self, ids: Iterable[int], vocab_size: int) -> None:
        """Raises BadInput for a token id outside the model's vocabulary."""
        wrong = next((token for token in ids if token >= vocab_size), None)
        if wrong is not None:
            piece = self._backend.id_to_token(wrong)
            known = f": the tokenizer has {piece!r:.60}, the model does not" if piece is not None else ""
            raise BadInput(f"token id {wrong} is outside the vocabulary of {vocab_size}{known}")

    def spans(self, text: str, tokens: frozenset[int]) -> list[tuple[int, int]]:
        """The (start, stop) ranges where these added tokens are spelled in a text, in order."""
        pattern = self._spelled(tokens)
        if pattern is None:  # normalised tokens: only the tokenizer can find them
            encoding = self._encode(text, False)
            found = zip(encoding.ids, encoding.offsets)
            return [span for token, span in found if token in tokens and span[0] < span[1]]
        return [match.span() for match in pattern.finditer(text)]

    def encode_after(self, text: str, plain: frozenset[int] = frozenset()) -> list[int]:
        """Token ids of text that continues other text. Added tokens are text if `plain`; none of these ids may result.

        The text is encoded after a line feed, which is then removed: tokenizers may add a space to the start of a text.
        """
        ids = self._after(text, bool(plain))
        if plain.isdisjoint(ids):
            return ids
        return [
            token for character in text for token in self._character(character, plain)
        ]  # the vocabulary contains the spelling itself

    def _after(self, text: str, plain: bool) -> list[int]:
        encode = self._plain if plain else functools.partial(self.encode, special=False)
        first, ids = encode("\n"), encode("\n" + text)
        return ids[len(first) :] if ids[: len(first)] == first else encode(text)

    def _character(self, text: str, plain: frozenset[int]) -> list[int]:
        if text not in self._characters:
            self._characters[text] = self._after(text, True)
        if not plain.isdisjoint(self._characters[text]):
            raise BadInput(
                f"the tokenizer cannot encode {text!r} as text: it is a special token\nRemove it from the text."
            )
        return self._characters[text]

    def _encode(self, text: str, special: bool) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"the text is not UTF-8 at character {error.start}: {text[error.start]!a}") from None
        return self._backend.encode(text, add_special_tokens=special)

    def _plain(self, text: str) -> list[int]:
        """Token ids without added tokens. Does not set `encode_special_tokens`, since threads share the backend."""
        backend = self._backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words: Sequence[tuple[str, Any]] = [(text, None)]
        if backend.pre_tokenizer is not None:
            words = backend.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for word, _ in words for token in backend.model.tokenize(word)]

    def _spelled(self, tokens: frozenset[int]) -> re.Pattern[str] | None:
        """A pattern for these added tokens; None if they are matched in normalised text."""
        if tokens not in self._patterns:
            added = [self._added[number] for number in tokens]
            normalized = self._backend.normalizer is not None and any(token.normalized for token in added)
            pieces = sorted((token.content for token in added if token.content), key=len, reverse=True)
            pattern = re.compile("|".join(map(re.escape, pieces)) or "(?!)")
            self._patterns[tokens] = None if normalized else pattern
        return self._patterns[tokens]


def _template(hf: Path) -> ChatTemplate | None:
    """The chat template, for its end-of-turn token; None if damaged: a raw prompt does not need it."""
    try:
        return ChatTemplate.find(hf)
    except BadInput:
        return None


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
            raise BadInput(
                f"{hf}: added token {added[number]['content']!r} cannot have id {number}; the ids have a gap"
            )
    return backend
