"""What is measured of episodes played: metrics, paired differences, points on curves, each with its
interval. eval.py plays them and writes what comes out (lib/results.py).

An episode is {cluster, training: its Seed, counts: {metric: (right, of)}, grades}: see
rollout.counts and rollout.grades. Pure: no model, no files.
"""
from collections import Counter
from itertools import chain, product
from typing import NamedTuple

import torch

from lib.bootstrap import difference, gap_along, measure, value
from lib.results import Nucleus, Point


# ---------------------------------------------------------------- shares and their intervals
def columns(episodes, categories=()):
    """{metric: n pairs (right, of)} of n episodes; (0, 0) where one never met the metric.

    With the metrics "first CATEGORY": (first attempts so graded, first attempts).
    """
    found = {}
    for i, episode in enumerate(episodes):
        for metric, pair in episode["counts"].items():
            found.setdefault(metric, [(0, 0)] * len(episodes))[i] = pair
    for category, episode in product(categories, episodes):
        first = episode["grades"]["first"]
        pair = first.get(category, 0), sum(first.values())
        found.setdefault(f"first {category}", []).append(pair)
    return found


def measured_over(counts, episodes, statistic):
    """The Measured of counts (n, K, 2) of n episodes, in the unit of right / of."""
    clusters = [episode["cluster"] for episode in episodes]
    seeds = [episode["training"] for episode in episodes]
    return measure(counts, clusters, seeds, statistic)


def in_percent(counts, episodes, statistic):
    """The same in % or points."""
    percent = counts * torch.tensor([100, 1])  # (right, of): a right one counts 100
    return measured_over(percent, episodes, statistic)


def stacked(cells, metric):
    """(n, K, 2) float: what n episodes count for a metric in each of K cells of `columns`."""
    return torch.tensor([cell[metric] for cell in cells]).float().transpose(0, 1)


def measured(episodes, base=None):
    """Metrics of an arm's episodes, or of the difference to a base's same ones, and how their first
    attempts were graded.

    Returns: {metrics: {name: Estimate}, per_seed: {name: values of the seeds}} in % (points).
    """
    arms = [episodes] if base is None else [episodes, base]
    categories = set()
    for episode in chain(*arms):
        categories.update(episode["grades"]["first"])
    cells = [columns(arm, sorted(categories)) for arm in arms]
    statistic = value if base is None else difference
    row = {"metrics": {}, "per_seed": {}}
    for metric in cells[0]:
        if metric in cells[-1]:
            found = in_percent(stacked(cells, metric), episodes, statistic)
            if found.estimate is not None:  # one of several seeds alone knows it
                row["metrics"][metric], row["per_seed"][metric] = found
    return row


def grade_shares(episodes):
    """How an arm's answers were graded, in %, see lib/results.py."""
    shares, answers = {}, {}
    for kind in ("first", "retries"):
        total = Counter()
        for episode in episodes:
            total.update(episode["grades"][kind])
        answers[kind] = total.total()
        shares[kind] = {name: 100 * n / answers[kind] for name, n in total.most_common()}
    repeated = sum(episode["grades"]["repeated"] for episode in episodes)
    shares["repeated"] = 100 * repeated / max(1, answers["retries"])
    return shares


# ---------------------------------------------------------------- rows of the table
class Place(NamedTuple):
    """Where a cell stands in the table."""
    split: str
    variant: str  # of the environment
    arm: str  # or a reference policy
    temperature: float | Nucleus | None  # None: a reference policy, which samples nothing


def summarize(cells):
    """Rows of the table, see lib/results.py. Args: cells: {Place: episodes}."""
    rows = []
    for place, episodes in cells.items():
        rows.append({**place._asdict(), "n": len(episodes), **measured(episodes),
                     "grades": grade_shares(episodes)})
    return rows


def differences(cells, pairs):
    """Rows of paired differences, see lib/results.py.

    Args: cells: {Place: episodes}; pairs: list of (arm, base).
    """
    rows = []
    sampled = [place._replace(arm=None) for place in cells if place.temperature is not None]
    for place, (arm, base) in product(dict.fromkeys(sampled), pairs):
        found = measured(cells[place._replace(arm=arm)], cells[place._replace(arm=base)])
        rows.append({**place._asdict(), "arm": arm, "base": base, **found})
    return rows


# ---------------------------------------------------------------- curves
class Checkpoint(NamedTuple):
    """One of a training, or of several seeds' trainings at the same step, and what it played."""
    gflops: float  # mean
    episodes: list
    step: int = 0  # of the training; where PPO began 0
    from_init: list = ()  # with eval.kl, in the trained variant: episodes {"kl": (nats, answers)}


def point_of(checkpoint, lead):
    """The Point on a curve of the metric `lead`."""
    episodes = checkpoint.episodes
    cells = [columns(episodes)]
    leading = in_percent(stacked(cells, lead), episodes, value)
    recognized = in_percent(stacked(cells, "recognized"), episodes, value)
    per_seed = list(zip(leading.per_seed, recognized.per_seed))
    point = Point(checkpoint.gflops, *leading.estimate, recognized.estimate.value, per_seed,
                  checkpoint.step)
    if checkpoint.from_init:
        nats = stacked([columns(checkpoint.from_init)], "kl")
        point = point._replace(kl=measured_over(nats, checkpoint.from_init, value))
    return point


def above_curve(trained, other, metric):
    """How far an arm lies above a curve of SFT in another variant than the trained one.

    Args: trained, other: the curve's Checkpoints in the two variants, in order, and the arm's as
        the last. All have played the same episodes of a variant in the same order.
    Returns: as `measured`, in points, of "equal FLOPs", "equal ID" and "equal KL": where the curve
        first comes to the arm's compute, to its metric in the trained variant, and as far from
        Init; "equal KL, first attempt" is of first attempts, as the KL is. One that it never comes
        to, or that is not known, is left out.
    """
    gflops = torch.tensor([checkpoint.gflops for checkpoint in trained]).double()
    played = [checkpoint.episodes for checkpoint in trained]
    from_init = [checkpoint.from_init for checkpoint in trained]
    matched = {"equal FLOPs": (played, metric, gflops, metric),
               "equal ID": (played, metric, None, metric)}
    if all(from_init):
        matched["equal KL"] = from_init, "kl", None, metric
        matched["equal KL, first attempt"] = from_init, "kl", None, "first"
    shown = [checkpoint.episodes for checkpoint in other]
    row = {"metrics": {}, "per_seed": {}}
    for name, (cells, x_metric, x, y_metric) in matched.items():
        counts = halves(cells, x_metric, shown, y_metric)
        found = in_percent(counts, cells[0] + shown[0], gap_along(x))
        if found.estimate:
            row["metrics"][name], row["per_seed"][name] = found
    return row


def halves(first, first_metric, second, second_metric):
    """(n + m, 2 K, 2): what the n episodes of K cells count for one metric, in the first half, and
    the m episodes of K others for another, in the second; an episode counts (0, 0) in the half that
    it was not played in. Args: first, second: lists of K cells."""
    left = stacked([columns(cell) for cell in first], first_metric)  # (n, K, 2)
    right = stacked([columns(cell) for cell in second], second_metric)  # (m, K, 2)
    counts = torch.zeros(len(left) + len(right), 2, len(first), 2)
    counts[:len(left), 0], counts[len(left):, 1] = left, right
    return counts.flatten(1, 2)
