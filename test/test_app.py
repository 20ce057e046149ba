"""The page of search.py serve: its functions, its server, its API, and the page in Chromium."""

import importlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lancedb", reason="pip install -r requirements-search.txt")
pytest.importorskip("gradio", reason="pip install -r requirements-app.txt")
pytest.importorskip("rasterio", reason="pip install -r requirements-geo.txt")

import httpx
import rasterio
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import model
from backbones.model_configs import read_model_config
from conftest import ROOT, write_image
from det_formats.det_json import LABELS, read_label_map
from evidence import Evidence, as_field, shipped_tables
from galleries import index, write_tiles
from gallery import app
from gallery.local_gradio import FOLDER, MOST_BYTES, MOST_SENT, refusal
from gallery.searching import Search
from options import default_options

STRANGE = "north/<b>it's.png"
TILES = 14  # twelve, the strange one, and one with a place


def write_placed(path):
    """A GeoTIFF of 40 x 40 pixels of 0.001 degrees, its upper left corner at 8 east, 47 north."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 40), dtype=np.uint8)
    form = {"driver": "GTiff", "width": 40, "height": 40, "count": 3, "dtype": "uint8"}
    transform = rasterio.transform.from_origin(8, 47, 0.001, 0.001)
    with rasterio.open(path, "w", crs="EPSG:4326", transform=transform, **form) as file:
        file.write(pixels)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """An index of a small model with random weights."""
    folder = write_tiles(tmp_path_factory.mktemp("app"))
    write_image(folder / "imgs" / STRANGE)
    write_placed(folder / "imgs" / "placed.tif")
    label_map = read_label_map(LABELS)
    labels = label_map.lines
    options = {**default_options("train"), "graph": "none"}
    config = read_model_config("small")
    torch.manual_seed(0)
    network = model.build(config, labels, options)
    field = as_field(Evidence(shipped_tables(len(label_map)), weight=0.25))
    model.save_checkpoint(folder / "m.pth", network, config, labels, options, evidence=field)
    return index(folder, folder / "m.pth")


@pytest.fixture(scope="module")
def searcher(gallery):
    return Search(gallery, torch.device("cpu"))


def found_by(
    searcher, sentence="a ship", image=None, without="", where="", number=60, near="", within=10
):
    return app.search(searcher, sentence, image, without, where, number, near, within)


def ids(answer):
    return [hit["id"] for hit in answer["hits"]]


# ------------------------------------------------------------------ the functions


def test_a_sentence_finds_tiles_best_first(searcher):
    answer = found_by(searcher, " a ship ", number=5.0)
    scores = [hit["score"] for hit in answer["hits"]]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)
    assert answer["query"]["text"] == "a ship" and answer["searched"] == TILES


def test_filters_and_places_choose_among_tiles(searcher):
    hits = found_by(searcher, where="airplane >= 2")["hits"]
    assert hits and all(hit["counts"]["airplane"] >= 2 for hit in hits)
    # Its centre is 20 pixels from the corner: latitude 46.98, longitude 8.02.
    assert ids(found_by(searcher, near="46.98, 8.02", within=0.1)) == ["placed.tif"]
    assert found_by(searcher, where="objects > 99")["hits"] == []


def test_what_is_not_wanted_takes_from_the_score(searcher):
    before = {hit["id"]: hit["score"] for hit in found_by(searcher)["hits"]}
    after = {hit["id"]: hit["score"] for hit in found_by(searcher, without="a ship")["hits"]}
    # The same sentence is taken off with half of its weight.
    assert after == pytest.approx({tile: score / 2 for tile, score in before.items()}, abs=1e-5)


def test_an_image_finds_itself(searcher):
    answer = found_by(searcher, sentence="", image=searcher.images / STRANGE)
    assert answer["query"]["image"] == "<b>it's.png"
    assert ids(answer)[0] == STRANGE and answer["hits"][0]["score"] == pytest.approx(1, abs=1e-3)


def test_more_like_a_tile_leaves_it_out(searcher):
    answer = app.more_like_this(searcher, STRANGE, "", "", 5, "", 10)
    assert answer["query"]["image"] == STRANGE and STRANGE not in ids(answer)
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3, 4, 5]


def test_why_is_the_hit_of_a_search(searcher):
    for hit in found_by(searcher, "two ships")["hits"]:
        explained = app.why(searcher, hit["id"], "two ships", "", "")
        assert explained.keys() == hit.keys() - {"rank"} and explained["path"] == hit["path"]
        assert explained["score"] == pytest.approx(hit["score"], abs=1e-5)
        assert explained["statements"] == hit["statements"]
    other = ids(app.more_like_this(searcher, STRANGE, "", "", 1, "", 10))[0]
    assert app.why(searcher, other, "", STRANGE, "")["statements"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentence": "  "}, "nothing to look for: type a sentence or choose an image"),
        ({"sentence": "a" * 1001}, "a sentence has at most 1000 characters, this one 1001"),
        ({"sentence": 7}, "expected a text, found 7"),
        ({"where": "boat > 1"}, "no column 'boat' at character 1.*columns: airplane, "),
        ({"number": 0}, "results: expected a whole number from 1 to 60"),
        ({"number": 61}, "results: expected a whole number from 1 to 60"),
        ({"number": 2.5}, "results: expected a whole number from 1 to 60"),
        ({"number": "many"}, "results: expected a whole number from 1 to 60"),
        ({"near": "47"}, "near: expected latitude and longitude in degrees, as 47.37, 8.54"),
        ({"near": "47 east"}, "near: expected latitude and longitude in degrees"),
        ({"near": "47, 8", "within": None}, "near: expected .* and a distance in kilometres"),
        ({"near": "97, 8"}, "latitude is between -90 and 90 degrees"),
    ],
)
def test_a_mistake_is_told_in_words(searcher, changes, message):
    with pytest.raises(ValueError, match=message):
        found_by(searcher, **changes)


@pytest.mark.parametrize("tile", ["../../etc/passwd", "/etc/passwd", "", "t01", None, ["t01.png"]])
def test_a_tile_that_is_not_in_the_index_is_refused(searcher, tile):
    with pytest.raises(ValueError, match="no tile .* in the index|expected a text, found"):
        app.more_like_this(searcher, tile, "", "", 5, "", 10)
    with pytest.raises(ValueError, match="no tile .* in the index|expected a text, found"):
        app.why(searcher, tile, "a ship", "", "")


def test_why_takes_a_sentence_or_a_tile(searcher):
    for sentence, like in (("", ""), ("a ship", STRANGE)):
        with pytest.raises(ValueError, match="expected a sentence, or a tile in like"):
            app.why(searcher, STRANGE, sentence, like, "")


def test_images_that_are_broken_or_too_large_are_refused_by_name(searcher, tmp_path):
    broken, large = tmp_path / "broken.png", tmp_path / "large.png"
    broken.write_bytes(b"\x89PNG, but no more")
    Image.new("1", (5000, 5001)).save(large)
    with pytest.raises(ValueError, match="^broken.png: not readable as an image"):
        found_by(searcher, image=broken)
    with pytest.raises(ValueError, match="^large.png: 5000 x 5001 pixels; at most 25,000,000"):
        found_by(searcher, image=large)


# ------------------------------------------------------------------ the server


def request(path="/", host="127.0.0.1:7860", **headers):
    pairs = [(b"host", host.encode())]
    pairs += [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    return {"type": "http", "path": path, "headers": pairs}


@pytest.mark.parametrize(
    ("scope", "status"),
    [
        (request(), None),
        (request(host="localhost:7860"), None),
        (request("/gradio_api/queue/join", origin="http://127.0.0.1:7860"), None),
        (request("/assets/index.js"), None),
        (request(host="a.example:7860"), 403),  # a name that leads here
        (request(host="127.0.0.1.a.example"), 403),
        (request(host=""), 403),
        (request(host="[:"), 403),
        (request(origin="http://a.example"), 403),  # another site's page
        (request(origin="http://127.0.0.1:8888"), 403),  # and one of another program here
        (request(origin="null"), 403),
        ({**request(), "type": "websocket"}, 403),
        (request("/gradio_api/file=/etc/passwd"), 404),
        (request("/gradio_api/file=http://a.example"), 404),
        (request("/gradio_api/proxy=http://a.example"), 404),
        (request("/gradio_api/process_recording"), 404),
        (request("/gradio_api/run/search"), 404),  # past the queue
        (request("/monitoring"), 404),
        (request("/gradio_api/upload", content_length=str(MOST_SENT)), None),
        (request("/gradio_api/upload", content_length=str(MOST_SENT + 1)), 413),
        (request("/gradio_api/upload", content_length="many"), 413),
    ],
)
def test_the_server_answers_its_own_page_alone(scope, status):
    assert refusal(scope)[0] == status


def test_without_gradio_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "set anew by the import, as before afterwards")
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "gallery.local_gradio")
    with pytest.raises(ValueError, match="needs Gradio: pip install -r requirements-app.txt"):
        importlib.import_module("gallery.local_gradio")


def test_a_port_in_use_is_named(searcher):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"^--port {port}: not free .*name another one$"):
            app.start(searcher, port)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def address(searcher):
    with app.opened(searcher, free_port()) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    # It would download whatever has a path.
    return Client(address, verbose=False, download_files=False)


def test_the_functions_are_an_api(searcher, client):
    answer = client.predict(sentence="a ship", where="ship > 0", number=3, api_name="/search")
    expected = found_by(searcher, where="ship > 0", number=3)
    assert ids(answer) == ids(expected) and answer["query"] == expected["query"]
    assert answer["hits"][0]["boxes"] == expected["hits"][0]["boxes"]
    image = handle_file(searcher.images / STRANGE)
    assert ids(client.predict(image=image, number=1, api_name="/search")) == [STRANGE]
    answer = client.predict(tile=STRANGE, number=2, api_name="/more_like_this")
    assert len(answer["hits"]) == 2 and STRANGE not in ids(answer)
    hit = client.predict(tile=STRANGE, sentence="a ship", api_name="/why")
    assert hit["path"] == STRANGE and hit["score"] == pytest.approx(hit["pixels"] + hit["objects"])
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {
        "/search",
        "/more_like_this",
        "/why",
    }


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("search", {}, "nothing to look for"),
        ("search", {"sentence": "a ship", "where": "boat > 1"}, "^filter: no column 'boat'"),
        ("more_like_this", {"tile": "../../etc/passwd"}, "no tile ../../etc/passwd in the index"),
        ("why", {"tile": "../../etc/passwd", "sentence": "a"}, "no tile ../../etc/passwd in the"),
    ],
)
def test_the_api_tells_mistakes_in_words(client, call, arguments, message):
    with pytest.raises(AppError, match=message):
        client.predict(**arguments, api_name=f"/{call}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/passwd", "not uploaded by a user"),
        (STRANGE, "not uploaded by a user"),
        ("http://127.0.0.1/a.png", "an address is not fetched: send the file itself"),
    ],
)
def test_an_image_is_one_that_was_sent(searcher, address, path, message):
    if path == STRANGE:
        path = str(searcher.images / STRANGE)
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    call = f"{address}/gradio_api/call/search"
    event = httpx.post(call, json={"data": ["", image, "", "", 3, "", 10]}).json()
    assert message in httpx.get(f"{call}/{event['event_id']}").text


def test_uploads_are_limited_and_files_are_not_given_out(address):
    def sent(number):
        files = {"files": ("a.png", b"0" * number)}
        return httpx.post(f"{address}/gradio_api/upload", files=files)

    small = sent(100)
    assert small.status_code == 200 and small.json()[0].startswith(FOLDER)
    assert stat.S_IMODE(os.stat(FOLDER).st_mode) == 0o700
    assert sent(MOST_BYTES + 1).status_code == 413
    for path in ("/etc/passwd", *small.json()):
        assert httpx.get(f"{address}/gradio_api/file={path}").status_code == 404
    without_length = (b"0" * 2**20 for _ in range(MOST_SENT // 2**20 + 1))
    answer = httpx.post(f"{address}/gradio_api/call/search", content=without_length)
    assert answer.status_code == 400


def test_a_page_of_another_site_gets_nothing(address):
    for headers in ({"host": "a.example"}, {"origin": "http://a.example"}):
        assert httpx.get(address, headers=headers).status_code == 403
    assert "default-src 'self'" in httpx.get(address).headers["content-security-policy"]


def test_the_model_answers_one_query_at_a_time(searcher, client, monkeypatch):
    inside, most = [], []

    def slow(function):
        def answer(*arguments):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()
            return function(*arguments)

        return answer

    monkeypatch.setattr(searcher, "answers", slow(searcher.answers))
    monkeypatch.setattr(searcher, "hit_of", slow(searcher.hit_of))
    jobs = []
    for _ in range(2):
        jobs.append(client.submit(sentence="a ship", api_name="/search"))
        jobs.append(client.submit(tile=STRANGE, api_name="/more_like_this"))
        jobs.append(client.submit(tile=STRANGE, sentence="a ship", api_name="/why"))
    assert all(job.result() for job in jobs)
    assert most == [1] * 6


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_and_nothing_is_left(gallery, tmp_path, number):
    port = free_port()
    variables = {  # which could open the page to others, and stop Gradio from finding itself
        "TMPDIR": str(tmp_path),
        "GRADIO_SHARE": "true",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_ALLOWED_PATHS": "/",
        "http_proxy": "http://127.0.0.1:9",
    }
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "search.py",
            "serve",
            gallery,
            "--port",
            str(port),
            "--device",
            "cpu",
        ],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        line = process.stdout.readline()
        assert line == f"http://127.0.0.1:{port} shows {TILES} tiles; Ctrl+C stops it\n"
        assert httpx.get(f"http://127.0.0.1:{port}", trust_env=False).status_code == 200
        assert list(tmp_path.glob("search-*"))
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
        assert process.stdout.read() == "" and "Traceback" not in process.stderr.read()
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        process.wait()


# ------------------------------------------------------------------ in Chromium


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        # Tests may run as root, where Chromium has no sandbox.
        running = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@contextmanager
def visited(browser, address, size="desktop", scheme="light"):
    """The page in a window of its own; fails on requests to others, errors, console lines."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
    )
    tab = context.new_page()
    others, said = [], []

    def look_at(request):
        if not request.url.startswith((f"{address}/", "data:", "blob:")):
            others.append(request.url)

    tab.on("request", look_at)
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(address)
    tab.get_by_label("Sentence").wait_for()
    yield tab
    context.close()
    # Gradio warns so at the end of each upload.
    assert others == [] and [line for line in said if line != "Method not implemented."] == []


def unfold(tab):
    """Show the fields below the sentence."""
    tab.get_by_text("Image, filter, number of results").click()
    tab.get_by_text("storage_tank").wait_for()
    # Gradio writes the first values of fields a moment after it shows them, over what was typed.
    tab.wait_for_timeout(1000)


def ask(tab, sentence="a ship"):
    tab.get_by_label("Sentence").fill(sentence)
    tab.keyboard.press("Enter")
    tab.locator("h2", has_text=sentence).wait_for()


def paths(tab):
    return tab.locator(".hit .path").all_text_contents()


@pytest.mark.slow
def test_a_sentence_brings_tiles_with_boxes_that_are_switched(browser, address, searcher):
    with visited(browser, address) as tab:
        ask(tab)
        expected = found_by(searcher, number=12)
        assert paths(tab) == ids(expected)
        assert tab.locator("article b").count() == 0  # of a file's name
        assert tab.locator(".picture polygon").count() == sum(
            len(hit["boxes"]) for hit in expected["hits"]
        )
        boxes = tab.locator(".picture svg").first
        assert boxes.is_visible()
        tab.get_by_label("Boxes").click()
        assert not boxes.is_visible()
        tab.keyboard.press("Space")
        assert boxes.is_visible()
        summary = tab.locator("summary").first
        summary.press("Enter")
        assert tab.get_by_text("The score is the sum of").first.is_visible()


@pytest.mark.slow
def test_a_filter_and_its_mistake(browser, address, searcher):
    with visited(browser, address) as tab:
        unfold(tab)
        tab.get_by_label("Filter").fill("ship > 0")
        ask(tab)
        assert paths(tab) == ids(found_by(searcher, where="ship > 0", number=12))
        tab.get_by_label("Filter").fill("boat > 0")
        tab.keyboard.press("Enter")
        alert = tab.get_by_role("alert")
        alert.wait_for()
        assert "filter: no column 'boat' at character 1" in alert.text_content()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["mouse", "key"])
def test_more_like_a_tile(browser, address, searcher, by):
    with visited(browser, address) as tab:
        ask(tab)
        row = paths(tab).index(STRANGE)
        button = tab.locator(".like").nth(row)
        if by == "mouse":
            button.click()
        else:
            button.focus()
            tab.keyboard.press("Enter")
        head = tab.locator("h2", has_text=STRANGE)
        head.wait_for()
        like = app.more_like_this(searcher, STRANGE, "", "", 12, "", 10)
        assert paths(tab) == ids(like)
        assert head.locator("img").is_visible()
        tab.wait_for_function("document.activeElement.tagName === 'H2'")


@pytest.mark.slow
def test_an_image_is_dropped_or_chosen_and_a_broken_one_is_told(
    browser, address, searcher, tmp_path
):
    with visited(browser, address) as tab:
        unfold(tab)
        chooser = tab.locator("input[type=file]")
        chooser.set_input_files(searcher.images / "placed.tif")
        tab.get_by_text("placed").first.wait_for()
        tab.get_by_role("button", name="Search", exact=True).click()
        tab.locator("h2 img").wait_for()
        assert paths(tab)[0] == "placed.tif"
        tab.get_by_label("Remove").or_(tab.get_by_label("Clear")).first.click()
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        chooser.set_input_files(broken)
        tab.get_by_text("broken").first.wait_for()
        tab.get_by_role("button", name="Search", exact=True).click()
        alert = tab.get_by_role("alert")
        alert.wait_for()
        assert "broken.png: not readable as an image" in alert.text_content()


@pytest.mark.slow
def test_hits_are_downloaded_from_the_page(browser, address, searcher):
    with visited(browser, address) as tab:
        ask(tab, "a storage tank")
        for words, name in (("CSV", "hits.csv"), ("GeoJSON", "hits.geojson")):
            with tab.expect_download() as download:
                tab.get_by_role("link", name=words, exact=True).click()
            assert download.value.suggested_filename == name
            assert "placed.tif" in Path(download.value.path()).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_its_window_and_is_readable_light_and_dark(browser, address, size):
    from test_pages_in_browser import CONTRAST  # here: without playwright it is skipped

    grounds = set()
    for scheme in ("light", "dark"):
        with visited(browser, address, size, scheme) as tab:
            unfold(tab)
            ask(tab, "a ship beside a hangar")
            tab.locator(".hit").first.wait_for()
            tab.get_by_label("Boxes").click()  # their numbers have a ground of their own
            contrast, text = tab.evaluate(CONTRAST)
            assert contrast >= 4.5, (scheme, text)
            assert tab.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
            grounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
