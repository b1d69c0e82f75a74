"""The page in a real browser: it loads at once and alone, slides, tells numbers, and needs neither mouse nor width."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trace_cases import HOSTILE, empty_trace, lm2_trace, long_trace, mom_trace, rmt_trace

from mnemon.inspection.page import write_page
from mnemon.inspection.trace import Trace

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="chromium or chromedriver is not installed")

TRACES = {"lm2": lm2_trace, "mom": mom_trace, "rmt": rmt_trace, "empty": empty_trace, "long": long_trace}
SECONDS_TO_LOAD = 3.0
PATIENCE_S = 20
WIDE, NARROW = (1280, 900), (360, 740)


class Page:
    """A page in a browser, and what a visitor does with it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, size: tuple[int, int] = WIDE, scheme: str = "light") -> None:
        """Load a page in a window of a size, on a system with a colour scheme."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False},
        )
        self.emulate({"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"})
        self.driver.execute_script("try { localStorage.clear(); } catch {}")  # what the page before remembered
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.as_uri())
        self.wait("document.documentElement.dataset.ready !== undefined")

    def emulate(self, features: dict[str, str], media: str = "") -> None:
        listed = [{"name": name, "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": listed})

    def script(self, code: str, *arguments: Any) -> Any:
        """Return the value of an expression in the page."""
        return self.driver.execute_script(f"return ({code});", *arguments)

    def wait(self, condition: str) -> None:
        WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.02).until(
            lambda _: self.script(condition), message=condition
        )

    def settle(self) -> None:
        """Wait until what was asked for has been drawn."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def one(self, selector: str) -> WebElement:
        element: WebElement = self.driver.find_element("css selector", selector)
        return element

    def all(self, selector: str) -> list[WebElement]:
        found: list[WebElement] = self.driver.find_elements("css selector", selector)
        return found

    def text(self, selector: str) -> str:
        return str(self.script("document.querySelector(arguments[0]).textContent", selector))

    def pixels(self, figure: str) -> str:
        """Return what a figure shows, as something that differs when the figure does."""
        self.settle()
        return str(self.script("document.getElementById(arguments[0]).toDataURL()", figure))

    def place_of(self, figure: str, row: int, column: int) -> tuple[int, int]:
        """Bring a cell into sight and return where it is in the window."""
        x, y = self.driver.execute_script(
            """
            const [name, row, column] = arguments;
            const canvas = document.getElementById(name);
            const [left, top, width, height] = canvas.parentElement.figure.boxOf([row, column]);
            const place = () => canvas.getBoundingClientRect();
            scrollBy({top: place().top + top - innerHeight / 2, behavior: "instant"});
            return [place().left + left + width / 2, place().top + top + height / 2];
            """,
            figure,
            row,
            column,
        )
        return round(x), round(y)

    def hover(self, figure: str, row: int, column: int, click: bool = False) -> str:
        """Move the pointer to a cell, from outside, and return what the tooltip says."""
        x, y = self.place_of(figure, row, column)
        self.settle()  # scrolling puts the tooltip away
        actions = ActionBuilder(self.driver)
        actions.pointer_action.move_to_location(2, 2).move_to_location(x, y)
        if click:
            actions.pointer_action.click()
        actions.perform()
        self.settle()
        return "" if self.script("document.getElementById('tip').hidden") else self.text("#tip")

    def press(self, *keys: str) -> None:
        """Type into whatever has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()
        self.settle()

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {name: write_page(make(), folder / f"{name}.html") for name, make in TRACES.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Start one browser for all tests of this file, with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_script_timeout(PATIENCE_S)
    yield Page(driver)
    driver.quit()


def exact(share: float) -> str:
    """Write a share as the page does: three digits that count, in per cent."""
    value = share * 100
    if value == 0:
        return "0 %"
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e−{abs(int(exponent))} %"
    digits = min(6, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f} %"


@pytest.mark.parametrize("name", TRACES)
def test_a_page_loads_without_a_complaint_and_asks_nobody(browser: Page, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    browser.settle()
    assert browser.errors() == []
    assert browser.script("performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    assert asked, "the log of requests is empty, so this test sees nothing"
    assert {url for url in asked if not url.startswith("data:")} == {pages[name].as_uri()}


def test_a_hundred_thousand_tokens_open_in_time_and_with_few_elements(browser: Page, pages: dict[str, Path]) -> None:
    path = pages["long"]
    assert path.stat().st_size < 10e6
    seconds = []
    for _ in range(2):
        browser.open(path)
        seconds.append(browser.script("Number(document.documentElement.dataset.ready)") / 1000)
    print(f"\n100K tokens: {path.stat().st_size / 1e6:.2f} MB, ready after {min(seconds):.2f} s")
    assert min(seconds) < SECONDS_TO_LOAD
    assert browser.script("document.querySelectorAll('*').length") < 3000
    assert "shares are rounded to" in browser.text("#header")
    for figure in ("gain-strip", "read-before", "slots-over-time", "gates", "slot-write"):
        drawn = """((name) => {
          const canvas = document.getElementById(name);
          const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          return new Set(new Uint32Array(pixels.buffer)).size;
        })(arguments[0])"""
        assert browser.script(drawn, figure) > 5, figure


def test_the_head_says_what_was_read_and_what_the_memory_does(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["long"])
    head = browser.text("#header")
    for fact in (
        "babilong-tiny-lm2",
        "100,000 tokens in 391 segments",
        "Where is the milk?",
        "nats per token",
        "office",
    ):
        assert fact in head
    assert "the last segment is incomplete" in head
    assert "26 consecutive tokens are one piece" in head


def test_hovering_a_cell_tells_its_text_and_its_number(browser: Page, pages: dict[str, Path]) -> None:
    trace = lm2_trace()
    browser.open(pages["lm2"])
    for figure, name in (("read-before", "read"), ("read-after", "read_after"), ("write", "write")):
        said = browser.hover(figure, 9, 5)
        assert trace.text.pieces[9].strip() in said
        assert "slot 15" in said
        assert exact(float(getattr(trace.bank[0], name)[9, 5])) in said
    browser.hover("read-before", 9, 5)
    assert not browser.one("#tip").get_attribute("hidden")
    browser.press(Keys.ESCAPE)
    assert browser.one("#tip").get_attribute("hidden")


def test_the_slider_moves_through_the_segments(browser: Page, pages: dict[str, Path]) -> None:
    trace = lm2_trace()
    browser.open(pages["lm2"])
    before = browser.pixels("read-before")
    assert browser.text("#place").startswith("segment 1 of 12")
    browser.one("#slider").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.text("#place") == "segment 3 of 12 · tokens 64–95"
    assert browser.pixels("read-before") != before
    assert browser.text("#text-view") == "".join(trace.text.pieces[64:96])
    assert exact(float(trace.bank[0].read[64, 2])) in browser.hover("read-before", 0, 2)
    browser.one("#back").click()
    assert browser.text("#place").startswith("segment 2 of 12")
    browser.one("#slider").send_keys(Keys.END)
    assert browser.text("#place").startswith("segment 12 of 12")
    assert browser.one("#next").get_attribute("disabled")


def test_playing_goes_on_by_itself_and_stops(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["lm2"])
    browser.one("#play").click()
    assert browser.one("#play").get_attribute("aria-label") == "Pause"
    browser.wait("document.getElementById('place').textContent.startsWith('segment 3')")
    browser.one("#play").click()
    stopped_at = browser.text("#place")
    assert browser.one("#play").get_attribute("aria-label") == "Play"
    browser.driver.execute_async_script("setTimeout(arguments[0], 900)")
    assert browser.text("#place") == stopped_at


def test_switching_the_block_shows_the_other_blocks_numbers(browser: Page, pages: dict[str, Path]) -> None:
    trace = lm2_trace()
    browser.open(pages["lm2"])
    assert exact(float(trace.bank[0].read[4, 7])) in browser.hover("read-before", 4, 7)
    before = [browser.pixels(figure) for figure in ("read-before", "slots-over-time", "gates", "slot-gates")]
    browser.one("#block input").send_keys(Keys.ARROW_RIGHT)
    assert browser.script("document.querySelector('#block input:checked').value") == "1"
    after = [browser.pixels(figure) for figure in ("read-before", "slots-over-time", "gates", "slot-gates")]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert exact(float(trace.bank[1].read[4, 7])) in browser.hover("read-before", 4, 7)
    assert "of block 1" in browser.text("#slot-title")


def test_choosing_a_cell_chooses_its_slot_and_piece(browser: Page, pages: dict[str, Path]) -> None:
    trace = lm2_trace()
    browser.open(pages["lm2"])
    strip = browser.pixels("slot-read")
    browser.hover("write", 11, 4, click=True)
    assert browser.text("#slot-title") == "Slot 12 of block 0"
    assert browser.pixels("slot-read") != strip
    assert trace.text.pieces[11].strip() in browser.text("#piece")
    assert browser.one("#text-view [aria-selected=true]").get_attribute("data-column") == "11"
    (first_words, *_) = trace.bank[0].words[0][4]
    assert first_words.strip() in browser.text("#slot-words tbody tr")
    assert exact(float(trace.bank[0].write[40, 4])) in browser.hover("slot-write", 0, 40)


def test_a_slot_that_forgets_nothing_has_no_half_life(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["lm2"])
    browser.hover("write", 11, 0, click=True)
    assert "it forgets nothing" in browser.text("#slot-summary")


def test_a_strip_over_the_whole_text_leads_to_the_place(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["lm2"])
    said = browser.hover("gain-strip", 0, 200, click=True)
    assert "token 200 · segment 7" in said
    assert "with memory" in said
    assert browser.text("#place").startswith("segment 7 of 12")
    assert "token 200 · segment 7" in browser.text("#piece")


def test_every_piece_tells_its_predictions(browser: Page, pages: dict[str, Path]) -> None:
    trace = lm2_trace()
    assert trace.predictions is not None
    browser.open(pages["lm2"])
    browser.one("#text-view").click()
    browser.one("#text-view").send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 6)
    said = browser.text("#piece")
    assert trace.text.pieces[6].strip() in said
    assert f"likeliest next: “{trace.predictions.likeliest_with[6]}” with memory" in said
    assert browser.text("#spoken").startswith(f"“{trace.text.pieces[6]}”")


def test_what_a_model_read_is_shown_as_text(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["lm2"])
    assert browser.all("img") == []
    assert browser.script("document.getElementById('text-view').textContent.startsWith(arguments[0])", HOSTILE[0])
    assert browser.text("#text-view-2") == "\ufffd", "half a character is shown as one that is missing"
    assert "<i>" in browser.text("#header")
    assert browser.errors() == []


def test_the_theme_follows_the_system_until_somebody_chooses(browser: Page, pages: dict[str, Path]) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(pages["lm2"], scheme="light")
    light, heat = browser.script(paper), browser.pixels("read-before")
    browser.open(pages["lm2"], scheme="dark")
    dark = browser.script(paper)
    assert dark != light
    assert browser.pixels("read-before") != heat
    browser.one("#theme").click()
    assert browser.script(paper) == light
    assert browser.pixels("read-before") == heat
    browser.one("#theme").click()
    assert browser.script(paper) == dark
    assert browser.errors() == []


FOCUS = """(() => {
  const element = document.activeElement;
  const seen = element.matches("input[type=radio]") ? element.nextElementSibling : element;
  const style = getComputedStyle(seen);
  return [element.id || element.tagName, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0];
})()"""


@pytest.mark.parametrize("name", ["lm2", "mom", "rmt"])
def test_the_keyboard_alone_reaches_everything_and_its_place_is_seen(
    browser: Page, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name])
    reached: dict[str, bool] = {}
    for _ in range(80):
        browser.press(Keys.TAB)
        element, is_seen = browser.script(FOCUS)
        if element == "BODY":
            break
        reached[element] = is_seen
    assert reached
    assert all(reached.values()), reached
    figures = browser.script(
        "[...document.querySelectorAll('.canvas canvas')].filter((c) => c.clientWidth).map((c) => c.id)"
    )
    assert set(figures) <= set(reached)
    assert {"slider", "play", "theme", "text-view"} <= set(reached)


def test_the_arrow_keys_read_a_heat_map_aloud(browser: Page, pages: dict[str, Path]) -> None:
    trace = lm2_trace()
    browser.open(pages["lm2"])
    browser.script("document.getElementById('read-before').focus()")
    browser.press(Keys.HOME)
    browser.press(Keys.HOME)
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    said = browser.text("#spoken")
    assert "slot 6" in said
    assert exact(float(trace.bank[0].read[1, 2])) in said
    assert not browser.one("#tip").get_attribute("hidden")
    browser.press(Keys.ENTER)
    assert browser.text("#slot-title") == "Slot 6 of block 0"
    assert browser.script("document.activeElement.id") == "read-before"


@pytest.mark.parametrize("name", TRACES)
def test_a_narrow_screen_never_scrolls_sideways(browser: Page, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], size=NARROW)
    browser.settle()
    width = browser.script("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
    assert width <= NARROW[0]
    assert browser.errors() == []


def test_the_layer_switch_shows_another_layer_of_a_mixture(browser: Page, pages: dict[str, Path]) -> None:
    trace = mom_trace()
    browser.open(pages["mom"])
    assert browser.text("#layer-summary") == "update rule gated_deltanet4 routed memoriesand one that all tokens share"
    top = [int(weights.argmax()) for weights in trace.mixture[0].weights[:64]]
    shown = "[...document.querySelectorAll('#memory-text span')].map((span) => Number(span.dataset.memory))"
    assert browser.script(shown) == top
    before = [browser.pixels(figure) for figure in ("memory-strip", "weights", "entropy", "state-norm")]
    browser.one("#layer input").send_keys(Keys.ARROW_RIGHT)
    assert browser.script(shown) == [int(weights.argmax()) for weights in trace.mixture[1].weights[:64]]
    after = [browser.pixels(figure) for figure in ("memory-strip", "weights", "entropy", "state-norm")]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert browser.errors() == []


def test_memories_are_told_apart_without_colours(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["mom"])
    styles = (
        "[...document.querySelectorAll('#memory-text span')].map(({dataset, style}) => [dataset.memory, style.STYLE])"
    )
    styles = styles.replace("STYLE", "textDecorationStyle")
    pairs = {tuple(pair) for pair in browser.script(styles)}
    assert len({memory for memory, _ in pairs}) == len({style for _, style in pairs}) == len(pairs) > 1
    browser.one("#numbers").click()
    number = "getComputedStyle(document.querySelector('#memory-text span'), '::after').content"
    assert browser.script(number) == f'"{mom_trace().mixture[0].weights[0].argmax()}"'


def test_contributions_to_a_reader_are_listed_and_lead_to_their_place(browser: Page, pages: dict[str, Path]) -> None:
    contribution = mom_trace().mixture[0].contributions[0]
    browser.open(pages["mom"])
    largest = int(abs(contribution.shares).argmax())
    row = browser.text("#contributors tbody tr")
    assert f"token {largest}" in row
    assert exact(float(contribution.shares[largest])).replace("-", "−") in row
    last = browser.all("#contributors tbody tr")[-1].text
    assert "before the text" in last
    assert exact(contribution.before) in last
    browser.script("document.getElementById('contributors').scrollIntoView({block: 'center', behavior: 'instant'})")
    browser.one("#contributors button").click()
    assert f"token {largest} · " in browser.text("#piece")
    browser.one("#contribution").send_keys(Keys.ARROW_DOWN)
    assert browser.text("#contributors tbody tr") != row


def test_a_layer_whose_rule_is_not_linear_shows_no_contributions(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["mom"])
    assert browser.one("#contributors").is_displayed()
    browser.one("#layer input").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.script("document.querySelector('#layer input:checked').value") == "2"
    assert not browser.one("#contributors").is_displayed()


def test_memory_tokens_show_norms_changes_and_reads(browser: Page, pages: dict[str, Path]) -> None:
    trace = rmt_trace()
    assert trace.token_memory is not None
    browser.open(pages["rmt"])
    assert exact(float(trace.token_memory.read[7, 3])) in browser.hover("token-reads", 7, 3)
    assert "memory token 6 · segment 5" in browser.hover("norms", 6, 4, click=True)
    assert browser.text("#place").startswith("segment 5 of 14")
    assert browser.script("document.getElementById('unit').value") == "6"


def test_the_causal_check_puts_the_most_important_part_first(browser: Page, pages: dict[str, Path]) -> None:
    check = lm2_trace().knock_outs
    assert check is not None
    browser.open(pages["lm2"])
    rows = [row.text for row in browser.all("#knock-outs tbody tr")]
    assert len(rows) == len(check.parts)
    worst = min(check.parts, key=lambda part: part.log_probability)
    assert rows[0].startswith(worst.name)
    assert f"{exact(math.exp(check.log_probability))} → {exact(math.exp(worst.log_probability))}" in rows[0]


def test_an_explanation_always_shows_its_score(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["lm2"])
    good, failed = (article.text for article in browser.all("#explanations article"))
    assert "score 0.620 on 512 held-out tokens" in good
    assert "score undefined on 512 held-out tokens" in failed
    assert "nobody answers" in failed
    browser.open(pages["mom"])
    assert "No unit was explained" in browser.text("#explanations")


def test_a_trace_without_parts_says_so(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["empty"])
    assert [heading.text for heading in browser.all("h2")] == ["Text", "Causal check", "Explanations"]
    assert "No prediction without the memory was recorded" in browser.text("#header")
    assert "Nothing was asked" in browser.text("#knock-outs")


def test_a_long_segment_is_shown_in_parts(browser: Page, tmp_path: Path) -> None:
    trace: Trace = lm2_trace([600, 40], num_slots=4, num_blocks=1)
    browser.open(write_page(trace, tmp_path / "page.html"))
    assert browser.text("#place") == "segment 1 of 2, part 1 of 3 · tokens 0–255"
    browser.one("#slider").send_keys(Keys.END)
    assert browser.text("#place") == "segment 2 of 2 · tokens 600–639"
    assert browser.errors() == []


def test_printing_is_light_and_leaves_the_controls_out(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["lm2"], scheme="dark")
    browser.emulate({}, media="print")
    assert browser.script("getComputedStyle(document.getElementById('bar')).display") == "none"
    browser.script("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.script("document.documentElement.dataset.theme") == "light"
    browser.script("window.dispatchEvent(new Event('afterprint'))")
    browser.emulate({"prefers-color-scheme": "dark"})


def test_nothing_moves_by_itself_where_motion_is_unwelcome(browser: Page, pages: dict[str, Path]) -> None:
    behavior = "getComputedStyle(document.documentElement).scrollBehavior"
    browser.open(pages["empty"])
    assert browser.script(behavior) == "auto"
    browser.emulate({"prefers-reduced-motion": "no-preference"})
    assert browser.script(behavior) == "smooth"
