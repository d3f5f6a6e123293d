"""Check of the Host header, a defence against DNS rebinding.

A page of another site can make its own name resolve to this machine. The browser then treats our responses as that
site's own. The Host header still has the foreign name: https://www.rfc-editor.org/rfc/rfc9110#section-7.2
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from axrun.serve.errors import ApiError, invalid

ANY = "*"
# https://www.rfc-editor.org/rfc/rfc9112#section-3.2; an IPv6 address, or a name or IPv4 address
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._~!$&'()*+,;=%-]+))(?::[0-9]{0,5})?")
NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
LOCAL_SUFFIXES = ("local", "lan", "internal", "home.arpa")  # no public names exist under these suffixes


class Hosts:
    """The allowed host names. IP addresses and localhost are always allowed: no foreign page has one as its origin.

    `own` are the names of this server, `allowed` additional ones. If other machines can connect and `allowed` is empty,
    names that cannot be registered publicly are allowed too; with an API key, which a foreign page does not know, every
    name is allowed.
    """

    def __init__(self, loopback: bool, key: bool, own: Sequence[str], allowed: Sequence[str] = ()) -> None:
        self._names = {_plain(name) for name in (*own, *allowed)}
        self._open = not loopback and not allowed
        self._any = ANY in allowed or (self._open and key)

    def check(self, header: str) -> None:
        """Raises ApiError for a Host header that is malformed or has a name that is not allowed."""
        found = HOST.fullmatch(header)
        if not found or (found[1] and not _is_address(found[1])):
            raise invalid(f"The Host header is {header[:60]!a}; expected a name or an address.", code="invalid_http")
        name = _plain(found[1] or found[2])
        if not (self._any or self._serves(name)):
            raise ApiError(
                403,
                f"The host name {name[:253]!a} is not allowed; start the server with --allowed-host NAME.",
                "host_not_allowed",
            )

    def _serves(self, name: str) -> bool:
        last = name.rpartition(".")[2]
        if name in self._names or last == "localhost" or _is_address(name):
            return True
        return self._open and (name == last or name.endswith(tuple(f".{suffix}" for suffix in LOCAL_SUFFIXES)))


def _plain(name: str) -> str:
    return name.lower().rstrip(".")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
