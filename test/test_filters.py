"""Conditions on columns and places: the SQL, what it finds in LanceDB, what is refused."""

import operator
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gallery import filters
from gallery.filters import both, condition, distance_km, inside, near

COLUMNS = {"ship": "number", "storage_tank": "number", "path": "text", "modified": "time"}
MAY = datetime(2024, 5, 1, tzinfo=timezone.utc)
ROWS = [  # number, ship, storage_tank, path, modified
    {"n": 0, "ship": 0, "storage_tank": 2, "path": "old/a.tif", "modified": MAY},
    {"n": 1, "ship": 3, "storage_tank": 0, "path": "it's \\ 100%", "modified": None},
    {"n": 2, "ship": 1, "storage_tank": 2, "path": "", "modified": MAY + timedelta(hours=12)},
    {"n": 3, "ship": -2, "storage_tank": 5, "path": "Häfen/`b`", "modified": MAY},
    {"n": 4, "ship": None, "storage_tank": 1, "path": None, "modified": MAY - timedelta(days=90)},
]


# ------------------------------------------------------------------ the language


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("storage_tank >= 2 and ship = 0", "`storage_tank` >= 2 AND `ship` = 0"),
        ("SHIP == 1 Or Ship <> +2.0", "`ship` = 1 OR `ship` != 2"),
        ("((ship=1))", "`ship` = 1"),
        ("ship=1 or ship=2 and ship=3", "`ship` = 1 OR `ship` = 2 AND `ship` = 3"),
        ("(ship=1 or ship=2) and ship=3", "(`ship` = 1 OR `ship` = 2) AND `ship` = 3"),
        ("not (ship=1 and ship=2)", "NOT (`ship` = 1) OR NOT (`ship` = 2)"),
        ("not (ship=1 or ship=2) or ship=3", "NOT (`ship` = 1) AND NOT (`ship` = 2) OR `ship` = 3"),
        (
            "not (ship=1 or not (ship=2 or ship=3))",
            "NOT (`ship` = 1) AND (`ship` = 2 OR `ship` = 3)",
        ),
        ("ship in (1, -2)", "`ship` IN (1, -2)"),
        (
            "ship not in (.5,1)",
            "CAST(`ship` AS DOUBLE) NOT IN (0.5, 1.0) AND `ship` IS NOT NULL",
        ),
        ("not (ship not in (1))", "`ship` IN (1)"),
        ("ship < 3e9", "CAST(`ship` AS DOUBLE) < 3000000000.0"),
        ("ship between -1 and 2 and ship=1", "`ship` BETWEEN -1 AND 2 AND `ship` = 1"),
        ("path is not null", "`path` IS NOT NULL"),
        ("path = 'it''s'", "`path` = 'it''s'"),
        ('path = "it\'s ""so"""', "`path` = 'it''s \"so\"'"),
        ("path not like '%; drop--'", "`path` NOT LIKE '%; drop--'"),
        ("modified > 2024-05-31", "`modified` > timestamp '2024-05-31 00:00:00'"),
        (
            "modified != '2024-05-31T01:30:00+02:00'",  # two hours ahead of UTC
            "`modified` != timestamp '2024-05-30 23:30:00'",
        ),
        ("modified <= 2024-05-31T12:30:00Z", "`modified` <= timestamp '2024-05-31 12:30:00'"),
    ],
)
def test_sql_is_written_anew(text, sql):
    assert condition(text, COLUMNS) == sql


def test_a_column_named_in_another_script_or_beginning_with_a_digit_is_found():
    columns = {"3d_häfen": "number"}
    assert condition("3d_häfen = 1", columns) == "`3d_häfen` = 1"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected the name of a column at character 1, found the end"),
        ("ship = 1; drop table t", "';' at character 9 is not understood"),
        ("ship = 1 -- all", "'-' at character 10 is not understood"),
        ("ship = 1 /* all */", "'/' at character 10 is not understood"),
        ("ship = 1 ship", "expected 'and', 'or' or the end at character 10, found 'ship'"),
        ("ship = 1) or (1 = 1", "expected 'and', 'or' or the end at character 9, found '\\)'"),
        ("1 = 1", "expected the name of a column at character 1, found '1'"),
        ("abs(ship) = 1", "no column 'abs' at character 1"),
        ("ship(1) = 1", "expected one of =, .*, is after 'ship' at character 5"),
        ("ship = ship", "expected a number for 'ship' at character 8, found 'ship'"),
        ("ship = 2 + 3", "'\\+' at character 10 is not understood"),
        ("ship = 2abc", "expected a number for 'ship' at character 8, found '2abc'"),
        ("ship = '1'", "expected a number for 'ship'"),
        ("path = 1", "expected a text in quotes for 'path'"),
        ("modified > 5", "expected a date such as 2024-05-31 for 'modified'"),
        ("modified > 2024-13-01", "expected a date such as .* at character 12, found '2024-13-01'"),
        ("modified > 'May'", "expected a date such as .*, found 'May'"),
        ("ship like '%'", "'like' at character 6 is for text; 'ship' is a number"),
        ("ship in ()", "expected a number for 'ship' at character 10, found '\\)'"),
        ("ship in (1", "expected '\\)' at character 11, found the end"),
        ("ship between 1", "expected 'and' at character 15, found the end"),
        ("ship is 1", "expected 'null' at character 9, found '1'"),
        ("ship not = 1", "expected one of in, like, between after 'ship' at character 10"),
        ("(ship = 1", "expected '\\)' at character 10, found the end"),
        ("path = 'a", "the quote at character 8 has no end"),
        ("path = '\ud800'", "the text at character 8 is not in UTF-8"),
        ("ship = 1e999", "the number at character 8 is too large"),
        ("`ship` = 1", "'`' at character 1 is not understood"),
        ("storage tank = 1", "no column 'storage' .*, is it 'storage_tank'"),
        ("ship-a = 1", "'-' at character 5 is not understood; names of columns have underscores"),
        ("shp = 1", "'shp' at character 1, is it 'ship'\\?; columns: modified, path, ship, stor"),
        ("vector = 1", "no column 'vector' at character 1; columns: "),
        ("(" * 11 + "ship = 1" + ")" * 11, "more than 10 levels deep at character 11"),
        ("not " * 5000 + "ship = 1", "at most 2000 characters, this one 20008"),
    ],
)
def test_what_is_not_of_the_language_is_refused_with_its_place(text, problem):
    with pytest.raises(ValueError, match=problem):
        condition(text, COLUMNS)


# ------------------------------------------------------------------ against LanceDB

OPERATORS = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
NUMBERS = st.sampled_from([-2, 0, 1, 2, 3, 0.5, 2.5, -7e11])
TEXTS = st.sampled_from(["", "old/a.tif", "it's \\ 100%", "Häfen/`b`", "z"])
TIMES = st.sampled_from([MAY, MAY + timedelta(hours=12), MAY - timedelta(days=1)])
ENDINGS = ["tif", "'", "%", "`b`", ""]


def written(value):
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return value.isoformat() if isinstance(value, datetime) else str(value)


def of_column(name, values):
    """(text, function of a row that gives True, False or None) of comparisons of a column."""

    def compared(sign, value):
        return f"{name} {sign} {written(value)}", lambda value_: OPERATORS[sign](value_, value)

    def listed(several):
        inner = ", ".join(written(value) for value in several)
        return f"{name} in ({inner})", lambda value_: value_ in several

    def between(low, high):
        text = f"{name} not between {written(low)} AND {written(high)}"
        return text, lambda value_: not low <= value_ <= high

    def unless_null(pair):
        text, test = pair
        return text, lambda row: None if row[name] is None else test(row[name])

    comparisons = st.one_of(
        st.builds(compared, st.sampled_from(list(OPERATORS)), values),
        st.builds(listed, st.lists(values, min_size=1, max_size=3)),
        st.builds(between, values, values),
    )
    null = st.just((f"{name} Is Null", lambda row: row[name] is None))
    return comparisons.map(unless_null) | null


def ends_with(ending):
    """`like` with what has to be escaped."""
    text = "path like '%" + ending.replace("'", "''").replace("%", "\\%") + "'"
    return text, lambda row: None if row["path"] is None else row["path"].endswith(ending)


def negated(part):
    text, test = part

    def opposite(row):
        value = test(row)
        return None if value is None else not value

    return f"not ({text})", opposite


def joined(word, decides, parts):
    """`and`, which one False decides, or `or`, which one True decides; else one unknown does."""
    text = f" {word} ".join(text for text, _ in parts)

    def together(row):
        values = [test(row) for _, test in parts]
        if decides in values:
            return decides
        return None if None in values else not decides

    return f"({text})", together


def larger(parts):
    several = st.lists(parts, min_size=2, max_size=3)
    return (
        parts.map(negated)
        | several.map(lambda parts: joined("and", False, parts))
        | several.map(lambda parts: joined("OR", True, parts))
    )


CONDITIONS = st.recursive(
    of_column("ship", NUMBERS)
    | of_column("storage_tank", NUMBERS)
    | of_column("path", TEXTS)
    | of_column("modified", TIMES)
    | st.sampled_from(ENDINGS).map(ends_with),
    larger,
    max_leaves=6,
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """found(SQL): the numbers of the rows that LanceDB finds in a table of ROWS."""
    lancedb = pytest.importorskip("lancedb", reason="the filters' engine is not installed")
    pa = pytest.importorskip("pyarrow")
    schema = pa.schema(
        {
            "n": pa.int64(),
            "ship": pa.int32(),
            "storage_tank": pa.float32(),
            "path": pa.string(),
            "modified": pa.timestamp("us", tz="UTC"),
        }
    )
    database = lancedb.connect(tmp_path_factory.mktemp("lance"))
    table = database.create_table("t", pa.Table.from_pylist(ROWS, schema=schema))

    def search(sql):
        return sorted(table.search().where(sql).select(["n"]).limit(99).to_arrow()["n"].to_pylist())

    return search


@settings(max_examples=60, deadline=None)
@given(expression=CONDITIONS)
def test_lancedb_finds_what_a_naive_reading_finds(found, expression):
    text, test = expression
    expected = [row["n"] for row in ROWS if test(row) is True]
    assert found(condition(text, COLUMNS)) == expected, text


def test_a_contradiction_is_unknown_where_the_column_is_null(found):
    unknown = [row["n"] for row in ROWS if row["ship"] is None]
    known = [row["n"] for row in ROWS if row["ship"] is not None]
    assert unknown and found(condition("not (ship in (-2) and ship in (0))", COLUMNS)) == known
    assert found(condition("ship not in (-2) or not ship in (0)", COLUMNS)) == known


def test_lancedb_takes_the_longest_and_the_deepest_conditions(found):
    many = " or ".join(f"ship={number}" for number in range(176))
    assert found(condition(many, COLUMNS)) == [0, 1, 2]
    deep = "ship = 1"
    for _ in range(filters.DEEPEST):
        deep = f"ship = 0 or storage_tank > 1 and ({deep})"
    sql = both(condition(deep, COLUMNS), condition("path is not null", COLUMNS))
    assert found(sql) == [0, 2]


# ------------------------------------------------------------------ places


def test_distances_are_those_of_a_sphere():
    degree = 6371.0088 * np.pi / 180  # 111.195 km
    found = distance_km(0, 0, [0, 1, 0, 0, 90, None], [0, 0, -1, 180, 77, 3])
    expected = [0, degree, degree, 180 * degree, 90 * degree, np.nan]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # Across the antimeridian; at latitude 60 a degree of longitude is half as long.
    assert distance_km(60, 179.9, [60], [-179.9]) == pytest.approx(0.1 * degree, rel=1e-5)


def test_a_box_of_degrees_is_sql():
    assert inside(1, 2, 3, 4) == "`lat` BETWEEN 2.0 AND 4.0 AND `lon` BETWEEN 1.0 AND 3.0"
    assert inside(170, -1, -170, 1) == (
        "`lat` BETWEEN -1.0 AND 1.0 AND (`lon` >= 170.0 OR `lon` <= -170.0)"
    )


PLACES = [(0, 0), (59.9, 179.5), (60, -180), (-89.5, 20), (89.99, -100), (-33, 18), (45, 90)]


@pytest.fixture(scope="module")
def of_places(tmp_path_factory):
    """(latitudes, longitudes, function from SQL to the numbers of those it finds)."""
    sqlite3 = pytest.importorskip("sqlite3")
    generator = np.random.default_rng(0)
    lats = np.degrees(np.arcsin(generator.uniform(-1, 1, 3000)))
    lons = generator.uniform(-180, 180, 3000)
    for lat, lon in PLACES:  # and 200 around each, where small circles are
        lats = np.append(lats, np.clip(lat + generator.normal(0, 1, 200), -90, 90))
        lons = np.append(lons, (lon + generator.normal(0, 3, 200) + 180) % 360 - 180)
    table = sqlite3.connect(":memory:")
    table.execute("create table t (n, lat, lon)")
    rows = list(zip(range(len(lats)), lats.tolist(), lons.tolist(), strict=True))
    table.executemany("insert into t values (?, ?, ?)", [*rows, (-1, None, None)])
    return lats, lons, lambda sql: {n for (n,) in table.execute(f"select n from t where {sql}")}


@pytest.mark.parametrize("kilometres", [0.001, 5, 70, 900, 9000, 20015])
@pytest.mark.parametrize(("lat", "lon"), PLACES)
def test_the_box_around_a_circle_holds_all_of_it_and_little_more(of_places, lat, lon, kilometres):
    lats, lons, found = of_places
    in_box = found(near(lat, lon, kilometres))
    distances = distance_km(lat, lon, lats, lons)
    assert set(np.flatnonzero(distances <= kilometres).tolist()) <= in_box
    assert -1 not in in_box
    if kilometres <= 900 and abs(lat) <= 60:  # the corner of a square is 1.41 times as far
        assert distances[sorted(in_box)].max(initial=0) <= 1.5 * kilometres


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: near(91, 0, 1), "latitude is between -90 and 90 degrees; got 91"),
        (lambda: near(0, 181, 1), "longitude is between -180 and 180 degrees; got 181"),
        (lambda: near(0, float("nan"), 1), "longitude is between .*; got nan"),
        (lambda: near(0, 0, 0), "a distance is more than 0 km and at most 20,015, .*; got 0"),
        (lambda: near(0, 0, 20016), "at most 20,015, half of the way around the earth; got 20016"),
        (lambda: inside(-181, 0, 0, 1), "west is between -180 and 180 degrees; got -181"),
        (lambda: inside(0, 0, 1, 90.5), "north is between -90 and 90 degrees; got 90.5"),
        (lambda: inside(0, 2, 1, 1), "south, 2, lies north of north, 1"),
    ],
)
def test_places_that_are_none_are_refused(call, problem):
    with pytest.raises(ValueError, match=problem):
        call()


def test_conditions_are_joined():
    assert both(None, "a OR b", None, "c") == "(a OR b) AND (c)"
    assert both("a") == "(a)"
    assert both(None) is both() is None
