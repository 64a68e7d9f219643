"""Synthetic routes for V-IRL and their splits; the words for directions.

A route is a walk through a district that streets.py can draw, with landmarks at some intersections
and at the destination. It takes the form of the official file's entries, so that all routes come
in through `official.read_route`.
"""
import hashlib
import itertools
import math
import random
import re
from functools import lru_cache
from typing import NamedTuple

from scenery.official import CLEAR, along, geocode, read_route
from scenery.styles import CATEGORIES, CITIES

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
SIDES = ("front", "right front", "right", "right behind",  # clockwise
         "behind", "left behind", "left", "left front")
PROPER_NAMES = ("Amber Apollo Atlas Aurora Coral Delta Fortuna Iris Juno Luna Lyra Nova Olive "
                "Orion Regal Silva Tivoli Vega Vesta Victoria").split()
TRAINED_ON, *ELSEWHERE = CITIES  # New York, and the eight other cities
OTHER_CITIES = {"mini": tuple(CITIES), "cities": ELSEWHERE}  # for splits not in TRAINED_ON alone
SPLITS = {"train": 1000, "seen": 48, "unseen": 200, "mini": 18, "cities": 200}  # routes in each
NEARBY = 16  # metres: a sign farther away does not count as seen
READABLE = 25  # metres: a sign farther away cannot be read
IN_SIGHT = 150  # metres: a street farther away is not drawn
SIDE = 7  # nodes along each side of a district
NONE_NEARBY = "No landmark nearby"  # what the official generator writes


def stream(*parts):
    """A random stream of its own for each purpose, the same on every machine (never `hash`)."""
    name = "|".join(str(part) for part in ("v1", *parts))
    return random.Random(hashlib.sha256(name.encode()).digest())


# ---------------------------------------------------------------- directions
def octant(degrees):
    """Which of COMPASS (or SIDES) a direction is."""
    return round(degrees % 360 / 45) % 8


def _change(before, after):
    """Signed degrees from one heading to another, in [-180, 180): right is positive."""
    return (after - before + 180) % 360 - 180


def turn_word(before, after):
    """left, right, slightly left or slightly right, from one heading to the other (degrees)."""
    change = _change(before, after)
    side = "left" if change < 0 else "right"
    return f"slightly {side}" if abs(change) <= 45 else side


def _bearing(a, b):
    """Degrees clockwise from north, from a to b; points are (x east, y north) in metres."""
    return math.degrees(math.atan2(b[0] - a[0], b[1] - a[1])) % 360


def _heading(a, b):
    """The bearing in whole degrees."""
    return round(_bearing(a, b)) % 360


def _legible(heading):
    """A leg's heading is at least 5 degrees away from the next compass word."""
    return 5 <= (heading + 22.5) % 45 <= 40


def _unambiguous(before, after):
    """A change of heading that is clearly slight, or clearly not, and clearly to one side."""
    degrees = abs(_change(before, after))
    return 15 <= degrees <= 38 or 52 <= degrees <= 165


# ---------------------------------------------------------------- a district and a walk through it
def _grid_lines(rng):
    """Where the lines of a grid lie whose blocks are 45 to 110 metres wide."""
    steps = [rng.uniform(45, 110) for _ in range(SIDE)]
    return [sum(steps[:i]) for i in range(SIDE)]


def _nodes(rng):
    """[(x, y)] of a turned grid of unequal blocks, each node a little off, line by line."""
    xs, ys = _grid_lines(rng), _grid_lines(rng)
    turn = math.radians(rng.uniform(0, 360))
    sine, cosine = math.sin(turn), math.cos(turn)
    nodes = []
    for x, y in itertools.product(xs, ys):
        x, y = x + rng.uniform(-6, 6), y + rng.uniform(-6, 6)
        nodes.append((x * cosine - y * sine, x * sine + y * cosine))
    return nodes


def _edges(rng):
    """[(i, j)] of nodes: the streets of the grid, and a diagonal in three blocks of ten."""
    nodes = range(SIDE * SIDE)
    edges = [(i, i + 1) for i in nodes if (i + 1) % SIDE]
    edges += [(i, i + SIDE) for i in nodes if i + SIDE in nodes]
    for i in nodes:
        if (i + 1) % SIDE and i + SIDE in nodes and rng.random() < 0.3:
            edges.append(rng.choice([(i, i + SIDE + 1), (i + 1, i + SIDE)]))
    return edges


class District:
    """Streets in one piece: nodes [(x, y)] in metres, neighbours of each in links {i: set}."""

    def __init__(self, rng):
        self.nodes, edges = _nodes(rng), _edges(rng)
        self.links = {i: set() for i in range(len(self.nodes))}
        for a, b in edges:
            self._join(a, b)
        for a, b in rng.sample(edges, round(0.18 * len(edges))):  # these are gone
            self.links[a].discard(b)
            self.links[b].discard(a)
            if not self._connected(a, b):
                self._join(a, b)

    def _join(self, a, b):
        self.links[a].add(b)
        self.links[b].add(a)

    def _connected(self, a, b):
        reached, todo = {a}, [a]
        while todo:
            new = self.links[todo.pop()] - reached
            reached |= new
            todo += new
        return b in reached

    def walk(self, path, heading, legs, rng):
        """A path of nodes, so many legs longer, or None where chance leads nowhere.

        It meets no node twice and turns at every node between its ends, all of them intersections.
        heading: of the path's last leg, None at the start.
        """
        if legs == 0:
            return path
        if heading is not None and len(self.links[path[-1]]) < 3:
            return None
        for node, ahead in self._ways(path, heading, rng):
            longer = self.walk([*path, node], ahead, legs - 1, rng)
            if longer:
                return longer
        return None

    def _ways(self, path, heading, rng):
        """[(next node, heading to it)] in the order in which they are tried."""
        here = path[-1]
        ranks = {node: rng.random() for node in self.links[here] - set(path)}
        ways = []
        for node in sorted(ranks, key=ranks.get):
            ahead = _heading(self.nodes[here], self.nodes[node])
            if _legible(ahead) and (heading is None or _unambiguous(heading, ahead)):
                ways.append((node, ahead))
        if heading is not None and rng.random() < 0.4:  # else slight turns would be rare
            ways.sort(key=lambda way: abs(_change(heading, way[1])) > 45)
        return ways


# ---------------------------------------------------------------- landmarks
class Stop(NamedTuple):
    """A place that a walk may visit, and the heading on arrival."""
    place: tuple
    heading: int


def _stops(points, headings):
    """The Stops: both ends of every leg and where Route.pauses may lie between them."""
    stops = []
    for a, b, heading in zip(points, points[1:], headings):
        stops += [Stop(along(a, b, i / 5), heading) for i in range(6)]
    return stops


def _is_plain(sign, side, point, stops, is_last):
    """Whether a sign belongs to one point of the route alone.

    Anywhere else it is farther away than NEARBY, so that what is reported and what is seen agree.
    The destination's, where it could be read from there, is in another octant than `side`, so that
    the place to stop is plain.
    """
    for place, heading in stops:
        if math.dist(place, point) > CLEAR:
            least = NEARBY
            if is_last and octant(_bearing(place, sign) - heading) == side:
                least = READABLE
            if math.dist(place, sign) <= least:
                return False
    return True


def _sign_place(rng, point, heading, stops, is_last):
    """Where a milestone's landmark stands: (octant, (x, y)), 8 to 14 m from it.

    Returns: None if chance found no such place; for the destination it searches on.
    """
    tries = itertools.count() if is_last else range(40)
    for _ in tries:
        side, away = rng.randrange(8), rng.uniform(8, 14)
        angle = math.radians(heading + 45 * side + rng.uniform(-10, 10))
        sign = point[0] + away * math.sin(angle), point[1] + away * math.cos(angle)
        if _is_plain(sign, side, point, stops, is_last):
            return side, sign
    return None


def _landmarks(rng, points, headings, stops, names):
    """A text (or None) for every milestone and the signs [(x, y, name, category)] of these texts.

    Four intersections in ten have one; the destination, whose sign is the last, always.
    """
    texts, signs = [], []
    for leg, (point, heading) in enumerate(zip(points[1:], headings)):
        is_last = leg == len(headings) - 1
        found = text = None
        if is_last or rng.random() < 0.4:
            found = _sign_place(rng, point, heading, stops, is_last)
        if found:
            side, place = found
            name, category = names.pop()
            signs.append((*place, name, category))
            prefix = "The destination " if is_last else ""
            text = f"{prefix}{name} is on your {SIDES[side]}"
        texts.append(text)
    return texts, signs


def _off_route(rng, nodes, links, stops, names):
    """Signs, eight at most, that no instruction mentions: by streets well away from the route."""
    signs = []
    for _ in range(40):
        a = rng.randrange(len(nodes))
        b = rng.choice(sorted(links[a]))
        x, y = along(nodes[a], nodes[b], rng.uniform(0.2, 0.8))
        place = x + rng.uniform(-8, 8), y + rng.uniform(-8, 8)
        if len(signs) < 8 and all(math.dist(place, stop.place) > 60 for stop in stops):
            signs.append((*place, *names.pop()))
    return signs


# ---------------------------------------------------------------- routes
def _near(nodes, links, stops):
    """The nodes within IN_SIGHT of a walk and their neighbours: streets may leave the picture."""
    near = set()
    for i, node in enumerate(nodes):
        if any(math.dist(node, stop.place) < IN_SIGHT for stop in stops):
            near |= {i} | links[i]
    return sorted(near)


def make_route(split, index, milestones=(2, 8)):
    """Route `index` of a split in the official schema, plus the key `synthetic` for the renderer.

    Landmarks may not be near any other position of the walk: so an intersection's seldom stands
    behind (4 %, right and left behind included), the destination's hardly ever.

    Args:
        split: a key of SPLITS ("seen": routes of "train").
        index: whole number.
        milestones: fewest and most, the destination included.
    Returns: dict of plain lists, numbers and strings. Source: official `route_infos.json`.
    """
    if split == "seen":
        split, index = "train", index * (SPLITS["train"] // SPLITS["seen"])
    cities = OTHER_CITIES.get(split, (TRAINED_ON,))
    city = cities[index % len(cities)]
    key = f"{split}|{city}|{index}|{milestones[0]}-{milestones[1]}"
    graph, chance = stream(key, "graph"), stream(key, "landmarks")

    legs = graph.randint(*milestones)
    path = None
    while not path:
        district = District(graph)
        path = district.walk([graph.randrange(len(district.nodes))], None, legs, graph)
    points = [district.nodes[node] for node in path]
    points[0] = along(points[0], points[1], graph.uniform(0.15, 0.4))  # ends between intersections
    points[-1] = along(points[-2], points[-1], graph.uniform(0.6, 0.8))
    x0, y0 = points[0]  # becomes the origin
    points = [(x - x0, y - y0) for x, y in points]
    nodes = [(round(x - x0, 2), round(y - y0, 2)) for x, y in district.nodes]
    headings = [_heading(a, b) for a, b in zip(points, points[1:])]
    stops = _stops(points, headings)

    categories = chance.sample(CATEGORIES, len(CATEGORIES))
    words = chance.sample(PROPER_NAMES, len(PROPER_NAMES))
    names = [(f"{category} {word}", category) for word, category in zip(words, categories)]
    texts, signs = _landmarks(chance, points, headings, stops, names)
    destination = signs[-1]
    signs += _off_route(chance, nodes, district.links, stops, names)

    near = _near(nodes, district.links, stops)
    edges = []
    for i, a in enumerate(near):
        edges += [(i, j) for j, b in enumerate(near) if i < j and b in district.links[a]]
    synthetic = {
        "key": key,
        "city": city,
        "nodes": [nodes[node] for node in near],
        "edges": edges,
        "signs": [(round(x, 2), round(y, 2), *named) for x, y, *named in signs]}
    return _official(points, headings, texts, destination, stream(key, "place"), synthetic)


BLOCK = """\
{{
  "intersection_idx": {index},
  "landmarks": "{landmark}",
  "distance": "{metres} meters",
  "human_heading": "{word}",
  "to_next_intersection_heading": "{heading} ({word})",
}},
"""


def _official(points, headings, texts, destination, rng, synthetic):
    """The official file's entry for a route in metres, somewhere on Earth."""
    start = rng.uniform(-50, 55), rng.uniform(-179, 179)

    def rounded(place):
        return [round(v, 7) for v in geocode(start, place)]

    distances = [round(math.dist(a, b)) for a, b in zip(points, points[1:])]
    info = ""
    names = []
    for index, heading in enumerate(headings):
        text = texts[index]
        info += BLOCK.format(index=index, landmark=text or NONE_NEARBY, metres=distances[index],
                             heading=heading, word=COMPASS[octant(heading)])
        name = re.sub("^The destination | is on your .*", "", text) if text else None
        names.append(name)
    return {
        "start_place": {"relocated_geocode": rounded(points[0])},
        "dest_place": {"name": name, "geocode": rounded(destination[:2])},
        "init_heading": 0,
        "milestone_info": info,
        "route_results": {"geocode_list": [rounded(point) for point in points[1:]],
                          "landmark_list": names,
                          "distance_list": distances},
        "synthetic": synthetic}


@lru_cache(maxsize=None)
def split_route(split, index, milestones):
    """Route `index` of a split, made once."""
    return read_route(make_route(split, index, milestones), "")
