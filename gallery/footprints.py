"""Outlines of tiles on the map, as the rings that GeoJSON and GeoParquet ask for.

A footprint is four corners (longitude, latitude) in degrees WGS84: upper left, upper right, lower
right, lower left of the tile. A ring is closed, its last point equals the first, and goes
counter-clockwise. Edges are straight in degrees.
"""

import math

ROUNDING = 1e-6  # degrees: a tenth of a metre


def rings(footprint):
    """The rings of a footprint: one, or one on each side of the antimeridian.

    Longitudes may jump there (179, -179) or go on (179, 181): an edge is at most 180 degrees wide,
    or 360, all around. A tile that holds a pole becomes a ring that goes along the
    pole. Raises ValueError for what is no footprint.
    """
    corners = [(float(lon), float(lat)) for lon, lat in footprint]
    if len(corners) != 4:
        raise ValueError(f"a footprint has four corners, found {len(corners)}")
    for lon, lat in corners:
        if not (-360 <= lon <= 360 and -90 <= lat <= 90):  # refuses NaN too
            raise ValueError(f"longitude {lon}, latitude {lat}: no place on the earth")
    points = _without_jumps(corners)
    shift = 360 * math.floor((min(lon for lon, _ in points) + 180) / 360)
    points = [(lon - shift, lat) for lon, lat in points]
    if max(lon for lon, _ in points) <= 180:
        return [_closed(points)]
    west = _cut(points, side=1)
    east = [(lon - 360, lat) for lon, lat in _cut(points, side=-1)]
    return [_closed(west), _closed(east)]


def centre(footprint):
    """The (longitude, latitude) in the middle of a footprint, from -180 to 180 degrees.

    The mean of the corners where edges are straight in degrees; of a tile that holds a pole the
    pole, of one all around the earth longitude 0.
    """
    points = _without_jumps([(float(lon), float(lat)) for lon, lat in footprint])
    if len(points) > 4:
        return 0.0, points[-1][1]
    lon = sum(lon for lon, _ in points) / 4
    lat = sum(lat for _, lat in points) / 4
    return (lon + 180) % 360 - 180, lat


def _without_jumps(corners):
    """The corners with longitudes that go on beyond 180; around a pole, two points on it more."""
    lons = [lon for lon, _ in corners]
    if abs(max(lons) - min(lons) - 360) < ROUNDING:  # all around: from edge to edge of the map
        west = min(lons)
        return [(-180.0 if lon - west < 180 else 180.0, lat) for lon, lat in corners]
    points = [corners[0]]
    for place, (lon, lat) in enumerate([*corners[1:], corners[0]]):
        step = lon - corners[place][0]
        if abs(step) > 180:
            step -= math.copysign(360, step)
        points.append((points[-1][0] + step, lat))
    first, last = points[0][0], points[-1][0]
    if abs(last - first) < 180:  # back at the first corner
        return points[:-1]
    pole = math.copysign(90, sum(lat for _, lat in corners))
    return [*points, (last, pole), (first, pole)]


def _cut(points, side):
    """The part of an outline on one side of longitude 180: side 1 is west of it, -1 east."""
    kept = []
    for place, (lon, lat) in enumerate(points):
        before_lon, before_lat = points[place - 1]
        if (before_lon - 180) * (lon - 180) < 0:
            share = (180 - before_lon) / (lon - before_lon)
            kept.append((180.0, before_lat + share * (lat - before_lat)))
        if (180 - lon) * side >= 0:
            kept.append((lon, lat))
    return kept


def _closed(points):
    """The points as a ring, counter-clockwise, from the first."""
    area = 0.0
    for place, (lon, lat) in enumerate(points):
        before_lon, before_lat = points[place - 1]
        area += before_lon * lat - lon * before_lat
    if area < 0:
        points = [points[0], *reversed(points[1:])]
    return [*points, points[0]]
