"""Tiny tokenizers of all common kinds, as folders of Hugging Face files."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TYPED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
JSON = "{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}<|im_start|>"
DATED = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + CHATML
CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "user assistant system <| im start end |> INST 1 + 1 = 2",
]
WORDS = Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPM = ("<unk>", "<s>", "</s>")
FLAGS = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def token(content: str, **flags: bool) -> AddedToken:
    """An added token, special by default."""
    return AddedToken(content, **{"special": True, "normalized": False, **flags})


def described(backend: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    """Added tokens as tokenizer_config.json lists them."""
    added = backend.get_added_tokens_decoder().items()
    return {str(number): {key: getattr(entry, key) for key in FLAGS} for number, entry in added}


def save(folder: Path, backend: tokenizers.Tokenizer | None, template: str = CHATML, **settings: Any) -> Path:
    """A folder with a tokenizer and its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **settings}
    write(folder / "tokenizer_config.json", settings)
    write(folder / "config.json", {"model_type": "llama", "vocab_size": 1000})
    (folder / "chat_template.jinja").write_text(template)
    return folder


@functools.cache
def _trained_bytes(prefix_space: bool) -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 9, trainer)
    return str(backend.to_str())


def byte_level(prefix_space: bool = False, control: tuple[str, ...] = CONTROL) -> tokenizers.Tokenizer:
    """As GPT-2."""
    backend = tokenizers.Tokenizer.from_str(_trained_bytes(prefix_space))
    backend.add_special_tokens([token(content) for content in control])
    return backend


def llama3() -> tokenizers.Tokenizer:
    """Words first, whole words looked up before merges, BOS by a post-processor."""
    backend = byte_level()
    model = json.loads(backend.to_str())["model"]
    backend.model = models.BPE(model["vocab"], [tuple(merge) for merge in model["merges"]], ignore_merges=True)
    split = pre_tokenizers.Split(WORDS, "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    start = [("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=start)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return backend


def llama2(metaspace: str = "") -> tokenizers.Tokenizer:
    """As SentencePiece BPE is converted: with normalizers, or with a Metaspace of that prepend scheme."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    initial = ["\u2581", "a", "b"]
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=list(SPM), initial_alphabet=initial, show_progress=False
    )
    trained.train_from_iterator(CORPUS * 9, trainer)
    described = json.loads(trained.to_str())["model"]
    vocab, merges = dict(described["vocab"]), [tuple(merge) for merge in described["merges"]]
    for value in range(256):
        vocab.setdefault(f"<0x{value:02X}>", len(vocab))
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([token(content) for content in SPM])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return backend


def unigram() -> tokenizers.Tokenizer:
    """Its vocabulary also spells the special tokens, so that plain text can encode to one."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=list(SPM), unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS * 9, trainer)
    backend.add_special_tokens([token(content) for content in SPM])
    return backend


def all_flags() -> tokenizers.Tokenizer:
    """Added tokens with every flag, special and not, and a normalizer that applies to some of them."""
    backend = byte_level()
    backend.normalizer = normalizers.NFKC()
    names = ("lstrip", "rstrip", "single_word", "normalized")
    backend.add_special_tokens([token(f"<{name}>", **{name: True}) for name in names])
    backend.add_tokens([token(f"[{name}]", special=False, **{name: True}) for name in names])
    return backend


def qwen2_without_json(folder: Path) -> Path:
    folder.mkdir(parents=True)
    backend = byte_level()
    backend.model.save(str(folder))
    save(folder, None, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=described(backend))
    write(folder / "config.json", {"model_type": "qwen2", "vocab_size": 1000})
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "byte-level": lambda folder: save(folder, byte_level()),
    "byte-level, prefix space": lambda folder: save(folder, byte_level(True)),
    "llama 3": lambda folder: save(folder, llama3(), bos_token="<|endoftext|>"),
    "llama 2": lambda folder: save(folder, llama2(), LLAMA2, **LLAMA),
    "metaspace first": lambda folder: save(folder, llama2("first"), LLAMA2, **LLAMA),
    "metaspace always": lambda folder: save(folder, llama2("always"), LLAMA2, **LLAMA),
    "unigram": lambda folder: save(folder, unigram(), LLAMA2, **LLAMA),
    "added tokens of all flags": lambda folder: save(folder, all_flags()),
    "qwen2 without tokenizer.json": qwen2_without_json,
    "template of content parts": lambda folder: save(folder, byte_level(), TYPED),
    "template that writes JSON": lambda folder: save(folder, byte_level(), JSON),
    "template with a date": lambda folder: save(folder, byte_level(), DATED),
}


def _outside(folder: Path, how: str) -> Path:
    """Two special tokens that tokenizer.json lacks and another file, selected by `how`, adds."""
    backend = byte_level(control=CONTROL[:1])
    whole = byte_level(control=CONTROL)
    numbers = {content: whole.token_to_id(content) for content in CONTROL[1:]}
    settings: dict[str, Any] = {}
    if how == "added_tokens_decoder":
        settings[how] = described(whole)
    elif how == "named":
        settings = {"eos_token": CONTROL[1], "pad_token": CONTROL[2]}
    save(folder, backend, **settings)
    if how == "added_tokens.json":
        write(folder / how, numbers)
    elif how == "special_tokens_map.json":
        write(folder / how, {"additional_special_tokens": list(CONTROL[1:])})
    return folder


def _other_flags(folder: Path) -> Path:
    backend = byte_level()
    added = described(backend)
    return save(
        folder, backend, added_tokens_decoder={number: {**entry, "rstrip": True} for number, entry in added.items()}
    )


# folders that transformers reads differently from their tokenizer.json alone
MENDED: dict[str, Callable[[Path], Path]] = {
    "llama class": lambda folder: save(folder, llama2(), LLAMA2, tokenizer_class="LlamaTokenizer", **LLAMA),
    "qwen2 class": lambda folder: save(folder, byte_level(), tokenizer_class="Qwen2Tokenizer"),
    "added_tokens_decoder": lambda folder: _outside(folder, "added_tokens_decoder"),
    "added_tokens.json": lambda folder: _outside(folder, "added_tokens.json"),
    "tokens only named": lambda folder: _outside(folder, "named"),
    "special_tokens_map.json": lambda folder: _outside(folder, "special_tokens_map.json"),
    "other flags": _other_flags,
}
