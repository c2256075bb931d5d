"""Figures → drawings: learning curves, confusion matrices, reliability diagrams, bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .drawing import SERIES, Box, Dot, Drawing, Line, Part, Text, letters, shortened

MOST_CLASSES = 40
"""Of more classes a matrix on a page is no picture any more."""
NUMBERS_UP_TO = 12
"""Up to so many classes the cells of a matrix hold their numbers."""
LONGEST_NAME = 14
"""Characters of a name beside a chart."""

Series = Mapping[str, Sequence[float | None]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def curves(title: str, series: Series, chosen: int | None, unit: str = "", width: float = 440) -> Drawing:
    """A value per epoch, from 1, of each series, a gap where there is none; a dashed line at the chosen epoch."""
    known = [value for values in series.values() for value in values if value is not None]
    n = max([len(values) for values in series.values()] + [1])
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = (high - low) * 0.06 or max(abs(high), 1) * 0.1
    low, high = low - margin, high + margin
    possible = (0, 100) if unit == "%" else (-math.inf, math.inf)
    heights = {value: f"{value:g}" for value in ticks(low, high) if possible[0] <= value <= possible[1]}
    left, right, bottom = max(46.0, 12 + 6.4 * max(map(len, heights.values()), default=0)), 12.0, 34.0
    legend = _legend(series, left, width)
    top = 20 + max([y for _, y, _ in legend], default=14.0)
    height = top + 206
    drawing = Drawing(width, height, f"{title} per epoch: {_told(series)}.")

    def at(epoch: float, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * ((epoch - 1) / (n - 1) if n > 1 else 0.5)
        return x, top + (height - top - bottom) * (high - value) / (high - low)

    for value, shown in heights.items():
        y = at(1, value)[1]
        drawing.add(Line([(left, y), (width - right, y)], "grid", 1))
        drawing.add(Text(left - 6, y, shown, anchor="end"))
    for epoch in sorted({round(tick) for tick in ticks(1, n, 6)} | {1, n}):
        if epoch in (1, n) or min(epoch - 1, n - epoch) > n / 12:
            drawing.add(Text(at(epoch, low)[0], height - bottom + 14, str(epoch), anchor="middle"))
    drawing.add(Text((left + width - right) / 2, height - 7, "epoch", anchor="middle"))
    if chosen is not None:
        x = at(chosen, low)[0]
        drawing.add(Line([(x, top), (x, height - bottom)], "muted", 1, dashed=True))
    for colour, values, (x, y, name) in zip(SERIES, series.values(), legend, strict=False):
        drawing.parts += _runs([None if v is None else at(k, v) for k, v in enumerate(values, 1)], colour)
        drawing.add(Line([(x, y), (x + 16, y)], colour, 2.5), Text(x + 21, y, name, colour="ink"))
    if unit:
        drawing.add(Text(left - 6, 14, unit, anchor="end"))
    if n <= 400:
        step = (width - left - right) / max(n - 1, 1)
        for epoch in range(1, n + 1):
            values_here = [
                f"{name} {_short(values[epoch - 1])}" for name, values in series.items() if len(values) >= epoch
            ]
            tip = f"epoch {epoch}{' (chosen)' if epoch == chosen else ''}: {', '.join(values_here)}"
            drawing.add(Box(at(epoch, low)[0] - step / 2, top, step, height - top - bottom, "paper", 0.0, tip))
    return drawing


def _legend(names: Iterable[str], left: float, width: float) -> list[tuple[float, float, str]]:
    """Where each name stands, x and y, and what of it: in as many lines as there must be."""
    letter, places, x, y = 6.9, [], left, 14.0
    for name in names:
        shown = shortened(name, int((width - left - 21) / letter))
        if x > left and x + 21 + letter * letters(shown) > width:
            x, y = left, y + 17
        places.append((x, y, shown))
        x += 36 + letter * letters(shown)
    return places


def _runs(points: Sequence[tuple[float, float] | None], colour: str) -> list[Part]:
    """Lines through neighbours that exist, and dots where one stands alone."""
    parts: list[Part] = []
    run: list[tuple[float, float]] = []
    for point in [*points, None]:
        if point is not None:
            run.append(point)
        elif run:
            parts.append(Line(run, colour, 2) if len(run) > 1 else Dot(*run[0], 3, colour))
            run = []
    return parts


def _told(series: Series) -> str:
    told = []
    for name, values in series.items():
        known = [value for value in values if value is not None]
        if known:
            told.append(f"{name} from {_short(known[0])} to {_short(known[-1])}")
    return ", ".join(told) or "no values"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def widest(names: Sequence[str]) -> int:
    """The room, in letters, that names have beside a chart."""
    return max([letters(shortened(name, LONGEST_NAME)) for name in names] + [1])


def matrix(classes: Sequence[str], counts: Sequence[Sequence[float]], normalised: bool, size: float = 400) -> Drawing:
    """A confusion matrix of `counts` (true, predicted): rows are true classes; the shade is the share of the row.

    The cells hold counts, or with `normalised` percent of the row.
    """
    k = len(classes)
    name_width = 10 + 6.4 * widest(classes)
    edge = max(8.0, min(46.0, size / k))
    left, top = name_width + 18, name_width + 18
    small = min(11.0, edge * 0.8)
    drawing = Drawing(left + k * edge + 6, top + k * edge + 6, f"Confusion matrix of {k} classes.")
    drawing.add(Text(8, top + k * edge / 2, "true class", anchor="middle", upright=True))
    drawing.add(Text(left + k * edge / 2, 8, "predicted class", anchor="middle"))
    for row, (name, values) in enumerate(zip(classes, counts, strict=True)):
        total = sum(values)
        short = shortened(name, LONGEST_NAME)
        if edge >= 8:
            drawing.add(Text(left - 6, top + (row + 0.5) * edge, short, small, "end", "ink"))
            drawing.add(
                Text(left + (row + 0.5) * edge + small / 3, top - 6, short, small, "start", "ink", upright=True)
            )
        for column, value in enumerate(values):
            share = value / total if total else 0.0
            tip = f"{name} → {classes[column]}: {value:g} of {total:g} ({share:.1%})"
            x, y = left + column * edge, top + row * edge
            drawing.add(Box(x, y, edge - 1, edge - 1, "one", 0.04 + 0.96 * share, tip))
            if k <= NUMBERS_UP_TO and value:
                shown = f"{100 * share:.0f}" if normalised else f"{value:g}"
                colour = "paper" if share > 0.5 else "ink"
                drawing.add(Text(x + edge / 2, y + edge / 2, shown, 11, "middle", colour))
    return drawing


def reliability(title: str, bins: Sequence[dict[str, Any]], colour: str = "one", size: float = 250) -> Drawing:
    """A reliability diagram: accuracy against confidence per bin; on the diagonal a probability means what it says."""
    left, top, bottom = 40.0, 26.0, 34.0
    side = size - left - 18
    total = sum(found["count"] for found in bins)
    gap = sum(found["count"] * abs(found["accuracy"] - found["confidence"]) for found in bins) / max(total, 1)
    drawing = Drawing(size, top + side + bottom, f"{title}: the confidence is off by {gap:.1%} on average.")
    drawing.add(Text(left, 12, title, 12, colour="ink"))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + side * x, top + side * (1 - y)

    for value in (0, 0.25, 0.5, 0.75, 1):
        drawing.add(Line([at(0, value), at(1, value)], "grid", 1))
        drawing.add(Text(left - 6, at(0, value)[1], f"{value:.0%}", 10, "end"))
        drawing.add(Text(at(value, 0)[0], top + side + 12, f"{value:.0%}", 10, "middle"))
    drawing.add(Line([at(0, 0), at(1, 1)], "muted", 1, dashed=True))
    drawing.add(Text(left + side / 2, top + side + 27, "confidence", anchor="middle"))
    for found in bins:
        x, y = at(found["confidence"], found["accuracy"])
        tip = f"{found['count']} images: confidence {found['confidence']:.1%}, right {found['accuracy']:.1%}"
        drawing.add(Line([at(found["confidence"], found["confidence"]), (x, y)], colour, 1))
        drawing.add(Dot(x, y, max(1.5, 9.5 * (found["count"] / max(total, 1)) ** 0.5), colour, tip))
    return drawing


def bars(title: str, names: Sequence[str], series: dict[str, Sequence[float]], width: float = 440) -> Drawing:
    """Horizontal bars, a group per name."""
    row = 9.0 * len(series) + 9
    left = 12 + 6.4 * widest(names)
    drawing = Drawing(width, 60 + row * len(names), f"{title}: {', '.join(series)}.")
    drawing.add(Text(8, 12, title, 12, colour="ink"))
    most = max([value for values in series.values() for value in values] + [1e-9])
    at_x = left
    for colour, name in zip(SERIES, series, strict=False):
        drawing.add(Box(at_x, 29, 10, 10, colour), Text(at_x + 15, 34, name, colour="ink"))
        at_x += 30 + 6.2 * len(name)
    for place, name in enumerate(names):
        y = 50 + row * place
        drawing.add(Text(left - 6, y + 4.5 * len(series), shortened(name, LONGEST_NAME), 11, "end", "ink"))
        for nth, (colour, (what, values)) in enumerate(zip(SERIES, series.items(), strict=False)):
            length = (width - left - 50) * values[place] / most
            drawing.add(Box(left, y + 9 * nth, max(length, 0.5), 8, colour, 1, f"{name}, {what}: {values[place]:g}"))
            drawing.add(Text(left + length + 4, y + 9 * nth + 4, f"{values[place]:g}", 9))
    return drawing


def histogram(title: str, counts: Sequence[int], labels: Sequence[str], width: float = 440) -> Drawing:
    """Upright bars: how many of each."""
    height, top, bottom, left = 170.0, 26.0, 30.0, 8.0
    step = (width - 2 * left) / max(len(counts), 1)
    most = max([*counts, 1])
    wide = 6 * max(map(letters, labels), default=0) > step  # then each bar has at its edge what it begins with
    drawing = Drawing(
        width, height, f"{title}: " + ", ".join(f"{n} of {name}" for name, n in zip(labels, counts, strict=True)) + "."
    )
    drawing.add(Text(left, 12, title, 12, colour="ink"))
    for place, (count, name) in enumerate(zip(counts, labels, strict=True)):
        tall = (height - top - bottom - 12) * count / most
        x = left + place * step
        drawing.add(Box(x + 1, height - bottom - tall, step - 2, tall, "one", 0.85, f"{name}: {count}"))
        at, below = (x, name.split("–")[0]) if wide else (x + step / 2, name)
        drawing.add(Text(at, height - bottom + 10, below, 10, "middle"))
        if step >= 22 and count:
            drawing.add(Text(x + step / 2, height - bottom - tall - 7, str(count), 10, "middle"))
    drawing.add(Line([(left, height - bottom), (width - left, height - bottom)], "muted", 1))
    return drawing
