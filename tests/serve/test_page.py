"""The page in a real browser: draw, predict, teach, forget; by mouse, by keys alone, by finger on a narrow screen."""

import importlib.resources
import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from serving import Running, running, small_service
from test_limits import TOKEN

from recollect.serve import Service
from recollect.serve.settings import Settings
from recollect.serve.sources import demo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH = 360
SECONDS = 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("the tests of the page need Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def service() -> Service:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECOLLECT_DATA", str(__file__).rpartition("/")[0])  # no MNIST there: the digits of scikit-learn
        return demo()


@pytest.fixture
def server(service: Service) -> Iterator[Running]:
    service.layer.memory.clear()
    with running(service) as started:
        yield started


def opened(browser: Browser, server: Running, **settings) -> Page:
    """Opens the page, and lets the test fail at any word in the console."""
    page = browser.new_page(**settings)
    page.set_default_timeout(1000 * SECONDS)
    page.on("console", lambda message: pytest.fail(f"the console says: {message.text}"))
    page.on("pageerror", lambda error: pytest.fail(f"the page fails: {error}"))
    page.on("request", lambda request: request.url.startswith(server.url) or pytest.fail(f"asks {request.url}"))
    page.goto(server.url)
    expect(page.locator("#samples button")).to_have_count(10, timeout=1000 * SECONDS)
    return page


def says(page: Page, text: str | re.Pattern[str]) -> None:
    expect(page.locator("#status")).to_contain_text(text, timeout=1000 * SECONDS)


def draw_nine(page: Page) -> None:
    box = page.locator("#board").bounding_box()
    assert box is not None
    spots = [(0.62, 0.25), (0.5, 0.2), (0.38, 0.3), (0.4, 0.45), (0.6, 0.42), (0.63, 0.28), (0.62, 0.5), (0.56, 0.85)]
    (x, y), *rest = [(box["x"] + right * box["width"], box["y"] + down * box["height"]) for right, down in spots]
    page.mouse.move(x, y)
    page.mouse.down()
    for x, y in rest:
        page.mouse.move(x, y, steps=3)
    page.mouse.up()


def test_a_nine_is_drawn_taught_predicted_forgotten_and_remembered_again(browser: Browser, server: Running) -> None:
    page = opened(browser, server)
    step = page.locator("#steps [aria-current=step]")
    expect(page.locator("#story")).to_contain_text("never seen a 9")
    expect(step).to_have_text("Draw a 9")
    draw_nine(page)
    says(page, re.compile(r"It says [0-8], "))
    expect(step).to_have_text("Teach it: this is a 9")
    first = page.locator("#after").inner_text()
    expect(page.locator("#memories button")).to_have_count(5)
    page.get_by_label("Another class").fill("9")
    page.get_by_role("button", name="Remember", exact=True).click()
    says(page, "Remembered as 9, a new class")
    expect(page.locator("#after")).to_have_text("9")
    expect(page.locator("#size")).to_contain_text("46 of")
    taught = page.get_by_role("button", name="Forget this memory of 9")
    expect(taught).to_have_count(1)
    assert "added +" in (taught.get_attribute("aria-label") or "")
    nine = page.get_by_role("row", name="9")
    assert [float(cell.rstrip("%")) > 50 for cell in nine.locator("td span").all_inner_texts()] == [False, True]
    expect(step).to_have_text("Draw another 9")
    taught.click()
    says(page, "Forgotten")
    expect(page.locator("#after")).to_have_text(first)
    page.get_by_role("button", name="Undo").click()
    says(page, "Remembered again")
    expect(page.locator("#after")).to_have_text("9")
    page.get_by_role("button", name="Wipe").click()
    expect(page.locator("#memories button")).to_have_count(0)
    draw_nine(page)
    says(page, "It says 9")
    expect(step).to_have_text("Forget a memory")
    page.get_by_role("button", name="Forget this memory of 9").click()
    says(page, "Forgotten")
    expect(step).to_have_count(0)
    page.close()


def test_a_class_that_was_never_seen_is_one_click_and_a_double_click_counts_once(
    browser: Browser, server: Running
) -> None:
    page = opened(browser, server)
    page.get_by_role("button", name="Take a picture of 9").click()
    says(page, "It says")
    page.get_by_role("button", name="Remember this as 9, a new class").dblclick()
    says(page, "Remembered as 9, a new class")
    expect(page.locator("#after")).to_have_text("9")
    assert len(server.engine.memory) == 46
    expect(page.get_by_role("button", name="Remember this as 9, a new class")).to_have_count(0)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.method))
    page.get_by_role("button", name="Forget this memory of 9").dblclick()
    says(page, "Forgotten")
    assert sent.count("DELETE") == 1
    page.close()


def test_the_focus_stays_where_it_was(browser: Browser, server: Running) -> None:
    page = opened(browser, server)
    page.get_by_role("button", name="Take a picture of 9").press("Enter")
    says(page, "It says")
    for name in ("Remember this as 9, a new class", "Remember this as 9", "Remember this as 4"):
        page.get_by_role("button", name=name, exact=True).press("Enter")
        says(page, f"Remembered as {name[17]}")
        expect(page.locator(":focus")).to_have_attribute("data-label", name[17])
        page.evaluate("() => { document.getElementById('status').textContent = ''; }")
    page.close()


def test_a_lost_answer_is_asked_for_again_and_counts_once(browser: Browser, server: Running) -> None:
    page = browser.new_page()
    page.goto(server.url)
    page.get_by_role("button", name="Take a picture of 3").click()
    says(page, "It says")

    def lose(route: Route) -> None:
        route.fetch()  # the service writes, and nobody hears of it
        route.abort()

    page.route("**/v1/observe", lose)
    page.get_by_role("button", name="Remember this as 3").click()
    says(page, "cannot be reached")
    assert len(server.engine.memory) == 46
    page.unroute("**/v1/observe")
    page.get_by_role("button", name="Remember this as 3").click()
    says(page, "Remembered as 3")
    assert len(server.engine.memory) == 46
    page.get_by_role("button", name="Remember this as 3").click()
    expect(page.locator("#size")).to_contain_text("47 of")  # who means it twice gets it twice
    page.close()


def test_the_share_is_that_of_the_label_that_is_shown(browser: Browser) -> None:
    """Where an output without a name has most of it, too."""
    made = small_service(examples=None)
    with torch.no_grad():
        made.layer.head.bias[4] = 5.0
    with running(made) as started:
        page = browser.new_page()
        page.goto(started.url)
        page.get_by_role("button", name="Take a picture of ant").first.click()
        says(page, "It says")
        answer = started.client.post("/v1/predict", json={"inputs": [made.samples.inputs[0].tolist()]}).json()
        label, shares = answer["predictions"][0].values()
        assert max(shares) == shares[4] > 0.5
        share = f"{100 * shares[('ant', 'bee', 'cat').index(label)]:.1f}%"
        expect(page.locator("#after-share")).to_have_text(share)
        expect(page.get_by_role("row", name=label).locator("td.after span")).to_have_text(share)
        page.close()


def test_keys_alone_are_enough(browser: Browser, server: Running) -> None:
    page = opened(browser, server)
    keys = page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(60):
            keys.press("Tab")
            focused = page.locator(":focus")
            if focused.count() and name in (focused.get_attribute("aria-label") or focused.get_attribute("id") or ""):
                outlines = "element => [element, element.parentElement].map((e) => getComputedStyle(e).outlineStyle)"
                assert "solid" in focused.evaluate(outlines), f"{name} does not show that it has the focus"
                return
        pytest.fail(f"the tabulator never reaches {name}")

    tab_to("Drawing board")
    for key in ["ArrowUp"] * 5 + [" "] + ["ArrowDown"] * 10:
        keys.press(key)
    expect(page.locator("#spoken")).to_have_text(re.compile(r"Row \d+, column \d+"))
    keys.press(" ")
    says(page, "It says 1")
    expect(page.locator("#board")).to_have_attribute("aria-label", "Drawing board with your drawing")
    tab_to("Take a picture of 9")
    keys.press("Enter")
    says(page, re.compile("It says [0-8], "))
    tab_to("name")
    keys.type("9")
    keys.press("Enter")
    says(page, "Remembered as 9")
    expect(page.locator("#after")).to_have_text("9")
    tab_to("Forget this memory of 9")
    keys.press("Enter")
    says(page, "Forgotten")
    expect(page.locator("#after")).not_to_have_text("9")
    expect(page.locator(":focus")).to_have_attribute("aria-label", re.compile("Forget this memory"))
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(browser: Browser, server: Running, scheme: str) -> None:
    size = {"width": WIDTH, "height": 740}
    page = opened(browser, server, viewport=size, has_touch=True, is_mobile=True, color_scheme=scheme)
    page.get_by_role("button", name="Take a picture of 3").tap()
    says(page, "It says")
    page.get_by_role("button", name="Remember this as 3").tap()
    says(page, "Remembered as 3")
    assert page.evaluate("() => document.documentElement.scrollWidth") == WIDTH
    for button in page.get_by_role("button").all():
        box = button.bounding_box()
        assert box is None or box["height"] >= 32
    ground, ink = (
        page.evaluate(f"() => getComputedStyle(document.documentElement).{n}") for n in ("backgroundColor", "color")
    )
    dark, light = sorted((ground, ink), key=brightness)
    assert (ground == dark) is (scheme == "dark")
    assert brightness(light) - brightness(dark) > 150
    page.close()


def brightness(color: str) -> float:
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


def test_everything_has_a_name(browser: Browser, server: Running) -> None:
    page = opened(browser, server)
    page.get_by_role("button", name="Take a picture of 3").click()
    says(page, "It says")
    for role in ("button", "textbox"):
        for element in page.get_by_role(role).all():
            name = element.get_attribute("aria-label") or element.inner_text() or element.get_attribute("id")
            assert name, element.evaluate("element => element.outerHTML")
    for field in page.locator("input:visible, textarea:visible").all():
        assert page.locator(f"label[for='{field.get_attribute('id')}']").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("status").count() == 1
    page.close()


def test_a_name_is_shown_as_text(browser: Browser, server: Running) -> None:
    page = opened(browser, server)
    page.get_by_role("button", name="Take a picture of 9").click()
    says(page, "It says")
    page.get_by_label("Another class").fill("<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Remember", exact=True).click()
    says(page, "Remembered as <img")
    assert page.locator("img").count() == 0
    page.close()


def test_without_its_token_the_page_asks_for_it(browser: Browser, service: Service) -> None:
    service.layer.memory.clear()
    with running(service, Settings(token=TOKEN)) as server:
        page = browser.new_page()
        page.goto(server.url)
        for token, answer in (("wrong-token-wrong", "not the right token"), (TOKEN, "")):
            page.get_by_label("Token").fill(token)
            page.get_by_role("button", name="Open").click()
            if answer:
                says(page, answer)
        expect(page.locator("#samples button")).to_have_count(10, timeout=1000 * SECONDS)
        expect(page.locator("#door")).to_be_hidden()
        page.close()


def test_nothing_may_be_run_that_is_not_in_the_package(browser: Browser, server: Running) -> None:
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(server.url)
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "document.title = 'changed'";
        document.head.append(script);
    }""")
    assert page.title() == "recollect"
    assert any("Content Security Policy" in text for text in refused)
    page.close()


def test_the_package_has_the_page() -> None:
    folder = importlib.resources.files("recollect.serve") / "page"
    assert {file.name for file in folder.iterdir()} == {"index.html", "style.css", "page.js", "draw.js", "icon.svg"}
    page = (folder / "index.html").read_text()
    assert not re.search(r"(src|href)=\"(?!/page/)", page)
    assert "style=" not in page
