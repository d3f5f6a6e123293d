"""Settings of a board: environment over the user's file over the YAML, up to labgrid's connection."""

from __future__ import annotations

from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.device import board_status, place, settings

SAID = """
address = "192.168.1.50"
user = "axera2"
port = 2022
keyfile = "~/keys/ax650"
power = "http://me:secret@192.168.1.9"
power_model = "shelly_gen2"
power_index = 0
root = "/data/axrun"
python = "3.11"
"""


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's settings; no variable of this machine's."""
    for variable, *_ in settings.KNOWN.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "axc" / "boards"
    folder.mkdir(parents=True)
    return folder


def test_the_users_file_wins_over_the_yaml_and_a_variable_over_both(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config / "ax650.toml").write_text(SAID)
    board = place.find("ax650")
    at = place.address(board)
    assert (at.host, at.port, at.user) == ("192.168.1.50", 2022, "axera2")
    assert at.keyfile == Path.home() / "keys" / "ax650"
    assert (board.root, board.python) == ("/data/axrun", "3.11")
    monkeypatch.setenv("LG_BOARD_USER", "other")
    monkeypatch.setenv("LG_BOARD_ADDRESS", "192.168.1.51")
    board = place.find("ax650")
    assert (place.address(board).host, place.address(board).user) == ("192.168.1.51", "other")
    assert board.given["user"].source == "LG_BOARD_USER"
    monkeypatch.delenv("LG_BOARD_USER")
    assert place.address(place.find("ax630c")).user == "axera"


def test_the_relay_is_the_files(config: Path) -> None:
    (config / "ax650.toml").write_text(SAID)
    board = place.find("ax650")
    with place.target(board) as target:
        port = target.get_resource("NetworkPowerPort")
        assert (port.model, port.host, port.index) == ("shelly_gen2", "http://me:secret@192.168.1.9", "0")


def test_a_yaml_of_ones_own_is_named_by_its_file(config: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text((place.BOARDS / "ax650.yaml").read_text())
    (config / "mine.toml").write_text('address = "10.0.0.7"\n')
    board = place.find(str(yaml))
    assert place.address(board).host == "10.0.0.7"
    assert board.argument == str(yaml)
    assert place.find("ax650-farm").argument == "ax650-farm"


def test_status_says_where_each_setting_is_from_and_no_password(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (config / "virtual.toml").write_text('user = "me"\npower = "http://me:secret@192.168.1.9"\nport = 1\n')
    monkeypatch.setenv("LG_BOARD_ADDRESS", "127.0.65.250")
    board = place.find("virtual")
    seen = board_status.status(board, place.address(board))
    text = "\n".join(board_status.lines(seen))
    assert "virtual (emulated): no answer: Connection refused" in text
    assert "board.up --board virtual" in text
    assert f"user        me  ({config / 'virtual.toml'})" in text
    assert "address     127.0.65.250  (LG_BOARD_ADDRESS)" in text
    assert f"root        axrun  ({place.BOARDS / 'virtual.yaml'})" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adress = 'x'", "'adress' is not a setting of a board: is address meant?"),
        ("address = ", "is not valid TOML: "),
        ("address = '-oProxyCommand=x'", "address is '-oProxyCommand=x', expected "),
        ("user = true", "user is True, expected a string: quote it"),
        ("root = '../..; rm'", "root is '../..; rm', expected "),
        ("port = 0", "port is '0', expected a port, 1 to 65535"),
        ("port = 99999", "port is '99999', expected a port, 1 to 65535"),
        (f"port = 0x{'f' * 5000}", "line 1: port is an integer of 20000 bits"),
        ("root = '../../etc'", "root is '../../etc', expected a folder of names"),
        ("root = '/data/../etc'", "root is '/data/../etc', expected "),
        ("root = '-rf'", "root is '-rf', expected "),
        ("root = 'axrun/-rf'", "root is 'axrun/-rf', expected "),
        ("root = '.'", "root is '.', expected "),
        ("keyfile = '~nobody2/x'", "keyfile is '~nobody2/x': this machine has no user of that name"),
        ("state = '~nobody2/x'", "state is '~nobody2/x': this machine has no user of that name"),
        ("user = 'a'\n[power]\nx = 1", "line 2: power is {'x': 1}, expected a string"),
    ],
)
def test_an_invalid_setting_is_refused(config: Path, text: str, said: str) -> None:
    (config / "ax650.toml").write_text(text)
    with pytest.raises(BadInput) as caught:
        place.find("ax650")
    assert str(caught.value).startswith(str(config / "ax650.toml"))
    assert said in str(caught.value)


def test_status_names_the_holder_without_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LG_BOARD_STATE", str(tmp_path / "state"))
    board = place.find("virtual")
    assert board_status.holder(board) == ""
    with place.hold(board):
        assert board_status.holder(board) == place.owner()
    assert board_status.holder(board) == ""
