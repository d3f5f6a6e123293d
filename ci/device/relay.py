"""A board's power relay: wraps labgrid's power drivers with a timeout and errors that name the wrong setting.

labgrid's network power drivers have no timeout and raise the exceptions of the library that they use.
"""

from __future__ import annotations

import difflib
import pkgutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from axrun.errors import BadInput, CheckFailed, Failure
from ci.device.settings import hidden

ANSWER_SECONDS = 20.0  # for a relay to switch
# models whose host is a URL, and its form; for all others it is a plain name or address
URLS = {
    "simplerest": "http://HOST/relay/{index}/{value}",
    "rest": "http://HOST/relay/{index}/value",
    "shelly_gen1": "http://HOST",
    "shelly_gen2": "http://HOST",
    "digitalloggers_http": "http://USER:PASSWORD@HOST",
    "digitalloggers_restapi": "http://USER:PASSWORD@HOST",
    "mfi_mpower": "http://USER:PASSWORD@HOST/",
    "poe_netgear_plus": "http://ANY:PASSWORD@HOST/",
    "tinycontrol": "http://HOST/",
    "tinycontrol_tcpdu": "http://HOST",
    "ubus": "http://HOST/ubus",
}


@dataclass(frozen=True)
class Port:
    """A relay's port from the settings; `where` names the source of each setting."""

    board: str
    model: str
    host: str
    index: str
    where: str

    def __str__(self) -> str:
        return f"the relay of {self.board} ({self.model}, {hidden(self.host)!r}, index {self.index})"

    def wrong(self, what: str) -> BadInput:
        return BadInput(f"{self}: {what}\n{self.where}; its form: {URLS.get(self.model, 'HOST')}")


class Switch:
    """A power driver with `on`, `off` and `cycle`. They raise CheckFailed, or BadInput for a wrong setting."""

    def __init__(self, board: str, driver: Any, port: Port | None) -> None:
        """`port` is None for a driver that is not a network relay; its command has no timeout here."""
        self._board, self._driver, self._port = board, driver, port

    def on(self) -> None:
        self._call(self._driver.on)

    def off(self) -> None:
        self._call(self._driver.off)

    def cycle(self) -> None:
        self._call(self._driver.cycle)

    def _call(self, switch: Callable[[], None]) -> None:
        try:
            if self._port is None:
                switch()
            else:
                _within(ANSWER_SECONDS, switch, self._port)
        except Failure:
            raise
        except subprocess.CalledProcessError as error:
            said = (error.output or b"").decode(errors="replace").strip().splitlines()
            raise CheckFailed(f"the power of {self._board} could not be switched: {(said or [error])[-1]}") from None
        except Exception as error:  # whatever the driver's library raises
            raise explained(self._board, self._port, error) from None


def check_model(port: Port) -> None:
    """Raises BadInput for a model that labgrid does not have."""
    from labgrid.driver import power

    models = sorted(found.name for found in pkgutil.iter_modules(power.__path__))
    if port.model not in models:
        near = difflib.get_close_matches(port.model, models, 1)
        meant = f"is {near[0]} meant?" if near else f"labgrid has {', '.join(models)}"
        raise BadInput(f"{port}: labgrid has no such model: {meant}\n{port.where}")


def check(port: Port) -> None:
    """Raises BadInput for a host that does not have its model's form, before labgrid parses it."""
    check_model(port)
    try:
        url = urlsplit(port.host if "//" in port.host else f"//{port.host}")
        named, _ = url.hostname, url.port
    except ValueError as error:
        raise port.wrong(f"no address: {error}") from None
    if port.model in URLS:
        if url.scheme not in ("http", "https") or not named:
            raise port.wrong("no http URL")
        try:
            port.host.format(index=1, value=1)
        except (ValueError, KeyError, IndexError) as error:
            raise port.wrong(f"braces that are neither {{index}} nor {{value}}: {error}") from None
        if port.model == "simplerest" and "{value}" not in port.host:
            raise port.wrong("{value}, which becomes 0 or 1, is missing: it would switch nothing")
        if port.model == "rest" and "{value}" in port.host:
            raise port.wrong("it has {value}, which only simplerest has")
    elif url.scheme or url.path not in ("", "/") or not named:
        raise port.wrong("expected only a name or an address")


def explained(board: str, port: Port | None, error: Exception) -> Failure:
    """An error that explains a power driver's exception."""
    import requests

    if port is None:
        return CheckFailed(f"the power of {board} could not be switched: {_line(error)}")
    if isinstance(error, requests.HTTPError) and error.response is not None:
        code, reason = error.response.status_code, error.response.reason
        hint = {
            401: "wrong user or password",
            403: "wrong user or password",
            404: "wrong path, index or model",
        }
        said = f"{port} answered {code} {reason}" + (f": {hint[code]}" if code in hint else "")
        return CheckFailed(f"{said}\n{port.where}; its form: {URLS.get(port.model, 'HOST')}")
    if isinstance(error, requests.RequestException | OSError):
        return CheckFailed(f"{port} does not answer: {_cause(error)}\n{port.where}")
    if isinstance(error, AssertionError | KeyError | IndexError | ValueError):
        return port.wrong(f"it does not take this index or host, or answers as another model does ({_line(error)})")
    return CheckFailed(f"{port} could not be switched: {_line(error)}\n{port.where}")


def _within(seconds: float, switch: Callable[[], None], port: Port) -> None:
    """Runs `switch` in a thread that is abandoned after `seconds`: the drivers have no timeout."""
    failed: list[Exception] = []

    def run() -> None:
        try:
            switch()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise CheckFailed(f"{port} did not answer in {seconds:.0f} s\n{port.where}")
    if failed:
        raise failed[0]


def _cause(error: BaseException) -> str:
    """The innermost cause, for example `Connection refused`."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error.strerror if isinstance(error, OSError) and error.strerror else _line(error)


def _line(error: BaseException) -> str:
    text = hidden(" ".join(str(error).split()))[:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
