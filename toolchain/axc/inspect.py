"""`axc inspect`: describes an axmodel or a bundle as text or JSON. Reads the vendor's axmodels too."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from axc import vendor_axmodel
from axrun.errors import BadInput
from axrun.format.axmodel import Axmodel, TensorInfo, read
from axrun.format.bundle import Bundle, compiler

NOT_SHOWN = ("axmodel.groups", vendor_axmodel.EXTRA_DATA)  # metadata that is shown decoded instead


def describe(path: Path) -> dict[str, Any]:
    """A JSON-able description. Raises BadInput."""
    if path.is_dir():
        bundle = Bundle.open(path)
        shown = ("maker", "tools", "model", "memory", "files")
        return {"bundle": bundle.name, **{key: bundle.manifest.get(key) for key in shown}}
    return describe_axmodel(read(path), path)


def describe_axmodel(model: Axmodel, path: Path) -> dict[str, Any]:
    """Producer, groups, inputs and outputs, operators, and the size of each initializer."""
    if not model.inputs and not model.nodes:
        raise BadInput(f"{path} is a protobuf file without a graph, not an axmodel")
    largest = sorted(model.initializers.values(), key=lambda tensor: (-tensor.nbytes, tensor.name))
    return {
        "file": path.name,
        "bytes": model.nbytes,
        "producer": model.producer_name,
        "version": model.version,
        "maker": "axc" if model.ours else "vendor" if model.vendors else "other",
        "ir_version": model.ir_version,
        "opset": model.opset,
        **({"vendor": vendor_axmodel.describe(model)} if model.vendors else {}),
        "metadata": dict(sorted(model.metadata.items())),
        "groups": [{"group": g.index, "tokens": g.tokens, "history": g.history} for g in model.groups]
        or [{"group": index, "node": node.name or node.op_type} for index, node in enumerate(_npu_nodes(model))],
        "inputs": [_info(info) for info in model.inputs],
        "outputs": [_info(info) for info in model.outputs],
        "operators": dict(sorted(Counter(node.op_type for node in model.nodes).items())),
        "initializers": [
            {
                "name": t.name,
                "dtype": t.dtype,
                "dims": list(t.dims),
                "bytes": t.nbytes,
                "offset": t.offset,
                **({"holds": vendor_axmodel.blob(t.name)} if model.vendors else {}),
            }
            for t in largest
        ],
    }


def _npu_nodes(model: Axmodel) -> list[Any]:
    """The vendor's compiled nodes (`neu mode`), one per shape group."""
    return [node for node in model.nodes if "neu" in node.op_type.lower()]


def _info(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "dtype": info.dtype, "shape": list(info.shape)}


def as_json(path: Path) -> str:
    return json.dumps(describe(path), indent=2)


def as_text(path: Path) -> str:
    """Columns for a terminal."""
    about = describe(path)
    text = _bundle_text(about) if "bundle" in about else _axmodel_text(about)
    return "\n".join(map(_printable, text.split("\n")))


def _printable(line: str) -> str:
    """The line with control characters escaped, which a terminal could interpret as commands."""
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _axmodel_text(about: dict[str, Any]) -> str:
    lines = [
        f"{about['file']}  {about['bytes']:,} bytes",
        f"producer     {about['producer']} {about['version']} ({about['maker']}), "
        f"IR version {about['ir_version']}, opset {about['opset']}",
        *_vendor_lines(about.get("vendor")),
        *(f"{key:<34} {value}" for key, value in about["metadata"].items() if key not in NOT_SHOWN),
    ]
    for group in about["groups"]:
        what = f"node {group['node']}" if "node" in group else f"{group['tokens']} tokens after {group['history']} rows"
        lines.append(f"group {group['group']:<6} {what}")
    for kind in ("inputs", "outputs"):
        for info in about[kind]:
            lines.append(f"{kind[:-1]:<12} {info['name']:<14} {info['dtype']:<9} {info['shape']}")
    lines.append("operators    " + ", ".join(f"{count} {name}" for name, count in about["operators"].items()))
    total = sum(tensor["bytes"] for tensor in about["initializers"])
    lines.append(f"initializers {len(about['initializers'])}, {total:,} bytes")
    for tensor in about["initializers"]:
        holds = f"  ({tensor['holds']})" if tensor.get("holds") else ""
        lines.append(f"  {tensor['bytes']:>13,}  {tensor['dtype']:<9} {tensor['dims']!s:<16} {tensor['name']}{holds}")
    return "\n".join(lines)


def _vendor_lines(about: dict[str, Any] | None) -> list[str]:
    """The vendor-specific entries, one line each."""
    if about is None:
        return []
    lines = [f"{key:<12} {about[key]}" for key in ("commit", "npu_mode", "chip") if about.get(key)]
    for node in about["nodes"]:
        lines.append(f"node         {node['name']}: {node['op_type']}")
        lines += [f"  {name:<16} {json.dumps(value)}" for name, value in node["attributes"].items()]
    if vendor_axmodel.EXTRA_DATA in about:
        decoded = about[vendor_axmodel.EXTRA_DATA]
        lines.append(f"{vendor_axmodel.EXTRA_DATA:<12} {decoded if isinstance(decoded, str) else json.dumps(decoded)}")
    return lines


def _bundle_text(about: dict[str, Any]) -> str:
    lines = [f"{about['bundle']}  maker {about['maker']}, {compiler(about)}"]
    lines += [f"{key:<20} {value}" for key, value in about["model"].items() if key != "groups"]
    for index, group in enumerate(about["model"]["groups"]):
        lines.append(f"group {index:<14} {group['tokens']} tokens after {group['history']} rows")
    lines += [f"memory {key:<13} {value:,} bytes" for key, value in about["memory"].items()]
    lines += [f"{entry['size']:>13,}  {entry['sha256'][:16]}  {name}" for name, entry in about["files"].items()]
    return "\n".join(lines)
