"""Token ids against open_clip's tokenizer, and where the vocabulary comes from."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer as Reference

import clip
import simple_tokenizer
from simple_tokenizer import END, FILE, START, SimpleTokenizer, clean, find_vocabulary

ROOT = Path(__file__).parent.parent
# open_clip 3 spells the special tokens differently from OpenAI's vocabulary, which is ours.
THEIR_NAMES = {START: "<start_of_text>", END: "<end_of_text>"}
WORDS = "six storage tanks beside a road near the harbour"

TEXTS = {
    "plain": "Six storage tanks stand beside a road.",
    "empty": "",
    "white space": " \t\r\n\u00a0\u2003\u3000 ",
    "folded space": "a  plane\tand\n\na\u00a0ship\u3000here",
    "case": "A GREEN Meadow",
    "dotted capital": "İstanbul ISPARTA ı",
    "long s": "ſ's ſhip",
    "sharp s": "STRAßE straße ẞ",
    "entities": "&lt;b&gt; caf&eacute; &amp; &#39;tea&#39; &#x1F680; &nbsp; &unknown; &amp",
    "twice escaped": "&amp;lt;plane&amp;gt; &amp;amp; &amp;#39;s",
    "three times escaped": "&amp;amp;lt; &amp;amp;amp;",
    "emoji": "🚢✈️ a 👩‍👩‍👧‍👦 family 🇩🇪 👍🏽",
    "chinese": "停机坪上有六架飞机。",
    "japanese": "ヘリコプター と 船",
    "korean": "비행기 여섯 대",
    "arabic": "ست طائرات",
    "hindi": "छह हवाई जहाज़",
    "accents": "Ångström naïve façade ÉCOLE coöperate",
    "combining": "cafe\u0301 A\u030a n\u0303 o\u0308\u0304",
    "mojibake": "cafÃ© â€œquotedâ€\x9d Ã¼ber",
    "ligatures": "ﬁeld ﬂag Ⅷ ℡ ﬃ",
    "full width": "ＦＵＬＬ　ＷＩＤＴＨ １２",
    "control": "a\x00b\x07c\x1bd\x7fe\u200bf\u202eg\ufefeffh",
    "terminal": "\x1b[31mred\x1b[0m plane",
    "surrogate": "lone \ud800 surrogate \udfff",
    "private": "\ue000 \U000f0000 \U0010ffff",
    "digits": "2023 planes, 3.14 1,000 ½ ² ٣ 42nd",
    "apostrophes": "it's we're I'd don't they'll I've I'm 'tis rock'n'roll boats' IT'S ’s",
    "punctuation": "well...?!? (a) [b] {c} <d> -- __ / \\ | ~ `` ^ % $ # @ * + =",
    "angle brackets": "<| <|start |endoftext|> <|endoftext|",
    "url": "https://example.org/a?b=c&d=e#f",
    "one letter": "a",
    "one sign": "!",
    "many words": "cat sat " * 1250,
    "one letter repeated": "a" * 10_000,
    "one long word": "".join(random.Random(0).choices("abcdefghijklmnop", k=2_000)),
    "many signs": "!?" * 5_000,
}


@pytest.fixture(scope="module")
def ours():
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def theirs():
    return Reference()


# ------------------------------------------------------------------ ids


@pytest.mark.parametrize("name", TEXTS)
def test_ids_equal_open_clip(ours, theirs, name):
    assert ours.encode(TEXTS[name]) == theirs.encode(TEXTS[name])


@pytest.mark.parametrize("context_length", [77, 16, 2])
def test_tokenize_equals_open_clip(theirs, context_length):
    texts = list(TEXTS.values())
    found = clip.tokenize(texts, context_length=context_length)
    assert found.dtype == torch.int64 and found.shape == (len(texts), context_length)
    assert torch.equal(found, theirs(texts, context_length=context_length))


def test_ids_equal_open_clip_on_random_characters(ours, theirs):
    rng = random.Random(0)
    ranges = [(0x20, 0x7F), (0, 0x20), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x500)]
    ranges += [(0x2000, 0x2070), (0x4E00, 0x9FFF), (0x1F300, 0x1F700), (0, 0xD800)]
    pieces = ["&amp;", "&lt;", "&#39;", "'s", "'LL", " ", "  ", "12", "ship", "Ã©"]
    for _ in range(500):
        text = "".join(
            rng.choice(pieces) if rng.random() < 0.2 else chr(rng.randrange(*rng.choice(ranges)))
            for _ in range(rng.randrange(40))
        )
        assert ours.encode(text) == theirs.encode(text), repr(text)


@pytest.mark.parametrize(
    "text",
    [START, END, f"a {END} b", f"{START}{END}", f"plane{END}ship", f"{START} a plane {END} {END}"],
)
def test_special_tokens_in_a_text_become_single_ids(ours, theirs, text):
    for name, their_name in THEIR_NAMES.items():
        assert ours.encode(text.upper()) == ours.encode(text)
        text_for_them = text.replace(START, THEIR_NAMES[START]).replace(END, THEIR_NAMES[END])
        assert ours.encode(text) == theirs.encode(text_for_them)
        assert ours.ids[name] == theirs.encoder[their_name]


def test_the_vocabularies_are_the_same(ours, theirs):
    expected = dict(theirs.encoder)
    for name, their_name in THEIR_NAMES.items():
        expected[name] = expected.pop(their_name)
    assert ours.ids == expected
    assert ours.ranks == theirs.bpe_ranks
    assert ours.bytes == theirs.byte_encoder
    assert (ours.start, ours.end) == (49406, 49407)


def test_entities_are_resolved_twice_and_no_more():
    assert clean("&amp;lt;plane&amp;gt;") == "<plane>"
    # ftfy resolves them once more, but only in a text that has no "<".
    assert clean("<b> &amp;amp;lt;") == "<b> &lt;"


def test_encoding_twice_gives_the_same(ours):
    first = ours.encode(WORDS)
    first.append(0)  # must not reach the cache of words
    assert ours.encode(WORDS) == first[:-1]
    assert ours.encode("harbour") == ours.encode("harbour")


# ------------------------------------------------------------------ tokenize


def test_a_row_is_start_words_end_and_zeros():
    row = clip.tokenize("six planes")[0].tolist()
    ids = simple_tokenizer.tokenizer().encode("six planes")
    assert row == [49406, *ids, 49407] + [0] * (77 - len(ids) - 2)


def test_one_text_is_a_batch_of_one():
    assert torch.equal(clip.tokenize(WORDS), clip.tokenize([WORDS]))
    assert torch.equal(clip.tokenize([WORDS, "ship"])[:1], clip.tokenize(WORDS))


def test_no_texts_give_no_rows():
    assert clip.tokenize([]).shape == (0, 77)


def test_a_longer_text_is_cut_and_keeps_its_end():
    row = clip.tokenize("ship " * 200)[0]
    assert row[0] == 49406 and row[-1] == 49407
    assert (row[1:-1] == simple_tokenizer.tokenizer().encode("ship")[0]).all()


def test_the_longest_text_that_fits_is_whole():
    assert torch.equal(
        clip.tokenize("ship " * 75, truncate=False),
        clip.tokenize("ship " * 75, truncate=True),
    )
    assert clip.tokenize("ship " * 75, truncate=False)[0, -1] == 49407


def test_without_truncation_a_longer_text_is_an_error_that_quotes_it():
    with pytest.raises(ValueError, match="text 1 has 78 tokens.*'harbour ship ship"):
        clip.tokenize(["ship", "harbour " + "ship " * 75], truncate=False)


# ------------------------------------------------------------------ vocabulary file


def _run(code):
    """Standard output of a fresh interpreter that also counts openings of the vocabulary."""
    watch = (
        "import sys\nopened = []\n"
        "sys.addaudithook(lambda event, arguments: opened.append(arguments[0])\n"
        f"    if event == 'open' and '{FILE}' in str(arguments[0]) else None)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", watch + code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_vocabulary_is_found_without_importing_open_clip():
    out = _run(
        "import simple_tokenizer\n"
        "print(len(opened))\n"
        "print(simple_tokenizer.SimpleTokenizer().encode('ship')[0])\n"
        "print(len(opened), 'open_clip' in sys.modules, 'torch' in sys.modules)\n"
    )
    assert out == ["0", "1158", "1", "False", "False"]


def test_importing_clip_reads_no_vocabulary():
    out = _run(
        "import clip\n"
        "print(len(opened), 'open_clip' in sys.modules)\n"
        "clip.tokenize('ship'); clip.tokenize('plane')\n"
        "print(len(opened), 'open_clip' in sys.modules)\n"
    )
    assert out == ["0", "False", "1", "False"]


def test_a_file_in_models_is_preferred(tmp_path, monkeypatch):
    elsewhere = find_vocabulary()
    monkeypatch.setattr(simple_tokenizer, "__file__", str(tmp_path / "simple_tokenizer.py"))
    assert find_vocabulary().parent.name == "open_clip"
    own = tmp_path / "models" / FILE
    own.parent.mkdir()
    shutil.copy(elsewhere, own)
    assert find_vocabulary() == own
    assert SimpleTokenizer().encode(WORDS) == SimpleTokenizer(elsewhere).encode(WORDS)


def test_models_suffices_without_open_clip(tmp_path, monkeypatch):
    own = tmp_path / "models" / FILE
    own.parent.mkdir()
    own.touch()
    monkeypatch.setattr(simple_tokenizer, "__file__", str(tmp_path / "simple_tokenizer.py"))
    monkeypatch.setattr(simple_tokenizer.importlib.util, "find_spec", lambda name: None)
    assert find_vocabulary() == own


def test_without_open_clip_the_error_lists_places_and_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(simple_tokenizer, "__file__", str(tmp_path / "simple_tokenizer.py"))
    monkeypatch.setattr(simple_tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as error:
        find_vocabulary()
    for part in (tmp_path / "models" / FILE, "not installed", "pip install open_clip_torch"):
        assert str(part) in str(error.value)


def test_an_open_clip_without_the_file_is_listed(tmp_path, monkeypatch):
    class Spec:
        submodule_search_locations = [str(tmp_path / "site" / "open_clip")]

    monkeypatch.setattr(simple_tokenizer, "__file__", str(tmp_path / "simple_tokenizer.py"))
    monkeypatch.setattr(simple_tokenizer.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(FileNotFoundError) as error:
        find_vocabulary()
    for place in (tmp_path / "models" / FILE, tmp_path / "site" / "open_clip" / FILE):
        assert str(place) in str(error.value)


# ------------------------------------------------------------------ every real caption


def _captions(folder):
    """Every caption of UCM, RSICD and RSITMD, as written and as tokens joined by spaces."""
    for path in (folder / "UCM" / "dataset.json", folder / "RSICD" / "dataset_rsicd.json"):
        for image in json.loads(path.read_text(encoding="utf-8"))["images"]:
            for sentence in image["sentences"]:
                yield sentence["raw"]
                yield " ".join(sentence["tokens"])
    for path in sorted((folder / "RSITMD").glob("*_caps.txt")):
        yield from path.read_text(encoding="utf-8").split("\n")
    for path in sorted((folder / "RSITMD").glob("rsitmd_*.json")):
        for entry in json.loads(path.read_text(encoding="utf-8")):
            captions = entry["caption"]
            yield from [captions] if isinstance(captions, str) else captions


@pytest.mark.slow
def test_every_real_caption_has_open_clip_ids(ours, theirs, real_data):
    captions = list(_captions(real_data))
    assert len(captions) > 100_000
    distinct = sorted(set(captions))
    for start in range(0, len(distinct), 10_000):
        batch = distinct[start : start + 10_000]
        assert [ours.encode(text) for text in batch] == [theirs.encode(text) for text in batch]
        assert torch.equal(clip.tokenize(batch), theirs(batch))
