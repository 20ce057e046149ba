"""The words of captions: what each one, or a phrase of several, is to `T_Graph.py`.

The data come first, for reading and for adding to; then `Vocabulary`, which adds a label map's
kinds and turns a sentence into lexemes. No word list is complete: a word that is in none is taken
by its form, as a verb in -ed or -ing, an adverb in -ly, or else a thing.
"""

import itertools
import re
from typing import NamedTuple

MOST_WORDS = 256  # of a sentence that are read; a text tower sees 77 tokens

# ------------------------------------------------------------------ kinds

SYNONYMS = {  # a name of the label map: other words for it
    "airplane": "jet, airliner, jetliner",
    "basketball court": "basketball field",
    "building": "villa, skyscraper, high rise, edifice",
    "expressway service area": "service area",
    "ground track field": "running track, athletic field, athletics track, track field",
    "harbor": "pier, dock, wharf, jetty, quay, marina",
    "helipad": "heliport, helicopter pad",
    "large vehicle": "lorry",
    "overpass": "flyover",
    "ship": "yacht, ferry, sailboat",
    "soccer ball field": "soccer pitch, football pitch, football ground",
    "tennis court": "tennis field",
    "vehicle": "automobile, sedan",
}
SHARED = {  # a word: the names that it may stand for
    "playground": "ground track field, soccer ball field",
    "sports field": "baseball field, ground track field, soccer field",
}
FIXED_THINGS = (  # with the name of a kind, a verb or an adjective in them, and in no label
    "car park, bus stop, bus station, plane tree, gas station, power station, residential area, "
    "industrial area, commercial area"
)
ROOMS_FOR_KINDS = "area zone lot place space apron".split()  # "plane parking area"
NO_THINGS = set(  # unless a noun stands before them
    "image picture photo photograph scene frame view part middle center centre foot row line group "
    "area ground concrete shape size color colour order kind type number place left right top side "
    "bottom corner edge end direction way background shade form position pattern north south angle "
    "east west surface basketball tennis football baseball soccer golf one other thing object "
    "piece amount lot distance front style circle".split()
)

# ------------------------------------------------------------------ counts and attributes

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
QUANTITIES = {  # (count, form): words
    (2, "exact"): "both, a pair of, a couple of",
    (12, "exact"): "a dozen, a dozen of",
    (2, "at_least"): "some, a few, few, a number of, a group of, groups of, a cluster of, a set of",
    (3, "at_least"): "several",
    (None, "many"): (
        "many, lots of, a lot of, plenty of, numerous, dozens of, hundreds of, thousands of, tens "
        "of, scores of, a large number of, large numbers of, a great number of, a great many, "
        "countless, a large amount of, pairs of, various"
    ),
    (None, "unknown"): "each, every",
}
AT_LEAST = {"at least": 0, "no less than": 0, "no fewer than": 0, "more than": 1, "over": 1}
ROWS = "rows of", "lines of"  # with a number of rows too
ARRANGEMENTS = {
    "neatly arranged": "neatly, neat, tidily, orderly, in order, in good order, in neat order, "
    "regularly",
    "in rows": ", ".join(
        f"in{number} {rows}"
        for number in ("", " two", " three", " four", " several", " many", " neat")
        for rows in ("rows", "lines")
    ),
    "in a row": "in a row, in a line, in one row, in one line, lined up, lined up in a row",
    "scattered": "scattered, scattered about, dispersed",
    "packed together": "packed together",
}
SHADES = "dark light bright deep pale".split()
COLOURS = (
    "white black grey gray red green blue yellow brown orange pink purple cyan khaki beige silver "
    "golden colorful colourful cream"
).split()
SIZES = (
    "big large small huge tiny little great giant vast high low long short tall wide bigger larger "
    "smaller"
).split()
SHAPES = (
    "round circular square rectangular oval curved triangular semicircular hexagonal spherical "
    "elliptical cylindrical polygonal arched"
).split()

# ------------------------------------------------------------------ relations and grammar

RELATIONS = {  # of the thing before the words to the one behind them; "" has none
    "left": "left of, left side of",
    "right": "right of, right side of",
    "above": "above",
    "below": "below",
    "beside": (
        "beside, besides, next to, near, near to, nearby, close to, by, along, alongside, adjacent "
        "to, right beside, right next to, neighboring"
    ),
    "around": "around, in a ring around, all around, surrounds, surround, surrounding, encircle",
    "surrounded": (
        "surrounded by, surrounded with, semi surrounded by, encircled by, enclosed by, ringed by"
    ),
    "in": "in, inside, at, within, inside of",
    "on": "on, on top of, upon",
    "holds": "full of, crowded with, filled with, packed with",  # in, the other way, and many
    "amid": "amid, amidst",  # in one thing; several things are around
    "between": "between, in between, among",
    "apart": "far from, far away from, away from",
    "": (
        "in front of, behind, under, underneath, beneath, outside, over, across, across from, to, "
        "through, apart from, except, except for, from, into, towards, toward, against, like, as a,"
        "in the shape of"
    ),
}
COMPASS = {"north": "above", "south": "below", "west": "left", "east": "right"}
WORDS = {  # word class: words
    "article": "a, an, the, this, that one, single, another, the same, a single, these, those",
    "no": "no, not any, without, without any, without a, neither, nor, not a, not an",
    "or more": "or more",
    "be": "is, are, was, were, be, being, been",
    "there": "there is, there are, there was, there were, we can see, there",
    "and": "and, or, but, as well as, and also, along with, together with",
    "with": "with, having, containing, including",
    "has": "has, have, had, contains, contain, includes, owns",
    "of": "of",
    "part": "of them, of which, of these, of those",
    "it": "it, its",
    "them": "them, their, they",
    "which": "which, that, where, whose, who",
    "stop": "while, when, whereas",
    "cancel": "each other, one another",
    "shape": "shaped, view, views",
    "": (
        "in this picture, in the picture, in this image, in the image, of the image, in the photo, "
        "all, very, also, only, just, so, quite, almost, about, not, can be seen, can, too, both "
        "sides, together, here, as, seen, for, up, down, out, off, what, other, different, same, "
        "aside, abreast, again, forward, alone, since, because, already, we, "
        "then, if, much, any, most, more, half, piece of, pieces of, part of, parts of, own, such, "
        # adjectives, which an unknown thing goes without
        "old, new, busy, empty, closed, damaged, beautiful, modern, bare, dense, sparse, lush, "
        "dry, desolate, verdant, peaceful, healthy, broad, endless, free, emerald, good, "
        "residential, commercial, industrial, rectangle, brand, "
        "narrow, straight, thick, irregular, main, open, wild, wet, clear, typical, medium, flat, "
        "regular, whole, parallel, tidy, luxuriant, vertical, barren, prosperous, opposite, rough, "
        "smooth, quiet, calm, close, complex, shallow, muddy, spacious, famous, public, special, "
        "common, messy, sandy, grassy, rocky, snowy, wooden, portable, winding, curving, flowing, "
        "sparkling"
    ),
}
VERBS = (
    "abut appear beat belong block border bridge come compose connect consist constitute cover "
    "cross divide dock drive enter extend face float flow fly form go grow join lead leave line "
    "lie link locate look make melt moor move overlook park pass play rest rise run sail scatter "
    "see seem separate serve share sit situate span split stand stop stretch take throw turn wait "
    "walk goes built made found shown grown set"
).split()
NOUNS_IN_ING = "parking swimming shopping training landing loading mooring camping".split()
IRREGULAR = {"children": "child", "men": "man", "women": "woman"}
NO_PLURALS = "sports", "crossroads"

# ------------------------------------------------------------------ words


def split(text):
    """Words of a name in lower case; hyphens, underscores and other marks stand between them."""
    return tuple(re.findall(r"[^\W_]+", text.lower()))


def plurals(word):
    """Plurals of a noun, as a list."""
    if word.endswith("craft"):
        return [word, f"{word}s"]
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return [f"{word[:-1]}ies"]
    return [f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"]


def singular(word):
    """Singular of a noun in lower case; a singular stays."""
    if word in IRREGULAR or word in NO_PLURALS or len(word) < 4:
        return IRREGULAR.get(word, word)
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    if word.endswith(("sses", "xes", "ches", "shes", "buses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _slips(word):
    """A word with one letter after the first left out, or exchanged with the next."""
    for i in range(1, len(word)):
        yield word[:i] + word[i + 1 :]
        yield word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]


# ------------------------------------------------------------------ tokens

_SIDE = "upper|top|lower|bottom|left|right|middle|center|centre|central|corners?|edges?|sides?"
_TOKENS = re.compile(
    r"(?P<word>[^\W_]+)(?:['\u2019]s\b)?"
    r"(?P<modifier>(?:-[^\W_]+){0,3}-(?:shaped|like|lane|story|storey|style|way|sided|colored)\b)?"
    r"|(?P<comma>,)|[.;:!?]"
)
_BEFORE_PLACES = frozenset("in on at to near by along".split())
_PLACE = re.compile(  # "in the upper left corner of the image", "on both sides of"
    r"(?P<at>[a-z]+) (?P<whose>(?:(?:the|its|their|this|one|both|two|three|four|all|each|either|"
    r"an?|other|very) )*)"
    rf"(?P<where>(?:{_SIDE}|parts?|half)(?:[ -](?:{_SIDE}|hand|parts?|half))*)\b"
    r"(?P<of> of\b(?P<image>(?: (?:the|this|that|an?|whole|entire))* "
    r"(?:image|picture|photo|photograph|scene|frame)\b)?)?"
)
_SAME_PLACE = {"upper": "top", "lower": "bottom", "center": "middle", "centre": "middle"}
_SAME_PLACE["central"] = "middle"


def _place(found):
    """Type and value of a place in the image or of a relation to a side of a thing."""
    words = [word.rstrip("s") for word in re.split("[ -]", found["where"])]
    sides = [_SAME_PLACE.get(word, word) for word in words]
    sides = [side for side in sides if side not in ("side", "part", "half", "hand")]
    of_it = bool({"its", "their"} & set(found["whose"].split()))
    if found["image"] or not (found["of"] or of_it):
        if found["at"] == "to" or not sides:
            return "", None
        return "place", _corner(sides) if len(sides) > 1 else sides[0]
    relation = {"in": "in", "at": "in", "on": "on", "near": "beside"}.get(found["at"], "")
    if words == ["side"]:
        relation = "beside"
    elif sides in (["left"], ["right"]):
        relation = sides[0]
    elif sides == ["middle"]:
        relation = "amid"
    return "relation it" if of_it else "relation", relation


CORNERS = ("top left", "top right", "bottom left", "bottom right")


def _corner(sides):
    """Of two sides or more the corner they name, as far as they tell which."""
    for corner in CORNERS:
        if set(corner.split()) <= set(sides):
            return f"{corner} corner"
    return "corner"


def _by_form(word):
    """Type and value of a word that is in no phrase."""
    if word.isascii() and word.isdigit():
        return ("count", (int(word), "exact", None)) if len(word) < 7 else ("", None)
    if word in NOUNS_IN_ING:
        return "gerund", None
    if len(word) > 4 and word.endswith(("ed", "ing")):
        return "verb", None
    return ("", None) if len(word) > 4 and word.endswith("ly") else ("word", None)


# ------------------------------------------------------------------ the vocabulary


class KindWord(NamedTuple):
    """What a word, or several, says of the label map's kinds: the value of a lexeme "kind"."""

    ids: tuple  # class ids, ascending: a word may stand for several
    is_plural: bool
    is_shared: bool  # whether it is the last word of several names: "court"


class Vocabulary:
    """All phrases that are read, with the kinds of one label map.

    lines: the lines of a `LabelMap`; the names of line i stand for class id i. Plurals, names
    written as one word, and long words with one slip are read too. The last word of several names
    ("court", "field") stands for all their kinds, where it is no name itself.
    """

    def __init__(self, lines):
        self._phrases = {}  # words: (word class, value)
        self._add_kinds(lines)
        kinds = list(self._phrases)
        self._add_words()
        self._longer = {}  # first two words: phrases, the longest first
        for words in sorted(self._phrases, key=len, reverse=True):
            if len(words) > 1:
                self._longer.setdefault(words[:2], []).append(words)
        self._known = {word for words in self._phrases for word in words}
        often_misspelt = [*kinds, *(split(phrase) for phrase in RELATIONS["surrounded"].split(","))]
        self._long = {word for words in often_misspelt for word in words if len(word) > 5}
        self._slips = {}  # misspelt: word
        for word in sorted(self._long):
            for slip in _slips(word):
                self._slips.setdefault(slip, word)

    def _add(self, phrases, word_class, value):
        """Add phrases with commas between; what was added first stays."""
        for phrase in phrases.split(","):
            self._phrases.setdefault(split(phrase), (word_class, value))

    def _add_kinds(self, lines):
        names = {}  # words: class ids
        for class_id, line in enumerate(lines):
            for name in map(split, line.split(",")):
                if name:
                    names.setdefault(name, {class_id})
        heads = {}
        for name in names:
            heads.setdefault(name[-1:], set()).update(names[name])
        shared = {head: ids for head, ids in heads.items() if len(ids) > 1 and head not in names}

        def ids_of(phrases):
            return set().union(*(names.get(split(name), ()) for name in phrases.split(",")))

        for word, meanings in SHARED.items():
            names.setdefault(split(word), ids_of(meanings))
        for name, words in SYNONYMS.items():
            for word in words.split(","):
                names.setdefault(split(word), ids_of(name))
        for name, ids in [*names.items(), *shared.items()]:
            if ids:
                last = name[-1]
                for plural, word in [(False, last), *((True, word) for word in plurals(last))]:
                    value = KindWord(tuple(sorted(ids)), plural, name in shared)
                    words = (*name[:-1], word)
                    self._phrases.setdefault(words, ("kind", value))
                    self._phrases.setdefault(("".join(words),), ("kind", value))

    def _add_words(self):
        for number, word in enumerate(NUMBERS):
            self._add(word, "count", (number, "exact", None))
            self._add(f"{word} dozen", "count", (12 * number, "exact", None))
        for i, ten in enumerate(TENS):
            self._add(ten, "count", (20 + 10 * i, "exact", None))
            for j in range(1, 10):
                self._add(f"{ten} {NUMBERS[j]}", "count", (20 + 10 * i + j, "exact", None))
        for (count, form), phrases in QUANTITIES.items():
            self._add(phrases, "count", (count, form, None))
        self._add("a row of, a line of", "count", (2, "at_least", "in a row"))
        for rows in ROWS:
            for number in ("", "some ", "several ", "many ", *(f"{word} " for word in NUMBERS)):
                self._add(number + rows, "count", (None, "many", "in rows"))
        for value, phrases in ARRANGEMENTS.items():
            self._add(phrases, "arrangement", value)
        for word in (*COLOURS, *SIZES, *SHAPES, *SHADES):
            self._add(word, "attribute", word)
        for shade, colour in itertools.product(SHADES, COLOURS):
            self._add(f"{shade} {colour}", "attribute", f"{shade} {colour}")
        for name, phrases in RELATIONS.items():
            self._add(phrases, "relation", name)
        for compass, name in COMPASS.items():
            for words in ("{} of", "to the {} of", "on the {} of", "on the {} side of"):
                self._add(words.format(compass), "compass", name)
        for phrase, more in AT_LEAST.items():
            self._add(phrase, "at least", more)
        for kind, phrases in WORDS.items():
            self._add(phrases, kind, None)
        for thing in FIXED_THINGS.split(","):
            *first, last = split(thing)
            for word in (last, *plurals(last)):
                self._add(" ".join([*first, word]), "thing", None)
        for verb in VERBS:
            for word in (verb, *plurals(verb)):
                self._add(word, "verb", None)

    def _mended(self, word):
        """What a word that is in no phrase may mean: it has a letter less, more or exchanged."""
        if word is None or len(word) > 24:
            return word
        if word in self._slips:
            return self._slips[word]
        for i in range(1, len(word)):
            shorter = word[:i] + word[i + 1 :]
            if shorter in self._long:
                return shorter
        return word

    def read(self, text):
        """The lexemes of a text in lower case: (word class, value, start, end) each, in order."""
        tokens = list(itertools.islice(_TOKENS.finditer(text), MOST_WORDS))
        written = [token["word"] for token in tokens]
        words = [word if word in self._known else self._mended(word) for word in written]
        words.append(None)
        ends = [token.end("word") if token["word"] else token.end() for token in tokens]
        lexemes = []
        i = 0
        while i < len(tokens):
            token, word, size = tokens[i], words[i], 1
            place = _PLACE.match(text, token.start()) if word in _BEFORE_PLACES else None
            if place:
                kind, value = _place(place)
                while i + size < len(tokens) and ends[i + size] <= place.end():
                    size += 1
            elif word is None:
                kind, value = "comma" if token["comma"] else "stop", None
            elif token["modifier"]:
                is_shape = token["modifier"].endswith("shaped")
                kind, value = "attribute" if is_shape else "", token[0]
            else:
                phrase = (word,)
                for longer in self._longer.get((word, words[i + 1]), ()):
                    if tuple(words[i : i + len(longer)]) == longer:
                        phrase = longer
                        break
                kind, value = self._phrases.get(phrase) or _by_form(written[i])
                size = len(phrase)
            if kind:
                lexemes.append((kind, value, token.start(), ends[i + size - 1]))
            i += size
        return lexemes
