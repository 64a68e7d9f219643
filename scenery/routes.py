"""Routes for V-IRL: generated, or read from the official file and checked; and the real panoramas along them.

A route is a chain of milestones, the destination last, with a heading to each and a landmark at some. A generated one
is a walk through a district that streets.py can draw; it takes the form of the official file's entries too, so that
all routes come in through `read_route`. What is damaged is refused at loading. No torch in this file.
"""
import csv
import hashlib
import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from scenery import streets

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
SIDES = ("front", "right front", "right", "right behind", "behind", "left behind", "left", "left front")  # clockwise
ADJECTIVES = ("Amber", "Blue", "Coral", "Crystal", "Golden", "Grand", "Happy", "Little", "Lucky", "Modern", "Olive",
              "Quiet", "Rapid", "Royal", "Silver", "Sunny", "Urban", "Velvet", "Violet", "Young")
TRAINED_ON, *ELSEWHERE = streets.CITIES  # New York, and the eight other cities
SPLITS = {"train": 1000, "seen": 48, "unseen": 200, "mini": 18, "cities": 200}  # routes in each
METRES = 111_320  # per degree of latitude
NEAREST = 20  # metres within which a real panorama stands for a place
NEARBY, READABLE, IN_SIGHT = 16, 25, 150  # metres: farther away a sign is none of one's business; cannot be read; and a
# street is not drawn


def need(ok, message):
    if not ok:
        raise ValueError(message)


def stream(*parts):
    """A random stream of its own for each purpose, the same on every machine (never `hash`)."""
    return random.Random(hashlib.sha256("|".join(map(str, ("v1", *parts))).encode()).digest())


def octant(degrees):
    return round(degrees % 360 / 45) % 8


def turn_word(before, after):
    """left, right, slightly left or slightly right, from one heading to the other (degrees), modulo 360."""
    delta = (after - before + 180) % 360 - 180
    return ("slightly " if abs(delta) <= 45 else "") + ("left" if delta < 0 else "right")


def _bearing(a, b):
    """Degrees clockwise from north, from a to b; points are (x east, y north) in metres."""
    return math.degrees(math.atan2(b[0] - a[0], b[1] - a[1])) % 360


def _along(a, b, share):
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])


def _geocode(start, place):
    """[latitude, longitude] of a place (x, y) metres from a start."""
    return [start[0] + place[1] / METRES, start[1] + place[0] / METRES / math.cos(math.radians(start[0]))]


# ---------------------------------------------------------------- generating: a district, a walk through it, its signs
def _district(rng):
    """Nodes [(x, y)], neighbours {i: set} of a 7x7 grid: unequal blocks, jitter, diagonals, 18 % of streets gone."""
    side = 7
    xs, ys = ([sum(steps[:i]) for i in range(side)] for steps in
              ([rng.uniform(45, 110) for _ in range(side)] for _ in range(2)))
    turn = math.radians(rng.uniform(0, 360))
    nodes = []
    for x in xs:
        for y in ys:
            x1, y1 = x + rng.uniform(-6, 6), y + rng.uniform(-6, 6)
            nodes.append((x1 * math.cos(turn) - y1 * math.sin(turn), x1 * math.sin(turn) + y1 * math.cos(turn)))
    links = {i: set() for i in range(side * side)}
    edges = [(i, i + 1) for i in links if (i + 1) % side] + [(i, i + side) for i in links if i + side < side * side]
    for i in links:
        if (i + 1) % side and i + side < side * side and rng.random() < 0.3:
            edges.append(rng.choice([(i, i + side + 1), (i + 1, i + side)]))
    for a, b in edges:
        links[a].add(b)
        links[b].add(a)
    for a, b in rng.sample(edges, round(0.18 * len(edges))):
        links[a].discard(b)
        links[b].discard(a)
        if not _connected(links, a, b):
            links[a].add(b)
            links[b].add(a)
    return nodes, links


def _connected(links, a, b):
    reached, todo = {a}, [a]
    while todo:
        new = links[todo.pop()] - reached
        reached |= new
        todo += new
    return b in reached


def _legible(heading):
    """A leg's whole-degree heading is at least 5 degrees away from the next compass word."""
    return 5 <= (heading + 22.5) % 45 <= 40


def _unambiguous(before, after):
    """A change of heading that is clearly slight, or clearly not, and clearly to one side."""
    delta = abs((after - before + 180) % 360 - 180)
    return 15 <= delta <= 38 or 52 <= delta <= 165


def _walk(nodes, links, legs, rng):
    """A self-avoiding walk over legs + 1 nodes that turns at every node between, all of them intersections; or None."""

    def extend(path, heading):
        """The path, made longer leg by leg to its full length, or None where it leads nowhere."""
        if len(path) == legs + 1:
            return path
        if len(path) > 1 and len(links[path[-1]]) < 3:
            return None
        ways = sorted(links[path[-1]] - set(path), key=lambda n: rng.random())
        headings = {n: round(_bearing(nodes[path[-1]], nodes[n])) % 360 for n in ways}
        if len(path) > 1:
            ways = [n for n in ways if _unambiguous(heading, headings[n])]
            if rng.random() < 0.4:  # straight streets alone would rarely give a slight turn
                ways.sort(key=lambda n: "slightly" not in turn_word(heading, headings[n]))
        for n in ways:
            found = extend([*path, n], headings[n]) if _legible(headings[n]) else None
            if found:
                return found
        return None

    return extend([rng.randrange(len(nodes))], None)


def _between(points, headings):
    """[(place, heading)] of all that a walk may visit before the destination, intersections as one arrives at them."""
    places = []
    for a, b, heading in zip(points, points[1:], headings):
        places += [(_along(a, b, i / 5), heading) for i in range(6)]
    return places[:-1] + [(_along(b, a, 12 / math.dist(a, b)), heading)]  # the last chance before the destination


def _sign_place(rng, point, heading, between, last):
    """Where a landmark stands that belongs to a milestone: (octant, (x, y)), 8-14 m from it, near the octant's middle.

    Anywhere else on the route it is farther away than NEARBY, so that what is reported and what is seen agree; the
    destination's sign, where it could be read from there, is in another octant, so that the place to stop is plain.
    Returns: None if chance found no such place; it searches on for the destination's.
    """
    for _ in itertools.count() if last else range(40):
        side, away = rng.randrange(8), rng.uniform(8, 14)
        angle = math.radians(heading + 45 * side + rng.uniform(-10, 10))
        sign = point[0] + away * math.sin(angle), point[1] + away * math.cos(angle)
        if all(math.dist(place, sign) > (READABLE if last and octant(_bearing(place, sign) - ahead) == side else NEARBY)
               for place, ahead in between if math.dist(place, point) > 8):
            return side, sign
    return None


def _off_route(rng, nodes, links, between, names):
    """Signs that no instruction mentions, beside streets well away from the route."""
    signs = []
    for _ in range(40):
        a = rng.randrange(len(nodes))
        b = rng.choice(sorted(links[a]))
        x, y = _along(nodes[a], nodes[b], rng.uniform(0.2, 0.8))
        place = (x + rng.uniform(-8, 8), y + rng.uniform(-8, 8))
        if len(signs) < 8 and all(math.dist(place, p) > 60 for p, _ in between):
            signs.append((*place, *names.pop()))
    return signs


def make_route(split, index, milestones=(2, 8)):
    """Route `index` of a split, in the official schema plus the key `synthetic` (what the renderer needs).

    Landmarks may not be near any other position of the walk, one just passed included: so an intersection's seldom
    stands behind (4 % do, right and left behind included), the destination's hardly ever.

    Args: split, a key of SPLITS ("seen": routes of "train"); milestones, fewest and most, the destination included.
    Returns: dict of plain lists, numbers and strings. Source: official `route_infos.json`.
    """
    if split == "seen":
        split, index = "train", index * (SPLITS["train"] // SPLITS["seen"])
    city = {"mini": list(streets.CITIES)[index % 9], "cities": ELSEWHERE[index % 8]}.get(split, TRAINED_ON)
    key = f"{split}|{city}|{index}|{milestones[0]}-{milestones[1]}"
    graph, landmarks = stream(key, "graph"), stream(key, "landmarks")
    legs, path = graph.randint(*milestones), None
    while not path:
        nodes, links = _district(graph)
        path = _walk(nodes, links, legs, graph)
    points = [nodes[n] for n in path]
    points[0] = _along(points[0], points[1], graph.uniform(0.15, 0.4))  # both ends lie between intersections
    points[-1] = _along(points[-2], points[-1], graph.uniform(0.6, 0.8))
    x0, y0 = points[0]
    points = [(x - x0, y - y0) for x, y in points]
    nodes = [(round(x - x0, 2), round(y - y0, 2)) for x, y in nodes]
    headings = [round(_bearing(a, b)) % 360 for a, b in zip(points, points[1:])]
    between = _between(points, headings)
    near = {i for i, node in enumerate(nodes) if any(math.dist(node, place) < IN_SIGHT for place, _ in between)}
    near = sorted(near.union(*(links[i] for i in near)))  # streets that leave the picture too
    kinds = landmarks.sample(streets.CATEGORIES, len(streets.CATEGORIES))
    names = [(f"{word} {kind}", kind) for word, kind in zip(landmarks.sample(ADJECTIVES, len(ADJECTIVES)), kinds)]
    signs, texts = [], []
    for leg, (point, heading) in enumerate(zip(points[1:], headings)):
        last = leg == legs - 1
        found = _sign_place(landmarks, point, heading, between, last) if last or landmarks.random() < 0.4 else None
        texts.append(None)
        if found:
            name, kind = names.pop()
            signs.append((*found[1], name, kind))
            texts[-1] = f"{'The destination ' if last else ''}{name} is on your {SIDES[found[0]]}"
    synthetic = {"key": key, "city": city, "nodes": [nodes[i] for i in near],
                 "edges": sorted((near.index(a), near.index(b)) for a in near for b in links[a] if a < b and b in near),
                 "signs": [(round(x, 2), round(y, 2), name, kind) for x, y, name, kind in
                           signs + _off_route(landmarks, nodes, links, between, names)]}
    return _official(points, headings, texts, signs[-1], stream(key, "place"), synthetic)


def _official(points, headings, texts, destination, rng, synthetic):
    """The official file's entry for a route in metres."""
    start = rng.uniform(-50, 55), rng.uniform(-179, 179)
    geocode = lambda p: [round(v, 7) for v in _geocode(start, p)]  # noqa: E731
    metres = [round(math.dist(a, b)) for a, b in zip(points, points[1:])]
    blocks = [f'{{\n  "intersection_idx": {i},\n  "landmarks": "{texts[i]}",\n  "distance": "{metres[i]} meters",\n'
              f'  "human_heading": "{COMPASS[octant(h)]}",\n'
              f'  "to_next_intersection_heading": "{h} ({COMPASS[octant(h)]})",\n}},\n' for i, h in enumerate(headings)]
    return {"start_place": {"relocated_geocode": geocode(points[0])},
            "dest_place": {"name": destination[2], "geocode": geocode(destination[:2])}, "init_heading": 0,
            "milestone_info": "".join(blocks),
            "route_results": {"geocode_list": [geocode(p) for p in points[1:]],
                              "landmark_list": [t and t.split(" is on your ")[0].replace("The destination ", "")
                                                for t in texts],
                              "distance_list": metres},
            "synthetic": synthetic}


# ---------------------------------------------------------------- reading the official format
@dataclass(frozen=True, eq=False)
class Route:
    """A checked route. points: K + 1 of (x, y) metres from the start; headings: K whole degrees, of each leg;
    landmarks: K texts or None; scene: what the renderer draws or None, one object per route, as it is a cache's key."""
    key: str
    start: tuple  # latitude, longitude
    init_heading: object  # whole degrees; None: another one at each reset
    points: tuple
    headings: tuple
    landmarks: tuple
    scene: object

    def pauses(self, leg):
        """The four places on a leg where a walk may pause (official), None for those too near to either end."""
        a, b = self.points[leg:leg + 2]
        length, clear = math.dist(a, b), 12 if leg == len(self.headings) - 1 else 8
        return [_along(a, b, i / 5) if i / 5 * length > 8 and (1 - i / 5) * length > clear else None
                for i in range(1, 5)]

    def places(self):
        """Every place that a walk may visit."""
        return [*self.points, *(p for leg in range(len(self.headings)) for p in self.pauses(leg) if p)]


def _number(value, limit=1e6):
    return type(value) in (int, float) and abs(value) <= limit  # neither true nor NaN


def _is_text(value):
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _get(data, *path):
    for depth, name in enumerate(path):
        need(isinstance(data, dict) and name in data, f"{'.'.join(path[:depth + 1])} is missing")
        data = data[name]
    return data


def _checked_geocode(value, field):
    need(isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_number, value, (90, 180))),
         f"{field} is not [latitude, longitude]")
    return tuple(value)


def _field(block, name):
    """Value of `name` in a block of milestone_info, which looks like JSON but is not; None if absent or empty."""
    match = re.search(rf"""["']?\b{name}["']?\s*:\s*(?:"([^"]*)"|'([^']*)'|([^,\n}}]*))""", block)
    value = next((g.strip() for g in match.groups() if g is not None), "") if match else ""
    return None if value.lower() in ("", "none", "null") else value


def _scene(data):
    """What the renderer draws, from the key `synthetic` of a route."""
    rows = {name: _get(data, "synthetic", name) for name in ("nodes", "edges", "signs")}
    city, key = _get(data, "synthetic", "city"), _get(data, "synthetic", "key")
    need(city in tuple(streets.CITIES), f"synthetic.city {city!r} is none of {', '.join(streets.CITIES)}")
    need(_is_text(key), "synthetic.key is not text")
    nodes, known = rows["nodes"], lambda i: type(i) is int and 0 <= i < len(nodes)
    forms = {"nodes": (2, "[x, y] in metres", lambda x, y: _number(x) and _number(y)),
             "edges": (2, "[i, j], two nodes a metre or more apart",
                       lambda i, j: known(i) and known(j) and math.dist(nodes[i], nodes[j]) >= 1),
             "signs": (4, "[x, y, name, category]", lambda x, y, name, category:
                       _number(x) and _number(y) and _is_text(name) and category in streets.CATEGORIES)}
    for name, (length, form, fits) in forms.items():
        need(isinstance(rows[name], (list, tuple)), f"synthetic.{name} is not a list")
        for i, row in enumerate(rows[name]):
            need(isinstance(row, (list, tuple)) and len(row) == length and fits(*row),
                 f"synthetic.{name}[{i}] is not {form}")
    return streets.Scene(tuple(map(tuple, nodes)), tuple(map(tuple, rows["edges"])),
                         tuple(streets.Sign(*sign) for sign in rows["signs"]), city, key)


def read_route(data, key):
    """A Route from one entry of the official file. Raises: ValueError naming the field and what is wrong with it."""
    start = _checked_geocode(_get(data, "start_place", "relocated_geocode"), "start_place.relocated_geocode")
    geocodes, info = _get(data, "route_results", "geocode_list"), _get(data, "milestone_info")
    need(isinstance(geocodes, list) and geocodes, "route_results.geocode_list is not a list of geocodes")
    need(isinstance(info, str), "milestone_info is not text")
    blocks, init = re.findall(r"\{([^{}]*)\}", info), data.get("init_heading")
    need(len(blocks) == len(geocodes),
         f"milestone_info has {len(blocks)} blocks for {len(geocodes)} entries of route_results.geocode_list")
    need(init is None or _number(init), "init_heading is not a number of degrees")
    lng_metres = METRES * math.cos(math.radians(start[0]))
    points, headings, landmarks = [(0.0, 0.0)], [], []
    for i, (geocode, block) in enumerate(zip(geocodes, blocks)):
        lat, lng = _checked_geocode(geocode, f"route_results.geocode_list[{i}]")
        points.append(((lng - start[1]) * lng_metres, (lat - start[0]) * METRES))
        heading = re.match(r"(\d{1,3})(?!\d)", _field(block, "to_next_intersection_heading") or "")
        need(heading and int(heading[1]) <= 360,
             f'milestone_info[{i}].to_next_intersection_heading is not like "212 (southwest)"')
        headings.append(int(heading[1]) % 360)
        landmarks.append(_field(block, "landmarks"))
    need(landmarks[-1] and "destination" in landmarks[-1].lower(),
         f"milestone_info[{len(blocks) - 1}].landmarks does not name the destination")
    scene = _scene(data) if data.get("synthetic") else None
    return Route(scene.seed if scene else key, start, round(init) % 360 if init else None, tuple(points),
                 tuple(headings), tuple(landmarks), scene)


@lru_cache(maxsize=None)
def split_route(split, index, milestones):
    """Route `index` of a split, made once."""
    return read_route(make_route(split, index, milestones), "")


@lru_cache(maxsize=4)
def read_routes(path):
    """All Routes of an official file, `[routes, n]` or a bare list. Raises: ValueError naming route and field."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'is not JSON'}") from None
    if isinstance(data, list) and len(data) == 2 and isinstance(data[0], list):
        data = data[0]
    need(isinstance(data, list) and data, f"{path}: holds no list of routes")
    routes = []
    for index, entry in enumerate(data):
        try:
            routes.append(read_route(entry, f"{Path(path).name}|{index}"))
        except ValueError as error:
            raise ValueError(f"{path}: route {index}: {error}") from None
    return routes


# ---------------------------------------------------------------- real panoramas
def _globe(lat, lng):
    """(x, y, z) metres from the middle of the Earth."""
    lat, lng, radius = math.radians(lat), math.radians(lng), METRES * 180 / math.pi
    return radius * math.cos(lat) * math.cos(lng), radius * math.cos(lat) * math.sin(lng), radius * math.sin(lat)


def _cell(spot):
    """The cube of NEAREST metres that holds one of _globe's spots."""
    return tuple(int(v // NEAREST) for v in spot)


class Panoramas:
    """Real street views: panoramas.csv (lat, lng, pano_id), <pano_id>.jpg (equirectangular) and <pano_id>.metadata.json
    whose "rotation" is the compass heading of the picture's middle. Nothing is ever fetched.

    Raises: ValueError naming the file and what is wrong with it, or the route and the place that has no panorama.
    """

    def __init__(self, folder, routes):
        self.folder, self.cells, self.rotations, table = Path(folder), {}, {}, Path(folder) / "panoramas.csv"
        try:
            with open(table, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    name = row["pano_id"]
                    need(re.fullmatch(r"[\w-]+", name, re.ASCII),
                         f"pano_id {name!r} may hold letters, digits, _ and - only")
                    spot = _globe(*_checked_geocode([float(row["lat"]), float(row["lng"])], f"row of {name}"))
                    self.cells.setdefault(_cell(spot), []).append((spot, name))
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"panoramas: {table}: {error}") from None
        need(self.cells, f"panoramas: {table} has no rows")
        for route in routes:
            for place in route.places():
                self._find(route, place)

    def _find(self, route, place):
        """The panorama nearest to a place of a route; its files are looked at when it is first found."""
        lat, lng = _geocode(route.start, place)
        here, where = _globe(lat, lng), f"panoramas: route {route.key}: {lat:.6f}, {lng:.6f}"
        cells = itertools.product(*((c - 1, c, c + 1) for c in _cell(here)))
        near = ((math.dist(spot, here), name) for cell in cells for spot, name in self.cells.get(cell, ()))
        away, name = min(near, default=(math.inf, None))
        need(away <= NEAREST, f"{where} has none within {NEAREST} m")
        if name not in self.rotations:
            path = self.folder / name
            try:
                rotation = _get(json.loads(path.with_suffix(".metadata.json").read_text(encoding="utf-8")), "rotation")
                need(_number(rotation), f"rotation {rotation!r} is not a number of degrees")
                Image.open(path.with_suffix(".jpg")).close()
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {path}: {error}") from None
            self.rotations[name] = rotation
        return name

    def look(self, route, place, heading, size):
        """The 2x2 street view at a place (x, y metres from the route's start), from the panorama nearest to it."""
        name = self._find(route, place)
        try:
            with Image.open(self.folder / f"{name}.jpg") as picture:
                return streets.panorama_views(picture.convert("RGB"), heading - self.rotations[name], size)
        except (OSError, ValueError) as error:
            raise ValueError(f"panoramas: {self.folder / name}.jpg: {error}") from None


@lru_cache(maxsize=4)
def panoramas_of(folder, path):
    """The Panoramas for the routes of a file, checked once for all the walks side by side."""
    return Panoramas(folder, read_routes(path))
