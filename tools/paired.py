"""Paired difference of two checkpoints over the episodes that eval.py keeps of runs; no model.

    python tools/paired.py EARLIER LATER RUN [RUN ...] [--metric solved] [--where rule=face] [--n N]
                           [--temperature T]

EARLIER and LATER name trainings, folders of each run: of those of their checkpoints that N episodes
are kept of, the last one, or with :first behind the name the first one. Other conditions of the
environment (--where, such as the rule) must leave one variant. Prints LATER - EARLIER in points,
with the 95 % interval over runs and hands or routes (lib/bootstrap.py), and each run's.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.bootstrap import difference, measure
from lib.errors import UserError, run_main


def cells_of(run, options):
    """{checkpoint, as training/step_N: its episodes} of the wanted variant, in order of steps."""
    path, found = run / "evaluations.jsonl", {}
    if not path.exists():
        raise UserError(f"{path} is not there: run eval.py, or unpack results/episodes")
    wanted = dict(pair.split("=", 1) for pair in options.where)
    for line in path.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        checkpoint, _, env, _, temperature, *_ = cell["key"]
        if not isinstance(env, dict):  # of eval.kl
            continue
        fits = all(str(env.get(key)) == value for key, value in wanted.items())
        if fits and temperature == options.temperature and len(cell["episodes"]) == options.n:
            if checkpoint in found and found[checkpoint] != cell["episodes"]:
                raise UserError(f"{path}: several variants of {checkpoint}; choose by --where")
            found[checkpoint] = cell["episodes"]
    return dict(sorted(found.items(), key=lambda item: step_of(item[0])))


def step_of(checkpoint):
    step = checkpoint.rpartition("_")[2]
    return int(step) if step.isdigit() else -1  # a reference policy


def episodes_of(cells, name, run):
    """The name of the checkpoint that `name` means, and its episodes."""
    training, _, which = name.partition(":")
    there = [one for one in cells if one.rpartition("/")[0] == training]
    if not there:
        raise UserError(f"{run}: no checkpoint of {training} with so many episodes; there are "
                        f"{', '.join(cells)}")
    checkpoint = there[0 if which == "first" else -1]
    return checkpoint, cells[checkpoint]


def counted(episode, metric):
    """[right, of] of a metric, or of "a-b": right by a, not by b. Of nothing if one is missing."""
    counts = [episode["counts"].get(name, (0, 0)) for name in metric.split("-")]
    (right, _), *others = counts
    return [right - sum(other for other, _ in others), min(of for _, of in counts)]


def main(arguments):
    """Compare and print. arguments: of the command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("earlier")
    parser.add_argument("later")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metric", default="solved",
                        help="of rollout.counts; a-b: right by a, not by b")
    parser.add_argument("--where", nargs="*", default=[], metavar="KEY=VALUE", help="of env")
    parser.add_argument("--n", type=int, default=200, help="episodes of each, as in the table")
    parser.add_argument("--temperature", type=float, default=0.2)
    options = parser.parse_args(arguments)
    counts, clusters, seeds = [], [], []
    for run in options.runs:
        cells = cells_of(run, options)
        before, earlier = episodes_of(cells, options.earlier, run)
        after, later = episodes_of(cells, options.later, run)
        if before == after:
            raise UserError(f"{run}: {before} would be compared with itself")
        print(f"{run}: {after} - {before}")
        for one, other in zip(later, earlier, strict=True):
            counts.append([counted(episode, options.metric) for episode in (one, other)])
            clusters.append(one["cluster"])
            seeds.append(str(run))
    found = measure(torch.tensor(counts).float(), clusters, seeds, difference)
    if found.estimate is None:
        raise UserError(f"--metric {options.metric}: nothing was counted")
    value, low, high = (100 * number for number in found.estimate)
    each = ", ".join(f"{100 * one:.1f}" for one in found.per_seed)
    print(f"{options.metric}: {value:+.1f} [{low:.1f}, {high:.1f}] ({each})")


if __name__ == "__main__":
    run_main(main)
