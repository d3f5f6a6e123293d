"""cos and sin of every position as computed by a graph: from one table each, or combined from small tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from axc.doctor.stored import Floats, Stored
from axrun.format.axmodel import Axmodel, Node

Ids = NDArray[np.int64]


class Unknown(Exception):
    """The graph computes them in an unknown way; the message names the operator or value."""


def tables(model: Axmodel, stored: Mapping[str, Stored], node: Node) -> tuple[tuple[str, ...], Floats, Floats]:
    """Names of the tables used by a RotaryEmbedding, and cos and sin [positions, rotated elements / 2].

    Raises Unknown.
    """
    given = node.inputs[1:3]
    if len(given) == 2 and {*given} <= stored.keys():
        cos, sin = (stored[name].values() for name in given)
        return given, cos, sin
    if len(given) < 2 or len(node.inputs) > 3:
        raise Unknown(", ".join(given) or "none")
    walk = _Walk(model, stored)
    cos, sin = (walk.floats(name) for name in given)
    return tuple(dict.fromkeys(walk.names)), cos, sin


class _Walk:
    """What the values of a layer's graph are at each position, as far as they depend on positions alone."""

    def __init__(self, model: Axmodel, stored: Mapping[str, Stored]) -> None:
        self.model, self.stored = model, stored
        self.makers = {name: node for node in model.nodes for name in node.outputs}
        self.positions = np.arange(max((group.tokens + group.history for group in model.groups), default=0))
        self.names: list[str] = []  # of the tables met

    def floats(self, name: str) -> Floats:
        """A value [positions, width]. Raises Unknown."""
        node = self.makers.get(name)
        operands = node.inputs if node else ()
        if node and node.op_type == "Gather" and node.attributes.get("axis", 0) == 0 and operands[0] in self.stored:
            table, at = self.stored[operands[0]].values(), self.ids(operands[1])
            if table.ndim != 2 or (len(at) and at.max() >= len(table)):
                raise Unknown(f"{operands[0]} has no row for every position")
            self.names.append(operands[0])
            return np.asarray(table[at], np.float32)
        if node and node.op_type in ("Add", "Sub", "Mul"):
            a, b = (self.floats(operand) for operand in operands)
            with np.errstate(all="ignore"):
                return {"Add": a + b, "Sub": a - b, "Mul": a * b}[node.op_type]
        raise Unknown(f"{name}, from {node.op_type if node else 'outside'}")

    def ids(self, name: str) -> Ids:
        """A value [positions] of integers. Raises Unknown."""
        node = self.makers.get(name)
        if node is None:
            if name != "indices":
                raise Unknown(f"{name} instead of indices")
            return self.positions
        if node.op_type == "Cast":
            return self.ids(node.inputs[0])
        divisor = self.model.initializers.get(node.inputs[1]) if len(node.inputs) == 2 else None
        if node.op_type not in ("Div", "Mod") or divisor is None or divisor.dtype != "INT64":
            raise Unknown(f"{name}, from {node.op_type}")
        by = divisor.array().reshape(-1)
        if len(by) != 1 or by[0] < 1:
            raise Unknown(f"{divisor.name} is {by.tolist()}"[:60])
        ids = self.ids(node.inputs[0])
        return np.asarray(ids // by[0] if node.op_type == "Div" else ids % by[0])
