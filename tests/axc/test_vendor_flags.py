"""Flags of the vendor's llm_build: those that only concern the NPU, and --ret_postnorm."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from axc import cli, pulsar2, vendor_flags
from axc.vendor_flags import FLAGS, OURS
from axrun.errors import BadInput
from axrun.format.axmodel import read
from axrun.format.bundle import Bundle
from axrun.model import Model
from axrun.session import open_session
from tests.axc.test_pulsar2 import StandIn, make
from tests.conftest import Builder

PASSED = sorted(FLAGS.keys() - OURS)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("form", [["{} 2"], ["{}", "2"], ["{}=2"], ["{}"]])
def test_axc_refuses_them_by_name(flag: str, form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.format(flag) for word in form if " " not in word] or [flag, "2"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["llm_build", "--input_path", "in", "--output_path", "out", *words])
    assert ended.value.code == 2
    error, *more = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {flag} is ")
    assert FLAGS[flag].instead in error
    assert len(more) <= 2


def test_they_are_passed_on() -> None:
    for flag in PASSED:
        assert vendor_flags.passed_on([flag, "2"]) == vendor_flags.passed_on([f"{flag}=2"]) == (flag, "2")
    assert vendor_flags.passed_on(["--ret_postnorm", *PASSED]) == ("--ret_postnorm", *PASSED)
    assert vendor_flags.passed_on([]) == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--npu", "1"], "'--npu' is not passed on to the vendor's compiler; expected --ret_postnorm, --image_size, "),
        (["--max_context", "9"], "'--max_context' is not passed on"),
        (["--input_path=x"], "'--input_path' is not passed on"),
        (["-w", "s4"], "'-w' stands behind no flag"),
        (["NPU3"], "'NPU3' stands behind no flag"),
        (["--npu_mode", "NPU3", "NPU2"], "'NPU2' stands behind no flag"),
        (["--ret_postnorm", "1"], "'1' stands behind no flag"),
        (["--npu_mode", "NPU3", "--npu_mode=NPU1"], "--npu_mode is given twice"),
    ],
)
def test_what_cannot_be_passed_on(words: list[str], said: str) -> None:
    with pytest.raises(BadInput) as refused:
        vendor_flags.passed_on(words)
    assert said in str(refused.value)


def test_the_vendor_s_compiler_gets_them(tiny_qwen2: Path, tmp_path: Path) -> None:
    compiler, given = StandIn(), ("--npu_mode", "NPU3", "--ret_postnorm")
    manifest = make(tiny_qwen2, tmp_path / "bundle", compiler, vendor=given)
    assert [tuple(words[-3:]) for words in compiler.called] == [given, given]
    assert manifest["flags"]["vendor"] == given
    with pytest.raises(BadInput, match=r"--image_size is of llm_build; this image has llm_build2"):
        make(tiny_qwen2, tmp_path / "other", StandIn(commands="llm_build2"), vendor=("--image_size", "448"))
    assert pulsar2.COMMANDS == ("llm_build2", "llm_build")


def test_the_post_model_returns_the_normalised_hidden_state(build_tiny: Builder, tiny_qwen2: Path) -> None:
    """Compared with the norm of transformers' model in every engine; the logits do not change."""
    path = build_tiny(hidden_state_type="fp32", post_topk=2, ret_postnorm=True)
    bundle = Bundle.open(path)
    assert json.loads((path / "manifest.json").read_text())["flags"]["ret_postnorm"] is True
    hidden = np.random.default_rng(0).standard_normal((3, bundle.hidden_size)).astype(np.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    with torch.no_grad():
        wanted = model.model.norm(torch.from_numpy(hidden)).numpy()
    names = [info.name for info in read(bundle.post_path).outputs]
    assert names == ["output", "indices", "prob", "postnorm", "logits"]
    for engine in ("ax", "ort"):
        session = open_session(bundle.post_path, engine)
        infos = {info.name: info for info in (*session.groups[0].inputs, *session.groups[0].outputs)}
        assert infos["postnorm"].shape == infos["input"].shape
        for row, norm in zip(hidden, wanted, strict=True):
            arrays = {name: session.allocate(infos[name]) for name in ("input", "postnorm")}
            arrays["input"][0] = row
            session.bind(0, arrays).run()
            np.testing.assert_allclose(arrays["postnorm"][0, 0], norm, rtol=1e-5, atol=1e-5)
        with_it = Model.load(bundle, engine).post(hidden)
        without = Model.load(Bundle.open(build_tiny(hidden_state_type="fp32")), engine).post(hidden)
        np.testing.assert_array_equal(with_it, without)
