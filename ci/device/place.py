"""Boards by name: reads ci/boards/<name>.yaml, a labgrid environment, and reaches, reserves and powers the board.

A board's keys, known_hosts and lock are in a state folder of the user, never in the checkout.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axrun.errors import BadInput, CheckFailed
from ci.device import bounded, commands, relay, settings
from ci.device.settings import Setting

ROOT = Path(__file__).resolve().parents[2]
BOARDS = ROOT / "ci" / "boards"
SSH = BOARDS / "ssh"  # a wrapper that checks host keys; labgrid's own ssh command accepts any key
BY_HAND = ("manual", "none")  # values of `power` without a power port
CLIENT_SECONDS = 30
MOST_SAID = 1 << 20  # bytes kept of labgrid-client's output
TELL_SECONDS = 30.0  # between two progress lines while waiting for a board
HELD = "LG_BOARD_HELD"  # the state folder of a board that this process or its parent already holds

# keys under `options` of a board's YAML, which labgrid ignores: pattern, and description for errors
OPTIONS = {
    "board": (r"[a-z0-9][a-z0-9-]{0,31}", "a name of lower-case letters, digits and '-'"),
    **{key: settings.KNOWN[key][1:] for key in ("architecture", "python", "root", "engine")},
}


Say = Callable[[str], None]


def quiet(line: str) -> None:
    """Discards a progress line."""


class Held(BadInput):
    """The board is in use; `who` names the holder."""

    def __init__(self, board: str, who: str, advice: str) -> None:
        super().__init__(f"{board} is held by {who}{advice}")
        self.who = who


class Waited(BadInput):
    """A farm's coordinator did not answer in time."""


@dataclass(frozen=True)
class Board:
    """A board, as configured.

    name: its name in gates and history.
    architecture, python: as printed by `uname -m`; the minor version ("3.11").
    root: the folder of the releases, relative to the user's home on the board.
    engine: the engine that executes axmodels.
    state: the folder of its keys and lock on this machine.
    reserve: tags of a farm's place; empty for a board outside a farm.
    given: settings from the environment and the user's file (ci/device/settings.py), which override the YAML.
    """

    name: str
    yaml: Path
    state: Path
    architecture: str
    python: str
    root: str
    engine: str
    address: str = ""
    power: str = ""
    reserve: str = ""
    given: Mapping[str, Setting] = field(default_factory=dict, compare=False)

    @property
    def argument(self) -> str:
        """The value for --board."""
        return self.yaml.stem if self.yaml.parent == BOARDS else str(self.yaml)

    @property
    def switch(self) -> str:
        """How it is powered: "port", "manual" (by its user) or "none"."""
        return self.power if self.power in BY_HAND else "port"

    @property
    def in_farm(self) -> bool:
        return bool(self.reserve)

    @property
    def emulated(self) -> bool:
        """Whether this machine emulates it; its times then say nothing about a real board."""
        return is_emulated(self.name)

    @property
    def title(self) -> str:
        """The name as messages show it."""
        return f"{self.name} (emulated)" if self.emulated else self.name

    def variables(self) -> dict[str, str]:
        """Environment variables that its YAML and the ssh wrapper refer to; for every process that uses the board."""
        said = {settings.KNOWN[key][0]: setting.value for key, setting in self.given.items()}
        return {
            **said,
            "LG_ENV": str(self.yaml),
            "LG_BOARD_STATE": str(self.state),
            "LG_BOARD_PYTHON": sys.executable,
            "LG_BOARD_ADDRESS": self.address,
            "LG_BOARD_POWER": self.power,
            "LG_PLACE": os.environ.get("LG_PLACE", "+"),
        }


@dataclass(frozen=True)
class Address:
    """Where a board's sshd listens, and the login with its key."""

    host: str
    port: int
    user: str
    keyfile: Path


def find(name: str) -> Board:
    """The board of ci/boards/<name>.yaml, or of a YAML file given by path.

    The environment and the user's settings (ci/device/settings.py) override the YAML.
    Raises BadInput for an unknown name and for a YAML without a required option.
    """
    yaml = Path(name) if name.endswith(".yaml") else BOARDS / f"{name}.yaml"
    if not yaml.is_file():
        known = sorted(path.stem for path in BOARDS.glob("*.yaml"))
        raise BadInput(f"no board is named {name!r}: ci/boards/ has {', '.join(known)}\nOr give a .yaml of your own.")
    options, given = dict(_options(yaml)), settings.read(yaml.stem)
    options |= {key: setting.value for key, setting in given.items()}
    for key, (pattern, words) in OPTIONS.items():
        if not re.fullmatch(pattern, str(options.get(key))):
            raise BadInput(f"{yaml}: options.{key} is {options.get(key)!a:.80}, expected {words}")
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    kept = {key: str(options[key]) for key in OPTIONS if key != "board"}
    kept_in = str(options.get("state") or home / "axc" / "boards" / str(options["board"]))
    return Board(
        name=str(options["board"]),
        yaml=yaml.resolve(),
        state=settings.expanded(kept_in, f"{yaml}: options.state").absolute(),
        address=str(options.get("address", "")),
        power=str(options.get("power", "")),
        reserve=str(options.get("reserve", "")),
        given=given,
        **kept,
    )


@contextlib.contextmanager
def target(board: Board) -> Iterator[Any]:
    """labgrid's Target of a board; sets the environment variables that its YAML refers to while it is open.

    A farm's place must be reserved first. Raises BadInput if labgrid cannot create the target.
    """
    from labgrid import Environment
    from labgrid.exceptions import InvalidConfigError, NoResourceFoundError
    from labgrid.remote.client import Error as FarmError

    with environment(board.variables()):
        made = Environment(str(board.yaml))
        try:
            settle(board, made.config)
            yield made.get_target("main")
        except (InvalidConfigError, NoResourceFoundError, FarmError, ConnectionRefusedError) as error:
            raise BadInput(f"labgrid cannot reach {board.name} as configured in {board.yaml}: {error}") from None
        finally:
            made.cleanup()


def settle(board: Board, config: Any) -> None:
    """Applies the board's settings to a labgrid configuration and enforces host key checks.

    Call it before creating a target. Raises BadInput.
    """
    check_host_keys(config)
    now = {"address": board.address, "power": board.power}
    settings.apply({key: Setting(now.get(key, said.value), said.source) for key, said in board.given.items()}, config)
    if port := relay_port(board, config):
        relay.check_model(port)


def relay_port(board: Board, config: Any) -> relay.Port | None:
    """The relay's port in a labgrid configuration; None if it has none, as in a farm."""
    for section in settings.sections(config.data):
        for kind, values in section:
            if kind == "NetworkPowerPort":
                model, host, index = (str(values.get(key, "")) for key in ("model", "host", "index"))
                return relay.Port(board.name, model, host, index, _where(board))
    return None


def _where(board: Board) -> str:
    """The sources of a relay's settings, for an error message."""
    found = {key: board.given[key].source for key in ("power", "power_model", "power_index") if key in board.given}
    said = [f"{key} is from {source}" for key, source in found.items()]
    rest = [key for key in ("power", "power_model", "power_index") if key not in found]
    named = f"{', '.join(rest)} from {board.yaml}, or set in {settings.file(board.yaml.stem)}"
    return "; ".join([*said, *([named] if rest else [])])


def check_host_keys(config: Any) -> None:
    """Makes a labgrid configuration use the ssh wrapper SSH. Call it before creating a target.

    labgrid looks up `tools.ssh` relative to the YAML and falls back to the system's ssh.
    Raises BadInput for a YAML that names another ssh, which may not check host keys.
    """
    tools = config.data.setdefault("tools", {})
    named = tools.get("ssh", "ssh") if isinstance(tools, dict) else tools
    if named != "ssh" and not (isinstance(named, str) and Path(config.resolve_path(named)).resolve() == SSH):
        raise BadInput(
            f"{config.filename}: tools.ssh is {named!a:.80}, which may accept any host key\n"
            f"Remove it: the default, {SSH}, checks the key against known_hosts."
        )
    tools["ssh"] = str(SSH)


def address(board: Board) -> Address:
    """The board's address: from its YAML, or of the reserved place in a farm. Raises BadInput."""
    with target(board) as found:
        return address_of(found)


def address_of(target: Any) -> Address:
    """The address that a labgrid target's SSHDriver connects to."""
    service = target.get_resource("NetworkService")
    driver = target.get_driver("SSHDriver", activate=False)
    user = driver.username or service.username
    keyfile = Path(target.env.config.resolve_path(driver.keyfile))
    return Address(str(service.address), int(service.port), str(user), keyfile)


@contextlib.contextmanager
def power(board: Board) -> Iterator[relay.Switch]:
    """The board's power switch. Raises BadInput if it has none or it is misconfigured."""
    from labgrid.exceptions import NoDriverFoundError
    from labgrid.protocol import PowerProtocol

    if board.switch != "port":
        raise BadInput(f"power is {board.switch!r} for {board.name}: switch it by hand")
    with target(board) as found:
        port = relay_port(board, found.env.config)
        if port:
            relay.check(port)
        try:
            driver = found.get_driver(PowerProtocol)
        except NoDriverFoundError:
            raise BadInput(f"{board.yaml} has no power port: {board.name} cannot be switched on and off") from None
        except ValueError as error:  # from labgrid's parsing of the address
            raise port.wrong(str(error)) if port else BadInput(f"{board.yaml}: {error}") from None
        yield relay.Switch(board.name, driver, port)


def require_power(board: Board) -> None:
    """Raises BadInput for a board whose YAML has no power port, which a night needs, or a misconfigured one.

    Switches nothing. For a farm's place it can only check for a driver in the YAML. A board with `power` manual or none
    needs no port.
    """
    if board.switch != "port":
        return
    from labgrid import Environment, target_factory
    from labgrid.exceptions import NoDriverFoundError, NoSupplierFoundError
    from labgrid.protocol import PowerProtocol

    missing = BadInput(
        f"{board.yaml} has no power port, and a night switches its board off and on\n"
        "Add one of labgrid's power drivers there, or set power: none in its options: docs/boards.md."
    )
    if not board.in_farm:
        try:
            with target(board) as found:
                if port := relay_port(board, found.env.config):
                    relay.check(port)
                found.get_driver(PowerProtocol, activate=False)
        except (NoDriverFoundError, NoSupplierFoundError):
            raise missing from None
        return
    with environment(board.variables()):
        _, drivers = target_factory.normalize_config(Environment(str(board.yaml)).config.get_targets()["main"])
    if not any(issubclass(target_factory.drivers.get(kind, object), PowerProtocol) for kind in drivers):
        raise missing


@contextlib.contextmanager
def hold(board: Board, seconds: int = 0, say: Say = quiet, reserved: Say = quiet) -> Iterator[None]:
    """Holds the board exclusively: reserves and locks a farm's place, or takes a local lock.

    Waits up to `seconds` and reports the holder at once and every TELL_SECONDS. `reserved` gets the token of a farm's
    reservation. A process whose parent holds the board (HELD in its environment) enters at once.
    Raises Held naming the holder, BadInput in a farm.
    """
    if os.environ.get(HELD) == str(board.state):
        yield
        return
    if board.in_farm:
        with _place(board, seconds, say, reserved):
            yield
        return
    board.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (board.state / "lock").open("a+") as lock:
        _flock(lock, board, seconds, say)
        lock.truncate(0)
        lock.write(f"{owner()}\n")
        lock.flush()
        yield
        lock.truncate(0)


def owner() -> str:
    """This process as others see it while they wait: user, machine, process."""
    return f"{getpass.getuser()}@{socket.gethostname()} (pid {os.getpid()})"


def _flock(lock: Any, board: Board, seconds: int, say: Say) -> None:
    began = told = time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            now = time.monotonic()
            lock.seek(0)
            who = "".join(c if c.isprintable() else "�" for c in lock.readline(200).strip()) or "somebody"
            if now >= began + seconds:
                raise Held(board.name, who, "\nWait for it, or ask them to release it.") from None
            if told == began or now >= told + TELL_SECONDS:
                say(f"{board.name} is held by {who}; waited {now - began:.0f} s of at most {seconds} s")
                told = now
        time.sleep(0.2)


@contextlib.contextmanager
def _place(board: Board, seconds: int, say: Say, reserved: Say) -> Iterator[None]:
    """Reserves any place with the board's tags and locks it; LG_PLACE names it meanwhile."""
    if not os.environ.get("LG_COORDINATOR"):
        raise BadInput(f"{board.name} is in a farm: set its coordinator, LG_COORDINATOR=host:20408")
    said = client(board, "reserve", "--shell", board.reserve)
    token = re.search(r"^export LG_TOKEN=(\w+)$", said, re.M)
    if token is None:
        raise CheckFailed(f"labgrid-client reserved {board.reserve}, but printed no token: {said.strip()[:200]}")
    reserved(token[1])
    try:
        _await(board, token[1], max(seconds, CLIENT_SECONDS), say)
        with environment({"LG_TOKEN": token[1], "LG_PLACE": "+"}):
            client(board, "-p", "+", "lock")
            try:
                yield
            finally:
                client(board, "-p", "+", "unlock")
    finally:
        client(board, "cancel-reservation", token[1])


def _await(board: Board, token: str, seconds: int, say: Say) -> None:
    """Waits until the reservation has a place; reports the holders of the farm's places and the time waited."""
    began = time.monotonic()
    while True:
        left = began + seconds - time.monotonic()
        try:
            client(board, "wait", token, seconds=max(1.0, min(left, TELL_SECONDS)))
            return
        except Waited:
            waited = time.monotonic() - began
            if waited >= seconds:
                raise BadInput(f"no {board.name} became free in {seconds} s (labgrid-client wait {token})") from None
            with contextlib.suppress(BadInput):
                who = [" ".join(line.split()) for line in client(board, "who").splitlines()[1:]]
                held = "; ".join("".join(c for c in line if c.isprintable()) for line in who)[:300]
                say(f"no {board.name} is free; waited {waited:.0f} s of at most {seconds} s; held: {held or 'none'}")


def client(board: Board, *words: str, seconds: float = CLIENT_SECONDS) -> str:
    """Runs labgrid-client. Raises BadInput with its last line, or Waited after a timeout."""
    program = shutil.which("labgrid-client", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
    if program is None:
        raise BadInput(f"labgrid-client is not installed: {commands.invoke('setup', '--extra', 'boards')}")
    done = bounded.run([program, *words], seconds=seconds, most=MOST_SAID, drains=True)
    out, err = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    if done.code is None:
        raise Waited(f"labgrid-client {' '.join(words)} did not answer in {seconds:.0f} s")
    if done.code:
        last = [line for line in (err + out).splitlines() if line.strip()][-1:]
        raise BadInput(f"labgrid-client {' '.join(words)}: {(last or ['it printed nothing'])[0][:300]}")
    return out


def _options(yaml: Path) -> Mapping[str, Any]:
    """The YAML's options, read without labgrid: its variables are not set yet."""
    from labgrid.util.yaml import load
    from yaml import YAMLError

    try:
        with yaml.open() as file:
            data = load(file)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise BadInput(f"cannot read {yaml}: {' '.join(str(error).split())[:200]}") from None
    options = data.get("options") if isinstance(data, dict) else None
    if not isinstance(options, dict):
        raise BadInput(f"{yaml} has no options: see ci/boards/virtual.yaml")
    return options


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables of this process, and restores them afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def is_emulated(name: str) -> bool:
    """Whether a board of this name is emulated: `virtual`, or `virtual-...` of a user's YAML."""
    return name == "virtual" or name.startswith("virtual-")
