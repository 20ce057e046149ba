"""Vectors of the index as a GeoParquet 1.1 file, which geopandas, QGIS, DuckDB and others read.

The columns are those of Major TOM's embedding files, as far as the index knows them, and `date` of
Clay's. A row is a tile:

    unique_id                a name of the tile within the index, its path and window; Major TOM's
                             is a hash
    embedding                the vector, a list of float32
    timestamp                when the image file was changed, in UTC, as 20240531T123000. Major TOM
                             has the time when the image was taken, which the index does not know
    date                     the day of timestamp; Clay's readers ask for it
    product_id               the path of the image file; Major TOM's is the name of the scene
    geometry                 the footprint, WKB, longitude and latitude (OGC:CRS84); null without
    centre_lat, centre_lon   the centre in degrees; null without
    pixel_bbox               left, top, right, bottom in pixels of the file; right and bottom are
                             the first pixels outside

Not written, since the index does not have them: grid_cell, grid_row_u and grid_col_r (tiles of
other images do not lie in Major TOM's grid), utm_footprint and utm_crs (footprints are degrees),
Clay's index (a place in a grid, too) and source_url (an image of one's own has no address).

Clay's first files call the vector `embeddings`. Only one of the two names is written: vectors are
nearly all of the file, which would be twice as large. TorchGeo's readers of both take `embedding`.
"""

import json
import struct

from gallery.footprints import rings
from writing import written_whole

BATCH = 10_000  # rows that a reader has to take at once
NEEDED = (
    "id", "path", "left", "top", "width", "height", "modified", "vector", "lat", "lon", "footprint"
)  # fmt: skip
POLYGON, MULTI_POLYGON = 3, 6  # numbers of WKB
CRS84 = {  # PROJJSON, as the specification has it: longitude first
    "$schema": "https://proj.org/schemas/v0.7/projjson.schema.json",
    "type": "GeographicCRS",
    "name": "WGS 84 (CRS84)",
    "datum": {
        "type": "GeodeticReferenceFrame",
        "name": "World Geodetic System 1984",
        "ellipsoid": {
            "name": "WGS 84",
            "semi_major_axis": 6378137,
            "inverse_flattening": 298.257223563,
        },
    },
    "coordinate_system": {
        "subtype": "ellipsoidal",
        "axis": [
            {
                "name": "Geodetic longitude",
                "abbreviation": "Lon",
                "direction": "east",
                "unit": "degree",
            },
            {
                "name": "Geodetic latitude",
                "abbreviation": "Lat",
                "direction": "north",
                "unit": "degree",
            },
        ],
    },
    "id": {"authority": "OGC", "code": "CRS84"},
}


def write_geoparquet(path, rows, batch=BATCH):
    """Write rows of the index; returns (rows written, those of them without a footprint).

    rows: pyarrow tables, one after another, with the columns NEEDED; footprint is a list of eight
    numbers, longitude and latitude of four corners. Only one of the tables is in memory at a time.
    batch: rows in a row group of the file at most. Raises ValueError for rows that do not fit.
    """
    parquet = _pyarrow().parquet
    extent = _Extent()
    written = 0
    without = 0
    with written_whole(path) as temporary:
        writer = None
        try:
            for table in rows:
                content = _content(table, extent)
                if writer is None:
                    writer = parquet.ParquetWriter(str(temporary), content.schema)
                writer.write_table(content, row_group_size=batch)
                written += content.num_rows
                without += content["geometry"].null_count
            if writer is None:
                raise ValueError("no rows to write")
            writer.add_key_value_metadata({"geo": json.dumps(_geo(extent))})
        finally:
            if writer is not None:
                writer.close()
    return written, without


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        remedy = "pip install -r requirements-search.txt"
        raise ValueError(f"GeoParquet needs pyarrow: {remedy}") from None
    return pyarrow


# ------------------------------------------------------------------ columns


def _content(table, extent):
    """A table of the index as one of the file."""
    missing = [name for name in NEEDED if name not in table.column_names]
    if missing:
        raise ValueError(f"the rows have no column {', '.join(missing)}")
    if table["vector"].null_count:
        raise ValueError(f"{table['vector'].null_count} rows have no vector")
    pa = _pyarrow()
    # A whole second has no fraction, which strftime would write.
    seconds = table["modified"].cast(pa.timestamp("s", tz="UTC"), safe=False)
    seconds = seconds.cast(pa.timestamp("s"))
    geometries = []
    corners = table["footprint"].to_pylist()
    for name, numbers in zip(table["id"].to_pylist(), corners, strict=True):
        geometries.append(_geometry(name, numbers, extent))
    columns = {
        "unique_id": table["id"].cast(pa.string()),
        "embedding": table["vector"].cast(pa.list_(pa.float32())),
        "timestamp": pa.compute.strftime(seconds, format="%Y%m%dT%H%M%S"),
        "date": seconds.cast(pa.date32(), safe=False),
        "product_id": table["path"].cast(pa.string()),
        "geometry": pa.array(geometries, type=pa.binary()),
        "centre_lat": table["lat"].cast(pa.float64()),
        "centre_lon": table["lon"].cast(pa.float64()),
        "pixel_bbox": _pixel_boxes(table),
    }
    return pa.table(columns)


def _pixel_boxes(table):
    windows = [table[name].to_pylist() for name in ("left", "top", "width", "height")]
    boxes = []
    for left, top, width, height in zip(*windows, strict=True):
        boxes.append([left, top, left + width, top + height])
    pa = _pyarrow()
    return pa.array(boxes, type=pa.list_(pa.int32()))


# ------------------------------------------------------------------ geometry


class _Extent:
    """What the file has to say of all geometries: their kinds, and the box around them."""

    def __init__(self):
        self.kinds = set()
        self.box = None  # west, south, east, north in degrees

    def add(self, kind, points):
        self.kinds.add(kind)
        if self.box is not None:
            west, south, east, north = self.box
            points = [*points, (west, south), (east, north)]
        lons = [lon for lon, _ in points]
        lats = [lat for _, lat in points]
        self.box = [min(lons), min(lats), max(lons), max(lats)]


def _geometry(name, numbers, extent):
    """WKB of a footprint; None of None. Both sides of the antimeridian are a MultiPolygon."""
    if numbers is None:
        return None
    try:
        if len(numbers) != 8:
            raise ValueError(f"eight numbers are a footprint, found {len(numbers)}")
        outlines = rings(zip(numbers[0::2], numbers[1::2], strict=True))
    except ValueError as error:
        raise ValueError(f"{name}: footprint: {error}") from None
    kind = "Polygon" if len(outlines) == 1 else "MultiPolygon"
    for outline in outlines:
        extent.add(kind, outline)
    polygons = [_polygon(outline) for outline in outlines]
    if kind == "Polygon":
        return polygons[0]
    return struct.pack("<BII", 1, MULTI_POLYGON, len(polygons)) + b"".join(polygons)


def _polygon(ring):
    """WKB of a polygon of one ring: byte order, kind, number of rings, number of points, points."""
    head = struct.pack("<BIII", 1, POLYGON, 1, len(ring))
    points = b"".join(struct.pack("<dd", lon, lat) for lon, lat in ring)
    return head + points


def _geo(extent):
    """The metadata that make a Parquet file a GeoParquet file."""
    column = {
        "encoding": "WKB",
        "geometry_types": sorted(extent.kinds),
        "crs": CRS84,
        "edges": "planar",
        "orientation": "counterclockwise",
    }
    if extent.box is not None:
        column["bbox"] = extent.box
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
