"""The OpenAPI document of the server: https://spec.openapis.org/oas/v3.1.0"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from axrun.serve import tokens
from axrun.serve.answer_schema import SCHEMAS, STRING, ref
from axrun.serve.endpoint import Endpoint
from axrun.serve.field_kinds import request
from axrun.serve.ollama.fields import SHOW
from axrun.serve.routes import WRITING

# status: description
REFUSALS = {
    "400": "The request is invalid or not supported.",
    "403": "The name in the Host header is not allowed.",
    "404": "No such model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The Content-Type of the body is not application/json.",
    "429": "Too many requests are queued; Retry-After says when to try again.",
    "500": "Internal error.",
    "503": "The model is being loaded, or the server is shutting down.",
    "504": "The answer was not finished in time.",
}
STREAMS = {"text/event-stream": "server-sent events", "application/x-ndjson": "lines of JSON"}
UNAUTHORIZED = "Wrong or missing API key."


def document(models: Sequence[str]) -> dict[str, Any]:
    """The whole document; requests are those of `axrun.serve.schema`."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "axrun serve",
            "version": "1",
            "description": "OpenAI's and Ollama's APIs for one or several models. Fields that are known but "
            "not supported are refused unless their value turns them off; unknown fields are refused.",
        },
        "paths": {
            **{path: {"post": _writing(each, request(each.fields, models))} for path, each in WRITING.items()},
            "/tokenize": {"post": _converting("Token ids of a text", "Tokens", request(tokens.TOKENIZE, models))},
            "/detokenize": {"post": _converting("Text of token ids", "Text", request(tokens.DETOKENIZE, models))},
            "/api/show": {"post": _converting("Show a model", "OllamaShow", request(SHOW, models), "OllamaError")},
            "/api/tags": {"get": _reading("List the models", "OllamaModels", "OllamaError")},
            "/api/version": {"get": _reading("Version of axrun", "OllamaVersion", "OllamaError")},
            "/v1/models": {"get": _reading("List the served models", "Models")},
            **{f"/v1/models/{name}": {"get": _reading("Show a served model", "Model")} for name in models},
            "/health": {
                "get": {
                    "summary": "Readiness of the server",
                    "security": [],
                    "responses": {
                        "200": _says("Ready.", ref("Health")),
                        "503": _says("Loading, or shutting down.", ref("Health")),
                    },
                }
            },
            "/metrics": {
                "get": {
                    "summary": "Metrics for Prometheus",
                    "responses": {
                        "200": {"description": "Text.", "content": {"text/plain": {"schema": STRING}}},
                        "401": _says(UNAUTHORIZED, ref("Error")),
                    },
                }
            },
        },
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _writing(endpoint: Endpoint, body: dict[str, Any]) -> dict[str, Any]:
    made = _converting(endpoint.summary, endpoint.answer, body, endpoint.error)
    if not endpoint.streams:
        return made
    made["responses"]["200"] = _says(f"The answer; in a stream, {STREAMS[endpoint.media]}.", ref(endpoint.answer))
    made["responses"]["200"]["content"][endpoint.media] = {}
    return made


def _converting(summary: str, answer: str, body: dict[str, Any], error: str = "Error") -> dict[str, Any]:
    refusals = {status: _says(text, ref(error)) for status, text in {**REFUSALS, "401": UNAUTHORIZED}.items()}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": _says("The result.", ref(answer)), **refusals},
    }


def _reading(summary: str, answer: str, error: str = "Error") -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": _says("It.", ref(answer)), "401": _says(UNAUTHORIZED, ref(error))},
    }


def _says(text: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": body}}}
