"""A matrix of nights: a TOML file of boards, models and weight types becomes the nights to hold, board by board.

    boards = ["virtual", "desk/ax650.yaml"]   # of ci/boards, or YAMLs of one's own, from this file's folder
    models = ["tiny-qwen2"]                    # of models/
    weight_type = ["s8", "s4"]                 # of axc llm_build; left out: each model's own
    targets = "targets.toml"                   # left out: ci/targets.toml

    [[exclude]]                                # every night that has all of these
    board = "ax630c"
    weight_type = "s4"
    reason = "no room for the check"

What is wrong is refused before anything is reserved or built: by `read` with its line, by `plans` with its night.
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
from ci.nightly import course, history, preflight, targets, variant
from ci.nightly.preflight import Plan
from ci.nightly.targets import Target
from ci.nightly.variant import Variant, own_type

KEYS = ("boards", "models", "weight_type", "targets", "exclude")
EXCLUDE = ("board", "model", "weight_type", "reason")
OF_ONE = ("LG_BOARD_ADDRESS", "LG_BOARD_POWER", "LG_BOARD_STATE")  # variables that are for one board
MOST = 1000  # nights, and characters of a reason

Found = TypeVar("Found")


@dataclass(frozen=True)
class Cell:
    """One night to hold."""

    board: Board
    model: Variant

    @property
    def name(self) -> str:
        """For a reader."""
        return f"{self.model.name} on {self.board.title}"

    @property
    def build(self) -> tuple[str, str]:
        """What nights with the same may share: the model in a weight type, and the chip."""
        return self.model.name, course.chip(self.board, self.model)


@dataclass(frozen=True)
class Matrix:
    """`cells` are board by board in the order of the file; `excluded` has the reason by board and model."""

    file: Path
    boards: tuple[Board, ...]
    models: tuple[Variant, ...]
    cells: tuple[Cell, ...]
    excluded: Mapping[tuple[str, str], str]
    targets: tuple[Target, ...]


def read(file: Path) -> Matrix:
    """The matrix of a file. Raises BadInput with the line of what is wrong."""
    text, content = toml_lines.read(file)
    return _Reader(file, text, content).matrix()


def plans(matrix: Matrix, folder: Path) -> dict[Cell, Plan]:
    """What each night is judged by. Raises BadInput that names every night that cannot be held, and why."""
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
        count = f"{len(refused)} of {len(matrix.cells)} nights of {matrix.file} cannot be held:"
        raise BadInput(refused[0] if len(matrix.cells) == 1 else "\n".join([count, *refused]))
    return found


class _Reader:
    def __init__(self, file: Path, text: str, content: Mapping[str, Any]) -> None:
        self.file, self.text, self.content = file, text, content
        self.given: dict[str, str] = {}  # the name in the file, by the board's own

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
            raise self.wrong(line(self.text, table="exclude"), "every night is excluded: nothing is left to hold")
        return Matrix(self.file, tuple(boards), tuple(models), tuple(cells), excluded, self.targets())

    def each(self, key: str, find: Callable[[str], Found]) -> list[Found]:
        """The entries of a list, each found by its name."""
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
                raise self.wrong(line(self.text, key, name, nth=1), f"{name!a:.60} stands twice in {key}")
            try:
                found.append(find(name))
            except BadInput as error:
                raise self.wrong(line(self.text, key, name), str(error)) from None
        return found

    def board(self, name: str) -> Board:
        return place.find(str(self.file.parent / name) if name.endswith(".yaml") else name)

    def model(self, name: str) -> Any:
        if "@" in name:
            raise BadInput(f"{name!a:.60} names a weight type: put it into weight_type, and exclude what is not meant")
        return load_model(name)

    def one_name(self, boards: Sequence[Board]) -> None:
        """Two YAMLs of one name would be one board to gates and history, and share a lock."""
        for name, board in zip(self.content["boards"], boards, strict=True):
            if board.name in self.given:
                raise self.wrong(
                    line(self.text, "boards", name),
                    f"{name!a:.60} is {board.name} to gates and history, as another of these boards is\n"
                    "Give it an options.board of its own, or hold it in a matrix of its own.",
                )
            self.given[board.name] = name
        if len(boards) > 1 and (said := [name for name in OF_ONE if os.environ.get(name)]):
            raise self.wrong(
                line(self.text, "boards"),
                f"{' and '.join(said)} would be the same for all {len(boards)} boards\nUnset it: each has its own.",
            )

    def excluded(self, every: Sequence[Cell]) -> dict[tuple[str, str], str]:
        tables = self.content.get("exclude", [])
        if not isinstance(tables, list) or not all(isinstance(entry, dict) for entry in tables):
            where = max(line(self.text, "exclude"), line(self.text, table="exclude"))
            raise self.wrong(where, "exclude is no table: expected [[exclude]] for each")
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
                raise self.wrong(at(), "this exclusion has no reason: say why, for the page")
            named = {key: value for key, value in entry.items() if key != "reason"}
            if not named:
                raise self.wrong(at(), "this exclusion names no board, model or weight_type")
            matched = [cell for cell in every if self.names(cell, named)]
            if not matched:
                said = ", ".join(f"{key} {value}" for key, value in named.items())
                raise self.wrong(at(), f"this exclusion fits no night of the matrix: {said}")
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
            raise self.wrong(line(self.text, "targets"), f"targets is {name!a:.80}, expected a file of targets")
        return targets.read(self.file.parent / name)

    def wrong(self, where: int, why: str) -> BadInput:
        return BadInput(f"{self.file} line {where}: {why}")
