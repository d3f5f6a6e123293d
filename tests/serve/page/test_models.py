"""The choice of a model, on a server with several bundles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve import saying
from tests.serve.page.browser import visit
from tests.serve.server import Server

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def server(bundle_thinking: Path, bundle_s8: Path, embedding_bundle: Path) -> Iterator[Server]:
    names = (f"sayer={bundle_thinking}", f"tiny={bundle_s8}", f"embed={embedding_bundle}")
    flags = [word for name in names for word in ("--alias", name)]
    server = Server([bundle_thinking, bundle_s8, embedding_bundle], *flags, AXRUN_API_KEY="key").ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


def test_the_chosen_model_answers(driver: Any, server: Server) -> None:
    page = visit(driver, server.url, "sayer")
    assert page.find("#model-choice").get_property("hidden")  # not listed without the key
    page.set("key", "key")
    page.until(lambda: page.texts("#model option") == ["sayer", "tiny"])  # not the one for embeddings
    page.set("temperature", "0")
    page.ask("1+1= s")
    assert page.answered() == saying.TEXTS["s"]
    assert page.find("#gauge-text").text.endswith(" of 1,023 tokens")
    page.set("model", "tiny")
    page.until(lambda: page.find("#name").text == "tiny")
    page.find("#new").click()
    page.ask("1+1=")
    assert page.answered() == "2"
    assert page.find("#gauge-text").text.endswith(" of 255 tokens")
    assert page.texts(".figures")[-1].startswith("tiny · first token ")
    page.reload()
    page.until(lambda: page.find("#name").text == "tiny")
