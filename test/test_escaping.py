"""Names that would move, hide or colour text on a terminal are shown escaped."""

import pytest

from escaping import escaped


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Häfen/港 1.tif", "Häfen/港 1.tif"),
        ("a\x1b[2J.png", "a\\x1b[2J.png"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("gnp.\u202eexe\u2066\u200f", "gnp.\\u202eexe\\u2066\\u200f"),
        ("\ud800 \x9b \x00", "\\ud800 \\x9b \\x00"),
    ],
)
def test_what_is_not_printable_is_escaped(name, shown):
    assert escaped(name) == shown
    assert escaped(shown) == shown
