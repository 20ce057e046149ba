"""Token ids against open_clip's tokenizer, and where the vocabulary comes from."""

import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer as Reference

import clip
import simple_tokenizer
from dataset.annotations import read_annotations
from simple_tokenizer import END, FILE, START, SimpleTokenizer, find_vocabulary

# open_clip 3 spells the special tokens differently from OpenAI's vocabulary, which is ours.
THEIR_NAMES = {START: "<start_of_text>", END: "<end_of_text>"}
WORDS = "six storage tanks beside a road near the harbour"

TEXTS = {
    "plain": "Six storage tanks stand beside a road.",
    "empty": "",
    "white space": " \t\r\n\u00a0\u2003\u3000 ",
    "case": "A GREEN Meadow",
    "dotted capital": "İstanbul ISPARTA ı",
    "long s": "ſ's ſhip",
    "sharp s": "STRAßE straße ẞ",
    "entities": "&lt;b&gt; caf&eacute; &amp; &#39;tea&#39; &#x1F680; &nbsp; &unknown; &amp",
    "twice escaped": "&amp;lt;plane&amp;gt; &amp;amp; &amp;#39;s",
    "escaped beside a tag": "<b> &amp;amp;lt;",  # ftfy itself resolves none here
    "three times escaped": "&amp;amp;lt; &amp;amp;amp;",
    "emoji": "🚢✈️ a 👩‍👩‍👧‍👦 family 🇩🇪 👍🏽",
    "chinese": "停机坪上有六架飞机。",
    "hindi": "छह हवाई जहाज़",
    "accents": "Ångström naïve façade ÉCOLE coöperate",
    "combining": "cafe\u0301 A\u030a n\u0303 o\u0308\u0304",
    "mojibake": "cafÃ© â€œquotedâ€\x9d Ã¼ber",
    "ligatures": "ﬁeld ﬂag Ⅷ ℡ ﬃ",
    "full width": "ＦＵＬＬ　ＷＩＤＴＨ １２",
    "control": "a\x00b\x07c\x1bd\x7fe\u200bf\u202eg\ufefeffh",
    "surrogate": "lone \ud800 surrogate \udfff",
    "digits": "2023 planes, 3.14 1,000 ½ ² ٣ 42nd",
    "apostrophes": "it's we're I'd don't they'll I've I'm 'tis rock'n'roll boats' IT'S ’s",
    "punctuation": "well...?!? (a) [b] {c} <d> -- __ / \\ | ~ `` ^ % $ # @ * + =",
    "angle brackets": "<| <|start |endoftext|> <|endoftext|",
    "one letter": "a",
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
    expected = theirs.encode(TEXTS[name])
    assert ours.encode(TEXTS[name]) == expected
    assert ours.encode(TEXTS[name]) == expected  # from the cache of words


@pytest.mark.parametrize("context_length", [77, 16, 2])
def test_tokenize_equals_open_clip(theirs, context_length):
    texts = list(TEXTS.values())
    found = clip.tokenize(texts, context_length=context_length)
    assert found.dtype == torch.int64 and found.shape == (len(texts), context_length)
    assert torch.equal(found, theirs(texts, context_length=context_length))


def test_ids_equal_open_clip_on_random_plain_text(ours, theirs):
    rng = random.Random(1)
    printable = [chr(code) for code in range(0x20, 0x7F)]
    for _ in range(300):
        text = "".join(rng.choices(printable, k=rng.randrange(60)))
        assert ours.encode(text) == theirs.encode(text), repr(text)


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
    assert ours.encode(text.upper()) == ours.encode(text)
    text_for_them = text.replace(START, THEIR_NAMES[START]).replace(END, THEIR_NAMES[END])
    assert ours.encode(text) == theirs.encode(text_for_them)


def test_the_vocabularies_are_the_same(ours, theirs):
    expected = dict(theirs.encoder)
    for name, their_name in THEIR_NAMES.items():
        expected[name] = expected.pop(their_name)
    assert ours.ids == expected
    assert ours.ranks == theirs.bpe_ranks
    assert ours.bytes == theirs.byte_encoder
    assert (ours.start, ours.end) == (49406, 49407)


# ------------------------------------------------------------------ tokenize


def test_one_text_is_a_batch_of_one_and_none_gives_no_rows():
    assert torch.equal(clip.tokenize(WORDS), clip.tokenize([WORDS, "ship"])[:1])
    assert clip.tokenize([]).shape == (0, 77)


def test_the_longest_text_that_fits_is_whole_and_a_longer_one_is_an_error_that_quotes_it():
    fits = "ship " * 75
    assert torch.equal(clip.tokenize(fits, truncate=False), clip.tokenize(fits))
    with pytest.raises(ValueError, match="text 1 has 78 tokens.*'harbour ship ship"):
        clip.tokenize(["ship", "harbour " + fits], truncate=False)


# ------------------------------------------------------------------ vocabulary file


def test_models_is_searched_first_and_suffices(tmp_path, monkeypatch):
    packaged = find_vocabulary()
    monkeypatch.setattr(simple_tokenizer, "__file__", str(tmp_path / "simple_tokenizer.py"))
    assert find_vocabulary() == packaged and packaged.parent.name == "open_clip"
    own = tmp_path / "models" / FILE
    own.parent.mkdir()
    shutil.copy(packaged, own)
    assert find_vocabulary() == own
    assert SimpleTokenizer().encode(WORDS) == SimpleTokenizer(packaged).encode(WORDS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_vocabulary() == own


@pytest.mark.parametrize("installed", [True, False])
def test_a_missing_vocabulary_is_an_error_with_places_and_remedy(tmp_path, monkeypatch, installed):
    site = tmp_path / "site" / "open_clip"
    package = SimpleNamespace(submodule_search_locations=[str(site)]) if installed else None
    monkeypatch.setattr(simple_tokenizer, "__file__", str(tmp_path / "simple_tokenizer.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    with pytest.raises(FileNotFoundError, match="pip install open_clip_torch") as error:
        find_vocabulary()
    assert str(tmp_path / "models" / FILE) in str(error.value)
    assert (str(site / FILE) in str(error.value)) is installed
    assert ("not installed" in str(error.value)) is not installed


# ------------------------------------------------------------------ every real caption


@pytest.mark.slow
@pytest.mark.parametrize("name", ["UCM", "RSICD", "RSITMD"])
def test_every_real_caption_has_open_clip_ids(ours, theirs, real_data, name):
    splits = read_annotations(real_data / name, "txt" if name == "RSITMD" else "karpathy").splits
    records = [record for own in splits.values() for record in own]
    captions = sorted({caption for record in records for caption in record.captions})
    assert len(captions) > 1_000
    assert [ours.encode(text) for text in captions] == [theirs.encode(text) for text in captions]
    assert torch.equal(clip.tokenize(captions), theirs(captions))
