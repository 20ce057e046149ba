"""CLIP's byte-level byte-pair encoding.

The algorithm is that of OpenAI's GPT-2 and CLIP (https://github.com/openai/CLIP, MIT), in our own
words: text is cleaned and lower-cased, cut into words, each word's bytes are written as printable
characters, and the most frequent neighbours are merged, in the order of the vocabulary file.
"""

import gzip
import html
import importlib.util
from functools import lru_cache
from itertools import islice
from pathlib import Path

import regex

from progress import Progress

CONTEXT_LENGTH = 77  # token ids of a text in CLIP's models, start and end token included


FILE = "bpe_simple_vocab_16e6.txt.gz"


MERGES = 49152 - 256 - 2  # of the file's lines; 512 characters and two special tokens come beside


START = "<|startoftext|>"
END = "<|endoftext|>"


_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def find_vocabulary():
    """Path of CLIP's vocabulary file: in `models/`, else inside the installed open_clip_torch.

    Raises FileNotFoundError that lists the places searched and what to install.
    """
    places = [Path(__file__).parent / "models" / FILE]
    missing = ""
    package = importlib.util.find_spec("open_clip")  # locates the package without importing it
    if package is None:
        missing = " and the package open_clip, which is not installed"
    else:
        places += [Path(folder) / FILE for folder in package.submodule_search_locations]
    for place in places:
        if place.is_file():
            return place
    searched = ", ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"CLIP's vocabulary {FILE} was not found; searched: {searched}{missing}. "
        "Remedy: pip install open_clip_torch, or put the file into models/"
    )


def byte_characters():
    """A printable character for each of the 256 bytes, in the vocabulary's order: a dict.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return characters


def clean(text):
    """Repair encoding, resolve HTML entities (twice, as CLIP does), fold white space and case."""
    is_plain = text.isascii() and text.isprintable() and "&" not in text
    if not is_plain:
        import ftfy  # slow to import, and a plain text needs no repair

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class SimpleTokenizer:
    """Text to CLIP's token ids.

    path: of the vocabulary file, a merge a line, the most frequent first; default CLIP's.

    ids           id of each token: characters, characters that end a word, merges, start, end
    ranks         place of each merge in the file: the first is done first
    bytes         see `byte_characters`
    start, end    ids of the special tokens
    """

    def __init__(self, path=None):
        with gzip.open(path or find_vocabulary(), "rt", encoding="utf-8") as file:
            lines = islice(file, 1, MERGES + 1)  # the first is a heading; most are not needed
            merges = [tuple(line.split()) for line in lines]
        self.bytes = byte_characters()
        characters = list(self.bytes.values())
        last_characters = [character + "</w>" for character in characters]
        merged = [first + second for first, second in merges]
        tokens = [*characters, *last_characters, *merged, START, END]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start = self.ids[START]
        self.end = self.ids[END]
        self._ids_of_word = lru_cache(maxsize=100_000)(self._merge)

    def _merge(self, word):
        """Ids of a word in byte characters: merge the best-ranked pair until none is left."""
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = zip(parts[:-1], parts[1:], strict=True)
            best = min(pairs, key=lambda pair: self.ranks.get(pair, MERGES))
            if best not in self.ranks:
                break
            parts = _merge_pair(parts, best)
        return [self.ids[part] for part in parts]

    def encode(self, text):
        """Token ids of a text, without start and end token."""
        ids = []
        for word in _WORDS.findall(clean(text)):
            if word in (START, END):
                ids.append(self.ids[word])
            else:
                characters = [self.bytes[byte] for byte in word.encode("utf-8")]
                ids += self._ids_of_word("".join(characters))
        return ids


def _merge_pair(parts, pair):
    """A word's parts with every occurrence of a pair of neighbours joined, from the left."""
    merged = []
    i = 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


@lru_cache(maxsize=1)
def tokenizer():
    """The tokenizer, built at first use: importing this module reads no file."""
    return SimpleTokenizer()


def tokenize(texts, context_length=CONTEXT_LENGTH, truncate=True):
    """Token ids of one text or a list of texts.

    Parameters
    ----------
    texts : str or list of str
    context_length : int
        Columns of the result; CLIP's models use 77.
    truncate : bool
        Cut longer texts, keeping the end token; otherwise a longer text raises ValueError.

    Returns
    -------
    tensor (B, context_length) of int64, zero after the end token
    """
    import torch  # needed here alone: the tokenizer itself does without

    if isinstance(texts, str):
        texts = [texts]
    texts = list(texts)
    encoder = tokenizer()
    result = torch.zeros(len(texts), context_length, dtype=torch.long)
    for i, text in enumerate(Progress(texts, "tokenize", "texts")):
        ids = [encoder.start, *encoder.encode(text), encoder.end]
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(
                    f"text {i} has {len(ids)} tokens, context_length is {context_length}; shorten "
                    f"it or pass truncate=True: '{text[:80]}'"
                )
            ids = [*ids[: context_length - 1], encoder.end]
        result[i, : len(ids)] = torch.tensor(ids)
    return result
