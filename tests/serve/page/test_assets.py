"""The files of the page, and a server without its libraries."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from axrun.serve.app import ASSETS
from requirements.page import LIB, MODULES, locked
from requirements.page import LOCK as PAGE_LOCK
from tests.serve import saying
from tests.serve.page.browser import visit
from tests.serve.server import ROOT, Server

pytestmark = pytest.mark.system


def test_the_page_loads_nothing_from_other_hosts(server_long: Server) -> None:
    page = server_long.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "/chat.js" in ASSETS
    for name in (name for name in ASSETS if not name.startswith("/lib/")):
        response = server_long.client.get(name)
        assert response.status_code == 200
        assert response.headers["content-security-policy"] == policy
        addresses = [line for line in response.text.splitlines() if "://" in line]
        assert all(line.startswith(("//", "/**")) for line in addresses)
    size = 0
    for _, name in MODULES.values():
        response = server_long.client.get(f"/lib/{name}")
        assert response.headers["content-type"] == "text/javascript; charset=utf-8"
        size += len(response.content)
    assert size < 300_000


def test_the_libraries_come_with_their_licences() -> None:
    licences = sorted(path.name for path in (LIB / "licences").iterdir())
    for package in locked(PAGE_LOCK):
        assert [name for name in licences if name.startswith(f"{package.name}-LICENSE")], package.name


def test_a_server_without_the_libraries_says_so(
    driver: Any, bundle_saying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "board", tmp_path / "board", ignore=shutil.ignore_patterns("build", "__pycache__"))
    shutil.rmtree(tmp_path / "board" / "axrun" / "serve" / "page" / "lib")
    monkeypatch.setattr("tests.serve.server.ROOT", tmp_path)
    server = Server(bundle_saying).ready()
    try:
        server.wait_for(r"the page shows answers as plain text; run `make page`")
        assert server.client.get("/lib/purify.js").status_code == 404
        page = visit(driver, server.url, "llama")
        page.until(lambda: page.find("#as-text").is_displayed())
        page.ask("some m")
        page.answered()
        assert page.texts(".assistant .text") == [saying.MARKDOWN]
    finally:
        server.stop(signal.SIGKILL)
