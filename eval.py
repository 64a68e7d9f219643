"""Evaluate every arm found under a run, in and out of distribution; report.py shows what came out.

    python eval.py CONFIG.yaml [key=value ...]    eval.transcripts=3 also keeps whole episodes,
                                                  eval.runs=[runs/a,runs/b] pools the runs of seeds
    python report.py CONFIG.yaml                  tables, paired differences, the paper's Figure 5

Arms: Init (the checkpoint ppo.init), every rl* folder (its last checkpoint) and every sft* folder
(the checkpoint whose model FLOPs are nearest to the rl arm's: equal compute; the last one if there
is no rl arm). All arms play the same episodes, so differences are paired. A metric is right / all,
summed over episodes; its interval is a 95 % bootstrap over clusters of episodes (the same card
values, the same route). The environment says what is shown (env.reports) and which reference
policies stand below the arms (env.references).

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
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import product
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
from rollout import evaluate, make_env, play_reference

RESAMPLES = 2000
CURVE_POINTS = 8  # checkpoints of an arm that its curve shows
# settings of the model that follow this machine, not the one on which the arm was trained
HERE = [key.removeprefix("model.") for key in MAY_CHANGE if key.startswith("model.")]


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    gflops: float  # model FLOPs spent until here, in 1e9


@dataclass(frozen=True)
class Arm:
    checkpoints: list  # in the order of training
    shown: Checkpoint  # the one that stands in the table


class Condition(NamedTuple):
    """What is played: n episodes of a split under a variant of the environment."""
    variant: str
    split: str
    temperature: float | None  # None: a reference policy, which samples nothing
    n: int


@dataclass(frozen=True)
class Cell:
    """What n episodes of one player under one condition came to."""
    cluster: list  # n labels: which episodes the bootstrap draws together
    counts: dict  # metric -> n pairs (right, of); (0, 0) where it does not occur


# ---------------------------------------------------------------- statistics, pure
def cluster_weights(clusters, resamples=RESAMPLES, seed=0):
    """Bootstrap weights of n observations: whole clusters are drawn with replacement.

    Args: clusters: n hashable labels.
    Returns: (resamples, n) float, how often each observation occurs in each resample.
    """
    numbers = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    index = torch.tensor([numbers[label] for label in clusters])  # (n,) cluster of each observation
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(numbers), (resamples, len(numbers)), generator=generator)
    counts = torch.zeros(resamples, len(numbers))
    counts.scatter_add_(1, drawn, torch.ones_like(counts))  # how often each cluster was drawn
    return counts[:, index]  # (resamples, n)


def ratios(pairs, weights):
    """Ratio of the weighted sums of n (right, of) pairs.

    Args: weights: (R, n).
    Returns: (R,) double.
    """
    right, of = torch.tensor(pairs, dtype=torch.float32).T  # (n,) each
    return (weights @ right).double() / (weights @ of)


def interval(pairs, weights, base=None):
    """The ratio of sums of n (right, of) pairs with its 95 % bootstrap interval.

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
@lru_cache(maxsize=1)
def shared_weights(clusters):
    """`cluster_weights` of a tuple of labels: all players of a split and variant share them."""
    return cluster_weights(clusters)


def estimates(cell, base=None):
    """{metric: Estimate in %} of a Cell, or of its paired difference to a base's."""
    weights = shared_weights(tuple(cell.cluster))
    found = {}
    for metric, pairs in cell.counts.items():
        if base is None:
            found[metric] = percent(interval(pairs, weights))
        elif metric in base.counts:
            found[metric] = percent(interval(pairs, weights, base.counts[metric]))
    return found


def percent(estimate):
    return Estimate(*(100 * value for value in estimate))


def summarize(cell_of, arms, references, e):
    """Rows of the table, see lib/results.py.

    Args: cell_of: (player, variant, split, temperature) -> Cell; arms: names; references: {variant:
        names of reference policies}, whose rows have no temperature; e: the settings `eval`.
    """
    rows = []
    for split, variant in product(e.splits, e.variants):
        players = [*product(arms, e.temperatures), *product(references[variant], [None])]
        for player, temperature in players:
            cell = cell_of(player, variant, split, temperature)
            rows.append({"split": split, "variant": variant, "arm": player,
                         "temperature": temperature, "n": len(cell.cluster),
                         "metrics": estimates(cell)})
    return rows


def differences(cell_of, pairs, e):
    """Rows of paired differences arm - base, see lib/results.py.

    Args: cell_of: as of `summarize`; pairs: list of (arm, base).
    """
    rows = []
    places = product(e.splits, e.variants, e.temperatures, pairs)
    for split, variant, temperature, (arm, base) in places:
        cell = cell_of(arm, variant, split, temperature)
        other = cell_of(base, variant, split, temperature)
        rows.append({"split": split, "variant": variant, "temperature": temperature,
                     "arm": arm, "base": base, "metrics": estimates(cell, other)})
    return rows


# ---------------------------------------------------------------- arms
def find_arms(run_dir, init):
    """{name: Arm} of a run folder, Init first; Init's own folder is also an sft arm.

    Raises: UserError if there is nothing to evaluate, or no Init.
    """
    run_dir, paths = Path(run_dir), {}
    start = run_dir / init
    if init != "none":
        if not start.is_dir():
            raise UserError(f"no checkpoint {start}; run sft.py first, or set ppo.init")
        paths["Init"] = [start]
    for folder in sorted(run_dir.glob("sft*")) + sorted(run_dir.glob("rl*")):
        found = [path for _, path in checkpoints(folder)]
        if found:
            paths[folder.name] = found
    if not paths:
        raise UserError(f"nothing to evaluate under {run_dir}: run sft.py and rl.py first")
    trained = {name: [Checkpoint(path, load_state(path)["gflops"]) for path in found]
               for name, found in paths.items()}
    budget = trained["rl"][-1].gflops if "rl" in trained else None
    return {name: Arm(found, chosen(name, found, budget)) for name, found in trained.items()}


def chosen(name, trained, budget):
    """An arm's checkpoint in the table: the last; of sft, the nearest in FLOPs to the budget."""
    if name.startswith("sft") and budget:
        return min(trained, key=lambda checkpoint: abs(checkpoint.gflops - budget))
    return trained[-1]


def spread(count, most=CURVE_POINTS):
    """At most `most` of the places 0..count-1, evenly spread, first and last included."""
    points = min(count, most)
    if points == 1:
        return [0]
    return [round(i * (count - 1) / (points - 1)) for i in range(points)]


def trained_with(checkpoint):
    """The settings that a checkpoint's arm was trained with: the nested dict of its config.yaml."""
    return yaml.safe_load((checkpoint.parent / "config.yaml").read_text())


def arm_settings(checkpoint, cfg):
    """Arguments of the Policy of a checkpoint (a path): its arm's settings.

    cfg gives what follows this machine, and keys newer than the arm.
    """
    arm, here = trained_with(checkpoint), vars(cfg.model)
    model = {**here, **arm["model"], **{key: here[key] for key in HERE}}
    lora = SimpleNamespace(**arm["lora"]) if arm["lora"] else None
    seed = arm["run"]["seed"] if model["random_init"] else 0  # the rest the checkpoint replaces
    return {"model": SimpleNamespace(**model), "lora": lora, "seed": seed}


class Loader:
    """The one policy in memory: made anew for other settings, loaded for another checkpoint."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.policy = self.settings = self.loaded = None

    def get(self, checkpoint):
        """The policy with the weights of a checkpoint (a path)."""
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


# ---------------------------------------------------------------- cells of one run
class EvaluatedRun:
    """A run folder: its arms and its cells, each played once and kept in evaluations.jsonl.

    A player is a Checkpoint or the name of a reference policy, which has no temperature (None).
    """

    def __init__(self, folder, cfg, loader):
        self.cfg, self.loader, self.folder = cfg, loader, Path(folder)
        self.arms = find_arms(folder, cfg.ppo.init)
        self.path = self.folder / "evaluations.jsonl"
        self.known = {}  # key as JSON -> Cell
        self.counted = set()  # keys that the progress bar has met
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        lines = text.splitlines()
        for line in lines:
            with suppress(ValueError, KeyError):  # cut off by a kill, or of an older version
                stored = json.loads(line)
                self.known[json.dumps(stored["key"])] = Cell(stored["cluster"], stored["counts"])
        if len(self.known) != len(lines):
            kept = [self.line(key, cell) for key, cell in self.known.items()]
            write_atomic(self.path, "".join(kept))

    @staticmethod
    def line(key, cell):
        """A cell as it stands in evaluations.jsonl."""
        return json.dumps({"key": json.loads(key), **asdict(cell)}) + "\n"

    def key(self, player, condition):
        """What a cell depends on, as JSON; of a checkpoint also when it was written."""
        e = self.cfg.eval
        name, written = player, None
        if isinstance(player, Checkpoint):
            name = str(player.path.relative_to(self.folder))
            written = int(player.path.stat().st_mtime)
        env = {**self.cfg.env, **e.variants[condition.variant]}
        return json.dumps([name, written, env, condition.split, condition.temperature, condition.n,
                           e.verify_iters, e.seed])

    def cell(self, player, condition, bar):
        """The Cell of a player under a condition, played if it is not known yet."""
        key = self.key(player, condition)
        if key not in self.known:
            self.known[key] = cell = as_cell(self.play(player, condition, bar))
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self.line(key, cell))
        elif key not in self.counted:
            bar.update(condition.n)
        self.counted.add(key)
        return self.known[key]

    def play(self, player, condition, bar):
        """Episodes of a player under a condition. Returns: records of `rollout.evaluate`."""
        e = self.cfg.eval
        changes = {"split": condition.split, **e.variants[condition.variant]}
        env, n = self.cfg.env, condition.n
        if not isinstance(player, Checkpoint):
            records = play_reference(env, player, n, e.seed, e.verify_iters, **changes)
            bar.update(n)
            return records
        policy = self.loader.get(player.path)
        ways = ("model.sample_tokens", "eval.batch_size", "model.merge_for_sampling=false")
        with within_memory("sampling", self.cfg, *ways):
            return evaluate(policy, env, n, e.seed, e.verify_iters, condition.temperature,
                            e.batch_size, bar, **changes)


def as_cell(records):
    """The Cell of the records of `rollout.evaluate`."""
    episodes = []
    for record in records:
        counts = {metric: [pair] for metric, pair in record["counts"].items()}
        episodes.append(Cell([record["cluster"]], counts))
    return join(episodes)


def join(cells):
    """The Cell of the episodes of several: what one of them never met is (0, 0) there."""
    joined = Cell([], {})
    for cell in cells:
        for metric in cell.counts:
            joined.counts.setdefault(metric, [(0, 0)] * len(joined.cluster))
        for metric, pairs in joined.counts.items():
            pairs += cell.counts.get(metric, [(0, 0)] * len(cell.cluster))
        joined.cluster.extend(cell.cluster)
    return joined


# ---------------------------------------------------------------- the runs together
class Evaluation:
    """The runs of one or several seeds: an arm's episodes are those of every run, joined.

    Args: reports: list of Report; references: {variant: names of reference policies}.
    Raises: UserError if a run has no arms, or eval.save_merged names one that not all runs have.
    """

    def __init__(self, cfg, reports, references):
        self.cfg, self.reports, self.references = cfg, reports, references
        loader = Loader(cfg)
        self.runs = [EvaluatedRun(folder, cfg, loader) for folder in cfg.eval.runs or [cfg.run.dir]]
        self.arms = [a for a in self.runs[0].arms if all(a in run.arms for run in self.runs)]
        for name in cfg.eval.save_merged:
            if name not in self.arms:
                raise UserError(f"eval.save_merged: {name!r} is none of {', '.join(self.arms)}")
        self.curve_places = {}  # arm -> places of the checkpoints that its curve shows
        for arm in ("sft", "rl"):
            if cfg.eval.curve_n and arm in self.arms:
                fewest = min(len(run.arms[arm].checkpoints) for run in self.runs)
                self.curve_places[arm] = spread(fewest)
        self.bar = tqdm(total=self.episodes(), unit="episode", disable=None)

    def episodes(self):
        """How many episodes are to be played or known in the end."""
        e = self.cfg.eval
        table = len(e.variants) * len(self.arms) * len(e.temperatures) * sum(e.splits.values())
        reference = sum(map(len, self.references.values())) * sum(e.splits.values())
        points = 1 + sum(map(len, self.curve_places.values()))  # and Init
        return len(self.runs) * (table + reference + len(e.variants) * points * e.curve_n)

    def cell(self, player, variant, split, temperature, runs=None):
        """The Cell of an arm as in the table, or of a reference policy, joined over runs."""
        runs = runs or self.runs
        condition = Condition(variant, split, temperature, self.cfg.eval.splits[split])
        players = [player] * len(runs)
        if temperature is not None:
            players = [run.arms[player].shown for run in runs]
        return self.joined(player, runs, players, condition)

    def joined(self, name, runs, players, condition):
        """The Cell of one player per run, joined; `name` is what the progress bar says."""
        temperature = temperature_name(condition.temperature)
        self.bar.set_description(f"{name}, {condition.variant}, {condition.split}, {temperature}")
        return join([run.cell(p, condition, self.bar) for run, p in zip(runs, players)])

    def gflops(self, arm):
        """Model GFLOPs of an arm's checkpoint in the table, mean over the runs."""
        return mean([run.arms[arm].shown.gflops for run in self.runs])

    def table(self):
        return summarize(self.cell, self.arms, self.references, self.cfg.eval)

    def pairs(self):
        """(arm, base) of the differences: every arm against Init, and rl against sft."""
        pairs = []
        if "Init" in self.arms:
            pairs = [(arm, "Init") for arm in self.arms if arm != "Init"]
        if "rl" in self.arms and "sft" in self.arms:
            pairs.append(("rl", "sft"))
        return pairs

    def differences(self, runs=None):
        """Rows of paired differences over all runs, or over some of them."""
        return differences(partial(self.cell, runs=runs), self.pairs(), self.cfg.eval)

    def differences_per_run(self):
        """{run folder: differences within that run}, if there are several."""
        if len(self.runs) == 1:
            return {}
        return {str(run.folder): self.differences([run]) for run in self.runs}

    def point(self, arm, place, variant):
        """The Point of an arm's place-th checkpoint, at the first split and temperature."""
        e = self.cfg.eval
        condition = Condition(variant, next(iter(e.splits)), e.temperatures[0], e.curve_n)
        trained = [run.arms[arm].checkpoints[place] for run in self.runs]
        cell = self.joined(arm, self.runs, trained, condition)
        estimate = estimates(cell)[self.reports[0].lead]
        recognized = sum(right for right, _ in cell.counts["recognized"])
        asked = sum(of for _, of in cell.counts["recognized"])
        gflops = mean([checkpoint.gflops for checkpoint in trained])
        return Point(gflops, *estimate, 100 * (recognized / asked))

    def curve(self, variant):
        """{arm: Points in the order of training}; rl's starts at Init."""
        curve = {}
        if self.curve_places and "Init" in self.arms:
            curve["Init"] = [self.point("Init", 0, variant)]
        for arm, places in self.curve_places.items():
            start = curve.get("Init", []) if arm == "rl" else []
            curve[arm] = start + [self.point(arm, place, variant) for place in places]
        return curve

    def transcripts(self):
        """Episodes of each arm of the first run, at the first split and temperature."""
        e, run = self.cfg.eval, self.runs[0]
        split = next(iter(e.splits))
        found = []
        for arm, variant in product(self.arms, e.variants):
            condition = Condition(variant, split, e.temperatures[0], e.transcripts)
            episodes = []
            for record in run.play(run.arms[arm].shown, condition, None):
                episodes.append([transcribe(turn) for turn in record["turns"]])
            found.append({"arm": arm, "variant": variant, "episodes": episodes})
        return found

    def minutes(self):
        """{arm: minutes of its training, mean over the runs}, of the arms that logged them."""
        found = {}
        for arm in self.arms:
            logs = [run.folder / arm / "metrics.jsonl" for run in self.runs]
            if all(log.exists() for log in logs):
                found[arm] = round(mean([logged_minutes(log) for log in logs]), 1)
        return found

    def seeds(self):
        """The seed that each run was trained with."""
        arm = self.arms[0]
        return [trained_with(run.arms[arm].shown.path)["run"]["seed"] for run in self.runs]


def mean(values):
    return sum(values) / len(values)


def transcribe(turn):
    return {"text": turn.text, "reward": turn.reward, "feedback": turn.info["feedback"]}


def logged_minutes(path):
    """Minutes of all the steps in a metrics.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["seconds"] for line in lines) / 60


def provenance():
    """{commit, machine, versions}: where and with what this is measured."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = ""
    with suppress(OSError):  # no git here
        commit = subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stdout.strip()
    packages = ("torch", "transformers", "peft", "bitsandbytes", "Pillow")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"commit": commit or "unknown",
            "machine": f"{device}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
            "versions": ", ".join(f"{name} {version(name)}" for name in packages)}


# ---------------------------------------------------------------- the command
def environments(cfg):
    """{variant: an environment}; every split is tried, so that a bad setting is named at once."""
    envs = {}
    for split, (variant, changes) in product(cfg.eval.splits, cfg.eval.variants.items()):
        settings = {"split": split, **changes}
        envs[variant] = make_env(cfg.env, cfg.eval.verify_iters, **settings)
    return envs


def common_reports(first, *others):
    """The Reports of one environment that all the others have too."""
    reports = [Report(*report) for report in first.reports]
    for env in others:
        names = {Report(*report).name for report in env.reports}
        reports = [report for report in reports if report.name in names]
    return reports


def main(arguments):
    started = time.monotonic()
    cfg, _, _ = load(arguments)
    e = cfg.eval
    envs = environments(cfg)
    references = {variant: env.references for variant, env in envs.items()}
    evaluation = Evaluation(cfg, common_reports(*envs.values()), references)
    result = {
        "runs": [str(run.folder) for run in evaluation.runs],
        "seeds": evaluation.seeds(),
        **provenance(),
        "reports": [report._asdict() for report in evaluation.reports],
        "splits": e.splits, "variants": e.variants,
        "temperatures": e.temperatures, "curve_n": e.curve_n,
        "gflops": {arm: evaluation.gflops(arm) for arm in evaluation.arms},
        "table": evaluation.table(),
        "differences": evaluation.differences(),
        "per_run": evaluation.differences_per_run(),
        "curves": {variant: evaluation.curve(variant) for variant in e.variants},
    }
    evaluation.bar.close()
    if e.transcripts:
        result["transcripts"] = evaluation.transcripts()
    own_minutes = round((time.monotonic() - started) / 60, 1)
    result["minutes"] = {**evaluation.minutes(), "eval": own_minutes}
    out = Path(cfg.run.dir)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "evaluation.json", json.dumps(result, indent=1) + "\n")
    print(f"written: {out}/evaluation.json; python report.py {out} shows it", file=sys.stderr)
    for arm in e.save_merged:
        save_merged(evaluation.runs[0].arms[arm].shown.path, cfg, out / arm / "merged")
        print(f"written: {out / arm / 'merged'}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
