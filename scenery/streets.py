"""Synthetic street views for V-IRL: what a camera on a road of a little city sees all around.

A pinhole camera over flat ground, boxes for buildings, one upright board per landmark: polygons
that PIL draws from far to near, at twice the size; scaling down once smooths the edges. Where
things are is town.py's, how they look styles.py's. No picture or font file is loaded.

World: metres, x east, y north; headings in degrees clockwise from north. In a view (after `local`)
x points right and z into the picture.
"""
from functools import lru_cache
from math import atan2, ceil, cos, degrees, exp, floor, hypot, radians, sin, tan
from operator import itemgetter
from typing import Callable, NamedTuple

from PIL import Image, ImageDraw

from scenery.styles import CITIES, TREES, board, mix, paint_glyph
from scenery.town import CLEAR, WHITE, Sign, ground, plan

SPREAD = tan(radians(55))  # views are 110 degrees wide: a board on a diagonal is whole in both
LEVEL = 0.58  # of a view's height is above the horizon: the road at one's feet tells nothing
EYE = 2.2  # metres: height of the camera
NEAR, FAR = 0.5, 150.0  # metres: what is nearer or farther is not drawn
BOARD, LIFT = 5.6, 2.5  # metres: width of a board, height of its lower edge
NAMES_FROM = 200  # pixels: in smaller views names would be a blur; the icon takes their place
MIN_SIZE = 64  # pixels
WOOD, STEEL = (92, 74, 58), (70, 74, 80)


# ---------------------------------------------------------------- what a camera sees
def _height(lot, floors):
    """Metres, to the eaves."""
    more = int(lot.tall ** 1.5 * (floors.most - floors.fewest + 1))
    return floors.height * (floors.fewest + more)


@lru_cache(maxsize=8192)
def _tint(colour, light, distance, horizon, haze):
    """A colour in some light (1: full), the farther the more like the horizon's."""
    lit = [v * light for v in colour]
    return mix(lit, horizon, 1 - exp(-distance / haze))


@lru_cache(maxsize=32)
def _backdrop(city, size):
    """The sky above bare ground, and the mask of the haze that lies on the ground, row by row."""
    city, level = CITIES[city], round(LEVEL * size)
    image = Image.new("RGB", (size, size), city.ground.yard)
    for y in range(level):
        colour = mix(city.sky.overhead, city.sky.horizon, (y / level) ** 1.3)
        image.paste(colour, (0, y, size, y + 1))
    haze = Image.new("L", (size, size - level))
    for y in range(size - level):
        distance = size / 2 / SPREAD * EYE / (y + 0.5)
        share = 1 - exp(-min(distance, 2 * FAR) / city.haze)
        haze.paste(round(255 * share), (0, y, size, y + 1))
    return image, haze


class _Wall:
    """One side of a building in a view, from a to b: left and right as seen from outside.

    Its part from `low` to `high`, shares of its length, is in view; nothing of it from inside.
    """

    def __init__(self, view, a, b):
        self.view, self.length = view, hypot(b[0] - a[0], b[1] - a[1])
        self.light = 0.8 + 0.2 * cos(atan2(b[1] - a[1], a[0] - b[0]) - radians(view.city.sun))
        self.a, self.b = (xa, za), (xb, zb) = view.local(a), view.local(b)
        self.low, self.high = 0.0, float(xa * zb < xb * za)
        self._clip(za - NEAR, zb - NEAR)
        self._clip(SPREAD * za + xa, SPREAD * zb + xb)
        self._clip(SPREAD * za - xa, SPREAD * zb - xb)

    def _clip(self, p, q):
        """Leave out what is beyond a bound, given by how much a and b are inside it."""
        if p < 0:
            self.low = max(self.low, p / (p - q) if q > 0 else 1)
        elif q < 0:
            self.high = min(self.high, p / (p - q))

    def at(self, share):
        """(x, z) of what lies this share of the way from a to b."""
        (xa, za), (xb, zb) = self.a, self.b
        return xa + (xb - xa) * share, za + (zb - za) * share

    def panel(self, left, right, bottom, top, colour):
        """A rectangle on the wall, between shares of its length and heights in metres."""
        left, right = max(left, self.low), min(right, self.high)
        if left < right:
            pixel, (x, z), (x1, z1) = self.view.pixel, self.at(left), self.at(right)
            corners = [pixel(x, z, bottom), pixel(x, z, top),
                       pixel(x1, z1, top), pixel(x1, z1, bottom)]
            self.view.draw.polygon(corners, colour)


class _View:
    """Draws what a camera sees on an image of twice the view's size."""

    def __init__(self, image, scene, x, y, heading):
        self.image, self.draw = image, ImageDraw.Draw(image)
        self.scene, self.city = scene, CITIES[scene.city]
        self.x, self.y = x, y
        self.cos, self.sin = cos(radians(heading)), sin(radians(heading))
        self.half = image.width / 2
        self.level = round(LEVEL * image.width)  # row of the horizon
        self.f = self.half / SPREAD  # pixels for x / z = 1

    def local(self, point):
        """(x, z) of a point of the world."""
        dx, dy = point[0] - self.x, point[1] - self.y
        return dx * self.cos - dy * self.sin, dx * self.sin + dy * self.cos

    def pixel(self, x, z, height=0):
        """Where the image shows what is `height` metres above the ground."""
        return self.half + self.f * x / z, self.level + self.f * (EYE - height) / z

    def sees(self, centre, radius):
        """Whether something of a disc may be in view."""
        x, z = self.local(centre)
        return z > -radius and abs(x) < SPREAD * z + 1.75 * radius  # 1.75 = 1 / cos 55

    def tint(self, colour, distance, light=1.0):
        """A colour as it looks from afar; in steps of 5 m and 0.1, for the cache's sake."""
        distance, light = 5 * round(distance / 5), round(light, 1)
        return _tint(colour, light, distance, self.city.sky.horizon, self.city.haze)

    def patch(self, patch):
        """A polygon on the ground, cut off at NEAR, if it is near and large enough to be seen."""
        away = patch.away(self.x, self.y) - patch.radius
        is_seen = away < FAR and away * 3 < self.f * patch.radius  # 3 pixels or more
        if not (is_seen and self.sees(patch.centre, patch.radius)):
            return
        points = [self.local(point) for point in patch.points]
        shown = []
        for (x, z), (x1, z1) in zip(points, points[1:] + points[:1]):
            if z >= NEAR:
                shown.append(self.pixel(x, z))
            if (z < NEAR) != (z1 < NEAR):
                shown.append(self.pixel(x + (x1 - x) * (NEAR - z) / (z1 - z), NEAR))
        if shown:
            self.draw.polygon(shown, patch.colour)

    def lot(self, distance, lot):
        """A building. Its roof comes first: the walls hide what is not seen of it from below."""
        corners, height = lot.outline.points, _height(lot, self.city.floors)
        colour = self.city.walls[int(lot.colour * len(self.city.walls))]
        if self.city.roof.height:
            self._roof(distance, corners, height)
        for a, b in zip(corners, corners[1:] + corners[:1]):
            wall = _Wall(self, a, b)
            if wall.low < wall.high:
                self._front(distance, wall, height, colour)

    def _roof(self, distance, corners, eaves):
        """Four slopes below a ridge from side to side; nothing if the camera is too close."""
        a, b, c, d = [self.local(corner) for corner in corners]
        if min(a[1], b[1], c[1], d[1]) <= 1:
            return
        ridge = eaves + self.city.roof.height
        left = self.pixel((a[0] + d[0]) / 2, (a[1] + d[1]) / 2, ridge)
        right = self.pixel((b[0] + c[0]) / 2, (b[1] + c[1]) / 2, ridge)
        a, b, c, d = [self.pixel(x, z, eaves) for x, z in (a, b, c, d)]
        lit = self.tint(self.city.roof.colour, distance)
        shaded = self.tint(self.city.roof.colour, distance, 0.8)
        self.draw.polygon((a, left, right, b), lit)
        self.draw.polygon((d, left, right, c), lit)
        self.draw.polygon((a, left, d), shaded)
        self.draw.polygon((b, right, c), shaded)

    def _front(self, distance, wall, height, colour):
        """A wall with shop windows, a band of windows per storey and the piers between them."""
        windows, storey = self.city.windows, self.city.floors.height
        paint = self.tint(colour, distance, wall.light)
        glass = self.tint(windows.colour, distance, wall.light)
        wall.panel(0, 1, 0, height, paint)
        (left, z), (right, z1) = wall.at(wall.low), wall.at(wall.high)
        if self.f * storey / min(z, z1) < 5:
            return
        columns = max(1, round(wall.length / windows.pitch))
        in_view = self.f * (right / z1 - left / z)
        width = in_view / columns / (wall.high - wall.low)  # pixels of a column, on the average
        fine = width > 4
        if not fine:  # piers are not drawn but mixed into the glass
            glass = mix(glass, paint, windows.pier)
        wall.panel(0, 1, 0.4, storey * 0.85, self.tint(self.city.shops, distance, wall.light))
        for k in range(1, round(height / storey)):
            bottom = storey * (k + 0.5 - windows.share / 2)
            top = storey * (k + 0.5 + windows.share / 2)
            wall.panel(0, 1, bottom, top, glass)
        if fine:
            half = windows.pier / 2
            for k in range(columns + 1):
                wall.panel((k - half) / columns, (k + half) / columns, 0, height, paint)
        wall.panel(0, 1, height - 0.5, height, mix(paint, WHITE, 0.3))

    def tree(self, distance, tree):
        """A tree, unless the camera is under it."""
        style, (x, z) = self.city.trees, self.local(tree.place)
        if z > 1.5:
            sunlit = mix(style.leaf, (255, 255, 220), 0.2)
            unit = (0.09 + 0.04 * tree.size) * self.f / z
            paint_glyph(self.draw, TREES[style.kind], *self.pixel(x, z), unit,
                        leaf=self.tint(style.leaf, distance), sunlit=self.tint(sunlit, distance),
                        wood=self.tint(WOOD, distance))

    def sign(self, distance, sign):
        """A board facing the camera. Its size goes with the distance, not with z as all else does:
        near the edges of so wide a view it would be stretched, and on the diagonal cut off."""
        x, z = self.local((sign.x, sign.y))
        if z < NEAR:
            return
        unit = self.f / max(distance, 3)  # pixels to a metre
        name = sign.name if self.half >= NAMES_FROM else ""
        image = board(self.scene.city, name, sign.category, max(2, round(BOARD * unit)))
        u, foot = self.pixel(x, z)
        left = round(u - image.width / 2)
        top = round(self.pixel(x, z, LIFT)[1]) - image.height
        steel, thick = self.tint(STEEL, distance), max(1, round(0.28 * unit))
        beam = top - 0.4 * unit
        for metres in self.city.board.posts:
            post = u + metres * unit
            line = [(u, top + unit), (u, beam), (post, beam), (post, foot)]
            self.draw.line(line, steel, thick)
        self.image.paste(image, (left, top), image)


# ---------------------------------------------------------------- what stands around a camera
class Thing(NamedTuple):
    """Something that stands around a camera."""
    distance: float  # metres; decides the order
    paint: Callable  # method of _View
    subject: object  # Lot, Tree or Sign
    centre: tuple  # of a disc that covers it
    radius: float


def _lots_in_sight(scene, x, y):
    """Things for the lots around a camera.

    A lot is left out when nearer ones rise above it in all the directions that it fills, of 180
    all around.
    """
    city = CITIES[scene.city]
    around = []  # (distance, Lot, its corners as seen from the camera, their distances)
    for lot in plan(scene)[0]:
        if lot.outline.away(x, y) < FAR:
            corners = [(px - x, py - y) for px, py in lot.outline.points]
            (ax, ay), (bx, by) = corners[:2]
            front = hypot((ax + bx) / 2, (ay + by) / 2)
            away = [hypot(px, py) for px, py in corners]
            around.append((min(*away, front), lot, corners, away))
    tops = [0.0] * 180  # per direction, how far the lots rise: tangent above the horizon
    for distance, lot, corners, away in sorted(around, key=itemgetter(0)):
        height, outline = _height(lot, city.floors), lot.outline
        mx, my = outline.centre[0] - x, outline.centre[1] - y
        turns = [atan2(mx * py - my * px, mx * px + my * py) for px, py in corners]
        first = degrees(atan2(my, mx) + min(turns)) / 2
        last = degrees(atan2(my, mx) + max(turns)) / 2
        top = (height + city.roof.height - EYE) / max(distance - 3, 1)
        if any(tops[k % 180] < top for k in range(floor(first), ceil(last))):
            (ax, ay), (bx, by) = corners[:2]
            front_seen = ax * by < ay * bx
            # a front in sight counts from its far end: trees along it come later
            order = max(away[:2]) if front_seen else min(away[:2])
            yield Thing(order, _View.lot, lot, outline.centre, outline.radius)
        for k in range(ceil(first), floor(last)):
            tops[k % 180] = max(tops[k % 180], (height - EYE) / max(away))


def _paint_order(thing):
    """From far to near; nothing stands before a sign within CLEAR, so such a one comes last."""
    return isinstance(thing.subject, Sign) and thing.distance < CLEAR, -thing.distance


@lru_cache(maxsize=64)
def _things(scene, x, y):
    """The Things around a camera, in the order of painting."""
    things = list(_lots_in_sight(scene, x, y))
    for tree in plan(scene)[1]:
        distance = hypot(tree.place[0] - x, tree.place[1] - y)
        if distance < 90 and tree.rank < CITIES[scene.city].trees.planted:
            things.append(Thing(distance, _View.tree, tree, tree.place, 3))
    for sign in scene.signs:
        distance = hypot(sign.x - x, sign.y - y)
        if distance < FAR:
            things.append(Thing(distance, _View.sign, sign, (sign.x, sign.y), 4))
    return sorted(things, key=_paint_order)


# ---------------------------------------------------------------- the picture of four views
def view_size(size):
    """Pixels of one view in a picture of `size`: at 901, 448 and a line of 5 between two."""
    return (size - max(1, round(size / 180))) // 2


def grid(views, size):
    """[front, right; back, left], from the four views clockwise, parted by black lines.

    The order is the prompt's: the pictures of the official data are in another one.
    """
    picture = Image.new("RGB", (size, size))
    second = size - views[0].width
    for view, place in zip(views, ((0, 0), (second, 0), (0, second), (second, second))):
        picture.paste(view, place)
    return picture


def street_views(scene, x, y, heading, size):
    """What is seen from a place on a road: [front, right; back, left], parted by black lines.

    Args:
        scene: a Scene.
        x, y: metres.
        heading: of the front view, degrees clockwise from north; right is 90 more, and so on.
        size: pixels, MIN_SIZE or more: at 901 a view is 448 wide and the lines 5.
    Returns: RGB image (size, size); the same arguments give the same pixels, in every process.
    Raises: ValueError for an unknown city or a size too small.
    """
    if scene.city not in CITIES:
        raise ValueError(f"city: {scene.city!r} is not one of {', '.join(CITIES)}")
    if size < MIN_SIZE:
        raise ValueError(f"size: {size} is under {MIN_SIZE} pixels")
    tile = view_size(size)
    backdrop, haze = _backdrop(scene.city, 2 * tile)
    views = []
    for turn in (0, 90, 180, 270):
        view = _View(backdrop.copy(), scene, x, y, (heading + turn) % 360)
        for patch in ground(scene):
            view.patch(patch)
        view.image.paste(view.city.sky.horizon, (0, view.level), haze)
        for thing in _things(scene, x, y):
            if view.sees(thing.centre, thing.radius):
                thing.paint(view, thing.distance, thing.subject)
        views.append(view.image.reduce(2))
    return grid(views, size)
