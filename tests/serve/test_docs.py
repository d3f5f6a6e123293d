"""docs/serve.md matches the code: request fields, routes and flags."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from typing import Any

import pytest

from axrun.cli import VERBS
from axrun.serve.fields import tables
from tests.serve.server import ROOT, Server

ADDRESS = "http://127.0.0.1:8000"
PAGE = (ROOT / "docs" / "serve.md").read_text()


def test_the_field_tables_match_the_schemas() -> None:
    """`python -m axrun.serve.fields` prints the tables."""
    for heading, lines in tables().items():
        assert f"\n### {heading}\n\n" + "\n".join(lines) + "\n" in PAGE
    known = {row.split("`")[1] for lines in tables().values() for row in lines[2:]}
    assert {"user", "metadata", "reasoning_effort", "verbosity", "cache_prompt", "cache_control", "ignore_eos"} <= known


def test_all_routes_are_documented(server: Server) -> None:
    document: dict[str, Any] = server.client.get("/openapi.json").json()
    for path in document["paths"]:
        assert f"{path.replace('/qwen2', '/NAME')}`" in PAGE


def test_the_requests_are_answered(server_long: Server, capsys: pytest.CaptureFixture[str]) -> None:
    section = PAGE.split("## Requests\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)
    commands = [shlex.split(command) for block in blocks[:-1] for command in block.split("curl ")[1:]]
    replies = []
    for url, *flags in commands:
        assert flags[::2] == ["-H", "-d"]
        answer = server_long.client.post(
            url.removeprefix(ADDRESS), headers=dict([flags[1].split(": ")]), content=flags[3]
        )
        assert answer.status_code == 200, answer.text
        replies.append(answer.json())
    chat, formed, called, ollama = replies
    assert chat["choices"][0]["message"]["content"] == ollama["message"]["content"]
    assert json.loads(formed["choices"][0]["message"]["content"])["blue"] in (True, False)
    (call,) = called["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    exec(compile(blocks[-1].replace(ADDRESS, server_long.url), "docs/serve.md", "exec"), {})
    assert capsys.readouterr().out == chat["choices"][0]["message"]["content"] + "\n"


def test_all_flags_exist() -> None:
    known = set()
    for verb in ("serve", "run"):
        parser = argparse.ArgumentParser()
        VERBS[verb].flags(parser)
        known |= {option for action in parser._actions for option in action.option_strings}
    named = {word.strip("`'().,;") for word in PAGE.split() if word.strip("`'().,;").startswith("--")}
    assert named
    assert named <= known
