"""docs/serve.md matches the code: request fields, routes and flags."""

from __future__ import annotations

import argparse
from typing import Any

from axrun.cli import VERBS
from axrun.serve.fields import tables
from tests.serve.server import ROOT, Server

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


def test_all_flags_exist() -> None:
    known = set()
    for verb in ("serve", "run"):
        parser = argparse.ArgumentParser()
        VERBS[verb].flags(parser)
        known |= {option for action in parser._actions for option in action.option_strings}
    named = {word.strip("`'().,;") for word in PAGE.split() if word.strip("`'().,;").startswith("--")}
    assert named
    assert named <= known
