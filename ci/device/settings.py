"""The user's settings of a board (address, user, relay), in the user's configuration instead of the checkout.

    ~/.config/axc/boards/ax650.toml          (XDG_CONFIG_HOME; the file is named as --board is)
        address = "192.168.1.50"
        user = "axera"
        power = "http://192.168.1.9"
        power_model = "shelly_gen2"
        power_index = 0

Precedence: environment variable, this file, the board's YAML.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axrun.errors import BadInput
from ci.device import toml_lines

# the folder of the releases: no `..` out of the user's home, no leading `-` that looks like a flag
FOLDER = r"/?(?!\.\.?(/|$))[A-Za-z0-9_.][A-Za-z0-9_.-]*(/(?!\.\.?(/|$))[A-Za-z0-9_.][A-Za-z0-9_.-]*)*"
WORD, VERSION = r"[a-z0-9_]{1,32}", r"3\.\d{1,2}"
# setting -> environment variable, pattern of its value, description for errors
KNOWN: Mapping[str, tuple[str, str, str]] = {
    "address": ("LG_BOARD_ADDRESS", r"[A-Za-z0-9][A-Za-z0-9._:%-]{0,252}", "a name or an address"),
    "port": ("LG_BOARD_PORT", r"[1-9]\d{0,4}", "a port, 1 to 65535"),
    "user": ("LG_BOARD_USER", r"[A-Za-z_][A-Za-z0-9_.-]{0,31}", "a user's name"),
    "keyfile": ("LG_BOARD_KEYFILE", r"[^\0\n]+", "the path of a file"),
    "state": ("LG_BOARD_STATE", r"[^\0\n]+", "the path of a folder"),
    "power": ("LG_BOARD_POWER", r"[^\0\n]+", "a relay's address, manual or none"),
    "power_model": ("LG_BOARD_POWER_MODEL", r"[a-z0-9_]{1,40}", "a model of labgrid's NetworkPowerPort"),
    "power_index": ("LG_BOARD_POWER_INDEX", r"\d{1,4}", "a number"),
    "root": ("LG_BOARD_ROOT", FOLDER, "a folder of names that begin with a letter, a digit, '_' or '.', without '..'"),
    "python": ("LG_BOARD_PYTHON_VERSION", VERSION, 'its version: "3.11"'),
    "engine": ("LG_BOARD_ENGINE", WORD, "an engine's name"),
    "architecture": ("LG_BOARD_ARCHITECTURE", WORD, "the output of uname -m"),
}
MOST_PORT = 65535
# setting -> labgrid class and key
PLACES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "address": (("NetworkService", "address"),),
    "port": (("NetworkService", "port"),),
    "user": (("NetworkService", "username"), ("SSHDriver", "username")),
    "keyfile": (("SSHDriver", "keyfile"),),
    "power": (("NetworkPowerPort", "host"),),
    "power_model": (("NetworkPowerPort", "model"),),
    "power_index": (("NetworkPowerPort", "index"),),
}
SECRET = re.compile(r"(?<=//)[^/@\s]*@")  # user and password in a URL


@dataclass(frozen=True)
class Setting:
    """A value and its source: a variable or a file."""

    value: str
    source: str

    @property
    def shown(self) -> str:
        """The value without a URL's password."""
        return hidden(self.value)


def hidden(text: str) -> str:
    """The text without passwords in URLs."""
    return SECRET.sub("***@", text)


def file(name: str) -> Path:
    """The settings file of the board `name` (the value of --board, without folder and suffix)."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "axc" / "boards" / f"{name}.toml"


def read(name: str) -> dict[str, Setting]:
    """The settings of a board from the environment and the user's file. Raises BadInput for an invalid one."""
    found = {key: Setting(value, str(file(name))) for key, value in _file(file(name)).items()}
    for key, (variable, *_) in KNOWN.items():
        if value := os.environ.get(variable):
            found[key] = Setting(value, variable)
    for key, setting in found.items():
        _, pattern, words = KNOWN[key]
        if not re.fullmatch(pattern, setting.value) or (key == "port" and int(setting.value) > MOST_PORT):
            raise BadInput(f"{setting.source}: {key} is {setting.shown!a:.80}, expected {words}")
    for key in ("keyfile", "state"):
        if key in found:
            value, source = found[key].value, found[key].source
            found[key] = Setting(str(expanded(value, f"{source}: {key}")), source)
    return found


def apply(given: Mapping[str, Setting], config: Any) -> None:
    """Overrides values of a labgrid configuration with settings. Call it before creating a target."""
    for section in sections(config.data):
        for kind, values in section:
            for key, setting in given.items():
                for where, name in PLACES.get(key, ()):
                    if where == kind:
                        values[name] = int(setting.value) if key == "port" else setting.value


def sections(data: Any) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The resources and drivers of every target, which the YAML may have as a mapping or as a list of mappings."""
    targets = data.get("targets") if isinstance(data, dict) else None
    for target in (targets or {}).values() if isinstance(targets, dict) else ():
        for part in ("resources", "drivers"):
            held = target.get(part) if isinstance(target, dict) else None
            for mapping in held if isinstance(held, list) else [held]:
                if isinstance(mapping, dict):
                    yield [
                        (str(values.get("cls", kind)), values)
                        for kind, values in mapping.items()
                        if isinstance(values, dict)
                    ]


def expanded(text: str, where: str) -> Path:
    """Expands `~` in a path. Raises BadInput for the home of an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise BadInput(f"{where} is {text!a:.80}: this machine has no user of that name") from None


def _file(path: Path) -> dict[str, str]:
    if not os.path.lexists(path):
        return {}
    text, values = toml_lines.read(path)
    for key, value in values.items():
        where = f"{path} line {max(toml_lines.line(text, key), toml_lines.line(text, table=key))}"
        if key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, 1)
            meant = f"is {near[0]} meant?" if near else f"there are {', '.join(KNOWN)}"
            raise BadInput(f"{where}: {key!a:.40} is not a setting of a board: {meant}")
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise BadInput(f"{where}: {key} is {value!a:.40}, expected a string: quote it")
    return {key: str(value) for key, value in values.items()}
