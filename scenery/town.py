"""What is where in a little city: roads, boards, lots, trees and the markings on the ground.

Metres, x east, y north. Nothing here depends on the city but the colours and markings.
"""
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, cos, dist, floor, hypot, inf, radians, sin, sqrt
from random import Random
from typing import NamedTuple

from scenery.styles import CITIES, mix

ROAD, KERB, WALL = 5.0, 5.3, 8.5  # metres from a road's centre line to where these begin
DEPTH = 12.0  # metres: of a building
CLEAR = 16.0  # metres: on a road nearer than this nothing may stand before a board
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Sign:
    """The board of a landmark."""
    x: float  # metres
    y: float
    name: str  # such as "Golden Bakery"
    category: str  # of CATEGORIES


@dataclass(frozen=True, eq=False)
class Scene:
    """What is drawn. Compared by identity: caches keep what they work out per object."""
    nodes: tuple  # (x, y), metres
    edges: tuple  # (i, j) of nodes: straight roads
    signs: tuple  # of Sign
    city: str  # of CITIES; decides how things look, not where they are
    seed: str  # of what is random: lots and trees


class Outline:
    """A polygon, and a disc that covers it."""

    def __init__(self, points):
        self.points = points
        xs, ys = zip(*points)
        self.centre = (sum(xs) / len(xs), sum(ys) / len(ys))
        self.radius = max([dist(point, self.centre) for point in points])

    def away(self, x, y):
        """Metres from a place to the centre."""
        return hypot(self.centre[0] - x, self.centre[1] - y)


class Road:
    """A road in coordinates of its own: t metres along it, s metres to its left."""

    def __init__(self, scene, edge):
        self.start, self.end = edge
        self.a, b = scene.nodes[self.start], scene.nodes[self.end]
        dx, dy = b[0] - self.a[0], b[1] - self.a[1]
        self.length = hypot(dx, dy)
        self.u = (dx / self.length, dy / self.length)  # unit vector along it

    def at(self, t, s):
        """(x, y) of a place on the road."""
        return self.a[0] + t * self.u[0] - s * self.u[1], self.a[1] + t * self.u[1] + s * self.u[0]

    def frame(self, point):
        """(t, s) of a point."""
        x, y = point[0] - self.a[0], point[1] - self.a[1]
        return x * self.u[0] + y * self.u[1], y * self.u[0] - x * self.u[1]

    def strip(self, t0, t1, s0, s1):
        """The corners of a rectangle along the road."""
        return self.at(t0, s0), self.at(t1, s0), self.at(t1, s1), self.at(t0, s1)

    def from_node(self, node, metres):
        """t of what is so many metres from the end at a node."""
        return metres if node == self.start else self.length - metres

    def leaving(self, node):
        """Unit vector along the road, away from the end at a node."""
        return self.u if node == self.start else (-self.u[0], -self.u[1])

    def _comes_near(self, low, high, block):
        """Whether the disc of a block touches the band low <= s <= high beside the road."""
        t, s = self.frame(block.centre)
        reach = block.radius + 1e-6  # of what only just touches, rounding decides nothing
        return low - reach <= s <= high + reach and -reach <= t <= self.length + reach

    def _taken(self, low, high, block):
        """(from, to) in t where a block touches the band low <= s <= high, or None."""
        corners = [self.frame(point) for point in block.points]
        ts = [t for t, s in corners if low <= s <= high]
        for edge in (low, high):  # the hull's edges, which cross it, are among pairs of its points
            below = [corner for corner in corners if corner[1] < edge]
            above = [corner for corner in corners if corner[1] >= edge]
            for t, s in below:
                ts += [t + (t1 - t) * (edge - s) / (s1 - s) for t1, s1 in above]
        return (min(ts), max(ts)) if ts else None

    def free(self, side, near, far, blocks):
        """[(from, to)] in t where no block touches the band from `near` to `far` metres on the
        road's left (side 1) or right (-1). A block is the convex hull of an Outline's points."""
        low, high = sorted((side * near, side * far))
        close = [block for block in blocks if self._comes_near(low, high, block)]
        stretches = [self._taken(low, high, block) for block in close]
        taken = [stretch for stretch in stretches if stretch]
        start, clear = 0, []
        for a, b in sorted([*taken, (self.length, inf)]):
            if a > start:
                clear.append((start, a))
            start = max(start, b)
        return clear


# ---------------------------------------------------------------- lots and trees
class Lot(NamedTuple):
    """Where a building stands."""
    outline: Outline  # four corners, anticlockwise, the first two on the street
    tall: float  # 0 to 1
    colour: float  # 0 to 1, along the city's walls


class Tree(NamedTuple):
    """Where a tree may stand."""
    place: tuple
    rank: float  # 0 to 1: planted if it is below the city's share
    size: float  # 0 to 1


def _sight_lines(sign, roads):
    """Blocks between a sign and the stretches of road within CLEAR, from which it must be seen."""
    around = [(sign.x + dx, sign.y + dy) for dx in (-3.2, 3.2) for dy in (-3.2, 3.2)]
    for road in roads:
        t, s = road.frame((sign.x, sign.y))
        if abs(s) < CLEAR and -CLEAR < t < road.length + CLEAR:
            reach = sqrt(CLEAR ** 2 - s * s)
            first = road.at(min(max(t - reach, 0), road.length), 0)
            last = road.at(min(max(t + reach, 0), road.length), 0)
            yield Outline((*around, first, last))


def _cuts(start, end, draw):
    """Where a stretch is cut into lots of some 13 metres; one cut alone if it is too short."""
    count = round((end - start) / 13)
    if end - start > 5:
        count = max(count, 1)
    cuts = [start]
    draw.random()  # unused: without it the lots of every scene would change
    for k in range(1, count + 1):
        shift = draw.uniform(-0.3, 0.3)
        at = k + shift if k < count else k
        cuts.append(start + (end - start) * at / count)
    return cuts


def _lots(road, side, start, end, draw):
    """The lots of one stretch of a road, on its left (side 1) or right (-1)."""
    cuts = _cuts(start, end, draw)
    for near, far in zip(cuts, cuts[1:]):
        if side == -1:
            near, far = far, near  # the corners run anticlockwise
        corners = road.strip(near, far, side * WALL, side * (WALL + DEPTH))
        yield Lot(Outline(corners), draw.random(), draw.random())


@lru_cache(maxsize=256)  # as many walks side by side
def plan(scene):
    """(Lots, Trees) of a scene, the same in every city.

    None stands on a road or, seen from a road within CLEAR of a landmark, in front of it.
    """
    roads = [Road(scene, edge) for edge in scene.edges]
    blocks = []
    for road in roads:
        blocks.append(Outline(road.strip(-4, road.length + 4, -WALL - 0.2, WALL + 0.2)))
    for sign in scene.signs:
        blocks += _sight_lines(sign, roads)
    lots, trees = [], []
    for index, road in enumerate(roads):
        draw, own = Random(f"{scene.seed}|road {index}"), blocks[index]
        x, y = road.at(road.length / 2, 0)
        reach = road.length / 2 + WALL + DEPTH
        close = [b for b in blocks if b is not own and b.away(x, y) < reach + b.radius]
        for side in (1, -1):
            for start, end in road.free(side, WALL, WALL + DEPTH, close):
                lots += _lots(road, side, start, end, draw)
                built = road.strip(start, end, side * WALL, side * (WALL + DEPTH))
                blocks.append(Outline(built))
            for start, end in road.free(side, ROAD, WALL, close):
                for t in range(ceil(start) + 3, floor(end) - 2, 9):
                    trees.append(Tree(road.at(t, side * 6.6), draw.random(), draw.random()))
    return lots, trees


# ---------------------------------------------------------------- what lies on the ground
class Patch(Outline):
    """A polygon on the ground."""

    def __init__(self, colour, points):
        super().__init__(points)
        self.colour = colour


def _crossing_start(road, node, roads):
    """Metres from an intersection to a road's crossing; None where less than three roads meet."""
    ux, uy = road.leaving(node)
    cosines = []  # of the angles to the other roads
    for other in roads:
        if other is not road and node in (other.start, other.end):
            vx, vy = other.leaving(node)
            cosines.append(ux * vx + uy * vy)
    if len(cosines) < 2:
        return None
    sharpest = max(cosines)
    # where the edge of the roadway leaves that of the nearest other road
    meet = ROAD * sqrt(max(0, 1 + sharpest) / max(1 - sharpest, 0.01))
    return min(max(meet + 1.5, 7), 18, road.length / 2 - 5)


def _crossing(road, node, start, style):
    """The Patches of a crossing that begins `start` metres from an intersection."""
    pitch, lean = 9.4 / style.bars, style.slant / 2
    near, far = road.from_node(node, start), road.from_node(node, start + 3.5)
    for k in range(style.bars):
        right = -4.7 + pitch * (k + 0.2)
        left = right + 0.6 * pitch
        yield Patch(style.colour, (
            road.at(near, right - lean), road.at(near, left - lean),
            road.at(far, left + lean), road.at(far, right + lean)))
    if style.framed:
        for edge in (start - 0.5, start + 3.5):
            t0, t1 = road.from_node(node, edge), road.from_node(node, edge + 0.5)
            yield Patch(style.colour, road.strip(t0, t1, -4.7, 4.7))


def _markings(road, roads, city):
    """The Patches of a road's crossings and of the line on its middle."""
    ends = []
    for node in (road.start, road.end):
        start = _crossing_start(road, node, roads)
        if start is None:
            ends.append(-4)
        else:
            ends.append(start)
            yield from _crossing(road, node, start, city.crossing)
    t, end = ends[0] + 4.5, road.length - ends[1] - 4.5
    while t < end:
        dash = road.strip(t, min(t + city.line.dash, end), -0.14, 0.14)
        yield Patch(city.line.colour, dash)
        t += city.line.dash + city.line.gap


@lru_cache(maxsize=256)  # as many walks side by side
def ground(scene):
    """The Patches of a scene in the order of painting: pavements, kerbs, roadways, markings."""
    city = CITIES[scene.city]
    roads = [Road(scene, edge) for edge in scene.edges]
    patches = []
    angles = [radians(a) for a in range(0, 360, 30)]  # intersections are polygons of twelve
    kerb = mix(city.ground.pavement, WHITE, 0.3)
    widths = ((WALL, city.ground.pavement), (KERB, kerb), (ROAD, city.ground.roadway))
    for half, colour in widths:
        for road in roads:
            patches.append(Patch(colour, road.strip(0, road.length, -half, half)))
        for x, y in scene.nodes:
            corners = [(x + half * cos(a), y + half * sin(a)) for a in angles]
            patches.append(Patch(colour, corners))
    for road in roads:
        patches += _markings(road, roads, city)
    return patches
