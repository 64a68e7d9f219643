"""What evaluation.json is made of: eval.py writes it, report.py reads it. No torch in this file.

    reports                    what the environment wants shown: {name, title, metrics} each
    splits, variants           episodes per run and split (or what is played whatever the split);
                               changes of the environment per variant
    temperatures, curve_n      sampled at, [T, top_p] where truncated; episodes per run and point of
                               a curve
    gflops, official_gflops    {arm: model GFLOPs of its checkpoint in the table, mean over runs},
                               counted our way and as the official code does (null: not known)
    notes                      lines that the table must not be read without: compute that is not
                               equal, arms that were trained on what is played
    table                      rows {split, variant, arm, temperature, n, metrics: {name: Estimate},
                               per_seed: {name: a value per seed}} in %, the seeds pooled in
                               `metrics`, with "first CATEGORY", how first attempts were graded; of
                               a reference policy the temperature is null; grades:
                               {first, retries: {category: % of these answers}, repeated: % of
                               the retries, word for word as an earlier answer there}
    differences                rows {split, variant, temperature, arm, base, metrics, per_seed} in
                               points
    curves                     {variant: {Init or training: [Point]}}, at the first split and
                               temperature
    frontier                   rows {variant, arm, base, metrics, per_seed}: how far PPO's last
                               checkpoint lies above the curve of an SFT training, in points, where
                               that comes to its compute ("equal FLOPs"), to what it reaches in
                               the first variant ("equal ID") and, with eval.kl, as far from Init
                               ("equal KL", and of first attempts alone)
    transcripts                {arm, variant, episodes: [[rollout.transcript]]}, if wanted
    runs, seeds, minutes       run folders, their seeds (each once), minutes per training
    commit, machine, versions  where and with what it was measured
    trained_at                 {training: commits of the code that trained it}
"""
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import yaml

from lib.errors import UserError
from lib.settings import ROOT


class Estimate(NamedTuple):
    """A ratio in %, or a difference in points, with its 95 % interval (lib/bootstrap.py)."""
    value: float
    low: float
    high: float

    @property
    def half_width(self):
        return (self.high - self.low) / 2


class Report(NamedTuple):
    """A block of the table: metrics of `rollout.counts` side by side, and their title."""
    name: str
    title: str
    metrics: list

    @property
    def lead(self):
        """The metric that carries the interval, the paired differences and the curves."""
        return self.metrics[-1]


class Point(NamedTuple):
    """A checkpoint on a curve: model GFLOPs, the leading metric and recognition, both in %."""
    gflops: float
    value: float
    low: float
    high: float
    recognition: float
    per_seed: list = ()  # (metric, recognition) of each
    step: int | None = None  # of the training; where PPO began 0; older files lack it
    kl: list | None = None  # KL(Init || it), nats per first answer: [Estimate, of each seed]


class Nucleus(NamedTuple):
    """In place of a temperature: at T, of the fewest likeliest tokens that have top_p together."""
    T: float
    top_p: float


def temperature_name(temperature):
    if isinstance(temperature, Nucleus):
        return f"T = {temperature.T:g}, top-p {temperature.top_p:g}"
    return f"T = {temperature:g}" if temperature else "greedy"


def rate_of_init(results):
    """sft.lr of the shipped YAML, by which Init is made, as 1e-3; "" where that is not known."""
    shipped = getattr(results, "settings", {}).get("shipped")
    if shipped is None:
        return ""
    rate = yaml.safe_load((ROOT / shipped).read_text(encoding="utf-8"))["sft"]["lr"]
    digits, exponent = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


# ---------------------------------------------------------------- read
def read(path):
    """What an evaluation.json holds, by attributes; its lists are the classes above.

    Raises: UserError if there is no such file, or one of an older version.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"), object_hook=as_class)
    except (OSError, ValueError):
        raise UserError(f"cannot read {path}: run eval.py first") from None
    if "reports" not in stored:
        raise UserError(f"{path} is of an older version: run eval.py again")
    stored["temperatures"] = [as_temperature(one) for one in stored["temperatures"]]
    for arms in stored["curves"].values():
        for arm, points in arms.items():
            arms[arm] = [as_point(numbers) for numbers in points]
    older = {"transcripts": [], "notes": [], "frontier": [], "official_gflops": {}}
    return SimpleNamespace(**{**older, **stored})


def as_class(stored):
    """A JSON object: a Report, or what it was, the metrics of a row as Estimates."""
    if "title" in stored:
        return Report(**stored)
    if "temperature" in stored:
        stored["temperature"] = as_temperature(stored["temperature"])
    for name, numbers in stored.get("metrics", {}).items():
        stored["metrics"][name] = Estimate(*numbers)
        stored.setdefault("per_seed", {}).setdefault(name, [])  # older files lack them
    return stored


def as_point(stored):
    point = Point(*stored)
    if point.kl is None:
        return point
    estimate, per_seed = point.kl
    return point._replace(kl=(Estimate(*estimate), per_seed))


def as_temperature(stored):
    return Nucleus(*stored) if isinstance(stored, list) else stored


def names_one(note, arms):
    """Whether a note speaks of one of some arms."""
    words = re.findall(r"[\w=.-]+", note)
    return not arms.isdisjoint(words)
