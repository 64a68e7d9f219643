"""What an evaluation says about a finding, by the rule that findings.yaml writes down. No torch.

A line of a finding: {at: [evaluation, split, variant, metric], says: "a > b", paper: a - b}. a and
b are names of arms; b may be a number, or where a began: Init or, where that is not the usual Init,
start. The interval is that of evaluation.json (lib/results.py), at its first temperature.
"""
from typing import NamedTuple

from lib.checks import check_settings, choice, fields, list_of, number, text
from lib.results import Estimate

SHOWN, NOT_SHOWN, OTHER_WAY, MISSING = "shown", "not shown", "the other way", "not measured"
PLACE = list_of(text, 4)
BEGAN = ("Init", "start")  # in a sentence: where an arm began


def sentence(value):
    """A comparison: "a > b" or "a < b"."""
    words = text(value).split()
    if len(words) != 3:
        raise ValueError(f"{value!r} is not 'a > b' or 'a < b'")
    left, sign, right = words
    choice("<", ">")(sign)
    if "/" not in left:
        raise ValueError(f"{value!r}: {left!r} is not the name of an arm")
    if not ("/" in right or right in BEGAN or is_number(right)):
        raise ValueError(f"{value!r}: {right!r} is not an arm, a number, {' or '.join(BEGAN)}")
    return value


def line(value):
    """A line of a finding."""
    clean = check_settings(value, {"at": PLACE, "says": sentence, "paper": number()})
    for key in ("at", "says"):
        if key not in clean:
            raise ValueError(f"{value!r} has no {key}")
    return clean


PROVIDED = {"at": PLACE, "start_of": text, "at_most": number(0), "of_start_of": text}
FINDING = {"name": text, "decides": list_of(line), "beside": list_of(line),
           "provided": fields(PROVIDED)}


class Found(NamedTuple):
    """What is measured of a line."""
    estimate: Estimate | None  # of a - b, points
    per_seed: list
    verdict: str


def verdict(estimate, sign):
    """Of one line: whether the interval excludes 0 on the side that the sign names."""
    if estimate is None:
        return MISSING
    if estimate.low > 0:
        return SHOWN if sign == ">" else OTHER_WAY
    if estimate.high < 0:
        return SHOWN if sign == "<" else OTHER_WAY
    return NOT_SHOWN


def verdict_of_all(verdicts, holds=True):
    """Of a finding, from those of the lines that decide; holds: what it is provided with."""
    if MISSING in verdicts:
        return MISSING
    if not holds:
        return NOT_SHOWN
    if OTHER_WAY in verdicts:
        return OTHER_WAY
    return SHOWN if set(verdicts) == {SHOWN} else NOT_SHOWN


# ---------------------------------------------------------------- read from evaluation.json
class Evaluation:
    """An evaluation.json (nested dicts) and how its arms are called there.

    Args: names: {name of an arm in findings.yaml: name of its folder}.
    """

    def __init__(self, written, names):
        self.written, self.names = written, names
        self.first = written["temperatures"][0]

    def found(self, line):
        """The Found of a line; its estimate is None if there is no such row or metric."""
        left, sign, right = line["says"].split()
        place, metric = line["at"][1:3], line["at"][3]
        row, turned = self._row(place, left, right)
        if row is None or metric not in row["metrics"]:
            return Found(None, [], MISSING)
        estimate, per_seed = Estimate(*row["metrics"][metric]), row["per_seed"][metric]
        if turned:
            estimate = Estimate(-estimate.value, -estimate.high, -estimate.low)
            per_seed = [None if one is None else -one for one in per_seed]
        if is_number(right):
            estimate = Estimate(*(bound - float(right) for bound in estimate))
            per_seed = [None if one is None else one - float(right) for one in per_seed]
        return Found(estimate, per_seed, verdict(estimate, sign))

    def _row(self, place, left, right):
        """(row, whether it has b - a instead of a - b); the arm's own if b is a number."""
        arm = self.names.get(left, left)
        base = "Init" if right in BEGAN else self.names.get(right, right)
        if is_number(right):
            return self._find("table", place, arm), False
        row = self._find("differences", place, arm, base)
        if row is None:
            return self._find("differences", place, base, arm), True
        return row, False

    def _find(self, kind, place, arm, base=None):
        for row in self.written[kind]:
            there = [row["split"], row["variant"], row["temperature"]]
            if there == [*place, self.first] and is_called(row["arm"], arm):
                if base is None or is_called(row["base"], base):
                    return row
        return None

    def holds(self, provided):
        """(Whether what a finding is provided with holds, the two values that say so)."""
        values = []
        for key in ("start_of", "of_start_of"):
            values.append(self._start_value(provided["at"], provided[key]))
        if None in values:
            return False, values
        return values[0] <= provided["at_most"] * values[1], values

    def _start_value(self, at, arm):
        """The metric, %, of where an arm began; None if it is not there."""
        row = self._find("differences", at[1:3], self.names[arm], "Init")
        start = row and self._find("table", at[1:3], row["base"])
        return start and start["metrics"][at[3]][0]

    def unequal(self, line):
        """A note if the two arms of a line have not spent the same, else None."""
        left, _, right = line["says"].split()
        gflops = [self.written["gflops"].get(self.names.get(arm)) for arm in (left, right)]
        if None in gflops or abs(gflops[0] / gflops[1] - 1) <= 0.05:
            return None
        return (f"{left} has spent {gflops[0]:,.0f} model GFLOPs, {right} {gflops[1]:,.0f}: not "
                "equal compute")


def is_called(name, wanted):
    """eval.py adds the checkpoint where one name would stand for several arms."""
    return name == wanted or name.startswith(f"{wanted} @ ")


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True
