"""Drawings as SVG and as pictures; what is drawn of which figures."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from crowdlayer.report import charts
from crowdlayer.report.drawing import LIGHT, Box, Dot, Drawing, Line, Text, beside, to_picture, to_svg
from crowdlayer.report.pictures import titled

HOSTILE = "\"><script>alert(1)</script>&'{{7*7}}"


def pixels(drawing: Drawing) -> np.ndarray:
    return np.asarray(to_picture(drawing, scale=1))


def tone(name: str) -> list[int]:
    return [int(LIGHT[name][at : at + 2], 16) for at in (1, 3, 5)]


def drawn_text(drawing: Drawing) -> list[str]:
    return [part.text for part in drawing.parts if isinstance(part, Text)]


def test_a_hostile_text_stays_a_text() -> None:
    drawing = Drawing(100, 50, HOSTILE, [Text(5, 5, HOSTILE), Box(0, 0, 9, 9, tip=HOSTILE), Dot(5, 5, 2, tip=HOSTILE)])
    root = ElementTree.fromstring(to_svg(drawing))
    assert [element.tag for element in root.iter()] == ["svg", "text", "rect", "circle"]
    assert root.attrib["aria-label"] == root[0].text == root[1].attrib["data-tip"] == HOSTILE


def test_svg_and_picture_have_things_at_the_same_place() -> None:
    drawing = Drawing(60, 40, "", [Box(10, 10, 20, 10, "one"), Line([(0, 35), (60, 35)], "alarm", 4)])
    image = pixels(drawing)
    assert image.shape == (40, 60, 3)
    assert image[15, 20].tolist() == tone("one")
    assert image[15, 40].tolist() == [255, 255, 255]
    assert image[35, 30].tolist() == pytest.approx(tone("alarm"), abs=12)  # its edges are smooth
    svg = to_svg(drawing)
    assert '<rect class="f-one" x="10" y="10" width="20" height="10"/>' in svg
    assert 'd="M0 35L60 35"' in svg


def test_what_is_there_to_be_pointed_at_covers_nothing() -> None:
    drawing = Drawing(20, 20, "", [Box(0, 0, 20, 20, "one"), Box(0, 0, 20, 20, "paper", 0.0, "tip")])
    assert pixels(drawing)[10, 10].tolist() == tone("one")


def test_drawings_beside_each_other_keep_their_distance() -> None:
    both = beside([Drawing(30, 10, "a", [Box(0, 0, 5, 5)]), Drawing(20, 20, "b", [Box(0, 0, 5, 5)])], gap=10)
    assert (both.width, both.height, both.label) == (60, 20, "a b")
    assert [part.x for part in both.parts if isinstance(part, Box)] == [0, 40]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 12, [5, 10]),
        (-3, 3, [-2, 0, 2]),
        (0.61, 0.63, [0.61, 0.615, 0.62, 0.625, 0.63]),
    ],
)
def test_ticks_are_round_numbers_inside(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_a_curve_has_a_gap_where_there_is_no_value() -> None:
    drawing = charts.curves("loss", {"val": [1.0, 2.0, None, 3.0, None, 1.0, 2.0]}, chosen=2)
    assert [len(part.points) for part in drawing.parts if isinstance(part, Line) and part.colour == "one"] == [2, 2, 2]
    assert len([part for part in drawing.parts if isinstance(part, Dot)]) == 1


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [None]}, {"a": [1.0]}, {"a": [0.0, 0.0]}, {"a": [1e-9, 1e9]}])
def test_any_curve_can_be_drawn(series: dict[str, list[float | None]]) -> None:
    drawing = charts.curves("loss", series, chosen=1)
    assert "nan" not in to_svg(drawing)
    to_picture(drawing, scale=1)


@pytest.mark.parametrize("values", [[100.0], [100.0, 100.0], [0.0, 0.0], [0.0, 100.0], [99.99, 100.0], [0.0, 0.5]])
def test_no_axis_of_percents_goes_beyond_them(values: list[float]) -> None:
    drawing = charts.curves("accuracy", {"val": values}, chosen=1, unit="%")
    *heights, unit = (part.text for part in drawing.parts if isinstance(part, Text) and part.anchor == "end")
    assert unit == "%"
    assert 0 <= min(map(float, heights)) <= max(map(float, heights)) <= 100


@pytest.mark.parametrize(
    "drawing",
    [
        charts.curves("loss", {"val": [0.693151, 0.693212]}, chosen=1),
        charts.curves("loss", {"val": [-123456.0, -123457.0]}, chosen=1),
        titled(charts.matrix(["a", "b"], [[3, 1], [0, 0]], True, size=600), "test", normalised=True),
    ],
)
def test_every_text_has_the_room_that_it_takes(drawing: Drawing) -> None:
    for text in (part for part in drawing.parts if isinstance(part, Text) and not part.upright):
        room = {"start": drawing.width - text.x, "end": text.x, "middle": 2 * min(text.x, drawing.width - text.x)}
        assert room[text.anchor] >= 6.2 * len(text.text), text


def test_every_curve_is_named_within_the_drawing() -> None:
    names = [f"experiments/seed-{seed}: crowdlayer" for seed in range(5)] + ["s3://bucket/" + "long/" * 13]
    drawing = charts.curves("loss", {name: [1.0, 2.0] for name in names}, chosen=None, width=520)
    legend = [part for part in drawing.parts if isinstance(part, Text) and part.colour == "ink"]
    assert [part.text[:20] for part in legend] == [name[:20] for name in names]
    assert all(part.x + 6.5 * len(part.text) <= drawing.width for part in legend)
    assert len({(part.x, part.y) for part in legend}) == len(names)
    highest = min(y for part in drawing.parts if isinstance(part, Line) and part.width == 2 for _, y in part.points)
    assert max(part.y for part in legend) < highest - 5


def test_names_of_east_asia_have_the_room_that_they_take() -> None:
    name = "中华人民共和国国家"
    for drawing in (
        charts.matrix([name, "b"], [[1, 0], [0, 1]], True),
        charts.bars("", [name, "b"], {"a": [1.0, 2.0]}),
    ):
        text = next(part for part in drawing.parts if isinstance(part, Text) and part.text == name)
        assert text.x >= 11 * len(name)


def test_the_matrix_shades_the_share_of_the_row() -> None:
    drawing = charts.matrix(["cat", "dog"], [[3, 1], [0, 0]], normalised=True)
    boxes = [part for part in drawing.parts if isinstance(part, Box)]
    assert [box.opacity for box in boxes] == pytest.approx([0.76, 0.28, 0.04, 0.04])
    assert boxes[1].tip == "cat → dog: 1 of 4 (25.0%)"
    assert {"75", "25"} <= set(drawn_text(drawing))
    assert {"3", "1"} <= set(drawn_text(charts.matrix(["cat", "dog"], [[3, 1], [0, 0]], normalised=False)))


def test_a_calibrated_bin_lies_on_the_diagonal() -> None:
    bins = [{"confidence": 0.5, "accuracy": 0.5, "count": 10}, {"confidence": 0.9, "accuracy": 0.6, "count": 30}]
    drawing = charts.reliability("before", bins)
    on, off = (part for part in drawing.parts if isinstance(part, Dot))
    (start, end) = next(part.points for part in drawing.parts if isinstance(part, Line) and part.dashed)
    slope = (end[1] - start[1]) / (end[0] - start[0])
    assert on.y == pytest.approx(start[1] + slope * (on.x - start[0]))
    assert off.y > start[1] + slope * (off.x - start[0]) + 10  # below: too sure
    assert off.radius > on.radius
    assert "22.5%" in drawing.label
