"""Errors of a request, in OpenAI's format: https://platform.openai.com/docs/guides/error-codes"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An HTTP error. `param` is the field at fault. `retry_after`, in seconds, is sent as a header."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        self.status, self.message, self.code, self.param = status, message, code, param

    def json(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def sentence(error: Exception) -> str:
    """The message of an error as a sentence, or one for each of its lines."""
    return " ".join(f"{line[:1].upper()}{line[1:].rstrip('.')}." for line in str(error).splitlines())


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error for an invalid request: status 400."""
    return ApiError(400, message, code, param)


def stopped() -> ApiError:
    """The error for a request that the shutdown of the server ends."""
    return ApiError(503, "The server is shutting down; try again later.", "service_unavailable", retry_after=2)
