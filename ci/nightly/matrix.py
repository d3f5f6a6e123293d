"""A matrix of nights: reads a TOML file of boards, models and weight types into the list of nights to run.

    boards = ["virtual", "desk/ax650.yaml"]   # of ci/boards, or your own YAMLs, relative to this file
    models = ["tiny-qwen2"]                    # of models/
    weight_type = ["s8", "s4"]                 # of axc llm_build; default: each model's own
    targets = "targets.toml"                   # default: ci/targets.toml

    [[exclude]]                                # every night that matches all of these
    board = "ax630c"
    weight_type = "s4"
    reason = "no room for the check"

Errors are reported before anything is reserved or built: `read` names the line, `plans` the night.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from axc.models import load_model
from axrun.errors import BadInput, Failure
from ci.device import place, toml_lines
from ci.device.place import Board
from ci.device.toml_lines import line
from ci.nightly import history, pipeline, preflight, targets, variant
from ci.nightly.preflight import Plan
from ci.nightly.targets import Target
from ci.nightly.variant import Variant, own_type

KEYS = ("boards", "models", "weight_type", "targets", "exclude")
EXCLUDE = ("board", "model", "weight_type", "reason")
OF_ONE = ("LG_BOARD_ADDRESS", "LG_BOARD_POWER", "LG_BOARD_STATE")  # variables that apply to one board
MOST = 1000  # nights, and characters of a reason

Found = TypeVar("Found")


@dataclass(frozen=True)
class Cell:
    """One night to run."""

    board: Board
    model: Variant

    @property
    def name(self) -> str:
        """The night as messages name it."""
        return f"{self.model.name} on {self.board.title}"

    @property
    def build(self) -> tuple[str, str]:
        """The key of a shared build: model variant and chip."""
        return self.model.name, pipeline.chip(self.board, self.model)


@dataclass(frozen=True)
class Matrix:
    """`cells` are the nights in the order of the file, board by board; `excluded` maps (board, model) to the reason."""

    file: Path
    boards: tuple[Board, ...]
    models: tuple[Variant, ...]
    cells: tuple[Cell, ...]
    excluded: Mapping[tuple[str, str], str]
    targets: tuple[Target, ...]


def read(file: Path) -> Matrix:
    """The matrix of a file. Raises BadInput with the line of the error."""
    text, content = toml_lines.read(file)
    return _Reader(file, text, content).matrix()


def plans(matrix: Matrix, folder: Path) -> dict[Cell, Plan]:
    """The plan of each night. Raises BadInput that names every night that cannot run, and why."""
    found, refused = {}, []
    for cell in matrix.cells:
        try:
            if cell.board.in_farm:
                preflight.require_set_up(cell.board)
            before = history.read(folder, cell.board.name, cell.model.name)
            found[cell] = preflight.check(cell.board, cell.model.name, None, folder, before)
        except Failure as failure:
            refused.append(f"{cell.name}: {failure}")
    if refused:
        count = f"{len(refused)} of {len(matrix.cells)} nights of {matrix.file} cannot run:"
        raise BadInput(refused[0] if len(matrix.cells) == 1 else "\n".join([count, *refused]))
    return found


class _Reader:
    def __init__(self, file: Path, text: str, content: Mapping[str, Any]) -> None:
        self.file, self.text, self.content = file, text, content
        self.given: dict[str, str] = {}  # board name -> its name in the file

    def matrix(self) -> Matrix:
        for key in self.content:
            if key not in KEYS:
                where = max(line(self.text, key), line(self.text, table=key))
                raise self.wrong(where, f"{key!a:.40} is not known: expected {', '.join(KEYS)}")
        boards = self.each("boards", self.board)
        self.one_name(boards)
        specs = self.each("models", self.model)
        types = self.each("weight_type", variant.require_weight_type) if "weight_type" in self.content else [""]
        models = [Variant(spec, kind or own_type(spec)) for spec in specs for kind in types]
        if len(boards) * len(models) > MOST:
            raise self.wrong(1, f"{len(boards) * len(models)} nights, expected at most {MOST}")
        every = [Cell(board, model) for board in boards for model in models]
        excluded = self.excluded(every)
        cells = [cell for cell in every if (cell.board.name, cell.model.name) not in excluded]
        if not cells:
            raise self.wrong(line(self.text, table="exclude"), "every night is excluded: nothing is left to run")
        return Matrix(self.file, tuple(boards), tuple(models), tuple(cells), excluded, self.targets())

    def each(self, key: str, find: Callable[[str], Found]) -> list[Found]:
        """The entries of a list of names, each resolved by `find`."""
        names = self.content.get(key)
        if key not in self.content:
            raise self.wrong(1, f"{key} is missing: expected a list, as in ci/matrix.toml")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.wrong(line(self.text, key), f"{key} is {names!a:.60}, expected a list of names")
        if not names:
            raise self.wrong(line(self.text, key), f"{key} is empty: expected at least one name")
        found = []
        for place_, name in enumerate(names):
            if name in names[:place_]:
                raise self.wrong(line(self.text, key, name, nth=1), f"{name!a:.60} is twice in {key}")
            try:
                found.append(find(name))
            except BadInput as error:
                raise self.wrong(line(self.text, key, name), str(error)) from None
        return found

    def board(self, name: str) -> Board:
        return place.find(str(self.file.parent / name) if name.endswith(".yaml") else name)

    def model(self, name: str) -> Any:
        if "@" in name:
            raise BadInput(f"{name!a:.60} has a weight type: list it in weight_type, and exclude unwanted nights")
        return load_model(name)

    def one_name(self, boards: Sequence[Board]) -> None:
        """Refuses two YAMLs with one board name: they would share gates, history and a lock."""
        for name, board in zip(self.content["boards"], boards, strict=True):
            if board.name in self.given:
                raise self.wrong(
                    line(self.text, "boards", name),
                    f"{name!a:.60} has the board name {board.name}, like another board of this matrix\n"
                    "Gates and history need a unique options.board; or use a separate matrix.",
                )
            self.given[board.name] = name
        if len(boards) > 1 and (said := [name for name in OF_ONE if os.environ.get(name)]):
            raise self.wrong(
                line(self.text, "boards"),
                f"{' and '.join(said)} would apply to all {len(boards)} boards\nUnset it: each board has its own.",
            )

    def excluded(self, every: Sequence[Cell]) -> dict[tuple[str, str], str]:
        tables = self.content.get("exclude", [])
        if not isinstance(tables, list) or not all(isinstance(entry, dict) for entry in tables):
            where = max(line(self.text, "exclude"), line(self.text, table="exclude"))
            raise self.wrong(where, "exclude is not a list of tables: expected [[exclude]] for each")
        found: dict[tuple[str, str], str] = {}
        for index, entry in enumerate(tables):

            def at(key: str = "", value: object = None, index: int = index) -> int:
                return line(self.text, key, value, table="exclude", index=index)

            for key, value in entry.items():
                if key not in EXCLUDE:
                    raise self.wrong(at(key), f"{key!a:.40} is not known: [[exclude]] has {', '.join(EXCLUDE)}")
                if not isinstance(value, str) or not value or len(value) > MOST:
                    raise self.wrong(at(key), f"{key} is {value!a:.60}, expected text")
            if "reason" not in entry:
                raise self.wrong(at(), "this exclusion has no reason: the page shows it")
            named = {key: value for key, value in entry.items() if key != "reason"}
            if not named:
                raise self.wrong(at(), "this exclusion names no board, model or weight_type")
            matched = [cell for cell in every if self.names(cell, named)]
            if not matched:
                said = ", ".join(f"{key} {value}" for key, value in named.items())
                raise self.wrong(at(), f"this exclusion matches no night of the matrix: {said}")
            for cell in matched:
                found.setdefault((cell.board.name, cell.model.name), entry["reason"])
        return found

    def names(self, cell: Cell, named: Mapping[str, str]) -> bool:
        seen = {
            "board": {cell.board.name, self.given[cell.board.name]},
            "model": {cell.model.spec.name},
            "weight_type": {cell.model.weight_type},
        }
        return all(value in seen[key] for key, value in named.items())

    def targets(self) -> tuple[Target, ...]:
        name = self.content.get("targets")
        if name is None:
            return targets.read()
        if not isinstance(name, str) or not (self.file.parent / name).is_file():
            raise self.wrong(
                line(self.text, "targets"), f"targets is {name!a:.80}, expected an existing file of targets"
            )
        return targets.read(self.file.parent / name)

    def wrong(self, where: int, why: str) -> BadInput:
        return BadInput(f"{self.file} line {where}: {why}")
