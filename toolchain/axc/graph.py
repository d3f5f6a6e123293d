"""A typed builder of ONNX graphs: values have a dtype and shape, and an operator with wrong inputs raises immediately.

Operators: https://onnx.ai/onnx/operators/ , opset 23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc.quantizer import WeightType
from axc.quantizer.kept import Kept
from axc.weights import Source
from axrun.format.axmodel import Attribute, Axmodel, Node, Tensor, TensorInfo
from axrun.format.dtypes import NAMES, nbytes

Dim = int | str


@dataclass(frozen=True)
class Value:
    """An edge of the graph."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Vector:
    """Data of an initializer: a small weight, as float32. `rows_as` as in Weight."""

    name: str
    source: Source
    rows_as: str = ""


@dataclass(frozen=True)
class Weight:
    """Data of an initializer: part number `part` of a matrix in a weight type.

    `rows_as`: a tensor of the checkpoint whose column order determines the order of rows.
    """

    name: str
    source: Source
    weight_type: WeightType
    part: int
    rows_as: str = ""


@dataclass(frozen=True)
class Order:
    """Data of an initializer: the stored order of the columns of the checkpoint's `tensor`."""

    tensor: str


Parameter = Vector | Weight | Order | NDArray[Any]

ONNX_DTYPES = {np.dtype(np.float32): "FLOAT", np.dtype(np.int64): "INT64"}


@dataclass
class Graph:
    """An axmodel under construction. `linear` stores matrices in `weight_type`; `weights` are the sources by name.

    Matrices in `kept` have a weight type of their own. `ret_postnorm`: the post model also returns its norm's output.
    """

    name: str
    weight_type: WeightType
    hidden_type: str
    weights: Mapping[str, Source]
    kept: Mapping[str, WeightType] = field(default_factory=dict)
    ret_postnorm: bool = False
    inputs: list[TensorInfo] = field(default_factory=list)
    outputs: list[TensorInfo] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    reordered: dict[tuple[str, str], Value] = field(default_factory=dict)

    def input(self, name: str, dtype: str, *shape: Dim) -> Value:
        """Declares an input; order of declaration is order in the file."""
        self.inputs.append(TensorInfo(name, dtype, shape))
        return Value(name, dtype, shape)

    def output(self, name: str, value: Value, dtype: str) -> Value:
        """Declares an output: `value` cast to `dtype`."""
        self.outputs.append(TensorInfo(name, dtype, value.shape))
        return self._node("Cast", [value], dtype, value.shape, name=name, to=_onnx(dtype))

    def parameter(self, name: str, dtype: str, dims: tuple[int, ...], data: Parameter) -> Value:
        """An initializer; one of the same name is taken again."""
        if name not in self.tensors:
            self.tensors[name] = Tensor(name, dtype, dims, -1, nbytes(dtype, dims))
            self.parameters[name] = data
        return Value(name, dtype, dims)

    def constant(self, name: str, array: NDArray[Any]) -> Value:
        """An initializer with the data at hand."""
        return self.parameter(name, ONNX_DTYPES[array.dtype], array.shape, array)

    def cast(self, x: Value, dtype: str) -> Value:
        """`x` in another type; itself where it has that type."""
        return x if x.dtype == dtype else self._node("Cast", [x], dtype, x.shape, to=_onnx(dtype))

    def add(self, a: Value, b: Value) -> Value:
        """Elementwise; `b` may be a vector along the last axis."""
        _expect(a.shape[-len(b.shape) :] == b.shape, "Add", a, b)
        return self._node("Add", [a, b], a.dtype, a.shape)

    def vector(self, name: str, rows_as: str = "") -> Value:
        """A small weight: of a norm, a bias."""
        source = self.weights[name]
        return self.parameter(name, "FLOAT", source.shape, Vector(name, source, rows_as))

    def rms_norm(self, x: Value, weight: str, epsilon: float) -> Value:
        """RMSNormalization along the last axis."""
        scale = self.vector(weight)
        _expect(scale.shape == x.shape[-1:], "RMSNormalization", x, scale)
        return self._node("RMSNormalization", [x, scale], "FLOAT", x.shape, axis=-1, epsilon=epsilon)

    def reorders(self, name: str) -> str:
        """The checkpoint's tensor of a linear whose columns are stored in another order; empty if they are not."""
        kind = self.kept.get(f"{name}.weight")
        return kind.tensor if isinstance(kind, Kept) and kind.reordered else ""

    def linear(self, x: Value, name: str, *, rows_as: str = "", reordered: bool = False) -> Value:
        """x [.., in] times the transposed matrix `name`.weight [out, in]; plus `name`.bias if there is one.

        `rows_as`: the tensor, of `reorders`, that the rows follow. `reordered`: x is in the order of the columns.
        """
        weight = f"{name}.weight"
        source, kind = self.weights[weight], self.kept.get(weight, self.weight_type)
        out_features, in_features = source.shape
        parts = [
            self.parameter(part_name, dtype, dims, Weight(weight, source, kind, part, rows_as))
            for part, (part_name, dtype, dims) in enumerate(kind.parts(weight, out_features, in_features))
        ]
        _expect(x.shape[-1] == in_features, "MatMul", x, parts[0])
        if isinstance(kind, Kept) and kind.reordered and not reordered:
            x = self._reordered(x, weight, kind)
        if len(parts) == 1:
            matrix = self.cast(parts[0], "FLOAT")
        else:
            matrix = Value(self._name("DequantizeLinear"), "FLOAT", (out_features, in_features))
            parts[1] = self.cast(parts[1], "FLOAT")
            inputs = tuple(part.name for part in parts)
            self.nodes.append(Node("DequantizeLinear", inputs, (matrix.name,), kind.dequantize(in_features)))
        matrix = self._node("Transpose", [matrix], "FLOAT", (in_features, out_features), perm=(1, 0))
        y = self._node("MatMul", [x, matrix], "FLOAT", (*x.shape[:-1], out_features))
        bias = f"{name}.bias"
        return self.add(y, self.vector(bias, rows_as)) if bias in self.weights else y

    def _reordered(self, x: Value, weight: str, kind: Kept) -> Value:
        """x in the order of a matrix's columns; those that have one order share it."""
        key = (x.name, kind.reordered)
        if key not in self.reordered:
            order = self.parameter(f"{weight}_order", "INT64", (int(x.shape[-1]),), Order(kind.tensor))
            self.reordered[key] = self._node("Gather", [x, order], x.dtype, x.shape, axis=-1)
        return self.reordered[key]

    def layer_norm(self, x: Value, name: str, epsilon: float) -> Value:
        """LayerNormalization along the last axis, with `name`.weight and `name`.bias if there is one."""
        inputs = [x, self.vector(f"{name}.weight")]
        if f"{name}.bias" in self.weights:
            inputs.append(self.vector(f"{name}.bias"))
        _expect(inputs[1].shape == x.shape[-1:], "LayerNormalization", x, inputs[1])
        return self._node("LayerNormalization", inputs, "FLOAT", x.shape, axis=-1, epsilon=epsilon)

    def standardized(self, x: Value, epsilon: float) -> Value:
        """LayerNormalization along the last axis, without weight or bias."""
        width = int(x.shape[-1])
        ones = self.constant(f"ones.{width}", np.ones(width, np.float32))
        return self._node("LayerNormalization", [x, ones], "FLOAT", x.shape, axis=-1, epsilon=epsilon)

    def heads(self, x: Value, count: int) -> Value:
        """x [1, M, heads * d] as [1, M, heads, d]."""
        shape = self.constant(f"heads.{count}", np.array([0, 0, count, -1], np.int64))
        width = int(x.shape[-1]) // count
        _expect(width * count == x.shape[-1], "Reshape", x, shape)
        return self._node("Reshape", [x, shape], x.dtype, (*x.shape[:2], count, width))

    def flat(self, x: Value) -> Value:
        """x [1, M, heads, d] as [1, M, heads * d]."""
        shape = self.constant("heads.flat", np.array([0, 0, -1], np.int64))
        return self._node("Reshape", [x, shape], x.dtype, (*x.shape[:2], int(x.shape[2]) * int(x.shape[3])))

    def rows(self, table: Value, at: Value) -> Value:
        """Rows [1, M, width] of a table [rows, width] at `at` [1, M]."""
        _expect(len(table.shape) == 2 and at.dtype == "INT64", "Gather", table, at)
        return self._node("Gather", [table, at], table.dtype, (*at.shape, table.shape[1]), axis=0)

    def divided(self, x: Value, name: str, divisor: int) -> tuple[Value, Value]:
        """Quotient and remainder of positive integers by a number, a constant called `name`."""
        by = self.constant(name, np.array(divisor, np.int64))
        return self._node("Div", [x, by], x.dtype, x.shape), self._node("Mod", [x, by], x.dtype, x.shape)

    def rotary(
        self, x: Value, cos: Value, sin: Value, positions: Value | None, heads: int, interleaved: bool = False
    ) -> Value:
        """RotaryEmbedding of the first elements of each head of x [1, M, heads * head_dim], twice as many as `cos` has.

        An element is rotated with the one half as many further on, as in transformers, or `interleaved` with the next.
        `cos` and `sin` are tables by position, or without `positions` have a row for each of the M.
        """
        width, head_dim = 2 * int(cos.shape[-1]), int(x.shape[-1]) // heads
        _expect(width <= head_dim, "RotaryEmbedding", x, cos)
        more: dict[str, Any] = {} if width == head_dim else {"rotary_embedding_dim": width}
        inputs = [x, cos, sin] + ([] if positions is None else [positions])
        return self._node(
            "RotaryEmbedding", inputs, "FLOAT", x.shape, num_heads=heads, interleaved=int(interleaved), **more
        )

    def concat(self, a: Value, b: Value, length: Dim) -> Value:
        """Concat along axis 1; `length` is the name of the sum."""
        _expect(a.dtype == b.dtype and a.shape[2:] == b.shape[2:], "Concat", a, b)
        return self._node("Concat", [a, b], a.dtype, (a.shape[0], length, *a.shape[2:]), axis=1)

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        mask: Value,
        heads: int,
        kv_heads: int,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Value:
        """Attention of q [1, M, heads * d] over k, v [1, S, kv_heads * d] with an additive mask [1, M, S].

        Scores are multiplied by `scale`, 1 / sqrt(d) unless given; softcap * tanh(scores / softcap) is applied before
        the mask.
        """
        _expect(k.shape == v.shape and mask.shape[1:] == (q.shape[1], k.shape[1]), "Attention", q, mask)
        axis = self.constant("mask.axes", np.array([1], np.int64))
        shape = (mask.shape[0], 1, *mask.shape[1:])
        mask = self._node("Unsqueeze", [self.cast(mask, "FLOAT"), axis], "FLOAT", shape)
        more: dict[str, Any] = {} if scale is None else {"scale": scale}
        if softcap is not None:
            more["softcap"] = softcap
        inputs = [q, k, v, mask]
        return self._node("Attention", inputs, "FLOAT", q.shape, q_num_heads=heads, kv_num_heads=kv_heads, **more)

    def silu(self, x: Value) -> Value:
        """x * sigmoid(x)."""
        return self.mul(x, self._node("Sigmoid", [x], x.dtype, x.shape))

    def gelu(self, x: Value, tanh: bool) -> Value:
        """x * Phi(x), Phi by tanh or by erf."""
        return self._node("Gelu", [x], x.dtype, x.shape, approximate="tanh" if tanh else "none")

    def relu(self, x: Value) -> Value:
        """max(x, 0)."""
        return self._node("Relu", [x], x.dtype, x.shape)

    def clip(self, x: Value, name: str, most: float) -> Value:
        """x between -most and most, constants called `name`.low and `name`.high."""
        low, high = (
            self.constant(f"{name}.{end}", np.array(value, np.float32))
            for end, value in (("low", -most), ("high", most))
        )
        return self._node("Clip", [x, low, high], x.dtype, x.shape)

    def tanh(self, x: Value) -> Value:
        return self._node("Tanh", [x], x.dtype, x.shape)

    def scale(self, x: Value, name: str, factor: float) -> Value:
        """x times a number, a constant called `name`; x itself where that is 1."""
        if factor == 1:
            return x
        return self._node("Mul", [x, self.constant(name, np.array(factor, np.float32))], x.dtype, x.shape)

    def sub(self, a: Value, b: Value) -> Value:
        """Elementwise difference of equal shapes."""
        _expect(a.shape == b.shape, "Sub", a, b)
        return self._node("Sub", [a, b], a.dtype, a.shape)

    def mul(self, a: Value, b: Value) -> Value:
        """Elementwise; `b` may be a vector along the last axis."""
        _expect(a.shape[-len(b.shape) :] == b.shape, "Mul", a, b)
        return self._node("Mul", [a, b], a.dtype, a.shape)

    def top_k(self, logits: Value, k: int) -> tuple[Value, Value]:
        """The k largest of softmax(logits) along the last axis: (probabilities, int64 indices), largest first."""
        probability = self._node("Softmax", [logits], "FLOAT", logits.shape, axis=-1)
        size = self.constant("top_k.k", np.array([k], np.int64))
        shape = (*logits.shape[:-1], k)
        values, indices = Value(self._name("TopK"), "FLOAT", shape), Value(self._name("TopK") + ".i", "INT64", shape)
        attributes: dict[str, Attribute] = {"axis": -1, "largest": 1, "sorted": 1}
        self.nodes.append(Node("TopK", (probability.name, size.name), (values.name, indices.name), attributes))
        return values, indices

    def axmodel(self, version: str, opset: int, producer: str, metadata: Mapping[str, str]) -> Axmodel:
        """The finished graph, for `axrun.format.axmodel.layout`."""
        return Axmodel(
            producer_name=producer,
            producer_version=version,
            opset=opset,
            metadata=metadata,
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            nodes=tuple(self.nodes),
            initializers=self.tensors,
            name=self.name,
        )

    def _name(self, op_type: str) -> str:
        return f"{op_type}.{len(self.nodes)}"

    def _node(
        self,
        op_type: str,
        inputs: list[Value],
        dtype: str,
        shape: tuple[Dim, ...],
        name: str | None = None,
        **attributes: Attribute,
    ) -> Value:
        value = Value(name or self._name(op_type), dtype, shape)
        self.nodes.append(Node(op_type, tuple(x.name for x in inputs), (value.name,), attributes))
        return value


def _onnx(dtype: str) -> int:
    return next(number for number, name in NAMES.items() if name == dtype)


def _expect(holds: bool, op_type: str, a: Value, b: Value) -> None:
    if not holds:
        raise TypeError(f"{op_type} of {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}")
