"""Sentences to graphs: the kinds, counts and relations that a caption states.

    python T_Graph.py "two planes left of a hangar" --draw graph.png

prints and draws what `build_text_graph` reads. Three steps, each over a list in the order of the
sentence: words to lexemes (`Vocabulary.read`), lexemes to mentions of things (`_Mentions`),
mentions to edges (`_Relations`). A lexeme is (type, value, start, end), a place in the sentence.
`det_json/README.md` tells what is read and what is not.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("T_Graph", __doc__)  # before slow packages are imported

import itertools
import re
from functools import lru_cache

import networkx as nx

from det_formats.det_json import LABELS, read_label_map
from escaping import escaped
from options import parse_options, run
from writing import written_whole

MOST_WORDS = 256  # of a sentence; the text tower sees at most 77 tokens

# ------------------------------------------------------------------ vocabulary: kinds

SYNONYMS = {  # a name of the label map: other words for it
    "airplane": "jet, airliner, jetliner, aeroplan",
    "basketball court": "basketball field",
    "building": "villa, skyscraper, high rise, edifice",
    "ground track field": "running track, athletic field, athletics track, track field",
    "harbor": "pier, dock, wharf, jetty, quay, marina",
    "helipad": "heliport, helicopter pad, landing pad",
    "large vehicle": "lorry, van",
    "overpass": "flyover",
    "roundabout": "rotary",
    "service area": "expressway service area",
    "expressway service area": "service area",
    "ship": "yacht, ferry, sailboat, motorboat",
    "soccer ball field": "soccer pitch, football pitch, football ground",
    "storage tank": "storage tanker",
    "vehicle": "automobile, sedan",
}
SHARED = {  # a word that several kinds share
    "playground": "ground track field, soccer ball field",
    "sports field": "baseball field, ground track field, soccer field",
}

# ------------------------------------------------------------------ vocabulary: grammar

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
QUANTITIES = {  # (count, form): words
    (2, "exact"): "both, a pair of, a couple of, a double",
    (12, "exact"): "a dozen, a dozen of",
    (2, "at_least"): "some, a few, few, a number of, a group of, a cluster of, a set of, groups of",
    (3, "at_least"): "several",
    (None, "many"): (
        "many, lots of, a lot of, plenty of, numerous, dozens of, hundreds of, thousands of, tens "
        "of, scores of, a large number of, large numbers of, a great number of, a great "
        "many, countless, a large amount of, pairs of, large "
        "quantities of, various"
    ),
    (None, "unknown"): "each, every",
}
AT_LEAST = {"at least": 0, "no less than": 0, "no fewer than": 0, "more than": 1, "over": 1}
ARRANGEMENTS = {
    "neatly arranged": (
        "neatly, neat, tidily, orderly, in order, in good order, in an orderly way, regularly, "
        "in neat order, well arranged"
    ),
    "in rows": (
        "in rows, in lines, in two rows, in two lines, in three rows, in three lines, in several "
        "rows, in several lines, in neat rows, in many rows, in neat lines"
    ),
    "in a row": "in a row, in a line, in one row, in one line, lined up, in line",
    "scattered": "scattered, scattered about, dispersed, scatteredly",
    "packed together": "packed together",
}
COLOURS = (
    "white black grey gray red green blue yellow brown orange pink purple cyan khaki beige silver "
    "golden colorful colourful cream"
).split()
SHADES = "dark light bright deep pale".split()
SIZES = "big large small huge tiny little great giant vast high low long short tall wide".split()
SHAPES = (
    "round circular square rectangular oval curved triangular semicircular hexagonal spherical "
    "elliptical cylindrical polygonal arched"
).split()
RELATIONS = {  # of the thing before the words to the one behind them
    "left": "left of, left side of",
    "right": "right of, right side of",
    "above": "above",
    "below": "below",
    "beside": (
        "beside, besides, next to, near, near to, nearby, close to, by, along, alongside, adjacent "
        "to, right beside, right next to, neighboring"
    ),
    "around": "around, in a ring around, all around, surrounds, surround, surrounding, encircle",
    "in": "in, inside, at, within, inside of, into",
    "on": "on, on top of, upon",
    "between": "between, in between, among, sandwiched between",
    "apart": "far from, far away from, away from, a long way from",
    "surrounded": (  # around, the other way
        "surrounded by, surrounded with, sourrounded by, surounded by, encircled by, enclosed by, ringed by, semi surrounded by"
    ),
    "holds": "full of, crowded with, filled with, packed with",  # in, the other way
    "amid": "amid, amidst",  # in one thing, around which several are
    "": (  # no relation that an image from above shows
        "in front of, behind, under, underneath, beneath, outside, over, across, through, apart "
        "from, except, except for, from, to, into, towards, toward, against, across from"
    ),
}
COMPASS = {"north": "above", "south": "below", "west": "left", "east": "right"}
PLACES = {"upper": "top", "lower": "bottom", "center": "middle", "centre": "middle"}
FUNCTION_WORDS = {  # type of lexeme: words
    "article": "a, an, the, this, that one, single, another, the same, a single, these, those",
    "be": "is, are, was, were, be, being, been",
    "there": "there is, there are, there was, there were, we can see, there",
    "and": "and, or, but, as well as, and also, along with, together with, plus",
    "with": "with, having, containing, including",
    "has": "has, have, contains, contain, includes, owns, had",
    "no": "no, not any, without, without any, neither, nor, not a, not an, nor any, no other",
    "of": "of",
    "of them": "of them, of which, of these, of those",
    "it": "it, its, them, their, they",
    "which": "which, that, where, whose, who",
    "stop": "while, when, whereas",
    "cancel": "each other, one another",
    "like": "like a, like an, like, in the shape of, in shape of, the shape of, as a",
    "or more": "or more, or so",
    "shaped": "shaped, view, views, style",
    "": "all, very, also, only, just, so, quite, almost, about, not, can be seen, can, too, together, "
    "here, as, seen, winding, curving, flowing, running, rolling, sandy, grassy, rocky, snowy, portable, for, one side, up, down, out, off, what, other, different, same, then, if, "
    "old, new, busy, empty, closed, damaged, beautiful, modern, bare, dense, sparse, lush, narrow, "
    "straight, thick, irregular, main, open, wild, dry, wet, clear, typical, medium, regular, "
    "whole, such, parallel, tidy, luxuriant, vertical, barren, prosperous, own, opposite, flat, "
    "rough, smooth, deep, quiet, calm, several kinds of, much, any, most, more, complex, close, "
    "piece of, pieces of, half, part of, parts of, shallow, muddy, green and, spacious, sunny, "
    "famous, public, special, nice, luxurious, common, messy, well, densely, ordered, orange and",
}
VERBS = (
    "belong block beat park stand sit lie line cross span run sail fly go pass connect cover divide stop drive moor "
    "dock grow look form stretch wait lead extend link float move separate bridge rest cast split "
    "border face share overlook rise appear make come take enter leave play walk turn built made shown spread"
).split()
NOUN_FORMS = "parking swimming shopping training landing loading mooring camping playing".split()
THINGS = (  # with a kind or an adjective in them
    "car park, bus stop, bus station, gas station, residential area, plane tree, power station, "
    "bare land, open land, green land, industrial area, commercial area, school, parking lot"
).split(", ")
GROUNDS_OF_A_KIND = set("area zone lot place space apron".split())
NO_THINGS = set(
    "image picture photo photograph scene frame side part middle center centre foot row line group "
    "area ground concrete shape size color colour order view kind type number place left right top "
    "bottom corner edge end direction way background shade form top position pattern north south "
    "east west surface basketball tennis football baseball soccer golf one other thing object piece "
    "amount lot distance front middle style".split()
)


IRREGULAR = {"children": "child", "men": "man", "women": "woman", "crossroads": "crossroads"}


def _split(text):
    return text.replace("-", " ").replace("_", " ").casefold().split()


def _plurals(word):
    """Plurals of a noun; aircraft has none of its own."""
    if word.endswith("craft"):
        return [word, word + "s"]
    if word[-1:] == "y" and word[-2:-1] not in tuple("aeiou"):
        return [word[:-1] + "ies"]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return [word + "es"]
    return [word + "s"]


def singular(word):
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes", "uses")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1]
    return word


def _slips(word):
    """A long word with one letter left out, doubled or exchanged with its neighbour."""
    if len(word) < 6:
        return
    for i in range(1, len(word)):
        yield word[:i] + word[i + 1 :]
        yield word[:i] + word[i] + word[i:]
        yield word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]


class Vocabulary:
    """All phrases that are read, for one label map. lines: as of a LabelMap."""

    def __init__(self, lines):
        self._phrases = {}  # by first word: (words, type, value), the longest first
        self._seen = set()
        names = {}  # words of a name: class ids
        for class_id, line in enumerate(lines):
            for name in line.split(","):
                names.setdefault(tuple(_split(name)), {class_id})
        names.pop((), None)
        self._add_kinds(names)
        self._add_grammar()
        for entries in self._phrases.values():
            entries.sort(key=lambda entry: -len(entry[0]))

    def _add(self, words, kind, value):
        if words not in self._seen:  # what came first holds
            self._seen.add(words)
            self._phrases.setdefault(words[0], []).append((words, kind, value))

    def _add_kinds(self, names):
        for table in (SYNONYMS, SHARED):
            for meaning, words in table.items():
                meanings = words if table is SHARED else meaning
                found = [names.get(tuple(_split(name)), ()) for name in meanings.split(",")]
                ids = set(itertools.chain(*found))
                for word in [meaning] if table is SHARED else words.split(","):
                    if ids:
                        names.setdefault(tuple(_split(word)), ids)
        heads = {}
        for name, ids in names.items():
            if len(name) > 1:
                heads.setdefault(name[-1:], set()).update(ids)
        shared = {head: ids for head, ids in heads.items() if len(ids) > 1 and head not in names}
        slips = []
        for name, ids in [*names.items(), *shared.items()]:
            bare = name in shared
            for plural, last in [(False, name[-1])] + [(True, one) for one in _plurals(name[-1])]:
                words = (*name[:-1], last)
                value = (tuple(sorted(ids)), plural, bare)
                self._add(words, "kind", value)
                if len(name) > 1:
                    self._add(("".join(words),), "kind", value)
                for i, word in enumerate(words):
                    slips += [((*words[:i], s, *words[i + 1 :]), value) for s in _slips(word)]
        self._slips = slips

    def _add_grammar(self):
        for (count, form), phrases in QUANTITIES.items():
            self._add_all(phrases, "count", (count, form, None))
        for value, phrases in ARRANGEMENTS.items():
            self._add_all(phrases, "arrangement", value)
        for value, phrases in RELATIONS.items():
            self._add_all(phrases, "relation", value)
        for kind, phrases in FUNCTION_WORDS.items():
            self._add_all(phrases, kind, None)
        self._add_all(", ".join(AT_LEAST), "at least", None)
        for number, word in enumerate(NUMBERS):
            self._add((word,), "count", (number, "exact", None))
            self._add((word, "dozen"), "count", (12 * number, "exact", None))
        for i, ten in enumerate(TENS):
            self._add((ten,), "count", (20 + 10 * i, "exact", None))
            for j in range(1, 10):
                self._add((ten, NUMBERS[j]), "count", (20 + 10 * i + j, "exact", None))
        self._add_all("a row of, a line of", "count", (2, "at_least", "in a row"))
        for words in ("rows of", "lines of"):
            self._add_all(words, "count", (None, "many", "in rows"))
            for number in ("two", "three", "four", "five", "several", "many", "some", "2", "3"):
                self._add_all(f"{number} {words}", "count", (None, "many", "in rows"))
        for shade in SHADES:
            for colour in COLOURS:
                self._add((shade, colour), "attribute", f"{shade} {colour}")
        for word in (*COLOURS, *SIZES, *SHAPES):
            self._add((word,), "attribute", word)
        for compass, relation in COMPASS.items():
            for words in ("{} of", "to the {} of", "on the {} of", "on the {} side of"):
                self._add_all(words.format(compass), "compass", relation)
        for verb in VERBS:
            for word in (verb, *_plurals(verb)):
                self._add((word,), "verb", None)
        for thing in THINGS:
            words = _split(thing)
            for last in (words[-1], *_plurals(words[-1])):
                self._add((*words[:-1], last), "thing", None)
        for words, value in self._slips:
            self._add(words, "kind", value)

    def _add_all(self, phrases, kind, value):
        for phrase in phrases.split(","):
            self._add(tuple(_split(phrase)), kind, value)

    def read(self, text):
        """The lexemes of a text in lower case: (type, value, start, end) each."""
        found = list(itertools.islice(TOKENS.finditer(text), MOST_WORDS))
        words = [token["word"] for token in found]
        lexemes = []
        i = 0
        while i < len(found):
            token = found[i]
            start, end = token.span()
            word = words[i]
            if word is None:
                kind, value = _other_token(token)
            else:
                kind, value = None, None
                for phrase, kind, value in self._phrases.get(word, ()):  # the longest first
                    size = len(phrase)
                    if size == 1 or tuple(words[i : i + size]) == phrase:
                        end = found[i + size - 1].end()
                        i += size - 1
                        break
                else:
                    kind, value = _open_class(word)
            i += 1
            if kind:
                lexemes.append((kind, value, start, end))
        return lexemes


# ------------------------------------------------------------------ tokens

_SIDES = "upper|top|lower|bottom|left|right|middle|center|centre|central|corners?|edges?|sides?"
TOKENS = re.compile(
    rf"(?P<modifier>[^\W_]+(?:-[^\W_]+)?-(?:shaped|like|lane|story|storey|style|way|sided|colored)\b)"
    rf"|(?P<at>in|on|at|to|from|near|by|along) "
    rf"(?P<whose>(?:(?:the|its|their|this|one|both|two|each|either|an?|other|very|same) )*)"
    rf"(?P<where>(?:{_SIDES}|parts?|half)(?:[ -](?:{_SIDES}|hand|parts?|half))*)\b"
    r"(?P<of> of\b(?P<image>(?: (?:the|this|that|an?|whole|entire))* "
    r"(?:image|picture|photo|photograph|scene|frame)\b)?)?"
    r"|(?P<word>[^\W_]+(?:['\u2019][^\W_]+)?)|(?P<comma>,)|[.;:!?]"
)


def _open_class(word):
    """Type and value of a word that is in no phrase, by its form."""
    if word.isascii() and word.isdigit():
        return ("count", (int(word), "exact", None)) if len(word) < 7 else ("", None)
    if word in NOUN_FORMS:
        return "gerund", word
    if len(word) > 4 and word.endswith(("ed", "ing")):
        return "verb", None
    if len(word) > 4 and word.endswith("ly"):
        return "", None
    return "word", word


def _other_token(token):
    """Type and value of a token that is no word: a place, a modifier or a mark."""
    if token["comma"]:
        return "comma", None
    if token["modifier"]:
        shaped = token["modifier"].endswith("shaped")
        return ("attribute", token["modifier"]) if shaped else ("", None)
    if not token["where"]:
        return "stop", None
    at, whose = token["at"], token["whose"].split()
    where = re.split("[ -]", token["where"])
    sides = [side for side in where if side.rstrip("s") not in ("side", "part", "half", "hand")]
    sides = [PLACES.get(side, side.rstrip("s")) for side in sides]
    by_preposition = {"in": "in", "at": "in", "on": "on", "near": "beside"}.get(at, "")
    if token["image"] or not (token["of"] or {"its", "their"} & set(whose)):
        if at in ("to", "from") or not sides:
            return "", None
        return "place", "corner" if len(sides) > 1 else sides[0]
    if not sides:
        relation = "beside" if where[0].startswith("side") else by_preposition
    elif len(sides) > 1:
        relation = by_preposition
    else:
        relation = {"left": "left", "right": "right", "middle": "amid"}.get(
            sides[0], by_preposition
        )
    return ("relation", relation) if token["of"] else ("relation it", relation)


# ------------------------------------------------------------------ mentions


class _Mentions:
    """Noun phrases of lexemes: nodes, unknown things, and what stands between them.

    parts: (type, value) in order; of a "thing" the value is its node, None for an unknown one.
    """

    def __init__(self, sentence, lexemes):
        self.nodes = []
        self.unknown = set()
        self.parts = []
        self._sentence = sentence
        self._nouns = []  # (word, value of a kind or None) of the phrase that is open
        self._negated = ""  # "now", then "spread" over further things
        self._each = False  # what each of others has is not counted
        self._start_phrase()
        kinds = [lexeme[0] for lexeme in lexemes] + ["stop"]
        for i, (kind, value, start, end) in enumerate(lexemes):
            self._read(kind, value, sentence[start:end], kinds[i + 1], kinds[i - 1] if i else "")
        self._close()

    def _start_phrase(self):
        self._nouns = []
        self._attributes = []
        self._determiner = ""
        self._count = None
        self._more = None  # what "at least", "more than" add to the number

    def _read(self, kind, value, words, following, before):
        if kind == "gerund":
            kind = "word" if following in ("word", "kind", "thing") else "verb"
        if kind == "verb":
            kind = self._verb_or_noun(words, following, before)
        if kind == "done":
            return
        if kind in ("word", "kind", "thing"):
            self._noun(kind, value, words, following)
        elif kind == "article":
            self._close()
            self._determiner = words.lower()
            self._unspread()
        elif kind == "count":
            if self._nouns and words.isdigit():  # as in "runway 27"
                return
            more = self._more
            self._close()
            self._more = more
            count, form, arrangement = value
            if self._more is not None and count is not None:
                count, form = count + self._more, "at_least"
            self._count = (count, form)
            self._attributes += [arrangement] if arrangement else []
            self._each = self._each or form == "unknown"
            self._unspread()
        elif kind == "attribute":
            if self._nouns:
                self._close()
            self._attributes.append(value)
        elif kind == "arrangement":
            self._close_nouns()
            if self.parts and self.parts[-1][0] in ("thing", "verb", "be", "attribute"):
                self.parts.append(("attribute", value))
            else:
                self._attributes.append(value)
        elif kind == "at least":
            if following == "count":
                self._close()
                self._more = AT_LEAST[words.lower()]
            elif words.lower() == "over":
                self._boundary("relation", "")
        elif kind == "or more":
            if self._count and self._count[0] is not None:
                self._count = (self._count[0], "at_least")
        elif kind == "shaped":
            self._nouns = []
        elif kind == "of" and self._count and not self._nouns:
            self._count = None if self._count[1] == "exact" else self._count
        elif kind in ("and", "comma") and not self._nouns and before in ("attribute", "comma"):
            self._predicate()
        elif kind == "no":
            self._close()
            self._negated = "now"
        elif kind == "of them":
            self._start_phrase()
            self.parts.append(("it", "part"))
        elif kind == "relation it":
            self._boundary("relation", value)
            self.parts.append(("it", None))
        elif kind == "like":
            self._boundary("relation", "")
        else:
            self._boundary(kind, value)
            if value == "holds":
                self._count = (None, "many")

    def _boundary(self, kind, value):
        self._close()
        if kind not in ("and", "comma", "of"):
            self._negated = ""
        if kind in ("stop", "there"):
            self._each = False
        self.parts.append((kind, value))

    def _unspread(self):
        if self._negated == "spread":
            self._negated = ""

    def _verb_or_noun(self, words, following, before):
        """A verb or participle: "verb", "word" where it can only be a noun, "" for a modifier."""
        opened = self._determiner or self._count or self._attributes
        if self._nouns or not (opened or before in ("relation", "with", "of")):
            self._close_nouns()
            self.parts.append(("verb", None))
            return "done"
        if words.lower().endswith("ing") and following == "word":
            return "word"  # as in "a boarding gate"
        if following in ("word", "kind", "thing", "attribute", "verb", "gerund"):
            return "done"
        return "done" if words.lower().endswith("ed") else "word"

    def _noun(self, kind, value, words, following):
        last = self._nouns[-1] if self._nouns else None
        if last and last[1] and last[1][1]:  # a plural of a kind ends its phrase
            self._close()
            if kind == "word":
                self.parts.append(("verb", None))
                return
        if kind == "kind" and last and not last[1] and value[1] and following in COUNTING:
            self._close()  # as in "a walkway bridges two buildings"
            self.parts.append(("verb", None))
            return
        if kind == "word" and last and (following == "article" or _is_plural(last[0])):
            self._close()  # as in "the dam blocks the river", "waves beat on the beach"
            self.parts.append(("verb", None))
            return
        self._nouns.append((words, value if kind == "kind" else None))

    def _predicate(self):
        """Attributes without a noun behind a verb are the subject's."""
        if self.parts and self.parts[-1][0] in ("be", "attribute"):
            self.parts += [("attribute", attribute) for attribute in self._attributes]
            self._attributes = []

    def _close_nouns(self):
        if self._nouns:
            self._close()

    def _close(self):
        """End the noun phrase that is open, if any."""
        if self._nouns:
            self._end_phrase()
            if self._negated:
                self._negated = "spread"
        elif self._attributes:
            if self._determiner and self._attributes == ["square"]:
                self.unknown.add("square")
                self.parts.append(("thing", None))
            self._predicate()
        elif not self._determiner and not self._count and self._more is None:
            return
        self._start_phrase()

    def _end_phrase(self):
        *modifiers, (word, value) = self._nouns
        kinds = [noun for noun in modifiers if noun[1]]
        if value and not (value[2] and modifiers):
            self._add_node(word, value)
            return
        head = singular(word.lower())
        things = [noun[0].lower() for noun in modifiers if not noun[1]]
        if kinds and head.split()[-1] in GROUNDS_OF_A_KIND:
            self._count = (None, "unknown")
            self._add_node(*kinds[-1])
            if things or head not in NO_THINGS:
                self.unknown.add(" ".join([*things, head]))
        elif head not in NO_THINGS:
            self.unknown.add(" ".join([noun[0].lower() for noun in modifiers] + [head]))
            self.parts.append(("thing", None))

    def _add_node(self, word, value):
        ids, plural, _ = value
        again = self._mentioned_before(ids, plural)
        if again is not None:
            self.parts.append(("thing", again))
            return
        if self._negated:
            count, form = 0, "exact"
        elif self._count:
            count, form = self._count
        elif plural:
            count, form = 2, "at_least"
        elif self._determiner and not self._each:
            count, form = 1, "exact"
        else:
            count, form = None, "unknown"
        node = {"kinds": ids, "count": count, "count_form": form, "words": word}
        node["attributes"] = self._attributes
        node["place"] = None
        self.nodes.append(node)
        self.parts.append(("thing", len(self.nodes) - 1 if count != 0 else None))

    def _mentioned_before(self, ids, plural):
        """The node that "the bridge" means once more, or None."""
        if self._determiner not in ("the", "this", "that", "these", "those"):
            return None
        if self._count and self._count[1] != "unknown":
            return None
        for i in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[i]
            if node["kinds"] == ids and (node["count"] != 1) == plural:
                if set(self._attributes) <= set(node["attributes"]):
                    return i
        return None


COUNTING = ("article", "count")


def _is_plural(noun):
    return singular(noun.lower()) != noun.lower()


# ------------------------------------------------------------------ relations

NAMING = ("thing", "attribute", "place")


class _Relations:
    """Edges between the nodes of mentions, and what is said of nodes: attributes and places."""

    def __init__(self, mentions):
        self.nodes = mentions.nodes
        self.edges = {}  # (node, node): relation
        self._antecedent = []  # what "it" means: the group before the subject
        self._start_clause()
        self._host = []  # what "with" stands behind
        parts = [*mentions.parts, ("stop", None)]
        for i, (kind, value) in enumerate(parts):
            self._read(kind, value, parts[i + 1 : i + 2], parts[i - 1][0] if i else "stop")

    def _start_clause(self):
        self._subject = []  # things that the clause is about
        self._group = []  # things named last
        self._joins = False  # whether the next thing joins the group
        self._relation = None  # (name, its subject; None for one that follows)
        self._is_object = False  # whether the group is the relation's object
        self._place = None  # of the next group
        self._group_place = None  # of the group
        self._is_part = False  # whether the clause is about a part of a group

    def _read(self, kind, value, following, before):
        if kind == "thing":
            self._thing(value, following[0] if following else ("stop", None))
        elif kind == "relation":
            self._open(value, before, following[0][0] if following else "stop")
        elif kind == "it":
            self._pronoun(value, before)
        elif kind in ("place", "attribute"):
            self._say(kind, value, following, before)
        elif kind in ("and", "of"):
            self._joins = bool(self._group) and (self._joins or before in NAMING)
        elif kind == "comma":
            fronted = self._is_object and self._relation and self._relation[1] is None
            self._joins = bool(self._group) and not fronted and before in NAMING
        elif kind in ("with", "has"):
            self._host = self._about(before)
            self._end_relation()
            self._joins = False
        elif kind in ("there", "be", "verb"):
            if kind == "there" and not self._waits():
                self._start_clause_keeping_place()
            self._joins = False
            if kind != "verb":
                self._drop_open_relation()
        elif kind == "cancel":
            self._relation = None
        elif kind == "stop":
            if not self._waits():
                self._start_clause()
        elif kind == "which":
            self._subject = self._group
            self._joins = False

    def _waits(self):
        """Whether a relation that opened the clause still has no subject."""
        return self._relation is not None and self._relation[1] is None and self._is_object

    def _start_clause_keeping_place(self):
        place = self._place
        self._start_clause()
        self._place = place

    def _end_relation(self):
        if not self._waits():
            self._relation, self._is_object = None, False

    def _drop_open_relation(self):
        if self._relation and not self._is_object:
            self._relation = None

    def _about(self, before):
        """The nodes that a phrase is said of: those named last, or the clause's subject."""
        near = before in ("thing", "it", "attribute", "place", "verb", "which")
        group = self._group if near else self._subject
        if not any(node is not None for node in group) and not group == self._subject:
            return self._subject if self._is_object or self._relation else group
        return group

    def _open(self, name, before, following):
        """A relation begins."""
        subject = self._about(before)
        if not subject:
            subject = None
        if self._waits():
            return
        self._relation = (name, subject)
        self._is_object = False
        self._joins = False
        if self._host and subject and following in ("stop", "be", "and", "comma"):
            for node in self._host:  # as in "a bridge with boats beside"
                self._edge(name, subject, node)
            self._relation = None

    def _thing(self, node, following):
        new_clause = following[0] in ("be", "has", "verb", "relation", "there")
        if self._joins and not (self._is_object and new_clause):
            self._group.append(node)
        else:
            self._new_group(node)
        if self._relation and self._is_object:
            self._connect(node)
        if self._group_place and node is not None:
            self.nodes[node]["place"] = self._group_place
        self._joins = False

    def _new_group(self, node):
        old = self._group
        self._group = [node]
        self._group_place, self._place = self._place, None
        if self._relation and not self._is_object:
            self._is_object = True
            return
        if self._waits():  # as in "next to the harbor are two ships"
            name, _ = self._relation
            for target in old:
                self._edge(name, [node], target)
            self._relation, self._is_object = None, False
            self._subject = self._group
            return
        self._relation, self._is_object = None, False
        self._antecedent = old
        self._is_part = False
        if not self._host or not self._subject:
            self._subject = self._group

    def _connect(self, node):
        name, subject = self._relation
        if subject is not None:
            self._edge(name, subject, node)

    def _edge(self, name, subject, target):
        if not name or target is None:
            return
        for source in subject:
            if source is None or source == target:
                continue
            if name == "surrounded":
                self.edges[target, source] = "around"
            elif name == "holds":
                self.edges[target, source] = "in"
            elif name == "amid":
                if self.nodes[target]["count"] == 1:
                    self.edges[source, target] = "in"
                else:
                    self.edges[target, source] = "around"
            else:
                self.edges[source, target] = name

    def _pronoun(self, value, before):
        if before == "relation" and self._relation:
            target = self._host or self._antecedent
            for node in target:
                self._connect(node)
            self._relation, self._is_object = None, False
        elif self._subject:
            self._group = self._subject
            self._is_part = value == "part"

    def _say(self, kind, value, following, before):
        next_kind = following[0][0] if following else "stop"
        opens = before in ("and", "comma", "stop") and next_kind in ("thing", "there", "comma")
        if kind == "place" and (opens or not self._group):
            self._place = value
            self._joins = False
            return
        if kind == "attribute" and self._is_part:
            return
        for node in self._about(before):
            if node is None:
                continue
            if kind == "place":
                self.nodes[node]["place"] = value
            else:
                self.nodes[node]["attributes"].append(value)


# ------------------------------------------------------------------ graphs


@lru_cache(maxsize=8)
def _vocabulary(lines):
    return Vocabulary(lines)


def build_text_graph(sentence, label_map, north_up=False):
    """The graph of a sentence."""
    vocabulary = _vocabulary(tuple(label_map.lines))
    text = " ".join(sentence.split())
    lowered = text.lower()
    if len(lowered) != len(text):
        text = lowered
    lexemes = vocabulary.read(lowered)
    lexemes = [
        ("relation", lexeme[1] if north_up else "", *lexeme[2:])
        if lexeme[0] == "compass"
        else lexeme
        for lexeme in lexemes
    ]
    mentions = _Mentions(text, lexemes)
    relations = _Relations(mentions)
    graph = nx.DiGraph(sentence=sentence, unknown=tuple(sorted(mentions.unknown)))
    for i, node in enumerate(mentions.nodes):
        node["attributes"] = tuple(node["attributes"])
        graph.add_node(i, **node)
    for (i, j), relation in relations.edges.items():
        graph.add_edge(i, j, relation=relation)
    return graph
