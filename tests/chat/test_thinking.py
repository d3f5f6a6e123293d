"""Thoughts in axrun chat: shown apart from the answer, and switched by /think."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from axc import build
from axrun.chat.conversation import Conversation
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.load import Loading
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer
from tests.axrun.tty import ROOT, Tty
from tests.serve import saying


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers with texts of saying.TEXTS. With enable_thinking the prompt ends with <think>, whatever is asked."""
    folder = tmp_path_factory.mktemp("thinking")
    texts = {last: saying.TEXTS[last] for last in ("s", "t", ">")}
    checkpoint = saying.write(folder / "checkpoint", texts)
    options: dict[str, Any] = {"prefill_len": 16, "kv_cache_len": 127, "last_kv_cache_len": (64,)}
    options.update(dict.fromkeys(("weight_type", "post_weight_type", "hidden_state_type"), "fp32"))
    build.build(build.plan(build.Options(input_path=checkpoint, output_path=folder / "bundle", **options)))
    (folder / "bundle" / "hf" / "chat_template.jinja").write_text(saying.THINKING)
    return folder / "bundle"


@pytest.fixture
def conversation(bundle: Path) -> Conversation:
    hf = Bundle.open(bundle).hf
    template = ChatTemplate.find(hf)
    assert template
    loading = Loading()
    return Conversation(loading.load(loading.open(bundle)), Tokenizer.open(hf), template)


def said(conversation: Conversation, question: str) -> tuple[str, str]:
    """Thoughts and text of an answer."""
    thoughts: list[str] = []
    text = "".join(conversation.ask(question, think=thoughts.append)[1])
    return "".join(thoughts), text


def test_thoughts_are_kept_apart_for_the_template(conversation: Conversation) -> None:
    assert said(conversation, "t") == ("Hm, so.\n\nWell.", "It is two.")
    assert conversation.messages[1:] == [
        {"role": "assistant", "content": "It is two.", "reasoning_content": "Hm, so.\n\nWell."}
    ]
    assert said(conversation, "s") == ("", "A short answer.")
    assert conversation.messages[3] == {"role": "assistant", "content": "A short answer."}


def test_the_switch_is_the_variable_of_the_template(conversation: Conversation) -> None:
    assert conversation.thinking is False  # the template's default
    conversation.thinking = True
    assert said(conversation, "s") == ("Oh, easy!", "It is four.")
    conversation.thinking = False
    assert said(conversation, "s") == ("", "A short answer.")
    conversation.reset()
    assert conversation.thinking is False


def test_a_template_that_thinks_by_default_is_recognised(bundle: Path, conversation: Conversation) -> None:
    usual = "{% for m in messages %}{{ m.content }}{% endfor %}"
    thinks = f"{usual}{{% if enable_thinking is not defined or enable_thinking %}}<think>{{% endif %}}"
    for source, expected in ((thinks, True), (usual, None)):
        hf = Bundle.open(bundle).hf
        other = Conversation(conversation._model, Tokenizer.open(hf), ChatTemplate(source, {}))
        assert other.thinking is expected
    with pytest.raises(
        BadInput, match="has no enable_thinking or another known switch: its thinking cannot be switched"
    ):
        other.thinking = True


def test_a_pipe_gets_only_the_answer(bundle: Path) -> None:
    command = [sys.executable, "-m", "axrun", "chat", str(bundle)]
    script = "t\n/think\ns\n/think off\ns\n/think on\n"
    done = subprocess.run(command, cwd=ROOT, input=script, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["It is two.", "It is four.", "A short answer."])
    log = done.stderr.partition("LLM init ok\n")[2]
    assert log == "Hm, so.\n\nWell.\n[thinking on]\nOh, easy!\n[thinking off]\n[thinking on]\n"
    done = subprocess.run(command, cwd=ROOT, input="/think x", capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "error: /think x: expected on, off or nothing, which switches",
    )


def test_a_terminal_shows_thoughts_dimmed(bundle: Path, tmp_path: Path) -> None:
    tty = Tty(["chat", bundle], {"XDG_STATE_HOME": str(tmp_path)})
    try:
        tty.expect("> ")
        tty.type("t\r")
        assert tty.expect(r"two\.\r\n.*> ").endswith("Well.\r\nIt is two.\r\n> ")
        shown = tty.seen.partition(b"It is two.")[0]
        dimmed = b"".join(part.partition(b"\x1b[22m")[0] for part in shown.split(b"\x1b[2m")[1:])
        assert dimmed == b"Hm, so.\r\n\r\nWell."
        tty.type("/quit\r")
        assert tty.end() == 0
    finally:
        tty.close()
