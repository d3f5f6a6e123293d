"""The chat page in a real browser: Debian's Chromium, headless, with a real server."""

from __future__ import annotations

import functools
import itertools
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from requirements.page import LIB, MODULES, locked
from requirements.page import LOCK as PAGE_LOCK
from tests.serve import saying
from tests.serve.server import ROOT, Server, Start

pytestmark = pytest.mark.system

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=900,760"
)
# An RFC 5737 address mapped to this machine: browsers treat plain http as secure on local addresses only.
ELSEWHERE = "192.0.2.1"


class Page:
    """User actions on the page, and the visible text."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)"
        return list(self.driver.execute_script(script, selector))

    def shows(self, selector: str, *texts: str) -> None:
        self.until(lambda: self.texts(selector) == [*texts])

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: condition())

    def type(self, *keys: str) -> None:
        self.find("#prompt").send_keys(*keys)

    def ask(self, text: str) -> None:
        before = len(self.texts(".assistant"))
        self.driver.execute_script("document.getElementById('prompt').value = arguments[0]", text[:-1])
        self.type(text[-1], Keys.ENTER)
        self.until(lambda: len(self.texts(".assistant")) > before)

    def answered(self) -> str:
        """The last answer, after it is complete."""
        self.until(lambda: self.find("#send").is_displayed() and self.texts(".below"))
        return self.texts(".assistant .text")[-1]

    def press(self, text: str) -> None:
        """Presses the last button with this label."""
        self.driver.find_elements(By.XPATH, f"//button[text()='{text}']")[-1].click()

    def call(self, script: str, *given: Any) -> Any:
        """Runs an async function body in the page; `Writing` and `clean` are those of markdown.js."""
        whole = (
            "const [done, ...given] = [arguments[arguments.length - 1], ...arguments];"
            "import('/markdown.js').then(async ({load, Writing, clean}) => { await load();"
            f"const call = async () => {{ {script} }}; return call() }}).then(done, (error) => done(String(error)))"
        )
        return self.driver.execute_async_script(whole, *given)

    def set(self, name: str, value: str) -> None:
        if not self.find("#settings").is_displayed():
            self.find("#settings-button").click()
        field = self.find(f"#{name}")
        field.clear()
        field.send_keys(value)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium, "the page is tested in Chromium: apt-get install chromium chromium-driver"
    assert chromedriver, "the page is tested in Chromium: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.add_argument(f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def server_saying(bundle_saying: Path) -> Iterator[Server]:
    """Answers with saying.TEXTS; reachable by a non-local address, which browsers do not treat as secure."""
    server = Server(bundle_saying, "--host", "0.0.0.0").ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


def visit(driver: Any, url: str, name: str) -> Page:
    """Opens the page with empty storage."""
    driver.get(url)
    driver.execute_script("localStorage.clear(); sessionStorage.clear()")
    driver.get(url)
    page = Page(driver)
    page.until(lambda: page.find("#model").text == name)
    driver.get_log("browser")
    return page


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


def test_a_question_is_answered(page: Page, server_long: Server) -> None:
    assert page.find("#empty").is_displayed()
    assert not page.find("#as-text").is_displayed()
    assert not page.find("#send").is_enabled()
    page.ask("who are you?")
    answer = page.answered()
    assert answer == server_long.chat("who are you?")["choices"][0]["message"]["content"]
    assert page.texts(".user .text") == ["who are you?"]
    assert " tok/s" in page.texts(".figures")[0]
    assert not page.find("#empty").is_displayed()
    assert page.driver.switch_to.active_element == page.find("#prompt")
    assert page.driver.get_log("browser") == []


def test_a_second_question_follows_the_first(page: Page) -> None:
    page.ask("1+1=")
    assert page.answered() == "2"
    page.ask("2+2=")
    page.answered()
    first, second = map(tokens_read, page.texts(".figures"))
    assert second > first
    assert len(page.texts(".turn")) == 4


def tokens_read(figures: str) -> int:
    return int(figures.split(" tokens read")[0].split()[-1])


def test_a_streaming_answer_is_shown_and_stop_keeps_the_text(sayer: Page, server_saying: Server) -> None:
    cancelled = server_saying.metrics()["axrun_cancelled_total"]
    for stop in (lambda: sayer.type(Keys.ESCAPE), lambda: sayer.find("#stop").click()):
        sayer.ask("tell me a long tale")
        seen: set[str] = set()
        while len(seen) < 4:
            seen.add(sayer.until(lambda: sayer.texts(".writing .text")[-1]))
        sayer.until(lambda: len(sayer.texts(".writing .text")[-1]) > 1000)
        assert sayer.driver.execute_script("return log.scrollHeight - log.scrollTop - log.clientHeight") < 60
        stop()
        answer = sayer.answered()
        assert all(answer.startswith(part.rstrip()) for part in seen)
        assert "stopped" in sayer.texts(".figures")[-1]
    assert server_saying.idle()["axrun_cancelled_total"] == cancelled + 2


def test_reload_keeps_the_conversation_and_new_chat_deletes_it(page: Page) -> None:
    page.ask("12+30=")
    answer = page.answered()
    plain = tokens_read(page.texts(".figures")[0])
    page.set("system", "Be brief, and say nothing else.")
    page.driver.refresh()
    page.until(lambda: page.texts(".turn .text") == ["12+30=", answer])
    assert page.find("#system").get_attribute("value") == "Be brief, and say nothing else."
    page.press("Try again")
    assert page.answered() == answer
    assert tokens_read(page.texts(".figures")[0]) != plain
    page.find("#new").click()
    assert page.texts(".turn") == []
    page.driver.refresh()
    page.until(lambda: page.find("#empty").is_displayed())
    assert page.texts(".turn") == []


def test_an_error_is_shown_and_can_be_tried_again(page: Page) -> None:
    page.ask("1+" * 4200)
    page.answered()
    assert "this model's context is 8191" in page.texts(".error")[0]
    page.press("Edit question")
    assert page.find("#prompt").get_property("value") == "1+" * 4200
    assert page.texts(".turn") == []
    page.find("#prompt").clear()
    page.set("temperature", "9")
    page.ask("1+1=")
    page.answered()
    assert page.texts(".error") == ["temperature is 9; expected at most 2."]
    page.set("temperature", "0")
    page.press("Try again")
    page.until(lambda: page.texts(".assistant .text") == ["2"])
    assert page.texts(".error") == []


def test_a_missing_key_and_an_unreachable_server_are_reported(driver: Any, bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, AXRUN_API_KEY="open-sesame").ready()
    driver.get(server.url)
    page = Page(driver)
    page.until(lambda: page.find("#model").text == "qwen2")
    page.ask("1+1=")
    page.answered()
    assert "API key" in page.texts(".error")[0]
    assert page.find("#settings").is_displayed()
    page.set("key", "open-sesame")
    page.press("Try again")
    page.until(lambda: page.texts(".assistant .text") == ["2"])
    server.stop()
    page.ask("1+2=")
    page.answered()
    assert page.texts(".error") == ["The server cannot be reached."]


# ---- a conversation that outgrows the context


def test_a_failed_turn_is_not_sent_again(sayer: Page) -> None:
    sayer.ask("one s")
    sayer.answered()
    sayer.ask("a" * 2000)
    sayer.answered()
    assert "this model's context is 1023" in sayer.texts(".error")[0]
    sayer.ask("two s")
    assert sayer.answered() == saying.TEXTS["s"]
    read = tokens_read(sayer.texts(".figures")[-1])
    assert read == len("one s") + len(saying.TEXTS["s"]) + len("two s")


def test_a_conversation_goes_on_past_the_context(page: Page, server_long: Server) -> None:
    """Turns are left out before the context is full, many at a time, so that most prompts find a cached prefix."""
    refused = 'axrun_requests_total{path="/v1/chat/completions",status="400"}'
    before = server_long.metrics().get(refused)
    page.set("max_tokens", "8")
    page.find("#settings-button").click()
    read = []
    for _ in range(7):
        page.ask("1+" * 700 + "1=")
        page.answered()
        read.append(tokens_read(page.texts(".figures")[-1]))
    assert page.texts(".error") == []
    assert server_long.metrics().get(refused) == before
    assert max(read) < 0.75 * 8191
    shorter = [number for number, (one, after) in enumerate(itertools.pairwise(read), 2) if after < one]
    assert shorter == [5]
    assert page.texts(".note") == ["The 3 turns above are left out: the model's context of 8,191 tokens is full."]


def test_left_out_turns_are_marked_and_stay_marked(sayer: Page) -> None:
    for _ in range(6):
        sayer.ask("and then? l")
        assert sayer.answered() == saying.LONG
    assert sayer.texts(".error") == []
    notes = sayer.texts(".note")
    assert len(notes) == 1
    assert "turns above are left out: the model's context of 1,023 tokens is full" in notes[0]
    left_out = len(sayer.texts(".turn.left-out"))
    assert 2 <= left_out < len(sayer.texts(".turn")) == 12
    sayer.driver.refresh()
    sayer.until(lambda: len(sayer.texts(".turn")) == 12)
    assert len(sayer.texts(".turn.left-out")) == left_out


def test_oldest_turns_go_when_the_server_finds_the_question_too_long(sayer: Page) -> None:
    """The estimate comes from answers with three or more characters per token; here a character is a token."""
    for _ in range(2):
        sayer.ask("and then? l")
        sayer.answered()
    sayer.ask("b" * 900 + " s")
    assert sayer.answered() == saying.TEXTS["s"]
    assert sayer.texts(".error") == []
    assert sayer.texts(".note") == ["The 2 turns above are left out: the model's context of 1,023 tokens is full."]


def test_the_gauge_shows_how_full_the_context_is(sayer: Page, server_saying: Server) -> None:
    health, listing = server_saying.client.get("/health").json(), server_saying.client.get("/v1/models").json()
    assert health["context_length"] == listing["data"][0]["context_length"] == 1023
    assert not sayer.find("#gauge").is_displayed()
    sayer.ask("one s")
    sayer.answered()
    assert sayer.find("#gauge-text").text == "10 of 1,023 tokens"
    assert float(sayer.find("#gauge-bar").get_property("value")) == 10
    assert float(sayer.find("#gauge-bar").get_property("max")) == 1023
    sayer.ask("for ever: e")
    sayer.answered()
    assert sayer.texts(".figures")[-1].endswith("cut: the context is full")
    assert sayer.find("#gauge-text").text == "1,023 of 1,023 tokens"


# ---- retries, tabs, reloads


def test_try_again_uses_another_seed(sayer: Page) -> None:
    sayer.set("temperature", "1")
    sayer.ask("draw?")
    sayer.answered()
    for seed in ("", "7"):
        if seed:
            sayer.set("seed", seed)
        seen = set()
        for _ in range(6):
            sayer.press("Try again")
            seen.add(sayer.answered())
        assert len(seen) > 1  # six equal answers out of 260 are practically impossible
    sayer.set("temperature", "0")
    for _ in range(2):
        sayer.press("Try again")
        sayer.answered()
    assert sayer.texts(".figures")[0].endswith("same answer as before: set a temperature above 0 for other answers")


def test_a_reload_during_an_answer_keeps_the_text(sayer: Page) -> None:
    sayer.ask("one s")
    sayer.answered()
    sayer.ask("for ever: e")
    written = sayer.until(lambda: sayer.texts(".writing .text")[-1])
    sayer.driver.refresh()
    sayer.until(lambda: len(sayer.texts(".turn")) == 4)
    assert sayer.texts(".turn .text")[3].startswith(written.rstrip())
    assert sayer.texts(".figures")[-1] == "interrupted"
    sayer.press("Edit question")
    sayer.find("#prompt").clear()
    sayer.ask("two s")
    assert sayer.answered() == saying.TEXTS["s"]


@pytest.mark.parametrize(
    "kept",
    [
        "not JSON",
        "null",
        '{"messages": 7, "start": 0}',
        '{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}], "start": 0}',
        '{"messages": [{"role": "user", "content": {}}, {"role": "assistant", "content": ""}], "start": 0}',
        '{"messages": [], "start": 4}',
    ],
)
def test_the_page_works_with_invalid_data_in_the_storage(kept: str, sayer: Page) -> None:
    sayer.driver.execute_script(
        "localStorage.setItem('axrun.chat.x', arguments[0]); sessionStorage.setItem('axrun.chat', '\"x\"')", kept
    )
    sayer.driver.refresh()
    sayer.ask("one s")
    assert sayer.answered() == saying.TEXTS["s"]


def test_two_tabs_show_one_conversation_and_do_not_overwrite_each_other(sayer: Page, server_saying: Server) -> None:
    driver = sayer.driver
    first = driver.current_window_handle
    sayer.ask("one s")
    sayer.answered()
    driver.switch_to.new_window("tab")
    second = driver.current_window_handle
    driver.get(server_saying.url)
    sayer.until(lambda: len(sayer.texts(".turn")) == 2)
    sayer.ask("two s")
    sayer.answered()
    driver.switch_to.window(first)  # an idle tab follows
    sayer.until(lambda: sayer.texts(".user .text") == ["one s", "two s"])
    sayer.ask("for ever: e")
    sayer.until(lambda: sayer.texts(".writing .text")[-1])
    driver.switch_to.window(second)  # ask here too while the other answer is in progress
    sayer.until(lambda: len(sayer.texts(".turn")) == 6)
    sayer.ask("three s")
    sayer.answered()
    here = sayer.texts(".user .text")
    assert here == ["one s", "two s", "for ever: e", "three s"]
    driver.switch_to.window(first)
    sayer.answered()
    there = sayer.texts(".user .text")
    assert there == ["one s", "two s", "for ever: e"]
    whole = sayer.texts(".assistant .text")[-1]
    for tab, questions in ((first, there), (second, here)):  # both are kept
        driver.switch_to.window(tab)
        driver.refresh()
        sayer.shows(".user .text", *questions)
    driver.switch_to.window(first)
    sayer.until(lambda: sayer.texts(".assistant .text")[-1] == whole)
    assert "interrupted" not in sayer.texts(".figures")


def test_a_full_storage_is_reported_and_old_conversations_are_removed(sayer: Page) -> None:
    fill = "{messages: [], start: 0, saved: 1, more: 'x'.repeat(2500000)}"
    for name in ("axrun.chat.old", "axrun.chat.older"):
        sayer.driver.execute_script(f"localStorage.setItem(arguments[0], JSON.stringify({fill}))", name)
    sayer.ask("one s")
    sayer.answered()
    assert not sayer.find("#unkept").is_displayed()
    sayer.driver.execute_script(
        "for (const key of Object.keys(localStorage)) if (key.includes('old')) localStorage.removeItem(key);"
        "let size = 1 << 22; while (size) try { localStorage.setItem('x' + size + Math.random(), 'x'.repeat(size)) }"
        "catch { size >>= 1 }"
    )
    sayer.ask("two s")
    sayer.answered()
    assert sayer.find("#unkept").is_displayed()


def test_the_page_works_without_storage(sayer: Page) -> None:
    forbid = "for (const name of ['localStorage', 'sessionStorage'])"
    forbid += " Object.defineProperty(window, name, {get() { throw new DOMException('', 'SecurityError') }})"
    command = ("Page.addScriptToEvaluateOnNewDocument", {"source": forbid})
    script = sayer.driver.execute_cdp_cmd(*command)["identifier"]
    try:
        sayer.driver.refresh()
        sayer.ask("one s")
        assert sayer.answered() == saying.TEXTS["s"]
        assert sayer.find("#unkept").is_displayed()
        sayer.find("#new").click()
        sayer.ask("two s")
        assert sayer.answered() == saying.TEXTS["s"]
        assert sayer.driver.get_log("browser") == []
    finally:
        sayer.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": script})


# ---- Markdown


def test_markdown_is_rendered(sayer: Page) -> None:
    sayer.ask("some m")
    sayer.answered()
    text = sayer.find(".assistant .text")
    assert sayer.texts(".assistant h1") == ["Title"]
    for kind, words in (("strong", "bold"), ("em", "italic"), ("s", "struck"), ("p code", "code")):
        assert sayer.texts(f".assistant {kind}") == [words]
    assert "One line,\nanother." in text.text
    assert sayer.texts(".assistant ol > li > ul > li") == ["nested"]
    assert sayer.texts(".assistant th") == ["left", "right\nbelow"]
    cells = sayer.driver.find_elements(By.CSS_SELECTOR, ".assistant td")
    assert [cell.value_of_css_property("text-align") for cell in cells] == ["-webkit-left", "-webkit-right"]
    assert sayer.texts(".assistant blockquote") == ["quoted"]
    links = sayer.driver.find_elements(By.CSS_SELECTOR, ".assistant a")
    assert [(link.text, link.get_attribute("href")) for link in links] == [
        ("a link", "https://example.org/a?b=1"),
        ("https://example.org/bare", "https://example.org/bare"),
        ("picture", "https://example.org/picture.png"),
        ("later", "https://example.org/later"),
    ]
    for link in links:
        assert (link.get_attribute("rel"), link.get_attribute("target")) == ("noopener noreferrer", "_blank")
    assert sayer.driver.get_log("browser") == []


def test_fences_of_all_kinds_are_code(sayer: Page) -> None:
    sayer.ask("code, f")
    sayer.answered()
    assert list(zip(sayer.texts(".code .language"), sayer.texts(".code pre"), strict=True)) == saying.FENCED


def test_without_the_libraries_fences_are_code_and_the_rest_is_text(sayer: Page) -> None:
    sayer.driver.execute_cdp_cmd("Network.enable", {})
    sayer.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/lib/*"]})
    try:
        sayer.driver.refresh()
        sayer.until(lambda: sayer.find("#as-text").is_displayed())
        assert sayer.find("#as-text").text.startswith("Answers are shown as plain text")
        for question in ("code, f", "some m", "nasty x"):
            sayer.ask(question)
            sayer.answered()
        blocks = list(zip(sayer.texts(".code .language"), sayer.texts(".code pre"), strict=True))
        assert blocks[:5] == [fenced for fenced in saying.FENCED if fenced[1] != "indented"]
        assert "Some **bold**" in sayer.texts(".assistant .text")[1]
        harmless(sayer)
    finally:
        sayer.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        sayer.driver.get_log("browser")


def harmless(page: Page) -> None:
    """Nothing of the answer ran or was fetched, and it contains only text, code and external links."""
    assert page.driver.execute_script("return window.pwned") is None
    allowed = "div,span,button,p,br,hr,h1,h2,h3,h4,h5,h6,strong,em,s,code,pre,blockquote,ul,ol,li,a"
    allowed += ",table,thead,tbody,tr,th,td"
    others = f".assistant .text :not({allowed})"
    assert page.driver.execute_script("return document.querySelector(arguments[0])?.outerHTML", others) is None
    attributes = page.driver.execute_script(
        "return [...document.querySelectorAll('.assistant .text *')].flatMap((found) => found.getAttributeNames())"
    )
    known = {"class", "href", "rel", "target", "title", "start", "align", "type", "tabindex", "aria-label"}
    assert set(attributes) <= known
    addresses = page.driver.execute_script(
        "return [...document.querySelectorAll('.assistant a[href]')].map((a) => a.href)"
    )
    assert all(address.startswith(("https://", "http://", "mailto:")) for address in addresses)
    script = (
        "return performance.getEntriesByType('resource').filter(({name}) => new URL(name).origin !== origin).length"
    )
    assert page.driver.execute_script(script) == 0
    assert page.find("#log").is_displayed()


def test_nothing_of_a_malicious_answer_runs_or_is_fetched(sayer: Page) -> None:
    sayer.ask("nasty x")
    sayer.answered()
    harmless(sayer)
    shown = sayer.texts(".assistant .text")[0]
    assert shown.startswith("<script>window.pwned = 1</script>")  # shown as text
    assert "[e](/metrics)" in shown
    assert sayer.driver.get_log("browser") == []  # no violation of the content security policy
    sayer.driver.refresh()
    sayer.until(lambda: sayer.texts(".assistant .text") == [shown])
    harmless(sayer)


def test_the_sanitiser_works_without_the_parser(sayer: Page) -> None:
    payloads = [
        "<img src=x onerror=window.pwned=1>",
        "<svg><style><img src=x onerror=window.pwned=1></style></svg>",
        "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=x onerror=window.pwned=1&gt;'>",
        "<noscript><p title='</noscript><img src=x onerror=window.pwned=1>'>",
        "<a href='javascript:window.pwned=1'>a</a><a href=' jav&#9;ascript:window.pwned=1'>b</a><a href='/x'>c</a>",
        "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe><object data=x></object><embed src=x>",
        "<form><input name=attributes><button formaction='javascript:window.pwned=1'>go</button></form>",
        "<p style='position:fixed' id=log name=model onclick=window.pwned=1 data-x=1>text</p>",
        "<base href='https://example.org/'><meta http-equiv=refresh content='0;url=https://example.org/'>",
        "<template><script>window.pwned=1</script></template><xmp><p title='</xmp><img src=x onerror=window.pwned=1>'>",
    ]
    script = (
        "const turn = document.createElement('div'); turn.className = 'assistant';"
        "const text = document.createElement('div'); text.className = 'text'; turn.append(text);"
        "document.getElementById('log').append(turn); text.append(clean(given[0]));"
        "await new Promise((done) => setTimeout(done, 50)); return null"
    )
    for payload in payloads:
        assert sayer.call(script, payload) is None
    harmless(sayer)
    links = "return [...document.querySelectorAll('.assistant a')].map((a) => [a.innerText, a.getAttribute('href')])"
    assert sayer.driver.execute_script(links) == [["a", None], ["b", None], ["c", None]]
    written = (
        "try { document.createElement('div').innerHTML = '<b>'; return 'taken' } catch (error) { return error.name }"
    )
    assert sayer.driver.execute_script(written) == "TypeError"  # by the trusted-types policy


def test_no_text_makes_the_renderer_slow(sayer: Page) -> None:
    """Some Markdown renderers need minutes for each of these, or overflow the stack; here all take a second or two."""
    sayer.driver.set_script_timeout(60)
    parts = [
        "*a **a ",
        "[",
        "[a](",
        "![",
        ">",
        "> ",
        "- ",
        "1. ",
        "<",
        "<a ",
        "<!--",
        "~",
        "_a",
        "*",
        "\n",
        "http://a.",
    ]
    parts += [
        "a@",
        "&",
        "\\",
        "[a]: b\n",
        "[a][b]",
        "#",
        "```\n",
        "-",
        "a\n=",
        "`",
        "**a",
        "*_",
        "\t- ",
        ">- ",
        "|",
        "a|\n-|",
    ]
    texts = [part * (32768 // len(part)) for part in parts]
    texts += [
        "".join("  " * depth + "- a\n" for depth in range(250)),
        "a|b\n-|-\n" + "|" * 32768,
        "a" + " " * 32768 + "b",
    ]
    script = (
        "for (const text of given[0]) {"
        "  const shown = document.createElement('div'); new Writing(shown).finish(text);"
        "  if (!shown.firstChild && text.trim() && !/^\\[a\\]:/.test(text)) return `nothing of ${text.slice(0, 20)}` }"
        "return null"
    )
    assert sayer.call(script, texts) is None


def test_incremental_rendering_gives_the_same_result_and_redraws_only_the_end(sayer: Page) -> None:
    """Rendering 2000 pieces takes work linear in the length of the answer."""
    texts = [saying.MARKDOWN, saying.FENCES, saying.NASTY, "\r\n".join(saying.LONG.split(". ")) * 6]
    script = (
        "const [grown, whole] = [document.createElement('div'), document.createElement('div')];"
        "let added = 0; const count = (changes) => { for (const {addedNodes} of changes) for (const node of addedNodes)"
        "  added += node.textContent.length };"
        "const seen = new MutationObserver(count); seen.observe(grown, {childList: true});"
        "const [text, step] = given; const writing = new Writing(grown);"
        "for (let at = step; at < text.length + step; at += step)"
        "  { writing.draw(text.slice(0, at)); count(seen.takeRecords()) }"
        "new Writing(whole).finish(text); const drawn = added; const before = grown.innerHTML;"
        "writing.finish(text); return [drawn, before, grown.innerHTML, whole.innerHTML]"
    )
    for text in texts:
        _, grown, finished, whole = sayer.call(script, text, 7)
        assert finished == whole
        if "[1]:" not in text:  # references defined later are resolved only at the end
            assert grown == whole
    document = "".join(f"Paragraph {number} with **bold** words.\n\n* item\n* item\n\n" for number in range(200))
    drawn, grown, _, whole = sayer.call(script, document, 5)
    assert grown == whole
    assert drawn < 20 * len(document)


# ---- copying, small screens, keys


def reads(found: Any, text: str) -> bool:
    return bool(found.text == text)


def pasted(page: Page) -> str:
    page.find("#prompt").clear()
    page.type(Keys.CONTROL, "v")
    page.type(Keys.NULL)
    return str(page.find("#prompt").get_property("value"))


@pytest.mark.parametrize("host", ["127.0.0.1", ELSEWHERE])
def test_code_and_answers_are_copied(host: str, driver: Any, server_saying: Server) -> None:
    """Also over plain http, where browsers have no navigator.clipboard."""
    page = visit(driver, server_saying.url.replace("127.0.0.1", host), "llama")
    assert driver.execute_script("return [isSecureContext, !!navigator.clipboard]") == [host != ELSEWHERE] * 2
    page.ask("code, f")
    page.answered()
    for index, (_, code) in list(enumerate(saying.FENCED))[:3]:
        pressed = driver.find_elements(By.CSS_SELECTOR, ".code button")[index]
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", pressed)
        pressed.click()
        page.until(functools.partial(reads, pressed, "Copied"))
        assert pasted(page) == code
    page.until(lambda: page.find(".below button").text == "Copy")
    page.find(".below button").click()
    page.until(lambda: page.find(".below button").text == "Copied")
    assert pasted(page) == saying.FENCES
    driver.execute_script(
        "document.execCommand = () => false; Object.defineProperty(navigator, 'clipboard', {value: null})"
    )
    pressed = page.find(".code button")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", pressed)
    page.until(lambda: pressed.text == "Copy")
    pressed.click()
    page.until(lambda: pressed.text == "Press Ctrl+C")
    assert driver.execute_script("return getSelection().toString()") == saying.FENCED[0][1]


def test_it_fits_a_small_screen_and_the_keyboard_reaches_everything(sayer: Page) -> None:
    screen = {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    sayer.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        for question in ("some m", "code, f", "nasty x"):
            sayer.ask(question)
            sayer.answered()
        sayer.find("#settings-button").send_keys(Keys.ENTER)
        assert sayer.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
        assert sayer.driver.execute_script("return log.scrollWidth - log.clientWidth") == 0
        sayer.find("#settings-button").send_keys(Keys.ENTER)
        reached = []
        for _ in range(60):
            webdriver.ActionChains(sayer.driver).send_keys(Keys.TAB).perform()
            reached.append(sayer.driver.execute_script("const a = document.activeElement; return a.id || a.innerText"))
        assert {"new", "settings-button", "prompt", "Copy", "Try again", "Edit question"} <= set(reached)
        assert 'print("```")' in {str(text).strip() for text in reached}
    finally:
        sayer.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ---- resources of the page


def test_the_page_loads_nothing_from_other_hosts(server_long: Server) -> None:
    page = server_long.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("/", "/chat.js", "/code.js", "/context.js", "/markdown.js", "/store.js", "/chat.css"):
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
