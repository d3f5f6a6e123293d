"""axrun bench: the report is consistent, and describes the bundle, machine and engine that ran."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from pathlib import Path

import onnxruntime
import pytest

from axrun import VERSION
from axrun.cli import main
from axrun.machine import describe, peak_memory
from axrun.measure.bench import Options, bench

ARM = """processor	: 0
BogoMIPS	: 48.00
Features	: fp asimd evtstrm aes
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x2
CPU part	: 0xd05
CPU revision	: 0

processor	: 1
CPU implementer	: 0x41
CPU part	: 0xd05
"""

ISAS = "(portable|avx2|avx512|avx512_bf16|avx512_pairs|neon|neon_dotprod)"
ENGINES = {
    "ax": rf"ax axc {VERSION} {ISAS}",
    "ax-int8": rf"ax-int8 axc {VERSION} {ISAS}",
    "ort": f"ort {onnxruntime.__version__}",
}


def test_json_has_all_figures_and_the_environment(
    bundle_s8: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompt-lengths", "5,40", "--depths", "0,100", "--tokens", "4", "--repeat", "3", "--threads", "1"]
    started = time.perf_counter()
    assert main(["bench", str(bundle_s8), "--json", "--verify", "--engine", engine, *flags]) == 0
    seconds = time.perf_counter() - started
    found = json.loads(capsys.readouterr().out)
    assert [(entry["tokens"], entry["depth"]) for entry in found["prompts"]] == [(5, 0), (40, 0)]
    assert [(entry["tokens"], entry["depth"]) for entry in found["turns"]] == [(16, 100)]
    assert [(entry["tokens"], entry["depth"]) for entry in found["decode"]] == [(4, 0), (4, 100)]
    spent = found["load_seconds"]
    for entry, timed in [
        *((entry, entry["ttft_seconds"]) for entry in found["prompts"] + found["turns"]),
        *((entry, entry["token_seconds"]) for entry in found["decode"]),
    ]:
        assert len(timed["runs"]) == 3
        assert 0 < timed["min"] == min(timed["runs"]) <= timed["median"] <= timed["max"] == max(timed["runs"])
        assert timed["median"] == sorted(timed["runs"])[1]
        decoded = "token_seconds" in entry
        assert entry["tokens_per_second"] == pytest.approx(
            (1 if decoded else entry["tokens"]) / timed["median"], rel=1e-4
        )
        spent += sum(timed["runs"]) * (entry["tokens"] if decoded else 1)
    assert spent < seconds
    assert found["manifest_sha256"] == hashlib.sha256((bundle_s8 / "manifest.json").read_bytes()).hexdigest()
    assert re.fullmatch(ENGINES[engine], found["engine"])
    assert (found["bundle"], found["maker"], found["weight_type"]) == ("qwen2", "cpu", "s8")
    assert re.fullmatch(r"axc \S+, digest [0-9a-f]{16}, gguf \S+, numpy \S+", found["compiler"])
    assert (found["threads"], found["axrun"], found["warmup"]) == (1, VERSION, 1)
    assert found["machine"]["python"] == platform.python_version()
    assert found["peak_rss"] > 30e6


def test_lengths_that_fit_are_the_default(bundle_s8: Path) -> None:
    report = bench(bundle_s8, Options(tokens=2, warmup=0, repeat=1))
    assert [entry.tokens for entry in report.prompts] == [16, 128]
    assert [entry.depth for entry in report.decode] == [16, 128]
    assert report.threads == describe().cpus


def test_the_tables(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt-lengths", "5", "--depths", "9", "--tokens", "2", "--repeat", "1"]
    assert main(["bench", str(bundle_s8), *flags]) == 0
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()[5:]] == ["prompt of 5", "turn of 16 at 9", "decode at 9"]
    assert "decode at 9" in err
    assert main(["bench", str(bundle_s8), "--markdown", *flags]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {5}
    assert len(table) == 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt-lengths", "256"], "--prompt-lengths has 256, the bundle's context is 255: expected at most 255"),
        (["--prompt-lengths", "0"], "--prompt-lengths is 0; expected numbers from 1 on"),
        (["--depths", "-1"], "--depths is -1; expected numbers from 0 on"),
        (["--depths", "230"], "--depths has 230, the bundle's context is 255: expected at most 223"),
        (["--repeat", "0"], "--repeat is 0"),
        (["--warmup", "-1"], "--warmup -1"),
        (["--tokens", "1"], "--tokens 1"),
    ],
)
def test_invalid_options_are_refused(
    bundle_s8: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["bench", str(bundle_s8), *flags]) == 2
    assert words in capsys.readouterr().err


def test_lists_must_be_numbers(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", str(bundle_s8), "--depths", "many"])
    assert "--depths" in capsys.readouterr().err


def test_a_board_is_identified_by_device_tree_and_cores(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(ARM)
    (tmp_path / "device-tree").mkdir()
    (tmp_path / "device-tree" / "model").write_bytes(b"Axera AX650N demo\0")
    machine = describe(tmp_path)
    assert (machine.cpu, machine.board) == ("2 x Cortex-A55", "Axera AX650N demo")


def test_the_architecture_is_the_fallback(tmp_path: Path) -> None:
    assert describe(tmp_path).cpu == platform.machine()
    assert describe(tmp_path).board == ""
    assert peak_memory(tmp_path) is None
    (tmp_path / "cpuinfo").write_text(ARM.replace("0xd05", "0xfff"))
    assert describe(tmp_path).cpu == platform.machine()
