"""The panoramas.csv that `env.panoramas` needs, from the official gps_pano_mapping.pkl.

    python tools/panoramas_csv.py VLN_mini/gps_pano_mapping.pkl VLN_mini/street_views

The second argument is the folder of the pictures; the file is written there. A pickle is a program
that may do anything, so it is read by an unpickler that accepts plain containers, numbers and texts
alone.
"""
import argparse
import csv
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.errors import one_line
from scenery.official import checked_geocode, refuse_unless


class PlainUnpickler(pickle.Unpickler):
    """Refuses everything that a pickle takes from a module: classes, functions, and so all code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"asks for {module}.{name}; only plain containers, numbers "
                                     "and texts are read")


def read_mapping(path):
    """[(latitude, longitude, pano_id)] of a pickled {(latitude, longitude): pano_id}.

    Raises: OSError; ValueError naming the file and what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            mapping = PlainUnpickler(file).load()
        refuse_unless(isinstance(mapping, dict) and mapping,
                      "holds no {(latitude, longitude): pano_id}")
        spots = []
        for place, name in mapping.items():
            refuse_unless(isinstance(name, str), f"the pano_id {name!r} is no text")
            spots.append((*checked_geocode(place, repr(place)), name))
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise any
        raise ValueError(f"{path}: {one_line(error)}") from None
    return spots


def main(arguments):
    """Write the CSV. arguments: of the command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mapping", type=Path, help="gps_pano_mapping.pkl")
    parser.add_argument("pictures", type=Path, help="the folder of the panoramas, street_views")
    given = parser.parse_args(arguments)
    table = given.pictures / "panoramas.csv"
    try:
        spots = read_mapping(given.mapping)
        with open(table, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("lat", "lng", "pano_id"), *spots])
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(spots)} panoramas in {table}: give env.panoramas={given.pictures}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
