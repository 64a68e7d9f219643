"""How things look in street views: cities (cities.yaml), icons and trees (icons.yaml), boards."""
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

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


def _read(name):
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


ICONS, TREES = _read("icons.yaml").values()
CATEGORIES = tuple(ICONS)  # of landmarks
CITIES = {city: _named(style) for city, style in _read("cities.yaml").items()}


def paint_glyph(draw, glyph, x, y, unit, **colours):
    """Paint an icon or a tree.

    Args:
        draw: PIL's ImageDraw; glyph: of ICONS or TREES.
        x, y: pixels, of the glyph's origin; unit: pixels to one of its units.
        colours: of an icon: ink, board; of a tree: leaf, sunlit, wood.
    """
    for colour, shape, *numbers in glyph:
        corners = zip(numbers[::2], numbers[1::2])
        points = [(x + unit * px, y + unit * py) for px, py in corners]
        paint = getattr(draw, shape)
        paint(points, colours[colour])


@lru_cache(maxsize=64)
def font(size):
    """Pillow's own font, `size` pixels high."""
    return ImageFont.load_default(size)


def _in_lines(words):
    """Words in one line or two, so that the longer one is as short as can be."""
    def longer(cut):
        return max(len(" ".join(words[:cut])), len(" ".join(words[cut:])))

    cut = min(range(len(words) + 1), key=longer)
    return [" ".join(line) for line in (words[:cut], words[cut:]) if line]


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
    paint_glyph(draw, ICONS[category], 200, middle, unit, ink=board.ink, board=board.paper)
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
