"""/tokenize and /detokenize, compared with transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve.server import Server

TEXT = "Caf\u00e9 <|im_end|> 1+1="


@pytest.mark.parametrize("name", ["content", "prompt"])
def test_tokens_are_those_of_transformers(server: Server, hf_tokenizer: Any, name: str) -> None:
    body = server.client.post("/tokenize", json={name: TEXT}).json()
    assert body["tokens"] == hf_tokenizer.encode(TEXT)
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 255)
    back = server.client.post("/detokenize", json={"tokens": body["tokens"], "model": "qwen2"}).json()
    assert back == {"content": TEXT, "prompt": TEXT}


def test_nothing_has_no_tokens(server: Server) -> None:
    assert server.client.post("/tokenize", json={"content": ""}).json()["tokens"] == []
    assert server.client.post("/detokenize", json={"tokens": []}).json()["content"] == ""


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": 1}, "content"),
        ("/tokenize", {"content": "\ud800"}, "content"),
        ("/tokenize", {"text": "x"}, "text"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [99_999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_bad_requests_are_refused(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    error = server.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert (error.status_code, error.json()["error"]["param"]) == (400, param)
