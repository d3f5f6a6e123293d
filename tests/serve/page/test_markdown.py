"""Rendering of answers, which are untrusted."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.by import By

from tests.serve import saying
from tests.serve.page.browser import Page

pytestmark = pytest.mark.system


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
        sayer.reload()
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
    sayer.reload()
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
