"""Evaluate every arm found under a run, in and out of distribution; report.py shows what came out.

    python eval.py CONFIG.yaml [key=value ...]    eval.transcripts=3 also keeps whole episodes,
                                                  eval.runs=[runs/a,runs/b] pools the runs of seeds
    python report.py CONFIG.yaml                  tables, paired differences, the paper's Figure 5

Arms: Init (the checkpoint ppo.init), every rl* folder (its last checkpoint) and every sft* folder
(the checkpoint whose model FLOPs are nearest to rl's: equal compute; the last one if there is no
rl). All arms play the same episodes, so differences are paired. The environment says what is shown
(env.reports) and which reference policies stand below the arms (env.references).

A metric is right / all, summed over episodes. Its 95 % interval is a bootstrap that resamples hands
or routes within the runs given. It covers the luck of the problems, not that of the training:
another seed may fall outside.

Written to run.dir: evaluations.jsonl (every cell, reused when run again), evaluation.json (see
lib/results.py) and, for the arms in eval.save_merged, ARM/merged: a model folder for any program
(of several runs, the first's). Source: paper Sec. 5, C.3; the protocol is ours (docs/results.md).
"""
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import yaml
from tqdm import tqdm

from lib.results import Estimate, Point, Report, temperature_name
from lib.runs import checkpoints, write_atomic, written_whole
from lib.settings import MAY_CHANGE, ROOT, UserError, load, run_main, within_memory
from lib.training import load_state
from policy import Policy
from rollout import evaluate, make_env, play_reference, transcript

RESAMPLES = 2000
CURVE_POINTS = 8  # checkpoints of an arm that its curve shows
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "Pillow")


# ---------------------------------------------------------------- statistics, pure
def cluster_weights(clusters, resamples=RESAMPLES, seed=0):
    """Bootstrap weights of n episodes: whole clusters are drawn with replacement.

    A cluster is a hand (its card values) or a route, with every episode that plays it, in whichever
    of the pooled runs. The runs themselves are not drawn.

    Args: clusters: n hashable labels.
    Returns: (resamples, n) float, how often each episode occurs in each resample.
    """
    numbers = {}  # label -> its number, in the order of appearance
    index = torch.tensor([numbers.setdefault(label, len(numbers)) for label in clusters])  # (n,)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(numbers), (resamples, len(numbers)), generator=generator)
    counts = torch.zeros(resamples, len(numbers))
    counts.scatter_add_(1, drawn, torch.ones_like(counts))  # how often each cluster was drawn
    return counts[:, index]  # (resamples, n)


def ratios(pairs, weights):
    """(R,) double: the ratio of sums of n (right, of) pairs under each row of weights (R, n)."""
    right, of = torch.tensor(pairs, dtype=torch.float32).T  # (n,) each
    return (weights @ right).double() / (weights @ of)


def interval(pairs, weights, base=None):
    """The ratio of sums of n (right, of) pairs with its 95 % bootstrap interval.

    It says how much the ratio of these checkpoints depends on the hands or routes that they played,
    not how another training would come out.

    Args: weights: as of `cluster_weights`; base: n pairs of another arm on the same episodes, to
        take the difference of the two ratios.
    Returns: Estimate, a share of 1; a resample in which `of` sums to 0 does not count.
    """
    once = torch.ones(1, weights.shape[1])  # row 0: every episode once
    weights = torch.cat([once, weights])  # (1 + resamples, n)
    values = ratios(pairs, weights)
    if base is not None:
        values = values - ratios(base, weights)
    values = values.float()
    low, high = torch.nanquantile(values[1:], torch.tensor([0.025, 0.975])).tolist()
    return Estimate(values[0].item(), low, high)


# ---------------------------------------------------------------- table and paired differences
def columns(episodes):
    """{metric: n pairs (right, of)} of n episodes; (0, 0) where one never met the metric."""
    found = {}
    for i, episode in enumerate(episodes):
        for metric, pair in episode["counts"].items():
            found.setdefault(metric, [(0, 0)] * len(episodes))[i] = pair
    return found


def estimates(episodes, base=None):
    """{metric: Estimate in %} of an arm's episodes, or of the difference to a base's same ones."""
    weights = cluster_weights([episode["cluster"] for episode in episodes])
    arm_pairs = columns(episodes)
    base_pairs = columns(base) if base else dict.fromkeys(arm_pairs)
    found = {}
    for metric, pairs in arm_pairs.items():
        if metric in base_pairs:
            shares = interval(pairs, weights, base_pairs[metric])
            found[metric] = Estimate(*[100 * share for share in shares])
    return found


class Place(NamedTuple):
    """Where a cell stands in the table."""
    split: str
    variant: str  # of the environment
    arm: str  # or a reference policy
    temperature: float | None  # None: a reference policy, which samples nothing


def summarize(cells):
    """Rows of the table, see lib/results.py. Args: cells: {Place: episodes}."""
    rows = []
    for place, episodes in cells.items():
        rows.append({**place._asdict(), "n": len(episodes), "metrics": estimates(episodes)})
    return rows


def differences(cells, pairs, e):
    """Rows of paired differences, see lib/results.py.

    Args: cells: {Place: episodes}; pairs: list of (arm, base); e: the settings `eval`.
    """
    rows = []
    places = product(e.splits, e.variants, e.temperatures, pairs)
    for split, variant, temperature, (arm, base) in places:
        found = estimates(cells[split, variant, arm, temperature],
                          cells[split, variant, base, temperature])
        rows.append({"split": split, "variant": variant, "temperature": temperature,
                     "arm": arm, "base": base, "metrics": found})
    return rows


# ---------------------------------------------------------------- arms
def find_arms(run_dir, init):
    """{arm: paths of its checkpoints in order}, Init first; Init's own folder is also an sft arm.

    Raises: UserError if there is nothing to evaluate, or no Init.
    """
    arms = {}
    start = run_dir / init
    if init != "none":
        if not start.is_dir():
            raise UserError(f"no checkpoint {start}; run sft.py first, or set ppo.init")
        arms["Init"] = [start]
    for folder in sorted(run_dir.glob("sft*")) + sorted(run_dir.glob("rl*")):
        found = dict(checkpoints(folder))  # step -> path
        if found:
            arms[folder.name] = list(found.values())
    if not arms:
        raise UserError(f"nothing to evaluate under {run_dir}: run sft.py and rl.py first")
    return arms


def trained_with(checkpoint):
    """The settings that a checkpoint's arm was trained with: the nested dict of its config.yaml."""
    return yaml.safe_load((checkpoint.parent / "config.yaml").read_text())


def arm_settings(checkpoint, cfg):
    """Arguments of the Policy of a checkpoint: its arm's settings.

    cfg gives what follows this machine, and keys newer than the arm.
    """
    arm, here = trained_with(checkpoint), vars(cfg.model)
    model = {**here, **arm["model"]}
    for name in MAY_CHANGE:
        section, key = name.split(".")
        if section == "model":
            model[key] = here[key]
    lora = SimpleNamespace(**arm["lora"]) if arm["lora"] else None
    seed = arm["run"]["seed"] if model["random_init"] else 0  # the rest the checkpoint replaces
    return {"model": SimpleNamespace(**model), "lora": lora, "seed": seed}


class Loader:
    """The one policy in memory: made anew for other settings, loaded for another checkpoint."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.policy = self.settings = self.loaded = None

    def get(self, checkpoint):
        settings = arm_settings(checkpoint, self.cfg)
        with within_memory("loading the model", self.cfg):
            if self.settings != settings:
                self.policy = self.settings = self.loaded = None  # before the next needs its memory
                gc.collect()  # a 4-bit weight and its layer refer to each other
                self.policy, self.settings = Policy(**settings), settings
            if self.loaded != checkpoint:
                self.policy.load(checkpoint, value_head=False)
                self.loaded = checkpoint
        return self.policy


def save_merged(checkpoint, cfg, folder):
    """Write a checkpoint as a normal model folder: LoRA merged into the 16-bit base, on the CPU."""
    settings = arm_settings(checkpoint, cfg)
    vars(settings["model"]).update(quantization="none", dtype="bfloat16", device="cpu")
    with within_memory(f"merging {checkpoint}", cfg), written_whole(folder) as temporary:
        policy = Policy(**settings)
        policy.load(checkpoint, value_head=False)
        policy.save_merged(temporary)


# ---------------------------------------------------------------- one run
class EvaluatedRun:
    """A run folder: its arms and its cells, each played once and kept in evaluations.jsonl.

    A cell is a list of episodes {cluster, counts}, see rollout.counts.
    """

    def __init__(self, folder, cfg, loader):
        self.folder, self.cfg, self.loader = Path(folder), cfg, loader
        self.arms = find_arms(self.folder, cfg.ppo.init)
        paths = set(chain(*self.arms.values()))
        self.gflops = {path: load_state(path)["gflops"] for path in paths}
        budget = self.gflops[self.arms["rl"][-1]] if "rl" in self.arms else None
        self.shown = {}  # arm -> its checkpoint in the table
        for arm, trained in self.arms.items():
            self.shown[arm] = trained[-1]
            if arm.startswith("sft") and budget:
                self.shown[arm] = min(trained, key=lambda path: abs(self.gflops[path] - budget))
        self.path = self.folder / "evaluations.jsonl"
        self.known = read_cells(self.path)

    def key(self, place, checkpoint, n):
        """What a cell depends on; of a checkpoint also when it was written."""
        player, written = place.arm, None
        if checkpoint:
            player = str(checkpoint.relative_to(self.folder))
            written = int(checkpoint.stat().st_mtime)
        e = self.cfg.eval
        env = {**self.cfg.env, **e.variants[place.variant]}
        return [player, written, env, place.split, place.temperature, n, e.verify_iters, e.seed]

    def cell(self, place, checkpoint, n, bar):
        """n episodes of a checkpoint (None: of the reference policy) at a place; `bar` counts."""
        temperature = temperature_name(place.temperature)
        bar.set_description(f"{place.arm}, {place.variant}, {place.split}, {temperature}")
        key = self.key(place, checkpoint, n)
        name = json.dumps(key)
        if name in self.known:
            bar.update(n)
            return self.known[name]
        episodes = self.known[name] = []
        for record in self.play(place, checkpoint, n, bar):
            episodes.append({"cluster": record["cluster"], "counts": record["counts"]})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "episodes": episodes}) + "\n")
        return episodes

    def play(self, place, checkpoint, n, bar=None):
        """Play the n episodes, whether known or not. Returns: records of `rollout.evaluate`."""
        e, env = self.cfg.eval, self.cfg.env
        changes = {"split": place.split, **e.variants[place.variant]}
        if checkpoint is None:
            bar.update(n)
            return play_reference(env, place.arm, n, e.seed, e.verify_iters, **changes)
        policy = self.loader.get(checkpoint)
        ways = ("model.sample_tokens", "eval.batch_size", "model.merge_for_sampling=false")
        with within_memory("sampling", self.cfg, *ways):
            return evaluate(policy, env, n, e.seed, e.verify_iters, place.temperature,
                            e.batch_size, bar, **changes)


def read_cells(path):
    """{key as JSON: cell} of an evaluations.jsonl, which keeps only the lines that can be read."""
    text = path.read_text(errors="replace") if path.exists() else ""
    cells, kept = {}, []
    for line in text.splitlines():
        with suppress(ValueError, KeyError):  # cut off by a kill, or of an older version
            stored = json.loads(line)
            cells[json.dumps(stored["key"])] = stored["episodes"]
            kept.append(line + "\n")
    if "".join(kept) != text:
        write_atomic(path, "".join(kept))
    return cells


# ---------------------------------------------------------------- the runs together
class Evaluation:
    """The runs of one or several seeds, what is played in each, and how far that is.

    Attributes: arms: names of those that all runs have; places: of the table, in its order.
    Raises: UserError if a run has no arms, or eval.save_merged names one that not all runs have.
    """

    def __init__(self, cfg):
        e = self.e = cfg.eval
        loader = Loader(cfg)
        self.runs = [EvaluatedRun(folder, cfg, loader) for folder in e.runs or [cfg.run.dir]]
        self.arms = list(self.runs[0].arms)
        for run in self.runs:
            self.arms = [arm for arm in self.arms if arm in run.arms]
        for name in e.save_merged:
            if name not in self.arms:
                raise UserError(f"eval.save_merged: {name!r} is none of {', '.join(self.arms)}")
        self.places = []
        self.reports = None  # those that the environments of all variants have
        for split, variant in product(e.splits, e.variants):
            changes = {"split": split, **e.variants[variant]}
            env = make_env(cfg.env, e.verify_iters, **changes)
            for player in [*product(self.arms, e.temperatures), *product(env.references, [None])]:
                self.places.append(Place(split, variant, *player))
            names = [name for name, *_ in env.reports]
            reports = self.reports or [Report(*report) for report in env.reports]
            self.reports = [report for report in reports if report.name in names]
        self.curve_points = {}  # arm -> which of its checkpoints the curve shows, evenly spread
        for arm in ("Init", "sft", "rl"):
            if e.curve_n and arm in self.arms:
                fewest = min(len(run.arms[arm]) for run in self.runs)
                points = torch.linspace(0, fewest - 1, min(fewest, CURVE_POINTS))
                self.curve_points[arm] = points.round().int().tolist()
        points = len(e.variants) * sum(map(len, self.curve_points.values()))
        n = points * e.curve_n + sum(e.splits[place.split] for place in self.places)
        self.bar = tqdm(total=n * len(self.runs), unit="episode", disable=None)

    def tables(self):
        """{run folder: {Place: episodes}}."""
        tables = {}
        for run in self.runs:
            tables[str(run.folder)] = cells = {}
            for place in self.places:
                checkpoint = run.shown.get(place.arm)
                cells[place] = run.cell(place, checkpoint, self.e.splits[place.split], self.bar)
        return tables

    def point(self, place, nth):
        """The Point of an arm's nth checkpoint; its compute is the mean over the runs."""
        episodes, gflops = [], 0
        for run in self.runs:
            checkpoint = run.arms[place.arm][nth]
            episodes += run.cell(place, checkpoint, self.e.curve_n, self.bar)
            gflops += run.gflops[checkpoint]
        recognized, asked = map(sum, zip(*columns(episodes)["recognized"]))
        estimate = estimates(episodes)[self.reports[0].lead]
        return Point(gflops / len(self.runs), *estimate, 100 * (recognized / asked))

    def curve(self, variant):
        """{arm: Points in the order of training}; rl's starts at Init."""
        curve = {}
        for arm, numbers in self.curve_points.items():
            place = Place(next(iter(self.e.splits)), variant, arm, self.e.temperatures[0])
            curve[arm] = [self.point(place, nth) for nth in numbers]
        if "rl" in curve:
            curve["rl"] = curve.get("Init", []) + curve["rl"]
        return curve

    def transcripts(self):
        """Episodes of each arm of the first run, at the first split and temperature."""
        found, run = [], self.runs[0]
        for arm, variant in product(self.arms, self.e.variants):
            place = Place(next(iter(self.e.splits)), variant, arm, self.e.temperatures[0])
            records = run.play(place, run.shown[arm], self.e.transcripts)
            episodes = [list(map(transcript, record["turns"])) for record in records]
            found.append({"arm": arm, "variant": variant, "episodes": episodes})
        return found

    def minutes(self):
        """{arm: minutes of its training, mean over the runs}, of the arms that logged them."""
        found = Counter()
        for run, arm in product(self.runs, self.arms):
            with suppress(FileNotFoundError):  # Init has no log of its own
                log = (run.folder / arm / "metrics.jsonl").read_text(encoding="utf-8")
                for line in log.splitlines():
                    found[arm] += json.loads(line)["seconds"] / 60 / len(self.runs)
        return found


def provenance():
    """{commit, machine, versions}: where and with what this is measured."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = ""
    with suppress(OSError):  # no git here
        commit = subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"commit": commit or "unknown",
            "machine": f"{device}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
            "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES)}


# ---------------------------------------------------------------- the command
def main(arguments):
    started = time.monotonic()
    cfg, _, _ = load(arguments)
    e = cfg.eval
    evaluation = Evaluation(cfg)
    runs, arms, tables = evaluation.runs, evaluation.arms, evaluation.tables()
    pooled = {}
    for place in evaluation.places:
        pooled[place] = list(chain(*[table[place] for table in tables.values()]))
    pairs = [*product(arms[1:], ["Init"])] if arms[0] == "Init" else []  # (arm, base)
    if "rl" in arms and "sft" in arms:
        pairs.append(("rl", "sft"))
    gflops = {}
    for arm in arms:
        gflops[arm] = sum(run.gflops[run.shown[arm]] for run in runs) / len(runs)
    result = {
        "runs": list(tables),
        "seeds": [trained_with(run.shown[arms[0]])["run"]["seed"] for run in runs],
        **provenance(),
        "reports": [report._asdict() for report in evaluation.reports],
        "splits": e.splits, "variants": e.variants,
        "temperatures": e.temperatures, "curve_n": e.curve_n,
        "gflops": gflops,
        "table": summarize(pooled),
        "differences": differences(pooled, pairs, e),
        "per_run": {},
        "curves": {variant: evaluation.curve(variant) for variant in e.variants},
    }
    if len(runs) > 1:
        for folder, table in tables.items():
            result["per_run"][folder] = differences(table, pairs, e)
    evaluation.bar.close()
    if e.transcripts:
        result["transcripts"] = evaluation.transcripts()
    minutes = {**evaluation.minutes(), "eval": (time.monotonic() - started) / 60}
    result["minutes"] = {name: round(spent, 1) for name, spent in minutes.items()}
    out = Path(cfg.run.dir)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "evaluation.json", json.dumps(result, indent=1) + "\n")
    print(f"written: {out}/evaluation.json; python report.py {out} shows it", file=sys.stderr)
    for arm in e.save_merged:
        save_merged(runs[0].shown[arm], cfg, out / arm / "merged")
        print(f"written: {out / arm / 'merged'}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
