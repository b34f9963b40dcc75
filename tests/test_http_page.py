"""The page at ``/`` and the numbers behind it, from a real server and in a real browser."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.faults import WAIT_S
from tests.server import Server

Launch = Callable[..., AbstractContextManager[Server]]

KEY = "a-key"
LAYERS, KV_HEADS = 4, 2  # of the tiny model
SCHEMES = ["light", pytest.param("dark", marks=pytest.mark.slow)]
TOKENS = 1500  # they take the tiny model some seconds, in which a page asks more than once
PARTS = {"/": "text/html", "/page/page.css": "text/css", "/page/page.js": "text/javascript"}
PARTS |= {"/page/icon.svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def server(launch: Launch, tiny_model: Path) -> Iterator[Server]:
    with launch("--model", str(tiny_model), "--http", "0") as server:
        yield server


@pytest.fixture(scope="module")
def sparse(launch: Launch, tiny_model: Path) -> Iterator[Server]:
    """One whose resident sets are much smaller than contexts."""
    options = ("--select-k", "8", "--resident", "8")
    with launch("--model", str(tiny_model), "--http", "0", *options) as server:
        yield server


@contextmanager
def streaming(server: Server) -> Iterator[Iterator[str]]:
    """The events of an answer that takes a while."""
    body = {"prompt": [5] * 40, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json=body,
        timeout=WAIT_S,
    ) as answer:
        assert answer.status_code == 200
        yield answer.iter_lines()


def stats(server: Server) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/stats", timeout=WAIT_S)
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    numbers: dict[str, Any] = answer.json()
    return numbers


def test_the_numbers_follow_a_request(server: Server) -> None:
    before = stats(server)
    assert before["state"] == "ready" and before["open"] == 0
    with streaming(server) as events:
        for _ in range(20):
            next(events)
        during = stats(server)
        (worker,) = during["workers"]
        assert (during["open"], worker["running"], worker["decoding"]) == (1, 1, 1)
        assert during["stores"][0]["free_blocks"] < before["stores"][0]["free_blocks"]
        assert during["traffic"]["generated_tokens"] > before["traffic"]["generated_tokens"]
    while (after := stats(server))["workers"][0]["running"]:
        pass
    assert after["traffic"]["ended"]["cancelled"] == before["traffic"]["ended"]["cancelled"] + 1
    assert after["traffic"]["cache"]["steps"] > before["traffic"]["cache"]["steps"]


def test_the_rows_of_the_heads_are_those_of_all_requests(sparse: Server) -> None:
    """Requests that share their steps, and one that is cancelled while it decodes."""
    body = {"prompt": [[5, 6] * 60, [7] * 100], "max_tokens": 30, "ignore_eos": True}
    answer = httpx.post(f"{sparse.url}/v1/completions", json=body, timeout=WAIT_S)
    assert answer.status_code == 200
    with streaming(sparse) as events:
        for _ in range(40):
            next(events)
    while (numbers := stats(sparse))["workers"][0]["running"]:
        pass
    heads, cache = numbers["workers"][0]["head_rows"], numbers["traffic"]["cache"]
    selected, fetched = np.array(heads["selected"]), np.array(heads["fetched"])
    assert selected.shape == fetched.shape == (LAYERS, KV_HEADS)
    assert (selected.sum(), fetched.sum()) == (cache["selected_rows"], cache["fetched_rows"])
    assert (selected > 0).all() and (selected >= fetched).all() and fetched.sum() > 0
    assert len(np.unique(fetched)) > 1, "the heads are told apart"


def test_full_attention_has_no_rows_of_heads(launch: Launch, tiny_model: Path, browser: Any) -> None:
    with launch("--model", str(tiny_model), "--http", "0", "--attention", "full") as server:
        assert stats(server)["workers"][0]["head_rows"] is None
        with opened(browser, server.url) as (page, wrong):
            wait_for(page, "text('heads-text') === 'Full attention selects no rows.'")
            assert page.is_hidden("#heads") and not wrong


@pytest.mark.parametrize(("path", "kind"), PARTS.items())
def test_a_part_of_the_page_may_load_nothing_from_elsewhere(server: Server, path: str, kind: str) -> None:
    answer = httpx.get(server.url + path, timeout=WAIT_S)
    assert answer.status_code == 200 and answer.headers["content-type"].partition(";")[0] == kind
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "//" not in answer.text.replace("http://www.w3.org/2000/svg", "").replace(" // ", "").lstrip("/ ")


# -------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, chromium_sandbox=os.getuid() != 0)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """The page, and what went wrong in it."""
    context = browser.new_context(**options)
    page, wrong = context.new_page(), list[str]()
    page.set_default_timeout(WAIT_S * 1000)
    page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    yield page, wrong
    context.close()


def wait_for(page: Any, condition: str) -> None:
    """Until a text of the page is so; ``text`` gives that of an element."""
    text = "const text = (id) => document.getElementById(id).textContent;"
    page.wait_for_function(f"() => {{ {text} return {condition}; }}")


@contextmanager
def busy(server: Server) -> Iterator[None]:
    """One answer after another, for as long as a page needs."""
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            with streaming(server) as events:
                for _ in events:
                    pass

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        enough.set()
        asking.join()


def number(page: Any, id: str) -> int:
    return int(page.text_content(f"#{id}").replace(",", ""))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_move_while_an_answer_is_streamed(server: Server, browser: Any, scheme: str) -> None:
    phone = {"width": 360, "height": 740}
    with opened(browser, server.url, viewport=phone, color_scheme=scheme) as (page, wrong):
        wait_for(page, "text('state') === 'Ready.'")
        before = number(page, "generated")
        with busy(server):
            wait_for(page, f"text('decoding') === '1' && text('open') === '1' && text('rate') !== '0' "
                     f"&& text('generated') !== '{before:,}'")  # fmt: skip
        wait_for(page, "text('decoding') === '0' && text('hits').endsWith('%')")
        assert number(page, "generated") == stats(server)["traffic"]["generated_tokens"]
        assert page.locator("#token-gap rect").count() > 10 and page.locator("#rates path").count() == 1
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0, "a phone would scroll sideways"
        nameless = page.locator("svg[role=img]:not([aria-label]), meter:not([aria-label])").count()
        assert not wrong and not nameless


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_map_shows_each_head(sparse: Server, browser: Any, scheme: str) -> None:
    numbers = stats(sparse)
    rates = {  # by layer and KV head, of two workers together
        (0, 0): (100, 50), (0, 1): (100, 0), (1, 0): (300, 30), (1, 1): (0, 0),
    }  # fmt: skip
    halves = [[[0] * 2, [0] * 2], [[0] * 2, [0] * 2]]
    for (layer, head), pair in rates.items():
        for kind, rows in enumerate(pair):
            halves[kind][layer][head] = rows // 2
    numbers["workers"] *= 2
    for worker in numbers["workers"]:
        worker["head_rows"] = dict(zip(("selected", "fetched"), halves, strict=True))
    with opened(browser, "about:blank", color_scheme=scheme) as (page, wrong):
        page.route("**/stats", lambda route: route.fulfill(json=numbers))
        page.goto(sparse.url)
        wait_for(page, "text('state') === 'Ready.'")
        cells = page.locator("#heads rect")
        assert [cell.text_content() for cell in cells.all()] == [
            "layer 0, KV head 0: 50.0 % of 100 selected rows were resident",
            "layer 0, KV head 1: 100.0 % of 100 selected rows were resident",
            "layer 1, KV head 0: 90.0 % of 300 selected rows were resident",
            "layer 1, KV head 1: no rows selected",
        ]
        strengths = [float(cell.get_attribute("fill-opacity")) for cell in cells.all()]
        assert strengths[0] < strengths[2] < strengths[1] == 1.0
        said = "Lowest 50.0 % (layer 0, KV head 0), highest 100.0 %, 80.0 % on average over the heads."
        assert said in page.text_content("#heads-text")
        assert said in page.get_attribute("#heads", "aria-label") and not wrong


def test_the_map_of_a_large_model_fits_a_phone(server: Server, browser: Any) -> None:
    numbers = stats(server)
    rows = [[1000 + layer + head for head in range(8)] for layer in range(80)]
    numbers["workers"][0]["head_rows"] = {"selected": rows, "fetched": [[7] * 8] * 80}
    phone = {"width": 360, "height": 740}
    with opened(browser, "about:blank", viewport=phone) as (page, wrong):
        page.route("**/stats", lambda route: route.fulfill(json=numbers))
        page.goto(server.url)
        wait_for(page, "text('state') === 'Ready.'")
        assert page.locator("#heads rect").count() == 640
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        place = page.locator("#heads").bounding_box()
        assert wide == 0 and place["height"] < 740 and not wrong


def test_a_tooltip_stays_while_the_numbers_change(sparse: Server, browser: Any) -> None:
    with opened(browser, sparse.url) as (page, wrong):
        wait_for(page, "text('state') === 'Ready.'")
        cells = page.locator("#heads rect")
        assert cells.count() == LAYERS * KV_HEADS
        cell = cells.first.element_handle()
        before = cell.text_content()
        body = {"prompt": [9] * 100, "max_tokens": 20, "ignore_eos": True}
        httpx.post(f"{sparse.url}/v1/completions", json=body, timeout=WAIT_S)
        page.wait_for_function("([cell, text]) => cell.textContent !== text", arg=[cell, before])
        assert cell.evaluate("cell => cell.isConnected") and not wrong


def test_a_hidden_page_asks_nothing(server: Server, browser: Any) -> None:
    with opened(browser, server.url) as (page, wrong):
        wait_for(page, "text('state') === 'Ready.'")
        hide = (
            "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true}); "
            "document.dispatchEvent(new Event('visibilitychange')); }"
        )
        page.evaluate(hide, True)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(2500)
        assert not asked
        with page.expect_request("**/stats"):
            page.evaluate(hide, False)
        assert not wrong


def test_a_name_with_markup_is_shown_as_it_is(server: Server, browser: Any) -> None:
    name = "<img src=x onerror=alert(1)>"
    numbers = stats(server) | {"model": name}
    numbers["stores"][0]["store"] = name
    with opened(browser, "about:blank") as (page, wrong):
        page.route("**/stats", lambda route: route.fulfill(json=numbers))
        page.goto(server.url)
        wait_for(page, "text('state') === 'Ready.'")
        assert page.text_content("#model") == name and name in page.text_content("#stores")
        assert page.locator("img").count() == 0 and not wrong


def test_the_numbers_ask_for_the_key_and_the_page_says_when_the_server_has_gone(
    launch: Launch, tiny_model: Path, browser: Any
) -> None:
    options = ("--model", str(tiny_model), "--http", "0", "--api-key", KEY)
    with launch(*options) as server:
        refused = httpx.get(f"{server.url}/stats", timeout=WAIT_S)
        assert refused.status_code == 401 and json.loads(refused.text)["error"]["code"] == "invalid_api_key"
        with opened(browser, server.url) as (page, _):  # a browser reports every 401 in its console
            wait_for(page, "text('state') === 'The API key is needed.'")
            assert page.is_hidden("#numbers")
            for key, said in (("wrong", "The API key is wrong."), (KEY, "Ready.")):
                page.fill("#key", key)
                page.click("#ask button")
                wait_for(page, f"text('state') === '{said}'")
            assert page.is_visible("#numbers") and page.is_hidden("#ask")
            page.reload()
            wait_for(page, "text('state') === 'Ready.'")
            server.signal(signal.SIGTERM)
            server.wait()
            wait_for(page, "text('state') === 'The server cannot be reached. These numbers are old.'")
