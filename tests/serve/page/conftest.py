"""The browser, and pages of servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.page import browser
from tests.serve.page.browser import Page, visit
from tests.serve.server import Server


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = browser.start(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def server_saying(bundle_thinking: Path) -> Iterator[Server]:
    """Answers with saying.TEXTS; the template has thoughts.

    It is reachable by a non-local address, which browsers do not treat as secure.
    """
    # Without guesses, or an answer would be finished before a test presses Stop.
    server = Server(bundle_thinking, "--host", "0.0.0.0", "--no-speculation").ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture
def page(driver: Any, server_long: Server) -> Page:
    """The page of a server with tiny-qwen2."""
    return visit(driver, server_long.url, "qwen2")


@pytest.fixture
def sayer(driver: Any, server_saying: Server) -> Iterator[Page]:
    """The page of a server with fixed answers; closes further tabs that a test opens."""
    first = driver.current_window_handle
    yield visit(driver, server_saying.url, "llama")
    for tab in set(driver.window_handles) - {first}:
        driver.switch_to.window(tab)
        driver.close()
    driver.switch_to.window(first)
