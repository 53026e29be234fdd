"""Lines lie where their figures are."""

import math
import sys
from xml.etree import ElementTree

import pytest

from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "tools"))
from report_chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, line_chart


def drawn(points):
    (line,) = ElementTree.fromstring(line_chart("a & b", [Series("x<y", points)])).iter("polyline")
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def test_a_line_from_corner_to_corner():
    """Zero to one, both ways: the ticks are 0, 0.2, … 1, and half is in the middle, y upwards."""
    middle = ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
    assert drawn([(0, 0), (0.5, 0.5), (1, 1)]) == [(LEFT, HEIGHT - BOTTOM), middle, (WIDTH - RIGHT, TOP)]


@pytest.mark.parametrize("points", [[(7, 0.0)], [(7, -3.0)], [(1, 1e-9), (2, 1e9)], [(1, 5.0), (2, math.nan), (3, 5.0)]])
def test_every_finite_point_is_inside(points):
    places = drawn(points)
    assert len(places) == sum(math.isfinite(y) for _, y in points)
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in places)


@pytest.mark.parametrize("points", [[], [(1, math.inf)]])
def test_no_figures(points):
    assert "no figures" in line_chart("loss", [Series("loss", points)])
