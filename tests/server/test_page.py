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
    touch = width == 400
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touch, is_mobile=touch
    )
    page = context.new_page()
    page.complaints = complaints = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(url) else complaints.append(r.url))
    page.goto(url)
    page.wait_for_selector(".policy option", state="attached")
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
    page.wait_for_selector("#stop:disabled")
    assert len(engine.taken) == 2


def excuse(page: Any, status: int) -> None:
    """The browser itself writes to the console about an answer that was to come."""
    refused = f"the server responded with a status of {status}"
    page.complaints[:] = [complaint for complaint in page.complaints if refused not in complaint]


def test_a_refusal_is_said_once_and_nothing_of_the_run_before_is_left(page: Any) -> None:
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".map.b")
    assert "given back" in page.inner_text(".pane.b .memory")
    page.locator(".budget").nth(1).fill("150%")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".pane.b .answer.failed:has-text('Budget: ')")
    page.wait_for_selector("#inspect:has-text('when both have answered')")
    said = page.inner_text("main")
    assert said.count("more than everything") == 1 and "X-KV" not in said
    assert page.inner_text(".pane.b .held-text") == page.inner_text(".pane.b .kept") == "–"
    assert "given back" not in page.inner_text(".pane.b") and page.locator(".map").count() == 0
    assert page.locator(".budget").nth(1).get_attribute("aria-invalid") == "true"
    page.locator(".budget").nth(1).fill("50%")
    assert page.locator("[aria-invalid]").count() == 0
    excuse(page, 400)


def test_a_text_that_is_too_long_or_missing_is_stopped_before_the_engine(
    page: Any, engine: ScriptedClient
) -> None:
    page.fill("#document", "w1 " * 300)
    page.wait_for_selector("#size.over:has-text('of 256')")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#problem:has-text('tokens too long')")
    page.fill("#document", " ")
    page.fill("#question", "")
    assert page.locator("#problem").is_hidden()
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#problem:has-text('paste a text')")
    assert not engine.taken


def test_an_error_that_both_would_meet_is_told_once(page: Any, engine: ScriptedClient) -> None:
    engine.state = "draining"
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#problem:has-text('takes no requests')")
    assert page.locator(".answer.failed").count() == 0
    page.wait_for_selector("#run:enabled")
    excuse(page, 503)


def test_run_brings_both_memories_and_answers_into_view(page: Any) -> None:
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".map.b")
    page.wait_for_timeout(500)  # for the scrolling
    for side in ("a", "b"):
        box = page.locator(f".pane.{side} .memory").bounding_box()
        assert 0 <= box["y"] < 900 - box["height"]


def test_a_touch_screen_is_told_of_no_keys_and_a_long_question_is_seen_whole(page: Any) -> None:
    touch = page.evaluate("matchMedia('(pointer: coarse)').matches")
    assert page.locator("#run kbd").is_visible() != touch
    before = page.locator("#question").bounding_box()["height"]
    page.fill("#question", "What did the widow give the harbour, and why did she do so? " * 3)
    assert page.locator("#question").bounding_box()["height"] > before + 20


def test_the_documentation_loads_from_this_server_alone(page: Any, url: str) -> None:
    page.goto(f"{url}/docs")
    page.wait_for_selector(".opblock-summary-path:has-text('completions')")


def test_colours_follow_the_button(page: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    seen = set()
    for _ in range(3):
        page.click("#theme")
        seen.add(page.evaluate(background))
    assert len(seen) == 2


@pytest.fixture
def talk(page: Any, url: str) -> Any:
    page.goto(f"{url}/conversation")
    page.wait_for_selector("#policy option", state="attached")
    page.fill("#document", "w4 w5 w6")
    page.fill("#budget", "50%")
    page.fill("#max-tokens", "3")
    return page


def test_a_conversation_goes_on_in_one_session_and_shows_what_each_turn_cost(
    talk: Any, engine: ScriptedClient
) -> None:
    assert talk.evaluate(
        "({scrollHeight, clientHeight}) => scrollHeight <= clientHeight", talk.query_selector("#say")
    )
    for turn, said in enumerate(("w7", "w8"), 1):
        talk.fill("#say", said)
        talk.keyboard.press("Enter")
        talk.wait_for_selector(f"#turns li.assistant >> nth={turn - 1} >> text=w1 w2 w3")
        talk.wait_for_selector(f"#costs tr >> nth={turn - 1}")
        talk.wait_for_selector("#go:enabled")
    first, second = engine.taken
    assert first.session == second.session != ""
    assert second.prompt_token_ids[: len(first.prompt_token_ids) - 1] == first.prompt_token_ids[:-1]
    assert talk.locator("#document").is_disabled()
    talk.click("#anew")
    assert talk.locator("#turns li").count() == 0 and talk.locator("#document").is_enabled()


def test_a_turn_that_is_refused_can_be_said_again(talk: Any, engine: ScriptedClient) -> None:
    talk.fill("#budget", "150%")
    talk.fill("#say", "w7")
    talk.keyboard.press("Enter")
    talk.wait_for_selector("#problem:has-text('Budget: ')")
    assert talk.locator("#turns li").count() == 0 and talk.input_value("#say") == "w7"
    assert not engine.taken
    excuse(talk, 400)
