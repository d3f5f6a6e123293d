"""Builds with the vendor's compiler, replaced by a stand-in with its command line that compiles nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from axc import build, pulsar2
from axc.inspect import describe
from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import Bundle, verify

STAND_IN = Path(__file__).resolve().parents[1] / "stand_in" / "pulsar2"
FLAGS: dict[str, Any] = {"prefill_len": 32, "kv_cache_len": 255, "last_kv_cache_len": (32, 64)}


@dataclasses.dataclass
class StandIn:
    """Runs the stand-in as a local process; `called` records its arguments."""

    fault: str = ""
    commands: str = "llm_build"
    identity: str = "sha256:" + "0" * 64
    version: str = "0.0-stand-in"
    called: list[list[str]] = dataclasses.field(default_factory=list)

    def has(self, command: str) -> bool:
        return self._run([command, "--help"]) == 0

    def run(self, arguments: Sequence[str], reads: Path, writes: Path) -> int:
        self.called.append(list(arguments))
        return self._run(arguments)

    def _run(self, arguments: Sequence[str]) -> int:
        environment = {**os.environ, "FAULT": self.fault, "WITH": self.commands}
        return subprocess.run(
            [sys.executable, STAND_IN, *arguments], env=environment, stdout=subprocess.DEVNULL
        ).returncode


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def make(checkpoint: Path, output: Path, compiler: StandIn, **options: Any) -> dict[str, Any]:
    planned = build.plan(build.Options(input_path=checkpoint, output_path=output, **{**FLAGS, **options}))
    return pulsar2.build(planned, compiler)


def test_a_bundle_is_as_complete_as_ours(tiny_qwen2: Path, output: Path, tmp_path: Path) -> None:
    manifest = make(tiny_qwen2, output, StandIn())
    assert verify(output)["files"] == manifest["files"]
    bundle = Bundle.open(output)
    assert (bundle.maker, [group.history for group in bundle.groups]) == ("pulsar2", [255, 0, 32, 64])
    assert manifest["tools"]["producer"] == "Pulsar2 stand-in 0.0-stand-in"
    assert "accuracy" not in manifest

    build.build(build.plan(build.Options(input_path=tiny_qwen2, output_path=tmp_path / "ours", **FLAGS)))
    ours = Bundle.open(tmp_path / "ours")
    assert set(manifest["files"]) == set(ours.manifest["files"])
    same = {name for name, entry in manifest["files"].items() if entry == ours.manifest["files"][name]}
    assert set(manifest["files"]) - same == {name for name in manifest["files"] if name.endswith(".axmodel")}
    assert describe(output / "qwen2_p32_l0_together.axmodel")["maker"] == "other"  # a stand-in, not the vendor


def test_it_runs_twice_serially_with_translated_flags(tiny_qwen2: Path, output: Path) -> None:
    compiler = StandIn()
    make(tiny_qwen2, output, compiler, parallel=4, weight_type="s8", post_weight_type="bf16", chip="AX620E")
    first, second = compiler.called
    places = [words.pop(words.index("--output_path") + 1) for words in (first, second)]
    assert first == second
    assert places[0] != places[1]
    said = " ".join(first)
    for words in (
        "llm_build --input_path",
        "--kv_cache_len 255 --prefill_len 32 --last_kv_cache_len 32 --last_kv_cache_len 64",
        "--hidden_state_type bf16 --weight_type s8 --post_weight_type bf16 --chip AX620E --parallel 1",
    ):
        assert words in said


def test_llm_build2_gets_total_lengths(tiny_qwen2: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiler = StandIn(commands="llm_build,llm_build2")
    manifest = make(tiny_qwen2, output, compiler, last_kv_cache_len=(96,))
    assert [group["history"] for group in manifest["model"]["groups"]] == [255, 0, 32, 64, 96]
    assert "makes a group for every step: histories 32, 64, 96" in capsys.readouterr().out
    said = " ".join(compiler.called[0])
    assert "llm_build2" in said
    assert "--max_context 256 --decode_step_size 0 --prefill_len 128 --prefill_step_size 32" in said
    assert "--kv_cache_len" not in said


def test_llm_build2_needs_a_multiple_of_the_step(tiny_qwen2: Path, output: Path) -> None:
    with pytest.raises(BadInput, match=r"--last_kv_cache_len 100 is not a multiple\nGive 96 or 128\."):
        make(tiny_qwen2, output, StandIn(commands="llm_build2"), last_kv_cache_len=(100,))


def test_without_prefill_there_is_one_group(tiny_qwen2: Path, output: Path) -> None:
    for commands in ("llm_build", "llm_build2"):
        manifest = make(tiny_qwen2, output, StandIn(commands=commands), prefill_len=0, last_kv_cache_len=(), force=True)
        assert manifest["model"]["layer_file"] == "qwen2_l%d.axmodel"
        assert len(manifest["model"]["groups"]) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("unstable", "differently in two runs: sha256 "),
        ("missing", "made 4 axmodels, expected 5: qwen2_p32_l3_together.axmodel is missing"),
        ("narrow", r"has V_cache BFLOAT16\[1, 255, \d+\], expected BFLOAT16\[1, 255, 64\]"),
        ("small", r"l0_together.axmodel has [\d,]+ bytes, expected at least"),
        ("uneven", "l1_together.axmodel has .* it is damaged"),
        ("fails", "pulsar2 llm_build ended with exit code 1"),
    ],
)
def test_a_faulty_compiler_leaves_nothing(tiny_qwen2: Path, output: Path, fault: str, said: str) -> None:
    with pytest.raises(CheckFailed, match=said):
        make(tiny_qwen2, output, StandIn(fault))
    assert list(output.parent.iterdir()) == []


def test_missing_groups_are_detected(tiny_qwen2: Path, output: Path) -> None:
    class Forgetful(StandIn):
        def run(self, arguments: Sequence[str], reads: Path, writes: Path) -> int:
            at = list(arguments).index("--last_kv_cache_len")
            return super().run([*arguments[:at], *arguments[at + 2 :]], reads, writes)

    with pytest.raises(CheckFailed, match="has 3 shape groups, expected 4"):
        make(tiny_qwen2, output, Forgetful())


def test_an_image_without_either_command_is_refused(tiny_qwen2: Path, output: Path) -> None:
    with pytest.raises(BadInput, match="has none of llm_build2, llm_build"):
        make(tiny_qwen2, output, StandIn(commands="none"))


def test_another_bundle_is_kept(tiny_qwen2: Path, output: Path) -> None:
    make(tiny_qwen2, output, StandIn())
    before = json.loads((output / "manifest.json").read_text())
    with pytest.raises(BadInput, match="holds another bundle"):
        make(tiny_qwen2, output, StandIn(), kv_cache_len=127)
    assert verify(output) == before
