"""The official route file (`route_infos.json`): routes for V-IRL, read and checked.

A route is a chain of milestones, the destination last, with a heading to each and a landmark at
some. What is damaged is refused when the file is read, with the route and the field.
"""
import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from scenery.styles import CATEGORIES, CITIES
from scenery.town import Scene, Sign

METRES = 111_320  # per degree of latitude
CLEAR = 8  # metres: no pause is nearer to an end of its leg (official code)


def along(a, b, share):
    """The point that lies this share of the way from a to b."""
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])


def geocode(start, place):
    """[latitude, longitude] of a place (x, y) metres east and north of a start."""
    lat, lng = start
    return [lat + place[1] / METRES, lng + place[0] / METRES / math.cos(math.radians(lat))]


@dataclass(frozen=True, eq=False)
class Route:
    """A checked route of K legs; one object per route, as its scene is a cache's key."""
    key: str  # the same for all walks along it
    start: tuple  # latitude, longitude
    init_heading: int | None  # whole degrees; None: another one at each reset
    points: tuple  # K + 1 of (x, y), metres from the start
    headings: tuple  # K whole degrees, of each leg
    landmarks: tuple  # K texts or None, at the end of each leg
    scene: Scene | None  # what the renderer draws, for synthetic routes

    def pauses(self, leg):
        """The four places on a leg where a walk may pause; None if within CLEAR of an end."""
        a, b = self.points[leg], self.points[leg + 1]
        length = math.dist(a, b)
        places = []
        for share in (1 / 5, 2 / 5, 3 / 5, 4 / 5):
            fits = min(share, 1 - share) * length > CLEAR
            places.append(along(a, b, share) if fits else None)
        return places

    def places(self):
        """Every place that a walk may visit."""
        places = list(self.points)
        for leg in range(len(self.headings)):
            places += [place for place in self.pauses(leg) if place]
        return places


# ---------------------------------------------------------------- refusing what is damaged
def refuse_unless(intact, problem):
    """Raise a ValueError that says what is damaged in a file."""
    if not intact:
        raise ValueError(problem)


def is_number(value, limit=1e6):
    """Whether a value of a JSON file is a number within ±limit: neither true nor NaN."""
    return type(value) in (int, float) and abs(value) <= limit


def checked_geocode(value, field):
    """A geocode as a tuple (latitude, longitude)."""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    refuse_unless(is_pair and is_number(value[0], 90) and is_number(value[1], 180),
                  f"{field} is not [latitude, longitude]")
    return tuple(value)


def get_field(data, *path):
    """What nested mappings hold under these names."""
    for depth, name in enumerate(path, 1):
        present = isinstance(data, dict) and name in data
        refuse_unless(present, f"{'.'.join(path[:depth])} is missing")
        data = data[name]
    return data


# ---------------------------------------------------------------- what the renderer draws
def _is_text(value):
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _is_point(x, y):
    return is_number(x) and is_number(y)


def _is_sign(x, y, name, category):
    return _is_point(x, y) and _is_text(name) and category in CATEGORIES


def _rows(data, name, form, length, fits):
    """The list `synthetic.name` as tuples, whose rows have this length and fit."""
    rows = get_field(data, "synthetic", name)
    refuse_unless(isinstance(rows, (list, tuple)), f"synthetic.{name} is not a list")
    for i, row in enumerate(rows):
        has_length = isinstance(row, (list, tuple)) and len(row) == length
        refuse_unless(has_length and fits(*row), f"synthetic.{name}[{i}] is not {form}")
    return tuple(map(tuple, rows))


def _scene(data):
    """The Scene that the key `synthetic` of a route describes."""
    nodes = _rows(data, "nodes", "[x, y] in metres", 2, _is_point)

    def is_edge(i, j):
        known = all(type(n) is int and 0 <= n < len(nodes) for n in (i, j))
        return known and math.dist(nodes[i], nodes[j]) >= 1

    edges = _rows(data, "edges", "[i, j], two nodes a metre or more apart", 2, is_edge)
    signs = _rows(data, "signs", "[x, y, name, category]", 4, _is_sign)
    city, key = get_field(data, "synthetic", "city"), get_field(data, "synthetic", "key")
    refuse_unless(city in tuple(CITIES),
                  f"synthetic.city {city!r} is none of {', '.join(CITIES)}")
    refuse_unless(_is_text(key), "synthetic.key is not text")
    return Scene(nodes, edges, tuple(Sign(*sign) for sign in signs), city, seed=key)


# ---------------------------------------------------------------- routes
_KEY_WITHIN = re.compile(  # of a file whose blocks are not a line per key
    r"""([{,]\s*["'](?:intersection_idx|landmarks|distance|\w*heading)["']\s*:)""")
_NO_LANDMARK = re.compile(r"|-|null|nil|n/?a|(none|nothing)( nearby)?|"
                          r"(there (is|are) )?no (nearby )?landmarks?\b(?!.* is on your ).*")


def _blocks(info):
    """The blocks of milestone_info, [{key: text}], read line by line as the official reader does.

    It looks like JSON but is not: there is a comma too many, and names may hold quotes and braces.
    """
    blocks = []
    for line in _KEY_WITHIN.sub(r"\n\1", info).split("\n"):
        line = line.strip(" \t\r[],")
        field = line.lstrip("{}, \t")
        if "{" in line[:len(line) - len(field)]:
            blocks.append({})
        key, colon, value = field.partition(":")
        if colon and blocks:
            blocks[-1][key.strip(" \"'")] = _unquoted(value.strip().rstrip("]}, \t"))
    return blocks


def _unquoted(text):
    """A text without the quotes around it."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1].strip() if is_quoted else text


def _landmark(block):
    """The landmark that a block of milestone_info names; None if there is none."""
    text = block.get("landmarks", "")
    return None if _NO_LANDMARK.fullmatch(text.lower().strip(" .!")) else text


def _heading(block, i):
    """Whole degrees of the leg that a block of milestone_info describes."""
    match = re.match(r"(\d{1,3})(?!\d)", block.get("to_next_intersection_heading", ""))
    refuse_unless(match and int(match[1]) <= 360,
                  f'milestone_info[{i}].to_next_intersection_heading is not like "212 (southwest)"')
    return int(match[1]) % 360


def read_route(data, key):
    """A Route from one entry of the official file.

    Args: data: the entry; key: of the Route, unless the entry brings one along (`synthetic.key`).
    Raises: ValueError naming the field and what is wrong with it.
    """
    place = get_field(data, "start_place", "relocated_geocode")
    start = checked_geocode(place, "start_place.relocated_geocode")
    geocodes = get_field(data, "route_results", "geocode_list")
    info = get_field(data, "milestone_info")
    refuse_unless(isinstance(geocodes, list) and geocodes,
                  "route_results.geocode_list is not a list of geocodes")
    refuse_unless(isinstance(info, str), "milestone_info is not text")
    blocks = _blocks(info)
    refuse_unless(len(blocks) == len(geocodes),
                  f"milestone_info has {len(blocks)} blocks for {len(geocodes)} entries of "
                  "route_results.geocode_list")
    init = data.get("init_heading")
    refuse_unless(init is None or is_number(init), "init_heading is not a number of degrees")

    lng_metres = METRES * math.cos(math.radians(start[0]))
    points, headings, landmarks = [(0.0, 0.0)], [], []
    for i, (milestone, block) in enumerate(zip(geocodes, blocks)):
        lat, lng = checked_geocode(milestone, f"route_results.geocode_list[{i}]")
        points.append(((lng - start[1]) * lng_metres, (lat - start[0]) * METRES))
        headings.append(_heading(block, i))
        landmarks.append(_landmark(block))
    refuse_unless(landmarks[-1] and "destination" in landmarks[-1].lower(),
                  f"milestone_info[{len(blocks) - 1}].landmarks does not name the destination")
    scene = _scene(data) if data.get("synthetic") else None
    return Route(
        key=scene.seed if scene else key,
        start=start,
        init_heading=round(init) % 360 if init else None,  # 0 stands for none in the official file
        points=tuple(points),
        headings=tuple(headings),
        landmarks=tuple(landmarks),
        scene=scene)


@lru_cache(maxsize=4)
def read_routes(path):
    """All Routes of an official file, `[routes, n]` or a bare list.

    Raises: ValueError naming the file, the route and the field.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "is not JSON"
        raise ValueError(f"{path}: {reason}") from None
    if isinstance(data, list) and len(data) == 2 and isinstance(data[0], list):
        data = data[0]
    refuse_unless(isinstance(data, list) and data, f"{path}: holds no list of routes")
    routes = []
    for index, entry in enumerate(data):
        try:
            routes.append(read_route(entry, f"{Path(path).name}|{index}"))
        except ValueError as error:
            raise ValueError(f"{path}: route {index}: {error}") from None
    return routes
