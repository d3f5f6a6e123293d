"""Faults of files and versions: missing, damaged, swapped, or made by something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.doctor import axmodels
from tests.doctor.axmodels import edit, layer, metadata, post, replace, rewrite, sign
from tests.doctor.fault import Fault

TABLE = "model.embed_tokens.weight.bfloat16.bin"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 144640\n" % (b"0" * 64)


def remove(bundle: Path, name: str) -> None:
    (bundle / name).unlink()


def truncate(bundle: Path, name: str) -> None:
    content = (bundle / name).read_bytes()
    rewrite(bundle / name, content[: len(content) // 2])


def truncate_signed(bundle: Path, name: str) -> None:
    truncate(bundle, name)
    sign(bundle, name)


def flip_a_bit(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[-100] ^= 1
    rewrite(bundle / name, bytes(content))


def link(bundle: Path, name: str) -> None:
    (bundle / name).rename(bundle.parent / "elsewhere")
    (bundle / name).symlink_to(bundle.parent / "elsewhere")


def swap(bundle: Path, one: str, other: str) -> None:
    first, second = (bundle / one).read_bytes(), (bundle / other).read_bytes()
    rewrite(bundle / one, second)
    rewrite(bundle / other, first)


def swap_signed(bundle: Path, one: str, other: str) -> None:
    swap(bundle, one, other)
    sign(bundle, one, other)


def add_a_file(bundle: Path, name: str) -> None:
    rewrite(bundle / name, b"{}")


def model_says(bundle: Path, **changes: Any) -> None:
    axmodels.manifest(bundle, lambda values: values["model"].update(changes))


def empty(bundle: Path, name: str) -> None:
    replace(bundle, name, b"")


def files() -> list[Fault]:
    return [
        Fault("a layer is missing", "s8", "files", "{layer}", lambda b, c: remove(b, layer(b, 1)), says="missing"),
        Fault("the post model is missing", "s8", "files", "{post}", lambda b, c: remove(b, post(b)), says="missing"),
        Fault("the embedding is missing", "s8", "files", TABLE, lambda b, c: remove(b, TABLE), says="missing"),
        Fault(
            "tokenizer.json is missing",
            "s8",
            "files",
            "hf/tokenizer.json",
            lambda b, c: remove(b, "hf/tokenizer.json"),
            says="missing",
        ),
        Fault("a layer is truncated", "s8", "files", "{layer}", lambda b, c: truncate(b, layer(b, 1)), says="bytes"),
        Fault("one bit of a layer differs", "s8", "files", "{layer}", lambda b, c: flip_a_bit(b, layer(b, 1))),
        Fault("one bit of the embedding differs", "s8", "files", TABLE, lambda b, c: flip_a_bit(b, TABLE)),
        Fault("a layer is a link", "s8", "files", "{layer}", lambda b, c: link(b, layer(b, 1)), says="link"),
        Fault("an extra file", "s8", "files", "hf/added.json", lambda b, c: add_a_file(b, "hf/added.json")),
        Fault(
            "two layer files are swapped",
            "s8",
            "files",
            "{layer}",
            lambda b, c: swap(b, layer(b, 1), layer(b, 2)),
        ),
        Fault(
            "two layer files are swapped, manifest updated",
            "s8",
            "files|versions|layers",
            "{layer}",
            lambda b, c: swap_signed(b, layer(b, 1), layer(b, 2)),
            says="swapped|layer 2",
        ),
        Fault(
            "a layer file holds the post model",
            "s8",
            "files|versions|layers",
            "{layer}",
            lambda b, c: replace(b, layer(b, 1), (b / post(b)).read_bytes()),
            says="post",
        ),
        Fault(
            "a layer is truncated, manifest updated",
            "s8",
            "files|versions|layers",
            "{layer}",
            lambda b, c: truncate_signed(b, layer(b, 1)),
            says="truncated|damaged|whole",
        ),
        Fault(
            "a layer is a Git LFS pointer",
            "s8",
            "files|versions|layers",
            "{layer}",
            lambda b, c: replace(b, layer(b, 1), LFS),
            says="LFS",
        ),
        Fault(
            "a layer is empty",
            "s8",
            "files|versions|layers",
            "{layer}",
            lambda b, c: empty(b, layer(b, 1)),
            says="empty",
        ),
        Fault(
            "the embedding lacks its last row",
            "s8",
            "files|embedding",
            TABLE,
            lambda b, c: replace(b, TABLE, (b / TABLE).read_bytes()[:-256]),
            says="bytes",
        ),
    ]


def versions() -> list[Fault]:
    def meta(**changes: str) -> Any:
        return lambda b, c: edit(b, layer(b, 1), lambda model: metadata(model, **changes))

    def written(field: str, value: str) -> Any:
        return lambda b, c: edit(b, layer(b, 1), lambda model: setattr(model, field, value))

    def schema(values: dict[str, Any]) -> None:
        values["schema"] = 2

    def vendors(values: dict[str, Any]) -> None:
        values["maker"] = "pulsar2"

    def flags(name: str, says: str, **changes: Any) -> Fault:
        def change(values: dict[str, Any]) -> None:
            values["flags"].update(changes)

        return Fault(name, "s8", "files", "manifest.json|{layer0}|{post}", in_manifest(change), says=says)

    def one_layer_less(b: Path, c: Path) -> None:
        last = layer(b, 3)
        remove(b, last)
        axmodels.manifest(b, lambda values: (values["model"].update(layers=3), values["files"].pop(last))[1])

    def in_manifest(change: Any) -> Any:
        return lambda b, c: axmodels.manifest(b, change)

    groups = json.dumps([{"tokens": 1, "history": 255}, {"tokens": 32, "history": 0}], separators=(",", ":"))
    early = "files|versions"
    return [
        Fault("the format of a layer is newer", "s8", early, "{layer}", meta(version="2"), says="version"),
        Fault("a layer is for another chip", "s8", early, "{layer}", meta(chip="AX620E"), says="chip|AX620E"),
        Fault(
            "a layer has another producer_name",
            "s8",
            early,
            "{layer}",
            written("producer_name", "onnxsim"),
            says="onnxsim",
        ),
        Fault(
            "a layer has another producer_version",
            "s8",
            early,
            "{layer}",
            written("producer_version", "0.0.1"),
            says="0.0.1",
        ),
        Fault(
            "a layer has another opset",
            "s8",
            early,
            "{layer}",
            lambda b, c: edit(b, layer(b, 1), lambda model: setattr(model.opset_import[0], "version", 24)),
            says="opset",
        ),
        flags("flags: weight_type s4", "s4|s8", weight_type="s4"),
        flags("flags: another post_weight_type", "fp32|s8", post_weight_type="fp32"),
        flags("flags: another prefill_len", "64", prefill_len=64),
        flags("flags: post_topk without such outputs", "indices", post_topk=10),
        flags("flags: unknown weight_type", "q9", weight_type="q9"),
        flags("flags: weight_type is a list", "s8", weight_type=["s8"]),
        Fault("flags are missing", "s8", "files", "manifest.json", in_manifest(lambda v: v.pop("flags")), says="None"),
        Fault("the manifest has one layer less", "s8", "files", "manifest.json", one_layer_less, says="3"),
        Fault(
            "the manifest names another family",
            "s8",
            "files",
            "manifest.json",
            lambda b, c: model_says(b, model_type="llama"),
            says="llama",
        ),
        Fault("a layer lacks groups", "s8", "files|versions|layers", "{layer}", meta(groups=groups), says="group"),
        Fault(
            "the manifest has a newer schema",
            "s8",
            early,
            "manifest.json",
            lambda b, c: axmodels.manifest(b, schema),
            says="schema",
        ),
        Fault(
            "the manifest names another maker",
            "s8",
            early,
            "manifest.json|{layer}|{layer0}",
            lambda b, c: axmodels.manifest(b, vendors),
            says="pulsar2|axc|made by",
        ),
        Fault(
            "the manifest has another hidden_state_type",
            "s8",
            "files|versions|layers",
            "manifest.json|{layer0}",
            lambda b, c: model_says(b, hidden_state_type="fp16"),
            says="type|fp16|FLOAT16",
        ),
        Fault(
            "the manifest has a longer context",
            "s8",
            "files|versions|layers",
            "manifest.json|{layer0}",
            lambda b, c: model_says(b, kv_cache_len=511),
            says="kv_cache_len|context|511",
        ),
    ]
