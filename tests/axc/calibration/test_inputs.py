"""The checkpoints and texts that are calibrated, or refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from transformers import AutoTokenizer

from axc import build
from axc.calibration import run, text
from axc.calibration.file import CalibrationFile
from axc.calibration.options import wanted
from axc.checkpoints import HEAD
from axrun.errors import BadInput
from tests.axc import gguf_files
from tests.axc.calibration.calibrations import options


def test_who_calibrates(tiny_qwen2: Path, tmp_path: Path) -> None:
    """s4 does, unless it is told not to, or the checkpoint has levels that s4 keeps."""
    lossy = gguf_files.write(tmp_path / "lossy.gguf", "llama", GGMLQuantizationType.Q4_1)
    packed = gguf_files.write(tmp_path / "packed.gguf", "llama", GGMLQuantizationType.Q4_0)
    rows: list[tuple[Path, str | None, str | None, Path | None, float | None, list[Path], bool]] = [
        (tiny_qwen2, "s4", None, None, None, [], True),
        (tiny_qwen2, "s4", "rtn", None, None, [], False),
        (tiny_qwen2, None, None, None, None, [], False),
        (tiny_qwen2, "s8", None, None, None, [], False),
        (tiny_qwen2, "s8", "gptq", None, None, [], True),
        (tiny_qwen2, None, None, None, 5.0, [], True),
        (tiny_qwen2, "s4", None, tmp_path, None, [], False),
        (packed, "s4", None, None, None, [], False),
        (lossy, "s4", None, None, None, [], True),
        (lossy, "s4", "rtn", None, None, [], False),
    ]
    for path, kind, quantizer, given, bits, texts, expected in rows:
        assert wanted(path, kind, quantizer, given, bits, texts) == expected, (path, kind, quantizer)
    with pytest.raises(BadInput, match="--bits belongs to --quantizer gptq"):
        wanted(tiny_qwen2, "s4", "rtn", None, 5.0, [])
    with pytest.raises(BadInput, match="--bits cannot change a finished calibration"):
        wanted(tiny_qwen2, "s4", None, tmp_path, 5.0, [])
    with pytest.raises(BadInput, match="--quantizer cannot change a finished calibration"):
        wanted(tiny_qwen2, "s4", "gptq", tmp_path, None, [])


def test_a_gguf_of_floats_is_calibrated(words: Path, tmp_path: Path) -> None:
    path = gguf_files.write(
        tmp_path / "floats.gguf", "llama", GGMLQuantizationType.BF16, head=GGMLQuantizationType.BF16
    )
    output = run.calibrate(options(path, words, tokens=128, window=32), tmp_path / "out.safetensors")
    planned = build.plan(build.Options(path, tmp_path / "bundle", calibrated=output, kv_cache_len=63))
    assert {name: kept.bits for name, kept in planned.kept.items() if kept.bits != 4.5} == {HEAD: 8.25}
    assert len(planned.kept) == 15


def test_a_quantised_gguf_is_calibrated_unless_its_levels_are_kept(words: Path, tmp_path: Path) -> None:
    """From the values that Q4_1 stands for; the head, in Q8_0, keeps its levels."""
    kinds = GGMLQuantizationType
    path = gguf_files.write(tmp_path / "lossy.gguf", "llama", kinds.Q4_1, head=kinds.Q8_0)
    output = run.calibrate(options(path, words, tokens=128, window=32), tmp_path / "out.safetensors")
    planned = build.plan(build.Options(path, tmp_path / "bundle", calibrated=output, kv_cache_len=63))
    assert [kept.tensor for kept in planned.kept.values() if not kept.calibrated] == [HEAD]
    assert len(planned.kept) == 15
    assert planned.notices[0] == "14 matrices stored as Q4_1 dequantised, and stored again as s4, calibrated: not exact"
    assert build.build(planned).fresh  # measures the errors against the checkpoint's values, as calibration did
    packed = gguf_files.write(tmp_path / "packed.gguf", "llama", kinds.Q4_0, head=kinds.Q8_0)
    with pytest.raises(BadInput, match=r"packed\.gguf is quantised already: s4 keeps its levels \(Q4_0\) exactly"):
        run.calibrate(options(packed, words, tokens=128, window=32), tmp_path / "out.safetensors")


def test_every_text_has_its_share(words: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """One that is short leaves the rest of its share unused; the file says how much was used."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    short, contents = tmp_path / "short.txt", ["1+1=2, and so on. " * 5, words.read_text()]
    short.write_text(contents[0])
    found = text.windows((short, words), tokenizer, 256, 32, 640)
    ids = [tokenizer.encode(content, add_special_tokens=False) for content in contents]
    assert 32 <= len(ids[0]) < 4 * 32
    whole = len(ids[0]) // 32 * 32
    assert found.windows.reshape(-1).tolist() == ids[0][:whole] + ids[1][:128]
    output = run.calibrate(
        options(tiny_qwen2, words, calibration=(short, words), tokens=256, window=32), tmp_path / "out.safetensors"
    )
    assert CalibrationFile.open(output).header["text"] == {
        "sha256": hashlib.sha256("\0".join(contents).encode()).hexdigest(),
        "files": ["short.txt", "words.txt"],
        "tokens": whole + 128,
        "window": 32,
    }


def test_texts_that_cannot_be_used(tmp_path: Path, tiny_qwen2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    good = tmp_path / "good.txt"
    good.write_bytes(b"\xef\xbb\xbf" + (tiny_qwen2 / "heldout.txt").read_bytes())
    rows: list[tuple[str, bytes | None, str]] = [
        ("empty.txt", b"", r"empty\.txt has 0 tokens; expected 64 or more"),
        ("short.txt", b"A few words.", r"short\.txt has \d+ tokens; expected 64"),
        ("utf-16.txt", "Words.".encode("utf-16"), "is no UTF-8 text: byte 0"),
        ("utf-16-le.txt", "Words.".encode("utf-16-le"), "is no text: byte 1 is 0"),
        ("model.bin", "Größe".encode() + b"\0\1", "is no text: byte 7 is 0"),
        ("latin-1.txt", "Größe".encode("latin-1"), "is no UTF-8 text: byte 2"),
        ("none.txt", None, "cannot read"),
        (".", None, "is no regular file"),
    ]
    for name, content, words in rows:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        for paths in ((path,), (good, path)):
            with pytest.raises(BadInput, match=words):
                text.windows(paths, tokenizer, 1024, 64, 640)
    with pytest.raises(BadInput, match="--calibration_tokens is 100; expected 64 or more for each of 2 texts"):
        text.windows((good, good), tokenizer, 100, 64, 640)
    whole = text.windows((good,), tokenizer, 1024, 64, 640).windows.reshape(-1)
    expected = tokenizer.encode((tiny_qwen2 / "heldout.txt").read_text(), add_special_tokens=False)
    assert whole.tolist() == expected[: len(whole)]  # without the byte order mark, and not cut
