"""Infinities and NaNs: every engine and every command reports where they first occur."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axrun.cli import main
from axrun.decoder import Decoder
from axrun.errors import CheckFailed, NotFinite
from axrun.format import axmodel
from axrun.format.axmodel import TensorInfo
from axrun.format.bundle import Bundle
from axrun.format.dtypes import from_float32
from axrun.model import Model
from axrun.session import open_session
from axrun.session.finite import PIECE, FiniteCheck
from tests.damage import OVERFLOW, set_float

BAD = [np.inf, -np.inf, np.nan]
LARGEST = {"FLOAT": 3.4e38, "FLOAT16": 65504.0, "BFLOAT16": 3.38e38}


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("bad", BAD)
def test_the_first_row_that_is_not_finite_is_named(dtype: str, bad: float) -> None:
    infos = [TensorInfo("K_cache_out", dtype, (1, 9, 4)), TensorInfo("output", dtype, (1, 9, PIECE // 8))]
    arrays = {info.name: from_float32(np.zeros(tuple(map(int, info.shape)), np.float32), dtype) for info in infos}
    check = FiniteCheck("layer 3", [*infos, TensorInfo("indices", "INT32", (1, 9, 4))], arrays)
    for value in (LARGEST[dtype], -LARGEST[dtype], 1e-44):
        arrays["output"][0, 8, -1] = from_float32(np.array([value], np.float32), dtype)[0]
        check()
    arrays["output"][0, 8, -1] = from_float32(np.array([bad], np.float32), dtype)[0]
    with pytest.raises(NotFinite, match="layer 3 returned a value that is not finite in row 8 of output"):
        check()
    arrays["K_cache_out"][0, 5:, 2] = from_float32(np.array([bad], np.float32), dtype)[0]
    with pytest.raises(NotFinite, match="in row 5 of K_cache_out"):
        check()


@pytest.fixture
def broken(build_tiny_fp16: Path, tmp_path: Path) -> Path:
    """A float16 bundle in which layer 2 adds a value beyond 65504 to every token."""
    bundle = Path(shutil.copytree(build_tiny_fp16, tmp_path / "broken"))
    file = Bundle.open(bundle).layer_path(2)
    set_float(file, "model.layers.2.mlp.down_proj.weight_scale", 5, OVERFLOW)
    return bundle


@pytest.fixture(scope="module")
def build_tiny_fp16(build_tiny: Any) -> Path:
    return Path(build_tiny(hidden_state_type="fp16"))


def test_the_layer_and_the_token_are_named(broken: Path, engine: str) -> None:
    model = Model.load(Bundle.open(broken), engine)
    with pytest.raises(
        CheckFailed, match=r"layer 2 returned a value that is not finite in output, at token 0: it exceeds 65504"
    ):
        model.forward([5, 6, 7])
    assert model.length == 0
    for array in (*model.decoder.cache.keys, *model.decoder.cache.values):
        assert np.isfinite(array).all()


@pytest.mark.parametrize("verb", ["run", "eval", "bench", "model"])
def test_every_command_reports_it(
    verb: str, broken: Path, engine: str, tiny_reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "run": [broken, "--prompt", "1+1="],
        "eval": [broken, "--reference", tiny_reference],
        "bench": [broken, "--prompt-lengths", "4", "--depths", "4", "--repeat", "1", "--tokens", "2"],
        "model": [Bundle.open(broken).layer_path(2), "--repeat", "1"],
    }[verb]
    assert main([verb, *map(str, flags), "--engine", engine]) == 1
    error = capsys.readouterr().err.splitlines()
    assert any("not finite in" in line for line in error)
    assert error[-1].startswith("Build with --hidden_state_type bf16 or fp32")


@pytest.fixture(scope="module")
def tiny_reference(tmp_path_factory: pytest.TempPathFactory, build_tiny_fp16: Path) -> Path:
    """Reference logits in the right format; their values do not matter here."""
    from axrun.format.logits import ReferenceLogits

    vocabulary = Bundle.open(build_tiny_fp16).vocab_size
    top = 2
    logprobs = np.full((1, 7, top), np.log(0.25), np.float32)
    sample = ReferenceLogits(
        tokens=np.arange(8, dtype=np.uint32)[None],
        ids=np.tile(np.arange(top, dtype=np.uint32), (1, 7, 1)),
        logprobs=logprobs,
        rest=np.full((1, 7), np.log(0.5), np.float32),
        following=np.full((1, 7), np.log(0.25), np.float32),
        continuations=np.zeros((1, 2), np.uint32),
        about={"vocab_size": vocabulary, "prompt": 4},
    )
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    path.write_bytes(sample.encode())
    return path


@pytest.mark.parametrize(("tensor", "output"), [("k_proj.bias", "K_cache_out"), ("v_proj.bias", "V_cache_out")])
def test_keys_and_values_are_checked(
    tensor: str, output: str, build_tiny_fp16: Path, engine: str, tmp_path: Path
) -> None:
    """A key of minus infinity disappears in the softmax: no output would show it."""
    file = tmp_path / "layer.axmodel"
    shutil.copy(Bundle.open(build_tiny_fp16).layer_path(1), file)
    set_float(file, f"model.layers.1.self_attn.{tensor}", 3, -1e6)
    decoder = Decoder([open_session(file, engine)])
    with pytest.raises(CheckFailed, match=f"layer 1 returned a value that is not finite in {output}, at token 0"):
        decoder.forward(np.ones((3, 128), np.float32), 0)


def test_all_logits_are_checked(bundle_fp32: Path, engine: str, tmp_path: Path) -> None:
    """A token with a logit of minus infinity is never sampled, so only the check notices it."""
    bundle = Path(shutil.copytree(bundle_fp32, tmp_path / "bundle"))
    file = Bundle.open(bundle).post_path
    stored = next(t for t in axmodel.read(file).initializers.values() if len(t.dims) == 2)
    with file.open("r+b") as opened:
        opened.seek(stored.offset)
        opened.write(np.full(stored.dims[1], np.inf, np.float32).tobytes())
    model = Model.load(Bundle.open(bundle), engine)
    with pytest.raises(CheckFailed, match=r"the model returned a logit of (nan|-?inf)"):
        model.forward([5, 6, 7])


def test_padding_is_ignored(build_tiny_fp16: Path, engine: str, tmp_path: Path) -> None:
    """Rows after the tokens are padding: the session reports them, and the decoder ignores them."""
    file = tmp_path / "layer.axmodel"
    shutil.copy(Bundle.open(build_tiny_fp16).layer_path(1), file)
    set_float(file, "model.layers.1.mlp.down_proj.weight_scale", 5, 1.0)  # adds hundreds, still below 65504
    decoder = Decoder([open_session(file, engine)])
    step = decoder._step(next(iter(decoder.chunks(0, 3))))
    run, seen = step.bindings[0].run, []

    def padded() -> None:
        step.input[0, 5:7] = 1
        step.input[0, 5:7, 5] = 65504, -65504
        try:
            run()
        except NotFinite as error:
            seen.append(error.row)
            raise

    step.bindings[0].run = padded  # type: ignore[method-assign]
    outputs = [output.copy() for _, output in decoder.run(np.ones((3, 128), np.float16), 0)]
    assert seen in ([5], [6])
    assert np.isfinite(np.concatenate(outputs)).all()


def test_large_finite_values_are_allowed(
    build_tiny_fp16: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(build_tiny_fp16), "--prompt", "1+1=", "--json", "--engine", engine]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "2"
