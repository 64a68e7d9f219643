"""Pictures of playing cards for GP-VL: a row of cards on a green table (paper Sec. 4.1).

Everything is drawn here from curves, polygons (those of kings, queens and jacks in court.yaml) and
the typeface embedded in Pillow: no artwork is bundled or loaded. Each card is drawn at three times
its size or more, scaled down once (that smooths its edges) and cached. Lengths inside a card are in
hundredths of its width: a card is 100 wide and 140 high.
"""
import re
from functools import lru_cache
from math import ceil, cos, pi, sin
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image, ImageDraw, ImageFont

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
BLACK = (22, 22, 28)
RED = (205, 18, 36)
SUITS = {"spades": BLACK, "clubs": BLACK, "hearts": RED, "diamonds": RED}  # the colours of the ink
TABLE = (22, 104, 66)
PAPER = (255, 255, 255)
EDGE = (150, 150, 150)
GOLD = (240, 186, 58)
CREAM = (255, 249, 232)
LINE = (60, 44, 40)
MIN_CARD = 16  # pixels; in narrower cards "10" cannot be read
JUMBO_BELOW = 60  # pixels; narrower cards show one large rank and suit only
TILT = 8.0  # degrees, the most that jitter turns a card

# Kings, queens and jacks
COURT = yaml.safe_load(Path(__file__).with_name("court.yaml").read_text())
COURT_COLOURS = {"gold": GOLD, "cream": CREAM, "line": LINE, "skin": (252, 222, 194),
                 "blush": (250, 196, 172), "lips": (190, 40, 48), "nose": (196, 130, 100)}
WITHOUT_LINE = ("line", "blush", "lips", "nose")  # parts of these colours have no dark outline
HAIR = {"J": (222, 160, 62), "Q": (122, 58, 28), "K": (150, 142, 138)}

# Heights of the pips, 0 top to 1 bottom: in each side column, in the middle column
THREE, FOUR = (0, 1 / 2, 1), (0, 1 / 3, 2 / 3, 1)
PIPS = {
    "2": ((), (0, 1)), "3": ((), THREE), "4": ((0, 1), ()), "5": ((0, 1), (1 / 2,)),
    "6": (THREE, ()), "7": (THREE, (1 / 4,)), "8": (THREE, (1 / 4, 3 / 4)),
    "9": (FOUR, (1 / 2,)), "10": (FOUR, (1 / 6, 5 / 6)),
}


# ---------------------------------------------------------------- names of cards
RANK_NAMES = {rank.lower(): rank for rank in RANKS} | {"1": "A", "t": "10"} | dict(zip(
    "ace two three four five six seven eight nine ten jack queen king".split(), RANKS))
SUIT_NAMES = dict(zip("♠♣♥♦♤♧♡♢", (*SUITS, *SUITS)))
for _suit in SUITS:
    SUIT_NAMES |= {_suit: _suit, _suit[:-1]: _suit, _suit[0]: _suit}
_RANK = "|".join(sorted(RANK_NAMES, key=len, reverse=True))
_SUIT = "|".join(sorted(SUIT_NAMES, key=len, reverse=True))
_NAMED = re.compile(rf"({_SUIT})?[\s_-]*({_RANK})(?:[\s_-]*(?:of[\s_-]+)?({_SUIT}))?")


class Card(NamedTuple):
    """What a text names."""
    rank: str  # of RANKS; "": no card
    suit: str | None  # of SUITS; None: not said


def read_card(text):
    """The Card that a text names: "K", "1" (an ace), "K♠", "KS", "king of spades", "spades K"."""
    match = _NAMED.fullmatch(text.lower().replace("\ufe0f", "").strip())
    if not match or match[1] and match[3]:
        return Card("", None)
    return Card(RANK_NAMES[match[2]], SUIT_NAMES.get(match[1] or match[3]))


# ---------------------------------------------------------------- suits and letters
def _oval(x, y, width, height):
    """Points of an ellipse around (x, y) with these radii."""
    turns = [i * pi / 40 for i in range(80)]
    return [(x + width * cos(turn), y + height * sin(turn)) for turn in turns]


def _diamond(width, hollow):
    """Superellipse |x / width|^hollow + |y|^hollow = 1: straight at hollow 1, drawn in below it."""
    bend = 2 / hollow - 1
    return [(width * x * abs(x) ** bend, y * abs(y) ** bend) for x, y in _oval(0, 0, 1, 1)]


def _heart(width, height):
    """The heart curve, `width` wide either side, tip down at y = 1."""
    turns = [i * pi / 60 for i in range(120)]
    ys = [13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t) for t in turns]
    low = min(ys)
    high = max(ys)
    points = []
    for turn, y in zip(turns, ys):
        points.append((sin(turn) ** 3 * width, 1 - height * (y - low) / (high - low)))
    return points


STEM = [(-.07, 0), (.07, 0), (.09, .45), (.17, .75), (.42, 1), (-.42, 1), (-.17, .75), (-.09, .45)]
SHAPES = {  # polygons in the square from (-1, -1) to (1, 1), y downwards
    "hearts": [_heart(.96, 1.88)],
    "diamonds": [_diamond(.8, .88)],
    "spades": [[(x, -y) for x, y in _heart(.92, 1.72)], STEM],
    "clubs": [_oval(0, -.55, .44, .44), _oval(-.53, .19, .44, .44), _oval(.53, .19, .44, .44),
              _oval(0, 0, .2, .2), STEM],
}


@lru_cache(maxsize=None)
def _glyph(rank):
    """Mask of a rank in bold, cropped to its ink.

    The digits of 10 are set one by one: kerning depends on the build of Pillow.
    """
    font = ImageFont.load_default(400)
    mask = Image.new("L", (1200, 700))
    x = 0
    for digit in rank:
        image = Image.new("L", (600, 700))
        ImageDraw.Draw(image).text((100, 60), digit, 255, font, stroke_width=10)
        digit = image.crop(image.getbbox())
        mask.paste(digit, (x, 0))
        x += digit.width + 30
    return mask.crop(mask.getbbox())


class _Pen:
    """Draws on `image` in card units, each `unit` pixels long."""

    def __init__(self, image, unit):
        self.image = image
        self.unit = unit
        self.draw = ImageDraw.Draw(image)

    def area(self, points, fill, line=None, thick=.7):
        """A polygon, with an outline if it has a colour `line`."""
        points = [(x * self.unit, y * self.unit) for x, y in points]
        self.draw.polygon(points, fill)
        if line:
            closed = points + points[:2]  # once round and on, for a round last corner
            self.draw.line(closed, line, max(1, round(thick * self.unit)), "curve")

    def suit(self, suit, x, y, size, turned=False):
        """The symbol of a suit around (x, y), upright or standing on its head."""
        half = -size / 2 if turned else size / 2
        for polygon in SHAPES[suit]:
            self.area([(x + half * a, y + half * b) for a, b in polygon], SUITS[suit])

    def rank(self, rank, suit, x, top, width, height, stretch=1.0):
        """The rank, `height` high and centred on x.

        In its own proportions times `stretch`, but `width` wide at most.
        """
        mask = _glyph(rank)
        width = min(width, height * stretch * mask.width / mask.height)
        size = (round(width * self.unit), round(height * self.unit))
        at = (round(x * self.unit - size[0] / 2), round(top * self.unit))
        self.image.paste(SUITS[suit], at, mask.resize(size, Image.Resampling.BOX))


# ---------------------------------------------------------------- faces of the cards
def _outlines(part):
    """The polygons of a part of court.yaml, x from the left edge of the card."""
    if part["shape"] == "ovals":
        (x, y), radii = part["points"]
        return [_oval(50 + x, y, *radii), _oval(50 - x, y, *radii)]
    right = [(50 + x, y) for x, y in part["points"]]
    left = [(50 - x, y) for x, y in part["points"]]
    if part["shape"] == "half":
        back = left[::-1]
        return [right + back, left + back]  # the left edge twice, as in all pictures so far
    return [right] if part["shape"] == "right" else [right, left]


def _court(pen, rank, suit):
    """The framed middle of a court card: the figure, and below it the same upside down."""
    frame = [(22, 14), (78, 14), (78, 126), (22, 126)]
    pen.area(frame, CREAM)
    colours = {**COURT_COLOURS, "suit": SUITS[suit], "hair": HAIR[rank]}
    for part in COURT:
        if rank in part["ranks"]:
            line = None if part["colour"] in WITHOUT_LINE else LINE
            for outline in _outlines(part):
                pen.area(outline, colours[part["colour"]], line)
    pen.suit(suit, 28, 20.5, 9.5)
    width, height = pen.image.size
    half = pen.image.crop((0, 0, width, height // 2))
    pen.image.paste(half.transpose(Image.Transpose.ROTATE_180), (0, height - height // 2))
    pen.area([(22, 67.8), (78, 67.8), (78, 72.2), (22, 72.2)], GOLD, LINE)
    pen.area(frame, None, SUITS[suit], 1)


def _full_face(pen, rank, suit):
    """A card as in a real pack, with an index in two opposite corners."""
    pen.rank(rank, suit, 11, 6, 15, 18)
    pen.suit(suit, 11, 33.5, 13)
    if rank == "A":
        pen.suit(suit, 50, 70, 50)
    elif rank in PIPS:
        sides, middle = PIPS[rank]
        for x, heights in ((32, sides), (50, middle), (68, sides)):
            for height in heights:  # pips below the centre stand on their heads
                pen.suit(suit, x, 26 + 88 * height, 18.5, turned=height > 1 / 2)
    else:
        _court(pen, rank, suit)
    image = pen.image
    corner = image.crop((0, 0, round(21 * pen.unit), round(42 * pen.unit)))
    corner = corner.transpose(Image.Transpose.ROTATE_180)
    image.paste(corner, (image.width - corner.width, image.height - corner.height))


def _jumbo_face(pen, rank, suit, width, height):
    """The rank, as large as it goes, and the suit under it, for a card of width x height pixels."""
    pixel = 100 / width  # the edges of rank and suit lie on whole pixels, which keeps them sharp
    top = round(.055 * height) * pixel
    pen.rank(rank, suit, 50, top, 80, round(.53 * height) * pixel, 1.15)
    size = round(.34 * height) * pixel
    pen.suit(suit, 50, height * pixel - top - size / 2, size)


@lru_cache(maxsize=256)
def draw_card(rank, suit, width):
    """One card, upright. The image is shared between callers: do not draw on it.

    Args: rank, of RANKS; suit, of SUITS; width, pixels, MIN_CARD or more.
    Returns: RGBA image (width, round(1.4 * width)), transparent outside the rounded corners. Below
        JUMBO_BELOW pixels the face is one large rank and suit: pips would be a blur.
    Raises: ValueError for an unknown rank or suit or a card too narrow to read.
    """
    if rank not in RANKS or suit not in SUITS:
        raise ValueError(f"no card {rank!r} of {suit!r}: "
                         f"ranks are {' '.join(RANKS)}, suits {' '.join(SUITS)}")
    if width < MIN_CARD:
        raise ValueError(f"a card must be at least {MIN_CARD} pixels wide to be read, not {width}")
    height = round(1.4 * width)
    scale = max(3, ceil(400 / width))
    big = Image.new("RGB", (width * scale, height * scale), PAPER)
    pen = _Pen(big, width * scale / 100)
    if width < JUMBO_BELOW:
        _jumbo_face(pen, rank, suit, width, height)
    else:
        _full_face(pen, rank, suit)
    mask = Image.new("L", big.size)
    box = (0, 0, big.width - 1, big.height - 1)
    radius = 7 * pen.unit
    ImageDraw.Draw(mask).rounded_rectangle(box, radius, 255)
    pen.draw.rounded_rectangle(box, radius, None, EDGE, max(scale, round(pen.unit)))
    big.putalpha(mask)
    return big.resize((width, height), Image.Resampling.BOX)


def draw_table(cards, width, height, jitter=None):
    """Cards in a row on a green table.

    Args:
        cards: (rank, suit) pairs from left to right, one or more.
        width, height: pixels of the picture.
        jitter: None, or a random.Random that draws each card's size (85 to 100 %), tilt (8 degrees
            at most) and place.
    Returns: RGB image (width, height); every card lies wholly on it and none touches another.
    Raises: ValueError for unknown cards, none at all, or a canvas too small to read them.
    """
    count = len(cards)
    if not count:
        raise ValueError("a table needs at least one card")
    # Tilted by TILT a card is 1.185 times as wide; the rest is rounding and play.
    room = 1 if jitter is None else 1.3
    margin = max(1, round(.05 * min(width / count, height / 1.4)))
    card = int(min(width // count - 2 * margin, (height - 2 * margin) / 1.4) / room)
    if card < MIN_CARD:
        least = ceil(MIN_CARD * room)
        raise ValueError(f"{width}x{height} is too small to read {count} cards: at least "
                         f"{count * (least + 2)}x{ceil(1.4 * least) + 2} pixels are needed")
    table = Image.new("RGB", (width, height), TABLE)
    pitch = min(width // count, ceil(card * room) + 2 * margin)  # the strip that each card has
    left = (width - count * pitch) // 2
    for rank, suit in cards:
        if jitter is None:
            sprite = draw_card(rank, suit, card)
            x = (pitch - sprite.width) // 2
            y = (height - sprite.height) // 2
        else:
            sprite = draw_card(rank, suit, max(MIN_CARD, round(card * jitter.uniform(.85, 1))))
            angle = jitter.uniform(-TILT, TILT)
            sprite = sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True)
            x = jitter.randint(1, pitch - sprite.width - 1)
            slack = height - sprite.height - 2
            most = min(slack // 2, sprite.height // 2)  # by half a card at most: it stays a row
            y = 1 + slack // 2 + round(most * jitter.uniform(-1, 1))
        table.paste(sprite, (left + x, y), sprite)
        left += pitch
    return table
