"""The page of runs in Chromium: what its switches show, and that names of others stay text."""

import shutil

import pytest

from infer.compare.contents import gather
from infer.compare.page import html, html_of
from tests.support.compared import copied, evaluations, make_runs

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> $$\\frac12$$ @y"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_cache, tiny_sd):
    """Two runs, evaluated while they trained, one with previews, and one of a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    made = make_runs(folder, tiny_sd, small_cache)
    runs = [*made.values(), copied(made["pcm"], folder / HOSTILE.replace("/", "|"))]
    for run in runs:
        evaluations(run, (2, 90.0, None), (4, 70.0, None))
    return runs


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a page of these runs; in the end nothing has gone wrong, and nothing was fetched."""
    wrong, pages = [], []

    def opened(runs, refresh=0, width=1200):
        path = tmp_path / "index.html"
        path.write_text(html(gather(runs), refresh))
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        page.on("console", lambda m: wrong.append(m.text) if m.type in LOUD else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: wrong.append(r.url) if r.url[:5] not in HERE else None)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
        return page

    yield opened
    for page in pages:
        page.close()
    assert wrong == []


LOUD, HERE = ("error", "warning"), ("file:", "data:")
PLOT = "Bokeh.documents[%d].roots()[0].children[0]"


PLACE = """(run) => {
  const plot = Bokeh.documents[1].roots()[0].children[0];
  const { frame, el } = Bokeh.index.find_one(plot);
  const { x, y } = plot.renderers.find((one) => one.data_source.tags[0] === run).data_source.data;
  const box = el.getBoundingClientRect();
  return [box.x + frame.x_scale.compute(x[0]), box.y + frame.y_scale.compute(y[0])];
}"""


def shown(page, chart, what):
    return page.evaluate(f"{PLOT % chart}.{what}")


def until(page, condition):
    """Wait for JavaScript to be true; the page's policy lets no `wait_for_function` work."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{condition} did not come about")


def test_the_switches_change_what_the_curves_show(show, runs):
    page = show(runs)
    source = "renderers[0].data_source.data"
    assert list(page.evaluate(f"[...{PLOT % 0}.{source}.x]")) == [1, 2, 3, 4]
    assert shown(page, 0, "x_range.end") > 4
    page.locator("#measure label", has_text="sample").click()
    for chart, wanted in ((0, [2, 4, 6, 8]), (1, [4, 8])):
        assert list(page.evaluate(f"[...{PLOT % chart}.{source}.x]")) == wanted
        assert shown(page, chart, "below[0].axis_label") == "sample"
        until(page, f"{PLOT % chart}.x_range.end > {wanted[-1]}")
    page.locator("#measure label", has_text="hour").click()
    until(page, f"{PLOT % 0}.x_range.end < 1")
    assert shown(page, 0, "left[0].type") == "LinearAxis"
    page.locator(".toggle").click()
    assert shown(page, 0, "left[0].type") == "LogAxis"
    assert shown(page, 0, "below[0].axis_label") == "hour"
    page.locator(".legend button").nth(1).click()
    visible = page.evaluate(f"{PLOT % 0}.renderers.map((one) => one.visible)")
    assert visible == [True, True, False, False, True, True]
    page.locator(".legend button").nth(1).click()
    assert all(page.evaluate(f"{PLOT % 0}.renderers.map((one) => one.visible)"))


def test_the_slider_and_the_steps_change_the_pictures(show, runs):
    page = show(runs[:1])
    picture = page.locator("#previews .column img").first
    told = page.locator("#previews .at").first
    assert told.inner_text() == "step 4, 4 steps"
    last = picture.get_attribute("src")
    assert last.startswith("data:image/webp;base64,")
    page.locator("#step").fill("0")
    assert page.locator("#step-shown").inner_text() == "2"
    assert told.inner_text() == "step 2, 4 steps"
    before = picture.get_attribute("src")
    assert before != last
    page.locator("#column label", has_text="1 step").click()
    assert told.inner_text() == "step 2, 1 step"
    assert picture.get_attribute("src") not in (before, last)
    loaded = "[...document.querySelectorAll('#previews img')].every((one) => one.naturalWidth > 0)"
    until(page, loaded)


def test_a_hostile_name_is_text_also_where_the_mouse_points(show, runs):
    page = show(runs)
    assert page.locator(".legend bdi").nth(2).inner_text() == HOSTILE.replace("/", "|")
    page.locator(".legend button").nth(0).click()
    page.locator(".legend button").nth(1).click()
    page.locator(".chart").nth(1).scroll_into_view_if_needed()
    until(page, f"{PLOT % 1}.renderers.filter((one) => one.visible).length === 2")
    x, y = page.evaluate(PLACE, 2)
    page.mouse.move(x - 20, y - 20)
    page.mouse.move(x, y)
    tip = page.locator(".bk-tooltip-content").first
    tip.wait_for(timeout=30_000)
    assert HOSTILE.replace("/", "|") in tip.inner_text()
    assert page.title() == "3 runs side by side"
    assert page.locator("img[onerror], .bk-tooltip-content img").count() == 0


def test_a_phone_is_wide_enough(show, runs):
    page = show(runs, width=360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_watched_page_loads_itself_again_and_stays_where_the_reader_was(show, runs):
    page = show(runs, refresh=1)
    page.evaluate("document.body.dataset.old = ''")
    page.locator("#measure label", has_text="sample").click()
    page.locator("#step").fill("0")
    page.locator(".legend button").nth(1).click()
    page.locator("summary").last.click()
    page.evaluate("scrollTo(0, 500)")
    page.wait_for_selector("body:not([data-old])", state="attached", timeout=60_000)
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
    assert page.evaluate("scrollY") == 500
    assert page.locator("#step-shown").inner_text() == "2"
    assert page.locator("#measure input:checked").get_attribute("value") == "sample"
    assert shown(page, 0, "below[0].axis_label") == "sample"
    assert page.locator(".legend button").nth(1).get_attribute("aria-pressed") == "false"
    assert page.locator("details").last.get_attribute("open") is not None


def test_in_a_sandbox_of_another_page(browser, runs, tmp_path):
    """As the page of `infer page` shows it: an iframe's srcdoc that may run scripts only."""
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto("about:blank")
    page.evaluate(
        """(text) => { const frame = document.createElement("iframe");
        frame.sandbox = "allow-scripts"; frame.srcdoc = text; document.body.append(frame); }""",
        html_of(runs),
    )
    frame = page.frames[1]
    frame.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
    frame.locator("#measure label", has_text="sample").dispatch_event("click")
    assert frame.evaluate(f"{PLOT % 0}.below[0].axis_label") == "sample"
    page.close()
    assert wrong == []
