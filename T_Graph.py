"""Sentences to graphs: the kinds, counts and relations that a caption states.

    python T_Graph.py "two planes left of a pier" --draw graph.png

prints and draws the graph of a sentence: the sister of an image's graph in `V_Graph.py`.
`build_text_graph` goes through a sentence three times: `dataset/vocabulary.py` makes lexemes of its
words, `_Mentions` finds the noun phrases in them, `_Relations` connects what these name.
`det_json/README.md` tells what is read, what is not, and how well.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("T_Graph", __doc__)  # before slow packages are imported

from functools import lru_cache

from dataset.vocabulary import NO_THINGS, ROOMS_FOR_KINDS, Vocabulary, singular
from det_formats.det_json import LABELS, read_label_map
from escaping import escaped, require_utf8
from options import parse_options, run

NOUNS = ("word", "kind", "thing")  # word classes, as of dataset/vocabulary.py
BOUNDARIES = frozenset("be there with has place stop which it them cancel".split())
SAID = ("thing", "attribute", "place")  # word classes of parts


# ------------------------------------------------------------------ graphs


@lru_cache(maxsize=8)
def _vocabulary(lines):
    return Vocabulary(lines)


def build_text_graph(sentence, label_map, north_up=False):
    """What a sentence says of the label map's kinds, as a networkx.DiGraph; pure, deterministic.

    Nodes are mentions, in order, with the attributes kinds (class ids, ascending: a word may stand
    for several), count (int or None), count_form ("exact", "at_least", "many" or "unknown"), words,
    attributes (as "white", "in a row") and place ("middle", "left", "right", "top", "bottom",
    "corner", "edge" or None) and corner ("top left" and so on, where the sentence tells which).
    What is said to be absent has the exact count 0.

    Edges have the attribute relation, of node i to node j: left, right, above, below, beside,
    around, between, apart, in or on; of two nodes the last one stated. north_up: whether "north of"
    means above, and so on. graph.graph holds "sentence" and "unknown": things in no label.
    """
    import networkx as nx  # slow to import, and a model without object evidence does without

    text = " ".join(sentence.split())
    lower = text.lower()
    if len(lower) != len(text):  # of a few letters the lower case is longer
        text = lower
    lexemes = _vocabulary(tuple(label_map.lines)).read(lower)
    mentions = _Mentions(text, lexemes, north_up)
    relations = _Relations(mentions)
    graph = nx.DiGraph(sentence=sentence, unknown=tuple(sorted(mentions.unknown)))
    for i, node in enumerate(mentions.nodes):
        graph.add_node(i, **node)
        graph.nodes[i].update(attributes=tuple(node["attributes"]), corner=None)
        if node["place"] and node["place"].endswith(" corner"):
            graph.nodes[i].update(place="corner", corner=node["place"].removesuffix(" corner"))
    for (i, j), relation in relations.edges.items():
        graph.add_edge(i, j, relation=relation)
    return graph


# ------------------------------------------------------------------ mentions


class _Mentions:
    """The noun phrases of a sentence, with their counts and attributes.

    nodes: one a mention of a kind; unknown: names of other things; parts: (word class, value) of
    all that matters to relations, in order. The value of a "thing" is its node, or None.
    """

    def __init__(self, sentence, lexemes, north_up):
        self.nodes = []
        self.unknown = set()
        self.parts = [("stop", None)]
        self._north_up = north_up
        self._negated = ""  # "now" from "no" on, "still" behind the thing: "no ships or boats"
        self._each = False  # whether things that others have are named: "each with a pool"
        self._start_phrase()
        word_classes = ["stop", *(lexeme[0] for lexeme in lexemes), "stop"]
        for i, (word_class, value, start, end) in enumerate(lexemes):
            self._read(word_class, value, sentence[start:end], word_classes[i], word_classes[i + 2])
        self._boundary("stop")

    def _start_phrase(self):
        self._nouns = []  # (words, value of a kind or None)
        self._attributes = []
        self._determiner = ""
        self._count = None  # (count, form)
        self._more = None  # what "at least" or "more than" add to the count

    def _read(self, word_class, value, words, before, after):
        """One lexeme; before, after: word classes of its neighbours."""
        if word_class == "gerund":
            word_class = "word" if after in NOUNS else "verb"
        if word_class in NOUNS:
            self._noun(word_class, value, words, after)
        elif word_class in BOUNDARIES:
            self._boundary(word_class, value)
        elif word_class == "verb":
            self._verb(words, before, after)
        elif word_class in ("article", "no"):
            self._close()
            if word_class == "no":
                self._negated = "now"
            else:
                self._determiner = words.lower()
                self._end_negation()
        elif word_class == "count":
            self._quantity(*value, words)
        elif word_class == "at least":
            if after == "count":
                self._close()
                self._more = value
            else:  # "over" is a relation, too, that no image from above shows
                self._boundary("relation", "")
        elif word_class == "or more":
            if self._count and self._count[1] == "exact":
                self._count = (self._count[0], "at_least")
        elif word_class == "attribute":
            self._close_nouns()
            self._attributes.append(value)
        elif word_class == "arrangement":
            self._close_nouns()
            if self.parts[-1][0] in ("thing", "verb", "be", "attribute"):
                self.parts.append(("attribute", value))
            else:
                self._attributes.append(value)
        elif word_class == "shape":  # "ship shaped", "plane view"
            self._nouns = []
        elif (
            word_class in ("and", "comma")
            and before == "attribute"
            and after in (*NOUNS, "attribute")
        ):
            if self.parts[-1][0] == "be":  # "are round and white"; else "a large, white plane"
                self._boundary(word_class)
        elif word_class == "of" and self._count and not self._nouns:
            if self._count[1] == "exact":  # "two of the planes"
                self._count = None
        elif word_class == "part":
            self._start_phrase()
            self.parts.append(("it", "part"))
        elif word_class == "relation it":
            self._boundary("relation", value)
            self.parts.append(("it", None))
        elif word_class == "compass":
            self._boundary("relation", value if self._north_up else "")
        else:
            self._boundary(word_class, value)
            if value == "holds":
                self._count = (None, "many")

    def _boundary(self, word_class, value=None):
        """What ends a noun phrase and matters to relations."""
        self._close()
        if word_class not in ("and", "comma", "of"):
            self._negated = ""
        if word_class in ("stop", "there"):
            self._each = False
        self.parts.append((word_class, value))

    def _end_negation(self):
        if self._negated == "still":
            self._negated = ""

    def _quantity(self, count, form, arrangement, words):
        if self._nouns and words.isdigit():  # "runway 27"
            return
        more = self._more
        self._close()
        if more is not None and count is not None:
            count, form = count + more, "at_least"
        self._count = (count, form)
        self._each = self._each or form == "unknown"
        if arrangement:
            self._attributes.append(arrangement)
        self._end_negation()

    def _verb(self, words, before, after):
        """A verb; or a noun or a modifier, where a noun phrase has begun."""
        begun = self._determiner or self._count or self._attributes
        if self._nouns or not (begun or before in ("relation", "with", "of")):
            self._close_nouns()
            self.parts.append(("verb", None))
        elif words.lower().endswith("ing") and after == "word":  # "a boarding gate"
            self._nouns.append((words, None))
        elif after not in (*NOUNS, "attribute", "verb", "gerund"):
            if not words.lower().endswith("ed"):  # "beside the park"
                self._nouns.append((words, None))

    def _noun(self, word_class, value, words, after):
        if self._nouns:
            last, last_value = self._nouns[-1]
            is_plural = singular(last.lower()) != last.lower()
            if last_value:
                is_plural = last_value.is_plural
            if word_class == "word" and (is_plural or after == "article"):
                # "the dam blocks the river", "waves beat on the beach"
                self._close()
                self.parts.append(("verb", None))
                return
            is_verb = word_class == "kind" and value.is_plural and after in ("article", "count")
            if is_verb and not last_value:  # "a walkway bridges two buildings"
                self._close()
                self.parts.append(("verb", None))
                return
            if last_value and is_plural:
                self._close()
        self._nouns.append((words, value if word_class == "kind" else None))

    def _close_nouns(self):
        if self._nouns:
            self._close()

    def _close(self):
        """End the noun phrase that is open, if any."""
        if self._nouns:
            self._end_phrase()
            self._negated = self._negated and "still"
        elif self._attributes:
            if self.parts[-1][0] in ("be", "attribute"):  # "the tanks are white"
                self.parts += [("attribute", attribute) for attribute in self._attributes]
            elif self._determiner and self._attributes == ["square"]:
                self.unknown.add("square")
                self.parts.append(("thing", None))
        self._start_phrase()

    def _end_phrase(self):
        *modifiers, (words, value) = self._nouns
        kinds = [noun for noun in modifiers if noun[1]]
        things = [noun[0].lower() for noun in modifiers if not noun[1]]
        head = singular(words.lower())
        if value and not (value.is_shared and modifiers):  # a "gas station" is no other station
            self._add_node(words, value)
        elif kinds and head.split()[-1] in ROOMS_FOR_KINDS:  # "plane parking area"
            self._count = (None, "unknown")
            self._add_node(*kinds[-1])
            if things or head not in NO_THINGS:
                self.unknown.add(" ".join([*things, head]))
        elif things or kinds or head not in NO_THINGS:
            self.unknown.add(" ".join([*(noun[0].lower() for noun in modifiers), head]))
            self.parts.append(("thing", None))
        elif self._determiner and self.parts[-1][0] == "and":  # "and the ground is dark"
            self.parts.append(("thing", None))

    def _add_node(self, words, value):
        ids, is_plural, _ = value
        again = self._mentioned_before(ids, is_plural)
        if again is not None:
            self._add_thing(again)
            return
        count, form = None, "unknown"
        if self._negated:
            count, form = 0, "exact"
        elif self._count:
            count, form = self._count
        elif is_plural:
            count, form = 2, "at_least"
        elif self._determiner and not self._each:
            count, form = 1, "exact"
        self.nodes.append(
            {
                "kinds": ids,
                "count": count,
                "count_form": form,
                "words": words,
                "attributes": self._attributes,
                "place": None,
            }
        )
        self._add_thing(len(self.nodes) - 1)

    def _add_thing(self, node):
        """What is absent stands nowhere: no edge leads to it."""
        self.parts.append(("thing", None if self.nodes[node]["count"] == 0 else node))

    def _mentioned_before(self, ids, is_plural):
        """The node that a phrase like "the bridge" means once more, or None."""
        is_definite = self._determiner in ("the", "this", "that", "these", "those")
        if not is_definite or (self._count and self._count[1] != "unknown"):
            return None
        for i, node in reversed(list(enumerate(self.nodes))):
            if node["kinds"] == ids and (node["count"] != 1) == is_plural:
                if set(self._attributes) <= set(node["attributes"]):
                    return i
        return None


# ------------------------------------------------------------------ relations


class _Relations:
    """Edges between mentions, and what a sentence says of them later: attributes and places.

    A group is a list of things that are named together ("two planes and a car"); a thing is its
    node, or None. edges: {(node, node): relation}.
    """

    def __init__(self, mentions):
        self.nodes = mentions.nodes
        self.edges = {}
        self._earlier = []  # the group before the subject, which "it" means
        self._start_clause()
        parts = mentions.parts
        for i in range(1, len(parts)):
            word_class, value = parts[i]
            after = parts[i + 1][0] if i + 1 < len(parts) else "stop"
            self._read(word_class, value, parts[i - 1][0], after)

    def _start_clause(self):
        self._subject = []  # the group that the clause is about
        self._group = []  # the group named last
        self._is_named = False  # whether no verb stands behind the group
        self._joins = ""  # "and" or "of" where the next thing belongs to that group
        self._relation = None  # (name, group; None where the subject comes later)
        self._is_object = False  # whether the last group is the relation's object
        self._host = []  # the group before "with" or "has"
        self._place = None  # of the next group, and then of all of its things
        self._group_place = None
        self._of_part = False  # "three of them": what is said is not true of all

    def _read(self, word_class, value, before, after):
        """One part; before, after: word classes of its neighbours."""
        if word_class == "thing":
            self._thing(value, after)
        elif word_class == "relation":
            self._open(value, before, after)
        elif word_class in ("it", "them"):
            self._pronoun(word_class, value, before, after)
        elif word_class == "place":
            self._say_place(value, before, after)
        elif word_class == "attribute":
            self._say_attribute(value, before)
        elif word_class == "and":
            self._joins = "and" if self._joins or (before in SAID and self._may_join()) else ""
        elif word_class == "comma":
            self._joins = "and" if before in SAID and self._may_join() else ""
        elif word_class == "of":
            self._joins = "of" if self._group and before == "thing" else ""
        elif word_class in ("with", "has"):
            self._host = self._meant(before)
            self._joins = ""
            if not self._waits():
                self._end_relation()
        elif word_class in ("be", "verb"):
            self._joins = ""
            self._is_named = False
            if word_class == "be" and not self._is_object:
                self._end_relation()
        elif word_class == "which":
            self._subject = self._group
            self._joins = ""
        elif word_class == "cancel":
            self._end_relation()
        elif not self._waits():  # "there", "stop"
            self._earlier = self._subject or self._earlier
            place = self._place if word_class == "there" else None
            self._start_clause()
            self._place = place

    def _may_join(self):
        """Whether another thing may belong to the last group."""
        return bool(self._group) and self._is_named and not self._waits()

    def _waits(self):
        """Whether the subject comes later: "next to the harbor are two ships"."""
        return bool(self._relation) and self._relation[1] is None and self._is_object

    def _end_relation(self):
        self._relation, self._is_object = None, False

    def _meant(self, before):
        """The group that a phrase is about: the last one behind its thing, else the subject."""
        if before not in ("thing", "it", "them", "attribute", "place", "verb", "which"):
            return self._subject
        if all(node is None for node in self._group) and self._is_object:
            return self._subject  # "planes on the runway near a building"
        return self._group

    def _thing(self, node, after):
        begins_clause = self._is_object and after in ("be", "has", "verb", "relation", "there")
        if self._joins == "of":
            if any(thing is not None for thing in self._group):
                self._group.append(node)
        elif self._joins and not begins_clause:
            self._group.append(node)
        else:
            self._start_group(node)
        self._joins = ""
        self._is_named = True
        if self._is_object and self._relation[1] is not None:
            self._connect(*self._relation, node)
        if self._group_place and node is not None:
            self.nodes[node]["place"] = self._group_place

    def _start_group(self, node):
        last, self._group = self._group, [node]
        self._group_place, self._place = self._place, None
        if self._relation and not self._is_object:
            self._is_object = True
            return
        if self._waits():
            for target in last:
                self._connect(self._relation[0], self._group, target)
            self._subject = []
        self._end_relation()
        self._earlier = last or self._earlier
        self._of_part = False
        if not (self._host and self._subject):
            self._subject = self._group

    def _open(self, name, before, after):
        """A relation begins; after "with" it may end at once: "a bridge with boats beside"."""
        if self._waits():
            return
        subject = self._meant(before)
        self._relation = (name, subject or None)
        self._is_object = False
        self._joins = ""
        if self._host and subject and after in ("stop", "be", "and", "comma"):
            for node in self._host:
                self._connect(name, subject, node)
            self._end_relation()

    def _connect(self, name, subject, target):
        """Edges of a relation from each thing of a group to one thing."""
        for source in subject:
            if not name or source is None or target is None or source == target:
                continue
            is_amid_one = name == "amid" and self.nodes[target]["count"] == 1
            if name in ("surrounded", "amid") and not is_amid_one:
                self.edges[target, source] = "around"
            elif name == "holds":
                self.edges[target, source] = "in"
            else:
                self.edges[source, target] = "in" if is_amid_one else name

    def _pronoun(self, kind, value, before, after):
        """ "it" and the like: a relation's object, or the subject once more."""
        if before == "relation" and self._relation:
            name, subject = self._relation
            if subject is None or self._fronted(after):  # "to its right are two ships"
                self._relation, self._is_object = (name, None), True
                return
            targets = self._host or self._earlier
            for node in targets:
                self._connect(name, subject, node)
            self._end_relation()
            return
        self._subject = self._group = self._subject or self._earlier
        self._of_part = value == "part"

    def _fronted(self, after):
        return after in ("be", "there", "thing") and not self._host

    def _say_place(self, place, before, after):
        opens = before in ("and", "comma", "stop") and after in ("thing", "there", "comma")
        if opens or not self._group:
            self._place = place
            self._joins = ""
            return
        for node in self._meant(before):
            if node is not None:
                self.nodes[node]["place"] = place

    def _say_attribute(self, attribute, before):
        for node in self._meant(before):
            if node is not None and not self._of_part:
                if attribute not in self.nodes[node]["attributes"]:
                    self.nodes[node]["attributes"].append(attribute)


# ------------------------------------------------------------------ the command


def main(arguments=None):
    # The command alone draws; the functions above need no images.
    from dataset import images
    from det_formats.drawing import draw_text_graph

    options = parse_options("T_Graph", __doc__, arguments)
    if options.draw:
        images.check_picture_name(options.draw)
    require_utf8(options.sentence, "sentence")
    if not options.sentence.strip():
        raise ValueError("sentence: empty; give one in quotes")
    label_map = read_label_map(options.labels or LABELS)
    graph = build_text_graph(options.sentence, label_map, options.north_up)

    print(f"{escaped(options.sentence)}: {len(graph)} nodes, {len(graph.edges)} edges")
    for i, node in graph.nodes(data=True):
        kinds = escaped(" or ".join(label_map.names(node["kinds"])))
        count = "" if node["count"] is None else f" {node['count']}"
        place = " ".join(part for part in (node["corner"], node["place"]) if part)
        said = [*node["attributes"], *([f"place: {place}"] if place else [])]
        print(
            f"  {i:2d} {escaped(node['words']):20s} {kinds}, {node['count_form']}{count}"
            f"{''.join(f', {escaped(words)}' for words in said)}"
        )
    for i, j, relation in graph.edges(data="relation"):
        print(f"  edge {i}-{j}: {relation}")
    if graph.graph["unknown"]:
        print(f"  in no label: {escaped(', '.join(graph.graph['unknown']))}")
    if options.draw:
        images.save_picture(draw_text_graph(graph, label_map), options.draw)
        print(f"drawn to {escaped(options.draw)}")


if __name__ == "__main__":
    run(main)
