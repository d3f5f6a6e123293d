"""Rewrites the graph of an axmodel, in memory, into operators that onnxruntime's CPU kernels run fastest.

In the file a weight is `[[Cast ->] DequantizeLinear | Cast] -> Transpose -> MatMul`. Without lowering, onnxruntime
expands 4-bit blocks to float32 on every run, and rounds the activations of 8-bit weights to 8 bits. Instead:

* INT8 and INT4 become MatMulNBits with int8 arithmetic, with each activation split into two 8-bit parts: `high`,
  rounded to 8 bits per block, and `low`, the remainder, which the kernel rounds to 8 bits again. The two are rows of
  one multiplication, so a weight is read once.
* FLOAT, FLOAT16 and BFLOAT16 become float32 FusedMatMul with the weight in its [out, in] order.

Costs and savings, measured in one run on one core of an AVX-512 server, a layer of Qwen2-0.5B in s8, and tiny-qwen2 in
s8 against its checkpoint (onnxruntime 1.31):

    activations             error of a product    decode     prefill 128    memory    mean KLD
    one 8-bit half          1e-2                  1.38 ms    36 ms          1         3.67e-5
    two 8-bit halves        4e-5                  1.35 ms    49 ms          1         1.52e-5
    float32, weights too    1e-7                  3.64 ms    41 ms          4         1.52e-5

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from axrun.format.axmodel import IR_VERSION, Attribute, Axmodel, Node, encode_info, encode_node
from axrun.format.dtypes import DTYPES, to_float32
from axrun.format.quantised import Quantised, makers, pack4, quantised
from axrun.format.wire import Message, encode

CONTRIB = "com.microsoft"
BLOCKS = (128, 64, 32, 16)  # block sizes of MatMulNBits, fastest first
INT8_ARITHMETIC = 4  # MatMulNBits.accuracy_level
UNSIGNED = {"INT8": 0x80, "INT4": 0x88}  # flips the sign bits: what was 0 becomes MatMulNBits' zero point
EXTERNAL = 1  # TensorProto.DataLocation
APART = 1 << 14  # minimum bytes of a constant that is passed outside of the model


class Constant(NamedTuple):
    """An initializer's data and ONNX type."""

    array: NDArray[Any]
    dtype: str


@dataclass
class Lowering:
    """A graph being rewritten. `makers` maps a value to the node that produces it."""

    model: Axmodel
    makers: dict[str, Node]
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    halves: dict[tuple[str, int], str] = field(default_factory=dict)

    def constant(self, name: str, array: NDArray[Any], dtype: str = "FLOAT") -> str:
        self.constants[name] = Constant(array, dtype)
        return name

    def node(self, op_type: str, inputs: list[str], output: str, domain: str = "", **attributes: Attribute) -> str:
        self.nodes.append(Node(op_type, tuple(inputs), (output,), attributes, domain=domain))
        return output

    def matmul(self, node: Node) -> bool:
        """Rewrites a multiplication with a transposed weight; returns False if `node` is something else."""
        transpose = self.makers.get(node.inputs[1]) if node.op_type == "MatMul" else None
        if transpose is None or transpose.op_type != "Transpose":
            return False
        matrix = transpose.inputs[0]
        source = self.makers.get(matrix, Node("", (matrix,), (matrix,)))
        weight = self.model.initializers.get(source.inputs[0])
        if weight is None or len(weight.dims) != 2 or transpose.attributes.get("perm") != (1, 0):
            return False
        if packed := quantised(self.model, source, self.makers):
            self._integer(node, packed)
        elif source.op_type in ("", "Cast") and weight.dtype in ("FLOAT", "FLOAT16", "BFLOAT16"):
            array = weight.array()
            self._float(node, weight.name, array if weight.dtype == "FLOAT" else to_float32(array, weight.dtype))
        else:
            return False
        return True

    def _integer(self, node: Node, stored: Quantised) -> None:
        weight, name = stored.levels, stored.levels.name
        rows, columns = weight.dims
        bits = DTYPES[weight.dtype].bits
        block = next((n for n in BLOCKS if columns % n == 0 and stored.block % n == 0), 0)
        if not block:
            self._float(node, name, _expand(stored))
            return

        def per_block(values: NDArray[Any]) -> NDArray[Any]:
            return np.ascontiguousarray(np.repeat(values, stored.block // block, axis=1)[:, : columns // block])

        packed = weight.array().view(np.uint8) ^ np.uint8(UNSIGNED[weight.dtype])
        self.constant(name, packed.reshape(rows, columns // block, block * bits // 8), "UINT8")
        self.constant(f"{name}.scales", per_block(stored.scale_rows(0, rows)).reshape(-1))
        inputs = [name, f"{name}.scales"]
        if stored.zeros is not None:
            zeros = per_block(stored.zero_rows(0, rows))
            if bits == 4:  # rows of them begin at whole bytes
                zeros = pack4(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))).view(np.int8)
            unsigned = zeros.view(np.uint8) ^ np.uint8(UNSIGNED[weight.dtype])
            inputs.append(self.constant(f"{name}.zeros", unsigned.reshape(-1), "UINT8"))
        halves = self._split(node.inputs[0], block, columns)
        products = self.node(
            "MatMulNBits",
            [halves, *inputs],
            f"{name}.halves",
            CONTRIB,
            K=columns,
            N=rows,
            bits=bits,
            block_size=block,
            accuracy_level=INT8_ARITHMETIC,
        )
        rows_of = (f"{name}.high", f"{name}.low")
        self.nodes.append(Node("Split", (products,), rows_of, {"axis": 0, "num_outputs": 2}))
        self.node("Add", list(rows_of), node.outputs[0])

    def _split(self, x: str, block: int, columns: int) -> str:
        """x [1, M, columns] as [2, M, columns]: the high halves, then the low ones; `high + low == x`.

        high is a multiple of peak / 127 in each block of columns, so the kernel's rounding does not change it.
        """
        if (x, block) in self.halves:
            return self.halves[x, block]
        name = f"{x}.{block}"
        last = self.constant("lowering.last", np.array([-1], np.int64), "INT64")
        blocked = self.constant(f"lowering.{block}", np.array([0, 0, -1, block], np.int64), "INT64")
        paired = self.constant(f"lowering.rows.{columns}", np.array([2, -1, columns], np.int64), "INT64")
        step = self.constant("lowering.step", np.array(1 / 127, np.float32))
        tiny = self.constant("lowering.tiny", np.array(1e-30, np.float32))  # avoids 0 / 0 in a block of zeros
        blocks = self.node("Reshape", [x, blocked], f"{name}.blocks")
        sizes = self.node("Abs", [blocks], f"{name}.sizes")
        peaks = self.node("ReduceMax", [sizes, last], f"{name}.peaks", keepdims=1)
        steps = self.node("Add", [self.node("Mul", [peaks, step], f"{name}.scaled"), tiny], f"{name}.steps")
        counts = self.node("Round", [self.node("Div", [blocks, steps], f"{name}.quotients")], f"{name}.counts")
        high = self.node("Mul", [counts, steps], f"{name}.high")
        low = self.node("Sub", [blocks, high], f"{name}.low")
        both = self.node("Concat", [high, low], f"{name}.both", axis=0)
        self.halves[x, block] = self.node("Reshape", [both, paired], f"{name}.halves")
        return self.halves[x, block]

    def _float(self, node: Node, name: str, weight: NDArray[np.float32]) -> None:
        self.constant(name, weight)
        self.node("FusedMatMul", [node.inputs[0], name], node.outputs[0], CONTRIB, transB=1)


def lower(model: Axmodel) -> tuple[bytes, dict[str, Constant]]:
    """The rewritten model, and the constants that are passed outside of it, by name."""
    lowering = Lowering(model, makers(model))
    for node in model.nodes:
        if not lowering.matmul(node):
            lowering.nodes.append(node)
    nodes = _needed(lowering.nodes, {info.name for info in model.outputs})
    constants = {}
    for name in sorted({name for node in nodes for name in node.inputs}):
        if name in lowering.constants:
            constants[name] = lowering.constants[name]
        elif name in model.initializers:
            tensor = model.initializers[name]
            constants[name] = Constant(tensor.array(), tensor.dtype)
    apart = {name: constant for name, constant in constants.items() if constant.array.nbytes >= APART}
    message = {
        "ir_version": IR_VERSION,
        "opset_import": [{"domain": "", "version": model.opset}, {"domain": CONTRIB, "version": 1}],
        "graph": {
            "node": [encode_node(node) for node in nodes],
            "name": model.name or "axmodel",
            "input": [encode_info(info) for info in model.inputs],
            "output": [encode_info(info) for info in model.outputs],
            "initializer": [_initializer(name, constant, name in apart) for name, constant in constants.items()],
        },
    }
    return encode("Model", message), apart


def _needed(nodes: list[Node], outputs: set[str]) -> list[Node]:
    """The nodes that `outputs` depend on, in order."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _initializer(name: str, constant: Constant, apart: bool) -> Message:
    message = {"dims": constant.array.shape, "data_type": DTYPES[constant.dtype].onnx, "name": name}
    if apart:
        return {**message, "data_location": EXTERNAL}
    return {**message, "raw_data": constant.array.tobytes()}


def _expand(stored: Quantised) -> NDArray[np.float32]:
    """Integer weights as float32 [out, in], for widths that no block size divides."""
    rows, columns = stored.levels.dims
    levels = stored.level_rows(0, rows).astype(np.float32)
    if stored.zeros is not None:
        levels -= np.repeat(stored.zero_rows(0, rows), stored.block, axis=1)[:, :columns]
    return levels * np.repeat(stored.scale_rows(0, rows), stored.block, axis=1)[:, :columns]
