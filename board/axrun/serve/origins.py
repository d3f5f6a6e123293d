"""CORS, off by default: which origins' pages may read answers. https://fetch.spec.whatwg.org/#http-cors-protocol"""

from __future__ import annotations

import re
from collections.abc import Sequence

from axrun.serve.exchange import Exchange

ANY = "*"
ORIGIN = re.compile(r"https?://[A-Za-z0-9._~\[\]:-]{1,260}")
NAMES = re.compile(r"[A-Za-z0-9,_ -]{0,1000}")


class Origins:
    """The allowed origins, as browsers send them: scheme, name and port; * allows any."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._allowed = frozenset(origin.lower() for origin in allowed)

    def headers(self, exchange: Exchange) -> dict[str, str]:
        """The headers that let the page of a request read the answer; none if its origin is not allowed."""
        origin = exchange.header("origin")
        if not origin or not (ANY in self._allowed or origin.lower() in self._allowed):
            return {}
        found = {"access-control-allow-origin": ANY if ANY in self._allowed else origin, "vary": "Origin"}
        if exchange.method != "OPTIONS":
            return found
        wanted = exchange.header("access-control-request-headers")
        return {
            **found,
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": wanted if NAMES.fullmatch(wanted) else "authorization, content-type",
            "access-control-max-age": "600",
        }
