"""Routes against independent geometry (vectors, own projection); the official file, damaged in
every way; panoramas."""
import copy
import hashlib
import json
import math
import os
import pickle
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from itertools import count

import panoramas_csv
import pytest
from conftest import ROOT
from PIL import Image

from scenery import official as official_file
from scenery import panoramas, routes, styles

COMPASS = "north northeast east southeast south southwest west northwest".split()
TURNS = ["left", "right", "slightly left", "slightly right"]
SIDES = ["front", "right front", "right", "right behind", "behind", "left behind", "left",
         "left front"]
SIZES = {"train": 1000, "seen": 48, "unseen": 200, "mini": 18, "cities": 200}
# metres per degree of latitude on the WGS 84 equator; routes.py has its own figure
DEGREE = 6_378_137 * math.pi / 180


# --------------------------------------------------------- oracles, sharing nothing with routes.py
def vector(degrees):
    """(east, north) of a heading."""
    return math.sin(math.radians(degrees)), math.cos(math.radians(degrees))


def dot(a, b):
    return a[0] * b[0] + a[1] * b[1]


def nearest(words, way, north=0):
    """The word of eight, clockwise from `north`, whose direction is nearest to a vector."""
    return max(words, key=lambda word: dot(way, vector(north + 45 * words.index(word))))


def turn(before, way):
    """The turn word from a heading to a vector, by cross and dot product."""
    (x, y), forward = vector(before), dot(vector(before), way)
    left = x * way[1] - y * way[0]
    side = "left" if left > 0 else "right"
    return f"slightly {side}" if abs(left) <= forward + 1e-9 * math.hypot(*way) else side


def between(a, b):
    return b[0] - a[0], b[1] - a[1]


def degrees_apart(a, b):
    return abs((a - b) % 360 if (a - b) % 360 <= 180 else 360 - (a - b) % 360)


def geocode(lat, lng, x, y):
    """[latitude, longitude] of the place x metres east and y north of another one."""
    return [lat + y / DEGREE, lng + x / DEGREE / math.cos(math.radians(lat))]


def metres(route, geocode):
    """(east, north) of the start of a route in the official format."""
    lat, lng = route["start_place"]["relocated_geocode"]
    return (geocode[1] - lng) * DEGREE * math.cos(math.radians(lat)), (geocode[0] - lat) * DEGREE


def milestones(route):
    """[(x, y)] of a route in the official format, the start first."""
    return [(0.0, 0.0)] + [metres(route, g) for g in route["route_results"]["geocode_list"]]


def blocks(route):
    """(heading, compass word, landmark text or None) of each block of milestone_info, by a parser
    of its own."""
    lines = [line.strip().rstrip(",") for line in route["milestone_info"].splitlines()]
    fields = [line.split(": ", 1) for line in lines if ": " in line]
    every = {name: [value.strip('"') for key, value in fields if key == f'"{name}"'] for name in
             ("to_next_intersection_heading", "human_heading", "landmarks")}
    landmarks = [None if text == "No landmark nearby" else text for text in every["landmarks"]]
    headings = every["to_next_intersection_heading"]
    return [(int(h.split()[0]), h.split("(")[1][:-1], text) for h, text in zip(headings, landmarks)]


@lru_cache(maxsize=None)
def official(split):
    """Every route of a split in the official format: read, never changed."""
    return [routes.make_route(split, i) for i in range(SIZES[split])]


# ---------------------------------------------------------------- helpers
# VIRL.md section 1, start heading 75
EXAMPLE = [(29, 60, "Blue Cafe is on your right front"), (299, 40, None),
           (350, 70, "The destination Town Hall is on your left")]


def entry(legs=EXAMPLE, init=75, lat=40.7, lng=-74.0):
    """A route in the official format from (heading, metres, landmark text) of each leg; no
    synthetic key."""
    x, y, geocodes, info = 0, 0, [], ""
    for i, (heading, length, landmark) in enumerate(legs):
        x, y = x + length * vector(heading)[0], y + length * vector(heading)[1]
        geocodes.append(geocode(lat, lng, x, y))
        info += (f'{{\n"intersection_idx": {i},\n"landmarks": "{landmark}",\n'
                 f'"distance": "{length} meters",\n'
                 f'"human_heading": "x",\n"to_next_intersection_heading": "{heading} (x)",\n}},\n')
    return {"start_place": {"relocated_geocode": [lat, lng]},
            "dest_place": {"name": "Town Hall", "geocode": geocodes[-1]},
            "init_heading": init, "milestone_info": info,
            "route_results": {"geocode_list": geocodes, "landmark_list": [None] * len(legs),
                              "distance_list": [leg[1] for leg in legs]}}


@pytest.fixture
def saved(tmp_path):
    """Writes JSON (or text) to a file of its own each time; returns the path."""
    numbers = count()

    def save(data):
        path = tmp_path / f"routes{next(numbers)}.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return str(path)

    return save


# ---------------------------------------------------------------- words for turns
def test_turn_word_by_hand():
    for before, after, word in [(75, 29, "left"), (29, 299, "left"), (299, 350, "right"),
                                (350, 10, "slightly right"),
                                (10, 350, "slightly left"), (0, 45, "slightly right"),
                                (0, 46, "right"), (15, 330, "slightly left"),
                                (16, 330, "left"), (0, 179, "right"), (0, 181, "left"),
                                (270, 0, "right"), (340, 161, "left")]:
        assert routes.turn_word(before, after) == word


def test_turn_word_agrees_with_vectors_for_all_headings():
    for before in range(360):
        for after in range(360):
            if before != after and (before - after) % 360 != 180:  # neither left nor right
                expected = turn(before, vector(after))
                assert routes.turn_word(before, after) == expected, (before, after)
            assert routes.turn_word(before, after) in TURNS


# ---------------------------------------------------------------- the walk in the district
def test_headings_and_words_agree_with_the_geocodes():
    for route in official("train"):
        points, info = milestones(route), blocks(route)
        assert 2 <= len(info) == len(points) - 1 <= 8
        before = None
        for a, b, (heading, word, _), length in zip(points, points[1:], info,
                                                    route["route_results"]["distance_list"]):
            way = between(a, b)
            assert degrees_apart(heading, math.degrees(math.atan2(*way))) < 0.6  # a whole number
            ways = (way, vector(heading + 5), vector(heading - 5))
            assert {nearest(COMPASS, w) for w in ways} == {word}
            assert abs(math.hypot(*way) - length) < 0.6 and 15 < length < 180
            if before is not None:
                change = degrees_apart(before, heading)
                assert 15 <= change <= 38 or 52 <= change <= 165
            before = heading
    assert Counter(len(blocks(r)) for r in official("train")).keys() == set(range(2, 9))


def test_route_turns_at_every_intersection_it_meets():
    """Every milestone but the last is a node where three streets or more meet; start and
    destination lie between nodes."""
    for route in official("train"):
        extra, points = route["synthetic"], milestones(route)
        nodes, links = extra["nodes"], {i: set() for i in range(len(extra["nodes"]))}
        for a, b in extra["edges"]:
            # 45-110 m, jitter 6 m at both ends, diagonals
            assert a != b and 30 < math.dist(nodes[a], nodes[b]) < 175
            links[a].add(b)
            links[b].add(a)
        path = [min(links, key=lambda i: math.dist(nodes[i], p)) for p in points[1:-1]]
        assert all(math.dist(nodes[i], p) < 0.05 for i, p in zip(path, points[1:]))
        assert len(set(path)) == len(path) and all(len(links[i]) >= 3 for i in path)
        assert all(b in links[a] for a, b in zip(path, path[1:]))
        ends = []
        # on a street to a node that was not visited
        for end, node in ((points[0], path[0]), (points[-1], path[-1])):
            here, streets_there = nodes[node], []
            for i in links[node]:
                detour = math.dist(here, end) + math.dist(end, nodes[i]) - math.dist(here, nodes[i])
                if abs(detour) < 0.05:
                    streets_there.append(i)
            assert len(streets_there) == 1 and not set(streets_there) & set(path)
            ends += streets_there
        assert ends[0] != ends[1] and len(nodes) == len(set(map(tuple, nodes))) <= 49


def test_district_is_one_piece():
    """Routes only keep the part of their district that can be seen."""
    degrees = Counter()
    for seed in range(100):
        district = routes.District(random.Random(seed))
        nodes, links = district.nodes, district.links
        assert len(nodes) == len(links) == 49
        assert all(a in links[b] and a != b for a in links for b in links[a])
        reached, todo = {0}, [0]
        while todo:
            todo += (new := links[todo.pop()] - reached)
            reached |= new
        assert len(reached) == 49, "one can walk everywhere"
        degrees.update(map(len, links.values()))
    # (84 + 11 diagonals) * 2 / 49, less 18 %
    assert 2.8 < sum(d * n for d, n in degrees.items()) / degrees.total() < 3.4


# ---------------------------------------------------------------- landmarks
def test_landmarks_stand_where_the_text_says():
    sides, ends = Counter(), Counter()
    for route in official("train"):
        points, info, named = milestones(route), blocks(route), []
        signs = {name: ((x, y), kind) for x, y, name, kind in route["synthetic"]["signs"]}
        kinds = {kind for _, kind in signs.values()}
        assert len(signs) == len(route["synthetic"]["signs"]) == len(kinds)
        for i, (a, b, (_, _, landmark)) in enumerate(zip(points, points[1:], info)):
            last = i == len(info) - 1
            assert (route["route_results"]["landmark_list"][i] is None) == (landmark is None)
            assert (landmark or not last)
            if landmark is None:
                continue
            prefix = "The destination " if last else ""
            name, side = re.fullmatch(rf"{prefix}([A-Z].*) is on your (.*)", landmark).groups()
            place, kind = signs[name]
            assert name == route["route_results"]["landmark_list"][i] and name.startswith(kind)
            assert kind in styles.CATEGORIES
            assert 7.95 < math.dist(b, place) < 14.05
            arrival = math.degrees(math.atan2(*between(a, b)))
            assert nearest(SIDES, between(b, place), arrival) == side
            middle = vector(arrival + 45 * SIDES.index(side))
            assert dot(middle, between(b, place)) > math.cos(math.radians(11)) * math.dist(b, place)
            named.append(name)
            (ends if last else sides)[side] += 1
        assert route["dest_place"]["name"] == named[-1] and len(set(named)) == len(named)
        assert math.dist(metres(route, route["dest_place"]["geocode"]), signs[named[-1]][0]) < 0.05
    # no side is favoured over its mirror image (4 standard deviations), none tells too much
    for seen in (sides, ends):
        for x in ("", " front", " behind"):
            left, right = seen[f"left{x}"], seen[f"right{x}"]
            assert abs(left - right) <= 4 * (left + right) ** 0.5
        assert len(seen) >= 5 and max(seen.values()) < 0.4 * seen.total()


def test_four_in_ten_intersections_have_a_landmark():
    """A loose bound: 4 standard deviations."""
    texts = [landmark for route in official("train") for _, _, landmark in blocks(route)[:-1]]
    assert abs(sum(t is not None
                   for t in texts) / len(texts) - 0.4) < 4 * (0.24 / len(texts)) ** 0.5


def test_names_cannot_be_taken_for_anything_else():
    names = {sign[2] for split in SIZES for route in official(split)
             for sign in route["synthetic"]["signs"]}
    assert len(names) == 400  # 20 names in each of 20 categories
    for name in names:
        assert re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+", name)  # so no quote, brace, colon or comma
        assert not re.search("north|east|south|west|left|right|front|behind|intersection|"
                             "destination|landmark|forward|stop|turn", name.lower())


# ---------------------------------------------------------------- splits
def shape(route):
    """What a route looks like wherever it lies."""
    return tuple((heading, length)
                 for (heading, *_), length in zip(blocks(route),
                                                  route["route_results"]["distance_list"]))


def test_splits_share_no_route_but_seen_and_train():
    shapes = {split: [shape(route) for route in official(split)] for split in SIZES}
    for split, of in shapes.items():
        assert len(of) == len(set(of)) == routes.SPLITS[split] == SIZES[split]
        for other in set(SIZES) - {split}:
            assert bool(set(of) & set(shapes[other])) == ({split, other} == {"seen", "train"})
    every = {json.dumps(route) for route in official("train")}
    assert {json.dumps(route) for route in official("seen")} < every


def test_splits_lie_in_their_cities():
    nine = list(styles.CITIES)
    assert nine[0] == "New York" and len(nine) == 9
    cities = {split: Counter(route["synthetic"]["city"] for route in official(split))
              for split in SIZES}
    assert all(set(cities[split]) == {"New York"} for split in ("train", "seen", "unseen"))
    assert cities["mini"] == {city: 2 for city in nine}
    assert cities["cities"] == {city: 25 for city in nine[1:]}


def test_generator_makes_the_routes_that_models_were_trained_on():
    """A changed hash is a changed task: the shipped model and README's numbers no longer belong to
    it."""
    made = [official(split)[i] for split in SIZES for i in range(18)]
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    assert digest == "7d894993c3f47d3798138006d69591a8aa8c1a46f4ebd7487255206e1e4ce48b"


# ---------------------------------------------------------------- the official file
def variant(**changes):
    return {**entry(), **changes}


INFO = entry()["milestone_info"]


@pytest.mark.parametrize("route", [
    variant(extra={"x": [1]}, comment=None), variant(init_heading=75.2), variant(dest_place={}),
    variant(route_results={"geocode_list": entry()["route_results"]["geocode_list"]}),
    variant(synthetic=None), variant(synthetic={}),
    variant(milestone_info=INFO.replace('"None"', "None")),
    variant(milestone_info=INFO.replace('"None"', "null")),
    variant(milestone_info=INFO.replace('"None"', '""')),
    variant(milestone_info=INFO.replace('"landmarks": "None",\n', "")),
    variant(milestone_info=INFO.replace('"', "'")),
    variant(milestone_info=f"[{INFO}]".replace("\n", " ")),
    variant(milestone_info=INFO.replace(' (x)"', '"')),
    variant(milestone_info=INFO.replace('"29 (x)"', "29"))], ids=range(14))
def test_what_files_may_differ_in(saved, route):
    plain, other = (vars(official_file.read_routes(saved([r]))[0]) for r in (entry(), route))
    assert {**plain, "key": ""} == {**other, "key": ""} and plain["key"] != other["key"]


@pytest.mark.parametrize("text", [
    "No landmark nearby", "No landmarks nearby", "No landmarks nearby.", "no landmark",
    "NO LANDMARK", "No landmark is nearby", "There is no landmark nearby.",
    "no nearby landmarks", "N/A", "n/a.", "NA", "None", "none nearby", "Nothing", "null",
    "", " ", "-"])
@pytest.mark.parametrize("how", ['"{}"', "'{}'", "{}"])
def test_landmark_that_is_none(saved, text, how):
    route = variant(milestone_info=INFO.replace('"None"', how.format(text)))
    assert official_file.read_routes(saved([route]))[0].landmarks[1] is None


@pytest.mark.parametrize("name", [
    'Joe\'s "Best" Bar', '"Best" Bar', "Cafe {Paris}", "{", "}", "A, B: C", "[x]",
    "No Landmark Cafe", "None", "N/A", "Bar, \'distance\' {", "landmarks: Bar", "Ü"])
def test_landmark_may_have_any_name(saved, name):
    """As the official reader does: line by line, between the quotes."""
    text = f"{name} is on your left front"
    for info in (INFO, INFO.replace("\n", "\r\n"), INFO.replace("},\n{", "}, {"),
                 INFO.replace('{\n"', '{"').replace(",\n}", "}")):
        route = variant(milestone_info=info.replace('"None"', f'"{text}"'))
        read = official_file.read_routes(saved([route]))[0]
        assert read.landmarks == (EXAMPLE[0][2], text, EXAMPLE[2][2])
        assert read.headings == (29, 299, 350)


def test_pauses_keep_8_metres_clear_of_both_ends(saved):
    legs = [(29, 60, None), (299, 25, "The destination Town Hall is on your left")]
    (route,) = official_file.read_routes(saved([entry(legs)]))
    clear = [place and round(math.dist(place, route.points[2])) for place in route.pauses(1)]
    assert clear == [None, 15, 10, None]  # 5 m are too near the other end
    nearest = []
    for i in range(100):
        made = routes.split_route("train", i, (2, 8))
        last = filter(None, made.pauses(len(made.headings) - 1))
        nearest += [math.dist(place, made.points[-1]) for place in last]
    assert 8 < min(nearest) < 9  # synthetic routes as well


@pytest.mark.parametrize("init, heading",
                         [(0, None), (0.0, None), (-0.0, None), (None, None), ("absent", None),
                          (75, 75), (75.2, 75),
                                           (360, 0), (359.7, 0), (0.2, 0), (-90, 270), (435, 75)])
def test_start_heading_is_left_open_only_where_the_file_has_none(saved, init, heading):
    route = entry(init=init)
    if init == "absent":
        del route["init_heading"]
    assert official_file.read_routes(saved([route]))[0].init_heading == heading


def without(path):
    route = copy.deepcopy(entry())
    at = route
    for name in path[:-1]:
        at = at[name]
    del at[path[-1]]
    return route


GEOCODES = entry()["route_results"]["geocode_list"]
FIRST = r"milestone_info\[0\].to_next_intersection_heading"
DAMAGED = [  # second route of the file, the field that the message names
    (without(["start_place"]), "start_place is missing"),
    (variant(start_place=None), r"start_place.relocated_geocode is missing"),
    (without(["start_place", "relocated_geocode"]), "start_place.relocated_geocode is missing"),
    (without(["route_results"]), "route_results is missing"),
    (without(["milestone_info"]), "milestone_info is missing"),
    (without(["route_results", "geocode_list"]), "route_results.geocode_list is missing"),
    (variant(start_place={"relocated_geocode": [91, 0]}), "start_place.relocated_geocode"),
    (variant(start_place={"relocated_geocode": [0, 181]}), "start_place.relocated_geocode"),
    (variant(start_place={"relocated_geocode": [float("nan"), 0]}),
     "start_place.relocated_geocode"),
    (variant(start_place={"relocated_geocode": ["40", "-74"]}), "start_place.relocated_geocode"),
    (variant(start_place={"relocated_geocode": {"lat": 1}}), "start_place.relocated_geocode"),
    *((variant(route_results={"geocode_list": value}), rf"route_results.geocode_list{where}")
      for value, where in (
        (None, ""), ({}, ""), ([], ""), (3, ""),
        ([GEOCODES[0], [1, float("inf")], GEOCODES[2]], r"\[1\]"),
        ([GEOCODES[0], GEOCODES[1], None], r"\[2\]"), ([[1], *GEOCODES[1:]], r"\[0\]"),
        ([[1, 2, 3], *GEOCODES[1:]], r"\[0\]"))),
    (variant(route_results={"geocode_list": GEOCODES[:2]}),
     "milestone_info has 3 blocks for 2 entries"),
    (variant(milestone_info=""), "milestone_info has 0 blocks for 3"),
    (variant(milestone_info=None), "milestone_info is not text"),
    (variant(milestone_info=INFO.replace("29 (x)", "north")), FIRST),
    (variant(milestone_info=INFO.replace("29 (x)", "-29")), FIRST),
    (variant(milestone_info=INFO.replace("29 (x)", "361 (x)")), FIRST),
    (variant(milestone_info=INFO.replace("29 (x)", "")), FIRST),
    (variant(milestone_info=INFO.replace('"to_next_intersection_heading": "29 (x)",', "")), FIRST),
    (variant(milestone_info=INFO.replace("The destination ", "")),
     r"milestone_info\[2\].landmarks"),
    (variant(milestone_info=INFO.replace(EXAMPLE[2][2], "None")), r"milestone_info\[2\].landmarks"),
    *((variant(init_heading=value), "init_heading is not") for value in (
        "75", "", [75], [], {"x": 1}, True, False, float("nan"), float("inf"), 10 ** 400,
        -10 ** 400)),
    *((variant(milestone_info=INFO.replace("29 (x)", value)), FIRST)
      for value in ("9" * 5000, "0029", "1000", "x29")),
    *((variant(synthetic=value), "synthetic") for value in (
        [1], "x", 3, {"city": "Milan"},
        {"nodes": 3, "edges": [], "signs": [], "city": "Milan", "key": "x"})),
    (None, "start_place is missing"), ([], "start_place is missing"), (3, "start_place is missing")]


@pytest.mark.parametrize("route, field", DAMAGED)
def test_damaged_route_is_named_with_its_field(saved, route, field):
    path = saved([[entry(), route, entry()], 3])
    with pytest.raises(ValueError) as error:
        official_file.read_routes(path)
    assert re.match(f"{re.escape(path)}: route 1: {field}", str(error.value)), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("name, change, row", [
    ("city", lambda _: "Atlantis", ""), ("city", lambda _: ["Milan"], ""),
    ("city", lambda _: None, ""), ("key", lambda _: 5, ""),
    ("key", lambda _: "\ud800", ""), ("key", lambda _: None, ""), ("nodes", lambda _: 3, ""),
    ("edges", lambda _: "01", ""), ("signs", lambda _: {}, ""),
    *(("nodes", lambda old, row=row: [row, *old[1:]], r"\[0\]") for row in (
        ["a", "b"], [1], [1, 2, 3], [float("nan"), 0], [0, float("inf")], [True, 0],
        [10 ** 400, 0], None, 7, "12", {"x": 1})),
    ("nodes", lambda old: [old[1], old[1], *old[2:]], ""), ("nodes", lambda old: old[:-1], ""),
    *(("edges", lambda old, row=row: [row, *old], r"\[0\]") for row in (
        [0, 49], [-1, 0], [0], [0, 0], [0, 1, 2], [0.0, 1], [False, 1], ["0", 1], [[0], 1], 1,
        None)),
    *(("signs", lambda old, row=row: [row, *old], r"\[0\]") for row in (
        ["0", 0, "Blue Cafe", "Cafe"], [0, float("nan"), "Blue Cafe", "Cafe"],
        [0, 0, "Blue Cafe", "Castle"], [0, 0, 7, "Cafe"],
        [0, 0, "Blue\nCafe", "Cafe"], [0, 0, "Blue Cafe", ["Cafe"]], [0, 0, "Blue Cafe"],
        [0, 0, "x" * 10_000, "Cafe"], "0", None))])
def test_damaged_scene_is_named_before_it_is_drawn(saved, name, change, row):
    route = json.loads(json.dumps(official("mini")[0]))
    route["synthetic"][name] = change(route["synthetic"][name])
    named = "(nodes|edges)" if name == "nodes" and not row else name
    with pytest.raises(ValueError, match=rf"^\S*: route 0: synthetic\.{named}{row or '.*'} "):
        official_file.read_routes(saved([route]))
    del route["synthetic"][name]
    with pytest.raises(ValueError, match=f"^.*: route 0: synthetic.{name} is missing"):
        official_file.read_routes(saved([route]))


@pytest.mark.parametrize("content",
                         ["", "{", "[" * 100_000, "\0", '{"routes": []}', "[]", "[[], 0]", "3",
                          "null", '"x"', "[" + "9" * 5000])
def test_file_without_routes_is_named(saved, content):
    path = saved(content)
    with pytest.raises(ValueError,
                       match=f"^{re.escape(path)}: (is not JSON|holds no list of routes)$"):
        official_file.read_routes(path)


def test_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
            official_file.read_routes(str(path))
    (tmp_path / "latin").write_bytes(b"[\xff]")
    with pytest.raises(ValueError, match="latin: "):
        official_file.read_routes(str(tmp_path / "latin"))


# ---------------------------------------------------------------- real panoramas
# one panorama shows all of it
SHORT = entry([(29, 7, None), (299, 8, "The destination X Hall is on your left")])
# a pause at every fifth
FAR = entry([(90, 200, None), (0, 200, "The destination Town Hall is on your left")])
STOPS = [(0, 0), *((x, 0) for x in (40, 80, 120, 160, 200)),
         *((200, y) for y in (40, 80, 120, 160, 200))]


@pytest.fixture
def taken(tmp_path):
    """Makes Panoramas for FAR: number i stands 5 m north of STOPS[i]; each time in a folder of its
    own."""
    numbers = count()

    def make(miss=(), rows="", header="lat,lng,pano_id", spoil=lambda folder: None):
        folder = tmp_path / f"panoramas{next(numbers)}"
        folder.mkdir()
        lines = [header]
        for i, (x, y) in enumerate(STOPS):
            if i not in miss:
                lines.append("{},{},pano_-{}".format(*geocode(40.7, -74.0, x, y + 5), i))
            Image.new("RGB", (64, 32), (20 * i, 0, 200)).save(folder / f"pano_-{i}.jpg")
            metadata = json.dumps({"rotation": 10 * i + 0.5, "x": 1})
            (folder / f"pano_-{i}.metadata.json").write_text(metadata)
        (folder / "panoramas.csv").write_text("\n".join(lines) + "\n" + rows)
        spoil(folder)
        return panoramas.Panoramas(str(folder), [official_file.read_route(FAR, "far.json|7")])

    return make


def test_nearest_panorama_is_turned_to_the_heading(taken, monkeypatch):
    made = []
    monkeypatch.setattr(panoramas, "panorama_views", lambda picture,
                        *rest: made.append((round(picture.getpixel((5, 5))[0] / 20), *rest)))
    real, route = taken(), official_file.read_route(FAR, "")
    for place in STOPS:
        real.view(route, place, 75, 64)
    assert [(i, yaw % 360, size) for i, yaw, size in made] == [
        (i, (75 - 180 + 10 * i + 0.5) % 360, 64) for i in range(11)]


def test_snapping_reaches_20_metres(taken):
    for i in (0, 2, 5, 10):
        for north, east in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.6, 0.8), (-0.8, -0.6)):
            x, y = STOPS[i]
            near, far = (geocode(40.7, -74.0, x + away * east, y + away * north)
                         for away in (19.5, 20.5))
            taken(miss=[i], rows="{},{},pano_-0\n".format(*near))
            with pytest.raises(ValueError, match="has none within 20 m"):
                taken(miss=[i], rows="{},{},pano_-0\n".format(*far))


@pytest.mark.parametrize("i", range(11))
def test_every_place_of_a_walk_needs_a_whole_panorama_from_the_start(taken, i):
    place = r"^panoramas: route far.json\|7: ([-\d.]+), ([-\d.]+)"
    with pytest.raises(ValueError, match=place + r" has none within 20 m$") as error:
        taken(miss=[i])
    named = [float(degrees) for degrees in re.match(place, str(error.value)).groups()]
    assert named == pytest.approx(geocode(40.7, -74.0, *STOPS[i]), abs=3e-6)
    for suffix, broken in ((".jpg", None), (".jpg", "no picture"), (".metadata.json", None),
                           (".metadata.json", "{"), (".metadata.json", "[]"),
                           (".metadata.json", "{}"), (".metadata.json", "[" * 100_000),
                           *((".metadata.json", f'{{"rotation": {v}}}')
                             for v in ("null", '"x"', "NaN", "Infinity", "true", "1" + "0" * 400))):
        def spoil(folder, suffix=suffix, broken=broken):
            path = folder / f"pano_-{i}{suffix}"
            path.unlink() if broken is None else path.write_text(broken)

        with pytest.raises(ValueError, match=place + f": .*pano_-{i}") as error:
            taken(spoil=spoil)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, problem", [
    (dict(rows="1,2,../x\n"), "pano_id '../x'"), (dict(rows="1,2,a/b\n"), "pano_id 'a/b'"),
    (dict(rows="1,2,é\n"), "pano_id"),
    (dict(rows="1,2,\n"), "pano_id ''"), (dict(rows="1,2\n"), ""),
    (dict(rows="95,2,a\n"), "row of a"), (dict(rows="nan,2,a\n"), "row of a"),
    (dict(rows="x,2,a\n"), "'x'"), (dict(miss=range(11)), "has no rows"),
    (dict(header="a,b,c"), "pano_id"),
    (dict(spoil=lambda folder: (folder / "panoramas.csv").unlink()), "No such file")])
def test_damaged_table_of_panoramas_is_named(taken, options, problem):
    with pytest.raises(ValueError, match="^panoramas: .*panoramas.csv") as error:
        taken(**options)
    assert problem in str(error.value)


def test_panorama_that_breaks_later_is_named(taken):
    real = taken()
    picture = real.folder / "pano_-0.jpg"
    picture.write_bytes(picture.read_bytes()[:300])
    with pytest.raises(ValueError, match="^panoramas: .*pano_-0.jpg: "):
        real.view(official_file.read_route(FAR, ""), (0, 0), 0, 64)


@pytest.mark.parametrize("heading, rotation",
                         [(0, 0), (0, 90), (90, 0), (37, 0), (300, 123.5), (359, 270), (180, 1)])
def test_real_views_look_front_right_back_and_left(tmp_path, heading, rotation):
    """Each column of the picture is coloured by its compass bearing; the middle of each view shows
    the right one."""
    picture = Image.new("RGB", (720, 360))
    for x in range(720):
        # official street_view.py: the view at a heading looks to this angle right of the middle
        right_of_middle = ((x + 0.5) / 720 - 0.5) * 360  # = heading - 180 + rotation
        east, north = vector(right_of_middle + 180 - rotation)
        picture.paste((round(128 + 100 * east), round(128 + 100 * north), 128), (x, 0, x + 1, 360))
    picture.save(tmp_path / "a.jpg", quality=95, subsampling=0)
    (tmp_path / "a.metadata.json").write_text(json.dumps({"rotation": rotation}))
    (tmp_path / "panoramas.csv").write_text("lat,lng,pano_id\n40.7,-74.0,a\n")
    route = official_file.read_route(SHORT, "")
    view = panoramas.Panoramas(tmp_path, [route]).view(route, (0, 0), heading, 260)
    assert view.size == (260, 260) and view.mode == "RGB"
    # front, right; back, left
    for k, (x, y) in enumerate(((65, 65), (195, 65), (65, 195), (195, 195))):
        red, green, _ = view.getpixel((x, y))
        bearing = math.degrees(math.atan2(red - 128, green - 128))
        assert degrees_apart(bearing, heading + (0, 90, 180, 270)[k]) < 4


# ---------------------------------------------------------------- the official mapping of panoramas
@pytest.fixture
def downloaded(tmp_path):
    """The official layout for SHORT: route_infos.json, gps_pano_mapping.pkl, street_views/."""
    pictures = tmp_path / "VLN mini" / "street_views"
    pictures.mkdir(parents=True)
    Image.new("RGB", (64, 32)).save(pictures / "a-_1.jpg")
    (pictures / "a-_1.metadata.json").write_text('{"rotation": 75.5}')
    (pictures.parent / "route_infos.json").write_text(json.dumps([[SHORT], 1]))
    with open(pictures.parent / "gps_pano_mapping.pkl", "wb") as file:
        pickle.dump({(40.7, -74.0): "a-_1", (40.8, -74.1): "b"}, file)
    return pictures.parent


@pytest.fixture
def convert(capsys):
    """Runs the tool in this process; returns (exit status, stdout, stderr)."""
    def run(*arguments):
        return panoramas_csv.main(list(map(str, arguments))), *capsys.readouterr()

    return run


def test_official_layout_is_told_what_to_do_and_it_works(downloaded):
    """The command of the message makes the file, the folder of the message is accepted."""
    route = official_file.read_routes(str(downloaded / "route_infos.json"))
    for given in (downloaded, downloaded / "street_views"):
        with pytest.raises(ValueError, match="^panoramas: .*panoramas.csv: .*No such") as error:
            panoramas.Panoramas(given, route)
        assert "\n" not in str(error.value)
        told = re.search("`python (.*)` .* env.panoramas=(.*)$", str(error.value))
        command, folder = [sys.executable, *shlex.split(told[1])], told[2]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"2 panoramas in {folder}/panoramas.csv" in done.stdout
        assert panoramas.Panoramas(folder, route).rotations == {"a-_1": 75.5}
        (downloaded / "street_views" / "panoramas.csv").unlink()


class Malice:
    """Unpickled by `pickle`, it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_that_would_run_code_is_refused(downloaded, convert, protocol):
    mapping, mark = downloaded / "gps_pano_mapping.pkl", downloaded.parent / "it_ran"
    for payload in (Malice(mark), {(40.7, -74.0): Malice(mark)}, {Malice(mark): "a"}):
        mapping.write_bytes(pickle.dumps(payload, protocol))
        status, out, error = convert(mapping, downloaded / "street_views")
        assert (status, out, error.count("\n")) == (2, "", 1)
        assert "asks for posix.system; only plain containers" in error
        assert not mark.exists() and not (downloaded / "street_views" / "panoramas.csv").exists()
    pickle.loads(mapping.read_bytes())
    assert mark.exists()  # it would have


@pytest.mark.parametrize("content", [
    b"", b"no pickle", b"\x80\x05", pickle.dumps({(1, 2): "a"})[:-3], pickle.dumps([1]),
    pickle.dumps({}), pickle.dumps({(1, 2): 3}), pickle.dumps({(91, 2): "a"}),
    pickle.dumps({"1,2": "a"}), pickle.dumps({(float("nan"), 2): "a"}),
    pickle.dumps({(1, 2): {"a"}}),
    b"cbuiltins\neval\n(S'1'\ntR.", b"\x80\x02\x82\x01.", b"Pid\n."], ids=range(14))
def test_damaged_mapping_is_named(downloaded, convert, content):
    mapping = downloaded / "gps_pano_mapping.pkl"
    mapping.write_bytes(content)
    status, out, error = convert(mapping, downloaded / "street_views")
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"error: {mapping}: ")


def test_mapping_or_folder_that_is_not_there_is_named(downloaded, convert):
    for arguments in ((downloaded / "none.pkl", downloaded),
                      (downloaded / "gps_pano_mapping.pkl", downloaded / "none")):
        status, out, error = convert(*arguments)
        assert (status, out, error.count("\n")) == (2, "", 1)
        assert re.match(r"error: \S.*none.*: No such file or directory$", error)
