"""A family in which some layers keep no state between tokens: they have no attention, cache or mask."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from axc import build, check, families
from axc.families import blocks, mistral
from axc.families.blocks import DecoderConfig, Sources
from axc.families.family import Keeps
from axc.graph import Graph
from axrun.errors import BadInput
from axrun.format import axmodel
from axrun.format.bundle import Bundle
from axrun.model import Model
from tests.axc.as_transformers import FP32, IDS, SMALL, random_model, same, theirs

HOLLOW = (0, 3)  # the first layer too: the contract of the others is not that of layer 0
WINDOWS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


def weights(config: DecoderConfig) -> Sources:
    without = tuple(f"model.layers.{index}.{part}" for index in HOLLOW for part in ("self_attn", "input_layernorm"))
    return {name: source for name, source in mistral.weights(config).items() if not name.startswith(without)}


def layer(config: DecoderConfig, index: int, positions: int, graph: Graph) -> None:
    if index not in HOLLOW:
        mistral.layer(config, index, positions, graph)
        return
    prefix, x = f"model.layers.{index}.", blocks.plain_input(config, graph)
    normed = blocks.rms(config.rms_norm_eps)(graph, x, f"{prefix}post_attention_layernorm")
    graph.output("output", graph.add(x, blocks.gated_mlp(graph, normed, prefix)), graph.hidden_type)


FAMILY = dataclasses.replace(
    mistral.FAMILY,
    config=lambda reader: mistral.read(reader, "hollow"),
    weights=weights,
    layer=layer,
    inside={},
    keeps=lambda config, index: Keeps(nothing=True) if index in HOLLOW else blocks.keeps(config, index),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle, and logits of an equivalent transformers model: the output projections of those layers are zero."""
    folder = tmp_path_factory.mktemp("hollow")
    particular = {"num_hidden_layers": 4, "layer_types": WINDOWS, "sliding_window": 12, "head_dim": 16}
    model = random_model(transformers.AutoConfig.for_model("ministral", **{**SMALL, **particular}))
    with torch.no_grad():
        for index in HOLLOW:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "hf")
    without = tuple(f"model.layers.{index}.{part}" for index in HOLLOW for part in ("self_attn", "input_layernorm"))
    tensors = load_file(folder / "hf" / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(without)}
    save_file(left, folder / "hf" / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps({**values, "model_type": "hollow"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "hollow", FAMILY)
        plan = build.plan(build.Options(folder / "hf", folder / "out", prefill_len=16, kv_cache_len=63, **FP32))
        build.build(plan)
        check.check(plan, 0, "", lambda line: None)
    return Bundle.open(folder / "out"), theirs(folder / "whole")


@pytest.mark.parametrize("engine", ["ax", "ort"])
def test_its_logits_and_its_cache(made: Any, engine: str) -> None:
    bundle, logits = made
    model = Model.load(bundle, engine)
    assert same(model.forward(IDS.tolist(), 0, logits="all"), logits)
    for rows in (model.decoder.cache.keys, model.decoder.cache.values):
        assert [bool(kept.nbytes) for kept in rows] == [False, True, True, False]
    step = [model.forward(IDS[at : at + 1].tolist(), at, logits="all") for at in range(20, len(IDS))]
    assert same(np.concatenate(step), logits[20:])  # after rows were dropped


def test_its_metadata_and_tensors(made: Any) -> None:
    bundle, _ = made
    layers = [axmodel.read(bundle.layer_path(index)) for index in range(4)]
    assert [layer.caches for layer in layers] == [False, True, True, False]
    assert [layer.window for layer in layers] == [0, 12, 0, 0]
    assert [info.name for info in (*layers[0].inputs, *layers[0].outputs)] == ["input", "output"]


@pytest.mark.parametrize(("layer", "value"), [(1, "nothing"), (1, "everything"), (0, "everything"), (0, "")])
def test_contradicting_metadata_is_refused(made: Any, layer: int, value: str, tmp_path: Path) -> None:
    bundle, _ = made
    model, path = onnx.load(bundle.layer_path(layer)), tmp_path / "layer.axmodel"
    properties = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**properties, "axmodel.keeps": value})
    onnx.save(model, path)
    with pytest.raises(BadInput, match=r"keeps"):
        axmodel.read(path)
