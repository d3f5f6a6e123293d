"""Settings: sampling fields, models, theme."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from axrun.serve.order import SAMPLING
from tests.serve import saying
from tests.serve.page.browser import Page
from tests.serve.server import Server

pytestmark = pytest.mark.system
SERVE = Path(__file__).parents[3] / "docs" / "serve.md"
LIGHT, DARK = "rgba(251, 250, 248, 1)", "rgba(25, 26, 27, 1)"


def test_every_numeric_sampling_field_is_offered_with_its_limits(sayer: Page, server_saying: Server) -> None:
    """The limits and descriptions are those of the published document."""
    document = server_saying.client.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = body.get("properties") or document["components"]["schemas"][body["$ref"].split("/")[-1]]["properties"]
    script = (
        "return [...document.querySelectorAll('#settings input[type=number]')].map(({id, min, max}) => [id, min, max])"
    )
    sayer.until(lambda: ["temperature", "0", "2"] in sayer.driver.execute_script(script))
    shown = {name: (low, high) for name, low, high in sayer.driver.execute_script(script)}
    others = {"max_completion_tokens", "seed", "repeat_last_n", "dry_penalty_last_n", "thinking_budget"}
    assert set(shown) == {*SAMPLING, *others}
    for name in SAMPLING:
        assert shown[name] == (str(fields[name]["minimum"]), str(fields[name]["maximum"]))
        described = "return document.getElementById(arguments[0]).nextElementSibling.textContent"
        assert sayer.driver.execute_script(described, name).startswith(fields[name]["description"])
        assert f"`{name}`" in SERVE.read_text()


def test_settings_are_kept_and_reset(sayer: Page) -> None:
    sayer.set("top_k", "1")
    sayer.set("temperature", "1")
    sayer.set("further", '{"stop": "s"}')
    sayer.reload()
    assert sayer.find("#top_k").get_property("value") == "1"
    sayer.ask("one s")
    assert sayer.answered() == "A"
    sayer.set("system", "kept")
    sayer.press("Reset sampling, thinking and tools")
    assert [sayer.find(f"#{name}").get_property("value") for name in ("top_k", "further", "system")] == ["", "", "kept"]
    sayer.press("Try again")
    assert sayer.answered() == saying.TEXTS["s"]


def test_a_field_out_of_range_is_refused_by_the_server(sayer: Page) -> None:
    sayer.set("dry_allowed_length", "99")
    sayer.ask("one s")
    sayer.answered()
    assert sayer.texts(".error") == ["dry_allowed_length is 99; expected at most 64."]


def test_the_theme_follows_the_system_or_the_choice(sayer: Page) -> None:
    def ground() -> str:
        return str(sayer.find("body").value_of_css_property("background-color"))

    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        sayer.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    try:
        prefer("dark")
        assert ground() == DARK
        sayer.set("theme", "light")
        assert ground() == LIGHT
        sayer.reload()
        assert ground() == LIGHT
        prefer("light")
        sayer.set("theme", "dark")
        assert ground() == DARK
        sayer.set("theme", "system")
        assert ground() == LIGHT
    finally:
        prefer("")


def test_a_model_is_chosen_if_there_are_several(sayer: Page) -> None:
    assert not sayer.find("#model-choice").is_displayed()
    script = "it.offer(['one', 'other']); return [it.model(), document.getElementById('model-choice').hidden]"
    assert sayer.module("settings.js", script) == ["one", False]
    sayer.set("model", "other")
    assert json.loads(sayer.driver.execute_script("return localStorage.getItem('axrun.settings')"))["model"] == "other"
    script = "it.offer(['one', 'more', 'other']); return it.model()"
    assert sayer.module("settings.js", script) == "other"
