"""Which rows of the index a query looks at: conditions on columns and on places.

    storage_tank >= 2 and ship = 0
    (airplane > 0 or helicopter > 0) and not path like 'old/%' and modified >= 2024-05-01

A condition compares columns with values; README.md has the whole language. What a user types never
reaches the table: it is read word by word, and the SQL for LanceDB is written anew from what was
understood. Only declared columns can stand there, and no functions.

Degrees are WGS84; distances are kilometres on a sphere.
"""

import difflib
import math
import re
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np

LONGEST = 2000  # characters of a condition
DEEPEST = 10  # parentheses and nots around each other; LanceDB's own parser ends at some 15
WHOLE = 2**31  # columns of whole numbers hold less than this
EARTH_KM = 6371.0088  # mean radius
FARTHEST_KM = math.pi * EARTH_KM  # from a place to its antipode
SLACK = 1e-9  # degrees, about 0.1 mm: a bounding box may be too large but never too small

KEYWORDS = ("and", "or", "not", "in", "like", "between", "is", "null")
COMPARISONS = ("==", "!=", "<>", "<=", ">=", "=", "<", ">")
VALUES = {"number": "a number", "text": "a text in quotes", "time": "a date such as 2024-05-31"}

_TOKENS = re.compile(
    r"""(?P<space>\s+)
    | (?P<time>\d{4}-\d\d-\d\d (T[\d:.]+ (Z | [+-]\d\d:\d\d)?)? (?![\w.]))
    | (?P<number>[+-]? (\d+ (\.\d*)? | \.\d+) (e[+-]?\d+)? (?![\w.]))
    | (?P<word>\w+)
    | (?P<text>'([^']|'')*' | "([^"]|"")*")
    | (?P<sign>== | != | <> | <= | >= | [=<>(),])""",
    re.VERBOSE | re.IGNORECASE,
)


# ------------------------------------------------------------------ the language


def condition(text, columns):
    """SQL for LanceDB that says what `text` says.

    columns: what kind of values a column has, {name: "number", "text" or "time"}. Raises ValueError
    that names the place, in characters from 1, of what is not understood.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a condition has at most {LONGEST} characters, this one {len(text)}")
    return _Parser(_tokens(text), columns).whole().text


class _Token(NamedTuple):
    kind: str  # time, number, word, text, sign or end
    text: str
    place: int  # in characters from 1


def _tokens(text):
    tokens = []
    place = 0
    while place < len(text):
        found = _TOKENS.match(text, place)
        if found is None:
            raise ValueError(_unknown_character(text[place], place + 1))
        if found.lastgroup != "space":
            tokens.append(_Token(kind=found.lastgroup, text=found.group(), place=place + 1))
        place = found.end()
    tokens.append(_Token(kind="end", text="", place=len(text) + 1))
    return tokens


def _unknown_character(character, place):
    problem = f"{character!r} at character {place} is not understood"
    if character in "'\"":
        return f"the quote at character {place} has no end"
    if character == "-":
        return f"{problem}; names of columns have underscores"
    return problem


class _Sql(NamedTuple):
    text: str
    kind: str  # or, and; one: a comparison or its negation

    def inside(self, *kinds):
        """Its text, in parentheses unless it is of one of these kinds."""
        return self.text if self.kind in kinds else f"({self.text})"


class _Parser:
    """Reads tokens from left to right; methods return what they have read as SQL.

    A `not` is written before single comparisons only, by De Morgan's laws: LanceDB takes
    `ship IN (1) AND ship IN (2)` for false where the column is null, and its negation would find
    the row.
    """

    def __init__(self, tokens, columns):
        self.tokens = tokens
        self.columns = columns
        self.next = 0
        self.depth = 0
        self.negated = False  # whether an odd number of nots is around what is read

    def whole(self):
        sql = self.alternatives()
        if self.token.kind != "end":
            raise self.expected("'and', 'or' or the end")
        return sql

    def alternatives(self):
        parts = [self.conjunction()]
        while self.takes("or"):
            parts.append(self.conjunction())
        return self.joined(parts, "and" if self.negated else "or")

    def conjunction(self):
        parts = [self.part()]
        while self.takes("and"):
            parts.append(self.part())
        return self.joined(parts, "or" if self.negated else "and")

    def joined(self, parts, word):
        """Several _Sql as one, by `and` or `or`."""
        if len(parts) == 1:
            return parts[0]
        bare = ("one", "and") if word == "and" else ("one", "and", "or")
        texts = [part.inside(*bare) for part in parts]
        return _Sql(f" {word.upper()} ".join(texts), kind=word)

    def part(self):
        """A comparison, or `not` or parentheses around something."""
        place = self.token.place
        is_not = self.takes("not")
        if not is_not and not self.takes("("):
            return self.comparison()
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels deep at character {place}")
        if is_not:
            self.negated = not self.negated
            sql = self.part()
            self.negated = not self.negated
        else:
            sql = self.alternatives()
            self.expect(")")
        self.depth -= 1
        return sql

    def comparison(self):
        """A comparison of one column, negated where an odd number of nots is around it."""
        name, kind = self.column()
        if self.takes("is"):
            negation = "NOT " if self.takes("not") else ""
            self.expect("null")
            return self.signed(f"`{name}` IS {negation}NULL")
        if self.token.text in COMPARISONS:
            sign = self.take().text
            sign = {"==": "=", "<>": "!="}.get(sign, sign)
            column, [value] = _as_sql(name, [self.value(name, kind)])
            return self.signed(f"{column} {sign} {value}")
        negation = "NOT " if self.takes("not") else ""
        if self.takes("in"):
            column, values = _as_sql(name, self.values(name, kind))
            values = ", ".join(values)
            if bool(negation) == self.negated:
                return _Sql(f"{column} IN ({values})", kind="one")
            # LanceDB takes `ship NOT IN (1) OR ship NOT IN (2)` for true where the column is null.
            return _Sql(f"{column} NOT IN ({values}) AND `{name}` IS NOT NULL", kind="and")
        if self.takes("between"):
            low = self.value(name, kind)
            self.expect("and")
            column, [low, high] = _as_sql(name, [low, self.value(name, kind)])
            return self.signed(f"{column} {negation}BETWEEN {low} AND {high}")
        if self.is_next("like"):
            place = self.take().place
            if kind != "text":
                raise ValueError(f"'like' at character {place} is for text; {name!r} is a {kind}")
            return self.signed(f"`{name}` {negation}LIKE {self.value(name, kind)}")
        signs = "in, like, between" if negation else "=, !=, <, <=, >, >=, in, like, between, is"
        raise self.expected(f"one of {signs} after {name!r}")

    def signed(self, text):
        """A comparison, or its negation where an odd number of nots is around it."""
        return _Sql(f"NOT ({text})" if self.negated else text, kind="one")

    def column(self):
        """The name of the column that comes next, as declared, and its kind."""
        token = self.token
        if token.kind != "word" or token.text.casefold() in KEYWORDS:
            raise self.expected("the name of a column")
        self.take()
        if token.text in self.columns:
            return token.text, self.columns[token.text]
        for name, kind in self.columns.items():
            if name.casefold() == token.text.casefold():
                return name, kind
        raise ValueError(self.unknown_column(token))

    def unknown_column(self, token):
        near = difflib.get_close_matches(token.text.casefold(), self.columns, n=1)
        hint = f", is it {near[0]!r}?" if near else ""
        known = ", ".join(sorted(self.columns))
        return f"no column {token.text!r} at character {token.place}{hint}; columns: {known}"

    def values(self, name, kind):
        self.expect("(")
        values = [self.value(name, kind)]
        while self.takes(","):
            values.append(self.value(name, kind))
        self.expect(")")
        return values

    def value(self, name, kind):
        """The next value, which has to be of this kind: a number, or SQL of a text or a time."""
        token = self.token
        fits = token.kind == kind or (kind == "time" and token.kind == "text")
        if not fits:
            raise self.expected(f"{VALUES[kind]} for {name!r}")
        self.take()
        if kind == "number":
            return _number(token)
        if kind == "time":
            return _time(token)
        return _text(token)

    # what comes next

    @property
    def token(self):
        return self.tokens[self.next]

    def take(self):
        token = self.token
        self.next += 1
        return token

    def is_next(self, word):
        return self.token.kind in ("word", "sign") and self.token.text.casefold() == word

    def takes(self, word):
        """Whether this word or sign comes next; goes past it."""
        if self.is_next(word):
            self.take()
            return True
        return False

    def expect(self, word):
        if not self.takes(word):
            raise self.expected(repr(word))

    def expected(self, what):
        token = self.token
        found = "the end" if token.kind == "end" else f"{token.text!r:.60}"
        return ValueError(f"expected {what} at character {token.place}, found {found}")


def _as_sql(name, values):
    """A column and the values to compare it with, as SQL.

    LanceDB makes a number one of the column's type, and fails where it cannot, as with 1.5 and a
    column of counts. Where a number is not whole and small, the column is made a float instead.
    """
    column = f"`{name}`"
    numbers = [value for value in values if isinstance(value, float)]
    if all(number.is_integer() and abs(number) < WHOLE for number in numbers):
        return column, [str(int(v)) if isinstance(v, float) else v for v in values]
    return f"CAST({column} AS DOUBLE)", [repr(value) for value in numbers]


def _number(token):
    number = float(token.text)
    if not math.isfinite(number):
        raise ValueError(f"the number at character {token.place} is too large")
    return number


def _text(token):
    text = _unquoted(token)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, of an argument that is not in UTF-8
        raise ValueError(f"the text at character {token.place} is not in UTF-8") from None
    return "'" + text.replace("'", "''") + "'"


def _unquoted(token):
    quote = token.text[0]
    return token.text[1:-1].replace(quote * 2, quote)


def _time(token):
    """A timestamp in UTC; a date is its first moment, a time without a zone is in UTC."""
    text = _unquoted(token) if token.kind == "text" else token.text
    try:
        time = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))
        if time.tzinfo is None:
            time = time.replace(tzinfo=timezone.utc)
        time = time.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        expected = "expected a date such as 2024-05-31 or 2024-05-31T12:30:00Z"
        raise ValueError(f"{expected} at character {token.place}, found {text!r:.60}") from None
    return f"timestamp '{time.replace(tzinfo=None).isoformat(sep=' ')}'"


# ------------------------------------------------------------------ places


def near(lat, lon, kilometres):
    """SQL for a box of degrees around the circle; `distance_km` then tells what lies in the circle.

    Rows without a place are not in it. Raises ValueError for a place or distance that is none.
    """
    _check_degrees("latitude", lat, 90)
    _check_degrees("longitude", lon, 180)
    if not 0 < kilometres <= FARTHEST_KM:
        farthest = f"{FARTHEST_KM:,.0f}, half of the way around the earth"
        raise ValueError(f"a distance is more than 0 km and at most {farthest}; got {kilometres}")
    angle = kilometres / EARTH_KM
    south = lat - math.degrees(angle) - SLACK
    north = lat + math.degrees(angle) + SLACK
    if south <= -90 or north >= 90:  # a pole is in the circle, and so are all longitudes there
        return inside(west=-180, south=max(south, -90), east=180, north=min(north, 90))
    # The circle is widest where a meridian touches it, which is nearer to the pole than its centre.
    reach = math.sin(angle) / math.cos(math.radians(lat))
    width = math.degrees(math.asin(min(reach, 1))) + SLACK
    if width >= 180:
        return inside(west=-180, south=south, east=180, north=north)
    return inside(west=_wrapped(lon - width), south=south, east=_wrapped(lon + width), north=north)


def inside(west, south, east, north):
    """SQL for a box of degrees; west > east means that the box goes across the antimeridian.

    Rows without a place are not in it. Raises ValueError for edges that are none.
    """
    for name, degrees in (("west", west), ("east", east)):
        _check_degrees(name, degrees, 180)
    for name, degrees in (("south", south), ("north", north)):
        _check_degrees(name, degrees, 90)
    if south > north:
        raise ValueError(f"south, {south}, lies north of north, {north}")
    rows = f"`lat` BETWEEN {float(south)!r} AND {float(north)!r}"
    if west > east:
        return f"{rows} AND (`lon` >= {float(west)!r} OR `lon` <= {float(east)!r})"
    return f"{rows} AND `lon` BETWEEN {float(west)!r} AND {float(east)!r}"


def _check_degrees(name, degrees, most):
    if not -most <= degrees <= most:  # refuses NaN too
        raise ValueError(f"{name} is between -{most} and {most} degrees; got {degrees}")


def _wrapped(lon):
    """A longitude of -540 to 540 as one of -180 to 180."""
    if lon > 180:
        return lon - 360
    if lon < -180:
        return lon + 360
    return lon


def distance_km(lat, lon, lats, lons):
    """Kilometres from a place to each of many on a sphere; NaN where a place is unknown."""
    lats = np.radians(np.asarray(lats, dtype=float))
    lons = np.radians(np.asarray(lons, dtype=float))
    lat = math.radians(lat)
    lon = math.radians(lon)
    across = np.sin((lats - lat) / 2) ** 2
    along = np.sin((lons - lon) / 2) ** 2
    haversine = across + math.cos(lat) * np.cos(lats) * along
    return 2 * EARTH_KM * np.arcsin(np.sqrt(np.clip(haversine, 0, 1)))


def both(*conditions):
    """SQL of all conditions together; None is no condition, and None is returned without any."""
    given = [f"({sql})" for sql in conditions if sql is not None]
    return " AND ".join(given) or None
