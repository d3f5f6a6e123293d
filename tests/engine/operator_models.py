"""Cases of operators as axmodels, and patterns of several operators that the engine fuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from onnx import AttributeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from axrun.format.axmodel import OPSET, PRODUCER, Axmodel, Node, Tensor, TensorInfo, encode
from axrun.format.dtypes import DTYPES, nbytes
from tests.engine.operator_cases import Case, dtype_of, floats


@dataclass(frozen=True)
class Sample:
    """An axmodel with the bytes of its inputs and its expected outputs. `fused`: the fused step that must run."""

    op: str
    name: str
    model: bytes
    inputs: tuple[bytes, ...]
    outputs: tuple[Any, ...]
    rtol: float
    atol: float
    tokens: int = 1
    history: int = 0
    fused: str = ""


def packed(array: Any) -> bytes:
    """The bytes of an array; two 4-bit values share a byte, the first in the low nibble."""
    array = np.asarray(array)
    if array.dtype not in (ml_dtypes.int4, ml_dtypes.uint4):
        return np.ascontiguousarray(array).tobytes()
    flat = array.astype(np.int8).view(np.uint8).reshape(-1) & 15
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return bytes((flat[0::2] | flat[1::2] << 4).astype(np.uint8))


def initializer(name: str, array: Any) -> Tensor:
    dtype, dims = dtype_of(array), np.asarray(array).shape
    return Tensor(name, dtype, dims, -1, nbytes(dtype, dims), memoryview(packed(array)))


def attributes_of(node: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if attribute.type == AttributeProto.STRING:
            value = value.decode()
        made[attribute.name] = tuple(value) if attribute.type == AttributeProto.INTS else value
    return made


METADATA = {
    "axmodel.version": "1",
    "axmodel.kind": "post",
    "axmodel.groups": '[{"tokens":1,"history":0}]',
}


def sample(op: str, case: Case) -> Sample:
    """A case as a model of one node; inputs that kernels need at load time are initializers."""
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(case.inputs)]
    given = [
        (name, x)
        for i, (name, x) in enumerate(zip(names, case.inputs, strict=True))
        if name and i not in case.constants
    ]
    stored = {
        name: initializer(name, x)
        for i, (name, x) in enumerate(zip(names, case.inputs, strict=True))
        if name and i in case.constants
    }
    dummy = [] if given else [("unused", np.zeros(1, np.float32))]
    outputs = iter(case.outputs)
    named = [(f"y{i}" if name else "", next(outputs) if name else None) for i, name in enumerate(case.node.output)]
    model = Axmodel(
        PRODUCER,
        "test",
        OPSET,
        METADATA,
        tuple(TensorInfo(name, dtype_of(x), np.asarray(x).shape) for name, x in [*given, *dummy]),
        tuple(TensorInfo(name, dtype_of(y), np.asarray(y).shape) for name, y in named if name),
        (Node(op, tuple(names), tuple(name for name, _ in named), attributes_of(case.node)),),
        stored,
        "case",
    )
    inputs = tuple(packed(x) for _, x in [*given, *dummy])
    return Sample(op, case.name, encode(model), inputs, case.outputs, case.rtol, case.atol)


class Pattern:
    """A graph of several operators with symbolic dimensions M and T, and the reference evaluator's outputs."""

    def __init__(self, seed: int, tokens: int, history: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.sizes = {"M": tokens, "T": history, "T+M": history + tokens}
        self.nodes: list[Any] = []
        self.infos: list[tuple[str, str, tuple[Any, ...]]] = []
        self.arrays: dict[str, Any] = {}
        self.stored: dict[str, Any] = {}

    def input(self, name: str, *shape: Any, array: Any = None) -> str:
        sized = tuple(self.sizes.get(dim, dim) for dim in shape)
        self.arrays[name] = floats(self.random, *sized) if array is None else array
        self.infos.append((name, dtype_of(self.arrays[name]), shape))
        return name

    def constant(self, array: Any) -> str:
        name = f"c{len(self.stored)}"
        self.stored[name] = np.asarray(array)
        return name

    def vector(self, *shape: int) -> str:
        return self.constant(floats(self.random, *shape))

    def add(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def linear(self, x: str, rows: int, columns: int, kind: str = "s8") -> str:
        if kind == "s8":
            levels = self.random.integers(-127, 128, (rows, columns)).astype(np.int8)
            scales = self.constant((self.random.random(rows) * 0.01 + 0.001).astype(np.float32))
            weight = self.add("DequantizeLinear", self.constant(levels), scales, axis=0)
        elif kind == "bf16":
            values = floats(self.random, rows, columns).astype(ml_dtypes.bfloat16)
            weight = self.add("Cast", self.constant(values), to=TensorProto.FLOAT)
        else:
            weight = self.vector(rows, columns)
        return self.add("MatMul", x, self.add("Transpose", weight, perm=(1, 0)))

    def numbers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def sample(self, name: str, fused: str, outputs: Mapping[str, tuple[str, tuple[Any, ...]]], atol: float) -> Sample:
        infos = [
            helper.make_tensor_value_info(key, DTYPES[dtype].onnx, self.arrays[key].shape)
            for key, dtype, _ in self.infos
        ]
        made = [helper.make_tensor_value_info(key, DTYPES[dtype].onnx, None) for key, (dtype, _) in outputs.items()]
        stored = [
            helper.make_tensor(key, DTYPES[dtype_of(array)].onnx, array.shape, packed(array), raw=True)
            for key, array in self.stored.items()
        ]
        graph = helper.make_graph(self.nodes, name, infos, made, stored)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        answer = ReferenceEvaluator(proto).run(None, self.arrays)
        nodes = tuple(Node(n.op_type, tuple(n.input), tuple(n.output), attributes_of(n)) for n in self.nodes)
        model = Axmodel(
            PRODUCER,
            "test",
            OPSET,
            METADATA,
            tuple(TensorInfo(*info) for info in self.infos),
            tuple(TensorInfo(key, dtype, shape) for key, (dtype, shape) in outputs.items()),
            nodes,
            {key: initializer(key, array) for key, array in self.stored.items()},
            name,
        )
        inputs = tuple(packed(self.arrays[key]) for key, _, _ in self.infos)
        return Sample(
            fused or "plain", f"{name}{self.sizes}", encode(model), inputs, tuple(answer), 1e-4, atol,
            self.sizes["M"], self.sizes["T"], fused,
        )  # fmt: skip


def linear(tokens: int, kind: str, ends: str) -> Sample:
    p = Pattern(1, tokens)
    y = p.linear(p.input("input", 1, "M", 96), 24, 96, kind)
    if "bias" in ends:
        y = p.add("Add", p.vector(24), y)
    if "residual" in ends:
        y = p.add("Add", p.input("r", 1, "M", 24), y)
    if "norm" in ends:  # per head, as in Qwen3 and Gemma 3
        heads = p.add("Reshape", y, p.numbers(0, -1, 3, 8))
        heads = p.add("RMSNormalization", heads, p.vector(8), axis=-1, epsilon=1e-6)
        y = p.add("Reshape", heads, p.numbers(0, 0, -1))
    p.add("Mul", y, p.constant(np.float32(0.5)), name="output")
    return p.sample(f"linear-{kind}-{ends}", "linear", {"output": ("FLOAT", (1, "M", 24))}, 2e-3)


def gated(tokens: int, activation: str, together: bool) -> Sample:
    p = Pattern(2, tokens)
    x = p.input("input", 1, "M", 64)
    gate, up = (p.linear(x, 40, 64, "f32") if together else p.input(n, 1, "M", 40) for n in ("gate", "up"))
    bent = p.add("Mul", gate, p.add("Sigmoid", gate)) if activation == "silu" else ""
    bent = bent or p.add("Gelu", gate, approximate="tanh")
    p.add("Mul", bent, up, name="output")
    outputs: dict[str, tuple[str, tuple[Any, ...]]] = {"output": ("FLOAT", (1, "M", 40))}
    return p.sample(f"gated-{activation}-{together}", "linear" if together else "gated", outputs, 2e-4)


def angle_tables(p: Pattern, positions: str, half: int) -> tuple[str, str]:
    """cos and sin of each position from two small tables: cos(a + b) = cos a cos b - sin a sin b."""
    frequencies = 1.0 / 100.0 ** (np.arange(half) / half)
    high, low = (np.outer(16 * np.arange(8), frequencies), np.outer(np.arange(16), frequencies))
    sixteen = p.constant(np.array(16, np.int64))
    parts = []
    for op, angles in (("Div", high), ("Mod", low)):
        at = p.add(op, positions, sixteen)
        parts += [p.add("Gather", p.constant(f(angles).astype(np.float32)), at, axis=0) for f in (np.cos, np.sin)]
    ch, sh, cl, sl = parts
    cos = p.add("Sub", p.add("Mul", ch, cl), p.add("Mul", sh, sl))
    return cos, p.add("Add", p.add("Mul", sh, cl), p.add("Mul", ch, sl))


def rotary(tokens: int, cast: bool, tables: str, partial: int, interleaved: int, normed: bool = False) -> Sample:
    p = Pattern(3, tokens)
    x = p.input("input", 1, "M", 48)
    if normed:  # per head, as in Qwen3 and Gemma 3
        heads = p.add("Reshape", x, p.numbers(0, 0, 3, -1))
        heads = p.add("RMSNormalization", heads, p.vector(16), axis=-1, epsilon=1e-6)
        x = p.add("Reshape", heads, p.numbers(0, 0, -1))
    indices = p.input("indices", 1, "M", array=p.random.integers(0, 128, (1, tokens)).astype(np.uint32))
    positions = p.add("Cast", indices, to=TensorProto.INT64)
    half = (partial or 16) // 2
    attributes: dict[str, Any] = {"num_heads": 3, "interleaved": interleaved, "rotary_embedding_dim": partial}
    if tables == "sums":
        y = p.add("RotaryEmbedding", x, *angle_tables(p, positions, half), **attributes)
    else:
        y = p.add("RotaryEmbedding", x, p.vector(128, half), p.vector(128, half), positions, **attributes)
    p.add("Cast", y, name="output", to=TensorProto.FLOAT16 if cast else TensorProto.FLOAT)
    name = f"rotary-{cast}-{tables}-{partial}-{interleaved}-{normed}"
    dtype = "FLOAT16" if cast else "FLOAT"
    return p.sample(name, "rotary", {"output": (dtype, (1, "M", 48))}, 4e-3 if cast else 1e-5)


def norm(tokens: int, heads: int, residual: bool) -> Sample:
    p = Pattern(6, tokens)
    shape = (1, "M", heads, 40) if heads else (1, "M", 40)
    y = p.add("RMSNormalization", p.input("input", *shape), p.vector(40), axis=-1, epsilon=1e-5)
    if residual:
        y = p.add("Add", p.input("r", *shape), y)
    p.add("Cast", y, name="output", to=TensorProto.FLOAT)
    return p.sample(f"norm-{heads}-{residual}", "norm", {"output": ("FLOAT", shape)}, 1e-5)


def convert(tokens: int, width: int, given: Any, made: str) -> Sample:
    p = Pattern(7, tokens)
    x = p.input("input", 1, "M", width, array=floats(p.random, 1, tokens, width).astype(given))
    p.add("Cast", x, name="output", to=DTYPES[made].onnx)
    return p.sample(f"cast-{width}-{made}", "cast", {"output": (made, (1, "M", width))}, 0.0)


def attention(tokens: int, history: int, **attributes: Any) -> Sample:
    p = Pattern(4, tokens, history)
    k_cache, v_cache = (p.input(name, 1, "T", 32) for name in ("K_cache", "V_cache"))
    q = p.input("input", 1, "M", 64)
    k, v = (p.add("Mul", p.input(name, 1, "M", 32), p.vector(32)) for name in ("k", "v"))
    hidden = p.random.random((1, tokens, history + tokens)) < 0.3
    hidden[:, :, -1] = False
    mask = p.input("mask", 1, "M", "T+M", array=np.where(hidden, -65536, 0).astype(np.float32))
    keys, values = p.add("Concat", k_cache, k, axis=1), p.add("Concat", v_cache, v, axis=1)
    mask = p.add("Unsqueeze", mask, p.numbers(1))
    p.add("Attention", q, keys, values, mask, name="output", q_num_heads=4, kv_num_heads=2, **attributes)
    return p.sample(f"attention-{attributes}", "attention", {"output": ("FLOAT", (1, "M", 64))}, 1e-4)


def shapes(tokens: int) -> Sample:
    """Shapes computed in the graph from the shapes of its inputs."""
    p = Pattern(5, tokens)
    x = p.input("input", 1, "M", 12)
    rows = p.add("Gather", p.add("Shape", x), p.numbers(1), axis=0)
    shape = p.add("Concat", rows, p.numbers(3, 4), axis=0)
    heads = p.add("Transpose", p.add("Reshape", x, shape), perm=(1, 0, 2))
    softened = p.add("Softmax", p.add("MatMul", heads, p.add("Transpose", heads, perm=(0, 2, 1))), axis=-1)
    back = p.add("Transpose", p.add("MatMul", softened, heads), perm=(1, 0, 2))
    p.add("Reshape", back, p.numbers(1, -1, 12), name="output")
    return p.sample("shapes", "", {"output": ("FLOAT", (1, "M", 12))}, 1e-5)


PATTERNS: dict[str, Callable[[], list[Sample]]] = {
    "linear": lambda: [
        linear(tokens, kind, ends)
        for tokens in (1, 7)
        for kind in ("s8", "bf16", "f32")
        for ends in ("", "bias", "residual", "bias residual", "norm")
    ],
    "gated": lambda: [
        gated(tokens, activation, together)
        for tokens in (1, 7)
        for activation in ("silu", "gelu")
        for together in (False, True)
    ],
    "rotary": lambda: (
        [
            rotary(tokens, cast, tables, partial, interleaved)
            for tokens in (1, 5)
            for cast in (False, True)
            for tables in ("one", "sums")
            for partial, interleaved in ((0, 0), (8, 0), (8, 1))
        ]
        + [rotary(tokens, cast, "sums", 8, 0, True) for tokens in (1, 5) for cast in (False, True)]
    ),
    "norm": lambda: [
        norm(tokens, heads, residual) for tokens in (1, 9) for heads in (0, 3) for residual in (False, True)
    ],
    "cast": lambda: [
        convert(tokens, width, given, made)
        for tokens, width in ((1, 33), (7, 4099))
        for given, made in (
            (np.float32, "BFLOAT16"),
            (np.float16, "FLOAT"),
            (ml_dtypes.bfloat16, "FLOAT"),
            (ml_dtypes.bfloat16, "FLOAT16"),
        )
    ],
    "attention": lambda: [
        attention(tokens, history, **attributes)
        for tokens, history in ((1, 40), (6, 0), (6, 21))
        for attributes in ({}, {"softcap": 2.0}, {"scale": 0.5, "softcap": 1.0})
    ],
    "plain": lambda: [shapes(1), shapes(6)],
}
