"""The pages as people see them, in Chromium: no request, no error, light and dark, mouse and key.

Skipped where playwright or Debian's chromium is missing.
"""

import shutil
from contextlib import contextmanager

import pytest

from conftest import box, write_detections, write_image
from dataset import images
from gallery.report import write_report
from metrics.result_page import write_page
from test_page import EVIL
from test_report import answer, hit, square
from test_tables import query, result

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)

PAGES = ["report", "result"]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'>"
LONG = "a-name-without-any-place-to-break-it-" * 4

# The lowest contrast of text on the page, as WCAG computes it, and that text. What is folded up
# is looked at too. A text in SVG has its colour in `fill`, and the map's ground behind it.
CONTRAST = """() => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).slice(0, 3).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if ((parts(colour)[3] ?? 1) === 1) return colour;
    }
  };
  let least = [99, "no text"];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const isShown = element.getClientRects().length > 0 && walker.currentNode.data.trim();
    if (!isShown) continue;
    const style = getComputedStyle(element);
    const pair = [element.closest("svg") ? style.fill : style.color, behind(element)].map(light);
    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (contrast < least[0]) least = [contrast, walker.currentNode.data];
  }
  return least;
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # Tests may run as root, where Chromium has no sandbox.
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A report and a result page, with hostile and long names: {"report": path, ...}."""
    folder = tmp_path_factory.mktemp("pages")
    names = [f"{i}.png" for i in range(4)]
    pictures = [write_image(folder / name, (100, 80)) for name in names]
    detections = [write_detections(folder / "a.json", [box(20, 15, 30, 20), box(60, 50)])] * 4

    items = [{"image": i, "score": 0.1, "own": i == 0} for i in range(4)]
    captions = [{"caption": HOSTILE + LONG, "times": 2, "score": 0.1, "own": True}]
    chosen = {
        ("image_to_text", "worst"): [query("image_to_text", i, HOSTILE, captions) for i in (0, 1)],
        ("text_to_image", "best"): [query("text_to_image", i, EVIL, items) for i in (2, 3)],
    }
    shown = result()
    shown["per_image"]["names"] = [HOSTILE, LONG, EVIL, "d.png"]
    write_page(folder / "result.html", shown, chosen, pictures, detections)

    def picture(path, window):
        return images.open_image(pictures[0])

    objects = [
        {"label": HOSTILE, "box": [20, 15, 30, 20, 0], "matters": 0.1},
        {"label": "ship", "box": [60, 50, 10, 5, 0.5], "matters": -0.1},
    ]
    statements = [{"statement": HOSTILE, "evidence": evidence} for evidence in (0.1, -0.1)]
    hits = [
        hit(
            rank,
            path=f"{HOSTILE}/{LONG}",
            boxes=objects,
            statements=statements,
            counts={HOSTILE: 2},
            lat=10.0,
            lon=10.0,
            footprint=square(10 + 0.01 * rank, 10, 0.008),
        )
        for rank in (1, 2, 3)
    ]
    answers = [
        answer(hits, text=HOSTILE + LONG, where=HOSTILE, pixels_only=[HOSTILE]),
        answer(hits, text="two ships", fits=False),
    ]
    write_report(folder / "report.html", answers, picture)
    return {name: folder / f"{name}.html" for name in PAGES}


@contextmanager
def opened(browser, file, size="desktop", scheme="light", script=True):
    """A page in a window of its own; fails on requests, errors, dialogs and console lines."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        java_script_enabled=script,
    )
    page = context.new_page()
    requests, said = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append("dialog") or dialog.dismiss())
    page.goto(file.as_uri())
    yield page
    context.close()
    assert {url for url in requests if not url.startswith("data:")} == {file.as_uri()}
    assert said == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_the_window_and_are_readable_light_and_dark(browser, files, name, size):
    grounds = set()
    for scheme in ("light", "dark"):
        with opened(browser, files[name], size, scheme) as page:
            contrast, text = page.evaluate(CONTRAST)
            assert contrast >= 4.5, (scheme, text)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width == SIZES[size][0]
            smallest = page.evaluate(
                "Math.min(...[...document.querySelectorAll('main *')]"
                ".map((one) => parseFloat(getComputedStyle(one).fontSize)))"
            )
            assert smallest >= 11.5
            grounds.add(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
            broken = page.evaluate("[...document.images].filter((one) => !one.naturalWidth).length")
            assert broken == 0
    assert len(grounds) == 2


@pytest.mark.parametrize("name", PAGES)
def test_boxes_are_switched_by_mouse_and_key(browser, files, name):
    with opened(browser, files[name]) as page:
        boxes = page.locator(".picture svg").first
        assert boxes.is_visible()
        page.get_by_label("Boxes").click()
        assert not boxes.is_visible() and page.locator(".marks:visible").count() == 0
        assert page.locator(".picture img").first.is_visible()
        page.keyboard.press("b")
        assert boxes.is_visible()
        page.keyboard.press("Control+b")  # the browser's own
        assert boxes.is_visible()


@pytest.mark.parametrize("name", PAGES)
def test_boxes_lie_over_their_picture(browser, files, name):
    with opened(browser, files[name], "phone") as page:
        picture = page.locator(".picture img").first.bounding_box()
        assert page.locator(".picture svg").first.bounding_box() == picture
        # The polygon of the box that reaches from 5 to 35 of 100 pixels.
        left, width = page.locator(".picture polygon[points^='5.0,5.0']").first.evaluate(
            """(one) => {
              const box = one.getBBox(), matrix = one.getScreenCTM();
              return [matrix.a * box.x + matrix.e, matrix.a * box.width];
            }"""
        )
        scale = picture["width"] / 100
        assert (left - picture["x"], width) == pytest.approx((5 * scale, 30 * scale), abs=0.1)


@pytest.mark.parametrize("name", PAGES)
def test_keys_go_from_hit_to_hit(browser, files, name):
    with opened(browser, files[name]) as page:
        stops = page.eval_on_selector_all(".stop", "all => all.map((one) => one.id)")
        assert len(stops) >= 4

        def after(key):
            page.keyboard.press(key)
            return page.evaluate("document.activeElement.id")

        found = [after(key) for key in ("j", "j", "ArrowRight", "k", "ArrowLeft", "k")]
        assert found == [stops[place] for place in (0, 1, 2, 1, 0, 0)]
        for _ in stops:
            after("j")
        assert page.evaluate("document.activeElement.id") == stops[-1]
        place = page.locator(f"#{stops[-1]}").bounding_box()
        assert 0 < place["y"] < SIZES["desktop"][1]
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert outline == "3px"
        keys = page.locator("#keys div")
        assert not keys.is_visible()
        page.keyboard.press("?")
        assert keys.is_visible()


@pytest.mark.parametrize("name", PAGES)
def test_the_list_of_contents_leads_to_every_query_without_script(browser, files, name):
    with opened(browser, files[name], "phone", script=False) as page:
        for folded in page.locator(".contents summary").all():
            folded.click(position={"x": 2, "y": 10})
        links = page.locator(".contents a").all()
        assert len(links) >= 2
        for link in links:
            link.click()
            target = page.locator(link.get_attribute("href"))
            # Below the bar; the last ones end with the page.
            assert 30 < target.bounding_box()["y"] < SIZES["phone"][1]
        page.get_by_label("Boxes").click()
        assert page.locator(".marks:visible").count() == 0


def test_a_hit_marks_its_footprint_which_leads_to_it(browser, files):
    with opened(browser, files["report"]) as page:
        marked = page.locator(".marked")
        assert marked.count() == 0
        page.keyboard.press("j")
        page.keyboard.press("j")
        assert marked.get_attribute("id") == "map-query-1-hit-2"
        page.locator("#query-2-hit-3").hover()
        assert marked.get_attribute("id") == "map-query-2-hit-3"
        page.locator("#map-query-1-hit-3 polygon").click()
        assert page.evaluate("document.activeElement.id") == "query-1-hit-3"


def test_evidence_is_folded_up_and_opens_by_key(browser, files):
    with opened(browser, files["report"]) as page:
        folded = page.locator("#query-1-hit-1 details")
        assert not folded.locator("ul").first.is_visible()
        page.keyboard.press("j")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert folded.locator("ul").first.is_visible()


def test_a_script_that_gets_into_a_page_does_not_run(browser, files, tmp_path):
    text = files["report"].read_text(encoding="utf-8")
    spoilt = tmp_path / "spoilt.html"
    added = (
        "<h1><script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\">"
    )
    spoilt.write_text(text.replace("<h1>", added, 1), encoding="utf-8")
    page = browser.new_page()
    page.goto(spoilt.as_uri())
    assert page.title() == "Search report"
    page.close()
