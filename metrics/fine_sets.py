"""Sets of the fine measures: which texts and images are set against true ones.

    counting      a caption that states a number of a kind, and nine with other numbers
    kind swap     a caption that names a kind, and nine that name another in its place
    twins         two images, and sentences that are true of one of them (`twins.json`)
    within class  the scene class of each image (`classes.json`, or names of files)

They are made of captions, a label map and files: no model is needed. metrics/fine.py makes figures
of a model's scores for them.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.vocabulary import NUMBERS, plurals, singular
from T_Graph import build_text_graph

OTHERS = 9  # alternatives of each true text
COUNTS = range(2, 12)  # the numbers that alternatives state

# ------------------------------------------------------------------ sets of texts


class Query(NamedTuple):
    """A caption of an image and texts that differ from it in one number or one kind."""

    image: int  # by the number of its record
    texts: tuple  # the true one, then OTHERS false ones
    kinds: tuple  # class ids of what is counted or exchanged
    count: int | None  # the number that the true text states, of `counting_set`


def counted_right(query, class_ids):
    """Whether one of the kinds that a Query counts is detected as often as it states."""
    return any(int((class_ids == kind).sum()) == query.count for kind in query.kinds)


def counting_set(records, label_map, seed=0):
    """A Query for each caption that states an exact number, 2 or more, of a kind of the LabelMap.

    By a number word or digits, and the others state numbers of COUNTS in the same spelling. Of
    several numbers in a caption one is drawn. Numbers that are stated twice of one kind are left
    out, since one of them alone would contradict the other.
    """
    queries = []
    for image, place, caption in _captions(records):
        rng = np.random.default_rng((seed, image, place))
        text = " ".join(caption.split())
        found = _numbers_of_kinds(text, label_map)
        if found:
            number, kinds, others = found[int(rng.integers(len(found)))]
            chosen = sorted(rng.permutation(len(others))[:OTHERS])
            texts = (text, *(others[i] for i in chosen))
            queries.append(Query(image, texts, kinds, number))
    return queries


def kind_swap_set(records, label_map, seed=0):
    """A Query for each caption that names a kind of the LabelMap for which others can stand.

    All names of the kind in the caption are exchanged for that of another, in the same number, with
    its article. Others are kinds that no caption of the image mentions; those that captions of the
    split mention come first. Of several kinds in a caption one is drawn.
    """
    graphs = {}
    mentioned_in = [set() for _ in records]
    for image, _, caption in _captions(records):
        text = " ".join(caption.split())
        if text not in graphs:
            graphs[text] = build_text_graph(text, label_map)
        mentioned_in[image] |= _kinds_in(graphs[text])
    mentioned = set().union(*mentioned_in)
    kinds = range(len(label_map.lines))
    queries = []
    for image, place, caption in _captions(records):
        rng = np.random.default_rng((seed, image, place))
        text = " ".join(caption.split())
        others = [int(kind) for kind in rng.permutation(kinds) if kind not in mentioned_in[image]]
        others.sort(key=lambda kind: kind not in mentioned)
        nodes = [node for _, node in graphs[text].nodes(data=True)]
        named = sorted({node["kinds"] for node in nodes if len(node["kinds"]) == 1})
        for i in rng.permutation(len(named)):
            texts = _swapped(text, graphs[text], named[i][0], others, label_map)
            if len(texts) == OTHERS:
                queries.append(Query(image, (text, *texts), named[i], None))
                break
    return queries


def _captions(records):
    """(number of the record, of its caption, caption)."""
    for image, record in enumerate(records):
        for place, caption in enumerate(record.captions):
            yield image, place, caption


def _kinds_in(graph):
    return {kind for _, node in graph.nodes(data=True) for kind in node["kinds"]}


# ------------------------------------------------------------------ other numbers

_NUMBER = re.compile(rf"\b(?:{'|'.join(NUMBERS[2:])}|[0-9]+)\b", re.IGNORECASE)


def _numbers_of_kinds(text, label_map):
    """(number, class ids, other texts) of each number in a text that counts a kind.

    It does where another number in its place changes the count of one node of the text's graph, and
    nothing else.
    """
    graph = None
    found = []
    for match in _NUMBER.finditer(text):
        word = match[0]
        number = int(word) if word.isdigit() else NUMBERS.index(word.lower())
        if number < 2:
            continue
        graph = graph or build_text_graph(text, label_map)
        kinds = set()
        others = []
        for count in COUNTS:
            if count != number:
                other = text[: match.start()] + _spelled(count, word) + text[match.end() :]
                others.append(other)
                changed = build_text_graph(other, label_map)
                kinds.add(_recounted(graph, changed, number, count))
        if len(kinds) == 1 and None not in kinds:
            found.append((number, kinds.pop(), others))
    return found


def _spelled(count, word):
    """A number as the word that it replaces is written."""
    if word.isdigit():
        return str(count)
    return NUMBERS[count].capitalize() if word[0].isupper() else NUMBERS[count]


def _recounted(graph, other, number, count):
    """Class ids of the one node whose number became count; None if anything else differs."""
    before, after = ([node for _, node in one.nodes(data=True)] for one in (graph, other))
    if not _are_alike(graph, other, ("count",)):
        return None
    pairs = zip(before, after, strict=True)
    changed = [(old, new) for old, new in pairs if old["count"] != new["count"]]
    if len(changed) != 1:
        return None
    [(old, new)] = changed
    stated_twice = sum(node["kinds"] == old["kinds"] and node["count"] == number for node in before)
    exact = old["count_form"] == "exact" and (old["count"], new["count"]) == (number, count)
    return old["kinds"] if exact and stated_twice == 1 else None


def _are_alike(graph, other, but):
    """Whether two graphs of sentences are the same, but for some fields of nodes."""
    if graph.graph["unknown"] != other.graph["unknown"] or len(graph) != len(other):
        return False
    if list(graph.edges(data="relation")) != list(other.edges(data="relation")):
        return False
    for i, node in graph.nodes(data=True):
        if any(value != other.nodes[i][name] for name, value in node.items() if name not in but):
            return False
    return True


# ------------------------------------------------------------------ other kinds


def _swapped(text, graph, kind, others, label_map):
    """Up to OTHERS texts that name another kind where `text` names this one."""
    nodes = [node for _, node in graph.nodes(data=True) if node["kinds"] == (kind,)]
    if any(node["count"] == 0 for node in nodes):
        return []  # "no ships" stays true of other kinds
    found = []
    for other in others:
        changed = _renamed(text, nodes, label_map.lines[other].split(",")[0].strip())
        after = build_text_graph(changed, label_map)
        expected = [
            (other,) if node["kinds"] == (kind,) else node["kinds"]
            for _, node in graph.nodes(data=True)
        ]
        is_right = [node["kinds"] for _, node in after.nodes(data=True)] == expected
        if is_right and _are_alike(graph, after, ("kinds", "words")):
            found.append(changed)
        if len(found) == OTHERS:
            break
    return found


def _renamed(text, nodes, name):
    """A text with the words of some nodes exchanged for a name, with article and number right."""
    forms = {}  # words in lower case: the new ones
    for node in nodes:
        words = node["words"]
        forms[words.lower()] = plurals(name)[0] if _is_plural(words, node["count"]) else name
    longest_first = sorted(forms, key=len, reverse=True)
    pattern = rf"\b(?P<article>an? )?(?P<words>{'|'.join(map(re.escape, longest_first))})\b"

    def new_words(match):
        new = forms[match["words"].lower()]
        if match["words"][0].isupper():
            new = new[0].upper() + new[1:]
        if match["article"] is None:
            return new
        article = "an " if new[0].lower() in "aeiou" else "a "
        return (article.capitalize() if match["article"][0] == "A" else article) + new

    return re.sub(pattern, new_words, text, flags=re.IGNORECASE)


def _is_plural(words, count):
    last = words.lower().split()[-1]
    if last.endswith("craft"):  # one aircraft, two aircraft
        return count != 1
    return singular(last) != last


# ------------------------------------------------------------------ files


def scene_classes(root, names):
    """The scene class of each image name, or None.

    By `classes.json` of the data root, as of UCM, whose image N shows class (N - 1) // 100; else by
    the file's name, as RSICD's airport_12.jpg. Where names tell fewer than two classes they tell
    none. Raises ValueError for a file that is no list of names.
    """
    path = Path(root) / "classes.json"
    stems = [Path(name).stem for name in names]
    if path.is_file():
        classes = _json(path)
        if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
            raise ValueError(f"{path}: expected a list of names, that of image N at (N - 1) // 100")
        numbers = [int(stem) if re.fullmatch("[0-9]{1,9}", stem) else 0 for stem in stems]
        return [
            classes[(number - 1) // 100] if 0 < number <= 100 * len(classes) else None
            for number in numbers
        ]
    found = [re.fullmatch(r"([A-Za-z]+)_[0-9]+", stem) for stem in stems]
    classes = [match and match[1].lower() for match in found]
    return classes if len(set(classes) - {None}) > 1 else [None] * len(names)


def read_twins(root):
    """The pairs in `twins.json` of a data root, as python -m dataset.scenes --twins writes them.

    None where there is no such file. Raises ValueError for one of another form.
    """
    path = Path(root) / "twins.json"
    if not path.is_file():
        return None
    pairs = _json(path)
    if not isinstance(pairs, list) or not pairs or not all(map(_is_pair, pairs)):
        raise ValueError(
            f'{path}: expected a list of {{"images": [a, b], "sentences": [{{"text": ..., "of": 0 '
            "or 1}, ...]}, with names of images"
        )
    return pairs


def _json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None


def _is_pair(pair):
    if not isinstance(pair, dict):
        return False
    images, sentences = pair.get("images"), pair.get("sentences")
    if not isinstance(images, list) or not isinstance(sentences, list) or len(images) != 2:
        return False
    of_images = all(isinstance(name, str) for name in images)
    return of_images and bool(sentences) and all(map(_is_sentence, sentences))


def _is_sentence(sentence):
    if not isinstance(sentence, dict) or not isinstance(sentence.get("text"), str):
        return False
    return sentence.get("of") in (0, 1) and isinstance(sentence.get("states", ""), str)
