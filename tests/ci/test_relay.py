"""A faulty relay is reported with its setting: a real HTTP server, a closed port, a server that never answers."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from axrun.errors import BadInput, Failure
from ci.device import place, relay, settings
from ci.device.place import Board


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, *_ in settings.KNOWN.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("LG_BOARD_ADDRESS", "127.0.0.1")


class Handler(http.server.BaseHTTPRequestHandler):
    """/relay/1/VALUE works; /locked and /broken are what they say."""

    switched: list[str] = []  # noqa: RUF012  (of the test's one server)

    def do_GET(self) -> None:
        codes = {"/locked": 401, "/broken": 500, "/relay/1/0": 200, "/relay/1/1": 200}
        self.switched.append(self.path)
        self.send_response(codes.get(self.path.rpartition("?")[0] or self.path, 404))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.switched.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.fixture
def deaf() -> Iterator[str]:
    """A port that takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/{{value}}"


def with_relay(monkeypatch: pytest.MonkeyPatch, host: str, model: str = "", index: str = "") -> Board:
    monkeypatch.setenv("LG_BOARD_POWER", host)
    for name, value in (("LG_BOARD_POWER_MODEL", model), ("LG_BOARD_POWER_INDEX", index)):
        if value:
            monkeypatch.setenv(name, value)
    return place.find("ax650")


def refused(board: Board) -> str:
    with pytest.raises(Failure) as caught, place.power(board) as switch:
        switch.off()
    text = str(caught.value)
    assert 2 <= len(text.splitlines()) <= 3
    assert "power is from LG_BOARD_POWER" in text
    assert "Traceback" not in text
    return text


def test_a_relay_that_works(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.power(with_relay(monkeypatch, f"{server}/relay/{{index}}/{{value}}")) as switch:
        switch.off()
        switch.on()
    assert Handler.switched == ["/relay/1/0", "/relay/1/1"]


@pytest.mark.parametrize(
    ("path", "index", "said"),
    [
        ("/none/{value}", "", "answered 404 Not Found: wrong path, index or model"),
        ("/relay/{index}/{value}", "7", "index 7) answered 404 Not Found"),
        ("/locked?{value}", "", "answered 401 Unauthorized: wrong user or password"),
        ("/broken?{value}", "", "answered 500 Internal Server Error"),
    ],
)
def test_errors_of_a_relay_are_explained(
    server: str, path: str, index: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said in refused(with_relay(monkeypatch, server + path, index=index))


def test_another_model_than_the_one_that_is_there(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "(shelly_gen1, " in refused(with_relay(monkeypatch, server, "shelly_gen1"))


def test_a_host_where_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gone = probe.getsockname()[1]
    text = refused(with_relay(monkeypatch, f"http://u:secret@127.0.0.1:{gone}/{{value}}"))
    assert "does not answer: Connection refused" in text
    assert "secret" not in text


def test_a_relay_that_never_answers(deaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "ANSWER_SECONDS", 0.3)
    assert "did not answer in 0 s" in refused(with_relay(monkeypatch, deaf))


@pytest.mark.parametrize(
    ("host", "model", "said"),
    [
        ("htp://relay/{value}", "", "no http URL\n"),
        ("relay/{index}/{value}", "", "no http URL\n"),
        ("http://relay:port/{value}", "", "no address: "),
        ("http://[::1/{value}", "", "no address: "),
        ("http://relay/{index}", "", "{value}, which becomes 0 or 1, is missing"),
        ("http://relay/{values}", "", "braces that are neither {index} nor {value}"),
        ("http://relay/{value", "", "braces that are neither"),
        ("http://relay", "gude", "expected only a name or an address"),
        ("http://relay", "shelly_gen3", "labgrid has no such model: is shelly_gen"),
    ],
)
def test_an_invalid_setting_is_refused_before_switching(
    host: str, model: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = with_relay(monkeypatch, host, model)
    assert said in refused(board)
    with pytest.raises(BadInput):
        place.require_power(board)


def test_by_hand_there_is_nothing_to_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for hand in ("manual", "none"):
        board = with_relay(monkeypatch, hand)
        assert board.switch == hand
        place.require_power(board)
        with pytest.raises(BadInput, match="switch it by hand"), place.power(board):
            pass
