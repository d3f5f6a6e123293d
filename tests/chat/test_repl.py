"""axrun chat on a terminal and on a pipe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.axrun.tty import CTRL_C, CTRL_D, UP, Tty
from tests.conftest import Builder
from tests.doctor.axmodels import sign

ROOT = Path(__file__).parents[2]
PROMPT = r"> "
Start = Callable[..., Tty]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `axrun chat` on a terminal, with its history in the test's folder."""
    started = []

    def make(*arguments: object) -> Tty:
        tty = Tty(["chat", *arguments], {"XDG_STATE_HOME": str(tmp_path / "state")})
        started.append(tty)
        return tty

    yield make
    for tty in started:
        tty.close()


@pytest.fixture(scope="module")
def endless_bundle(bundle_long: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose answers end only with the context; they fill the terminal buffer before, and wait for the test."""
    bundle = Path(shutil.copytree(bundle_long, tmp_path_factory.mktemp("endless") / "bundle"))
    settings = bundle / "hf" / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": [1 << 20]}))
    sign(bundle, "hf/generation_config.json")
    return bundle


def piped(bundle: Path, text: str | bytes, *flags: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "axrun", "chat", str(bundle), *map(str, flags)],
        cwd=ROOT,
        input=text.encode() if isinstance(text, str) else text,
        capture_output=True,
        timeout=300,
        check=False,
    )


def lines(output: bytes) -> list[str]:
    return output.decode().splitlines()


def test_a_pipe_gets_only_the_answers(bundle_s8: Path) -> None:
    done = piped(bundle_s8, "1+1=\n\n  what is 17+25?  \n/stats\n2+3=")
    assert (done.returncode, lines(done.stdout)) == (0, ["2", "42", "5"])
    log = done.stderr.decode()
    assert "LLM init ok" in log
    assert "\n> " not in log
    assert "KV cache: " in log


def test_commands(bundle_s8: Path) -> None:
    script = "/undo\n1+1=\n/undo\n/stats\n1+1=\n/stats\n/reset\n/stats\n/fly\n/help\n"
    script += "/system Your name is Anna.\n/system\n/quit\n3+3=\n"
    done = piped(bundle_s8, script)
    assert (done.returncode, lines(done.stdout)) == (0, ["2", "2"])
    log = lines(done.stderr.partition(b"LLM init ok\n")[2])
    assert log[0] == "[nothing to undo]"
    assert log[1] == "[removed: 1+1=]"
    assert log[2].endswith("tokens; 0 turns")
    assert log[3].startswith("input token num : 1 new, ")
    assert log[4].startswith("ttft: ")
    assert log[5].startswith("hit eos,avg ")
    assert log[6].endswith("tokens; 1 turn")
    assert log[7:9] == ["[conversation cleared]", log[2]]
    assert log[9] == "unknown command /fly; /help lists all commands"
    commands = ["/reset", "/undo", "/system", "/think", "/stats", "/help", "/quit"]
    assert [line.split()[0] for line in log[10:17]] == commands
    assert log[17:] == ["[system message set]", "[system message removed]"]


def test_a_system_message_reaches_the_model(bundle_s8: Path) -> None:
    flag = piped(bundle_s8, "who are you?\n", "--system", "Your name is Anna.")
    command = piped(bundle_s8, "/system Your name is Anna.\nwho are you?\n")
    plain = piped(bundle_s8, "who are you?\n")
    assert flag.stdout == command.stdout
    assert "Anna" in flag.stdout.decode() != plain.stdout.decode()


def test_a_full_context_is_reported(bundle_s8: Path) -> None:
    questions = "".join(f"what is {number}+{number}?\n" for number in range(1, 15))
    done = piped(bundle_s8, questions, "--system", "Your name is Anna.", "--max-tokens", "8")
    assert len(lines(done.stdout)) == 14
    assert "[context full: dropped the oldest 1 turn; the system message stays]" in lines(done.stderr)


def test_an_answer_that_ends_with_the_context_says_so(build_tiny: Builder) -> None:
    done = piped(build_tiny(kv_cache_len=40, last_kv_cache_len=(32,)), "who are you?\n")
    assert done.returncode == 0
    assert "[context full: the answer ends here]" in lines(done.stderr)


def heated(bundle: Path, folder: Path, temperature: float) -> Path:
    """A copy of a bundle that samples at a temperature beyond those of the flag."""
    copied = Path(shutil.copytree(bundle, folder / "heated"))
    config = json.loads((copied / "post_config.json").read_text())
    config |= {"enable_temperature": True, "temperature": temperature}
    (copied / "post_config.json").write_text(json.dumps(config))
    return copied


def test_only_whole_characters_are_shown(bundle_s8: Path, tmp_path: Path) -> None:
    """At this temperature half of the tokens are stray bytes."""
    hot = heated(bundle_s8, tmp_path, 9)
    command = [sys.executable, "-u", "-m", "axrun", "chat", str(hot), "--max-tokens", "90"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"who are you?\n")
        process.stdin.close()
        shown = 0
        while data := os.read(process.stdout.fileno(), 65536):
            assert data.decode("utf-8")
            shown += 1
    assert process.returncode == 0
    assert shown > 1  # the number of pieces depends on the machine


@pytest.mark.parametrize(
    ("text", "flags", "code", "error"),
    [
        (b"1+1=\n\xff\n", [], 2, "line 2 of stdin is not UTF-8 at byte 0"),
        (b"1+1=\n" + b"1+" * 300, [], 2, "tokens do not fit the context of 255"),
        (b"", ["--max-tokens", "0"], 2, "max_tokens is 0"),
        (b"", ["--seed", "-1"], 2, "seed is -1"),
        (b"", ["--temperature", "nan"], 2, "temperature is nan"),
        (b"", ["--engine", "tpu"], 2, "unknown engine 'tpu'"),
    ],
)
def test_bad_input_on_a_pipe_ends_it(bundle_s8: Path, text: bytes, flags: list[str], code: int, error: str) -> None:
    done = piped(bundle_s8, text, *flags)
    assert done.returncode == code
    last = done.stderr.decode().rpartition("error: ")[2]
    assert error in last
    assert last.count("\n") <= 3
    assert "Traceback" not in done.stderr.decode()


def test_a_bundle_without_a_chat_template_is_refused(build_tiny: Builder, pristine_without_template: Path) -> None:
    done = piped(build_tiny(input_path=pristine_without_template), "1+1=\n")
    assert done.returncode == 2
    assert "has no chat template" in done.stderr.decode()


@pytest.fixture
def pristine_without_template(tiny_qwen2: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(tiny_qwen2 / name, folder / name)
    config = json.loads((tiny_qwen2 / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_closed_pipe_is_quiet(bundle_s8: Path) -> None:
    command = f"yes 'who are you?' | {sys.executable} -m axrun chat {bundle_s8} | head -c 3"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert len(done.stdout) == 3
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_terminal_is_prompted_and_ctrl_d_ends(start: Start, bundle_s8: Path) -> None:
    tty = start(bundle_s8)
    tty.expect("Ctrl-D ends")
    tty.expect(PROMPT)
    tty.type("1+1=\r")
    assert tty.expect(PROMPT).splitlines()[-2:] == ["2", "> "]
    tty.type("/quit now\r")
    assert tty.end() == 0
    again = start(bundle_s8)
    again.expect(PROMPT)
    again.type(CTRL_D)
    assert again.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(start: Start, endless_bundle: Path) -> None:
    tty = start(endless_bundle, "--temperature", "2")
    tty.expect(PROMPT)
    tty.type("tell me a story\r")
    tty.expect(r"story\r\n.")  # the answer has started
    tty.type(CTRL_C)
    tty.expect(rf"\[stopped\]\r\n.*{PROMPT}")
    tty.type("/stats\r")
    shown = tty.expect(PROMPT)
    assert "stopped,avg" in shown
    assert "1 turn" in shown
    length = int(shown.partition("KV cache: ")[2].split()[0])
    assert length < 8191
    tty.type("/undo\r")
    assert "[removed: tell me a story]" in tty.expect(PROMPT)
    tty.type(CTRL_D)
    assert tty.end() == 0


def test_ctrl_c_twice_and_at_the_prompt(start: Start, bundle_long: Path) -> None:
    tty = start(bundle_long, "--greedy")
    tty.expect(PROMPT)
    for _ in range(3):
        tty.type("1+" + "".join(chr(CTRL_C[0])))
        tty.expect(PROMPT)
    tty.type("1+1=\r")
    assert tty.expect(PROMPT).splitlines()[-2:] == ["2", "> "]  # the typed line was discarded
    tty.type("tell me a story\r")
    tty.expect(r"story\r\n.")
    tty.type(CTRL_C * 3)
    tty.expect(PROMPT)
    tty.type("/undo\r")  # otherwise the answer depends on how far the story went
    tty.expect(r"removed: tell me a story\]\r\n.*> ")
    tty.type("2+2=\r")
    assert tty.expect(PROMPT).splitlines()[-2:] == ["4", "> "]
    tty.type(CTRL_D)
    assert tty.end() == 0


def test_an_interrupt_from_elsewhere_discards_a_line_too(start: Start, bundle_s8: Path) -> None:
    tty = start(bundle_s8)
    tty.expect(PROMPT)
    for _ in range(3):
        tty.type("1+")
        tty.expect(r"1\+")
        os.kill(tty.pid, signal.SIGINT)
        tty.expect(PROMPT)
    tty.type("1+1=\r")
    assert tty.expect(PROMPT).splitlines()[-2:] == ["2", "> "]
    tty.type(CTRL_D)
    assert tty.end() == 0


def test_an_invalid_question_is_reported_and_the_chat_continues(start: Start, bundle_s8: Path) -> None:
    tty = start(bundle_s8)
    tty.expect(PROMPT)
    tty.type("1+" * 300 + "\r")
    assert "do not fit the context" in tty.expect(r"kv_cache_len\.\r\n.*> ")
    tty.type(b"\xff\xfe\r")
    tty.expect(r"error: .*UTF-8.*\r\n.*> ")
    tty.type("1+1=\r")
    tty.expect(r"\r\n2\r\n")
    tty.type("/quit\r")
    assert tty.end() == 0


def test_the_history_is_saved(start: Start, bundle_s8: Path, tmp_path: Path) -> None:
    tty = start(bundle_s8)
    tty.expect(PROMPT)
    tty.type("12+30=\r")
    tty.expect(r"42\r\n")
    tty.expect(PROMPT)
    tty.type(UP + b"\r")
    tty.expect(r"42\r\n")
    tty.expect(PROMPT)
    tty.type(CTRL_D)
    assert tty.end() == 0
    history = tmp_path / "state" / "axrun" / "history"
    assert history.read_text() == "12+30=\n"
    assert history.stat().st_mode & 0o077 == 0
    again = start(bundle_s8)
    again.expect(PROMPT)
    again.type(UP + b"\r")
    again.expect(r"42\r\n")
    again.expect(PROMPT)
    again.type(CTRL_D)
    assert again.end() == 0


def test_sigterm_stops_the_program(start: Start, endless_bundle: Path) -> None:
    tty = start(endless_bundle, "--temperature", "2")
    tty.expect(PROMPT)
    os.kill(tty.pid, signal.SIGTERM)
    assert tty.end() == 130
    writing = start(endless_bundle, "--temperature", "2")
    writing.expect(PROMPT)
    writing.type("tell me a story\r")
    writing.expect(r"story\r\n.")
    os.kill(writing.pid, signal.SIGTERM)
    assert writing.end() == 130
    assert b"[context full" not in writing.seen  # it did not wait for the end of the answer


def test_model_output_cannot_control_the_terminal(start: Start, bundle_s8: Path, tmp_path: Path) -> None:
    """At this temperature the model emits every byte; of the control characters only tab and newline are passed on."""
    tty = start(heated(bundle_s8, tmp_path, 50), "--max-tokens", "150")
    tty.expect(PROMPT)
    for seed in range(3):
        tty.type(f"who are you {seed}?\r")
        shown = tty.expect(r"\x1b\[\?2004h> |\n> ")
        answer = shown.partition("\r\n")[2].rpartition("\r\n")[0]
        assert not [character for character in answer if ord(character) < 32 and character not in "\t\n\r"]
    tty.type("/quit\r")
    assert tty.end() == 0
