"""Planted faults with correct digests: the doctor reports each with stage, file and cause."""

from __future__ import annotations

import ctypes
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from axrun import decoder, kv_cache
from axrun.doctor import cache, embedding, layers, post, text
from axrun.doctor.context import Context
from axrun.doctor.report import Finding
from axrun.format import axmodel
from axrun.format.axmodel import Axmodel
from axrun.session import ax_engine, libax_engine
from tests.ci import plants

L0, L1 = "qwen2_p32_l0_together.axmodel", "qwen2_p32_l1_together.axmodel"
L2 = "qwen2_p32_l2_together.axmodel"
POST, TABLE = "qwen2_post.axmodel", "model.embed_tokens.weight.bfloat16.bin"
HIDDEN = 128

Plant = Callable[[Path], object]


def tensor(folder: Path, file: str, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Changes the first initializer with this name suffix, in place in the file."""
    tensors = axmodel.read(folder / file).initializers
    found = next(entry for key, entry in tensors.items() if key.endswith(name))
    new = np.ascontiguousarray(change(found.array().copy()).astype(found.array().dtype)).tobytes()
    with (folder / file).open("r+b") as stream:
        stream.seek(found.offset)
        stream.write(new)
    plants.agree(folder, file)


def rewritten(folder: Path, file: str, change: Callable[[Axmodel], Axmodel]) -> None:
    content = axmodel.encode(change(axmodel.read(folder / file)))
    (folder / file).write_bytes(content)
    plants.agree(folder, file)


def swapped_layers(folder: Path) -> None:
    """Also swaps the layer numbers in the metadata, since the vendor's axmodels have none."""
    contents = {}
    for file, other, number in ((L0, L1, "0"), (L1, L0, "1")):
        model = axmodel.read(folder / other)
        metadata = {**model.metadata, "axmodel.layer": number}
        contents[file] = axmodel.encode(dataclasses.replace(model, metadata=metadata))
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    plants.agree(folder, L0, L1)


def other_base(folder: Path) -> None:
    """Rotary tables with another base."""
    rows = int(axmodel.read(folder / L1).initializers["rotary.low.rows"].array())
    for part, step in (("low", 1), ("high", rows)):
        for name, function in (("cos", np.cos), ("sin", np.sin)):

            def table(old: NDArray[Any], function: Any = function, step: int = step) -> NDArray[Any]:
                half = old.shape[1]
                angles = step * np.arange(len(old))[:, None] / 500.0 ** (np.arange(half) / half)
                return np.asarray(function(angles), np.float32)

            tensor(folder, L1, f"rotary.{part}.{name}", table)


def other_eps(folder: Path) -> None:
    def change(model: Axmodel) -> Axmodel:
        nodes = [
            dataclasses.replace(node, attributes={**node.attributes, "epsilon": 30.0})
            if node.op_type == "RMSNormalization"
            else node
            for node in model.nodes
        ]
        return dataclasses.replace(model, nodes=tuple(nodes))

    rewritten(folder, L1, change)


def nan_scale(folder: Path) -> None:
    def change(scales: NDArray[Any]) -> NDArray[Any]:
        scales.reshape(-1)[3] = np.nan
        return scales

    def name(key: str) -> bool:
        return "q_proj" in key and "scale" in key

    scale = next(key for key in axmodel.read(folder / L1).initializers if name(key))
    tensor(folder, L1, scale, change)


def scales(weight: str, factor: float) -> Plant:
    """Multiplies all scales of a quantised weight by a factor."""

    def plant(folder: Path) -> None:
        names = [key for key in axmodel.read(folder / L1).initializers if weight in key and "scale" in key]
        tensor(folder, L1, names[0], lambda old: old * factor)

    return plant


def table(change: Callable[[NDArray[np.uint16]], NDArray[np.uint16]]) -> Plant:
    def plant(folder: Path) -> None:
        rows = np.fromfile(folder / TABLE, "<u2").reshape(-1, HIDDEN)
        (folder / TABLE).write_bytes(np.ascontiguousarray(change(rows.copy())).astype("<u2").tobytes())
        plants.agree(folder, TABLE)

    return plant


def one_value(rows: NDArray[np.uint16]) -> NDArray[np.uint16]:
    rows[333, 7] ^= 0x40
    return rows


def exchanged(rows: NDArray[np.uint16]) -> NDArray[np.uint16]:
    rows[[0, 1]] = rows[[1, 0]]
    return rows


def head(change: Callable[[NDArray[Any]], NDArray[Any]], part: str = "") -> Plant:
    def plant(folder: Path) -> None:
        names = [key for key in axmodel.read(folder / POST).initializers if (part or "norm") in key]
        for name in names:
            tensor(folder, POST, name, change)

    return plant


def damaged_row(old: NDArray[Any]) -> NDArray[Any]:
    old.reshape(len(old), -1)[77] *= -3
    return old


def other_vocabulary(folder: Path) -> None:
    file = folder / "hf" / "tokenizer.json"
    found = json.loads(file.read_text())
    vocabulary = found["model"]["vocab"]
    one, other = (next(key for key, value in vocabulary.items() if value == number) for number in (70, 71))
    vocabulary[one], vocabulary[other] = 71, 70
    file.write_text(json.dumps(found))
    plants.agree(folder, "hf/tokenizer.json")


def other_template(folder: Path) -> None:
    file = folder / "hf" / "tokenizer_config.json"
    found = json.loads(file.read_text())
    found["chat_template"] = found["chat_template"].replace("<|im_end|>", "<|im_end|> ", 1)
    file.write_text(json.dumps(found))
    plants.agree(folder, "hf/tokenizer_config.json")


PLANTED: dict[str, tuple[Plant, Callable[[Context], str | Finding], str, str, str]] = {
    "layers swapped": (swapped_layers, layers.layers, L0, "layer 0", "it is the axmodel of layer 1"),
    "rotary from 128 on": (
        lambda folder: plants.zero_rotary(folder, 128),
        layers.layers,
        L0,
        "K row",
        "from there on: the rotary",
    ),
    "rotary base": (other_base, layers.layers, L1, "K row", "right at position 0 and wrong after it: probably the ro"),
    "eps": (other_eps, layers.layers, L1, "layer 1", "the norm before them (weight, epsilon)"),
    "not finite": (nan_scale, layers.layers, L1, "output", "not finite"),
    "k_proj": (scales("k_proj", 1.7), layers.layers, L1, "K row", "K is wrong everywhere: probably k_proj"),
    "v_proj": (scales("v_proj", 0.0), layers.layers, L1, "V row", "probably v_proj"),
    "down_proj": (scales("down_proj", -1.0), layers.layers, L1, "output", "the MLP"),
    "a scale's sign": (
        plants.flip_a_scale,
        layers.layers,
        L2,
        "layer 2, channel 0 of the output",
        "the scale of another row",
    ),
    "row late": (
        table(lambda rows: np.roll(rows, 1, axis=0)),
        embedding.embedding,
        TABLE,
        "token 0",
        "all rows are shifted by +1",
    ),
    "big-endian": (table(lambda rows: rows.byteswap()), embedding.embedding, TABLE, "token", "big-endian"),
    "truncated": (
        table(lambda rows: rows - (np.arange(HIDDEN, dtype=np.uint16) % 2) * (rows & 0x7FFF > 0).astype(np.uint16)),
        embedding.embedding,
        TABLE,
        "token",
        "truncated",
    ),
    "scaled table": (
        table(lambda rows: rows + ((rows & 0x7F80) > 0).astype(np.uint16) * 0x80),
        embedding.embedding,
        TABLE,
        "token",
        "scaled by 2",
    ),
    "one value": (table(one_value), embedding.embedding, TABLE, "rows 320 to 383", "changed"),
    "rows exchanged": (table(exchanged), embedding.embedding, TABLE, "token 0", "is that of token 1"),
    "head late": (
        head(lambda old: np.roll(old, 1, axis=0), "embed"),
        post.post,
        POST,
        "logits",
        "the rows of the head are shifted by +1",
    ),
    "final norm": (head(lambda old: old * 2), post.post, POST, "model.norm.weight", "differs from the checkpoint"),
    "row of the head": (head(damaged_row, "scale"), post.post, POST, "token 77", "rows of the head"),
    "vocabulary": (
        other_vocabulary,
        text.tokenizer,
        "hf/tokenizer.json",
        "the text",
        "tokenizer belongs to another model",
    ),
    "template": (
        other_template,
        text.template,
        "hf/tokenizer_config.json",
        "the conversation",
        "template belongs to another model",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_is_reported(fault: str, copy: Path, context: Callable[[Path], Context]) -> None:
    plant, stage, file, part, cause = PLANTED[fault]
    plant(copy)
    found = stage(context(copy))
    assert isinstance(found, Finding), found
    print("\n".join(found.lines()))
    assert found.file == file
    assert part in found.part
    assert cause in found.cause


def test_the_vendors_interface_is_sufficient(
    examined: Path, context: Callable[[Path], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our library's extensions: groups as reported by the engine, files passed as bytes."""
    extended = libax_engine.library()
    plain = libax_engine.Library(extended.sys, extended.engine, False, extended.folder)

    def opened(path: Path, threads: int | None = None) -> ax_engine.AxSession:
        handle, content = ctypes.c_void_p(), path.read_bytes()
        plain.call("AX_ENGINE_CreateHandle", ctypes.byref(handle), content, ctypes.c_uint32(len(content)))
        return ax_engine.AxSession(plain, handle, None)

    monkeypatch.setattr(ax_engine, "open_session", opened)
    for stage in (layers.layers, cache.cache, post.post, post.answer):
        found = stage(context(examined))
        assert isinstance(found, str), list(found.lines())


def test_a_runner_with_misplaced_rows_is_distinguished_from_the_layers(
    examined: Path,
    context: Callable[[Path], Context],
    found: Callable[[Path], Finding],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = kv_cache.KVCache.write
    monkeypatch.setattr(
        kv_cache.KVCache, "write", lambda self, layer, at, k, v: write(self, layer, max(at - 1, 0), k, v)
    )
    assert isinstance(layers.layers(context(examined)), str)
    finding = found(examined)
    assert (finding.stage, finding.file) == ("cache", "axrun: board/axrun/decoder.py")
    assert "in the wrong place" in finding.cause


def test_a_runner_with_a_wrong_mask_is_reported(
    examined: Path, found: Callable[[Path], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = kv_cache.fill_mask
    monkeypatch.setattr(decoder, "fill_mask", lambda mask, past, *rest: fill(mask, past // 2, *rest))
    finding = found(examined)
    assert finding.stage == "cache"
    assert "its mask hides cached row 16 from the token at position 32" in finding.cause


def test_a_runner_that_skips_a_layer_is_reported(
    examined: Path, found: Callable[[Path], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    initial = decoder.Decoder.__init__
    monkeypatch.setattr(decoder.Decoder, "__init__", lambda self, sessions: initial(self, sessions[:3]))
    finding = found(examined)
    assert finding.stage == "cache"
    assert "it does not run each layer once" in finding.cause


def test_a_faulty_engine_is_distinguished_from_the_axmodel(
    examined: Path, found: Callable[[Path], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ax_engine.AxBinding.run

    def late(self: Any) -> None:
        run(self)
        bound = self._keep[0]
        if "V_cache_out" in bound:
            bound["V_cache_out"][...] = 0

    monkeypatch.setattr(ax_engine.AxBinding, "run", late)
    finding = found(examined)
    assert (finding.stage, finding.file) == ("layers", "libax_engine.so")
    assert finding.cause == "the engine is at fault: ort agrees with the reference on the same axmodel"
