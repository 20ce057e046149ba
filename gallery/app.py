"""A page in the browser for an index: `search.py serve`; its functions are an API too."""

import contextlib
import signal
import threading
from pathlib import Path

from dataset.images import SUFFIXES, size_of
from escaping import escaped
from gallery import cards
from gallery.local_gradio import gr, only_sent, served
from gallery.ranking import Query
from gallery.rasters import open_scene, reading_of
from gallery.searching import Filter
from gallery.table import kind_columns
from metrics.page import shown

MOST_PIXELS = 25_000_000  # of an image that is looked for
MOST_HITS = 60
USUAL_HITS = 12
LONGEST = 1000  # characters of a sentence
WAITING = 20  # queries that wait for their turn; who comes then is told to come again
KEPT = 24 * 3600  # seconds that an uploaded image is kept

# ------------------------------------------------------------------ queries


def search(searcher, sentence, image, without, where, number, near, within):
    """The answer to a query: a sentence, the path of an image, or both.

    searcher: a Search. without: a sentence that shall not fit; where: as of `filters.condition`;
    number: of hits; near: a text of latitude and longitude in degrees; within: kilometres around
    it. Texts may be empty or None. Raises ValueError in words for a user.
    """
    sentence, without = _sentence(sentence), _sentence(without)
    if sentence is None and image is None:
        raise ValueError("nothing to look for: type a sentence or choose an image")
    image_vector = name = None
    if image is not None:
        name = Path(image).name
        try:
            _require_small(image)
            image_vector = searcher.encode_image(image)
        except ValueError as error:  # where the upload lies is of no use to anybody
            raise ValueError(str(error).replace(escaped(image), escaped(name))) from None
    query = Query(text=sentence, image=name, image_vector=image_vector, without=without)
    chosen = _filter(where, near, within)
    return searcher.answers([query], chosen, _number(number))[0]


def more_like_this(searcher, tile, without, where, number, near, within):
    """The answer to a query with the embedding of a tile of the index, which is no hit itself.

    tile: its id. The others are as of `search`.
    """
    query = _query_like(searcher, tile, _sentence(without))
    chosen = _filter(where, near, within)
    number = _number(number)
    answer = searcher.answers([query], chosen, number + 1)[0]
    others = [hit for hit in answer["hits"] if hit["id"] != tile][:number]
    for rank, hit in enumerate(others, start=1):
        hit["rank"] = rank
    answer["hits"] = others
    return answer


def why(searcher, tile, sentence, like, without):
    """A hit, see gallery/answers.py, of one tile: its score for a query and where it comes from.

    tile: its id; the query is a sentence, or the id of a tile in `like`.
    """
    sentence, without = _sentence(sentence), _sentence(without)
    if (sentence is None) == (not like):
        raise ValueError("expected a sentence, or a tile in like")
    searcher.vector_of(_text(tile))  # refuses what is no tile
    if like:
        query = _query_like(searcher, like, without)
    else:
        query = Query(text=sentence, without=without)
    [hit] = searcher.hit_of(tile, query)
    del hit["rank"]  # among one tile
    return hit


def _query_like(searcher, tile, without):
    return Query(image=tile, vector=searcher.vector_of(_text(tile)), without=without)


def _place_of(searcher, tile):
    """(path, window) of a tile of the index; ValueError where it has none of this id."""
    searcher.vector_of(_text(tile))
    [row] = searcher.rows.numbers([tile])
    return searcher.rows.arrow["path"][row].as_py(), searcher.rows.window(row)


def _text(value):
    """A text as it came, of whoever asks the API."""
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {escaped(value)[:60]}")
    return value


def _sentence(text):
    """A sentence, or None for an empty one."""
    text = _text(text or "").strip()
    if len(text) > LONGEST:
        raise ValueError(f"a sentence has at most {LONGEST} characters, this one {len(text)}")
    return text or None


def _filter(where, near, within):
    where = _text(where or "").strip() or None
    words = _text(near or "").replace(",", " ").split()
    if not words:
        return Filter(where=where)
    try:
        lat, lon = [float(word) for word in words]
        within = float(within)
    except (TypeError, ValueError):
        raise ValueError(
            "near: expected latitude and longitude in degrees, as 47.37, 8.54, and a distance in "
            "kilometres"
        ) from None
    return Filter(where=where, near=(lat, lon), within=within)


def _number(number):
    is_whole = isinstance(number, (int, float)) and float(number).is_integer()
    if not is_whole or not 1 <= number <= MOST_HITS:
        raise ValueError(f"results: expected a whole number from 1 to {MOST_HITS}")
    return int(number)


def _require_small(image):
    """Raise ValueError for an image that would take too much memory, before it is decoded."""
    width, height = size_of(image)
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{escaped(image)}: {width} x {height} pixels; at most {MOST_PIXELS:,} are looked for: "
            "cut a tile out of it"
        )


# ------------------------------------------------------------------ the page

STYLE = """
.gradio-container { width: 100%; max-width: 84rem !important; margin: 0 auto !important }
.title h1 { font-size: 1.5rem; font-weight: 650; margin: .25rem 0 0 }
.title p { margin: .1rem 0 .25rem; color: #565c66 }
.dark .title p { color: #a9b0bb }
.columns { font-size: .9375rem; line-height: 1.7; overflow-wrap: anywhere }
.go { align-self: stretch; max-height: 5.5rem }
#boxes { border-width: 0 !important; background: none; box-shadow: none; padding: 0 .75rem;
  margin: -.25rem 0 }
@media (max-width: 40rem) { .gradio-container .fillable { padding: .5rem !important } }
"""

# A tile's button asks for more like it; the heading of what was found then gets the focus.
SCRIPT = """
let asked = false;
element.addEventListener("click", (event) => {
  const button = event.target.closest(".like");
  if (!button) return;
  asked = true;
  trigger("more", { tile: button.dataset.tile });
});
watch("value", () => {
  const head = element.querySelector("h2");
  if (!asked || !head) return;
  asked = false;
  head.focus({ preventScroll: true });
  head.scrollIntoView({ block: "start" });
});
"""

SWITCH = '(shown) => { document.body.classList.toggle("no-boxes", !shown); }'


def page(searcher):
    """The page and the API of a Search, as Gradio's Blocks."""
    one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}
    with gr.Blocks(
        title="Search", analytics_enabled=False, delete_cache=(3600, KEPT), fill_width=True
    ) as blocks:
        gr.HTML(_title(searcher), apply_default_css=False, elem_classes="title")
        with gr.Row(equal_height=True):
            sentence = gr.Textbox(
                "",
                label="Sentence",
                placeholder="two ships beside a pier",
                max_length=LONGEST,
                max_lines=1,
                scale=6,
                min_width=280,
            )
            button = gr.Button("Search", variant="primary", min_width=120, elem_classes="go")
        with gr.Accordion("Image, filter, number of results", open=False):
            with gr.Row():
                image = only_sent(
                    gr.File(label="Or an image", file_types=sorted(SUFFIXES), height=150)
                )
                with gr.Column():
                    without = gr.Textbox(
                        "", label="Not", placeholder="a runway", max_length=LONGEST
                    )
                    where = gr.Textbox("", label="Filter", placeholder=_example(searcher))
            with gr.Row(visible=_has_places(searcher)):
                near = gr.Textbox("", label="Near latitude, longitude", placeholder="47.37, 8.54")
                within = gr.Number(10, label="Within kilometres")
            number = gr.Slider(1, MOST_HITS, value=USUAL_HITS, step=1, label="Results")
            gr.HTML(_columns(searcher), apply_default_css=False, elem_classes="columns")
        boxes = gr.Checkbox(
            True, label="Boxes; numbered ones matter most", container=False, elem_id="boxes"
        )
        found = gr.HTML(js_on_load=SCRIPT, apply_default_css=False, elem_id="found")
        boxes.change(None, boxes, None, js=SWITCH)
        rest = [without, where, number, near, within]

        def find(sentence, image, *rest):
            try:
                answer = search(searcher, sentence, image, *rest)
                small = _thumbnail(searcher, image) if image else ""
            except ValueError as error:
                return cards.mistake(_words(error))
            return cards.results(searcher, answer, small)

        def find_more(event: gr.EventData, *rest):
            try:
                tile = _text(event.tile)
                answer = more_like_this(searcher, tile, *rest)
                small = cards.picture(searcher.picture(*_place_of(searcher, tile)), cards.SMALL, "")
            except ValueError as error:
                return cards.mistake(_words(error))
            return cards.results(searcher, answer, small)

        gr.on(
            [button.click, *(text.submit for text in (sentence, without, where, near))],
            find,
            [sentence, image, *rest],
            found,
            api_visibility="private",
            **one_at_a_time,
        )
        found.more(find_more, rest, found, api_visibility="private", **one_at_a_time)
        _add_api(searcher, [sentence, image], rest, one_at_a_time)
    return blocks.queue(max_size=WAITING, api_open=False)


def _add_api(searcher, asked, rest, settings):
    """Add the functions that programs may call; their answers are as of gallery/answers.py."""

    def api_search(
        sentence="",
        image=None,
        without="",
        where="",
        number=USUAL_HITS,
        near="",
        within=10,
    ):
        """The tiles that fit a sentence, an image, or both."""
        return _answered(search, searcher, sentence, image, without, where, number, near, within)

    def api_more_like_this(tile, without="", where="", number=USUAL_HITS, near="", within=10):
        """The tiles that are most like one of the index, named by its id."""
        return _answered(more_like_this, searcher, tile, without, where, number, near, within)

    def api_why(tile, sentence="", like="", without=""):
        """What the score of a tile for a sentence, or for another tile's id, is made of."""
        return _answered(why, searcher, tile, sentence, like, without)

    tile, like, sentence, without = [
        gr.Textbox("" if label != "tile" else None, label=label, visible=False)
        for label in ("tile", "like", "sentence", "without")
    ]
    answer = gr.JSON(label="answer", visible=False)
    calls = {
        "search": (api_search, [*asked, *rest]),
        "more_like_this": (api_more_like_this, [tile, *rest]),
        "why": (api_why, [tile, sentence, like, without]),
    }
    for name, (function, inputs) in calls.items():
        trigger = gr.Button(visible=False)
        trigger.click(function, inputs, answer, api_name=name, **settings)


def _answered(function, *arguments):
    """What a function returns; its ValueError becomes one that Gradio shows in words."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise gr.Error(_words(error), print_exception=False) from None


def _words(error):
    """A mistake, with the name of a field in the place of an option's."""
    return str(error).replace("--where:", "filter:")


def _title(searcher):
    tiles, folder = len(searcher.rows), shown(searcher.images.name)
    return f"<h1>Search</h1><p>{tiles:,} tiles of {folder}</p>"


def _columns(searcher):
    """The columns that a filter may name, as HTML."""
    kinds = kind_columns(searcher.settings.labels)
    others = [name for name in searcher.settings.columns() if name not in kinds]
    counts = ", ".join(f"<code>{name}</code>" for name in kinds)
    rest = ", ".join(f"<code>{name}</code>" for name in others)
    return f"<p>A filter compares how many objects there are: {counts}</p><p>and: {rest}</p>"


def _example(searcher):
    kinds = kind_columns(searcher.settings.labels)
    return f"{kinds[0]} >= 2 and objects < 20"


def _has_places(searcher):
    lats = searcher.rows.arrow["lat"]
    return lats.null_count < len(lats)


def _thumbnail(searcher, path):
    """The picture of an image file that was looked for, as HTML."""
    settings = searcher.settings
    with open_scene(path, reading_of(settings.bands, settings.stretch)) as scene:
        return cards.picture(scene.read((0, 0, *scene.size)), cards.SMALL, "")


@contextlib.contextmanager
def opened(searcher, port):
    """Serves a Search until the block ends; gives the address. ValueError as of `served`."""
    style = f"<style>{STYLE}{cards.STYLE}</style>"
    with served(lambda: page(searcher), port, head=style) as address:
        yield address


def start(searcher, port):
    """Serve a Search until Ctrl+C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt), opened(searcher, port) as address:
            print(f"{address} shows {len(searcher.rows):,} tiles; Ctrl+C stops it", flush=True)
            threading.Event().wait()
    finally:
        signal.signal(signal.SIGTERM, before)
