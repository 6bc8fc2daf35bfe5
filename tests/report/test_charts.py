import math
import re
from xml.etree import ElementTree

import pytest

from fw_train.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, line_chart


def drawn(chart, style):
    group = ElementTree.fromstring(chart).find(f".//g[@class='{style}']")
    return [(command, float(x), float(y)) for command, x, y in
            re.findall(r"([ML])([\d.]+) ([\d.]+)", group.find("path").get("d"))]  # fmt: skip


def test_a_line_goes_through_its_values():
    chart = line_chart("a < b", [Series("loss", [0, 50, 100], [4.0, 2.0, 3.0], "train")], 100)
    (_, x0, y0), (_, x1, y1), (_, x2, y2) = drawn(chart, "train")
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert TOP <= y0 < y2 < y1 <= HEIGHT - BOTTOM
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert "a &lt; b" in chart


def test_what_is_not_finite_leaves_a_gap():
    chart = line_chart("loss", [Series("loss", [0, 1, 2, 3], [1.0, math.nan, 2.0, 3.0], "train")], 3)
    assert [command for command, _, _ in drawn(chart, "train")] == ["M", "M", "L"]
    assert line_chart("loss", [Series("loss", [0], [math.inf], "train")], 3) == ""


def test_few_values_are_dots():
    dots = ElementTree.fromstring(line_chart("loss", [Series("held out", [5], [1.0], "valid")], 10)).findall(
        ".//circle"
    )
    assert len(dots) == 1


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 5.0], [1e-7, 3e-7], [-3.0, 8.0], [0.0, 4e6]])
def test_ticks_are_round_and_inside(values):
    chart = ElementTree.fromstring(line_chart("x", [Series("x", [0, 1], values, "train")], 1))
    lines = [float(line.get("y1")) for line in chart.findall(".//line")]
    assert 2 <= len(lines) <= 8
    assert all(TOP - 1 <= y <= HEIGHT - BOTTOM + 1 for y in lines)
