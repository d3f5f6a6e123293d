"""The axrun command line: answers, console lines, exit codes, and bad input."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axrun.cli import main
from axrun.format.bundle import Bundle
from tests import vendor_files
from tests.doctor.axmodels import sign

ROOT = Path(__file__).parents[2]


def axrun(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "axrun", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def copied(bundle_s8: Path, tmp_path: Path) -> Path:
    """A copy of a bundle, to damage."""
    return Path(shutil.copytree(bundle_s8, tmp_path / "bundle"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_draft_model_changes_no_answer(
    bundle_s8: Path, bundle_fp32: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", str(bundle_s8), "--raw", "--prompt", "On Monday Otto", "--max-tokens", "40", "--json"]
    answers = []
    for more in ([], ["--draft", str(bundle_fp32)], ["--draft", str(bundle_s8)]):
        assert main([*asked, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out)["tokens"])
    assert answers[0] == answers[1] == answers[2]
    for flags, told in ((["--no-speculation"], "contradict each other"), (["--engine", "ort"], "needs the engine ax")):
        assert main([*asked, "--draft", str(bundle_s8), *flags]) == 2
        assert told in capsys.readouterr().err


def test_the_answer_goes_to_stdout_and_the_vendors_lines_to_stderr(bundle_s8: Path) -> None:
    done = axrun("run", bundle_s8, "--prompt", "1+1=")
    assert (done.returncode, done.stdout) == (0, "2\n")
    lines = done.stderr.splitlines()
    assert lines[0] == "LLM init start"
    assert [re.sub(r"_(cmm|mem)\(\d+ MB\)", "", line) for line in lines[1:7]] == [
        "[1/6] embed_selector init ok,remain",
        *(f"[{index + 2}/6] init {index} axmodel ok,remain" for index in range(4)),
        "[6/6] init post axmodel ok,remain",
    ]
    assert lines[7:14] == [
        "max_token_len : 255",
        "kv_cache_size : 64, kv_cache_num: 255",
        "prefill_token_num : 32",
        "grp: 1, prefill_max_kv_cache_num : 1",
        "grp: 2, prefill_max_kv_cache_num : 32",
        "grp: 3, prefill_max_kv_cache_num : 128",
        "prefill_max_token_num : 128",
    ]
    assert json.loads(lines[14].removeprefix("load config: ")) == json.loads(
        (bundle_s8 / "post_config.json").read_text()
    )
    assert lines[15] == "LLM init ok"
    assert lines[16].endswith("prefill_split_num : 1")
    assert re.fullmatch(r"ttft: \d+\.\d\d ms", lines[17])
    assert re.fullmatch(r"hit eos,avg \d+\.\d\d token/s", lines[18])
    assert len(lines) == 19


def test_right_guesses_are_told_from_all(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repeated = "the river runs by the old town. " * 6
    assert main(["run", str(bundle_s8), "--raw", "--prompt", repeated, "--max-tokens", "40"]) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    found = re.fullmatch(r"speculation: (\d+) of (\d+) guessed tokens were right", line)
    assert found, line
    right, guessed = map(int, found.groups())
    assert 0 <= right < guessed


def test_json_has_answer_and_statistics(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle_s8), "--prompt", "12+30=", "--json", "--verify", "--threads", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["stop"], answer["prompt_tokens"]) == ("42", "eos", 25)
    assert answer["ttft_ms"] > 0
    assert answer["decode_tokens_per_s"] > 0


def test_a_prompt_from_stdin(bundle_s8: Path) -> None:
    done = axrun("run", bundle_s8, "--prompt", "-", "--raw", "--json", stdin="7+8=\n")
    assert json.loads(done.stdout)["text"] == "15"


def test_max_tokens_is_reported_as_the_reason(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle_s8), "--prompt", "who are you?", "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "max_tokens reached,avg" in err
    assert "eos" not in err


def test_a_system_message_reaches_the_model(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for more in ([], ["--system", "a b c d e f g h i j k l m n o p"], ["--raw"]):
        assert main(["run", str(bundle_s8), "--prompt", "1+1=", "--json", *more]) == 0
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert counts[2] == 4 < counts[0] != counts[1]


def test_sampling_flags_override_post_config(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*more: str) -> list[int]:
        assert (
            main(["run", str(copied), "--prompt", "On Monday Otto", "--raw", "--json", "--max-tokens", "40", *more])
            == 0
        )
        return list(json.loads(capsys.readouterr().out)["tokens"])

    greedy = answer()
    hot = ("--temperature", "2", "--top-p", "0.99")
    assert answer(*hot) == answer(*hot, "--seed", "0") != answer(*hot, "--seed", "1")
    assert answer(*hot, "--greedy") == answer("--top-k", "1") == greedy
    assert answer("--repetition-penalty", "2") != greedy
    edit(copied / "post_config.json", enable_temperature=True, temperature=3.0, enable_top_k_sampling=True, top_k=400)
    assert answer() != greedy
    assert answer("--greedy") == answer("--temperature", "0") == greedy


def _without(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).unlink()


def _truncate(bundle: Path) -> None:
    path = bundle / "qwen2_p32_l2_together.axmodel"
    path.write_bytes(path.read_bytes()[:100_000])


def _short(name: str) -> Callable[[Path], None]:
    return lambda bundle: os.truncate(bundle / name, 100)


def _lengthen(bundle: Path) -> None:
    with (bundle / "qwen2_post.axmodel").open("ab") as file:
        file.write(b"\0\0")


def _signed(damage: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    """The same damage to one file, with its entry in the manifest updated."""

    def damaged(bundle: Path) -> None:
        damage(bundle)
        sign(bundle, name)

    return damaged


def _flip(bundle: Path) -> None:
    path = bundle / "qwen2_p32_l1_together.axmodel"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 0xFF
    path.write_bytes(content)


def _swap(bundle: Path) -> None:
    one, two = bundle / "qwen2_p32_l0_together.axmodel", bundle / "qwen2_p32_l1_together.axmodel"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def _post_for_a_layer(bundle: Path) -> None:
    shutil.copy(bundle / "qwen2_post.axmodel", bundle / "qwen2_p32_l3_together.axmodel")


def _nothing(bundle: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "flags", "code", "words"),
    [
        (_without("qwen2_post.axmodel"), [], 2, "incomplete: qwen2_post.axmodel is missing"),
        (_without("manifest.json"), [], 2, "it has no manifest.json"),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), [], 2, "cannot read"),
        (_truncate, [], 1, "qwen2_p32_l2_together.axmodel has 100000 bytes, expected"),
        (_lengthen, [], 1, r"qwen2_post.axmodel has \d+ bytes, expected"),
        (_signed(_truncate, "qwen2_p32_l2_together.axmodel"), [], 2, "not a whole axmodel"),
        (_truncate, ["--verify"], 1, "qwen2_p32_l2_together.axmodel has 100000 bytes, expected"),
        (_flip, ["--verify"], 1, "qwen2_p32_l1_together.axmodel has sha256"),
        (_swap, [], 2, "qwen2_p32_l0_together.axmodel holds layer 1, expected layer 0"),
        (
            _signed(_post_for_a_layer, "qwen2_p32_l3_together.axmodel"),
            [],
            2,
            "qwen2_p32_l3_together.axmodel holds post, expected layer 3",
        ),
        (_swap, ["--verify"], 1, r"qwen2_p32_l0_together.axmodel has sha256 .* \(and 1 more\)"),
        (_short("model.embed_tokens.weight.bfloat16.bin"), [], 1, r"bfloat16.bin has 100 bytes, expected \d+\n"),
        (_short("hf/tokenizer.json"), [], 1, r"hf/tokenizer.json has 100 bytes, expected \d+\nBuild or copy"),
        (_short("hf/tokenizer_config.json"), [], 1, r"hf/tokenizer_config.json has 100 bytes, expected \d+\n"),
        (_short("hf/config.json"), [], 1, r"hf/config.json has 100 bytes, expected \d+\n"),
        (lambda bundle: shutil.rmtree(bundle / "hf"), [], 2, r"incomplete: hf/\w+.json is missing\nBuild or copy"),
        (
            _signed(_short("hf/tokenizer.json"), "hf/tokenizer.json"),
            [],
            2,
            "tokenizer.json is damaged",
        ),
        (
            _signed(
                lambda bundle: edit(bundle / "hf" / "tokenizer_config.json", chat_template="{{"),
                "hf/tokenizer_config.json",
            ),
            [],
            2,
            "template is damaged",
        ),
        (lambda bundle: edit(bundle / "post_config.json", top_p=7), [], 2, "top_p is 7, expected a number above 0"),
        (lambda bundle: edit(bundle / "post_config.json", seed=7), [], 2, r"unknown keys \['seed'\]"),
        (_nothing, ["--prompt", "1+" * 300], 2, r"\d+ tokens do not fit the context of 255 .*\n.*--kv_cache_len"),
        (_nothing, ["--raw", "--prompt", ""], 2, "the prompt is empty"),
        (_nothing, ["--raw", "--system", "x"], 2, "a system message needs a chat template"),
        (_nothing, ["--temperature", "-1"], 2, "temperature is -1.0"),
        (_nothing, ["--temperature", "nan"], 2, "temperature is nan"),
        (_nothing, ["--top-p", "2"], 2, "top_p is 2.0"),
        (_nothing, ["--top-k", "-2"], 2, "top_k is -2"),
        (_nothing, ["--seed", "-2"], 2, "seed is -2"),
        (_nothing, ["--max-tokens", "0"], 2, "max_tokens is 0"),
        (_nothing, ["--threads", "0"], 2, "0 threads"),
        (_nothing, ["--engine", "tpu"], 2, "unknown engine 'tpu'; there are: ax, ax-int8, ort"),
    ],
)
def test_bad_input_gives_a_short_error(
    copied: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    flags: list[str],
    code: int,
    words: str,
) -> None:
    damage(copied)
    assert main(["run", str(copied), "--prompt", "1+1=", *flags]) == code
    out, err = capsys.readouterr()
    assert out == ""
    message = err[err.index("error: ") :]
    assert re.search(words, message)
    assert message.count("\n") <= 3


def test_a_checkpoint_instead_of_a_bundle_names_the_build_command(
    tiny_qwen2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(tiny_qwen2), "--prompt=1+1="]) == 2
    assert f"axc llm_build --input_path {tiny_qwen2}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "x", "--prompt", "y", "--seed", "z"], ["fly"], ["model"], ["model", "x", "--repeat", "?"]],
)
def test_invalid_flags_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert re.search(r"See `axrun[a-z ]* --help`", err)
    assert len(err.splitlines()) <= 3


def test_a_missing_folder(tmp_path: Path) -> None:
    done = axrun("run", tmp_path / "nowhere", "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no bundle folder {tmp_path / 'nowhere'}\n")
    assert "Traceback" not in done.stderr


def test_a_folder_of_bundles(bundle_s8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").symlink_to(bundle_s8)
    (tmp_path / "a").mkdir()
    assert main(["run", str(tmp_path), "--prompt", "x"]) == 2
    expected = f"error: {tmp_path} holds bundles: give one of them, e.g. {tmp_path / 'b'}\n"
    assert capsys.readouterr().err == expected


def test_stdin_that_is_not_utf8(bundle_s8: Path) -> None:
    command = [sys.executable, "-m", "axrun", "run", str(bundle_s8), "--prompt", "-"]
    done = subprocess.run(command, cwd=ROOT, input=b"ab\xff", capture_output=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (2, b"error: stdin is not UTF-8 at byte 2\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_with_130(bundle_s8: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "axrun", "run", str(bundle_s8), "--prompt", "-"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin
        process.stdin.write("1+")
        process.stdin.flush()
        while _unread(process.stdin.fileno()):  # it is reading stdin, after all imports
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130, "\ninterrupted\n")


def _unread(pipe: int) -> int:
    """The number of unread bytes in a pipe, https://man7.org/linux/man-pages/man7/pipe.7.html"""
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0])


def test_a_closed_pipe_is_quiet(bundle_s8: Path) -> None:
    command = f"{sys.executable} -m axrun run {bundle_s8} --prompt Once --raw | head -c 1 > {os.devnull}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_help_lists_every_command_and_imports_little() -> None:
    script = (
        "import sys\nfrom axrun.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'tokenizers', 'jinja2', 'onnxruntime', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "run" in done.stdout
    assert "model" in done.stdout
    assert axrun().returncode == 2


@pytest.mark.parametrize("verb", ["run", "model"])
def test_every_command_has_examples_in_its_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert f"\n  axrun {verb} " in capsys.readouterr().out


def test_running_needs_nothing_of_the_compiler(bundle_s8: Path) -> None:
    """Boards have neither the toolchain nor its dependencies."""
    script = (
        "import sys\n"
        "for name in ('axc', 'onnx', 'onnxruntime', 'torch', 'transformers'): sys.modules[name] = None\n"
        "from axrun.cli import main\n"
        f"sys.exit(main(['run', {str(bundle_s8)!r}, '--prompt', '1+1=']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_missing_engine_is_reported(bundle_s8: Path) -> None:
    script = (
        "import sys\nsys.modules['onnxruntime'] = None\nfrom axrun.cli import main\n"
        f"sys.exit(main(['run', {str(bundle_s8)!r}, '--prompt', '1+1=', '--engine', 'ort']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "error: engine ort needs the package onnxruntime, which is not installed",
        "Install it: pip install 'axrun[ort]'",
    ]


def test_a_missing_library_is_reported(bundle_s8: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "axrun", "run", str(bundle_s8), "--prompt", "1+1=", "--engine", "ax"]
    environment = {**os.environ, "AXRUN_ENGINE": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()[-2:]
    assert first.startswith(f"error: engine ax needs libax_engine.so: {tmp_path}/libax_sys.so: ")
    assert second == "Build it with `make engine`, set AXRUN_ENGINE to its folder, or use --engine ort."


def test_both_engines_give_the_same_answer(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for engine in ("ax", "ort"):
        command = ["run", str(bundle_s8), "--prompt", "12+30=", "--greedy", "--json", "--engine", engine]
        assert main([*command, "--threads", "1"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["text"])
    assert answers == ["42", "42"]


def test_model_times_every_group(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle_s8 / "qwen2_p32_l0_together.axmodel"
    assert main(["model", str(path), "--repeat", "4", "--warmup", "1", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [(entry["group"], entry["tokens"], entry["history"]) for entry in groups] == [
        (0, 1, 255),
        (1, 32, 0),
        (2, 32, 32),
        (3, 32, 128),
    ]
    for entry in groups:
        assert 0 < entry["min_ms"] <= entry["median_ms"] <= entry["max_ms"]
        assert entry["min_ms"] <= entry["avg_ms"] <= entry["max_ms"]
        assert entry["repeat"] == 4
    assert main(["model", str(path), "--group", "2", "--repeat", "2"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].split()[:3] == ["2", "32", "32"]
    assert len(table) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group", "9"], "has no group 9; it has 0 to 0"),
        (["--repeat", "0"], "--repeat is 0"),
        (["--warmup", "-1"], "--warmup -1"),
    ],
)
def test_model_refuses_invalid_options(
    bundle_s8: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["model", str(bundle_s8 / "qwen2_post.axmodel"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_model_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.axmodel"
    path.write_bytes(b"not one")
    assert main(["model", str(path)]) == 2
    assert "not a whole axmodel" in capsys.readouterr().err


VERBS = ("run", "serve", "bench", "chat", "model")


@pytest.mark.parametrize(("engine", "verb"), [*(("ax", verb) for verb in VERBS), ("ax-int8", "run"), ("ort", "model")])
def test_a_vendors_axmodel_needs_a_board(engine: str, verb: str, copied: Path, tmp_path: Path) -> None:
    layer = Bundle.open(copied).layer_path(0)
    layer.write_bytes(vendor_files.write(tmp_path, vendor_files.ROWS["4.1"]).read_bytes())
    sign(copied, layer.name)
    flags = {"run": ["--prompt", "1+1="], "serve": ["--port", "0"]}.get(verb, [])
    done = axrun(verb, layer if verb == "model" else copied, *flags, "--engine", engine, stdin="1+1=\n")
    error = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert len(error) <= 3
    assert error[0].startswith(f"error: {layer} is made by Pulsar2")
    if engine == "ort":
        assert error[1] == "It is code for an NPU: run it on the board it was compiled for."
    else:
        assert error[0].endswith("made by Pulsar2 4.1-patch1: it is code for an NPU, and needs a board with one")


def test_a_file_of_another_compiler_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.axmodel"
    path.write_bytes(vendor_files.encode(vendor_files.ROWS["4.1"], "").replace(b"Pulsar2", b"pytorch", 1))
    done = axrun("model", path, "--engine", "ax")
    assert done.returncode == 2
    assert done.stderr == f"error: {path} is made by pytorch, expected axc or Pulsar2\n"
