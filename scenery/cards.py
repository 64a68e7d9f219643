"""Pictures of playing cards for the vision-language variant (GP-VL): a row of cards on a green table (paper Sec. 4.1).

Everything is drawn here from curves, polygons and the typeface embedded in Pillow: no artwork is bundled or loaded.
Each card is drawn at three times its size or more, scaled down once (that smooths its edges) and cached.
Lengths inside a card are in hundredths of its width: a card is 100 wide and 140 high.

    python cards.py        writes docs/cards.png and docs/tables.png
"""
from functools import lru_cache
from math import ceil, cos, pi, sin
from pathlib import Path
import random

from PIL import Image, ImageDraw, ImageFont

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
BLACK, RED = (22, 22, 28), (205, 18, 36)
SUITS = {"spades": BLACK, "clubs": BLACK, "hearts": RED, "diamonds": RED}  # the colours of the ink
TABLE, PAPER, EDGE = (22, 104, 66), (255, 255, 255), (150, 150, 150)
GOLD, SKIN, LINE, CREAM = (240, 186, 58), (252, 222, 194), (60, 44, 40), (255, 249, 232)
BLUSH, LIPS, NOSE = (250, 196, 172), (190, 40, 48), (196, 130, 100)
HAIR = {"J": (222, 160, 62), "Q": (122, 58, 28), "K": (150, 142, 138)}
MIN_CARD = 16  # pixels; in narrower cards "10" cannot be read
JUMBO_BELOW = 60  # pixels; narrower cards show one large rank and suit only
TILT = 8.0  # degrees, the most that jitter turns a card

# Heights of the pips, 0 top to 1 bottom, in (each side column, the middle column)
PIPS = {"2": ((), (0, 1)), "3": ((), (0, 1 / 2, 1)), "4": ((0, 1), ()), "5": ((0, 1), (1 / 2,)),
        "6": ((0, 1 / 2, 1), ()), "7": ((0, 1 / 2, 1), (1 / 4,)), "8": ((0, 1 / 2, 1), (1 / 4, 3 / 4)),
        "9": ((0, 1 / 3, 2 / 3, 1), (1 / 2,)), "10": ((0, 1 / 3, 2 / 3, 1), (1 / 6, 5 / 6))}


# ---------------------------------------------------------------- suits and letters
def _circle(x, y, r):
    return [(x + r * cos(i * pi / 40), y + r * sin(i * pi / 40)) for i in range(80)]


def _diamond(width, hollow):
    """Superellipse |x / width|^hollow + |y|^hollow = 1: straight sides at hollow 1, drawn in below it."""
    bend = 2 / hollow - 1
    return [(width * x * abs(x) ** bend, y * abs(y) ** bend) for x, y in _circle(0, 0, 1)]


def _heart(height):
    """The heart curve, 1 wide either side, tip down at y = 1."""
    turn = [i * pi / 60 for i in range(120)]
    ys = [13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t) for t in turn]
    low, high = min(ys), max(ys)
    return [(sin(t) ** 3, 1 - height * (y - low) / (high - low)) for t, y in zip(turn, ys)]


_STEM = [(-.07, 0), (.07, 0), (.09, .45), (.17, .75), (.42, 1), (-.42, 1), (-.17, .75), (-.09, .45)]
SHAPES = {  # polygons in the square from (-1, -1) to (1, 1), y downwards
    "hearts": [[(x * .96, y) for x, y in _heart(1.88)]],
    "diamonds": [_diamond(.8, .88)],
    "spades": [[(x * .92, -y) for x, y in _heart(1.72)], _STEM],
    "clubs": [_circle(0, -.55, .44), _circle(-.53, .19, .44), _circle(.53, .19, .44), _circle(0, 0, .2), _STEM],
}


@lru_cache(maxsize=None)
def _glyph(rank):
    """Mask of a rank in bold, cropped to its ink. The digits of 10 are set one by one: kerning depends on the build."""
    font, bold, gap = ImageFont.load_default(400), 10, 30
    digits = [Image.new("L", (600, 700)) for _ in rank]
    for image, digit in zip(digits, rank):
        ImageDraw.Draw(image).text((100, 60), digit, 255, font, stroke_width=bold)
    digits = [image.crop(image.getbbox()) for image in digits]
    mask = Image.new("L", (sum(d.width + gap for d in digits) - gap, max(d.height for d in digits)))
    x = 0
    for d in digits:
        mask.paste(d, (x, 0))
        x += d.width + gap
    return mask


class _Pen:
    """Draws on `image` in card units; `unit` is the number of pixels in one of them, (x, y) the origin."""

    def __init__(self, image, unit):
        self.image, self.unit, self.draw = image, unit, ImageDraw.Draw(image)

    def area(self, points, fill, line=None, thick=.7):
        points = [(x * self.unit, y * self.unit) for x, y in points]
        self.draw.polygon(points, fill)
        if line:
            self.draw.line(points + points[:2], line, max(1, round(thick * self.unit)), "curve")

    def suit(self, suit, x, y, size, turned=False):
        half = -size / 2 if turned else size / 2
        for polygon in SHAPES[suit]:
            self.area([(x + half * a, y + half * b) for a, b in polygon], SUITS[suit])

    def rank(self, rank, suit, x, top, width, height, stretch=1.0):
        """The rank, `height` high, centred on x, in its own proportions times `stretch` but `width` wide at most."""
        mask = _glyph(rank)
        wide = min(width, height * stretch * mask.width / mask.height)
        size = (round(wide * self.unit), round(height * self.unit))
        at = (round(x * self.unit - size[0] / 2), round(top * self.unit))
        self.image.paste(SUITS[suit], at, mask.resize(size, Image.Resampling.BOX))


# ---------------------------------------------------------------- faces of the cards
# Upper half of a court card in front view: (ranks, colour, points...), painted in this order; "ink": the suit's colour.
# x counts from the middle of the card to the right. An outline that starts at x = 0 is closed by its mirror image, any
# other is painted on both sides (with ">" on the right only); two points are the centre and the radii of an oval.
COURT = (
    ("K", "hair", (0, 26), (11, 29), (12.5, 38), (11.5, 48), (0, 50)),
    ("Q", "hair", (0, 25), (8, 27), (13, 34), (14, 46), (18, 58), (0, 58)),
    ("J", "hair", (0, 26), (9, 27), (12, 33), (12, 44), (16, 50), (11, 52), (0, 51)),
    ("JQK", "ink", (0, 52), (8, 52), (21, 57), (28, 64), (28, 71), (0, 71)),  # robe, then its gold braid
    ("JQK", GOLD, (16.5, 55.3), (19.5, 56.4), (24, 71), (20, 71)),
    ("K", CREAM, (0, 51), (9, 51), (15, 56), (13, 71), (0, 71)),  # ermine
    ("K", LINE, (10, 55), (10.9, 58), (9.1, 58)), ("K", LINE, (9.5, 62), (10.4, 65), (8.6, 65)),
    ("Q", SKIN, (0, 50), (4.5, 50), (5.5, 54), (13, 56), (7, 66), (0, 69)),  # neckline and pearls
    ("Q", CREAM, (0, 60.5), (1.5, 1.5)), ("Q", CREAM, (3.4, 59.6), (1.5, 1.5)), ("Q", CREAM, (6.4, 57.6), (1.5, 1.5)),
    ("J", SKIN, (0, 50), (4.5, 50), (5, 54), (0, 58)),  # collar and buttons
    ("J", CREAM, (0, 58), (5, 52.5), (13, 55), (8, 62)),
    ("J", GOLD, (0, 61.5), (1.2, 1.2)), ("J", GOLD, (0, 65.5), (1.2, 1.2)),
    ("JQK", SKIN, (0, 40), (9.5, 12.5)), ("JQ", BLUSH, (5.6, 44.4), (1.9, 1.4)),  # face: eyes, brows, nose, mouth
    ("JQK", LINE, (4, 39.5), (1.1, 1.5)), ("JQK", LINE, (2, 36.6), (4.3, 35.4), (6.6, 36.4), (4.3, 36.3)),
    ("JQK>", NOSE, (.2, 40), (1.4, 44.2), (-1, 44.6), (.4, 43.8)),
    ("Q", LIPS, (0, 46.6), (.8, 46.2), (3.2, 47), (1.5, 48.8), (0, 48.8)),
    ("J", LIPS, (0, 48), (3, 47.4), (0, 49.2)),
    ("K", "hair", (0, 46.2), (4, 45.2), (9.5, 40), (10.5, 49), (8, 56), (4, 61), (0, 63.5)),  # beard, moustache
    ("K", CREAM, (0, 45.6), (2.5, 45.4), (7, 48.6), (2.5, 47.8), (0, 47.2)),
    ("K", LIPS, (0, 49.4), (2.4, 1)),
    ("K", GOLD, (0, 16), (3.5, 24), (8, 17.5), (10, 24.5), (15, 18.5), (13, 32), (0, 33)),  # crown
    ("K", "ink", (0, 28), (13.6, 27.6), (13, 32), (0, 33)),
    ("K", GOLD, (0, 17), (1.6, 1.6)), ("K", GOLD, (8, 18.2), (1.6, 1.6)), ("K", GOLD, (15, 19.2), (1.6, 1.6)),
    ("Q", "hair", (0, 27), (7, 27.5), (10.6, 33), (10.6, 41), (8, 34.5), (0, 30.5)),  # parting, earrings, tiara
    ("Q", GOLD, (10.2, 46), (1.3, 1.7)),
    ("Q", GOLD, (0, 17), (3, 23), (7, 20.5), (8, 25), (12.5, 24), (11.5, 31), (6, 28.6), (0, 27.8)),
    ("Q", "ink", (0, 24), (1.7, 2.2)),
    ("J", "hair", (0, 32.8), (3, 34), (6, 33), (9.2, 36), (9.5, 30), (0, 30)),  # fringe, feather, cap
    ("J>", GOLD, (12, 29), (14, 21), (19, 16.5), (26, 15.8), (23.5, 22), (19, 26.5), (14.5, 30)),
    ("J", "ink", (0, 17.5), (7, 18), (13, 21), (15, 25.5), (13.5, 30), (0, 30)),
    ("J", CREAM, (0, 28), (13.5, 28), (13.5, 32.4), (0, 32.4)),
)


def _figure(pen, rank, suit):
    """King, queen or jack, from the top of the frame to the middle of the card."""
    for ranks, colour, *points in COURT:
        if rank not in ranks:
            continue
        colour = {"ink": SUITS[suit], "hair": HAIR[rank]}.get(colour, colour)
        line = None if colour in (LINE, LIPS, BLUSH, NOSE) else LINE
        for side in (1,) if ">" in ranks else (1, -1):
            outline = [(50 + side * x, y) for x, y in points]
            if len(points) == 2:
                (x, y), (rx, ry) = outline[0], points[1]
                outline = [(x + rx * a, y + ry * b) for a, b in _circle(0, 0, 1)]
            elif points[0][0] == 0:
                outline += [(50 - x, y) for x, y in reversed(points)]
            pen.area(outline, colour, line)


def _court(pen, rank, suit):
    """The framed middle of a court card: the figure, and below it the same figure turned by half a turn."""
    frame = [(22, 14), (78, 14), (78, 126), (22, 126)]
    pen.area(frame, CREAM)
    _figure(pen, rank, suit)
    pen.suit(suit, 28, 20.5, 9.5)
    width, height = pen.image.size
    half = pen.image.crop((0, 0, width, height // 2))
    pen.image.paste(half.transpose(Image.Transpose.ROTATE_180), (0, height - height // 2))
    pen.area([(22, 67.8), (78, 67.8), (78, 72.2), (22, 72.2)], GOLD, LINE)
    pen.area(frame, None, SUITS[suit], 1)


def _pips(pen, rank, suit):
    """The pips in their usual places; those below the centre stand on their heads."""
    sides, middle = PIPS[rank]
    for x, heights in ((32, sides), (50, middle), (68, sides)):
        for h in heights:
            pen.suit(suit, x, 26 + 88 * h, 18.5, turned=h > 1 / 2)


@lru_cache(maxsize=256)
def draw_card(rank, suit, width):
    """One card, upright. The image is shared between callers: do not draw on it.

    Args: rank, of RANKS; suit, of SUITS; width, pixels, MIN_CARD or more.
    Returns: RGBA image (width, round(1.4 * width)), transparent outside the rounded corners. Below JUMBO_BELOW pixels
        the face holds only the rank, as large as it goes, and the suit under it: pips would be a blur.
    Raises: ValueError for an unknown rank or suit or a card too narrow to read.
    """
    if rank not in RANKS or suit not in SUITS:
        raise ValueError(f"no card {rank!r} of {suit!r}: ranks are {' '.join(RANKS)}, suits {' '.join(SUITS)}")
    if width < MIN_CARD:
        raise ValueError(f"a card must be at least {MIN_CARD} pixels wide to be read, not {width}")
    height, fine = round(1.4 * width), max(3, ceil(400 / width))
    big = Image.new("RGB", (width * fine, height * fine), PAPER)
    pen = _Pen(big, width * fine / 100)
    if width < JUMBO_BELOW:
        pixel = 100 / width  # the edges of rank and suit lie on whole pixels, which keeps them sharp
        top, tall, size = (round(share * height) * pixel for share in (.055, .53, .34))
        pen.rank(rank, suit, 50, top, 80, tall, 1.15)
        pen.suit(suit, 50, height * pixel - top - size / 2, size)
    else:
        pen.rank(rank, suit, 11, 6, 15, 18)
        pen.suit(suit, 11, 33.5, 13)
        if rank == "A":
            pen.suit(suit, 50, 70, 50)
        else:
            (_pips if rank in PIPS else _court)(pen, rank, suit)
        corner = big.crop((0, 0, round(21 * pen.unit), round(42 * pen.unit))).transpose(Image.Transpose.ROTATE_180)
        big.paste(corner, (big.width - corner.width, big.height - corner.height))
    mask = Image.new("L", big.size)
    box, radius = (0, 0, big.width - 1, big.height - 1), 7 * pen.unit
    ImageDraw.Draw(mask).rounded_rectangle(box, radius, 255)
    pen.draw.rounded_rectangle(box, radius, None, EDGE, max(fine, round(pen.unit)))
    big.putalpha(mask)
    return big.resize((width, height), Image.Resampling.BOX)


def draw_table(cards, width, height, jitter=None):
    """Cards in a row on a green table.

    Args:
        cards: (rank, suit) pairs from left to right, one or more.
        width, height: pixels of the picture.
        jitter: None, or a random.Random that draws each card's size (85 to 100 %), tilt (8 degrees at most) and place.
    Returns: RGB image (width, height); every card lies wholly on it and none touches another.
    Raises: ValueError for unknown cards, none at all, or a canvas too small to read them.
    """
    count = len(cards)
    if not count:
        raise ValueError("a table needs at least one card")
    room = 1 if jitter is None else 1.3  # tilted by TILT a card is 1.185 times as wide; the rest is rounding and play
    margin = max(1, round(.05 * min(width / count, height / 1.4)))
    card = int(min(width // count - 2 * margin, (height - 2 * margin) / 1.4) / room)
    if card < MIN_CARD:
        least = ceil(MIN_CARD * room)
        raise ValueError(f"{width}x{height} is too small to read {count} cards: at least "
                         f"{count * (least + 2)}x{ceil(1.4 * least) + 2} pixels are needed")
    table = Image.new("RGB", (width, height), TABLE)
    pitch = min(width // count, ceil(card * room) + 2 * margin)  # every card has this wide a strip to itself
    for i, (rank, suit) in enumerate(cards):
        left = (width - count * pitch) // 2 + i * pitch
        if jitter is None:
            sprite = draw_card(rank, suit, card)
            x, y = (pitch - sprite.width) // 2, (height - sprite.height) // 2
        else:
            sprite = draw_card(rank, suit, max(MIN_CARD, round(card * jitter.uniform(.85, 1))))
            sprite = sprite.rotate(jitter.uniform(-TILT, TILT), Image.Resampling.BICUBIC, expand=True)
            slack = height - sprite.height - 2  # up or down by half a card at most: it stays a row
            x = jitter.randint(1, pitch - sprite.width - 1)
            y = 1 + slack // 2 + round(min(slack // 2, sprite.height // 2) * jitter.uniform(-1, 1))
        table.paste(sprite, (left + x, y), sprite)
    return table


def main():
    """Contact sheets: docs/cards.png, the pack; docs/tables.png, tables as the models see them."""
    docs = Path(__file__).resolve().parent.parent / "docs"
    pack = Image.new("RGB", (13 * 100 + 10, 4 * 136 + 10), TABLE)
    for row, suit in enumerate(SUITS):
        for column, rank in enumerate(RANKS):
            sprite = draw_card(rank, suit, 90)
            pack.paste(sprite, (10 + 100 * column, 10 + 136 * row), sprite)
    pack.save(docs / "cards.png", optimize=True)
    black = [("K", "spades"), ("10", "clubs"), ("A", "clubs"), ("7", "spades")]
    red = [("Q", "hearts"), ("J", "diamonds"), ("3", "hearts"), ("9", "diamonds")]
    mixed = [("J", "spades"), ("4", "hearts"), ("Q", "clubs"), ("10", "diamonds")]
    sheet = Image.new("RGB", (4 * 460 + 12, 256 + 482), PAPER)
    write = ImageDraw.Draw(sheet).text
    for column, (name, cards) in enumerate((("black", black), ("red", red), ("mixed", mixed), ("jitter", mixed))):
        x, jitter = 12 + 460 * column, random.Random(0) if name == "jitter" else None
        large, small = draw_table(cards, 1200, 600, jitter), draw_table(cards, 112, 112, jitter)
        write((x, 4), f"{name}, 1200 x 600", LINE, ImageFont.load_default(15))
        sheet.paste(large.resize((448, 224), Image.Resampling.LANCZOS), (x, 24))
        write((x, 260), f"{name}, 112 x 112, enlarged 4 times", LINE, ImageFont.load_default(15))
        sheet.paste(small.resize((448, 448), Image.Resampling.NEAREST), (x, 280))
    sheet.save(docs / "tables.png", optimize=True)


if __name__ == "__main__":
    main()
