"""How the graph of an axmodel differs from the one that this compiler writes for the same model and flags."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from axc.compile import Target
from axrun.format.axmodel import Axmodel, Node


def target(manifest: Mapping[str, Any]) -> Target | None:
    """The flags that a bundle was built with; None where the manifest does not tell them."""
    flags = manifest.get("flags")
    names = {field.name for field in dataclasses.fields(Target)}
    if not isinstance(flags, dict) or set(flags) != names:
        return None
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    return Target(**given)


def difference(model: Axmodel, fresh: Axmodel) -> str:
    """The first difference in words; empty where the graphs do the same."""
    ours, theirs = ([_signature(node, graph) for node in graph.nodes] for graph in (model, fresh))
    for what, first, last, other_first, other_last in difflib.SequenceMatcher(
        None, ours, theirs, autojunk=False
    ).get_opcodes():
        if what == "equal":
            continue
        gone = ", ".join(_named(node, fresh) for node in fresh.nodes[other_first:other_last][:2])
        extra = ", ".join(_named(node, model) for node in model.nodes[first:last][:2])
        if what == "delete":
            return f"the graph has {extra}, which the compiler does not write"
        if what == "insert":
            return f"the graph lacks {gone}"
        attributes = _attributes(model.nodes[first], fresh.nodes[other_first])
        return attributes or f"the graph has {extra} in the place of {gone}"
    numbers, other_numbers = _numbers(model), _numbers(fresh)
    for node, other in zip(model.nodes, fresh.nodes, strict=True):
        wiring = [numbers.get(name, name) for name in node.inputs]
        right = [other_numbers.get(name, name) for name in other.inputs]
        if wiring != right:
            at = next((i for i, (a, b) in enumerate(zip(wiring, right, strict=False)) if a != b), 0)
            sources = _source(model, node.inputs[at]), _source(fresh, other.inputs[at])
            return f"input {at} of {_named(node, model)} is {sources[0]}, the compiler takes {sources[1]}"
    for info, wanted in zip((*model.inputs, *model.outputs), (*fresh.inputs, *fresh.outputs), strict=False):
        if info != wanted:
            shapes = [f"{each.name} {each.dtype}{list(each.shape)}" for each in (info, wanted)]
            return f"{shapes[0]}, the compiler writes {shapes[1]}"
    return ""


def unused(model: Axmodel) -> set[str]:
    """Initializers that no node reads."""
    return set(model.initializers) - {name for node in model.nodes for name in node.inputs}


def _signature(node: Node, graph: Axmodel) -> str:
    constants = [name if name in graph.initializers else "" for name in node.inputs]
    return repr((node.op_type, node.domain, constants, sorted(_plain(node).items())))


def _plain(node: Node) -> dict[str, Any]:
    """Attributes as the file can hold them: floats of 32 bits."""
    return {
        name: float(f"{np.float32(value):.7g}") if isinstance(value, float) else value
        for name, value in node.attributes.items()
    }


def _named(node: Node, graph: Axmodel) -> str:
    constants = [name for name in node.inputs if name in graph.initializers]
    return node.op_type + (f" with {constants[0]}" if constants else "")


def _attributes(node: Node, other: Node) -> str:
    if node.op_type != other.op_type:
        return ""
    for name in sorted({*node.attributes, *other.attributes}):
        seen, wanted = _plain(node).get(name), _plain(other).get(name)
        if seen != wanted:
            return f"{name} of {node.op_type} is {seen}, the compiler writes {wanted}"
    return ""


def _source(graph: Axmodel, name: str) -> str:
    """A value by the input or weight that it is first made of."""
    made = {output: node for node in graph.nodes for output in node.outputs}
    known, what = name, ""
    while known in made and made[known].inputs:
        what = what or made[known].op_type
        known = made[known].inputs[0]
    return f"{known} by way of {what}" if what else known


def _numbers(graph: Axmodel) -> dict[str, str]:
    """Values by the number of the node that makes them: names alone mean nothing."""
    return {output: f"{index}.{at}" for index, node in enumerate(graph.nodes) for at, output in enumerate(node.outputs)}
