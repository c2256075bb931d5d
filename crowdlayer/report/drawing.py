"""A drawing is a list of lines, boxes, dots and texts; it becomes SVG for the page, or a picture.

Colours are names: the page's style sheet gives them their light and dark tones, a picture takes the light ones. Most of
matplotlib's 50 MB would lie idle in the image, and its SVG is ten times the size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from unicodedata import east_asian_width

from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

LIGHT = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#d8dee4",
    "paper": "#ffffff",
    "one": "#0b63ce",
    "two": "#b35900",
    "three": "#1a7f37",
    "four": "#8250df",
    "alarm": "#cf222e",
}
"""What each name of a colour is on white; `one` to `four` are told apart by those who see fewer colours too."""
SERIES = ("one", "two", "three", "four", "alarm", "ink")
SMOOTH = 3
"""A picture is drawn so many times larger and then made smaller, which smooths its edges."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line through points, without those that are missing; `width` in pixels."""

    points: Sequence[Point]
    colour: str = "ink"
    width: float = 1.5
    dashed: bool = False


@dataclass(frozen=True)
class Box:
    """A filled rectangle; `tip` is shown when one points at it."""

    x: float
    y: float
    width: float
    height: float
    colour: str = "one"
    opacity: float = 1.0
    tip: str = ""


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    x: float
    y: float
    radius: float
    colour: str = "one"
    tip: str = ""


@dataclass(frozen=True)
class Text:
    """A line of text: y is its middle; `anchor` where x is; `upright` reads from below to above."""

    x: float
    y: float
    text: str
    size: float = 11
    anchor: str = "start"
    colour: str = "muted"
    upright: bool = False


Part = Line | Box | Dot | Text


@dataclass
class Drawing:
    """`width` by `height` pixels; `label` says in a sentence what is to be seen, for those who cannot see it."""

    width: float
    height: float
    label: str
    parts: list[Part] = field(default_factory=list)

    def add(self, *parts: Part) -> None:
        self.parts += parts


def beside(drawings: Sequence[Drawing], gap: float = 16) -> Drawing:
    """Several drawings in a row, as one."""
    whole = Drawing(
        sum(d.width for d in drawings) + gap * (len(drawings) - 1),
        max(d.height for d in drawings),
        " ".join(d.label for d in drawings),
    )
    left = 0.0
    for drawing in drawings:
        whole.parts += [_moved(part, left) for part in drawing.parts]
        left += drawing.width + gap
    return whole


def _moved(part: Part, by: float) -> Part:
    match part:
        case Line(points, colour, width, dashed):
            return Line([(x + by, y) for x, y in points], colour, width, dashed)
        case Box(x, y, width, height, colour, opacity, tip):
            return Box(x + by, y, width, height, colour, opacity, tip)
        case Dot(x, y, radius, colour, tip):
            return Dot(x + by, y, radius, colour, tip)
        case Text(x, y, text, size, anchor, colour, upright):
            return Text(x + by, y, text, size, anchor, colour, upright)


def to_svg(drawing: Drawing) -> Markup:
    """The drawing as an element of a page: everything that comes from data is escaped."""
    head = Markup('<svg viewBox="0 0 {} {}" width="{}" role="img" aria-label="{}">').format(
        _n(drawing.width), _n(drawing.height), _n(drawing.width), drawing.label
    )
    return head + Markup("").join(_svg(drawing.parts)) + Markup("</svg>")


def _svg(parts: Iterable[Part]) -> Iterable[Markup]:
    for part in parts:
        match part:
            case Line(points, colour, width, dashed):
                path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
                dash = Markup(' stroke-dasharray="4 3"') if dashed else ""
                yield Markup('<path class="s-{}" stroke-width="{}"{} d="{}"/>').format(colour, _n(width), dash, path)
            case Box(x, y, width, height, colour, opacity, tip):
                faint = Markup(' fill-opacity="{}"').format(_n(opacity, 3)) if opacity < 1 else ""
                yield Markup('<rect class="f-{}" x="{}" y="{}" width="{}" height="{}"{}{}/>').format(
                    colour, _n(x), _n(y), _n(width), _n(height), faint, _tip(tip)
                )
            case Dot(x, y, radius, colour, tip):
                yield Markup('<circle class="f-{}" cx="{}" cy="{}" r="{}"{}/>').format(
                    colour, _n(x), _n(y), _n(radius), _tip(tip)
                )
            case Text(x, y, text, size, anchor, colour, upright):
                turn = Markup(' transform="rotate(-90 {} {})"').format(_n(x), _n(y)) if upright else ""
                yield Markup('<text class="f-{}" x="{}" y="{}" font-size="{}" text-anchor="{}"{}>{}</text>').format(
                    colour, _n(x), _n(y + size * 0.35 if not upright else y), _n(size), anchor, turn, text
                )


def _tip(tip: str) -> Markup:
    return Markup(' data-tip="{}"').format(tip) if tip else Markup("")


def _n(value: float, digits: int = 1) -> str:
    """A number with few digits: a tenth of a pixel is enough."""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))


def to_picture(drawing: Drawing, scale: int = 2) -> Image.Image:
    """The drawing on white, `scale` pixels per pixel."""
    zoom = scale * SMOOTH
    size = (round(drawing.width * zoom), round(drawing.height * zoom))
    image = Image.new("RGB", size, LIGHT["paper"])
    draw = ImageDraw.Draw(image)
    for part in drawing.parts:
        match part:
            case Line(points, colour, width, dashed):
                pixels = [(x * zoom, y * zoom) for x, y in points]
                for piece in _dashes(pixels, 4 * zoom) if dashed else [pixels]:
                    draw.line(piece, LIGHT[colour], max(1, round(width * zoom)), joint="curve")
            case Box(x, y, width, height, colour, opacity, _):
                corners = [x * zoom, y * zoom, (x + width) * zoom - 1, (y + height) * zoom - 1]
                if opacity and corners[2] >= corners[0] and corners[3] >= corners[1]:
                    draw.rectangle(corners, fill=_faint(LIGHT[colour], opacity))
            case Dot(x, y, radius, colour, _):
                draw.circle((x * zoom, y * zoom), radius * zoom, fill=LIGHT[colour])
            case Text(x, y, text, size_, anchor, colour, upright):
                _write(image, draw, Text(x * zoom, y * zoom, text, size_ * zoom, anchor, colour, upright))
    return image.resize((size[0] // SMOOTH, size[1] // SMOOTH), Image.Resampling.LANCZOS)


def _write(image: Image.Image, draw: ImageDraw.ImageDraw, part: Text) -> None:
    font = ImageFont.load_default(part.size)
    across = {"start": "l", "middle": "m", "end": "r"}[part.anchor]
    if not part.upright:
        draw.text((part.x, part.y), part.text, LIGHT[part.colour], font, anchor=f"{across}m")
        return
    _, _, right, bottom = font.getbbox(part.text)
    page = Image.new("L", (round(right) + 2, round(bottom) + 2))
    ImageDraw.Draw(page).text((0, 0), part.text, 255, font)
    page = page.rotate(90, expand=True)
    shift = {"start": page.height, "middle": page.height / 2, "end": 0}[part.anchor]
    place = (round(part.x - bottom / 2), round(part.y - shift))
    image.paste(Image.new("RGB", page.size, LIGHT[part.colour]), place, page)


def _dashes(points: Sequence[Point], length: float) -> Iterable[list[Point]]:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        whole = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        steps = max(1, round(whole / length))
        for step in range(0, steps, 2):
            a, b = step / steps, min(step + 1, steps) / steps
            yield [(x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))]


def _faint(colour: str, opacity: float) -> tuple[int, int, int]:
    """A colour of that opacity on white."""
    channels = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    red, green, blue = (round(255 - opacity * (255 - channel)) for channel in channels)
    return red, green, blue


def shortened(text: str, longest: int) -> str:
    """`text` in at most `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def letters(text: str) -> int:
    """How wide `text` is, in letters of English: those of East Asia are twice as wide."""
    return len(text) + sum(east_asian_width(letter) in "FW" for letter in text)
