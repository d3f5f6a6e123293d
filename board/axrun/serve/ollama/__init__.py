"""Ollama's API, on top of chat completions and completions: https://docs.ollama.com/api"""

from __future__ import annotations

from typing import Any

from axrun.serve.errors import ApiError

PREFIX = "/api/"  # of its routes
TAG = ":latest"  # the tag of a model, if a name has none


def untagged(body: Any) -> Any:
    """A request with the name of its model as `model`, without Ollama's default tag. It is not validated yet."""
    if not isinstance(body, dict):
        return body
    given = dict(body)
    if "name" in given and "model" not in given:
        given["model"] = given.pop("name")
    model = given.get("model")
    return {**given, "model": model[: -len(TAG)]} if isinstance(model, str) and model.endswith(TAG) else given


def error_of(error: ApiError) -> dict[str, Any]:
    """An error in the form of this API."""
    return {"error": error.message}
