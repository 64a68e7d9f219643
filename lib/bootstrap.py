"""Intervals that count the luck of the training runs and that of the problems. Pure tensors.

The unit is the training run (its seed). Every seed's arms play the same problems, in clusters: the
hands of the same card values, the walks along the same route. So the design is crossed, seeds x
clusters, and both are a sample: another training would come out otherwise, and so would other
hands. Drawing clusters anew within each seed would take the shared hands for independent ones.
Therefore whole seeds are drawn with replacement and whole clusters are, each with all that belongs
to it; every arm keeps its episodes, so that differences stay paired (the pigeonhole bootstrap:
Owen, Annals of Applied Statistics 2007).

Percentiles of that are too narrow for a few seeds: S of them show S - 1 of S parts of their
variance, and S numbers do not show their own tails (Hesterberg, The American Statistician 2015).
So each factor is drawn alone for its variance, that of seeds is enlarged by S / (S - 1), and the
interval is value +- t(f) sqrt(V_seeds + V_clusters), Student's t at Satterthwaite's f degrees of
freedom (Biometrics Bulletin 1946): S - 1 where the seeds decide, many where the clusters do. The
noise of single answers is in both variances, which is on the safe side. tests/test_eval.py has the
coverage. One seed tells nothing of others: then the interval is the percentiles over clusters.
"""
import math
from functools import cache
from typing import NamedTuple

import torch

from lib.results import Estimate
from lib.student import student_t

RESAMPLES = 2000


@cache
def draws(groups, resamples=RESAMPLES, seed=0):
    """(resamples, groups): how often each group occurs when as many are drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(groups, (resamples, groups), generator=generator)
    counts = torch.zeros(resamples, groups)
    return counts.scatter_add_(1, drawn, torch.ones(resamples, groups))


def sums_by(labels, counts):
    """(groups, K, 2): counts (n, K, 2) summed over those of one label, in order of appearance."""
    numbers = {}  # label -> its number
    index = torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])  # (n,)
    return counts.new_zeros(len(numbers), *counts.shape[1:]).index_add(0, index, counts)


def ratios(sums, weights):
    """(R, K) double: right / of of K cells under each row of weights (R, groups)."""
    right, of = torch.einsum("rg,gkx->xrk", weights, sums).double()
    return right / of


# ---------------------------------------------------------------- what is measured of K cells
def value(shares):
    """(R,) of shares (R, 1)."""
    return shares[:, 0]


def difference(shares):
    """(R,) of shares (R, 2): an arm and its base."""
    return shares[:, 0] - shares[:, 1]


def gap_along(x_of=None):
    """The statistic of how far one arm lies above a curve of k checkpoints where that first comes
    to the arm's x, on the straight lines between its points in the order of training.

    Args: x_of: (k + 1,) the x of the checkpoints and of the arm, last; None: their first shares.
    Returns: function of shares (R, 2 (k + 1)), the arm last in each half, to (R,): the second share
        of the arm less that of the curve; NaN where the curve does not come to the arm's x.
    """
    def statistic(shares):
        first, second = shares.chunk(2, 1)  # (R, k + 1) each
        x = first if x_of is None else x_of.expand_as(first)
        return second[:, -1] - curve_at(x[:, :-1], second[:, :-1], x[:, -1:])
    return statistic


def curve_at(x, y, at):
    """(R,) y of curves (R, k) where they first come to x = at (R, 1), NaN where they never do."""
    ahead = x - at  # (R, k)
    comes = ahead[:, :-1] * ahead[:, 1:] <= 0  # (R, k - 1) between a point and the next
    first = comes.int().argmax(1, keepdim=True)
    before, after = ahead.gather(1, first), ahead.gather(1, first + 1)
    way = before / (before - after)
    way = way.nan_to_num(0)  # 0 / 0: both ends are there
    start, end = y.gather(1, first), y.gather(1, first + 1)
    found = start + way * (end - start)  # (R, 1)
    known = comes.any(1, keepdim=True)
    return found.where(known, torch.nan).squeeze(1)


# ---------------------------------------------------------------- with its interval
class Measured(NamedTuple):
    estimate: Estimate  # None where there is nothing to measure
    per_seed: list  # of each seed alone, None where nothing was asked


def measure(counts, clusters, seeds, statistic):
    """A statistic of n episodes in K cells with its 95 % interval.

    Args:
        counts: (n, K, 2) float, right and of; a cell's share is the ratio of their sums.
        clusters, seeds: n labels each.
        statistic: function of shares (R, K) that returns (R,), NaN where it has no value; such
            resamples do not count.
    Returns: Measured, in the unit of the statistic.
    """
    by_cluster = sums_by(clusters, counts)
    by_seed = sums_by(seeds, counts)
    together = torch.ones(1, len(by_seed))
    pooled = statistic(ratios(by_seed, together)).item()
    alone = torch.eye(len(by_seed))
    each = statistic(ratios(by_seed, alone)).tolist()
    per_seed = [None if math.isnan(one) else one for one in each]
    known = len(by_seed) - per_seed.count(None)
    if math.isnan(pooled) or known < 2 <= len(by_seed):  # so few of several tell no spread
        return Measured(None, per_seed)
    over_clusters = _known(statistic(ratios(by_cluster, draws(len(by_cluster)))))
    if known < 2:
        tails = over_clusters.new_tensor([0.025, 0.975])
        low, high = over_clusters.quantile(tails).tolist()
        return Measured(Estimate(pooled, low, high), per_seed)
    over_seeds = _known(statistic(ratios(by_seed, draws(len(by_seed)))))
    of_seeds = over_seeds.var(correction=0).item() * known / (known - 1)
    of_clusters = over_clusters.var(correction=0).item()
    half = half_width(of_seeds, known, of_clusters, len(by_cluster))
    return Measured(Estimate(pooled, pooled - half, pooled + half), per_seed)


def half_width(of_seeds, seeds, of_clusters, clusters):
    """Half a 95 % interval from the variances that so many seeds and clusters cause."""
    total = of_seeds + of_clusters
    if total == 0:
        return 0.0
    rest = of_seeds ** 2 / (seeds - 1) + of_clusters ** 2 / max(1, clusters - 1)
    return student_t(total ** 2 / rest) * total ** 0.5


def _known(values):
    return values[~values.isnan()]
