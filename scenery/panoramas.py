"""Real street views along the routes of an official file, from a folder of panoramas.

Nothing is ever fetched.
"""
import csv
import itertools
from bisect import bisect_left
import json
import math
import re
import shlex
from functools import lru_cache
from pathlib import Path

from PIL import Image

from scenery.official import METRES, checked_geocode, geocode, get_field, is_number, read_routes
from scenery.official import refuse_unless
from scenery.streets import grid, view_size

NEAREST = 20  # metres within which a panorama stands for a place
CELLS = 12  # per side of a view, within which the projection is bilinear


def panorama_views(panorama, yaw, size):
    """[front, right; back, left] out of an equirectangular panorama, as `street_views` does.

    Args:
        panorama: RGB image of 360 x 180 degrees.
        yaw: degrees from its middle, clockwise, to the front.
        size: pixels. Each of the four views is 90 degrees wide, as in the original.
    """
    tile = view_size(size)
    twice = Image.new("RGB", (2 * panorama.width, panorama.height))  # so no cell crosses the seam
    twice.paste(panorama, (0, 0))
    twice.paste(panorama, (panorama.width, 0))
    edges = [round(k * tile / CELLS) for k in range(CELLS + 1)]
    views = []
    for turn in (0, 90, 180, 270):
        mesh = []
        for i, j in itertools.product(range(CELLS), repeat=2):
            box = (edges[i], edges[j], edges[i + 1], edges[j + 1])
            corners = ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j))
            quad = [_source(panorama, yaw + turn, *corner) for corner in corners]
            mesh.append((box, tuple(itertools.chain(*quad))))
        how = Image.Transform.MESH, mesh, Image.Resampling.BILINEAR
        views.append(twice.transform((tile, tile), *how))
    return grid(views, size)


def _source(panorama, yaw, column, row):
    """Where in a panorama the corner of a cell lies, pixels."""
    right, up = 2 * column / CELLS - 1, 1 - 2 * row / CELLS  # on the plane one ahead
    middle = (0.5 + yaw / 360 % 1) * panorama.width
    x = middle + math.degrees(math.atan2(right, 1)) / 360 * panorama.width
    elevation = math.degrees(math.atan2(up, math.hypot(1, right)))
    return x, (0.5 - elevation / 180) * panorama.height


def _globe(lat, lng):
    """(z, x, y) metres from the middle of the Earth, z towards the north pole."""
    lat, lng, radius = math.radians(lat), math.radians(lng), METRES * 180 / math.pi
    around = radius * math.cos(lat)
    return radius * math.sin(lat), around * math.cos(lng), around * math.sin(lng)


class Panoramas:
    """Panoramas and which of them stands for a place.

    The folder holds panoramas.csv (lat, lng, pano_id), <pano_id>.jpg (equirectangular) and
    <pano_id>.metadata.json, by whose "rotation" the view at a heading looks heading - 180 +
    rotation degrees clockwise from the picture's middle (official street_view.py).

    Raises: ValueError naming the file and what is wrong with it, or the route and the place that
    has no panorama.
    """

    def __init__(self, folder, routes):
        self.folder = Path(folder)
        self.rotations = {}  # {pano_id: degrees}
        table = self.folder / "panoramas.csv"
        try:
            with open(table, newline="", encoding="utf-8") as file:
                spots = [self._spot(row) for row in csv.DictReader(file)]
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or error
            advice = "" if table.exists() else self._advice()
            raise ValueError(f"panoramas: {table}: {reason}{advice}") from None
        refuse_unless(spots, f"panoramas: {table} has no rows")
        self.spots = sorted(spots)  # (on the globe, pano_id), from south to north
        for route in routes:
            for place in route.places():
                self._find(route, place)

    def _advice(self):
        """How to make panoramas.csv, where the official mapping lies here or one folder up."""
        for folder in (self.folder, self.folder.parent):
            mapping, pictures = folder / "gps_pano_mapping.pkl", folder / "street_views"
            if mapping.exists():
                tool = ["python", "tools/panoramas_csv.py", str(mapping), str(pictures)]
                command = shlex.join(tool)
                return (f"; `{command}` makes it of the official mapping: then give "
                        f"env.panoramas={pictures}")
        return ""

    def _spot(self, row):
        """Where the panorama of a row of panoramas.csv was taken, and its pano_id."""
        name = row["pano_id"]
        refuse_unless(re.fullmatch(r"[\w-]+", name, re.ASCII),
                      f"pano_id {name!r} may hold letters, digits, _ and - only")
        place = [float(row["lat"]), float(row["lng"])]
        return _globe(*checked_geocode(place, f"row of {name}")), name

    def _find(self, route, place):
        """The panorama nearest to a place of a route; its files are read when it is first found."""
        lat, lng = geocode(route.start, place)
        where = f"panoramas: route {route.key}: {lat:.6f}, {lng:.6f}"
        here = _globe(lat, lng)
        first = bisect_left(self.spots, ((here[0] - NEAREST,),))
        last = bisect_left(self.spots, ((here[0] + NEAREST + 1,),))
        near = [(math.dist(spot, here), name) for spot, name in self.spots[first:last]]
        away, name = min(near, default=(math.inf, None))
        refuse_unless(away <= NEAREST, f"{where} has none within {NEAREST} m")
        if name not in self.rotations:
            path = self.folder / name
            try:
                text = path.with_suffix(".metadata.json").read_text(encoding="utf-8")
                rotation = get_field(json.loads(text), "rotation")
                refuse_unless(is_number(rotation),
                              f"rotation {rotation!r} is not a number of degrees")
                Image.open(path.with_suffix(".jpg")).close()
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {path}: {error}") from None
            self.rotations[name] = rotation
        return name

    def view(self, route, place, heading, size):
        """The 2x2 street view at a place of a route, from the panorama nearest to it.

        Args: place: (x, y), metres from the route's start; heading: degrees; size: pixels.
        """
        name = self._find(route, place)
        try:
            with Image.open(self.folder / f"{name}.jpg") as picture:
                yaw = heading - 180 + self.rotations[name]
                return panorama_views(picture.convert("RGB"), yaw, size)
        except (OSError, ValueError) as error:
            raise ValueError(f"panoramas: {self.folder / name}.jpg: {error}") from None


@lru_cache(maxsize=4)
def panoramas_of(folder, path):
    """The Panoramas for the routes of a file, checked once for all environments."""
    return Panoramas(folder, read_routes(path))
