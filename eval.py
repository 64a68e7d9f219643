"""Evaluate every arm found under a run, in and out of distribution; report.py shows what came out.

    python eval.py CONFIG.yaml [key=value ...]    eval.transcripts=3 also keeps whole episodes,
                                                  eval.runs=[runs/a,runs/b] pools the runs of seeds,
                                                  eval.arms=[sft,rl] plays these folders alone
    python report.py CONFIG.yaml                  tables, paired differences, the paper's Figure 5

Arms (lib/arms.py): where PPO began (Init), every rl* folder (its last checkpoint) and every sft*
folder, at equal compute: the checkpoint whose model FLOPs (Policy.flops, Init's included) are
nearest to those of the PPO that began in it, else of the first (without PPO, the last). One that
is more than 5 % off has a note below the table. All arms play the same episodes, so
differences are paired. The environment says what is shown (env.reports) and which reference
policies stand below the arms (env.references). A cell is played again when the code, the model or
the libraries have changed; not for where and how many side by side it is played (model.device,
eval.batch_size).

Along each training eval.curve_points checkpoints are played in every variant: curves over compute,
and the frontier, one variant against the trained one (the first). How far PPO's last checkpoint
lies above the curve of SFT is read at equal FLOPs, where the curve first comes to PPO's ID and,
with eval.kl, where it has first gone as far from Init (lib/divergence.py).

A metric is right / all, summed over episodes. Its 95 % interval counts the luck of the trainings
and that of the problems: a bootstrap over seeds and over hands or routes (lib/bootstrap.py). Of a
single seed it is over hands or routes alone, and a note says so.

Written to run.dir: evaluations.jsonl (every cell, reused when run again), evaluation.json (see
lib/results.py), evaluation.yaml (the settings), conversations.jsonl (whole episodes for the page of
report.py, see lib/conversations.py) and, for the arms in eval.save_merged, ARM/merged: a model
folder for any program (of several runs, the first's). Source: paper Sec. 5, C.3; the protocol is
ours (docs/results.md).
"""
import gc
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import yaml

from lib.arms import (
    Comparison, official_notes, seed_names, seed_of, seen_notes, trained_with)
from lib.cells import KL, Cells, made_by, versions
from lib.divergence import log_ratios
from lib.errors import UserError, run_main, within_memory
from lib.measures import Checkpoint, Place, above_curve, differences, point_of, summarize
from lib.progress import announce, progress_bar
from lib.results import Nucleus, Report, temperature_name
from lib.runs import commit, trained_at, write_atomic, writing, written_whole
from lib.settings import MAY_CHANGE, find_model, load, with_defaults
from lib.training import load_state
from policy import Policy
from rollout import evaluate, make_env, play_reference, transcript

KEPT = ("cluster", "counts", "grades")  # of an episode's record
SHOWN = ("category", "correct", "recognized")  # of a turn's info, beside its transcript
ONE_SEED = ("one training seed: intervals are over hands or routes alone; another training may "
            "fall outside")


# ---------------------------------------------------------------- arms
def arm_settings(checkpoint, cfg):
    """Arguments of the Policy of a checkpoint: its arm's settings.

    cfg gives what follows this machine, and keys newer than the arm.
    """
    arm, here = trained_with(checkpoint), vars(cfg.model)
    model = {**here, **with_defaults(arm["model"], "model.")}
    for name in MAY_CHANGE:
        section, key = name.split(".")
        if section == "model":
            model[key] = here[key]
    if os.path.isdir(find_model(arm["model"]["path"])):
        model["path"] = arm["model"]["path"]  # runs that are pooled may each have their own base
    lora = SimpleNamespace(**arm["lora"]) if arm["lora"] else None
    seed = arm["run"]["seed"] if model["random_init"] else 0  # the rest the checkpoint replaces
    return {"model": SimpleNamespace(**model), "lora": lora, "seed": seed}


class Loader:
    """The one policy in memory: made anew for other settings, loaded for another checkpoint."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.policy = self.settings = self.loaded = None
        self.by_training = {}  # folder: its arm_settings

    def settings_of(self, checkpoint):
        training = checkpoint.parent
        if training not in self.by_training:
            self.by_training[training] = arm_settings(checkpoint, self.cfg)
        return self.by_training[training]

    def get(self, checkpoint):
        settings = self.settings_of(checkpoint)
        with within_memory("loading the model", self.cfg):
            if self.settings != settings:
                self.policy = self.settings = self.loaded = None  # before the next needs its memory
                gc.collect()  # a 4-bit weight and its layer refer to each other
                self.policy, self.settings = Policy(**settings), settings
            if self.loaded != checkpoint:
                self.policy.load(checkpoint, value_head=False)
                self.loaded = checkpoint
        return self.policy


def is_whole(checkpoint):
    """Whether it can play: not if tools/pack_runs.py left its weights out. Then what it has played
    stands, whatever has changed since. None, a reference policy, can."""
    return checkpoint is None or load_state(checkpoint)["optimizer"] is not None


def save_merged(checkpoint, cfg, folder):
    """Write a checkpoint as a normal model folder: LoRA merged into the 16-bit base, on the CPU."""
    settings = arm_settings(checkpoint, cfg)
    vars(settings["model"]).update(quantization="none", dtype="bfloat16", device="cpu")
    merging = within_memory(f"merging {checkpoint}", cfg)
    with merging, written_whole(folder) as temporary:
        policy = Policy(**settings)
        policy.load(checkpoint, value_head=False)
        policy.save_merged(temporary)


# ---------------------------------------------------------------- one run
def graded(turns):
    """The Turns of an episode as conversations.jsonl keeps them."""
    kept = []
    for turn in turns:
        kept.append({**transcript(turn), **{name: turn.info[name] for name in SHOWN}})
    return kept


class EvaluatedRun:
    """A run folder and its cells, each played once and kept in evaluations.jsonl (lib/cells.py).

    A cell is a list of episodes {cluster, counts, grades, training: its Seed}, see rollout.py, some
    of which also have `graded` turns.
    """

    def __init__(self, folder, cfg, loader, seed):
        self.folder, self.cfg, self.loader, self.seed = folder, cfg, loader, seed
        self.cells = Cells(folder / "evaluations.jsonl")
        self.is_whole = cache(is_whole)
        self.init_answers = {}  # {(Init, n): records of n first answers}, which KL is measured on

    def name_of(self, checkpoint):
        """Its path under the run, and when it was written: a key for what it has played."""
        return [os.path.relpath(checkpoint, self.folder), int(checkpoint.stat().st_mtime)]

    def cell(self, place, scene, checkpoint, n, bar, conversations=0):
        """n episodes of a checkpoint (None: of the reference policy) at a place; `bar` counts.

        When they are played, the first `conversations` of them keep their turns.
        """
        temperature = temperature_name(place.temperature)
        bar.set_description(f"{place.arm}, {place.variant}, {place.split}, {temperature}")
        player, model = [place.arm, None], None
        if checkpoint:
            player = self.name_of(checkpoint)
            model = self.loader.settings_of(checkpoint)["model"]
        e = self.cfg.eval
        key = [*player, scene.env, place.split, place.temperature, n, e.verify_iters, e.seed]
        means = made_by(scene.env, model) if self.is_whole(checkpoint) else {}
        episodes = self.cells.find(key, means)
        if episodes is not None:
            bar.update(n)
        else:
            episodes = []
            for record in self.play(place, scene, checkpoint, n, bar):
                episodes.append({part: record[part] for part in KEPT})
                if len(episodes) <= conversations:
                    episodes[-1]["turns"] = graded(record["turns"])
            # made_by anew: a hub's model is on the disk only after playing
            self.cells.add(key, made_by(scene.env, model), episodes)
            if checkpoint is None:
                bar.update(n)  # else it counts as they are played
        return [{**episode, "training": self.seed} for episode in episodes]

    def from_init(self, place, scene, checkpoint, init, n, bar):
        """How far a checkpoint has gone from Init, by first answers of that at T = 1: n episodes of
        counts {"kl": (nats, answers)}, kept as cells are."""
        bar.set_description(f"{place.arm}, KL from Init")
        names = [*self.name_of(checkpoint), *self.name_of(init)]
        key = [*names, scene.env, place.split, "kl", n, self.cfg.eval.seed]
        whole = self.is_whole(checkpoint) and self.is_whole(init)
        means = made_by(scene.env, self.loader.settings_of(checkpoint)["model"], KL)
        episodes = self.cells.find(key, means if whole else {})
        if episodes is None:
            if not whole:
                raise UserError(f"{self.folder} was packed without its weights, and has not kept "
                                f"the KL of {names[0]} from {names[2]}; set eval.kl=false")
            episodes = self._measure_kl(place, scene, checkpoint, init, n)
            self.cells.add(key, means, episodes)
        bar.update(n)
        return [{**episode, "training": self.seed} for episode in episodes]

    def _measure_kl(self, place, scene, checkpoint, init, n):
        """The episodes of `from_init`; Init answers once for all checkpoints."""
        if (init, n) not in self.init_answers:
            place = place._replace(temperature=1.0)
            records = self.play(place, scene, init, n, verify_iters=1)
            self.init_answers[init, n] = records
        records, micro_tokens = self.init_answers[init, n], self.cfg.ppo.micro_tokens
        with within_memory("scoring", self.cfg, "ppo.micro_tokens"):
            pairs = log_ratios(records, self.loader.get, init, checkpoint, micro_tokens)
        return [{"cluster": record["cluster"], "counts": {"kl": pair}}
                for record, pair in zip(records, pairs)]

    def play(self, place, scene, checkpoint, n, bar=None, verify_iters=None):
        """Play the n episodes, whether known or not. Returns: records of `rollout.evaluate`."""
        e = self.cfg.eval
        verify_iters = verify_iters or e.verify_iters
        if checkpoint is None:
            return play_reference(scene.env, place.arm, n, e.seed, verify_iters)
        if not self.is_whole(checkpoint):
            raise UserError(f"{self.folder} was packed without its weights, and has not kept "
                            f"{place.arm}, {place.variant}, {place.split}, "
                            f"{temperature_name(place.temperature)}, {n} episodes")
        policy = self.loader.get(checkpoint)
        ways = ("model.sample_tokens", "eval.batch_size", "model.merge_for_sampling=false")
        with within_memory("sampling", self.cfg, *ways):
            return evaluate(policy, scene.env, n, e.seed, verify_iters, place.temperature,
                            e.batch_size, bar)


# ---------------------------------------------------------------- the runs together
class Scene(NamedTuple):
    """What is played at a split and variant: settings of the environment, and how often."""
    env: dict
    n: int


class Evaluation:
    """The runs of one or several seeds, what is played in each, and a progress bar.

    Attributes: seeds: those of the runs, each once; temperatures: numbers and Nucleus; scenes:
        {(split, variant): Scene}; places: of the table, in its order.
    Raises: UserError if a run has no arms, or eval.save_merged names one that not all runs have.
    """

    def __init__(self, cfg):
        e = self.e = cfg.eval
        folders = [Path(folder) for folder in e.runs or [cfg.run.dir]]
        self.gflops = cache(lambda checkpoint: load_state(checkpoint)["gflops"])
        self.official = cache(lambda checkpoint: load_state(checkpoint)["official_gflops"])
        self.comparison = Comparison(folders, cfg.ppo.init, self.gflops, e.arms)
        self.shown = {arm.name: arm.checkpoints for arm in self.comparison.arms}
        for name in e.save_merged:
            if name not in self.shown:
                raise UserError(f"eval.save_merged: {name!r} is none of {', '.join(self.shown)}")
        loader = Loader(cfg)
        seeds = list(map(seed_of, self.comparison.arms[0].checkpoints))  # one per run
        self.seeds = list(dict.fromkeys(seeds))  # lib/arms.Seed each
        self.runs = []
        for folder, seed in zip(folders, seeds):
            self.runs.append(EvaluatedRun(folder, cfg, loader, seed))
        self.temperatures = []
        for sampling in e.temperatures:
            truncated = isinstance(sampling, dict)
            self.temperatures.append(Nucleus(**sampling) if truncated else sampling)
        self.scenes, self.places = {}, []
        self.reports = None  # those that the environments of all variants have
        for split, variant in product(e.splits, e.variants):
            self._add_scene(cfg.env, split, variant)
        self.curve_points = self._find_curve_points() if e.curve_n else {}
        points = (len(e.variants) + e.kl) * sum(map(len, self.curve_points.values()))
        n = points * e.curve_n + sum(self.scene(place).n for place in self.places)
        self.bar = progress_bar(total=n * len(self.runs), unit="episode")

    def _add_scene(self, settings, split, variant):
        """Its places, arms first; what an environment plays whatever its split is shown once."""
        env_settings = {**settings, "split": split, **self.e.variants[variant]}
        env = make_env(env_settings, self.e.verify_iters)
        played = getattr(env, "playing", None) or split
        if (played, variant) in self.scenes:
            return
        self.scenes[played, variant] = Scene(env_settings, self.e.splits[split])
        arms = product(self.shown, self.temperatures)
        for player in [*arms, *product(env.references, [None])]:
            self.places.append(Place(played, variant, *player))
        names = [name for name, *_ in env.reports]
        reports = self.reports or [Report(*report) for report in env.reports]
        self.reports = [report for report in reports if report.name in names]

    def _find_curve_points(self):
        """{Init or training: checkpoints per run, of each point on its curve}, evenly spread."""
        points = {}
        for init in self.comparison.inits:
            points[init.name] = [init.checkpoints]
        for training in self.comparison.trainings:
            steps = training.common()
            wanted = min(len(steps), self.e.curve_points or len(steps))
            spread = torch.linspace(len(steps) - 1, 0, wanted).flip(0)  # one alone is the last
            points[training.name] = [steps[nth] for nth in spread.round().int().tolist()]
        return points

    def scene(self, place):
        return self.scenes[place.split, place.variant]

    def leading_place(self, arm, variant):
        """Of an arm at the first split and temperature."""
        split = next(split for split, played in self.scenes if played == variant)
        return Place(split, variant, arm, self.temperatures[0])

    def table(self):
        """{Place: episodes of all runs}."""
        cells = {place: [] for place in self.places}
        for (nth, run), place in product(enumerate(self.runs), self.places):
            checkpoint = self.shown[place.arm][nth] if place.arm in self.shown else None
            scene = self.scene(place)
            leads = place == self.leading_place(place.arm, place.variant)
            kept = self.e.conversations if leads else 0
            cells[place] += run.cell(place, scene, checkpoint, scene.n, self.bar, kept)
        return cells

    def curve(self, variant):
        """{Init or training: its Checkpoints in order, from the Init that it began from on}."""
        curve, starts = {}, self.comparison.starts_of_trainings()
        inits = {init.name: init.checkpoints for init in self.comparison.inits}
        measures_kl = self.e.kl and variant == next(iter(self.e.variants))
        for name, points in self.curve_points.items():
            place = self.leading_place(name, variant)
            init = inits.get(starts.get(name, name)) if measures_kl else None
            curve[name] = [self.checkpoint(place, paths, init) for paths in points]
        for name, init in starts.items():
            if curve:
                (start,) = curve[init]
                if name.startswith("rl"):
                    start = start._replace(step=0)
                later = [point for point in curve[name] if point.gflops > start.gflops]
                curve[name] = [start, *later]
        return curve

    def checkpoint(self, place, paths, init=None):
        """The Checkpoint of all runs, whose paths these are; with its KL from those of Init, if
        they are given."""
        scene, n, episodes, from_init = self.scene(place), self.e.curve_n, [], []
        for nth, (run, path) in enumerate(zip(self.runs, paths)):
            episodes += run.cell(place, scene, path, n, self.bar)
            if init:
                from_init += run.from_init(place, scene, path, init[nth], n, self.bar)
        number = paths[0].name.partition("_")[2]
        step = int(number) if number.isdigit() else 0  # a copied folder may have any name
        return Checkpoint(self.comparison.mean_gflops(paths), episodes, step, from_init)

    def points(self, curves):
        """{variant: {Init or training: Points}}. Args: curves: {variant: as of `curve`}."""
        lead, points = self.reports[0].lead, {}
        for variant, curve in curves.items():
            points[variant] = found = {}
            for name, checkpoints in curve.items():
                found[name] = [point_of(checkpoint, lead) for checkpoint in checkpoints]
        return points

    def frontier(self, curves):
        """Rows of how far PPO lies above SFT, see lib/results.py, in the variants after the first,
        which is the trained one. Args: curves: {variant: as of `curve`}."""
        (_, trained), *others = curves.items()
        sft = [name for name, points in trained.items()
               if name.startswith("sft") and len(points) > 1]
        starts = self.comparison.starts_of_trainings()
        rows = []
        for (variant, other), arm, base in product(others, self.comparison.ppo, sft):
            both = [[*curve[base], curve[arm.name][-1]] for curve in (trained, other)]
            if starts.get(arm.name) != starts.get(base):  # KL from two Inits cannot be compared
                both[0] = [checkpoint._replace(from_init=()) for checkpoint in both[0]]
            found = above_curve(*both, self.reports[0].lead)
            rows.append({"variant": variant, "arm": arm.name, "base": base, **found})
        return rows

    def transcripts(self):
        """Episodes of each arm of the first run, at the first split and temperature."""
        found = []
        for arm, variant in product(self.shown, self.e.variants):
            place = self.leading_place(arm, variant)
            records = self.runs[0].play(place, self.scene(place), self.shown[arm][0],
                                        self.e.transcripts)
            episodes = [list(map(transcript, record["turns"])) for record in records]
            found.append({"arm": arm, "variant": variant, "episodes": episodes})
        return found

    def conversations(self, cells):
        """What conversations.jsonl holds, a dict per arm and variant: see lib/conversations.py.

        Args: cells: of `table`, whose first episodes these are. Where a cell was played when fewer
            were wanted, as many are played again.
        """
        found = []
        for arm, variant in product(self.shown, self.e.variants):
            place = self.leading_place(arm, variant)
            scene = self.scene(place)
            n = min(self.e.conversations, scene.n)
            episodes = [episode.get("turns") for episode in cells[place][:n]]  # of the first run
            if None in episodes:
                records = self.runs[0].play(place, scene, self.shown[arm][0], n)
                episodes = [graded(record["turns"]) for record in records]
            found.append({**place._asdict(), "env": scene.env,
                          "verify_iters": self.e.verify_iters, "episodes": episodes})
        return found

    def trained_at(self):
        """{training: the commits that its runs were trained at}, of those that note them."""
        found = {}
        for run, training in product(self.runs, self.comparison.trainings):
            for one in trained_at(run.folder / training.name / "config.yaml"):
                found.setdefault(training.name, {})[one] = None
        return {name: list(commits) for name, commits in found.items()}

    def minutes(self):
        """{training: its minutes, mean over the runs}, of those that logged them."""
        found = Counter()
        for run, training in product(self.runs, self.comparison.trainings):
            with suppress(FileNotFoundError):
                log = (run.folder / training.name / "metrics.jsonl").read_text(encoding="utf-8")
                for line in log.splitlines():
                    with suppress(ValueError):  # a line that a crash cut short
                        seconds = json.loads(line)["seconds"]
                        found[training.name] += seconds / 60 / len(self.runs)
        return found


def provenance():
    """{commit, machine, versions}: where and with what this is measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"commit": commit(),
            "machine": f"{device}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
            "versions": versions()}


def save_results(folder, settings, conversations, result):
    """Write what report.py reads, evaluation.json last."""
    path = folder / "evaluation.json"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "evaluation.yaml", yaml.safe_dump(settings, sort_keys=False))
    lines = [json.dumps(one) + "\n" for one in conversations]
    write_atomic(folder / "conversations.jsonl", "".join(lines))
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    print(f"written: {path}; python report.py {folder} shows it", file=sys.stderr)


# ---------------------------------------------------------------- the command
def main(arguments):
    """Evaluate the arms that a configuration names. arguments: CONFIG.yaml [key=value ...]."""
    started = time.monotonic()
    cfg, raw, _ = load(arguments)
    e, out = cfg.eval, Path(cfg.run.dir)
    folders = ", ".join(e.runs or [cfg.run.dir])
    announce("eval.py", cfg, f"plays the arms of {folders} -> {out}/evaluation.json")
    evaluation = Evaluation(cfg)
    cells = evaluation.table()
    comparison = evaluation.comparison
    gflops, official = {}, {}
    for arm in comparison.arms:
        gflops[arm.name] = comparison.mean_gflops(arm.checkpoints)
        counted = sum(map(evaluation.official, arm.checkpoints)) / len(arm.checkpoints)
        official[arm.name] = None if math.isnan(counted) else counted
    splits = {split: scene.n for (split, _), scene in evaluation.scenes.items()}
    curves = {variant: evaluation.curve(variant) for variant in e.variants}
    points = evaluation.points(curves)
    notes = comparison.notes + official_notes(comparison, official)
    notes += seen_notes(comparison.arms, splits)
    if len(evaluation.seeds) == 1:
        notes.append(ONE_SEED)
    result = {
        "runs": [str(run.folder) for run in evaluation.runs],
        "seeds": seed_names(evaluation.seeds),
        **provenance(),
        "reports": [report._asdict() for report in evaluation.reports],
        "splits": splits, "variants": e.variants,
        "temperatures": evaluation.temperatures, "curve_n": e.curve_n,
        "gflops": gflops, "official_gflops": official, "notes": notes,
        "table": summarize(cells),
        "differences": differences(cells, comparison.pairs()),
        "curves": points,
        "frontier": evaluation.frontier(curves) if e.curve_n else [],
    }
    evaluation.bar.close()
    if e.transcripts:
        result["transcripts"] = evaluation.transcripts()
    conversations = evaluation.conversations(cells)
    minutes = {**evaluation.minutes(), "eval": (time.monotonic() - started) / 60}
    result["trained_at"] = evaluation.trained_at()
    result["minutes"] = {name: round(spent, 1) for name, spent in minutes.items()}
    save_results(out, raw, conversations, result)
    for name in e.save_merged:
        folder = out / name / "merged"
        save_merged(evaluation.shown[name][0], cfg, folder)
        print(f"written: {folder}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
