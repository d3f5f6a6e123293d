"""Client libraries ask the server for structured output and tool calls. They have an environment of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axrun.embeddings import embed
from requirements.install import install_clients
from tests.serve.server import MODEL, ROOT, Server, Start

SCRIPT = ROOT / "tests" / "serve" / "client_libraries.py"
# These libraries request plain JSON and rely on the model for the schema, so the model answers with a fixed text.
UNGUIDED = ("instructor.JSON", "langchain.json_mode")
GUIDED = (
    *("openai.parse", "instructor.TOOLS", "instructor.JSON_SCHEMA", "langchain.json_schema"),
    *("langchain.function_calling", "pydantic_ai", "llm", "litellm", "llama_index", "ollama"),
    *("responses.parse", "responses.langchain", "responses.pydantic_ai"),
)
CALLS = (
    *("openai.tools", "openai.tools.stream", "langchain.bind_tools", "litellm.tools", "llama_index.tools"),
    *("responses.tools", "responses.langchain.tools"),
)
STREAMS = (
    *("litellm.stream", "llama_index.stream", "ollama.stream"),
    *("responses", "responses.langchain.stream", "responses.pydantic_ai.stream"),
)

pytestmark = pytest.mark.system


def ask(server: Server, question: str, *checks: str) -> dict[str, Any]:
    python = install_clients(Path(sys.prefix))
    command = [str(python), "-I", str(SCRIPT), server.url, MODEL, question, *checks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    failed = {name: result for name, result in found.items() if isinstance(result, str)}
    assert not failed, "\n".join(f"{name} {words}" for name, words in failed.items())
    return found


@pytest.fixture(scope="module")
def results(server_long: Server) -> dict[str, Any]:
    return ask(server_long, "who are you?", *GUIDED, *CALLS, *STREAMS, "ollama.models")


@pytest.mark.parametrize("name", GUIDED)
def test_answers_have_the_requested_format(results: dict[str, Any], name: str) -> None:
    assert set(results[name]) <= {"name", "age", "mood"}
    assert 0 <= results[name]["age"] <= 130


def test_tools_are_called(results: dict[str, Any]) -> None:
    assert {name: results[name]["name"] for name in CALLS} == dict.fromkeys(CALLS, "weather")
    assert results["openai.tools.stream"]["done"]
    assert results["langchain.bind_tools"]["arguments"] == ["city"]


def test_streams_add_up_to_the_answer(results: dict[str, Any]) -> None:
    assert {name: results[name]["same"] for name in STREAMS} == dict.fromkeys(STREAMS, True)


def test_models_of_ollama(results: dict[str, Any], bundle_long: Path) -> None:
    models, manifest = results["ollama.models"], json.loads((bundle_long / "manifest.json").read_text())
    assert (models["name"], models["family"], models["context"]) == (f"{MODEL}:latest", "qwen2", 8191)
    assert models["size"] == sum(entry["size"] for entry in manifest["files"].values())
    assert len(models["digest"]) == 64
    assert models["capabilities"] == ["completion", "tools"]
    assert models["refused"] == [404, f"No such model; this server has: {MODEL}."]
    assert results["ollama.stream"]["done"] == "stop"


def test_tools_of_ollama(server_saying: Server) -> None:
    made = ask(server_saying, "c", "ollama.tools")["ollama.tools"]
    assert made["calls"] == [["weather", {"city": "Paris"}], ["weather", {"city": "Rome, Italy"}]]
    assert made["same"]
    assert made["more"]


def test_embeddings_of_ollama(embedding_bundle: Path, start: Start) -> None:
    server = start(embedding_bundle, "--name", MODEL, "--slots", 1).ready()
    made = ask(server, "who are you?", "ollama.embed")["ollama.embed"]
    expected = embed(embedding_bundle, ["who are you?", "1+1="]).vectors
    assert np.array_equal(np.array(made["embeddings"], np.float32), expected)


def test_json_without_a_schema(server_saying: Server) -> None:
    assert {name: result["name"] for name, result in ask(server_saying, "j", *UNGUIDED).items()} == dict.fromkeys(
        UNGUIDED, "Ada"
    )
