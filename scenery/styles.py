"""How things look in street views: cities (cities.yaml), icons and trees (icons.yaml), boards."""
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import yaml
from PIL import Image, ImageColor, ImageDraw, ImageFont


def mix(colour, other, share):
    """A colour with this share of another one."""
    return tuple(round(p + (q - p) * share) for p, q in zip(colour, other))


def _named(value):
    """YAML's mappings with attributes for keys, lists as tuples, "#rgb" as (red, green, blue)."""
    if isinstance(value, dict):
        return SimpleNamespace(**{name: _named(item) for name, item in value.items()})
    if isinstance(value, list):
        return tuple(_named(item) for item in value)
    if isinstance(value, str) and value.startswith("#"):
        return ImageColor.getrgb(value)
    return value


class Layer(NamedTuple):
    """A shape of one colour; icons and trees are lists of them."""
    colour: int  # which of the colours that `paint_glyph` gets
    shape: str  # ellipse, polygon or rectangle
    points: list  # (x, y) of the corners; of an ellipse: of its box


def _glyph(text, colours):
    """The Layers that a text of icons.yaml describes; `colours`: their names, in order."""
    layers = []
    for line in text.splitlines():
        colour, shape, *numbers = line.split()
        numbers = [float(number) for number in numbers]
        points = list(zip(numbers[::2], numbers[1::2]))
        layers.append(Layer(colours.index(colour), shape, points))
    return layers


def _read(name):
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


_GLYPHS = _read("icons.yaml")
ICONS = {name: _glyph(text, ("ink", "board")) for name, text in _GLYPHS["icons"].items()}
TREES = {name: _glyph(text, ("leaf", "sunlit", "wood")) for name, text in _GLYPHS["trees"].items()}
CATEGORIES = tuple(ICONS)  # of landmarks
CITIES = {city: _named(style) for city, style in _read("cities.yaml").items()}


def paint_glyph(draw, glyph, x, y, unit, colours):
    """Paint an icon or a tree.

    Args:
        draw: PIL's ImageDraw; glyph: of ICONS or TREES.
        x, y: pixels, of the glyph's origin; unit: pixels to one of its units.
        colours: of an icon: ink, board; of a tree: leaf, sunlit leaf, wood.
    """
    for layer in glyph:
        points = [(x + unit * px, y + unit * py) for px, py in layer.points]
        paint = getattr(draw, layer.shape)
        paint(points, colours[layer.colour])


@lru_cache(maxsize=64)
def font(size):
    """Pillow's own font, `size` pixels high."""
    return ImageFont.load_default(size)


def _in_lines(words):
    """Words in one line or two, so that the longer one is as short as can be."""
    def longer(cut):
        return max(len(" ".join(words[:cut])), len(" ".join(words[cut:])))

    cut = min(range(len(words) + 1), key=longer)
    lines = (" ".join(words[:cut]), " ".join(words[cut:]))
    return [line for line in lines if line]


@lru_cache(maxsize=256)
def _board(city, name, category):
    """A board 400 pixels wide: the icon and, unless `name` is empty, the name below it."""
    board, letters = CITIES[city].board, CITIES[city].letters
    radius = 4 * board.corner
    below = radius < 160  # beyond that the board is an arch
    corners = (True, True, below, below)
    mask = Image.new("L", (400, 392))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 399, 391), radius, 255, corners=corners)
    image = Image.new("RGB", (400, 392), board.paper)
    draw = ImageDraw.Draw(image)
    inner = max(0, radius - 6)
    draw.rounded_rectangle((6, 6, 393, 385), inner, None, board.rim, 8, corners=corners)

    middle, unit = (138, 1.14) if name else (200, 1.4)
    paint_glyph(draw, ICONS[category], 200, middle, unit, (board.ink, board.paper))
    text = name.upper() if letters.capitals else name
    lines = _in_lines(text.split())
    y = 314 if len(lines) == 1 else 288
    for line in lines:
        width = draw.textlength(line, font(58)) + 2 * letters.stroke
        fitting = font(58 * min(1, 356 / width))
        draw.text((200, y), line, board.ink, fitting, "mm", stroke_width=letters.stroke)
        y += 52
    image.putalpha(mask)
    return image


@lru_cache(maxsize=512)
def board(city, name, category, width):
    """RGBA image of a landmark's board, `width` pixels wide; without letters if `name` is empty."""
    size = (width, round(0.98 * width))
    return _board(city, name, category).resize(size, Image.Resampling.BOX)
