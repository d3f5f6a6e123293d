"""Quantised folders: our reading beside what was packed, a second reading and transformers, and what is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from axc import build, checkpoints, config, weights
from axc.checkpoints import Checkpoint
from axc.checkpoints.quantised import matrix
from axc.doctor.case import Case, Options
from axc.graph import Graph
from axc.reference import Reference
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.model import Model
from tests.axc import quantised_files
from tests.axc.as_transformers import IDS, plan, same
from tests.axc.axc import assert_done, axc, llm_build
from tests.axc.quantised_files import FLOATS, FORMS

Floats = NDArray[np.float32]
Made = Callable[[str], tuple[Path, dict[str, Floats]]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder of each form, made once, and the values that it holds."""
    folder, known = tmp_path_factory.mktemp("quantised"), dict[str, dict[str, Floats]]()

    def make(name: str) -> tuple[Path, dict[str, Floats]]:
        if name not in known:
            known[name] = quantised_files.write(folder / name, FORMS[name])
        return folder / name, known[name]

    return make


def bits(values: Floats) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize("name", FORMS)
def test_every_value_to_the_last_bit(made: Made, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, in blocks and in odd runs of rows, and the second reading, in transformers' model."""
    monkeypatch.setattr(matrix, "BAND", 1 << 12)  # a packed matrix is transposed in several bands
    folder, expected = made(name)
    checkpoint, reference = Checkpoint.open(folder), Reference(folder)
    assert len(expected) == 14
    for tensor, values in expected.items():
        assert checkpoint.tensors[tensor].packed
        for start, block in checkpoint.blocks(tensor):
            assert np.array_equal(bits(block), bits(values[start : start + len(block)]))
        for start, stop in ((11, 30), (29, len(values)), (0, 9)):  # across bands, and back
            assert np.array_equal(bits(checkpoint.rows(tensor, start, stop)), bits(values[start:stop]))
        assert np.array_equal(bits(reference.weight(tensor)), bits(values))
    assert "dequantised by axc.quantised_reading" in reference.remarks[0]


BESIDE: dict[str, dict[str, str]] = {
    "quantize_config.json": {},
    "quant_config.json": {"bits": "w_bit", "group_size": "q_group_size"},
}


def older(folder: Path, new: Path, name: str, weights: str) -> Path:
    """A copy of a folder as early AutoGPTQ and AutoAWQ wrote it: settings and weights of these names."""
    shutil.copytree(folder, new)
    says = json.loads((new / "config.json").read_text())
    settings = {BESIDE[name].get(key, key): value for key, value in says.pop("quantization_config").items()}
    del settings["quant_method"]
    (new / "config.json").write_text(json.dumps(says))
    (new / name).write_text(json.dumps(settings))
    (new / "model.safetensors").rename(new / weights)
    return new


@pytest.mark.parametrize(
    ("form", "name", "weights"),
    [
        ("gptq-asymmetric", "quantize_config.json", "gptq_model-4bit-64g.safetensors"),
        ("gptq-desc_act", "quantize_config.json", "model.safetensors"),
        ("awq", "quant_config.json", "model.safetensors"),
        ("awq-128", "quant_config.json", "awq_model_w4_g128.safetensors"),
    ],
)
def test_settings_in_a_file_beside_config_json(made: Made, tmp_path: Path, form: str, name: str, weights: str) -> None:
    folder, expected = made(form)
    beside = older(folder, tmp_path / "older", name, weights)
    checkpoint, reference, said = Checkpoint.open(beside), Reference(beside), list[str]()
    config.load(checkpoint, say=said.append)
    assert any(f"as {name} says" in line for line in said), said
    for tensor, values in expected.items():
        assert np.array_equal(bits(checkpoint.rows(tensor, 0, len(values))), bits(values))
        assert np.array_equal(bits(reference.weight(tensor)), bits(values))
    one, other = (
        build.build(plan(path, tmp_path / path.name / "out", weight_type=None)).manifest for path in (folder, beside)
    )
    assert {file for file in one["files"] if one["files"][file] != other["files"][file]} == {"hf/config.json"}
    assert name in other["inputs"], list(other["inputs"])


def test_settings_beside_float_weights_are_not_read(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path / "floats")
    (tmp_path / "floats" / "quantize_config.json").write_text("left over")
    assert not Checkpoint.open(tmp_path / "floats").matrices
    assert not Reference(tmp_path / "floats").remarks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_config.json": {"w_bit": 4}}, "quantize_config.json and quant_config.json say; which is meant?"),
        ({"quantize_config.json": {"bits": 4, "quant_method": "awq"}}, "quant_method 'awq'; expected gptq"),
        ({"quantize_config.json": {"bits": 3, "group_size": 64}}, "quantize_config.json has bits 3; expected 4 or 8"),
        ({"quantize_config.json": {"bits": 4, "group_size": 64, "rotation": "x"}}, "has rotation 'x'"),
        ({"quantize_config.json": [4]}, "holds a list, expected a JSON object"),
        ({"gptq_model-4bit-32g.safetensors": {}}, "holds no weights that can be read, but quantised weights of"),
    ],
)
def test_odd_settings_beside(made: Made, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    name = "gptq_model-4bit-64g.safetensors"
    beside = older(made("gptq-asymmetric")[0], tmp_path / "older", "quantize_config.json", name)
    for file, values in changes.items():
        (beside / file).write_text(json.dumps(values))
    with pytest.raises(BadInput) as error:
        Checkpoint.open(beside)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def dequantised(model: onnx.ModelProto, weight: str) -> Floats:
    """By onnx's reference evaluator, columns in the checkpoint's order where the input is gathered."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.startswith(weight)}
    (node,) = (node for node in model.graph.node if node.op_type == "DequantizeLinear" and weight in node.input)
    casts = [other for other in model.graph.node if other.op_type == "Cast" and other.input[0] in stored]
    output = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([*casts, node], "weight", [], [output], [*stored.values()])
    made: Any = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=model.opset_import)).run(None, {})
    values = np.empty_like(made[0], np.float32)
    values[:, gathered(model, node.output[0])] = made[0]
    return values


def gathered(model: onnx.ModelProto, matrix: str) -> Any:
    """The order in which the input of a product with a matrix is gathered."""
    made_by = {name: other for other in model.graph.node for name in other.output}
    (transpose,) = (other for other in model.graph.node if other.input[0] == matrix)
    (product,) = (other for other in model.graph.node if transpose.output[0] in other.input)
    gather = made_by[product.input[0]]
    orders = [
        tensor for tensor in model.graph.initializer if gather.op_type == "Gather" and tensor.name in gather.input
    ]
    return numpy_helper.to_array(orders[0]) if orders else slice(None)


@pytest.mark.parametrize("name", [name for name in FORMS if name not in FLOATS])
def test_levels_and_scales_are_kept_to_the_last_bit(
    made: Made, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX's DequantizeLinear of the axmodel; and the whole model beside transformers'. Read a few rows at a time."""
    for module in (checkpoints, weights):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 24 * 128)
    folder, expected = made(name)
    planned = plan(folder, tmp_path / "out", weight_type=None)
    assert len(planned.kept) == 14
    assert planned.target.weight_type == f"s{FORMS[name].bits}"
    narrow = {name for name, found in planned.kept.items() if found.dtype == "INT4"}  # down_proj may have other bits
    down = FORMS[name].down or FORMS[name]
    assert len(narrow) == 12 * (FORMS[name].bits == 4) + 2 * (down.bits == 4)
    manifest = build.build(planned).manifest
    assert manifest["accuracy"]["weight_error"] == {}
    model = onnx.load(tmp_path / "out" / "llama_p16_l1_together.axmodel")
    mlp = "model.layers.1.mlp"
    order = Checkpoint.open(folder).order(f"{mlp}.down_proj.weight") if FORMS[name].index else slice(None)
    for weight, rows, columns in (
        ("model.layers.1.self_attn.k_proj.weight", slice(None), slice(None)),
        (f"{mlp}.gate_proj.weight", order, slice(None)),  # rows follow the columns of down: nothing is gathered
        (f"{mlp}.up_proj.weight", order, slice(None)),
        (f"{mlp}.down_proj.weight", slice(None), order),
    ):
        assert np.array_equal(bits(dequantised(model, weight)), bits(expected[weight][rows][:, columns]))
    logits = Model.load(Bundle.open(tmp_path / "out")).forward(IDS.tolist(), 0, logits="all")
    expected_logits = Reference(folder).logits(IDS)  # activations have 16 bits where the engine computes in integers
    assert np.abs(logits - expected_logits).max() <= 2e-3 * np.abs(expected_logits).max()


@pytest.mark.parametrize(
    "name", ["gptq-desc_act-asymmetric", "gptq-mixed", "awq", "ct-int4-asymmetric", "ct-int8-plain"]
)
def test_rows_of_a_matrix_are_kept_to_the_last_bit(tmp_path: Path, name: str) -> None:
    """Phi-3 stores q, k and v as one matrix, gate and up as another; an axmodel has one for each."""
    folder, output = tmp_path / "phi3", tmp_path / "out"
    expected = quantised_files.write(folder, FORMS[name], kind="phi3")
    planned = plan(folder, output, weight_type=None)
    assert len(planned.kept) == 14
    assert build.build(planned).manifest["accuracy"]["weight_error"] == {}
    assert Case(Options(output, folder)).kept == planned.kept
    model = onnx.load(output / "phi3_p16_l1_together.axmodel")
    order = Checkpoint.open(folder).order("model.layers.1.mlp.down_proj.weight") if FORMS[name].index else slice(None)
    for fused, parts in (
        ("self_attn.qkv_proj", {"q": 128, "k": 64, "v": 64}),
        ("mlp.gate_up_proj", {"gate": 256, "up": 256}),
    ):
        rest = expected[f"model.layers.1.{fused}.weight"]
        for part, rows in parts.items():
            weight = f"model.layers.1.{fused.partition('.')[0]}.{part}_proj.weight"
            wanted, rest = rest[:rows], rest[rows:]
            assert np.array_equal(bits(dequantised(model, weight)), bits(wanted[order] if rows == 256 else wanted))
        assert len(rest) == 0
    logits = Model.load(Bundle.open(output)).forward(IDS.tolist(), 0, logits="all")
    wanted = Reference(folder).logits(IDS)
    assert np.abs(logits - wanted).max() <= 2e-3 * np.abs(wanted).max()


FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    ("form", "scheme", "scales", "said"),
    [
        ("fp8-tensor", "static", ("self_attn.k_scale", "self_attn.v_scale"), "KV cache (4 scales): not read"),
        ("fp8-tensor", None, ("self_attn.kv_scale",), "KV cache (2 scales): not read"),
        ("fp8-tensor", None, ("self_attn.k_proj.output_scale",), ""),  # as the scales of other activations
        ("ct-int4", FP8_CACHE, ("self_attn.k_scale", "self_attn.v_scale"), "KV cache (4 scales): not read"),
        ("ct-int4", {**FP8_CACHE, "dynamic": True}, (), "KV cache: not read"),
    ],
)
def test_scales_of_the_kv_cache(
    made: Made, tmp_path: Path, form: str, scheme: Any, scales: tuple[str, ...], said: str
) -> None:
    folder, types = tmp_path / "folder", {"weight_type": "s8" if form in FLOATS else None}
    shutil.copytree(made(form)[0], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{layer}.{name}": torch.tensor([0.5]) for layer in (0, 1) for name in scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    says = json.loads((folder / "config.json").read_text())
    says["quantization_config"]["kv_cache_scheme"] = scheme
    (folder / "config.json").write_text(json.dumps(says))
    one, other = (plan(path, tmp_path / f"out-{path.name}", **types) for path in (made(form)[0], folder))
    added = [line for line in other.notices if line not in one.notices]
    assert [said in line for line in added] == [True] * bool(said)
    files, beside = build.build(one).manifest["files"], build.build(other).manifest["files"]
    assert {name for name in files if files[name] != beside[name]} <= {"hf/config.json"}
    assert np.array_equal(Reference(folder).logits(IDS), Reference(made(form)[0]).logits(IDS))


def test_matrices_of_one_order_share_the_gathered_input(made: Made, tmp_path: Path) -> None:
    build.build(plan(made("gptq-desc_act")[0], tmp_path / "out", weight_type=None))
    model = onnx.load(tmp_path / "out" / "llama_p16_l0_together.axmodel")
    gathers = [  # others look rotary tables up
        node
        for node in model.graph.node
        if node.op_type == "Gather" and any((field.name, field.i) == ("axis", -1) for field in node.attribute)
    ]
    readers = [[node.op_type for node in model.graph.node if made.output[0] in node.input] for made in gathers]
    assert readers == [["MatMul"] * 3, ["MatMul"], ["MatMul"] * 2]  # q, k and v; o; gate and up. down gathers none


def test_rows_of_gate_and_up_follow_down_bit_by_bit(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same logits as when the input of down is gathered; with biases, and by both engines."""
    folder = tmp_path / "folder"
    quantised_files.write(folder, FORMS["gptq-desc_act-asymmetric"], mlp_bias=True)
    build.build(plan(folder, tmp_path / "one", weight_type=None))
    linear = Graph.linear
    monkeypatch.setattr(Graph, "linear", lambda graph, x, name, **_: linear(graph, x, name))
    build.build(plan(folder, tmp_path / "other", weight_type=None))
    monkeypatch.undo()
    for engine in ("ax", "ort"):
        one, other = (
            Model.load(Bundle.open(tmp_path / name), engine=engine).forward(IDS.tolist(), 0, logits="all")
            for name in ("one", "other")
        )
        assert np.array_equal(bits(one), bits(other)), engine
    wanted = Reference(folder).logits(IDS)
    assert np.abs(one - wanted).max() <= 2e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("name", FLOATS)
def test_what_no_type_holds_is_refused_until_it_is_asked_for(made: Made, tmp_path: Path, name: str) -> None:
    folder, _ = made(name)
    with pytest.raises(BadInput, match=r"is stored as .*fp8, which .*\n.*--weight_type s8"):
        plan(folder, tmp_path / "out", weight_type=None)
    planned = plan(folder, tmp_path / "out", weight_type="s8")
    (note,) = planned.notices
    assert note.endswith("fp8 dequantised, and stored again as s8: not exact")
    logits = Model.load(Bundle.open(_built(folder, tmp_path / "fp32"))).forward(IDS.tolist(), 0, logits="all")
    assert same(logits, Reference(folder).logits(IDS))


def test_what_is_asked_for_a_mixture_of_bits(made: Made, tmp_path: Path) -> None:
    """-w s4 keeps the wider levels too, -w s8 all in 8 bits; and the doctor expects the same of both bundles."""
    folder = made("gptq-mixed")[0]
    for asked, narrow in ((None, 12), ("s4", 12), ("s8", 0)):
        planned = plan(folder, tmp_path / f"{asked}", weight_type=asked)
        assert len(planned.kept) == 14
        assert sum(found.dtype == "INT4" for found in planned.kept.values()) == narrow
        build.build(planned)
        case = Case(Options(planned.output, folder))
        assert case.kept == planned.kept
    assert plan(made("gptq-8")[0], tmp_path / "out", weight_type="s4").kept == {}


def _built(folder: Path, output: Path) -> Path:
    build.build(plan(folder, output))
    return output


def test_build_check_and_doctor(pristine: Path, tmp_path: Path) -> None:
    """With zero points, and with groups that are contiguous in another order of the columns only."""
    folder, output = tmp_path / "gptq", tmp_path / "out"
    quantised_files.quantised(pristine, folder, FORMS["gptq-desc_act-asymmetric"])
    built = llm_build(folder, output, "--prefill_len", 16, "--kv_cache_len", 63, "--check_level", 2)
    assert_done(built)
    assert "matrices stored as GPTQ 4-bit kept as s4: the same levels and scales" in built.out
    examined = axc("doctor", output, "--checkpoint", folder)
    assert examined.code == 0, examined
    assert "healthy: all 10 stages agree" in examined.out


def test_the_bytes_do_not_depend_on_the_number_of_processes(made: Made, tmp_path: Path) -> None:
    folder, _ = made("gptq-desc_act")
    first, second = (
        build.build(plan(folder, tmp_path / str(n), weight_type=None, parallel=n)).manifest["files"] for n in (1, 2)
    )
    assert first == second
