"""Graphs that the compiler does not write: results match onnxruntime, or both refuse the graph.

Some are random graphs of the format's operators, some are layers of the compiler with one change, so that they almost
match a pattern that the engine fuses.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from axrun.errors import BadInput, NotFinite
from axrun.format import axmodel
from axrun.format.axmodel import OPSET, PRODUCER, Axmodel, Node, Tensor, TensorInfo, encode
from axrun.format.bundle import Bundle
from axrun.format.dtypes import FLOATS, NAMES, nbytes, to_float32
from axrun.session.ort import OrtSession
from tests.engine.compare import filled

WIDTH = 8
TOLERANCE = {"FLOAT": 5e-3, "BFLOAT16": 5e-2}  # tolerance for rounded activations; a wrong graph differs by more
FLOAT, FLOAT16, BFLOAT16, INT32 = 1, 10, 16, 6  # TensorProto.DataType


def plain(path: Path) -> OrtSession:
    """The unchanged file in onnxruntime, without fusing."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return OrtSession(axmodel.read(path), session)


def outcome(ax: Any, model: Axmodel, path: Path, groups: Sequence[int]) -> str:
    """`same`, `refused` by both, or `only here` if onnxruntime lacks a kernel. Fails otherwise."""
    path.write_bytes(encode(model))
    reference, why = None, ""
    try:
        reference = plain(path)
    except Exception as error:  # onnxruntime's have no common class
        why = str(error)
    try:
        ours = ax.open_session(path)
    except BadInput as error:
        fails = reference is None or not runs(reference, groups)
        stricter = re.search(STRICTER, str(error))
        return "refused" if stricter or (fails and re.search("0x8006000a: .|0x80060014: .", str(error))) else str(error)
    if reference is None:
        return "only here" if re.search(ONLY_HERE, why) else why
    tolerance = TOLERANCE[next(info.dtype for info in model.inputs if info.name == "input")]
    for group in groups:
        seen = filled(ours, group)
        wanted = {name: array.copy() for name, array in seen.items()}
        try:
            reference.bind(group, wanted).run()
        except NotFinite:
            return "not finite"
        ours.bind(group, seen).run()
        for info in ours.groups[group].outputs:
            a, b = (numbers(arrays[info.name], info.dtype) for arrays in (seen, wanted))
            limit = tolerance * max(1.0, float(np.abs(b).max()))
            assert np.abs(a - b).max() <= limit, (info, [dataclasses.astuple(node) for node in model.nodes])
    return "same"


# onnxruntime has no kernels for some types, and for values of another type than the keys
ONLY_HERE = r"NOT_IMPLEMENTED|Type parameter \(T\) of Optype \(MatMul\) bound to different types"
# allowed by onnxruntime, but not by the standard
STRICTER = "a scale or bias .* for "


def runs(session: OrtSession, groups: Sequence[int]) -> bool:
    try:
        for group in groups:
            session.bind(group, filled(session, group)).run()
    except NotFinite:
        return True
    except Exception:  # onnxruntime's have no common class
        return False
    return True


def numbers(array: Any, dtype: str) -> Any:
    return to_float32(array, dtype) if dtype in FLOATS.values() else array


class Graph:
    """A graph under construction; `rows`: its float32 values [1, M, width] by name."""

    def __init__(self, random: np.random.Generator, hidden: str) -> None:
        self.random, self.hidden = random, hidden
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {"input": WIDTH} if hidden == "FLOAT" else {}
        if hidden != "FLOAT":
            self.add("Cast", ["input"], WIDTH, to=FLOAT)

    def add(self, op: str, inputs: list[str], width: int, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(Node(op, tuple(inputs), (name,), attributes))
        self.rows[name] = width
        return name

    def constant(self, shape: tuple[int, ...], dtype: str = "FLOAT", scale: float = 1.0) -> str:
        name = f"c{len(self.tensors)}"
        if dtype == "FLOAT":
            data: Any = scale * self.random.standard_normal(shape).astype(np.float32)
        elif dtype == "BFLOAT16":
            data = self.random.integers(0x3E00, 0x3F80, shape).astype(np.uint16)
        else:
            data = self.random.integers(-100, 100, shape).astype(np.int8)
        self.tensors[name] = Tensor(name, dtype, shape, -1, nbytes(dtype, shape), memoryview(data.tobytes()))
        return name

    def pick(self, width: int = 0) -> str:
        """Usually a recent value."""
        names = [name for name, seen in self.rows.items() if width in (0, seen)]
        return names[-1 - int(self.random.integers(0, min(len(names), 3)))] if names else ""

    def either(self, *choices: Any) -> Any:
        return choices[int(self.random.integers(0, len(choices)))]

    def transposed(self, rows: int, columns: int) -> str:
        """A weight for MatMul, stored in one of the forms; sometimes not transposed."""
        kind = self.either("FLOAT", "BFLOAT16", "INT8")
        if self.random.random() < 0.1 and rows == columns:
            return self.constant((rows, columns))
        name = self.constant((rows, columns), kind)
        if kind == "INT8":
            scales = self.constant(self.either((rows,), (rows,), (columns,), (1,)), scale=0.02)
            name = self.raw("DequantizeLinear", [name, scales], axis=self.either(0, 0, 0, 1))
        elif kind == "BFLOAT16":
            name = self.raw("Cast", [name], to=FLOAT)
        perm = self.either((1, 0), (1, 0), (1, 0), (0, 1)) if rows == columns else (1, 0)
        return self.raw("Transpose", [name], perm=perm)

    def raw(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = self.add(op, inputs, 0, **attributes)
        del self.rows[name]
        return name

    def swapped(self, one: str, other: str) -> list[str]:
        return [one, other] if self.random.random() < 0.5 else [other, one]

    def model(self) -> Axmodel:
        names = list(self.rows)
        kept = {names[-1], *(name for name in names if self.random.random() < 0.2)} - {"input"}
        outputs = [TensorInfo(name, "FLOAT", (1, "M", self.rows[name])) for name in sorted(kept)]
        metadata = {"axmodel.version": "1", "axmodel.kind": "post"}
        metadata["axmodel.groups"] = '[{"tokens":1,"history":0},{"tokens":3,"history":0}]'
        inputs = (TensorInfo("input", self.hidden, (1, "M", WIDTH)),)
        return Axmodel(
            PRODUCER, "test", OPSET, metadata, inputs, tuple(outputs), tuple(self.nodes), self.tensors, "random"
        )


def linear(g: Graph) -> None:
    x = g.pick()
    rows = g.either(WIDTH, WIDTH, 5)
    y = g.add("MatMul", [x, g.transposed(rows, g.rows[x])], rows)
    if g.random.random() < 0.6:
        y = g.add("Add", g.swapped(y, g.constant(g.either((rows,), (rows,), (rows,), (1,), (1, rows)))), rows)
    if g.random.random() < 0.6:
        g.add(g.either("Add", "Add", "Mul"), g.swapped(y, g.pick(rows)), rows)


def with_constant(g: Graph) -> None:
    x = g.pick()
    width = g.rows[x]
    shape = g.either((width,), (width,), (width,), (1,), (1, width), (1, 1, width), (1, 1, 1))
    g.add(g.either("Mul", "Add", "Mul", "Sub"), g.swapped(x, g.constant(shape)), width)


def of_two(g: Graph) -> None:
    x = g.pick()
    g.add(g.either("Mul", "Add"), g.swapped(x, g.pick(g.rows[x])), g.rows[x])


def norm(g: Graph) -> None:
    x = g.pick()
    attributes = g.either({}, {"axis": -1}, {"axis": 2}, {"axis": 1}, {"epsilon": 0.5}, {"epsilon": 1e-6})
    g.add("RMSNormalization", [x, g.constant(g.either((g.rows[x],), (g.rows[x],), (1,)))], g.rows[x], **attributes)


def silu(g: Graph) -> None:
    gate = g.pick()
    width = g.rows[gate]
    sigmoid = g.add("Sigmoid", [g.either(gate, gate, gate, g.pick(width))], width)
    inner = g.add(g.either("Mul", "Mul", "Add"), g.swapped(gate, sigmoid), width)
    up = g.either(g.pick(width), g.pick(width), gate, inner, sigmoid, g.constant((width,)))
    outer = g.swapped(inner, up)
    g.add(g.either("Mul", "Mul", "Mul", "Add"), outer, width)
    if g.random.random() < 0.2:
        g.add("Add", [g.either(sigmoid, inner, gate), f"v{len(g.nodes) - 1}"], width)


def gated(g: Graph) -> None:
    """Gate and up of the same input, which the engine fuses."""
    x = g.pick()
    gate, up = (g.add("MatMul", [x, g.transposed(WIDTH, g.rows[x])], WIDTH) for _ in range(2))
    if g.random.random() < 0.3:
        up = g.add("Add", g.swapped(up, g.constant((WIDTH,))), WIDTH)
    read = g.either((gate, gate), (gate, gate), (gate, up), (up, gate))
    inner = g.add("Mul", g.swapped(read[0], g.add("Sigmoid", [read[1]], WIDTH)), WIDTH)
    g.add("Mul", g.swapped(inner, g.either(up, up, gate)), WIDTH)


def cast(g: Graph) -> None:
    x = g.pick()
    there = g.raw("Cast", [x], to=g.either(BFLOAT16, FLOAT16, FLOAT))
    g.add("Cast", [there], g.rows[x], to=FLOAT)


def unary(g: Graph) -> None:
    x = g.pick()
    if g.random.random() < 0.5:
        g.add("Sigmoid", [x], g.rows[x])
    else:
        g.add("Softmax", [x], g.rows[x], axis=g.either(-1, 2, 1))


PARTS: tuple[Callable[[Graph], None], ...] = (linear, linear, with_constant, of_two, norm, silu, gated, cast, unary)


@pytest.mark.parametrize("hidden", ["FLOAT", "BFLOAT16"])
def test_random_graphs_are_computed_or_refused(hidden: str, ax: Any, tmp_path: Path) -> None:
    ends = []
    for seed in range(500):
        graph = Graph(np.random.default_rng(seed), hidden)
        for _ in range(int(graph.random.integers(1, 4))):
            PARTS[int(graph.random.integers(0, len(PARTS)))](graph)
        ends.append(outcome(ax, graph.model(), tmp_path / "graph.axmodel", (0, 1)))
    assert set(ends) <= {"same", "refused", "only here", "not finite"}
    assert ends.count("same") > 400


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_a_constant_vector_is_added_or_multiplied(op: str, swap: bool, ax: Any, tmp_path: Path) -> None:
    graph = Graph(np.random.default_rng(0), "FLOAT")
    inputs = ["input", graph.constant((WIDTH,))]
    graph.add(op, inputs[::-1] if swap else inputs, WIDTH)
    assert outcome(ax, graph.model(), tmp_path / "graph.axmodel", (0, 1)) == "same"


ATTRIBUTES: dict[str, tuple[Any, ...]] = {
    "axis": (0, 1, 2, -1, -2),
    "epsilon": (1e-6, 0.25),
    "num_heads": (1, 2, 4, 8),
    "q_num_heads": (1, 2, 4, 8),
    "kv_num_heads": (1, 2, 4),
    "scale": (1.0, 0.1),
    "perm": ((0, 1), (1, 0)),
    "to": (FLOAT, BFLOAT16, FLOAT16, INT32),
    "interleaved": (0, 1),
    "rotary_embedding_dim": (0, 8),
    "stash_type": (1,),
    "block_size": (0, 16, 32, 64),
    "is_causal": (1,),
}
ADDED = {
    "RotaryEmbedding": "interleaved",
    "Attention": "is_causal",
    "RMSNormalization": "axis",
    "DequantizeLinear": "axis",
}


def mutated(random: np.random.Generator, model: Axmodel, shown: dict[str, TensorInfo]) -> Axmodel:
    """The model with one change. `shown`: its values [1, M, width], which may become outputs or replace inputs."""
    nodes, outputs = list(model.nodes), list(model.outputs)
    at = int(random.integers(0, len(nodes)))
    node = nodes[at]
    kind = int(random.integers(0, 6))
    if kind == 0:  # operands in another order
        nodes[at] = dataclasses.replace(node, inputs=tuple(random.permutation(node.inputs).tolist()))
    elif kind == 1:  # another attribute
        name = ADDED.get(node.op_type, "axis") if random.random() < 0.3 else ""
        name = name or (
            sorted(node.attributes)[int(random.integers(0, len(node.attributes)))] if node.attributes else ""
        )
        if name in ATTRIBUTES:
            value = ATTRIBUTES[name][int(random.integers(0, len(ATTRIBUTES[name])))]
            nodes[at] = dataclasses.replace(node, attributes={**node.attributes, name: value})
    elif kind == 2:  # an intermediate value becomes an output
        inner = [info for name, info in shown.items() if name not in {output.name for output in outputs}]
        outputs.append(inner[int(random.integers(0, len(inner)))])
    elif kind == 3:  # another value replaces an input
        made = {name for earlier in nodes[:at] for name in earlier.outputs} | {info.name for info in model.inputs}
        known = {**shown, **{info.name: info for info in model.inputs}}
        places = [i for i, name in enumerate(node.inputs) if name in known]
        if places:
            place = places[int(random.integers(0, len(places)))]
            given = known[node.inputs[place]]
            others = [name for name, info in known.items() if name in made and info.shape == given.shape]
            inputs = list(node.inputs)
            inputs[place] = str(random.choice(sorted(others))) if others else inputs[place]
            nodes[at] = dataclasses.replace(node, inputs=tuple(inputs))
    elif kind == 4:  # an additional operator
        places = [i for i, name in enumerate(node.inputs) if name in shown and shown[name].dtype == "FLOAT"]
        if places:
            place = places[int(random.integers(0, len(places)))]
            name = node.inputs[place]
            inputs = [f"{name}.between" if i == place else seen for i, seen in enumerate(node.inputs)]
            op = [
                ("Sigmoid", (name,), {}),
                ("Add", (name, name), {}),
                ("Cast", (name,), {"to": FLOAT}),
                ("Mul", (name, name), {}),
            ]
            chosen = op[int(random.integers(0, len(op)))]
            nodes[at] = dataclasses.replace(node, inputs=tuple(inputs))
            nodes.insert(at, Node(chosen[0], chosen[1], (f"{name}.between",), chosen[2]))
    else:  # another operator
        other = {"Add": "Mul", "Mul": "Add", "Sigmoid": "Softmax", "RMSNormalization": "LayerNormalization"}
        nodes[at] = dataclasses.replace(node, op_type=other.get(node.op_type, node.op_type))
    return dataclasses.replace(model, nodes=tuple(nodes), outputs=tuple(outputs))


def shown_values(path: Path) -> dict[str, TensorInfo]:
    """The intermediate values [1, M, width] of a layer, from onnx's shape inference."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    found = {}
    for info in model.graph.value_info:
        dims = [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
        kind = NAMES.get(info.type.tensor_type.elem_type, "")
        if len(dims) == 3 and dims[:2] == [1, "M"] and isinstance(dims[2], int) and dims[2]:
            found[info.name] = TensorInfo(info.name, kind, tuple(dims))
    return found


@pytest.mark.parametrize("bundle", ["bundle_fp32", "bundle_s8"])
def test_a_layer_with_one_change_is_computed_or_refused(
    bundle: str, ax: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = Bundle.open(request.getfixturevalue(bundle)).layer_path(1)
    model, shown = axmodel.read(path), shown_values(path)
    assert len(shown) > 10
    ends = []
    for seed in range(150):
        changed = mutated(np.random.default_rng(seed), model, shown)
        ends.append(outcome(ax, changed, tmp_path / "layer.axmodel", (0, 2)))
    assert set(ends) <= {"same", "refused", "only here", "not finite"}
    assert ends.count("same") > 50
    assert ends.count("refused") > 10
