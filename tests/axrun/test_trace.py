"""axrun trace: digests of what every layer computes."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from axrun.cli import main
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.measure.trace import STRIDE, trace
from axrun.model import Model


def digest(values: np.ndarray) -> str:
    return sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("kind", ["bundle_s8", "bundle_fp32"])
def test_digests_are_those_of_the_whole_model(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    bundle = Bundle.open(path)
    model, count = Model.load(bundle), 150  # beyond a prefill group
    tokens = [place * STRIDE % bundle.vocab_size for place in range(count)]
    logits = model.forward(tokens, logits="all")
    cache = model.decoder.cache
    found = trace(path, "post", count)
    assert [*found.parts] == [*(f"layer {index}" for index in range(bundle.layers)), "post"]
    for index in range(bundle.layers):
        part = found.parts[f"layer {index}"]
        assert part["K"] == digest(cache.keys[index][0, :count])
        assert part["V"] == digest(cache.values[index][0, :count])
    assert found.parts["post"] == {"logits": digest(logits)}
    assert found.rows == {"logits": [digest(row) for row in logits]}


def test_the_command_prints_lines_or_json(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(bundle_s8), "--tokens", "3", "--rows", "layer 1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: len(rows) for name, rows in found["rows"].items()} == {"K": 3, "V": 3, "output": 3}
    assert main(["trace", str(bundle_s8), "--tokens", "3"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert shown.err.splitlines()[-1] == "[5/5] post"
    assert (found["source"], " tokens of a fixed sequence, manifest " in lines[0]) == ("a fixed sequence", True)
    assert lines[1].split() == ["layer", "0", *(word for pair in found["parts"]["layer 0"].items() for word in pair)]


@pytest.mark.parametrize(
    ("part", "count", "message"),
    [
        ("layer 9", None, "has no 'layer 9'; its parts are layer 0 to layer 3, and post"),
        ("", 0, "0 tokens: expected 1 to 255"),
        ("", 256, "256 tokens: expected 1 to 255"),
    ],
)
def test_bad_requests(bundle_s8: Path, part: str, count: int | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        trace(bundle_s8, part, count)
