"""Malicious and damaged GGUF files: one clear error each, in bounded memory."""

from __future__ import annotations

import contextlib
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axc import build
from axc.checkpoints import Checkpoint
from axc.checkpoints.gguf import container
from axrun.errors import BadInput
from tests.axc import gguf_files
from tests.axc.axc import axc

TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return gguf_files.write(path, stored=Kind.Q8_0, changes=TINY).read_bytes()


def refused(data: bytes, folder: Path) -> str:
    """The error of a build; its first line names the file."""
    path = folder / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(BadInput) as error:
        build.plan(build.Options(path, folder / "out"))
    text = str(error.value)
    assert len(text.splitlines()) <= 3
    assert path.name in text.splitlines()[0]
    return text


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def changed(data: bytes, at: int, code: str, value: int | float) -> bytes:
    packed = struct.pack("<" + code, value)
    return data[:at] + packed + data[at + len(packed) :]


def behind(data: bytes, name: str) -> int:
    """The offset after the name of a tensor or key."""
    return data.index(text(name)) + len(text(name))


HUGE = 2**63
Change = Callable[[bytes], bytes]
CASES: dict[str, tuple[Change, str]] = {
    "nothing": (lambda data: b"", "not a complete GGUF file"),
    "another magic": (lambda data: b"GGML" + data[4:], "begins with b'GGML'"),
    "version 1": (lambda data: changed(data, 4, "I", 1), "version is 1; expected 2 or 3"),
    "big-endian": (lambda data: changed(data, 4, "I", 3 << 24), "(big-endian)"),
    "too many tensors": (lambda data: changed(data, 8, "Q", HUGE), "says it has 9223372036854775808 tensors"),
    "too many keys": (lambda data: changed(data, 16, "Q", HUGE), "says it has 9223372036854775808 keys"),
    "one key more": (lambda data: changed(data, 16, "Q", data[16] + 1), "the name of tensor 0 has"),
    "a long key": (lambda data: changed(data, 24, "Q", HUGE), "key 0 has 9223372036854775808 bytes"),
    "a long string": (
        lambda data: changed(data, behind(data, "general.architecture") + 4, "Q", 1 << 20),
        "general.architecture would need 1048576 bytes",
    ),
    "no UTF-8": (
        lambda data: changed(data, behind(data, "general.architecture") + 12, "B", 0xFF),
        "general.architecture is no UTF-8",
    ),
    "a token that is no UTF-8": (
        lambda data: data.replace(text("<|im_start|>"), text("<|im_start|>")[:-1] + b"\xff"),
        "is no UTF-8",
    ),
    "an array of arrays": (
        lambda data: changed(data, behind(data, "tokenizer.ggml.tokens") + 4, "I", 9),
        "is an array of the type 9",
    ),
    "an array without end": (
        lambda data: changed(data, behind(data, "tokenizer.ggml.tokens") + 8, "Q", HUGE),
        "says it has 9223372036854775808 strings",
    ),
    "numbers without end": (
        lambda data: changed(data, behind(data, "tokenizer.ggml.token_type") + 8, "Q", HUGE),
        "says it has 9223372036854775808 elements",
    ),
    "no dimensions": (lambda data: changed(data, behind(data, "blk.0.ffn_up.weight"), "I", 0), "has 0 dimensions"),
    "many dimensions": (
        lambda data: changed(data, behind(data, "blk.0.ffn_up.weight"), "I", 1 << 31),
        "has 2147483648 dimensions",
    ),
    "an empty tensor": (lambda data: changed(data, behind(data, "blk.0.ffn_up.weight") + 4, "Q", 0), "has the shape"),
    "a huge tensor": (lambda data: changed(data, behind(data, "blk.0.ffn_up.weight") + 4, "Q", HUGE), "has the shape"),
    "half a block": (
        lambda data: changed(data, behind(data, "blk.0.ffn_up.weight") + 4, "Q", 48),
        "rows of 48 values, in Q8_0 blocks of 32",
    ),
    "an unknown type": (
        lambda data: changed(data, behind(data, "blk.0.ffn_up.weight") + 20, "I", 4),
        "has the type 4, which the gguf package does not know",
    ),
    "integers": (
        lambda data: changed(data, behind(data, "blk.0.attn_norm.weight") + 12, "I", Kind.I32),
        "is stored as I32; expected one of F32",
    ),
    "an offset beyond the file": (
        lambda data: changed(data, behind(data, "blk.0.ffn_up.weight") + 24, "Q", HUGE),
        "lies at",
    ),
    "an offset between": (
        lambda data: changed(data, behind(data, "blk.0.ffn_up.weight") + 24, "Q", 33),
        "not aligned to 32 bytes",
    ),
    "an overlap": (lambda data: changed(data, behind(data, "blk.0.ffn_up.weight") + 24, "Q", 0), "overlap"),
    "a name twice": (
        lambda data: data.replace(text("blk.0.attn_q.weight"), text("blk.0.attn_k.weight")),
        "tensor 'blk.0.attn_k.weight' is there twice",
    ),
    "a key twice": (
        lambda data: data.replace(text("llama.rope.freq_base"), text("llama.vocab_size1234")).replace(
            text("tokenizer.ggml.bos_token_id"), text("tokenizer.ggml.eos_token_id")
        ),
        "the key 'tokenizer.ggml.eos_token_id' is there twice",
    ),
    "another architecture": (
        lambda data: data.replace(text("llama"), text("mamba"), 1),
        "general.architecture is 'mamba'; of GGUF files those of llama, qwen2, qwen3 are read\n"
        "Give the original checkpoint's folder instead.",
    ),
    "an unknown key": (
        lambda data: data.replace(text("llama.context_length"), text("llama.logit_scaling1")),
        "llama.logit_scaling1 asks for is not known",
    ),
    "no layers named": (
        lambda data: data.replace(text("llama.block_count"), text("other.block_count")),
        "has no llama.block_count",
    ),
    "no such matrix": (
        lambda data: data.replace(text("blk.0.ffn_up.weight"), text("blk.9.ffn_up.weight")),
        "model.gguf: model.layers.0.mlp.up_proj.weight; it is incomplete, get it again\n"
        "1 tensor is not of this architecture: model.layers.9.mlp.up_proj.weight; does block_count name fewer layers",
    ),
    "layers without end": (
        lambda data: changed(data, behind(data, "llama.block_count") + 4, "I", 1 << 31),
        "num_hidden_layers is 2147483648",
    ),
    "no heads": (lambda data: changed(data, behind(data, "llama.attention.head_count") + 4, "I", 0), "head_count is 0"),
    "more heads than rows": (
        lambda data: changed(data, behind(data, "llama.attention.head_count") + 4, "I", 1 << 30),
        "rope.dimension_count is 32",
    ),
    "partly rotated": (
        lambda data: changed(data, behind(data, "llama.rope.dimension_count") + 4, "I", 16),
        "rope.dimension_count is 16; expected 32",
    ),
    "an unknown cut": (
        lambda data: data.replace(text("llama-bpe"), text("klingonic")),
        "tokenizer.ggml.pre is 'klingonic'; expected one of",
    ),
    "an unknown tokenizer": (
        lambda data: data.replace(text("gpt2"), text("bert")),
        "tokenizer.ggml.model is 'bert'",
    ),
    "an end beyond the vocabulary": (
        lambda data: changed(data, behind(data, "tokenizer.ggml.eos_token_id") + 4, "I", 1 << 20),
        "tokenizer.ggml.eos_token_id is 1048576; the tokenizer has",
    ),
    "a merge of nothing": (
        lambda data: data.replace(text("h e"), text("h\u0105")).replace(text("\u0120 t"), text("\u0120xt")),
        "merge",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_is_refused_by_name(whole: bytes, tmp_path: Path, name: str) -> None:
    change, words = CASES[name]
    data = change(whole)
    assert data != whole
    assert words in refused(data, tmp_path)


def test_parts_adapters_and_huge_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gguf_files.write(tmp_path / "parts.gguf", changes=TINY, keys={"split.count": 3})
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=1)
    for name in ("token_embd.weight", "output_norm.weight", "output.weight"):
        writer.add_tensor(name, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    later = tmp_path / "model-00002-of-00003.gguf"
    assert b"general.architecture" not in later.read_bytes()
    for part in (first, later):
        assert "is one of 3 parts of a model\nJoin them first" in refused(part.read_bytes(), tmp_path)
    experts = gguf_files.write(tmp_path / "experts.gguf", changes=TINY, keys={"llama.expert_count": 8})
    assert "mixtures of experts" in refused(experts.read_bytes(), tmp_path)
    monkeypatch.setattr(container, "MAX_METADATA", 4096)
    assert "its metadata has" in refused(experts.read_bytes(), tmp_path)
    monkeypatch.setattr(container, "MAX_STRINGS", 100)
    assert "strings; expected at most 100" in refused(experts.read_bytes(), tmp_path)


def test_a_file_cut_anywhere(whole: bytes, tmp_path: Path) -> None:
    for length in sorted(random.Random(0).sample(range(len(whole) - 1), 40)):
        refused(whole[:length], tmp_path)


def examine(data: bytes, path: Path) -> None:
    """Reads all of a file, or refuses it; nothing else is raised."""
    path.write_bytes(data)
    with contextlib.suppress(BadInput):
        checkpoint = Checkpoint.open(path)
        assert checkpoint.folder.is_dir()
        for name, stored in checkpoint.tensors.items():
            if stored.dtype in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"):
                for _ in checkpoint.blocks(name):
                    pass
            if stored.grid:
                for _ in checkpoint.levels(name, 0, stored.shape[0]):
                    pass


PLACES = st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from(["set", "cut", "more", "word"]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PLACES, min_size=1, max_size=6))
def test_mutations(whole: bytes, tmp_path: Path, changes: list[tuple[float, int, str]]) -> None:
    """Changes, removes and inserts bytes of the metadata and the tensor entries."""
    examine(mutated(whole, changes), tmp_path / "model.gguf")


def mutated(data: bytes, changes: list[tuple[float, int, str]]) -> bytes:
    for where, byte, how in changes:
        at = int(where**2 * (len(data) - 1))  # more of them in front
        if how == "set":
            data = data[:at] + bytes([byte]) + data[at + 1 :]
        elif how == "cut":
            data = data[:at] + data[at + byte % 9 :]
        elif how == "more":
            data = data[:at] + bytes([byte]) * (byte % 9) + data[at:]
        else:
            data = data[:at] + struct.pack("<Q", (byte << 56) | (byte * 0x0101)) + data[at + 8 :]
    return data


def test_memory_stays_bounded(whole: bytes, tmp_path: Path) -> None:
    """A file with 600 MB of mostly empty strings, in a process with less memory."""
    path = tmp_path / "model.gguf"
    count = (1 << 21) + 1
    head = gguf.GGUF_MAGIC.to_bytes(4, "little") + struct.pack("<IQQ", 3, 0, 1)
    with path.open("wb") as file:
        file.write(head + text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, count - 1))
        file.truncate(600 << 20)
    done = axc(
        "llm_build", "--input_path", path, "--output_path", tmp_path / "out", limits={resource.RLIMIT_DATA: 400 << 20}
    )
    assert done.code == 2
    assert "general.architecture is None" in done.err
