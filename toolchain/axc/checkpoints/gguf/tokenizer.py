"""Converts a GGUF's tokenizer to tokenizer.json and tokenizer_config.json.

Byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`). The file names its pre-tokenizer, a regular expression of
llama.cpp (`llama_vocab::impl::load`): the table below.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from axc.checkpoints.gguf.container import ORIGINAL, Container, Strings
from axrun.errors import BadInput
from axrun.text.tokenizer import BYTE_LEVEL, QWEN2_CUT

LLAMA3_CUT = QWEN2_CUT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2, DIGITS = "gpt2", "digits, then gpt2"
CUTS: Mapping[str, str] = {
    "gpt-2": GPT2,
    "smollm": DIGITS,
    "qwen2": QWEN2_CUT,
    "deepseek-r1-qwen": QWEN2_CUT,
    "llama-bpe": LLAMA3_CUT,
    "llama3": LLAMA3_CUT,
    "llama-v3": LLAMA3_CUT,
}
WHOLE_WORDS = frozenset(
    name for name, cut in CUTS.items() if cut is LLAMA3_CUT
)  # a word in the vocabulary is one token
CONTROL, USER_DEFINED = 3, 4  # kinds of token
ENDS = ("eos", "eot", "eom")  # tokens that end an answer
TEMPLATE = "tokenizer.chat_template"
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
BYTES = {byte: character for character, byte in BYTE_LEVEL.items()}


def files(file: Container) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and generation_config.json by name; none of a file without a tokenizer.

    Raises BadInput for a kind that is not known, and for what is damaged.
    """
    get = _Reader(file).get
    kind = get("tokenizer.ggml.model", str)
    if kind is None or kind == "none":
        return {}
    if kind not in ("gpt2", "llama"):
        raise BadInput(
            f"{file.path}: tokenizer.ggml.model is {kind!r:.60}; gpt2 (BPE) and llama (SentencePiece) are read\n"
            f"{ORIGINAL}"
        )
    tokens = list(get("tokenizer.ggml.tokens", Strings) or ())
    kinds = get("tokenizer.ggml.token_type", np.ndarray)
    if not tokens or kinds is None or len(kinds) != len(tokens):
        raise BadInput(
            f"{file.path}: its tokenizer has {len(tokens)} tokens, and kinds of {0 if kinds is None else len(kinds)}"
        )
    numbers = {name: _number(file, name, len(tokens)) for name in ("bos", "unknown", "padding", *ENDS)}
    made = _byte_level(file, tokens, kinds) if kind == "gpt2" else _sentencepiece(file, tokens, numbers["unknown"])
    added = [
        AddedToken(token, normalized=False, special=bool(is_of == CONTROL))
        for token, is_of in zip(tokens, kinds.tolist(), strict=True)
        if is_of in (CONTROL, USER_DEFINED) and made.token_to_id(token) is not None
    ]
    named = {name: tokens[number] for name, key in SPECIAL.items() if (number := numbers[key]) is not None}
    known = {token.content for token in added}
    others = dict.fromkeys(token for token in named.values() if token not in known)
    added += [AddedToken(token, normalized=False, special=True) for token in others]
    made.add_tokens(added)
    adds_first = get("tokenizer.ggml.add_bos_token", bool)
    adds_first = kind == "llama" if adds_first is None else adds_first
    adds_last = bool(get("tokenizer.ggml.add_eos_token", bool))
    _adds(made, file, numbers, first=adds_first, last=adds_last)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    settings |= {"add_bos_token": adds_first, "add_eos_token": adds_last, "clean_up_tokenization_spaces": False}
    if (template := get(TEMPLATE, str)) is not None:
        settings["chat_template"] = template
    ends = list(dict.fromkeys(numbers[name] for name in ENDS if numbers[name] is not None))
    generation = {"bos_token_id": numbers["bos"], "eos_token_id": ends or None}
    return {
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json({key: value for key, value in generation.items() if value is not None}),
    }


class _Reader:
    """Metadata of one type. Raises BadInput for a value of another."""

    def __init__(self, file: Container) -> None:
        self.file = file

    def get(self, key: str, kind: type) -> Any:
        value = self.file.metadata.get(key)
        if value is not None and not isinstance(value, kind):
            raise BadInput(f"{self.file.path}: {key} is a {type(value).__name__}, expected {kind.__name__}")
        return value


def _number(file: Container, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = file.metadata.get(key)
    if value is None or (isinstance(value, int) and 0 <= value < count):
        return value
    raise BadInput(f"{file.path}: {key} is {value!r:.40}; the tokenizer has {count} tokens")


def _vocabulary(file: Container, tokens: list[str]) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if vocabulary.setdefault(token, number) != number:
            raise BadInput(f"{file.path}: its tokens {vocabulary[token]} and {number} are both {token!r:.60}")
    return vocabulary


def _byte_level(file: Container, tokens: list[str], kinds: Any) -> Tokenizer:
    name = _Reader(file).get("tokenizer.ggml.pre", str)
    if name not in CUTS:
        raise BadInput(
            f"{file.path}: tokenizer.ggml.pre is {name!r:.60}; expected one of {', '.join(CUTS)}\n{ORIGINAL}"
        )
    spelled = [_spelled(token, kind) for token, kind in zip(tokens, kinds.tolist(), strict=True)]
    vocabulary = _vocabulary(file, spelled)
    merges = list(_merges(file, vocabulary))
    whole = name in WHOLE_WORDS
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=whole))
    made.pre_tokenizer = cut(name)
    made.decoder = decoders.ByteLevel()
    return made


def cut(name: str) -> Any:
    """The pre-tokenizer of a name in CUTS."""
    pattern = CUTS[name]
    if pattern in (GPT2, DIGITS):
        by_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return by_words if pattern is GPT2 else pre_tokenizers.Sequence([pre_tokenizers.Digits(True), by_words])
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _spelled(token: str, kind: int) -> str:
    """Some files store control and user-defined tokens as plain text."""
    if kind in (CONTROL, USER_DEFINED) or all(character in BYTE_LEVEL for character in token):
        return token
    return "".join(BYTES[byte] for byte in token.encode())


def _merges(file: Container, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    merges = _Reader(file).get("tokenizer.ggml.merges", Strings)
    for index, merge in enumerate(merges or ()):
        left, space, right = merge.partition(" ")
        if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise BadInput(f"{file.path}: merge {index} of its tokenizer is {merge!r:.60}, of no tokens that it has")
        yield left, right


def _sentencepiece(file: Container, tokens: list[str], unknown: int | None) -> Tokenizer:
    get = _Reader(file).get
    vocabulary = _vocabulary(file, tokens)
    scores = get("tokenizer.ggml.scores", np.ndarray)
    if scores is None or len(scores) != len(tokens):
        raise BadInput(
            f"{file.path}: its tokenizer has {len(tokens)} tokens, and scores of {0 if scores is None else len(scores)}"
        )
    merges = list(_merges(file, vocabulary)) or _scored(tokens, vocabulary, scores.tolist())
    unknown_token = tokens[unknown] if unknown is not None else None
    made = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True, unk_token=unknown_token))
    prefixed = get("tokenizer.ggml.add_space_prefix", bool) is not False
    scheme: Any = "first" if prefixed else "never"
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefixed else []
    parts: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    made.decoder = decoders.Sequence(parts)
    return made


def _scored(tokens: list[str], vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Merges from scores: SentencePiece joins the neighbours whose token has the best score."""
    found = []
    for number, token in enumerate(tokens):
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found.append((scores[number], number, pairs))
    found.sort(key=lambda entry: -entry[0])
    return list(itertools.chain.from_iterable(pairs for _, _, pairs in found))


def _adds(made: Tokenizer, file: Container, numbers: Mapping[str, int | None], *, first: bool, last: bool) -> None:
    """Sets the post-processor that adds bos and eos."""
    ids = {"bos": numbers["bos"] if first else None, "eos": numbers["eos"] if last else None}
    for name, wanted in (("bos", first), ("eos", last)):
        if wanted and ids[name] is None:
            raise BadInput(f"{file.path}: its tokenizer adds a {name} token, and names none")
    pieces = {name: (made.id_to_token(number), number) for name, number in ids.items() if number is not None}
    if not pieces:
        return
    before, after = ([pieces[name][0]] if name in pieces else [] for name in ("bos", "eos"))
    single = [*before, "$A:0", *after]
    pair = [*single, *(f"{piece}:1" for piece in before), "$B:1", *(f"{piece}:1" for piece in after)]
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(pieces.values()))


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
