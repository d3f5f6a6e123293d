"""A canonical form of an axmodel's graph (`CanonicalGraph`): operators in order with their inputs, and the outputs.

Names of intermediate values are dropped; those of inputs, outputs and initializers are kept. The index of a layer is
replaced by `#`, so that equal layers have equal forms.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from axrun.format.axmodel import Axmodel, Node, Tensor

MOST = 4096  # maximum number of operators
LAYER = "model.layers.#."
INDEX = "axmodel.layer"  # the metadata key that differs between equal layers

Named = dict[str, list[Any]]


@dataclass(frozen=True)
class CanonicalGraph:
    """`nodes`: [operator, domain, attributes, inputs, outputs]. An input is the name of a graph input or
    an initializer, or the number and output of the node that produces it: `12.0`.

    `inputs`: [dtype, shape] by name, `outputs`: [dtype, shape, source]. `tensors`: [dtype, dims] of the
    initializers; `constants`: CRC-32 of those that are not from the checkpoint.
    """

    nodes: Sequence[Sequence[Any]]
    inputs: Named
    outputs: Named
    tensors: Named
    constants: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return {**vars(self)}

    @classmethod
    def parse(cls, values: object) -> CanonicalGraph | None:
        """The inverse of `json`; None for invalid values."""
        kinds = {"nodes": list, "inputs": dict, "outputs": dict, "tensors": dict, "constants": dict}
        kinds["metadata"] = dict
        if not isinstance(values, dict) or any(type(values.get(name)) is not kind for name, kind in kinds.items()):
            return None
        nodes = values["nodes"]
        shapes = (str, str, dict, list, list)
        if len(nodes) > MOST or not all(isinstance(node, list) and len(node) == len(shapes) for node in nodes):
            return None
        if not all(isinstance(part, kind) for node in nodes for part, kind in zip(node, shapes)):
            return None
        if not all(isinstance(name, str) for node in nodes for names in node[3:] for name in names):
            return None
        if not all(isinstance(entry, list) and len(entry) == 3 for entry in values["outputs"].values()):
            return None
        return cls(**{name: values[name] for name in kinds})


def canonical(model: Axmodel, index: int | None, constants: Mapping[str, int] | None = None) -> CanonicalGraph:
    """The canonical graph of a layer's axmodel, or of the post model (`index` None).

    `constants`: names whose data are compared; the given checksums are used unless the file has the data.
    """
    own = f"model.layers.{index}."

    def named(name: str) -> str:
        return LAYER + name[len(own) :] if index is not None and name.startswith(own) else name

    places = {
        output: f"{number}.{at}" for number, node in enumerate(model.nodes) for at, output in enumerate(node.outputs)
    }
    nodes = [
        [
            node.op_type,
            node.domain,
            _plain(node),
            [places.get(name, named(name)) for name in node.inputs],
            [places[name] for name in node.outputs],
        ]
        for node in model.nodes
    ]
    sums = {}
    for name, known in (constants or {}).items():
        tensor = model.initializers.get(name.replace(LAYER, own))
        sums[named(name)] = known if tensor is None or tensor.raw is None else checksum(tensor)
    return CanonicalGraph(
        nodes,
        {info.name: [info.dtype, list(info.shape)] for info in model.inputs},
        {info.name: [info.dtype, list(info.shape), places.get(info.name, "")] for info in model.outputs},
        {named(name): [tensor.dtype, list(tensor.dims)] for name, tensor in model.initializers.items()},
        sums,
        {key: value for key, value in model.metadata.items() if key.startswith("axmodel.") and key != INDEX},
    )


def unused_tensor(model: Axmodel) -> str:
    """Describes a tensor that no operator reads; empty if there is none.

    Finds a missing operator without a reference graph: its weight is unused.
    """
    read = {name for node in model.nodes for name in node.inputs}
    name = next((name for name in model.initializers if name not in read), "")
    return f"no operator reads {name}: the graph lacks an operator" if name else ""


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.raw or b"")


def difference(seen: CanonicalGraph, wanted: CanonicalGraph, index: int | None = None) -> str:
    """Describes the first difference; empty if the graphs are equal. `index` replaces the # in names."""
    words = _operators(seen, wanted) or _wiring(seen, wanted) or _ends(seen, wanted) or _stored(seen, wanted)
    return (words or _metadata(seen, wanted)).replace(LAYER, f"model.layers.{index}.")


def _operators(seen: CanonicalGraph, wanted: CanonicalGraph) -> str:
    ours, theirs = ([_signature(node, graph) for node in graph.nodes] for graph in (seen, wanted))
    for what, first, last, other_first, other_last in difflib.SequenceMatcher(
        None, ours, theirs, autojunk=False
    ).get_opcodes():
        if what == "equal":
            continue
        gone = ", ".join(_called(node, wanted) for node in wanted.nodes[other_first:other_last][:2])
        extra = ", ".join(_called(node, seen) for node in seen.nodes[first:last][:2])
        if what == "delete":
            return f"the graph has {extra}, which axc does not write"
        if what == "insert":
            return f"the graph lacks {gone}"
        node, other = seen.nodes[first], wanted.nodes[other_first]
        changed = _attributes(node, other) or _inputs(seen, node, wanted, other)
        return changed or f"the graph has {extra} instead of {gone}"
    return ""


def _wiring(seen: CanonicalGraph, wanted: CanonicalGraph) -> str:
    pairs = zip(seen.nodes, wanted.nodes)
    return next((_inputs(seen, node, wanted, other) for node, other in pairs if node[3] != other[3]), "")


def _inputs(seen: CanonicalGraph, node: Sequence[Any], wanted: CanonicalGraph, other: Sequence[Any]) -> str:
    """Describes the first different input of two nodes with the same operator."""
    if node[0] != other[0] or node[3] == other[3]:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(node[3], other[3])) if a != b), min(len(node[3]), len(other[3])))
    pairs = ((seen, node), (wanted, other))
    sources = [_source(graph, entry[3][at]) if at < len(entry[3]) else "missing" for graph, entry in pairs]
    return f"input {at} of {_called(node, seen)} is {sources[0]}, axc uses {sources[1]}"


def _ends(seen: CanonicalGraph, wanted: CanonicalGraph) -> str:
    for what, ours, theirs in (("input", seen.inputs, wanted.inputs), ("output", seen.outputs, wanted.outputs)):
        for name in {**theirs, **ours}:
            if name not in ours or name not in theirs:
                return f"the graph {'lacks the' if name not in ours else 'has the extra'} {what} {name}"
            if ours[name][:2] != theirs[name][:2]:
                shapes = [f"{entry[0]}{entry[1]}" for entry in (ours[name], theirs[name])]
                return f"{what} {name} is {shapes[0]}, axc writes {shapes[1]}"
    for name, entry in seen.outputs.items():
        if entry[2] != wanted.outputs[name][2]:
            sources = [_source(graph, graph.outputs[name][2]) for graph in (seen, wanted)]
            taken = next((other for other, values in wanted.outputs.items() if values[2] == entry[2]), "")
            swapped = f": this is the value of {taken}" if taken else ""
            return f"output {name} is {sources[0]}, axc writes {sources[1]}{swapped}"
    return ""


def _stored(seen: CanonicalGraph, wanted: CanonicalGraph) -> str:
    read = {name for node in wanted.nodes for name in node[3]}
    for name, entry in wanted.tensors.items():
        if name in read and seen.tensors.get(name) != entry:
            kinds = [f"{each[0]}{each[1]}" if each else "missing" for each in (seen.tensors.get(name), entry)]
            return f"{name} is {kinds[0]}, axc writes {kinds[1]}"
    for name, known in wanted.constants.items():
        if seen.constants.get(name, known) != known:
            return f"the values of constant {name} differ from those that axc writes"
    return ""


def _metadata(seen: CanonicalGraph, wanted: CanonicalGraph) -> str:
    for key in {**wanted.metadata, **seen.metadata}:
        ours, theirs = seen.metadata.get(key), wanted.metadata.get(key)
        if ours != theirs:
            return f"{key} is {ours or 'missing'}, axc writes {theirs or 'none'}"
    return ""


def _signature(node: Sequence[Any], graph: CanonicalGraph) -> str:
    constants = [name if name in graph.tensors else "" for name in node[3]]
    return repr((node[0], node[1], constants, sorted(node[2].items())))


def _plain(node: Node) -> dict[str, Any]:
    """Attributes as JSON values, with floats rounded to 32 bits as in the file."""
    return {name: _value(value) for name, value in node.attributes.items()}


def _value(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{np.float32(value):.7g}")
    if isinstance(value, tuple):
        return [_value(each) for each in value]
    return value if isinstance(value, (int, str)) else repr(value)


def _called(node: Sequence[Any], graph: CanonicalGraph) -> str:
    constants = [name for name in node[3] if name in graph.tensors]
    return str(node[0]) + (f" with {constants[0]}" if constants else "")


def _attributes(node: Sequence[Any], other: Sequence[Any]) -> str:
    if node[0] != other[0]:
        return ""
    for name in sorted({*node[2], *other[2]}):
        seen, wanted = node[2].get(name), other[2].get(name)
        if seen != wanted:
            return f"{name} of {node[0]} is {seen}, axc writes {wanted}"
    return ""


def _source(graph: CanonicalGraph, place: str) -> str:
    """Describes a value by the operator that produces it and the nearest weight or input before that."""
    made = {output: node for node in graph.nodes for output in node[4]}
    if place not in made:
        return place or "nothing"
    name = str(made[place][0])
    waiting, looked = [place], set[str]()
    while waiting:
        at = waiting.pop(0)
        if at not in made:
            return f"{name} (from {at})"
        if at not in looked:
            looked.add(at)
            node = made[at]
            found = next((each for each in node[3] if each in graph.tensors), "")
            if found:
                return f"{name} (from {found})"
            waiting += node[3][1:2] if node[0] == "MatMul" else node[3]  # its second input is the weight
    return name


__all__ = ["CanonicalGraph", "canonical", "checksum", "difference", "unused_tensor"]
