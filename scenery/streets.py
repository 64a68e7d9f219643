"""Synthetic street views for V-IRL: what a camera on a road of a little city sees in front, right, behind and left.

A pinhole camera, flat ground, boxes for buildings and one upright board per landmark, drawn with PIL's polygons far to
near at twice the size and scaled down once (that smooths the edges). No picture or font file is loaded.
World: metres, x east, y north, degrees clockwise from north. In a view x points right and z into the picture.

    python streets.py      writes docs/cities.png
"""
from collections import namedtuple
from dataclasses import dataclass
from functools import lru_cache
from math import atan2, ceil, cos, degrees, exp, floor, hypot, inf, radians, sin, sqrt, tan
from pathlib import Path
from random import Random

from PIL import Image, ImageColor, ImageDraw, ImageFont

SPREAD = tan(radians(55))  # views are 110 degrees wide: a board on the diagonal between two of them is whole in both
LEVEL = .58  # of a view's height is above the horizon: the road at the camera's feet tells nothing
EYE, NEAR, FAR = 2.2, .5, 150.0  # metres: the camera above ground; how near and how far it sees
ROAD, KERB, WALL, DEPTH = 5.0, 5.3, 8.5, 12.0  # metres off a road's centre line; depth of a building
BOARD, LIFT, CLEAR = 5.6, 2.5, 16.0  # metres: width of a board, its lower edge, from where nothing may stand before it
NAMES_FROM = 200  # pixels; on smaller views names would be a blur, so the icon takes their place on the board
MIN_SIZE = 64  # pixels

# ---------------------------------------------------------------- cities: how things look, never what is where
# Colours are #rgb. sky: overhead, horizon; haze: metres at which two thirds of a colour are lost to the horizon's; sun:
# its bearing, degrees; ground: yard, pavement, road; paint: line, crossing; dash: metres of line, of gap; crossing:
# bars, metres they slant, framed?; glass: windows, shops; floors: fewest, most, metres of one; window: metres from one
# to the next, share of wall between, share of the storey; roof: metres; planted: share of the places for trees; board:
# ink, paper, rim; corner: radius in percent; posts: metres to the right of the board's middle; stroke: of the letters
City = namedtuple("City", "sky haze sun ground paint dash crossing walls glass floors window roof slate tree leaf "
                          "planted board corner posts capitals stroke")


def _city(*fields):
    return City(*([ImageColor.getrgb(c) for c in v.split()] if str(v).startswith("#") else v for v in fields))


CITIES = {
    "New York": _city("#69d #cde", 260, 150, "#888 #bbb #555", "#eb3 #eee", (4, 0), (7, 0, False),
        "#954 #b64 #754 #ba7 #888", "#334 #455", (4, 11, 3.4), (2.6, .5, .55), 0, "#000", "round", "#584", .45,
        "#fff #163 #fff", 2, (0,), False, 2),
    "Milan": _city("#8bd #eec", 200, 230, "#ba8 #cba #777", "#eed #eed", (2, 3), (5, 0, False),
        "#db6 #d85 #ec9 #c75 #edb", "#564 #643", (3, 5, 3.9), (3.2, .62, .6), 3.5, "#a54", "tall", "#363", .5,
        "#521 #eec #521", 45, (-2, 2), False, 1),
    "New Delhi": _city("#dc9 #edb", 75, 200, "#ba7 #b97 #876", "#eee #ffe", (4, 5), (7, 0, True),
        "#da8 #eca #c87 #bcb #db7", "#544 #853", (2, 4, 3.3), (3.6, .66, .45), 0, "#000", "round", "#784", .7,
        "#111 #fc2 #111", 2, (-2, 2), True, 2),
    "Buenos Aires": _city("#48d #bdf", 320, 30, "#7a5 #ddc #666", "#eee #eee", (3, 4), (9, 0, False),
        "#eed #edc #dca #ecb #ccc", "#567 #786", (3, 9, 3.5), (2.9, .55, .72), 2.6, "#567", "round", "#87b", .9,
        "#137 #fff #5ad", 28, (0,), False, 1),
    "London": _city("#9ab #ccc", 120, 0, "#786 #aaa #444", "#eee #eee", (2, 5), (5, 0, True),
        "#864 #dcc #744 #cba #986", "#eee #233", (3, 4, 3.2), (2.4, .56, .5), 3.2, "#455", "round", "#574", .55,
        "#fff #226 #c22", 12, (0,), True, 1),
    "Hong Kong": _city("#447 #d98", 110, 300, "#455 #667 #334", "#ed4 #ed4", (4, 0), (7, 0, True),
        "#778 #988 #678 #998 #557", "#fd8 #f96", (9, 22, 3.0), (2.1, .4, .4), 0, "#000", "palm", "#354", .2,
        "#fe4 #812 #fe4", 2, (3.3,), True, 2),
    "Melbourne": _city("#5ae #eee", 300, 330, "#8a6 #ccb #666", "#fff #fff", (3, 9), (7, .8, False),
        "#bcc #abb #ddd #789 #dca", "#378 #355", (2, 8, 3.6), (6, .06, .6), 0, "#000", "tall", "#795", .65,
        "#112 #de3 #112", 28, (3.3,), False, 2),
    "Lagos": _city("#eb8 #fda", 140, 270, "#b74 #b97 #665", "#fec #fed", (5, 4), (5, -1.2, False),
        "#ea4 #598 #d64 #edc #69c", "#433 #a33", (1, 3, 3.2), (3.4, .6, .42), 1.8, "#843", "palm", "#483", .8,
        "#210 #e82 #fed", 12, (-2, 2), True, 2),
    "San Francisco": _city("#cde #eee", 70, 110, "#997 #ccb #666", "#eb3 #fff", (4, 0), (7, .8, True),
        "#eba #acd #eda #bda #dbd", "#455 #eee", (3, 4, 3.3), (2.7, .48, .58), 2.8, "#766", "cone", "#464", .4,
        "#fff #426 #c9e", 45, (3.3,), False, 1),
}


# ---------------------------------------------------------------- glyphs: icons, trees, boards
# Layers painted one over the other: a letter (Oval: centre and radii; Polygon; Rectangle), the number of a colour, and
# coordinates, y downwards. An icon fills the square from -100 to 100; 0 is ink and 1 the board. A tree is in decimetres
# from its foot; 0 is leaf, 1 leaf in the sun, 2 wood.
ICONS = {
    "Cafe": "O0 55 10 42 42;O1 55 10 20 20;P0 -85 -40 60 -40 45 60 -70 60;R0 -100 75 80 100;R0 -50 -100 -28 -55;"
            "R0 5 -100 27 -55",
    "Bakery": "O0 0 5 100 62;R0 -90 20 90 65;P1 -60 -50 -38 -50 -30 25 -52 25;P1 -10 -60 12 -60 20 20 -2 20;"
              "P1 40 -50 62 -50 70 25 48 25",
    "Hotel": "R0 -100 -75 -75 90;R0 -100 20 100 55;R0 75 20 100 90;O0 -45 -15 26 26;"
             "P0 -10 -30 70 -30 100 0 100 10 -10 10",
    "Bank": "O0 0 0 100 100;O1 0 0 72 72;R0 -14 -62 14 62;R0 -40 -42 40 -20;R0 -40 -10 40 12;R0 -40 22 40 44",
    "Museum": "P0 0 -100 100 -40 -100 -40;R0 -85 -25 -50 65;R0 -18 -25 18 65;R0 50 -25 85 65;R0 -100 70 100 100",
    "Library": "P0 -8 -40 -8 85 -100 45 -100 -80;P0 8 -40 8 85 100 45 100 -80",
    "Pharmacy": "R0 -34 -100 34 100;R0 -100 -34 100 34",
    "Florist": "O0 0 -75 33 33;O0 44 -48 33 33;O0 27 -5 33 33;O0 -27 -5 33 33;O0 -44 -48 33 33;O1 0 -38 22 22;"
               "R0 -10 10 10 100;O0 40 62 38 16;O0 -40 74 38 16",
    "Cinema": "O0 -55 -55 43 43;O0 30 -55 43 43;R0 -100 -10 50 90;O1 -55 -55 15 15;O1 30 -55 15 15;"
              "P0 60 40 100 -5 100 85",
    "Bookshop": "R0 -100 -90 -58 80;R0 -45 -50 -8 80;P0 5 -72 42 -90 98 70 60 86;R0 -100 88 100 100",
    "Barber": "O0 0 -82 34 18;O0 0 82 34 18;R0 -42 -70 42 70;P1 -42 -40 42 -85 42 -63 -42 -18;"
              "P1 -42 3 42 -42 42 -20 -42 25;P1 -42 46 42 1 42 23 -42 68",
    "Gym": "R0 -100 -14 100 14;R0 -88 -40 -62 40;R0 -56 -68 -26 68;R0 26 -68 56 68;R0 62 -40 88 40",
    "Theatre": "P0 -85 -90 85 -90 85 10 50 75 0 100 -50 75 -85 10;O1 -40 -30 24 20;O1 40 -30 24 20;O1 0 32 46 34;"
               "O0 0 18 50 30",
    "School": "P0 0 -75 100 -25 0 25 -100 -25;P0 -55 10 0 40 55 10 55 60 0 85 -55 60;R0 82 -25 96 75",
    "Clinic": "O0 -48 -40 50 48;O0 48 -40 50 48;P0 -93 -20 93 -20 0 95",
    "Market": "P0 -75 -90 75 -90 100 -20 -100 -20;O0 -75 -20 25 25;O0 -25 -20 25 25;O0 25 -20 25 25;O0 75 -20 25 25;"
              "R0 -85 -20 -68 100;R0 68 -20 85 100;R0 -85 40 85 68",
    "Gallery": "R0 -100 -85 100 85;R1 -74 -60 74 60;P0 -68 60 -20 -20 15 25 35 0 68 60;O0 36 -30 18 18",
    "Pizzeria": "O0 0 -72 98 25;O1 0 -36 100 12;P0 -82 -30 82 -30 0 100;O1 -25 -8 15 15;O1 24 5 15 15",
    "Tailor": "P0 -40 -85 40 -85 100 -35 75 10 50 -10 50 90 -50 90 -50 -10 -75 10 -100 -35;O1 0 -88 24 24",
    "Aquarium": "O0 -25 0 75 52;P0 25 0 100 -60 82 0 100 60;O1 -60 -12 13 13",
}
CATEGORIES = tuple(ICONS)
TREES = {
    "round": "R2 -2 -45 2 0;O0 -6 -48 14 13;O0 7 -46 14 13;O0 0 -56 17 15;O1 3 -60 10 8",
    "tall": "R2 -2 -30 2 0;O0 0 -52 10 30;O1 3 -60 5 17",
    "palm": "P2 -2 0 2 0 1 -70 -1 -70;P0 0 -72 -14 -84 -28 -74 -14 -77;P0 0 -72 14 -84 28 -74 14 -77;"
            "P1 0 -72 -14 -72 -22 -54 -10 -66;P1 0 -72 14 -72 22 -54 10 -66;P0 0 -70 -4 -90 -16 -96 0 -84;"
            "P1 0 -70 4 -90 16 -96 0 -84",
    "cone": "R2 -2 -15 2 0;P0 0 -85 -16 -12 16 -12;P1 0 -85 4 -12 16 -12",
}


@lru_cache(maxsize=None)
def _layers(glyph):
    return [(part[0], int(part[1]), [float(v) for v in part.split()[1:]]) for part in glyph.split(";")]


def _paint(draw, glyph, x, y, unit, colours):
    """A glyph with its origin at (x, y), `unit` pixels to one of its units."""
    for kind, tone, (a, b, *more) in _layers(glyph):
        if kind == "O":
            a, b, more = a - more[0], b - more[1], (a + more[0], b + more[1])
        spots = [(x + unit * p, y + unit * q) for p, q in zip((a, *more[::2]), (b, *more[1::2]))]
        {"O": draw.ellipse, "P": draw.polygon, "R": draw.rectangle}[kind](spots, colours[tone])


_font = lru_cache(maxsize=64)(ImageFont.load_default)


@lru_cache(maxsize=256)
def _painted(city, name, category):
    """A landmark's board, 400 pixels wide: the icon and, unless `name` is empty, the name in a line or two below it."""
    style = CITIES[city]
    (ink, paper, rim), radius = style.board, 4 * style.corner
    corners = (True, True, radius < 160, radius < 160)  # beyond that an arch
    board, mask = Image.new("RGB", (400, 392), paper), Image.new("L", (400, 392))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 399, 391), radius, 255, corners=corners)
    draw = ImageDraw.Draw(board)
    draw.rounded_rectangle((6, 6, 393, 385), max(0, radius - 6), None, rim, 8, corners=corners)
    _paint(draw, ICONS[category], 200, 138 if name else 200, 1.14 if name else 1.4, (ink, paper))
    words = (name.upper() if style.capitals else name).split()
    split = min(range(len(words) + 1), key=lambda i: max(len(" ".join(words[:i])), len(" ".join(words[i:]))))
    lines = [" ".join(line) for line in (words[:split], words[split:]) if line]
    for row, line in enumerate(lines):
        wide = draw.textlength(line, _font(58)) + 2 * style.stroke
        font = _font(58 * min(1, 356 / wide))
        draw.text((200, 288 + 52 * row + 26 * (len(lines) == 1)), line, ink, font, "mm", stroke_width=style.stroke)
    board.putalpha(mask)
    return board


@lru_cache(maxsize=512)
def _board(city, name, category, width):
    return _painted(city, name, category).resize((width, round(.98 * width)), Image.Resampling.BOX)


# ---------------------------------------------------------------- the scene and what is built in it
@dataclass(frozen=True)
class Sign:
    x: float  # metres
    y: float
    name: str  # such as "Golden Bakery"
    category: str  # of CATEGORIES


@dataclass(frozen=True, eq=False)
class Scene:
    nodes: tuple  # (x, y), metres
    edges: tuple  # (i, j) of nodes: straight roads
    signs: tuple  # of Sign
    city: str  # of CITIES; decides how things look, not where they are
    seed: str  # of what is random: lots and trees


class _Road:
    """A road in coordinates of its own: t metres along it, s metres to its left."""

    def __init__(self, a, b):
        self.a, self.b, self.length = a, b, hypot(b[0] - a[0], b[1] - a[1])
        self.u = ((b[0] - a[0]) / self.length, (b[1] - a[1]) / self.length)

    def at(self, t, s):
        return self.a[0] + t * self.u[0] - s * self.u[1], self.a[1] + t * self.u[1] + s * self.u[0]

    def frame(self, point):
        x, y = point[0] - self.a[0], point[1] - self.a[1]
        return x * self.u[0] + y * self.u[1], y * self.u[0] - x * self.u[1]

    def strip(self, t0, t1, s0, s1):
        return self.at(t0, s0), self.at(t1, s0), self.at(t1, s1), self.at(t0, s1)

    def free(self, low, high, blocks):
        """[(from, to)] in t where no convex hull of the points of a block touches the band low < s < high."""
        taken = [(self.length, inf)]
        for block in blocks:
            corners = [self.frame(p) for p in block]
            ts = [t for t, s in corners if low <= s <= high]
            for edge in (low, high):  # where it is crossed: the hull's edges are among the pairs of its points
                below, above = [p for p in corners if p[1] < edge], [p for p in corners if p[1] >= edge]
                ts += [t + (t1 - t) * (edge - s) / (s1 - s) for t, s in below for t1, s1 in above]
            if ts:
                taken.append((min(ts), max(ts)))
        start, clear = 0, []
        for a, b in sorted(taken):
            if a > start:
                clear.append((start, a))
            start = max(start, b)
        return clear


def _disc(points):
    """Centre and radius of a disc that covers the points."""
    x, y = (sum(v) / len(points) for v in zip(*points))
    return (x, y), max(hypot(p - x, q - y) for p, q in points)


@lru_cache(maxsize=256)  # as many walks side by side
def _plan(scene):
    """(lots, trees) of a scene, the same in every city. None stands on a road or, seen from a road within CLEAR of a
    landmark, in front of it.

    A lot is its four corners anticlockwise, the first two on the street, numbers from 0 to 1 for its height and its
    wall, and its disc; a tree is its place and two such numbers.
    """
    roads = [_Road(scene.nodes[i], scene.nodes[j]) for i, j in scene.edges]
    blocks = [road.strip(-4, road.length + 4, -WALL - .2, WALL + .2) for road in roads]
    for sign in scene.signs:
        around = tuple((sign.x + dx, sign.y + dy) for dx in (-3.2, 3.2) for dy in (-3.2, 3.2))
        for road in roads:
            t, s = road.frame((sign.x, sign.y))
            if abs(s) < CLEAR and -CLEAR < t < road.length + CLEAR:
                reach = sqrt(CLEAR ** 2 - s * s)  # the stretch of road from which the sign must be seen
                blocks.append(around + tuple(road.at(min(max(v, 0), road.length), 0) for v in (t - reach, t + reach)))
    lots, trees, blocks = [], [], [(block, *_disc(block)) for block in blocks]
    for index, road in enumerate(roads):
        draw, reach = Random(f"{scene.seed}|road {index}"), road.length / 2 + WALL + DEPTH
        x, y = road.at(road.length / 2, 0)
        close = [block for k, (block, centre, radius) in enumerate(blocks)
                 if k != index and hypot(centre[0] - x, centre[1] - y) < reach + radius]
        for side in (1, -1):
            for t, end in road.free(*sorted((side * WALL, side * (WALL + DEPTH))), close):
                count = round((end - t) / 13) or int(end - t > 5)
                cuts = [t + (end - t) * (k + draw.uniform(-.3, .3) * (0 < k < count)) / (count or 1)
                        for k in range(count + 1)]
                for pair in zip(cuts, cuts[1:]):
                    corners = road.strip(*pair[::side], side * WALL, side * (WALL + DEPTH))
                    lots.append((corners, (draw.random(), draw.random()), *_disc(corners)))
                built = road.strip(t, end, side * WALL, side * (WALL + DEPTH))
                blocks.append((built, *_disc(built)))
            for t, end in road.free(*sorted((side * ROAD, side * WALL)), close):
                trees += [(road.at(v, side * 6.6), (draw.random(), draw.random()))
                          for v in range(ceil(t) + 3, floor(end) - 2, 9)]
    return lots, trees


@lru_cache(maxsize=256)  # as many walks side by side
def _ground(scene):
    """[(colour, centre, radius, polygon)] of what lies on the ground: pavements, kerbs, roads, then the markings."""
    city, pieces, roads = CITIES[scene.city], [], [_Road(scene.nodes[i], scene.nodes[j]) for i, j in scene.edges]

    def piece(colour, polygon):
        pieces.append((colour, *_disc(polygon), polygon))

    _, pavement, roadway = city.ground
    for half, colour in ((WALL, pavement), (KERB, _mix(pavement, (255, 255, 255), .3)), (ROAD, roadway)):
        for road in roads:
            piece(colour, road.strip(0, road.length, -half, half))
        for x, y in scene.nodes:
            piece(colour, [(x + half * cos(radians(a)), y + half * sin(radians(a))) for a in range(0, 360, 30)])
    for road, nodes in zip(roads, scene.edges):
        ends = []
        for node, way in zip(nodes, (1, -1)):
            turns = [way * (-1, 1)[e[0] == node] * (road.u[0] * r.u[0] + road.u[1] * r.u[1])
                     for r, e in zip(roads, scene.edges) if node in e and r is not road]  # cosines of the angles
            turn = max(turns, default=-1)
            meet = ROAD * sqrt(max(0, 1 + turn) / max(1 - turn, .01))  # where its roadway's edge leaves the other's
            ends.append(min(max(meet + 1.5, 7), 18, road.length / 2 - 5) if len(turns) > 1 else -4)
            if len(turns) > 1:
                _crossing(road, lambda v: v if way == 1 else road.length - v, ends[-1], city, piece)
        (on, off), t, end = city.dash, ends[0] + 4.5, road.length - ends[1] - 4.5
        while t < end:
            piece(city.paint[0], road.strip(t, min(t + on, end), -.14, .14))
            t += on + off
    return pieces


def _crossing(road, along, start, city, piece):
    """Bars across a road, 3.5 metres long; along(v) is the place v metres from the intersection."""
    bars, slant, framed = city.crossing
    pitch = 9.4 / bars
    near, far = along(start), along(start + 3.5)
    for k in range(bars):
        s = -4.7 + pitch * (k + .2)
        piece(city.paint[1], (road.at(near, s - slant / 2), road.at(near, s + .6 * pitch - slant / 2),
                              road.at(far, s + .6 * pitch + slant / 2), road.at(far, s + slant / 2)))
    for v in (start - .5, start + 3.5) if framed else ():
        piece(city.paint[1], road.strip(along(v), along(v + .5), -4.7, 4.7))


# ---------------------------------------------------------------- what a camera sees
def _mix(a, b, share):
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b))


@lru_cache(maxsize=8192)
def _tint(colour, light, distance, horizon, haze):
    return _mix([v * light for v in colour], horizon, 1 - exp(-distance / haze))


@lru_cache(maxsize=32)
def _backdrop(city, size):
    """The sky above bare ground, and the mask of the haze that lies on the ground: row by row, as far as it is."""
    city, level = CITIES[city], round(LEVEL * size)
    image, haze = Image.new("RGB", (size, size), city.ground[0]), Image.new("L", (size, size - level))
    for y in range(level):
        image.paste(_mix(*city.sky, (y / level) ** 1.3), (0, y, size, y + 1))
    for y in range(size - level):
        distance = size / 2 / SPREAD * EYE / (y + .5)
        haze.paste(round(255 * (1 - exp(-min(distance, 2 * FAR) / city.haze))), (0, y, size, y + 1))
    return image, haze


class _View:
    """Draws what a camera sees, at twice its size: half the image's width is the view's; `f` pixels for x / z = 1."""

    def __init__(self, image, scene, x, y, heading):
        self.image, self.draw, self.x, self.y = image, ImageDraw.Draw(image), x, y
        self.scene, self.city = scene, CITIES[scene.city]
        self.cos, self.sin = cos(radians(heading)), sin(radians(heading))
        self.half, self.level, self.f = image.width / 2, round(LEVEL * image.width), image.width / 2 / SPREAD

    def local(self, point):
        dx, dy = point[0] - self.x, point[1] - self.y
        return dx * self.cos - dy * self.sin, dx * self.sin + dy * self.cos

    def pixel(self, x, z, height=0):
        return self.half + self.f * x / z, self.level + self.f * (EYE - height) / z

    def sees(self, centre, radius):
        x, z = self.local(centre)
        return z > -radius and abs(x) < SPREAD * z + 1.75 * radius  # 1.75 = 1 / cos 55

    def tint(self, colour, distance, light=1.0):
        return _tint(colour, round(light, 1), 5 * round(distance / 5), self.city.sky[1], self.city.haze)

    def flat(self, polygon, colour):
        """A polygon on the ground, cut off at NEAR."""
        points, shown = [self.local(p) for p in polygon], []
        for (x, z), (x1, z1) in zip(points, points[1:] + points[:1]):
            if z >= NEAR:
                shown.append(self.pixel(x, z))
            if (z < NEAR) != (z1 < NEAR):
                shown.append(self.pixel(x + (x1 - x) * (NEAR - z) / (z1 - z), NEAR))
        if shown:
            self.draw.polygon(shown, colour)

    def wall(self, a, b, height, colour, distance):
        """One side of a building between a and b, left and right as seen from outside."""
        (xa, za), (xb, zb) = self.local(a), self.local(b)
        low, high = 0.0, float(xa * zb < xb * za)  # the share of it in view; none of it from inside
        sides = [(SPREAD * za + way * xa, SPREAD * zb + way * xb) for way in (1, -1)]
        for p, q in ((za - NEAR, zb - NEAR), *sides):  # what they are inside the view's bounds by
            if p < 0:
                low = max(low, p / (p - q) if q > 0 else 1)
            elif q < 0:
                high = min(high, p / (p - q))
        if low >= high:
            return

        def panel(u, v, bottom, top, colour):
            u, v = max(u, low), min(v, high)
            if u < v:
                (x, z), (x1, z1) = ((xa + (xb - xa) * w, za + (zb - za) * w) for w in (u, v))
                self.draw.polygon([self.pixel(x, z, bottom), self.pixel(x, z, top), self.pixel(x1, z1, top),
                                   self.pixel(x1, z1, bottom)], colour)

        light = .8 + .2 * cos(atan2(b[1] - a[1], a[0] - b[0]) - radians(self.city.sun))  # by the way it faces
        wall, glass, shop = (self.tint(v, distance, light) for v in (colour, *self.city.glass))
        storey, (pitch, pier, share) = self.city.floors[2], self.city.window
        panel(0, 1, 0, height, wall)
        (left, z), (right, z1) = ((xa + (xb - xa) * w, za + (zb - za) * w) for w in (low, high))
        count = max(1, round(hypot(b[0] - a[0], b[1] - a[1]) / pitch))
        column = self.f * (right / z1 - left / z) / count / (high - low)  # pixels, on the average
        if self.f * storey / min(z, z1) < 5:
            return
        tint = glass if column > 4 else _mix(glass, wall, pier)
        panel(0, 1, .4, storey * .85, shop)
        for k in range(1, round(height / storey)):
            panel(0, 1, storey * (k + .5 - share / 2), storey * (k + .5 + share / 2), tint)
        for k in range(count + 1) if column > 4 else ():
            panel((k - pier / 2) / count, (k + pier / 2) / count, 0, height, wall)
        panel(0, 1, height - .5, height, _mix(wall, (255, 255, 255), .3))

    def lot(self, distance, corners, height, numbers):
        """A building. Its roof comes first: the walls hide what is not seen of it from below."""
        colour, (slate,), top = self.city.walls[int(numbers[1] * len(self.city.walls))], self.city.slate, self.city.roof
        a, b, c, d = points = [self.local(p) for p in corners]
        if top and min(z for _, z in points) > 1:
            tips = [self.pixel((p[0] + q[0]) / 2, (p[1] + q[1]) / 2, height + top) for p, q in ((a, d), (b, c))]
            a, b, c, d = (self.pixel(*p, height) for p in points)
            for spots, light in (((a, *tips, b), 1), ((d, *tips, c), 1), ((a, tips[0], d), .8), ((b, tips[1], c), .8)):
                self.draw.polygon(spots, self.tint(slate, distance, light))
        for p, q in zip(corners, corners[1:] + corners[:1]):
            self.wall(p, q, height, colour, distance)

    def tree(self, distance, place, numbers):
        (leaf,), (x, z) = self.city.leaf, self.local(place)
        if z > 1.5:
            colours = [self.tint(v, distance) for v in (leaf, _mix(leaf, (255, 255, 220), .2), (92, 74, 58))]
            _paint(self.draw, TREES[self.city.tree], *self.pixel(x, z), (.09 + .04 * numbers[1]) * self.f / z, colours)

    def sign(self, distance, sign):
        """A board facing the camera. Its size goes with the distance, not with z as all else does: near the edges of so
        wide a view it would be stretched, and on the diagonal cut off."""
        x, z = self.local((sign.x, sign.y))
        if z < NEAR:
            return
        unit = self.f / max(distance, 3)  # pixels to a metre
        name = sign.name if self.half >= NAMES_FROM else ""
        board = _board(self.scene.city, name, sign.category, max(2, round(BOARD * unit)))
        u, foot = self.pixel(x, z)
        left, top = round(u - board.width / 2), round(self.pixel(x, z, LIFT)[1]) - board.height
        steel, thick, beam = self.tint((70, 74, 80), distance), max(1, round(.28 * unit)), top - .4 * unit
        for post in self.city.posts:
            self.draw.line([(u, top + unit), (u, beam), (u + post * unit, beam), (u + post * unit, foot)], steel, thick)
        self.image.paste(board, (left, top), board)


@lru_cache(maxsize=64)
def _things(scene, x, y):
    """[(distance, method of _View, centre, radius, its arguments)] around a camera, in the order of painting.

    A lot is left out when nearer ones rise above it in all the directions it fills, of 180 all around.
    """
    city, lots, tops, things = CITIES[scene.city], [], [0.0] * 180, []
    low, high, storey = city.floors
    for corners, numbers, centre, radius in _plan(scene)[0]:
        if hypot(centre[0] - x, centre[1] - y) < FAR:
            spots = [(px - x, py - y) for px, py in corners]
            distance = min(hypot(*p) for p in (*spots, _disc(spots[:2])[0]))
            lots.append((distance, spots, corners, numbers, centre, radius))
    for distance, spots, corners, numbers, centre, radius in sorted(lots, key=lambda lot: lot[0]):
        height = storey * (low + int(numbers[0] ** 1.5 * (high - low + 1)))
        mx, my = centre[0] - x, centre[1] - y
        turns = [atan2(mx * py - my * px, mx * px + my * py) for px, py in spots]
        first, last = (degrees(atan2(my, mx) + turn) / 2 for turn in (min(turns), max(turns)))
        top = (height + city.roof - EYE) / max(distance - 3, 1)
        if any(tops[k % 180] < top for k in range(floor(first), ceil(last))):
            (ax, ay), (bx, by) = spots[:2]
            order = max if ax * by < ay * bx else min  # the far end of a front in sight: trees along it come later
            things.append((order(hypot(ax, ay), hypot(bx, by)), "lot", centre, radius, (corners, height, numbers)))
        for k in range(ceil(first), floor(last)):
            tops[k % 180] = max(tops[k % 180], (height - EYE) / max(hypot(*p) for p in spots))
    for place, numbers in _plan(scene)[1]:
        distance = hypot(place[0] - x, place[1] - y)
        if distance < 90 and numbers[0] < city.planted:
            things.append((distance, "tree", place, 3, (place, numbers)))
    for sign in scene.signs:
        distance = hypot(sign.x - x, sign.y - y)
        if distance < FAR:
            things.append((distance, "sign", (sign.x, sign.y), 4, (sign,)))
    # nothing stands before a sign within CLEAR, so such a one comes last, whatever the order of its neighbours
    return sorted(things, key=lambda thing: (thing[1] == "sign" and thing[0] < CLEAR, -thing[0]))


def _tile(size):
    """Pixels of one view in a picture of `size`: at 901, 448 and a line of 5 between two."""
    return (size - max(1, round(size / 180))) // 2


def street_views(scene, x, y, heading, size):
    """What is seen from a place on a road: the grid [front, right; back, left], parted by black lines.

    Args: scene; x, y, metres; heading of the front view, degrees clockwise from north (right is 90 more, and so on);
        size, pixels, MIN_SIZE or more: at 901 a view is 448 wide and the lines 5.
    Returns: RGB image (size, size). The same arguments give the same pixels, in every process.
    Raises: ValueError for an unknown city or a size too small.
    """
    if scene.city not in CITIES:
        raise ValueError(f"city: {scene.city!r} is not one of {', '.join(CITIES)}")
    if size < MIN_SIZE:
        raise ValueError(f"size: {size} is under {MIN_SIZE} pixels")
    tile = _tile(size)
    backdrop, haze = _backdrop(scene.city, 2 * tile)
    views = []
    fine = tile / SPREAD  # pixels to a metre at a distance of one
    pieces = [piece for piece in _ground(scene) for far in (hypot(piece[1][0] - x, piece[1][1] - y) - piece[2],)
              if far < FAR and far * 3 < fine * piece[2]]
    for turn in (0, 90, 180, 270):
        view = _View(backdrop.copy(), scene, x, y, (heading + turn) % 360)
        for colour, centre, radius, polygon in pieces:
            if view.sees(centre, radius):
                view.flat(polygon, colour)
        view.image.paste(view.city.sky[1], (0, view.level), haze)
        for distance, kind, centre, radius, what in _things(scene, x, y):
            if view.sees(centre, radius):
                getattr(view, kind)(distance, *what)
        views.append(view.image.reduce(2))
    return _grid(views, size)


def _grid(views, size):
    """[front, right; back, left], from the four views clockwise, parted by black lines.

    The order is the prompt's: the pictures of the official data are in another one.
    """
    picture, tile = Image.new("RGB", (size, size)), views[0].width
    front, right, back, left = views
    for view, corner in ((front, (0, 0)), (right, (1, 0)), (back, (0, 1)), (left, (1, 1))):
        picture.paste(view, tuple(k * (size - tile) for k in corner))
    return picture


def panorama_views(panorama, yaw, size):
    """The same grid out of a real equirectangular panorama, each view 90 degrees wide as in the original.

    Args: panorama, RGB image of 360 x 180 degrees; yaw, degrees from its middle, clockwise, to the front; size, pixels.
    """
    tile, mesh = _tile(size), 12  # cells per side, within which the projection is bilinear
    twice = Image.new("RGB", (2 * panorama.width, panorama.height))  # so that no cell crosses the seam
    twice.paste(panorama, (0, 0))
    twice.paste(panorama, (panorama.width, 0))

    def source(turn, column, row):
        u, v = 2 * column / mesh - 1, 1 - 2 * row / mesh  # on the plane one ahead, from the middle to the right and up
        middle = (0.5 + (yaw + turn) / 360 % 1) * panorama.width
        return (middle + degrees(atan2(u, 1)) / 360 * panorama.width,
                (0.5 - degrees(atan2(v, hypot(1, u))) / 180) * panorama.height)

    def edge(k):
        return round(k * tile / mesh)

    views = []
    for turn in (0, 90, 180, 270):
        cells = [((edge(i), edge(j), edge(i + 1), edge(j + 1)),
                  tuple(x for corner in ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j)) for x in source(turn, *corner)))
                 for i in range(mesh) for j in range(mesh)]
        views.append(twice.transform((tile, tile), Image.Transform.MESH, cells, Image.Resampling.BILINEAR))
    return _grid(views, size)


def main():
    """docs/cities.png: one intersection in all the cities, the front view of one at full size, and the icons."""
    nodes = [(x + .14 * y, y - .14 * x) for x in range(-210, 211, 70) for y in range(-210, 211, 70)]
    edges = [(i, i + k) for i in range(49) for k in (1, 7) if i + k < 49 and (k == 7 or i % 7 < 6)]
    signs = [Sign(x, y, f"{word} {category}", category) for x, y, word, category in
             ((-6, 9, "Golden", "Bakery"), (9, 8, "Blue", "Cafe"), (-8, -9, "Grand", "Hotel"))]
    sheet = Image.new("RGB", (3 * 408 + 8, 3 * 432 + 500), (255, 255, 255))
    draw, ink = ImageDraw.Draw(sheet), (20, 20, 30)
    for k, city in enumerate(CITIES):
        left, top = 8 + 408 * (k % 3), 26 + 432 * (k // 3)
        draw.text((left, top - 21), city, ink, _font(16))
        scene = Scene(tuple(nodes), tuple(edges), signs, city, "docs")
        sheet.paste(street_views(scene, 0, 0, 8, 400), (left, top))
    draw.text((8, 1301), f"{city}, one view of 901 x 901", ink, _font(16))
    sheet.paste(street_views(scene, 0, 0, 8, 901).crop((0, 0, 448, 448)), (8, 1324))
    for k, (category, icon) in enumerate(ICONS.items()):
        x, y = 540 + 152 * (k % 5), 1362 + 112 * (k // 5)
        _paint(draw, icon, x, y, .36, (ink, (255, 255, 255)))
        draw.text((x, y + 50), category, ink, _font(15), "mm")
    sheet.save(Path(__file__).resolve().parent.parent / "docs" / "cities.png", optimize=True)


if __name__ == "__main__":
    main()
