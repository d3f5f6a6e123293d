"""A board that computes other bits than this machine is found, with the layer, token and tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from axrun.errors import BadInput
from axrun.format.bundle import MANIFEST, Bundle, sha256
from axrun.measure.trace import trace
from ci.nightly import one_answer
from tests.doctor import axmodels

Trace = Callable[[str], Mapping[str, Any]]
COUNT = 40


def tracing(path: Path, manifest_sha256: str = "") -> Trace:
    def run(part: str) -> Mapping[str, Any]:
        found = trace(path, part, COUNT).json()
        return {**found, "manifest_sha256": manifest_sha256 or found["manifest_sha256"]}

    return run


def test_the_layer_and_tensor_of_a_changed_level_are_named(bundle_s8: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny"
    shutil.copytree(bundle_s8, other)
    name = Bundle.open(other).layer_path(2).name

    def change(model: onnx.ModelProto) -> None:
        (levels,) = (tensor for tensor in model.graph.initializer if "v_proj" in tensor.name and tensor.data_type == 3)
        values = numpy_helper.to_array(levels).copy()
        values[:] = np.roll(values, 1, axis=0)
        levels.CopyFrom(numpy_helper.from_array(values, levels.name))

    axmodels.edit(other, name, change)
    here, board = tracing(bundle_s8), tracing(other, sha256(bundle_s8 / MANIFEST))
    assert one_answer.first_difference(here, board) == "layer 2, token 0, V"
    assert one_answer.first_difference(here, here) == ""


def test_a_single_row_is_found(bundle_s8: Path) -> None:
    here = tracing(bundle_s8)

    def board(part: str) -> Mapping[str, Any]:  # a kernel that is wrong at token 17 only
        found = dict(here(part))
        found["parts"] = {**found["parts"], "layer 1": {**found["parts"]["layer 1"], "output": "0" * 16}}
        if part == "layer 1":
            rows = found["rows"]["output"]
            found["rows"] = {**found["rows"], "output": [*rows[:17], "0" * 16, *["1"] * (COUNT - 18)]}
        return found

    assert one_answer.first_difference(here, board) == "layer 1, token 17, output"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 3}, "another number of tokens"),
        ({"manifest_sha256": "0"}, "another bundle"),
        ({"parts": ["layer 0"]}, "for parts, expected a table"),
        ({"parts": {}, "rows": 3}, "for rows, expected a table"),
        ({"parts": {}, "rows": {"K": ["1"], "V": [], "output": []}}, "no digests of 40 rows of K"),
    ],
)
def test_a_trace_of_another_shape_is_refused(bundle_s8: Path, change: dict[str, Any], message: str) -> None:
    here = tracing(bundle_s8)
    with pytest.raises(BadInput, match=message):
        one_answer.first_difference(here, lambda part: {**here(part), **change})


def test_what_is_not_comparable_is_named(bundle_s8: Path, bundle_fp32: Path) -> None:
    assert one_answer.incomparable(Bundle.open(bundle_s8), "ax") == ""
    assert one_answer.incomparable(Bundle.open(bundle_s8), "ort") == "engine ort sums in an order of its own"
    assert "sums with fp32 weights" in one_answer.incomparable(Bundle.open(bundle_fp32), "ax")


def test_the_bundle_must_be_the_deployed_one(bundle_s8: Path) -> None:
    with pytest.raises(BadInput, match="--hil-bundle"):
        one_answer.host_digest(bundle_s8, "0" * 64, "ax")
