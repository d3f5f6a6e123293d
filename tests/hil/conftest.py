"""Tests on a board, virtual or real: pytest tests/hil --lg-env ci/boards/virtual.yaml --hil-model tiny-qwen2

The board must be on and have a release (`invoke deploy`). labgrid's plugin connects to it. Without an environment the
plugin would skip every test; a run in which no test reached a board fails here instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from labgrid.pytestplugin.hooks import LABGRID_ENV_KEY

from axrun.errors import BadInput
from ci.device import evidence, place, sensors, ssh, strict_json
from ci.device.connection import Connection
from ci.device.evidence import Record
from ci.device.place import Address, Board
from ci.device.ssh import Lost
from ci.nightly import gate
from tests.hil.on_board import Hanging, OnBoard, Otherwise

COMPILED_SECONDS = 600  # for checking the bytecode


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hil", "tests on a board")
    group.addoption("--hil-model", default="tiny-qwen2", help="the model that was deployed (default tiny-qwen2)")
    group.addoption("--hil-figures", type=Path, help="write the measured figures to this JSON file")
    group.addoption("--hil-deployed", type=Path, help="the record of the deploy (default out/deployed/BOARD.json)")
    group.addoption("--hil-bundle", type=Path, help="this machine's copy of the bundle: logits are compared with it")
    group.addoption("--hil-probe", type=Path, help="output of python -m ci.nightly.probe: texts and their token ids")
    group.addoption(
        "--hil-unjudged", action="store_true", help="record figures without judging them if there are no gates"
    )
    group.addoption(
        "--hil-limit", type=float, default=900.0, help="time limit of a command on the board in seconds (default 900)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Sets the variables that the board's YAML refers to, before labgrid reads it."""
    yaml = config.getoption("lg_env")
    if not yaml:
        raise pytest.UsageError("no board was named: --lg-env ci/boards/virtual.yaml")
    try:
        os.environ.update(place.find(str(yaml)).variables())
    except BadInput as error:
        raise pytest.UsageError(str(error)) from None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Applies settings and host key checks to labgrid's configuration, before it creates a target."""
    try:
        place.settle(place.find(str(session.config.option.lg_env)), session.config.stash[LABGRID_ENV_KEY].config)
    except BadInput as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fails a run in which no test ran on a board."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    reports = [report for outcome in ("passed", "failed") for report in reporter.stats.get(outcome, [])]
    if not any(report.when == "call" for report in reports) and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        reporter.write_line("error: no test ran on a board", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, (Hanging, Otherwise)):
        item.session.shouldstop = str(call.excinfo.value)
    return report


@pytest.fixture(scope="session")
def on_board(request: pytest.FixtureRequest, target: Any) -> Iterator[OnBoard]:
    """The connected board of --lg-env. Every file is compared with the deploy record, before and after the tests.

    At the end of the session the figures are written, with the release they belong to.
    """
    options = request.config.option
    found = place.find(str(options.lg_env))
    try:
        target.get_driver("CommandProtocol")
    except Exception as error:  # labgrid raises a bare Exception for a board that does not answer
        pytest.fail(f"{found.name} does not answer over SSH: {error}", pytrace=False)
    record = evidence.read(options.hil_deployed or evidence.place(Path("out"), found.name))
    if record.board != found.name:
        raise BadInput(f"the record is of a deploy to {record.board}, but this board is {found.name}")
    at = place.address_of(target)
    seen = inventory(found, at, record, options.hil_limit)
    shell = [*ssh.command(at), at.host]
    measured = OnBoard(found, shell, options.hil_limit, record, str(seen["root"]))
    measured.seen["evidence"] = {**record.named(), "python": seen["python"], "faults": []}
    try:
        measured.require("the release", evidence.compare(record, seen))
        with sensors.reading(found, at) as readings:
            yield measured
        measured.seen["sensors"] = {"summary": readings.summary(), "notes": list(readings.notes())}
        if not request.session.shouldstop:
            booted, seen = seen["boot"], inventory(found, at, record, options.hil_limit)
            if seen["boot"] != booted:
                raise Hanging(f"{found.name} was started anew during the tests: {booted}, then {seen['boot']}")
            measured.require("after the measurement, the release", evidence.compare(record, seen))
            measured.require("after the measurement, the bytecode", compiled(found, at, record))
    finally:
        keep(measured, options.hil_figures)


def inventory(board: Board, at: Address, record: Record, seconds: float) -> dict[str, Any]:
    """Removes the bytecode, so that none of it is stale, and returns the board's inventory. Raises Hanging."""
    names = {"package": record.package, "model": record.model}
    try:
        with Connection(board, at) as link:
            link.call("forget_compiled", package=record.package)
            return dict(link.call("inventory", seconds, release=record.release, **names))
    except Lost as error:
        raise Hanging(str(error)) from None


def compiled(board: Board, at: Address, record: Record) -> list[str]:
    """Faults of the bytecode: files that do not match the deployed sources."""
    with Connection(board, at) as link:
        faults = link.call("compiled", COMPILED_SECONDS + 60, package=record.package, limit=COMPILED_SECONDS)
    return [f"packages/{record.package}.compiled/{fault}" for fault in faults]


def keep(on_board: OnBoard, file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(strict_json.plain(on_board.seen), indent=2) + "\n", "utf-8")


@pytest.fixture
def expect(on_board: OnBoard, request: pytest.FixtureRequest) -> Any:
    """Records figures and compares them with the gates of the board and the model."""

    def hold(figures: dict[str, float], maker: str) -> None:
        on_board.seen["figures"] |= figures
        keep(on_board, request.config.option.hil_figures)  # even if the test fails
        found, model = on_board.board, request.config.option.hil_model
        gates = gate.load(found.name, model, maker)
        if not gates and request.config.option.hil_unjudged:
            return
        if not gates:
            pytest.fail(f"no gates for {maker} bundles here: {model} on {found.name}", pytrace=False)
        red = [entry for entry in gate.judge(figures, gates) if entry.red and entry.value is not None]
        if red:
            more = f" (and {len(red) - 1} more)" if len(red) > 1 else ""
            pytest.fail(red[0].reason() + more, pytrace=False)

    return hold
