"""/v1/embeddings with openai's client, unmodified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import transformers

from axrun.embeddings import embed
from tests.conftest import Builder
from tests.serve.server import Server

MODEL = "qwen3"
TEXTS = ["hello", "a longer text " * 10, "1+1="]


@pytest.fixture(scope="module")
def embedder(embedding_bundle: Path) -> Iterator[Server]:
    """Makes embeddings only."""
    server = Server(embedding_bundle, "--slots", 2).ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(scope="module")
def client(embedder: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def wanted(embedding_bundle: Path) -> list[list[float]]:
    found: list[list[float]] = embed(embedding_bundle, TEXTS).vectors.tolist()
    return found


@pytest.mark.parametrize("form", ["float", None])
def test_texts(client: openai.OpenAI, wanted: list[list[float]], embedding_checkpoint: Path, form: Any) -> None:
    """The client asks for base64 unless told otherwise. The bits are those of `axrun embed`."""
    made = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format=form or openai.omit)
    assert [entry.index for entry in made.data] == [0, 1, 2]
    for entry, vector in zip(made.data, wanted, strict=True):
        assert np.array_equal(np.array(entry.embedding, np.float32), np.array(vector, np.float32))
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedding_checkpoint)
    count = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert (made.usage.prompt_tokens, made.usage.total_tokens, made.model) == (count, count, MODEL)


def test_one_text_and_token_ids(client: openai.OpenAI, wanted: list[list[float]], embedding_checkpoint: Path) -> None:
    """Token ids are used as they are."""
    ids = transformers.AutoTokenizer.from_pretrained(embedding_checkpoint)(TEXTS[0])["input_ids"]
    for given, count in ((TEXTS[0], 1), (ids, 1), ([ids, ids], 2)):
        made = client.embeddings.create(model=MODEL, input=given)
        assert [entry.embedding for entry in made.data] == [wanted[0]] * count


def test_dimensions(client: openai.OpenAI, wanted: list[list[float]]) -> None:
    made = client.embeddings.create(model=MODEL, input=TEXTS[0], dimensions=8).data[0].embedding
    cut = np.array(wanted[0][:8])
    np.testing.assert_allclose(made, cut / np.linalg.norm(cut), rtol=1e-6)


def test_requests_at_the_same_time(client: openai.OpenAI, wanted: list[list[float]]) -> None:
    def ask(number: int) -> list[float]:
        return client.embeddings.create(model=MODEL, input=TEXTS[number]).data[0].embedding

    numbers = [0, 1, 2, 1, 0, 2, 2, 1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, numbers)) == [wanted[number] for number in numbers]


def test_a_text_that_is_too_long(client: openai.OpenAI) -> None:
    text = "a b c d " * 100
    with pytest.raises(openai.BadRequestError, match=r"tokens, and this model's limit is 255") as refused:
        client.embeddings.create(model=MODEL, input=["x", text])
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input[1]")
    made = client.embeddings.create(model=MODEL, input=text, extra_body={"truncate": True})
    assert made.usage.prompt_tokens == 255


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["x", 1]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [99_999]}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": 65}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "stream": True}, "stream"),
    ],
)
def test_bad_requests_are_refused(embedder: Server, body: dict[str, Any], param: str) -> None:
    headers = {"content-type": "application/json"}
    answer = embedder.client.post("/v1/embeddings", content=json.dumps(body), headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_ollamas_route(embedder: Server, wanted: list[list[float]]) -> None:
    """The same embeddings; a text that is too long is cut unless truncate is false."""
    answer = embedder.client.post("/api/embed", json={"model": f"{MODEL}:latest", "input": TEXTS}).json()
    assert np.array_equal(np.array(answer["embeddings"], np.float32), np.array(wanted, np.float32))
    assert answer["total_duration"] > 0
    one = embedder.client.post("/api/embed", json={"input": TEXTS[0], "options": {"num_ctx": 512}}).json()
    assert one["embeddings"] == answer["embeddings"][:1]
    text = "a b c d " * 100
    assert embedder.client.post("/api/embed", json={"input": text}).json()["prompt_eval_count"] == 255
    refused = embedder.client.post("/api/embed", json={"input": text, "truncate": False})
    assert refused.status_code == 400
    assert "limit is 255" in refused.json()["error"]
    refused = embedder.client.post("/api/embed", json={"input": text, "dimensions": 65})
    assert refused.json() == {"error": "dimensions is 65; expected 1 to 64."}
    assert "embedding" in embedder.client.post("/api/show", json={}).json()["capabilities"]


def test_a_model_for_embeddings_does_not_chat(client: openai.OpenAI) -> None:
    words = "This model makes embeddings only; use /v1/embeddings"
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "?"}])
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(model=MODEL, prompt="?")


def test_a_bundle_without_hidden_states(server: Server) -> None:
    answer = server.post("embeddings", input="x")
    assert answer.status_code == 400
    assert "its bundle was not built with llm_build --ret_postnorm" in answer.json()["error"]["message"]


def test_chats_and_embeddings_of_one_bundle(build_tiny: Builder, start: Any, server: Server) -> None:
    """At the same time, with the same answers as alone."""
    bundle = build_tiny(ret_postnorm=True)
    both, expected = start(bundle).ready(), embed(bundle, TEXTS).vectors
    answer = server.chat("who are you?")["choices"][0]["message"]["content"]

    def ask(number: int) -> bool:
        if number % 2:
            return bool(both.chat("who are you?")["choices"][0]["message"]["content"] == answer)
        made = [entry["embedding"] for entry in both.post("embeddings", input=TEXTS).json()["data"]]
        return np.array_equal(np.array(made, np.float32), expected)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(6)))
