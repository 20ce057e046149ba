"""GeoParquet: its columns, read back by geopandas; rows without a place; what is refused."""

import json
from datetime import datetime, timedelta, timezone

import pytest

from gallery.geoparquet import write_geoparquet

pa = pytest.importorskip("pyarrow", reason="pyarrow, which writes GeoParquet, is not installed")
parquet = pytest.importorskip("pyarrow.parquet")

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "path": pa.string(),
        "left": pa.int32(),
        "top": pa.int32(),
        "width": pa.int32(),
        "height": pa.int32(),
        "modified": pa.timestamp("us", tz="UTC"),
        "vector": pa.list_(pa.float32(), 3),
        "lat": pa.float64(),
        "lon": pa.float64(),
        "footprint": pa.list_(pa.float64()),
    }
)
MODIFIED = datetime(2024, 5, 31, 23, 59, 59, 999_999, tzinfo=timezone.utc)
SQUARE = [1, 5, 4, 5, 4, 3, 1, 3]
ACROSS = [179, 2, -179, 2, -179, 0, 179, 0]


def row(name="a.tif", footprint=SQUARE, **others):
    own = {
        "id": f"{name}#10,20,64,32",
        "path": name,
        "left": 10,
        "top": 20,
        "width": 64,
        "height": 32,
        "modified": MODIFIED,
        "vector": [0.5, -1.0, 0.25],
        "lat": None if footprint is None else 4.0,
        "lon": None if footprint is None else 2.5,
        "footprint": footprint,
    }
    return {**own, **others}


def tables(*lists):
    for rows in lists:
        yield pa.Table.from_pylist(rows, schema=SCHEMA)


def test_a_file_has_the_columns_of_embedding_files(tmp_path):
    path = tmp_path / "a.parquet"
    rows = tables([row(), row("b.tif", None)], [row("c.tif", ACROSS)])
    assert write_geoparquet(path, rows) == (3, 1)
    first, second, _ = parquet.read_table(path).to_pylist()
    geometry = first.pop("geometry")
    assert first == {
        "unique_id": "a.tif#10,20,64,32",
        "embedding": [0.5, -1.0, 0.25],
        "timestamp": "20240531T235959",
        "date": MODIFIED.date(),
        "product_id": "a.tif",
        "centre_lat": 4.0,
        "centre_lon": 2.5,
        "pixel_bbox": [10, 20, 74, 52],
    }
    # Little-endian, Polygon, one ring, five points of 16 bytes.
    assert geometry[:13].hex() == "01030000000100000005000000" and len(geometry) == 93
    assert (second["geometry"], second["centre_lat"], second["centre_lon"]) == (None, None, None)


def test_the_metadata_are_those_of_geoparquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_geoparquet(path, tables([row(), row("b.tif", None)], [row("c.tif", ACROSS)]))
    geo = json.loads(parquet.read_metadata(path).metadata[b"geo"])
    assert (geo["version"], geo["primary_column"]) == ("1.1.0", "geometry")
    column = geo["columns"]["geometry"]
    assert column.pop("crs")["id"] == {"authority": "OGC", "code": "CRS84"}
    assert column == {
        "encoding": "WKB",
        "geometry_types": ["MultiPolygon", "Polygon"],
        "edges": "planar",
        "orientation": "counterclockwise",
        "bbox": [-180, 0, 180, 5],
    }


def test_geopandas_reads_it_back(tmp_path):
    geopandas = pytest.importorskip("geopandas", reason="geopandas, the reader, is not installed")
    pandas = pytest.importorskip("pandas")
    shapely = pytest.importorskip("shapely")
    path = tmp_path / "a.parquet"
    write_geoparquet(path, tables([row(), row("b.tif", None)], [row("c.tif", ACROSS)]))
    frame = geopandas.read_parquet(path)
    assert frame.crs == "OGC:CRS84" and len(frame) == 3
    assert frame.geometry.is_valid[[0, 2]].all()
    whole, nothing, across = frame.geometry
    assert whole.equals(shapely.Polygon([(1, 5), (4, 5), (4, 3), (1, 3)]))
    assert whole.exterior.is_ccw and nothing is None
    assert across.equals(shapely.union(shapely.box(179, 0, 180, 2), shapely.box(-180, 0, -179, 2)))
    assert frame["embedding"][0].tolist() == [0.5, -1.0, 0.25]
    # Readers of Major TOM's files make a time of the text, those of Clay's of the date.
    assert pandas.Timestamp(frame["timestamp"][0]) == pandas.Timestamp("2024-05-31 23:59:59")
    assert pandas.Timestamp(frame["date"][0]) == pandas.Timestamp("2024-05-31")


def test_rows_without_any_place_have_null_geometries(tmp_path):
    path = tmp_path / "a.parquet"
    assert write_geoparquet(path, tables([row(footprint=None)])) == (1, 1)
    column = json.loads(parquet.read_metadata(path).metadata[b"geo"])["columns"]["geometry"]
    assert column["geometry_types"] == [] and "bbox" not in column


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
@pytest.mark.parametrize("unit", ["s", "ns"])
def test_times_are_in_utc_whatever_the_column(tmp_path, zone, unit):
    table = next(tables([row(modified=MODIFIED - timedelta(hours=1)), row(modified=None)]))
    times = table["modified"].cast(pa.timestamp(unit, tz=zone), safe=False)
    table = table.set_column(SCHEMA.get_field_index("modified"), "modified", times)
    write_geoparquet(tmp_path / "a.parquet", [table])
    columns = parquet.read_table(tmp_path / "a.parquet", columns=["timestamp", "date"])
    assert columns["timestamp"].to_pylist() == ["20240531T225959", None]
    assert columns["date"].to_pylist() == [MODIFIED.date(), None]


def test_tables_are_written_as_they_come(tmp_path):
    path = tmp_path / "a.parquet"
    sizes = []

    def growing():
        for table in tables([row()] * 3, [row()] * 5):
            [file] = tmp_path.iterdir() if sizes else [None]
            sizes.append(file.stat().st_size if file else 0)
            yield table

    assert write_geoparquet(path, growing(), batch=2) == (8, 0)
    metadata = parquet.read_metadata(path)
    groups = [metadata.row_group(place).num_rows for place in range(metadata.num_row_groups)]
    assert groups == [2, 1, 2, 2, 1]
    assert sizes[1] > 4  # more than the first bytes: the first table is in the file already


@pytest.mark.parametrize(
    ("lists", "problem"),
    [
        ([], "no rows to write"),
        ([[row()], [row(vector=None)]], "1 rows have no vector"),
        ([[row(footprint=[0, 99] * 4)]], "a.tif#.*: footprint: longitude 0.0, latitude 99.0"),
        ([[row(footprint=[0, 1])]], "a.tif#.*: footprint: eight numbers are a footprint, found 2"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_old_file_stays(tmp_path, lists, problem):
    path = tmp_path / "a.parquet"
    path.write_text("old")
    with pytest.raises(ValueError, match=problem):
        write_geoparquet(path, tables(*lists))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_other_columns_are_refused(tmp_path):
    lacking = next(tables([row()])).drop_columns(["lat", "vector"])
    with pytest.raises(ValueError, match="the rows have no column vector, lat"):
        write_geoparquet(tmp_path / "a.parquet", [lacking])
