"""The page in a browser: Chromium through Playwright, where both are installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.scripted import ScriptedClient

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient(delay=0.05)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[(1600, "light"), (400, "dark")], ids=["wide", "narrow"])
def page(request: pytest.FixtureRequest, browser: Any, url: str) -> Iterator[Any]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.complaints = complaints = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(url) else complaints.append(r.url))
    page.goto(url)
    page.wait_for_function("document.querySelector('.policy').options.length")
    page.fill("#document", "w1 w2 w3 w4 w5 w6 w7 w8 w9")
    page.fill("#question", "w9")
    page.locator(".budget").nth(1).fill("50%")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
    assert complaints == []


def test_two_policies_answer_side_by_side_and_show_what_they_keep(page: Any) -> None:
    page.select_option(".side.b .policy", "streaming-llm")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".pane.b.busy .answer:has-text('w1')")
    page.wait_for_selector(".map.b")
    for side, kept in (("a", "100 %"), ("b", "50 %")):
        assert page.inner_text(f".pane.{side} .answer").startswith(" w1 w2 w3")
        assert page.inner_text(f".pane.{side} .kept") == kept
        assert float(page.inner_text(f".pane.{side} .rate")) > 1
    spans = "[...document.querySelectorAll('.map.b .tokens span')]"
    shares = page.evaluate(f"{spans}.map((span) => span.style.getPropertyValue('--kept'))")
    assert len(set(shares)) > 1


def test_arrow_keys_walk_through_the_tokens(page: Any) -> None:
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".map.a")
    page.focus(".map.a .tokens")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#inspect").startswith("Token 1 ")


def test_escape_stops_both(page: Any, engine: ScriptedClient) -> None:
    page.click("details summary")
    page.fill("#max-tokens", "200")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".pane.b.busy .answer:has-text('w1')")
    page.keyboard.press("Escape")
    page.wait_for_selector(".pane.b .answer:has-text('(stopped)')")
    page.wait_for_function("document.querySelector('#stop').disabled")
    assert len(engine.taken) == 2


def test_a_refusal_is_shown_where_the_answer_would_be(page: Any) -> None:
    page.locator(".budget").nth(1).fill("a lot")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".pane.b .answer.failed:has-text('X-KV-Budget')")
    page.wait_for_selector("#problem:has-text('budget')")
    refused = "the server responded with a status of 400"
    page.complaints[:] = [complaint for complaint in page.complaints if refused not in complaint]


def test_colours_follow_the_button(page: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    seen = set()
    for _ in range(3):
        page.click("#theme")
        seen.add(page.evaluate(background))
    assert len(seen) == 2
