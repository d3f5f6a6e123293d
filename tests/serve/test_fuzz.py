"""schemathesis against the server's own OpenAPI document: valid requests are answered, invalid ones refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from axrun.serve.routes import WRITING
from tests.conftest import Builder
from tests.serve.server import Server

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
)


EXAMPLES = {GenerationMode.POSITIVE: 30, GenerationMode.NEGATIVE: 50}  # positive ones take longer: they are answered

# rules that the JSON Schema of one field cannot express
ACROSS_FIELDS = (
    *("needs stream", "needs logprobs", "outside the vocabulary", "more than 64", "context is", "is empty"),
    *("needs json_schema", "The schema ", "cannot be combined", "no tools", "Two tools", "not among the tools"),
    *(
        "arguments is not JSON",
        "arguments is not a JSON object",
        "may set",
        "parameter: 'content'",
        "thinking_budget needs",
        "needs a schema",
        "dimensions is",
    ),
)


LONGEST = 3  # items of a list in a valid request
LIMITS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
POSTS = [*WRITING, "/tokenize", "/detokenize", "/api/show"]


GETS = ["/v1/models", "/v1/models/qwen2", "/health", "/metrics", "/api/tags", "/api/version"]


@pytest.fixture(scope="module")
def server(build_tiny: Builder) -> Iterator[Server]:
    """Answers all routes, embeddings too."""
    server = Server(build_tiny(ret_postnorm=True)).ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    """The OpenAPI document of the server."""
    return schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())


@pytest.fixture(scope="module")
def brief(server: Server) -> Any:
    """The same with valid token ids, short answers and short lists, to save time."""
    given = server.client.get("/openapi.json").json()
    for path in POSTS:
        shorten(given["paths"][path]["post"]["requestBody"])
    for path in WRITING:
        body = given["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for name in LIMITS & body["properties"].keys():
            body["properties"][name] = {"type": "integer", "minimum": 1, "maximum": 4}
            body["required"].append(name)
        body["properties"].get("n", {})["maximum"] = 2
        if "num_predict" in body["properties"].get("options", {}).get("properties", ()):  # of Ollama's routes
            options = body["properties"]["options"] = {**body["properties"]["options"], "required": ["num_predict"]}
            options["properties"] = {
                **options["properties"],
                "num_predict": {"type": "integer", "minimum": 1, "maximum": 4},
            }
            options["type"] = "object"
            body["required"].append("options")
    for path, name in (("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        body = given["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        *_, tokens, lists = body["properties"][name]["anyOf"]
        tokens["items"]["maximum"] = lists["items"]["items"]["maximum"] = 299  # ids in its vocabulary
    return schemathesis.openapi.from_dict(given)


def shorten(schema: Any) -> None:
    """Limits the lists of a schema: drawing many messages and tools takes longer than answering them."""
    if isinstance(schema, list):
        for each in schema:
            shorten(each)
    elif isinstance(schema, dict):
        if "items" in schema:
            schema["maxItems"] = min(schema.get("maxItems", LONGEST), LONGEST)
        for each in schema.values():
            shorten(each)


def fuzz(operation: Any, server: Server, mode: GenerationMode) -> Counter[str]:
    """Counts of statuses; refusals that depend on several fields are counted separately."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES[mode],
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def answer(case: Any) -> None:
        response = case.call(base_url=server.url, timeout=120)
        case.validate_response(response, checks=list(CHECKS))
        across = response.status_code == 400 and any(words in response.text for words in ACROSS_FIELDS)
        seen["across fields" if across else str(response.status_code)] += 1

    answer()
    assert server.process.poll() is None
    server.idle()
    return seen


@pytest.mark.parametrize("path", POSTS)
def test_valid_requests_are_answered(brief: Any, server: Server, path: str) -> None:
    seen = fuzz(brief[path]["POST"], server, GenerationMode.POSITIVE)
    assert seen["200"] > 5
    assert set(seen) <= {"200", "across fields"}


@pytest.mark.parametrize("path", POSTS)
def test_invalid_requests_are_refused(document: Any, server: Server, path: str) -> None:
    seen = fuzz(document[path]["POST"], server, GenerationMode.NEGATIVE)
    assert seen["400"] + seen["404"] > 25
    assert set(seen) <= {"400", "404", "415", "across fields"}


@pytest.mark.parametrize("path", GETS)
def test_other_routes_match_the_document(document: Any, server: Server, path: str) -> None:
    assert {*POSTS, *GETS} == set(document)
    assert set(fuzz(document[path]["GET"], server, GenerationMode.POSITIVE)) == {"200"}
