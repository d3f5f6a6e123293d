"""Cases of single operators: ONNX's backend node tests, and further shapes computed by ONNX's reference evaluator.

A case is a model of one node with its inputs and expected outputs as numpy arrays.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from axrun.format.axmodel import OPSET


@dataclass(frozen=True)
class Case:
    """A case. `constants`: the inputs that are initializers of the model."""

    name: str
    node: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    constants: frozenset[int]
    rtol: float = 1e-5
    atol: float = 1e-6


# Inputs that must be constant, because kernels need them when a model is loaded.
KNOWN: dict[str, tuple[int, ...]] = {
    "Expand": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}
# The types of axmodels.
DTYPES = {
    np.dtype(np.float32): "FLOAT",
    np.dtype(np.float16): "FLOAT16",
    np.dtype(ml_dtypes.bfloat16): "BFLOAT16",
    np.dtype(np.int64): "INT64",
    np.dtype(np.int32): "INT32",
    np.dtype(np.uint32): "UINT32",
    np.dtype(np.int8): "INT8",
    np.dtype(np.uint8): "UINT8",
    np.dtype(np.bool_): "BOOL",
    np.dtype(ml_dtypes.float8_e4m3fn): "FLOAT8E4M3FN",
    np.dtype(ml_dtypes.float8_e5m2): "FLOAT8E5M2",
    np.dtype(ml_dtypes.int4): "INT4",
    np.dtype(ml_dtypes.uint4): "UINT4",
}
STORED_ONLY = {"INT4", "UINT4"}  # of initializers
CAST_TO = {"FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "UINT32", "INT8", "UINT8", "BOOL"}


def dtype_of(array: Any) -> str:
    """ONNX's name of an array's type; empty if axmodels do not support it."""
    return DTYPES.get(np.asarray(array).dtype, "")


def left_out(op: str, node: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> str:
    """The reason why a node test is outside the format; empty if it is not."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if not all(x is None or dtype_of(x) for x in inputs) or not all(dtype_of(y) for y in outputs):
        return "a type the format does not have"
    if any(dtype_of(y) in STORED_ONLY or (op == "Cast" and dtype_of(y) not in CAST_TO) for y in outputs):
        return "a cast to a type of weights"
    if op == "Attention" and (len(inputs) > 6 or {"left_window_size", "right_window_size"} & attributes.keys()):
        return "of a later opset"
    if op in ("Min", "Max", "Clip") and len({dtype_of(x) for x in inputs if x is not None}) > 1:
        return "mixed types"
    return ""


@functools.cache
def collected() -> list[Any]:
    """All node tests of ONNX; importing their modules creates them."""
    from onnx.backend.test.case import node as cases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(cases.collect_testcases(None))


@functools.cache
def node_tests(op: str) -> tuple[list[Case], dict[str, str]]:
    """ONNX's cases of an operator, and the skipped ones with the reasons."""
    found, out = [], {}
    for case in collected():
        graph = case.model.graph
        if len(graph.node) != 1 or graph.node[0].op_type != op or case.data_sets is None:
            continue
        node = graph.node[0]
        names = [value.name for value in graph.input]
        for given, wanted in case.data_sets[:1]:
            arrays = [as_array(x) for x in given]
            by_name = dict(zip(names, arrays, strict=True))
            inputs = tuple(by_name[name] if name else None for name in node.input)
            outputs = tuple(as_array(y) for y in wanted)
            reason = left_out(op, node, inputs, outputs)
            if reason:
                out[case.name] = reason
                continue
            known = {i for i in KNOWN.get(op, ()) if i < len(inputs)}
            known |= {i for i, x in enumerate(inputs) if x is not None and dtype_of(x) in STORED_ONLY}
            rtol, atol = tolerance(outputs[0].dtype)
            found.append(
                Case(case.name, node, inputs, outputs, frozenset(known), max(case.rtol, rtol), max(case.atol, atol))
            )
    return found, out


def as_array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def evaluated(op: str, inputs: list[Any], outputs: int = 1, constants: tuple[int, ...] = (), **attributes: Any) -> Case:
    """A case with outputs of the reference evaluator."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in zip(names, inputs, strict=True)
        if name
    ]
    made = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.output]
    graph = helper.make_graph([node], "case", infos, made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {name: x for name, x in zip(names, inputs, strict=True) if name}
        answer: Any = ReferenceEvaluator(model).run(None, given)
    known = frozenset(constants) | {i for i in KNOWN.get(op, ()) if i < len(inputs)}
    shapes = "x".join(str(list(x.shape)) for x in inputs if x is not None).replace(" ", "")
    kinds = ",".join(f"{key}={value}" for key, value in sorted(attributes.items()))
    return Case(f"{op}{shapes}{kinds}", node, tuple(inputs), tuple(answer), known, *tolerance(answer[0].dtype))


def tolerance(dtype: Any) -> tuple[float, float]:
    if dtype == np.float16:
        return 2e-3, 1e-3
    return (2e-2, 1e-2) if dtype == ml_dtypes.bfloat16 else (1e-5, 4e-6)


Draw = Callable[[np.random.Generator], Iterator[Case]]


def floats(random: np.random.Generator, *shape: int) -> Any:
    return random.standard_normal(shape, np.float32)


def integers(random: np.random.Generator, *shape: int, dtype: Any = np.int64) -> Any:
    low = 1 if np.dtype(dtype).kind == "u" else -50
    drawn = random.integers(low, 50, shape)
    return np.where(drawn == 0, 7, drawn).astype(dtype)


def pairs(op: str, compare: bool = False, whole: bool = True) -> Draw:
    """Two tensors with various broadcasts."""

    def draw(random: np.random.Generator) -> Iterator[Case]:
        shapes = [((3, 1, 5), (4, 1)), ((2, 3, 700), (700,)), ((1,), (2, 2)), ((), (3,)), ((2, 1, 3, 1), (5, 1, 4))]
        for a, b in shapes:
            attributes: dict[str, Any] = {"fmod": 1} if op == "Mod" else {}
            yield evaluated(op, [floats(random, *a), floats(random, *b)], **attributes)
        if whole:
            for dtype in (np.int64, np.int32, np.uint32):
                yield evaluated(op, [integers(random, 3, 4, dtype=dtype), integers(random, 4, dtype=dtype)])

    return draw


def singles(op: str, positive: bool = False, **attributes: Any) -> Draw:
    def draw(random: np.random.Generator) -> Iterator[Case]:
        for shape in ((), (7,), (2, 3, 1030), (1, 2, 3, 4, 5)):
            x = 3 * floats(random, *shape)
            yield evaluated(op, [np.asarray(np.abs(x) + 0.1 if positive else x, np.float32)], **attributes)

    return draw


def attention(random: np.random.Generator) -> Iterator[Case]:
    for heads, kv, cap, scale in ((4, 2, 0.0, None), (4, 1, 5.0, 0.3), (2, 2, 2.0, None)):
        attributes: dict[str, Any] = {"softcap": cap} if cap else {}
        if scale:
            attributes["scale"] = scale
        q, k, v = floats(random, 2, heads, 3, 8), floats(random, 2, kv, 5, 8), floats(random, 2, kv, 5, 6)
        yield evaluated("Attention", [q, k, v, floats(random, 3, 5)], **attributes)
        flat = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(2, x.shape[2], -1) for x in (q, k, v)]
        yield evaluated(
            "Attention", [*flat, floats(random, 2, 1, 3, 5)], q_num_heads=heads, kv_num_heads=kv, **attributes
        )


def rotary(random: np.random.Generator) -> Iterator[Case]:
    for interleaved in (0, 1):
        for partial in (0, 4):
            half = (partial or 8) // 2
            cos, sin = floats(random, 20, half), floats(random, 20, half)
            at = random.integers(0, 20, (2, 3))
            attributes: dict[str, Any] = {"interleaved": interleaved, "rotary_embedding_dim": partial}
            yield evaluated("RotaryEmbedding", [floats(random, 2, 5, 3, 8), cos, sin, at], **attributes)
            yield evaluated("RotaryEmbedding", [floats(random, 2, 3, 40), cos[at], sin[at]], num_heads=5, **attributes)


def matmul(random: np.random.Generator) -> Iterator[Case]:
    for a, b in (((3, 4), (4, 5)), ((2, 1, 3, 130), (4, 130, 70)), ((4,), (4, 3)), ((2, 3, 4), (4,)), ((5,), (5,))):
        yield evaluated("MatMul", [floats(random, *a), floats(random, *b)])
    yield evaluated("MatMul", [integers(random, 2, 3, dtype=np.int32), integers(random, 3, 2, dtype=np.int32)])


def dequantize(random: np.random.Generator) -> Iterator[Case]:
    def levels(dtype: Any, *shape: int) -> Any:
        low, high = (0, 16) if dtype == ml_dtypes.uint4 else (-8, 8) if dtype == ml_dtypes.int4 else (0, 100)
        return random.integers(low, high, shape).astype(dtype)

    for dtype in (np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.uint4):
        stored = (0, 2) if dtype in (ml_dtypes.int4, ml_dtypes.uint4) else ()
        x = levels(dtype, 4, 6, 2)
        yield evaluated("DequantizeLinear", [x, floats(random, 6), levels(dtype, 6)], constants=stored, axis=1)
        yield evaluated("DequantizeLinear", [x, floats(random)], constants=stored)
        blocked = [x, floats(random, 4, 3, 2), levels(dtype, 4, 3, 2)]
        yield evaluated("DequantizeLinear", blocked, constants=stored, axis=1, block_size=2)
    yield evaluated("DequantizeLinear", [levels(np.int32, 3, 5), floats(random, 3)], axis=0)
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        finite = np.arange(256, dtype=np.uint8).view(dtype)[:, None]
        finite = np.where(np.isfinite(finite.astype(np.float32)), finite, dtype(0))
        yield evaluated("DequantizeLinear", [finite, floats(random, 256)], axis=0)
        yield evaluated("DequantizeLinear", [finite.reshape(2, 128), floats(random, 2, 4)], axis=1, block_size=32)


def norms(op: str) -> Draw:
    def draw(random: np.random.Generator) -> Iterator[Case]:
        for shape, axis, scale in (
            ((2, 3, 40), -1, (40,)),
            ((2, 3, 5, 7), 2, (5, 7)),
            ((2, 3, 5, 7), -1, (1,)),
            ((9,), 0, (9,)),
            ((1, 4, 8, 128), -1, (128,)),
        ):
            yield evaluated(op, [floats(random, *shape), floats(random, *scale)], axis=axis, epsilon=1e-3)

    return draw


def drawn_gather(random: np.random.Generator) -> Iterator[Case]:
    for axis in (0, 1, -1):
        yield evaluated("Gather", [floats(random, 5, 6, 7), random.integers(-5, 5, (2, 3))], axis=axis)
    yield evaluated("Gather", [integers(random, 5, dtype=np.int32), np.asarray(2, np.int64)], axis=0)


def drawn_slice(random: np.random.Generator) -> Iterator[Case]:
    ends = (2**63 - 1, -(2**63))
    for start, end, axis, step in (
        (1, 4, 1, 1),
        (-3, ends[0], 1, 2),
        (-1, ends[1], 2, -1),
        (5, 0, 0, -2),
        (9, 3, 2, 1),
    ):
        lists = [np.array([number], np.int64) for number in (start, end, axis, step)]
        yield evaluated("Slice", [floats(random, 6, 7, 8), *lists])


def drawn_transpose(random: np.random.Generator) -> Iterator[Case]:
    for perm in ((0, 2, 1, 3), (3, 2, 1, 0), (0, 1, 3, 2), (2, 0, 1, 3)):
        yield evaluated("Transpose", [floats(random, 2, 3, 4, 5)], perm=perm)
    yield evaluated("Transpose", [integers(random, 3, 50, dtype=np.int8)])


def drawn_cast(random: np.random.Generator) -> Iterator[Case]:
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.uint32, np.int8, np.uint8, np.bool_)
    for source in (*kinds, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        x = (random.random((3, 700)) * 90).astype(np.float32).astype(source)
        for target in kinds:
            yield evaluated("Cast", [x], to=helper.np_dtype_to_tensor_dtype(np.dtype(target)))


def drawn_where(random: np.random.Generator) -> Iterator[Case]:
    yield evaluated("Where", [random.random((3, 1)) > 0.5, floats(random, 2, 3, 4), floats(random, 4)])


def logic(op: str) -> Draw:
    def draw(random: np.random.Generator) -> Iterator[Case]:
        yield evaluated(op, [random.random((3, 1)) > 0.5, random.random((2, 1, 4)) > 0.5])

    return draw


def halves(op: str, count: int, **attributes: Any) -> Draw:
    """Additional cases in the 16-bit floats."""

    def draw(random: np.random.Generator) -> Iterator[Case]:
        for dtype in (np.float16, ml_dtypes.bfloat16):
            yield evaluated(op, [floats(random, 2, 3, 8).astype(dtype) for _ in range(count)], **attributes)

    return draw


def softmax(random: np.random.Generator) -> Iterator[Case]:
    for axis in (-1, 0, 1, 2):
        yield evaluated("Softmax", [4 * floats(random, 3, 20, 5)], axis=axis)


def top_k(random: np.random.Generator) -> Iterator[Case]:
    for axis, largest in ((-1, 1), (1, 0), (0, 1)):
        yield evaluated("TopK", [floats(random, 4, 9, 6), np.array([3], np.int64)], 2, axis=axis, largest=largest)


def reductions(op: str) -> Draw:
    def draw(random: np.random.Generator) -> Iterator[Case]:
        for axes, keep in (([0, 2], 1), ([-1], 0), ([1], 1), (None, 1)):
            inputs = [floats(random, 3, 4, 700)] + ([np.array(axes, np.int64)] if axes else [])
            yield evaluated(op, inputs, keepdims=keep)

    return draw


DRAWN: dict[str, tuple[Draw, ...]] = {
    **{op: (pairs(op), halves(op, 2)) for op in ("Add", "Sub", "Mul", "Div")},
    "Mod": (pairs("Mod"),),
    **{op: (pairs(op), halves(op, 3)) for op in ("Min", "Max")},
    **{op: (pairs(op),) for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")},
    **{op: (singles(op),) for op in ("Neg", "Abs", "Exp", "Sin", "Cos", "Erf", "Sigmoid", "Tanh", "Relu")},
    **{op: (singles(op, positive=True),) for op in ("Sqrt", "Reciprocal", "Log")},
    "Gelu": (singles("Gelu"), singles("Gelu", approximate="tanh"), halves("Gelu", 1, approximate="tanh")),
    "LayerNormalization": (norms("LayerNormalization"),),
    "RMSNormalization": (norms("RMSNormalization"),),
    **{op: (reductions(op),) for op in ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")},
    "And": (logic("And"),),
    "Or": (logic("Or"),),
    "Attention": (attention,),
    "Cast": (drawn_cast,),
    "DequantizeLinear": (dequantize,),
    "Gather": (drawn_gather,),
    "MatMul": (matmul,),
    "RotaryEmbedding": (rotary,),
    "Slice": (drawn_slice,),
    "Softmax": (softmax, halves("Softmax", 1, axis=1)),
    "TopK": (top_k,),
    "Transpose": (drawn_transpose,),
    "Where": (drawn_where,),
}


@functools.cache
def cases(op: str) -> list[Case]:
    """All cases of an operator."""
    found = list(node_tests(op)[0])
    for number, draw in enumerate(DRAWN.get(op, ())):
        found += draw(np.random.default_rng(number))
    return found
