"""Rings of footprints: closed, counter-clockwise, cut at the antimeridian, around a pole."""

import pytest

from gallery.footprints import centre, rings


def test_a_footprint_becomes_a_closed_ring_counter_clockwise():
    corners = [(1, 5), (4, 5), (4, 3), (1, 3)]  # upper left, upper right, lower right, lower left
    ring = [(1, 5), (1, 3), (4, 3), (4, 5), (1, 5)]
    assert rings(corners) == [ring]
    mirrored = [corners[0], *corners[:0:-1]]  # a tile that is mirrored on the map
    assert rings(mirrored) == [ring]


WEST = [(179, 2), (179, 0), (180, 0), (180, 2), (179, 2)]
EAST = [(-180, 2), (-180, 0), (-179, 0), (-179, 2), (-180, 2)]


def turned(ring):
    """A ring from its smallest point, so that rings that begin elsewhere are equal."""
    points = ring[:-1]
    first = points.index(min(points))
    return points[first:] + points[:first]


@pytest.mark.parametrize("lons", [(179, -179), (179, 181), (-181, -179)])
def test_a_footprint_across_the_antimeridian_is_cut_there(lons):
    west, east = lons
    found = rings([(west, 2), (east, 2), (east, 0), (west, 0)])
    assert [turned(ring) for ring in found] == [turned(WEST), turned(EAST)]
    assert all(ring[0] == ring[-1] for ring in found)


def test_a_slanted_edge_is_cut_where_it_crosses():
    # From (179, 0) to (183, 4): at 180 a quarter of the way, at latitude 1; and at 3 above.
    west, east = rings([(179, 2), (-177, 6), (-177, 4), (179, 0)])
    assert turned(west) == [(179, 0), (180, 1), (180, 3), (179, 2)]
    assert turned(east) == [(-180, 1), (-177, 4), (-177, 6), (-180, 3)]


@pytest.mark.parametrize("lons", [(179, 180), (-180, -179), (180, 181)])
def test_a_footprint_that_ends_at_the_antimeridian_is_whole(lons):
    [ring] = rings([(lons[0], 1), (lons[1], 1), (lons[1], 0), (lons[0], 0)])
    assert max(lon for lon, _ in ring) - min(lon for lon, _ in ring) == 1


@pytest.mark.parametrize("lons", [(-180, 180), (-180, 0), (0, 180)])
def test_a_tile_of_half_the_world_or_all_of_it_is_whole(lons):
    west, east = lons
    [ring] = rings([(west, 90), (east, 90), (east, -90), (west, -90)])
    assert ring == [(west, 90), (west, -90), (east, -90), (east, 90), (west, 90)]


@pytest.mark.parametrize("pole", [90, -90])
def test_a_footprint_around_a_pole_goes_along_it(pole):
    lat = 0.9 * pole
    corners = [(45, lat), (135, lat), (-135, lat), (-45, lat)]
    areas = 0
    for ring in rings(corners):
        assert all(-180 <= lon <= 180 for lon, _ in ring)
        for (lon, lat), (next_lon, next_lat) in zip(ring, ring[1:], strict=False):
            areas += (lon * next_lat - next_lon * lat) / 2
    assert areas == pytest.approx(360 * 9)  # all longitudes, latitudes 81 to 90 degrees


@pytest.mark.parametrize(
    ("corners", "problem"),
    [
        ([(0, 0), (1, 0), (1, 1)], "a footprint has four corners, found 3"),
        ([(0, 0), (1, 0), (1, 91), (0, 1)], "longitude 1.0, latitude 91.0: no place on the earth"),
        ([(0, 0), (float("nan"), 0), (1, 1), (0, 1)], "longitude nan, .*: no place"),
    ],
)
def test_what_is_no_footprint_is_refused(corners, problem):
    with pytest.raises(ValueError, match=problem):
        rings(corners)


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ([(1, 5), (4, 5), (4, 3), (1, 3)], (2.5, 4)),
        ([(179, 2), (-178, 2), (-178, 0), (179, 0)], (-179.5, 1)),
        ([(179, 2), (182, 2), (182, 0), (179, 0)], (-179.5, 1)),
        ([(200, 10), (201, 10), (201, 9), (200, 9)], (-159.5, 9.5)),
        ([(-135, 89), (135, 89), (45, 89), (-45, 89)], (0, 90)),
        ([(-180, 90), (180, 90), (180, -90), (-180, -90)], (0, 0)),
        ([(0, 90), (360, 90), (360, -90), (0, -90)], (0, 0)),
    ],
)
def test_the_centre_lies_in_the_tile(corners, expected):
    assert centre(corners) == pytest.approx(expected)


@pytest.mark.parametrize("corners", [(-180, 180 - 1.4e-10), (0, 360)])
def test_a_footprint_all_around_is_the_whole_width(corners):
    west, east = corners
    [ring] = rings([(west, 10), (east, 10), (east, -10), (west, -10)])
    assert turned(ring) == [(-180, -10), (180, -10), (180, 10), (-180, 10)]
