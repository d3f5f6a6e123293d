"""Every axmodel is a valid ONNX file: for onnx's checker, its protobuf classes, and a plain onnxruntime session."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from axc import VERSION, inspect, shapes, synth
from axrun.errors import BadInput
from axrun.format import axmodel, wire
from tests.conftest import Builder

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"hidden_state_type": "fp32", "weight_type": "fp32"},
    "fp16-s4-top-k": {"hidden_state_type": "fp16", "weight_type": "s4", "post_topk": 5},
    "bf16-s8": {"hidden_state_type": "bf16", "weight_type": "s8", "post_weight_type": "bf16"},
    "bf16-bf16-no-prefill": {"weight_type": "bf16", "prefill_len": 0, "last_kv_cache_len": ()},
    "fp8": {"hidden_state_type": "fp32", "weight_type": "fp8_e4m3", "post_weight_type": "fp8_e5m2"},
    "uneven": {"weight_type": "s4", "hidden_state_type": "fp32"},
}


@pytest.fixture(scope="module", params=KINDS)
def bundle(request: pytest.FixtureRequest, build_tiny: Builder) -> Path:
    other = {"input_path": request.getfixturevalue("uneven")} if request.param == "uneven" else {}
    return build_tiny(**KINDS[request.param], **other)


@pytest.fixture(scope="module")
def files(bundle: Path) -> list[Path]:
    found = sorted(bundle.glob("*.axmodel"))
    assert len(found) == json.loads((bundle / "manifest.json").read_text())["model"]["layers"] + 1
    return found


def test_onnx_checker_accepts_it(files: list[Path]) -> None:
    for path in files:
        onnx.checker.check_model(path, full_check=True)


def test_only_standard_operators_of_one_opset(files: list[Path]) -> None:
    for path in files:
        model = onnx.load(path)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
        for node in model.graph.node:
            onnx.defs.get_schema(node.op_type, 23, "")


def test_raw_data_begins_at_multiples_of_64(files: list[Path]) -> None:
    """Our reader and the onnx library agree on offsets and data."""
    for path in files:
        data, ours = path.read_bytes(), axmodel.read(path)
        for tensor in onnx.load(path).graph.initializer:
            offset = ours.initializers[tensor.name].offset
            assert offset % 64 == 0
            assert data[offset : offset + len(tensor.raw_data)] == tensor.raw_data
            assert len(tensor.raw_data) == ours.initializers[tensor.name].nbytes


def test_our_reader_agrees_with_onnx(files: list[Path]) -> None:
    for path in files:
        ours, theirs = axmodel.read(path), onnx.load(path)
        assert (theirs.producer_name, theirs.producer_version) == (ours.producer_name, ours.producer_version)
        assert {entry.key: entry.value for entry in theirs.metadata_props} == ours.metadata
        assert [(n.op_type, *n.input, *n.output) for n in theirs.graph.node] == [
            (n.op_type, *n.inputs, *n.outputs) for n in ours.nodes
        ]
        for node, own in zip(theirs.graph.node, ours.nodes, strict=True):
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()} == own.attributes
        for infos, mine in ((theirs.graph.input, ours.inputs), (theirs.graph.output, ours.outputs)):
            for info, one in zip(infos, mine, strict=True):
                tensor = info.type.tensor_type
                shape = tuple(d.dim_param if d.HasField("dim_param") else d.dim_value for d in tensor.shape.dim)
                dtype = onnx.TensorProto.DataType.Name(tensor.elem_type)
                assert (info.name, dtype, shape) == (one.name, one.dtype, one.shape)
        assert [tensor.name for tensor in theirs.graph.initializer] == list(ours.initializers)
        for tensor in theirs.graph.initializer:
            own_tensor = ours.initializers[tensor.name]
            assert onnx.TensorProto.DataType.Name(tensor.data_type) == own_tensor.dtype
            assert tuple(tensor.dims) == own_tensor.dims
            assert tensor.raw_data == own_tensor.array().tobytes()


def test_producer_and_metadata(files: list[Path]) -> None:
    for path in files:
        model = onnx.load(path)
        metadata = [(entry.key, entry.value) for entry in model.metadata_props]
        assert (model.producer_name, model.producer_version) == ("axc", VERSION)
        assert metadata == sorted(metadata)
        keys = {"version", "kind", "groups", "chip", "hidden_state_type", "weight_type"}
        layer = {"axmodel.layer"} if "_l" in path.stem else set()
        assert {key for key, _ in metadata} == {f"axmodel.{key}" for key in keys} | layer


# In a plain onnxruntime session

TOKENS, HISTORY = 5, 3
CARRIERS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint32)": np.uint32}
BFLOAT16 = "tensor(bfloat16)"


def feeds(session: onnxruntime.InferenceSession, seed: int) -> dict[str, Any]:
    """Random rows of the declared types and shapes: numpy arrays, bfloat16 as the upper halves of float32."""
    rng = np.random.default_rng(seed)
    lengths = {"M": TOKENS, "T": HISTORY, "T+M": HISTORY + TOKENS}
    found: dict[str, Any] = {}
    for info in session.get_inputs():
        shape = [lengths.get(dim, dim) for dim in info.shape]
        if info.name == "indices":
            values = np.arange(HISTORY, HISTORY + TOKENS, dtype=np.uint32).reshape(shape)
        elif info.name == "mask":
            values = np.triu(np.full((1, TOKENS, HISTORY + TOKENS), -65536.0, np.float32), HISTORY + 1)
        else:
            values = rng.standard_normal(shape, np.float32)
        if info.type == BFLOAT16:
            found[info.name] = (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            found[info.name] = values.clip(-60000, None).astype(CARRIERS[info.type])
    return found


def run(session: onnxruntime.InferenceSession, fed: dict[str, Any]) -> dict[str, Any]:
    """Outputs: floats as float32 arrays, other types unchanged."""
    binding = session.io_binding()
    kept = {}
    for info in session.get_inputs():
        array = fed[info.name]
        kept[info.name] = (
            onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx.TensorProto.BFLOAT16)
            if info.type == BFLOAT16
            else onnxruntime.OrtValue.ortvalue_from_numpy(array)
        )
        binding.bind_ortvalue_input(info.name, kept[info.name])
    outputs: dict[str, Any] = {}
    for info in session.get_outputs():
        if info.type == BFLOAT16:
            shape = [{"M": TOKENS}.get(dim, dim) for dim in info.shape]
            outputs[info.name] = np.zeros(shape, np.uint16)
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                outputs[info.name], onnx.TensorProto.BFLOAT16
            )
            kept[info.name] = value
            binding.bind_ortvalue_output(info.name, value)
        else:
            binding.bind_output(info.name)
    session.run_with_iobinding(binding)
    for info, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
        if info.type == BFLOAT16:
            outputs[info.name] = (outputs[info.name].astype(np.uint32) << 16).view(np.float32)
        else:
            outputs[info.name] = value.numpy()
    return outputs


def test_it_runs_from_the_file_alone(files: list[Path], tmp_path: Path) -> None:
    """Outside its bundle; all outputs have the declared shape, are finite, and not constant."""
    for path in (files[0], files[-1]):
        alone = tmp_path / "alone.axmodel"
        alone.write_bytes(path.read_bytes())
        session = onnxruntime.InferenceSession(alone, providers=["CPUExecutionProvider"])
        outputs = run(session, feeds(session, 1))
        for info in session.get_outputs():
            assert list(outputs[info.name].shape) == [{"M": TOKENS}.get(dim, dim) for dim in info.shape]
            assert np.isfinite(outputs[info.name]).all()
            assert np.ptp(outputs[info.name].astype(np.float64)) > 0


@pytest.mark.parametrize("weight_type", ["fp32", "s8", "s4", "fp8_e4m3"])
def test_onnxruntime_agrees_with_onnx_s_reference(build_tiny: Builder, weight_type: str) -> None:
    """The reference evaluator shares no code with onnxruntime.

    By default onnxruntime rounds activations to 8 bits for products with 8-bit weights (accuracy level 4).
    """
    bundle = build_tiny(hidden_state_type="fp32", weight_type=weight_type, post_topk=3)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    files = sorted(bundle.glob("*.axmodel"))
    for path in (files[0], files[-1]):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        fed = feeds(session, 2)
        ours = run(session, fed)
        reference = ReferenceEvaluator(onnx.load(path))
        for name, expected in zip(reference.output_names, reference.run(None, fed), strict=True):
            np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# The schema

MESSAGES: dict[str, Any] = {
    "Model": onnx.ModelProto,
    "OperatorSetId": onnx.OperatorSetIdProto,
    "StringStringEntry": onnx.StringStringEntryProto,
    "Graph": onnx.GraphProto,
    "Node": onnx.NodeProto,
    "Attribute": onnx.AttributeProto,
    "Tensor": onnx.TensorProto,
    "ValueInfo": onnx.ValueInfoProto,
    "Type": onnx.TypeProto,
    "TensorType": onnx.TypeProto.Tensor,
    "Shape": onnx.TensorShapeProto,
    "Dimension": onnx.TensorShapeProto.Dimension,
}


def kinds(descriptor: Any) -> set[str]:
    """The types that our schema may have for a field; messages that are not parsed may be bytes."""
    if descriptor.message_type is not None:
        ours = {proto.DESCRIPTOR.full_name: name for name, proto in MESSAGES.items()}
        return {ours.get(descriptor.message_type.full_name, "bytes"), "bytes"}
    integers = {descriptor.TYPE_INT32, descriptor.TYPE_INT64, descriptor.TYPE_UINT64, descriptor.TYPE_ENUM}
    names = {descriptor.TYPE_STRING: "string", descriptor.TYPE_BYTES: "bytes", descriptor.TYPE_FLOAT: "float"}
    return {"int"} if descriptor.type in integers else {names[descriptor.type]}


@pytest.mark.parametrize("message", wire.SCHEMA)
def test_the_schema_matches_onnx(message: str) -> None:
    theirs = MESSAGES[message].DESCRIPTOR.fields_by_number
    for number, field in wire.SCHEMA[message].items():
        assert field.name == theirs[number].name
        assert field.repeated == theirs[number].is_repeated, field
        assert field.kind in kinds(theirs[number]), field


# Damage


@pytest.fixture(scope="module")
def structure(tmp_path_factory: pytest.TempPathFactory, build_tiny: Builder) -> bytes:
    """A layer with few weights, so that mutations mostly hit the structure."""
    folder = tmp_path_factory.mktemp("synth") / "minute"
    config = shapes.config_json("qwen2-0.5b")
    config |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    synth.synth("qwen2-0.5b", folder, config=config)
    bundle = build_tiny(input_path=folder, prefill_len=2, kv_cache_len=3, last_kv_cache_len=())
    return (bundle / "qwen2_p2_l0_together.axmodel").read_bytes()


def mutated(data: bytes, seed: int) -> bytes:
    """Random damage: bytes changed, a piece removed, duplicated or moved, or the end truncated."""
    rng = random.Random(seed)
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(out))
        length = rng.randrange(1, 40)
        match rng.randrange(6):
            case 0 | 1 | 2:
                out[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256), out[at] ^ (1 << rng.randrange(8))])
            case 3:
                del out[max(at, 1) : at + length]
            case 4:
                out[at:at] = out[at : at + length]
            case 5:
                del out[max(at, 1) :]
    return bytes(out)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_the_reader_survives_damaged_files(structure: bytes, seed: int, tmp_path: Path) -> None:
    data = mutated(structure, seed)
    with contextlib.suppress(wire.WireError, ValueError, KeyError, TypeError):
        axmodel.parse(memoryview(data))
    path = tmp_path / "damaged.axmodel"
    path.write_bytes(data)
    with contextlib.suppress(BadInput):
        axmodel.read(path)
        inspect.as_text(path)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    try:
        parsed = axmodel.parse(memoryview(data))
    except (wire.WireError, ValueError, KeyError, TypeError):
        return
    assert not parsed.ours
