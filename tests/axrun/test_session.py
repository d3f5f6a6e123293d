"""The session interface on every engine, and onnxruntime specifics, with layers from the compiler."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.format.dtypes import DTYPES, from_float32, to_float32
from axrun.session import Session, open_session, ort
from axrun.session.ort import OrtSession

TOLERANCE = {"fp32": 2e-4, "fp16": 2e-3, "bf16": 1e-2}  # relative to the largest value: one or two ulp of the type


def filled(session: Session, group: int, seed: int = 0) -> dict[str, Any]:
    """Allocated arrays of a group with random inputs; the mask hides the newer half of the history."""
    random = np.random.default_rng(seed)
    shape = session.groups[group]
    arrays = {info.name: session.allocate(info) for info in shape.inputs + shape.outputs}
    for info in shape.inputs:
        if info.name == "indices":
            arrays["indices"][0] = np.arange(shape.history, shape.history + shape.tokens)
        elif info.name != "mask":
            arrays[info.name][...] = from_float32(
                random.standard_normal(arrays[info.name].shape, np.float32), info.dtype
            )
    mask = np.zeros(arrays["mask"].shape, np.float32)
    mask[0, :, shape.history // 2 : shape.history] = -65504
    mask[0, :, shape.history :][np.triu_indices(shape.tokens, 1)] = -65504
    arrays["mask"][...] = from_float32(mask, shape.inputs[-1].dtype)
    return arrays


@pytest.mark.parametrize("hidden", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("weight", ["fp32", "fp16", "bf16", "s8", "s4", "fp8_e4m3", "fp8_e5m2"])
def test_every_group_matches_onnxruntime_on_the_file(build_tiny: Any, hidden: str, weight: str) -> None:
    path = Bundle.open(build_tiny(hidden_state_type=hidden, weight_type=weight)).layer_path(1)
    lowered, plain = ort.open_session(path), exact(path)
    assert [(group.tokens, group.history) for group in lowered.groups] == [(1, 255), (32, 0), (32, 32), (32, 128)]
    for group in lowered.groups:
        arrays = filled(lowered, group.index)
        expected = {**arrays, **{info.name: plain.allocate(info) for info in group.outputs}}
        lowered.bind(group.index, arrays).run()
        plain.bind(group.index, expected).run()
        for info in group.outputs:
            seen, wanted = (to_float32(given[info.name], info.dtype) for given in (arrays, expected))
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(seen / scale, wanted / scale, rtol=0, atol=TOLERANCE[hidden])
            assert scale > 0.1


def exact(path: Path) -> OrtSession:
    """The unmodified file in onnxruntime without optimisers, which would round activations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.open_session(path, lowered=False)
    session._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session


def test_the_file_is_not_changed(bundle_s8: Path, engine: str) -> None:
    path = Bundle.open(bundle_s8).layer_path(0)
    before = hashlib.sha256(path.read_bytes()).digest(), os.stat(path).st_mtime_ns
    open_session(path, engine)
    assert (hashlib.sha256(path.read_bytes()).digest(), os.stat(path).st_mtime_ns) == before


def test_a_group_without_history_has_no_cache_inputs(bundle_s8: Path, engine: str) -> None:
    session = open_session(Bundle.open(bundle_s8).layer_path(0), engine)
    assert [info.name for info in session.groups[1].inputs] == ["indices", "input", "mask"]
    assert [info.name for info in session.groups[0].inputs] == ["K_cache", "V_cache", "indices", "input", "mask"]
    assert session.groups[2].inputs[0].shape == (1, 32, 64)
    assert [info.name for info in session.groups[0].outputs] == ["K_cache_out", "V_cache_out", "output"]


def test_a_binding_can_run_repeatedly(bundle_s8: Path, engine: str) -> None:
    session = open_session(Bundle.open(bundle_s8).layer_path(0), engine)
    arrays = filled(session, 0)
    binding = session.bind(0, arrays)
    binding.run()
    first = arrays["output"].copy()
    arrays["input"][...] = from_float32(-to_float32(arrays["input"], "BFLOAT16"), "BFLOAT16")
    binding.run()
    second = arrays["output"].copy()
    assert (first != second).any()
    arrays["input"][...] = from_float32(-to_float32(arrays["input"], "BFLOAT16"), "BFLOAT16")
    binding.run()
    np.testing.assert_array_equal(arrays["output"], first)


def test_a_flexible_binding_on_a_prefix_matches_the_whole_group(bundle_fp32: Path, engine: str) -> None:
    session = open_session(Bundle.open(bundle_fp32).layer_path(2), engine)
    assert session.flexible
    arrays = filled(session, 0)
    arrays["mask"][0, 0, 40:255] = -65536
    session.bind(0, arrays).run()
    whole = arrays["output"].copy()
    arrays["output"][...] = 0
    short = {name: array[:, :40] if name in ("K_cache", "V_cache") else array for name, array in arrays.items()}
    short["mask"] = np.concatenate([arrays["mask"][..., :40], arrays["mask"][..., 255:]], axis=-1)
    session.bind(0, short).run()
    np.testing.assert_allclose(arrays["output"], whole, rtol=0, atol=1e-5)


def test_unbound_outputs_are_discarded(bundle_s8: Path, engine: str) -> None:
    session = open_session(Bundle.open(bundle_s8).post_path, engine)
    inputs, outputs = session.groups[0].inputs, {info.name: info for info in session.groups[0].outputs}
    given = session.allocate(inputs[0])
    given[...] = from_float32(np.random.default_rng(0).standard_normal(given.shape, np.float32), inputs[0].dtype)
    logits = session.allocate(outputs["logits"])
    session.bind(0, {"input": given, "logits": logits}).run()
    assert logits.dtype == np.float32
    assert np.ptp(logits) > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": None}, "input"),
        ({"nonsense": np.zeros(1, np.float32)}, "nonsense"),
        ({"input": np.zeros((1, 1, 127), np.uint16)}, r"input is uint16\[1, 1, 127\], expected BFLOAT16\[1, 1, 128\]"),
        ({"input": np.zeros((1, 1, 128), np.float32)}, r"input is float32"),
        ({"mask": np.zeros((1, 1, 255), np.uint16)}, r"mask is .*255\], expected BFLOAT16\[1, 1, 256\]"),
        ({"K_cache": np.zeros((1, 255, 128), np.uint16)[:, :, ::2]}, "K_cache"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(bundle_s8: Path, engine: str, change: dict[str, Any], words: str) -> None:
    session = open_session(Bundle.open(bundle_s8).layer_path(0), engine)
    arrays = {**filled(session, 0), **change}
    with pytest.raises(ValueError, match=words):
        session.bind(0, {name: array for name, array in arrays.items() if array is not None})


def test_every_float_type_has_a_numpy_type(bundle_s8: Path, engine: str) -> None:
    session = open_session(Bundle.open(bundle_s8).layer_path(0), engine)
    for info in session.groups[0].inputs:
        assert session.allocate(info).dtype == DTYPES[info.dtype].numpy


def test_an_unknown_engine_lists_the_known_ones(bundle_s8: Path) -> None:
    with pytest.raises(BadInput, match="unknown engine 'tpu'; there are: ax, ax-int8, ort"):
        open_session(Bundle.open(bundle_s8).layer_path(0), engine="tpu")


@pytest.mark.parametrize("threads", [0, -1, 100000])
def test_an_invalid_number_of_threads_is_refused(bundle_s8: Path, threads: int) -> None:
    with pytest.raises(BadInput, match=f"{threads} threads"):
        open_session(Bundle.open(bundle_s8).layer_path(0), threads=threads)


@pytest.mark.parametrize("lowered", [True, False])
def test_a_graph_that_onnxruntime_refuses_gives_an_error(bundle_s8: Path, tmp_path: Path, lowered: bool) -> None:
    """A valid file with an invalid operator name."""
    path = tmp_path / "odd.axmodel"
    path.write_bytes(Bundle.open(bundle_s8).layer_path(0).read_bytes().replace(b"Attention", b"Attentoin"))
    with pytest.raises(BadInput, match="does not load in onnxruntime") as caught:
        ort.open_session(path, lowered=lowered)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300 + len(str(path))


def test_a_graph_with_a_missing_tensor_gives_an_error(bundle_s8: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.axmodel"
    content = Bundle.open(bundle_s8).layer_path(0).read_bytes()
    name = b"model.layers.0.mlp.up_proj.weight_scale"
    at = content.index(name)  # as an input of its DequantizeLinear
    path.write_bytes(content[:at] + name[:-1] + b"X" + content[at + len(name) :])
    with pytest.raises(BadInput, match=r"does not load in onnxruntime.*up_proj.weight_scalX"):
        ort.open_session(path)


def test_a_vendor_axmodel_is_not_for_this_engine(vendors_axmodel: Path) -> None:
    with pytest.raises(BadInput, match="made by Pulsar2; engine ort runs axmodels of axc only"):
        ort.open_session(vendors_axmodel)
