"""The tokenizer compared with transformers, and streaming detokenisation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, trainers

from axrun.errors import BadInput
from axrun.text.hf_files import special_tokens
from axrun.text.stream import TextStream
from axrun.text.tokenizer import Tokenizer

TEXTS = [
    "1+1=",
    "who are you?",
    "  two spaces, a\ttab\n\n\nand lines  \n",
    "naïve Ærøskøbing 漢字 🦜🏳️‍🌈 e\u0301",
    "it's THEY'LL 1234567890",
    "<|im_start|>user\n<|im_end|>",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen2: Path) -> Tokenizer:
    found = Tokenizer.find(tiny_qwen2)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Like Llama 2: a space belongs to the next word, unknown characters become byte tokens, BOS is added."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list("▁abcdefghijklmnopqrstuvwxyz")
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 10, trainer)
    model = json.loads(backend.to_str())["model"]
    for piece in bytes_:
        model["vocab"][piece] = len(model["vocab"])
    backend.model = models.BPE(
        model["vocab"],
        [tuple(merge) for merge in model["merges"]],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    folder = tmp_path_factory.mktemp("llama")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}')
    found = Tokenizer.find(folder)
    assert found is not None
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_match_transformers(tokenizer: Tokenizer, hf_tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == hf_tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == hf_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_needs_only_vocabulary_and_merges(
    tokenizer: Tokenizer, tiny_qwen2: Path, tmp_path: Path, text: str
) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny_qwen2 / name, tmp_path)
    alone = Tokenizer.find(tmp_path)
    assert alone is not None
    assert alone.encode(text) == tokenizer.encode(text)
    assert alone.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert alone.stop_ids == tokenizer.stop_ids


def test_stop_ids_come_from_all_files_and_the_template(tiny_qwen2: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_qwen2 / "tokenizer.json", tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    vocabulary = backend.get_vocab()
    text_end, turn_end = vocabulary["<|endoftext|>"], vocabulary["<|im_end|>"]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert _stop_ids(tmp_path) == {text_end: ("tokenizer_config.json",)}
    (tmp_path / "config.json").write_text('{"eos_token_id": 511}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [510, 511]}')
    files: dict[int, tuple[str, ...]] = {
        510: ("generation_config.json",),
        511: ("generation_config.json", "config.json"),
    }
    files[text_end] = ("tokenizer_config.json",)
    assert _stop_ids(tmp_path) == files
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} <|im_end|>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    expected = {511: ("config.json",), text_end: ("tokenizer_config.json",), turn_end: ("chat template",)}
    assert _stop_ids(tmp_path) == expected


def test_raw_prompts_work_with_a_damaged_template(tiny_qwen2: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_qwen2 / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages")
    assert _stop_ids(tmp_path) == {}


def _stop_ids(folder: Path) -> Mapping[int, tuple[str, ...]]:
    found = Tokenizer.find(folder)
    assert found is not None
    assert found.stop_ids == set(found.stop_sources)
    return found.stop_sources


def test_automatic_special_tokens_can_be_omitted(sentencepiece_like: Tokenizer) -> None:
    ids = sentencepiece_like.encode("the cat")
    assert ids[0] == 1
    assert sentencepiece_like.encode("the cat", special=False) == ids[1:]
    assert sentencepiece_like.decode(ids) == "the cat"


def test_special_tokens_have_the_names_of_templates(tiny_qwen2: Path, hf_tokenizer: Any) -> None:
    expected = hf_tokenizer.special_tokens_map
    assert special_tokens(tiny_qwen2) == {name: expected[name] for name in ("eos_token", "pad_token")}


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_streamed_text_is_complete_and_has_only_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    _streams(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("the cat sat\nonü漢🦜\u200d"), max_size=40))
def test_streamed_text_keeps_the_spaces_between_words(sentencepiece_like: Tokenizer, text: str) -> None:
    _streams(sentencepiece_like, text)


def _streams(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert stream.finish() == ""
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_invalid_bytes_do_not_block_the_stream(tokenizer: Tokenizer) -> None:
    broken = [tokenizer.encode("漢")[0]] * 100  # the first byte of a character, repeated
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in broken]
    assert "".join(pieces) == "\ufffd" * 100
    assert stream.push(tokenizer.encode("a")[0]) == "a"


def test_an_incomplete_character_at_the_end_is_shown(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in tokenizer.encode("ok 漢")[:-1]) == "ok "
    assert stream.finish() == "\ufffd"


def test_streaming_takes_time_linear_in_the_tokens(tokenizer: Tokenizer) -> None:
    """Counts the decoded ids per token, instead of measuring time."""
    counted: list[int] = []

    class Counting(Tokenizer):
        def decode(self, ids: Any, special: bool = False) -> str:
            counted.append(len(ids))
            return super().decode(ids, special)

    stream = TextStream(Counting(tokenizer._backend, {}))
    for token in tokenizer.encode("漢字 and words " * 200):
        stream.push(token)
    assert max(counted) <= 12


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.find(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert Tokenizer.find(tmp_path) is None
    with pytest.raises(BadInput, match="has no tokenizer"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.json": "{"}, "is damaged"),
        ({"tokenizer.json": "{}"}, "is damaged"),
        ({"tokenizer.model": "x"}, "has a tokenizer, but no tokenizer.json\n.*save_pretrained"),
        ({"tokenizer_config.json": "[]"}, "holds a list, expected a JSON object"),
        ({"tokenizer_config.json": "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")}, "cannot read"),
    ],
)
def test_a_damaged_tokenizer_is_reported(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=words):
        Tokenizer.find(tmp_path)


def test_invalid_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="not UTF-8 at character 2"):
        tokenizer.encode("ab\udcff")
