"""Names on a terminal: characters that would move, hide or colour text are shown escaped.

A root file because every room prints names of files.
"""


def require_utf8(text, what):
    """Raise ValueError for a text with a lone surrogate: of an argument that is not in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{what}: '{escaped(text)}' is not in UTF-8; set the terminal to it, or use a file"
        ) from None


def escaped(name):
    """A name or path as printable text: control characters, direction marks and the like escaped.

    "a\\x1b[2J.png", with an escape character, becomes the text `a\\x1b[2J.png`; a lone surrogate,
    which no terminal takes, becomes `\\ud800`. Letters of all scripts stay.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(name)
    )
