"""The live page, in Debian's Chromium."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.fake_discord import playing, raw
from tests.harness import PATIENCE, Server, eventually, serving
from tests.test_events import LISTEN, read_events

LOST = re.compile(
    "Failed to load resource: net::ERR_(CONNECTION_REFUSED|INCOMPLETE_CHUNKED|EMPTY_RESPONSE)"
)
"""What a browser logs when the server has ended."""

expect.set_options(timeout=PATIENCE * 1000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield chromium
        chromium.close()


@dataclass
class Watched:
    """A page, and its errors and requests."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def wait_for_events(self, count: int) -> None:
        for _ in range(count):
            now = self.page.locator("#live").get_attribute("data-now")
            expect(self.page.locator("#live")).not_to_have_attribute("data-now", now or "")


@contextmanager
def opened(browser: Browser, server: Server, **options: Any) -> Iterator[Watched]:
    """Open the page until the end of the context, and check that it has no errors."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    watched = Watched(page)
    page.on("console", lambda message: watched.complaints.append(message.text))
    page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    page.on("request", lambda request: watched.requests.append(request.url))
    page.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => console.error(e.violatedDirective))"
    )
    page.goto(f"http://127.0.0.1:{server.port}/dashboard")
    yield watched
    context.close()
    assert [one for one in watched.complaints if not LOST.match(one)] == []
    requested = [urlsplit(url) for url in watched.requests if not url.startswith("data:")]
    assert {url.netloc for url in requested} == {f"127.0.0.1:{server.port}"}
    assert {url.path for url in requested} <= {"/dashboard", "/events"}


def figure(page: Page, name: str) -> Any:
    return page.locator(".figures div", has_text=name).locator("dd").first


def seconds_shown(page: Page) -> float:
    """Read the countdown to the next release, of minutes and seconds."""
    minutes, seconds = re.findall(r"\d+", figure(page, "Next release").inner_text())
    return int(minutes) * 60 + int(seconds)


@pytest.fixture(scope="module")
def busy() -> Iterator[Server]:
    """Run a server with 200 waiting shards on 16 keys, and one shard that is away."""
    variables = {"WINDOW_SECONDS": 3600, "MAX_CONCURRENCY": 16, "SESSION_START_LIMIT": 1000}
    with serving(HOLD_ON_START="false", PLACE_SECONDS=600, **variables) as it:
        for shard in range(16):
            it.ask(shard).answer()
        gone = it.ask(1000)
        eventually(lambda: it.status()["waiting"] == 1)
        gone.hang_up()
        eventually(lambda: it.status()["waiting"] == 0)
        for shard in range(200):
            it.ask(shard)
        eventually(lambda: it.status()["waiting"] == 200)
        yield it


def test_a_release_appears_and_the_count_falls(browser: Browser) -> None:
    with serving(WINDOW_SECONDS=1, MAX_CONCURRENCY=2, SESSION_START_LIMIT=10) as server:
        with opened(browser, server) as watched:
            page = watched.page
            expect(page.locator(".headline")).to_contain_text("No shard waits")
            for shard in (10, 11, 12, 14):
                server.ask(shard)
            for left in ("2", "1", "0"):
                expect(figure(page, "Waiting")).to_have_text(left)
            expect(figure(page, "Released")).to_have_text("4")
            shards = page.locator(".latest tbody td:first-child").all_inner_texts()
            assert shards[:2] == ["14", "12"]
            assert sorted(shards[2:]) == ["10", "11"]
            expect(page.locator(".budget")).to_contain_text("6 of 10 left")
            released = [path.get_attribute("d") for path in page.locator(".released").all()]
            assert [(path or "").count("M") for path in released] == [3, 1]
            expect(page).to_have_title("Gateway queue")
        assert server.status()["released"] == 4, "the page itself takes no turn"


def test_the_page_lists_waiting_shards_by_key(browser: Browser, busy: Server) -> None:
    with opened(browser, busy) as watched:
        page = watched.page
        expect(page).to_have_title("(200) Gateway queue")
        expect(page.locator(".keys tbody tr")).to_have_count(16)
        lane = page.locator("#lane-5")
        lane.locator("summary").click()
        rows = lane.locator("tbody tr")
        expect(rows).to_have_count(10)
        assert rows.nth(1).locator("td").all_inner_texts()[:2] == ["2", "21"]
        expect(lane).to_contain_text("and 3 more")
        aside = page.locator("#held-or-away")
        expect(aside).to_contain_text("0 held, 1 away")
        expect(aside.locator("tbody tr")).to_contain_text("client left, place kept until")


def test_the_page_explains_why_a_shard_is_held(browser: Browser) -> None:
    with serving(HOLD_ON_START="false", LOOP_FREE_STARTS=1) as server:
        server.ask(7).answer()
        server.ask(7)
        with opened(browser, server) as watched:
            row = watched.page.locator("#held-or-away tbody tr")
            expect(row).to_contain_text("starts too often, until")


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Asia/Kolkata"])
def test_times_of_day_are_in_the_time_zone_of_the_browser(
    browser: Browser, busy: Server, zone: str
) -> None:
    with opened(browser, busy, timezone_id=zone, locale="en-GB") as watched:
        time = watched.page.locator(".latest time").first
        expected = time.evaluate(
            "(e, timeZone) => new Date(e.dateTime).toLocaleTimeString('en-GB', { timeZone })", zone
        )
        assert time.inner_text().endswith(expected)
        assert "UTC" not in watched.page.locator("main").inner_text()


def test_the_countdown_runs_between_events(browser: Browser) -> None:
    with serving(WINDOW_SECONDS=3000) as server:
        server.ask(1)
        eventually(lambda: server.status()["waiting"] == 1)
        with opened(browser, server) as watched:
            watched.wait_for_events(1)
            server.signal(signal.SIGSTOP)
            before = seconds_shown(watched.page)
            expect(figure(watched.page, "Next release")).not_to_contain_text(f":{before % 60:02}")
            assert seconds_shown(watched.page) < before <= 3000
            server.signal(signal.SIGCONT)


@pytest.mark.parametrize("meanwhile", ["nothing", "a refusal"])
def test_it_reconnects_after_a_restart(browser: Browser, meanwhile: str) -> None:
    with serving() as first, opened(browser, first) as watched:
        connection = watched.page.locator("#connection")
        expect(connection).to_have_text("Live")
        first.signal(signal.SIGTERM)
        first.wait()
        expect(connection).to_contain_text("Connection lost, last update")
        if meanwhile == "a refusal":
            with serving(PORT=first.port, AUTH_TOKEN="secret") as refusing:
                eventually(lambda: any("status=401" in line for line in refusing.lines))
        with serving(PORT=first.port) as second:
            second.ask(7)
            expect(connection).to_have_text("Live")
            expect(figure(watched.page, "Waiting")).to_have_text("1")
        watched.complaints = [one for one in watched.complaints if "401" not in one]


def test_without_javascript_it_is_a_plain_table(browser: Browser, busy: Server) -> None:
    with opened(browser, busy, java_script_enabled=False) as watched:
        page = watched.page
        expect(figure(page, "Waiting")).to_have_text("200")
        expect(page.locator("#lane-5 tbody tr")).to_have_count(10)
        expect(page.locator(".latest time").first).to_contain_text("UTC")
        expect(page.get_by_role("link", name="Reload")).to_be_visible()
        expect(page.locator("#connection")).to_be_hidden()
        assert len(watched.requests) == 1


def test_it_fits_on_a_phone(browser: Browser, busy: Server) -> None:
    with opened(browser, busy, viewport={"width": 360, "height": 740}) as watched:
        for summary in watched.page.locator("summary").all():
            summary.click()
        watched.wait_for_events(1)
        assert watched.page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.fixture(scope="module")
def of_bots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server with bots, two of which release no ticket; one of them has a long name."""
    path = tmp_path_factory.mktemp("bots") / "bots.toml"
    token = 'discord_token = "x"\ndiscord_api_url = "http://127.0.0.1:1"\n'
    path.write_text(f"[music]\n[spent]\nsession_start_limit = 1\n[{'x' * 100}]\n{token}")
    with serving(BOTS_FILE=path, HOLD_ON_START="false", WINDOW_SECONDS=60) as it:
        it.connect(b"GET /?bot=spent HTTP/1.1\r\nHost: q\r\n\r\n").answer()
        yield it


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_bots_in_trouble_come_first_and_fit(browser: Browser, of_bots: Server, width: int) -> None:
    with opened(browser, of_bots, viewport={"width": width, "height": 740}) as watched:
        page = watched.page
        expect(page.locator(".bots h2")).to_have_text("Bots 4, 2 in trouble")
        names = page.locator(".bots tbody td:first-child").all_inner_texts()
        assert names == ["spent", "x" * 100, "default", "music"]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        rows = [row.inner_text() for row in page.locator(".bots tbody tr").all()]
        assert "the day's session starts are spent" in rows[0]
        assert Axe().run(page).violations_count == 0


@pytest.mark.parametrize("width", [360, 768, 1100, 1440])
def test_the_labels_of_the_timeline_do_not_overlap(
    browser: Browser, of_bots: Server, width: int
) -> None:
    with opened(browser, of_bots, viewport={"width": width, "height": 740}) as watched:
        labels = watched.page.locator(".axis text").all()
        boxes = [box for label in labels if (box := label.bounding_box())]
        assert all(one["x"] + one["width"] < then["x"] for one, then in pairwise(boxes))


def test_focus_and_opened_queues_stay(browser: Browser, busy: Server) -> None:
    with opened(browser, busy) as watched:
        page = watched.page
        for _ in range(4):  # past the search box
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        focused = page.locator("details:has(summary:focus)")
        expect(focused).to_have_attribute("id", "lane-2")
        expect(focused.locator("table")).to_be_visible()
        page.evaluate("scrollTo(0, 300)")
        watched.wait_for_events(2)
        expect(focused).to_have_attribute("id", "lane-2")
        expect(focused.locator("table")).to_be_visible()
        assert page.evaluate("scrollY") == 300
        page.evaluate(
            """const live = document.getElementById("live").cloneNode(true);
            live.querySelector("#held-or-away").remove();
            show(live.outerHTML);"""
        )
        expect(focused).to_have_attribute("id", "lane-2")


def test_a_closed_queue_stays_closed(browser: Browser) -> None:
    with serving(WINDOW_SECONDS=3600) as server:
        server.ask(1)
        eventually(lambda: server.status()["waiting"] == 1)
        with opened(browser, server) as watched:
            lane = watched.page.locator("#lane-0")
            expect(lane.locator("table")).to_be_visible()
            lane.locator("summary").click()
            watched.wait_for_events(2)
            expect(lane.locator("table")).to_be_hidden()


def test_the_page_is_reloaded_when_the_server_has_another_version(browser: Browser) -> None:
    with serving() as server, opened(browser, server) as watched:
        with watched.page.expect_navigation():
            watched.page.evaluate("document.getElementById('live').dataset.build = 'former'")
        watched.wait_for_events(1)


@pytest.mark.parametrize(
    ("scheme", "background"), [("light", "rgb(244, 245, 248)"), ("dark", "rgb(16, 18, 24)")]
)
def test_the_page_is_accessible(
    browser: Browser, busy: Server, scheme: Any, background: str
) -> None:
    with opened(browser, busy, color_scheme=scheme) as watched:
        expect(watched.page.locator("body")).to_have_css("background-color", background)
        watched.page.locator("summary").first.click()
        watched.wait_for_events(1)
        found = Axe().run(watched.page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []


def test_html_in_a_reason_is_shown_as_text(browser: Browser) -> None:
    reason = "503 <img src=x onerror=alert(1)>"
    with playing() as discord:
        discord.tricks.extend([raw(f"HTTP/1.1 {reason}\r\n\r\n".encode())] * 9)
        with serving(**discord.variables()) as server:
            server.ask(3)
            with opened(browser, server) as watched:
                watched.wait_for_events(2)
                expect(watched.page.locator(".headline")).to_contain_text(reason)
                expect(watched.page.locator(".conditions .bad")).to_contain_text("Discord")
                expect(watched.page.locator("#lane-0")).to_contain_text("All")


def test_without_a_server_the_page_is_dimmed_and_its_clock_stops(browser: Browser) -> None:
    with serving(WINDOW_SECONDS=3000) as server:
        server.ask(1)
        eventually(lambda: server.status()["waiting"] == 1)
        with opened(browser, server) as watched:
            page = watched.page
            watched.wait_for_events(1)
            good = page.locator("#icon").get_attribute("href")
            expect(page.locator("body")).not_to_have_class("lost")
            server.signal(signal.SIGSTOP)
            expect(page.locator("body")).to_have_class("lost")
            expect(page.locator("main")).to_have_css("opacity", "0.45")
            expect(page).to_have_title("⚠ (1) Gateway queue")
            assert page.locator("#icon").get_attribute("href") != good
            before = seconds_shown(page)
            expect(page.locator("#connection")).to_contain_text("last update 7 s ago")
            assert seconds_shown(page) == before
            server.signal(signal.SIGCONT)
            expect(page.locator("body")).not_to_have_class("lost")
            expect(page).to_have_title("(1) Gateway queue")
            expect(page.locator("#icon")).to_have_attribute("href", good or "")


def test_trouble_shows_in_the_title(browser: Browser) -> None:
    with serving(HOLD_ON_START="false", SESSION_START_LIMIT=1) as server:
        server.ask(1).answer()
        with opened(browser, server) as watched:
            expect(watched.page).to_have_title("⚠ Gateway queue")
            expect(watched.page.locator(".headline")).to_contain_text("no session start is left")


def listeners(server: Server) -> int:
    """Count the streams of events."""
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED for one in found)


def test_all_tabs_share_one_stream(browser: Browser) -> None:
    """Browsers open six connections to a server; the seventh tab would hang."""
    with serving(WINDOW_SECONDS=3000) as server, browser.new_context() as context:
        requests: list[str] = []
        context.on("request", lambda request: requests.append(request.url))
        pages = [context.new_page() for _ in range(8)]
        for page in pages:
            page.goto(f"http://127.0.0.1:{server.port}/dashboard")
            expect(page.locator("#connection")).to_have_text("Live")
        assert sum(url.endswith("/events") for url in requests) == 1
        server.ask(1)
        for page in pages:
            expect(figure(page, "Waiting")).to_have_text("1")
        pages[0].close()  # the next tab opens a stream
        for page in pages[1:]:
            now = page.locator("#live").get_attribute("data-now")
            expect(page.locator("#live")).not_to_have_attribute("data-now", now or "")
        assert sum(url.endswith("/events") for url in requests) == 2


HIDE = """hidden => {
    Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_a_hidden_tab_gets_no_events(browser: Browser) -> None:
    with serving() as server, opened(browser, server) as watched:
        page = watched.page
        expect(page.locator("#connection")).to_have_text("Live")
        page.evaluate(HIDE, True)
        eventually(lambda: listeners(server) == 0)
        other = server.connect(LISTEN)
        read_events(other, 3)
        assert listeners(server) == 1
        other.hang_up()
        page.evaluate(HIDE, False)
        watched.wait_for_events(1)
        expect(page.locator("#connection")).to_have_text("Live")
        expect(page.locator("body")).not_to_have_class("lost")


def test_a_shard_is_found(browser: Browser, busy: Server) -> None:
    with opened(browser, busy) as watched:
        page, found = watched.page, watched.page.locator("#found")
        expect(found).to_be_hidden()
        page.get_by_label("Find a shard").fill("117")
        expect(found).to_contain_text("Shard 117 (key 5) waits at place 8 (13 waiting); waited ")
        page.get_by_label("Find a shard").fill("3000")
        expect(found).to_contain_text("Shard 3000 (key 8) is not in the queue")
        page.get_by_label("Find a shard").fill("x")
        expect(found).to_contain_text("shard must be a whole number")
        page.get_by_label("Find a shard").fill("")
        expect(found).to_be_hidden()
        watched.requests = [url for url in watched.requests if "/status?" not in url]
        watched.complaints = [one for one in watched.complaints if "400" not in one]


def test_an_empty_queue_shows_the_first_steps(browser: Browser) -> None:
    with serving() as server, opened(browser, server) as watched:
        steps = watched.page.locator("#first-steps")
        expect(steps).to_contain_text(f'curl "http://127.0.0.1:{server.port}/?shard=0"')
        assert steps.get_by_role("link", name="status").get_attribute("href") == "status"
        server.ask(0)
        expect(steps).to_have_count(0)


def test_the_page_shows_identifying_and_unconfirmed_shards(browser: Browser) -> None:
    variables = {"HOLD_ON_START": "false", "MAX_CONCURRENCY": 2, "CONFIRM_SECONDS": 1}
    with serving(**variables, LOOP_FREE_STARTS=0, WINDOW_SECONDS=0.05) as server:
        for shard in (4, 4, 4, 7):
            server.ask(shard).answer()
        server.connect(b"GET /?shard=11&confirm=true HTTP/1.1\r\nHost: q\r\n\r\n")
        with opened(browser, server) as watched:
            card = watched.page.locator("#identifies")
            expect(card).to_contain_text("not confirmed shard 11, at ")
            (most,) = watched.page.locator("#frequent tbody tr").all_inner_texts()
            assert most.split() == ["Shard", "4", "3"]


def test_with_max_concurrency_0_the_page_shows_no_windows(browser: Browser) -> None:
    with serving(MAX_CONCURRENCY=0) as server:
        server.ask(1).answer()
        with opened(browser, server) as watched:
            expect(watched.page.locator(".headline")).to_contain_text("released at once")
            expect(figure(watched.page, "Released")).to_have_text("1")
            expect(watched.page.locator(".card")).to_have_count(1)  # the hidden answer of a search


def test_the_page_works_under_a_prefix_of_a_proxy(browser: Browser) -> None:
    with serving() as server, browser.new_context() as context:
        page = context.new_page()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(urlsplit(request.url).path))
        page.route(
            "**/queue/*",
            lambda route: route.continue_(url=route.request.url.replace("/queue/", "/")),
        )
        page.goto(f"http://127.0.0.1:{server.port}/queue/dashboard")
        expect(page.locator("#connection")).to_have_text("Live")
        expect(page.locator("#first-steps")).to_contain_text("/queue/?shard=0")
        page.get_by_label("Find a shard").fill("1")
        expect(page.locator("#found")).to_contain_text("Shard 1 is not in the queue")
    assert {*requests} == {"/queue/dashboard", "/queue/events", "/queue/status"}


def test_a_browser_without_the_token_gets_a_page() -> None:
    with serving(AUTH_TOKEN="secret") as server:
        browsers = b"GET /dashboard HTTP/1.1\r\nHost: q\r\nAccept: text/html,*/*\r\n\r\n"
        refused = server.connect(browsers).answer()
    assert refused.status == 401
    assert refused.headers["content-type"] == "text/html; charset=utf-8"
    assert b"<h1>401 Unauthorized</h1><p>this queue needs a token" in refused.body


def test_browsers_get_their_icon() -> None:
    """Browsers request it by themselves; if it were a ticket, it would use a slot."""
    with serving(WINDOW_SECONDS=3000) as server:
        icon = server.get("/favicon.ico")
        assert server.status()["waiting"] == 0
    assert icon.headers["content-type"].startswith("image/svg+xml")
    assert icon.body.startswith(b"<svg ")


def test_with_reduced_motion_the_page_does_not_move(browser: Browser) -> None:
    with serving(WINDOW_SECONDS=3000) as server:
        server.ask(1)
        with opened(browser, server, reduced_motion="reduce") as watched:
            watched.wait_for_events(1)
            server.signal(signal.SIGSTOP)
            drift = watched.page.locator("[data-drift]").get_attribute("transform")
            before = seconds_shown(watched.page)
            expect(figure(watched.page, "Next release")).not_to_contain_text(f":{before % 60:02}")
            assert watched.page.locator("[data-drift]").get_attribute("transform") == drift
            server.signal(signal.SIGCONT)
