"""Which checkpoints are compared with which: the arms of eval.py, from the folders of a run.

    Init    where an arm began: ppo.init of an rl* folder's own config.yaml; of an sft* folder in
            which no PPO began, its step sft.init_step
    sft*    at the compute of the PPO that began in it: the checkpoint of nearest model FLOPs. One
            in which none began: at the compute of the first rl*; without any, the last
    rl*     the last checkpoint

Several runs (seeds) are pooled: an arm is one checkpoint of each. Where one name would stand for
several arms they say which: "Init @ sft/step_10", "sft @ step_480".
"""
import os
import re
from collections import Counter
from itertools import combinations
from typing import NamedTuple

import yaml

from lib.runs import checkpoints
from lib.settings import UserError

EQUAL_COMPUTE = 0.05  # model FLOPs of SFT and PPO may differ by this share


class Training(NamedTuple):
    """A folder sft* or rl* that all runs have."""
    name: str
    checkpoints: list  # per run: its paths in order

    @property
    def last(self):
        return tuple(paths[-1] for paths in self.checkpoints)


class Arm(NamedTuple):
    """A row of the table."""
    name: str
    checkpoints: tuple  # one per run


class Row(NamedTuple):
    """A training at one of its checkpoints, and those that it began from (None: not known)."""
    training: Training
    checkpoints: tuple  # one per run
    start: tuple | None


def trained_with(checkpoint):
    """The settings that a checkpoint's arm was trained with: the nested dict of its config.yaml.

    Raises: UserError if they cannot be read.
    """
    path = checkpoint.parent / "config.yaml"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        raise UserError(f"{path} is missing or unreadable: it says what {checkpoint} is") from None


def find_trainings(runs, kind):
    """The Trainings of a kind, "sft" or "rl", in natural order: 1, 3, 10."""
    found = []
    names = {path.name for path in runs[0].glob(f"{kind}*")}
    for name in sorted(names, key=natural_order):
        paths = [[path for _, path in checkpoints(run / name)] for run in runs]
        if all(paths):
            found.append(Training(name, paths))
    return found


def in_order(row):
    return natural_order(f"{row.training.name} {steps(row.checkpoints)}")


def natural_order(name):
    parts = re.split(r"(\d+)", name)  # every second one is digits
    return [int(part) if part.isdigit() else part for part in parts]


class Comparison:
    """The arms of runs, and which differences are of interest.

    Args:
        runs: folders (Paths); init: ppo.init of the given configuration, for runs without PPO;
        gflops: function of a checkpoint's path.
    Attributes:
        trainings: those that all runs have; arms: Arms in the order of the table;
        inits: {checkpoints: name} of where arms began; ppo_starts: {training: those checkpoints};
        pairs: (arm, base) names; notes: what a reader of the table must know.
    Raises: UserError if there is nothing to evaluate.
    """

    def __init__(self, runs, init, gflops):
        self.runs, self.gflops = runs, gflops
        self.notes = []
        self.sft, self.rl = find_trainings(runs, "sft"), find_trainings(runs, "rl")
        self.trainings = self.sft + self.rl
        if not self.trainings:
            raise UserError(f"nothing to evaluate under {runs[0]}: run sft.py and rl.py first")
        ppo_rows = [Row(rl, rl.last, self._start_of(rl)) for rl in self.rl]
        self.ppo_starts = {row.training.name: row.start for row in ppo_rows}
        partners = {}  # name of PPO's training -> Row of SFT
        for row in ppo_rows:
            source = self._source_of(row)
            if source:
                start = row.start or own_start(source)
                partners[row.training.name] = Row(source, self._nearest(source, row), start)
        sft_rows = [*partners.values(), *self._rows_without_ppo(partners, ppo_rows, init)]
        sft_rows.sort(key=in_order)
        self._name_arms(sft_rows, ppo_rows)
        self._pair(sft_rows, ppo_rows, partners)
        self.notes = list(dict.fromkeys(self.notes))

    # ------------------------------------------------------------ where an arm began
    def _start_of(self, rl):
        """The checkpoints from which a PPO began, None for the bare base or if they are gone."""
        found = []
        for run, last in zip(self.runs, rl.last):
            init = trained_with(last)["ppo"]["init"]
            found.append(run / init)
            if init != "none" and not found[-1].is_dir():
                self.notes.append(f"{rl.name}: its start {found[-1]} is gone, so it is not shown")
        return tuple(found) if all(path.is_dir() for path in found) else None

    def _source_of(self, row):
        """The SFT training that goes on from where a PPO began, None if there is none."""
        sft = {training.name: training for training in self.sft}
        began_in = row.start[0].parent.name if row.start else None
        return sft.get(began_in, sft.get("sft"))

    def _rows_without_ppo(self, partners, ppo_rows, init):
        """Rows of the SFT trainings from which no PPO began."""
        with_ppo = [row.training.name for row in partners.values()]
        for training in self.sft:
            if training.name in with_ppo:
                continue
            if ppo_rows:
                shown = self._nearest(training, ppo_rows[0])
                yield Row(training, shown, own_start(training))
            else:
                yield Row(training, training.last, self._configured_start(training, init))

    def _configured_start(self, training, init):
        """Where PPO would begin by the given configuration, if that lies in this SFT training."""
        if init == "none":
            return None
        start = tuple(run / init for run in self.runs)
        if not all(path.is_dir() for path in start):
            self.notes.append(f"ppo.init: no checkpoint {start[0]}; Init is the step sft.init_step")
        elif start[0].parent.name == training.name:
            return start
        return own_start(training)

    # ------------------------------------------------------------ equal compute
    def mean_gflops(self, checkpoints):
        return sum(map(self.gflops, checkpoints)) / len(checkpoints)

    def _nearest(self, sft, ppo_row):
        """The checkpoints of an SFT training, one per run, nearest to the compute of a PPO row."""
        found = []
        for paths, last in zip(sft.checkpoints, ppo_row.checkpoints):
            budget = self.gflops(last)
            path = min(paths, key=lambda path: abs(self.gflops(path) - budget))
            found.append(path)
            gap = self.gflops(path) - budget
            if abs(gap) > EQUAL_COMPUTE * budget:
                more = "more" if gap > 0 else "less"
                self.notes.append(
                    f"not at equal compute: {path} has {self.gflops(path):,.0f} model GFLOPs, "
                    f"{100 * abs(gap) / budget:.1f} % {more} than {last} ({budget:,.0f})")
        return tuple(found)

    # ------------------------------------------------------------ names and pairs
    def _name_arms(self, sft_rows, ppo_rows):
        starts = {row.start for row in sft_rows + ppo_rows if row.start}
        self.inits = {}
        for start in sorted(starts, key=lambda paths: natural_order(str(paths[0]))):
            where = os.path.relpath(start[0], self.runs[0])
            self.inits[start] = f"Init @ {where}" if len(starts) > 1 else "Init"
        self.names = {}  # of (training, checkpoints)
        shown = dict.fromkeys((row.training.name, row.checkpoints) for row in sft_rows)
        times = Counter(name for name, _ in shown)
        for name, paths in shown:
            self.names[name, paths] = f"{name} @ {steps(paths)}" if times[name] > 1 else name
        for row in ppo_rows:
            self.names[row.training.name, row.checkpoints] = row.training.name
        self.arms = [Arm(name, paths) for paths, name in self.inits.items()]
        self.arms += [Arm(name, paths) for (_, paths), name in self.names.items()]

    def _pair(self, sft_rows, ppo_rows, partners):
        """Every row with its start; PPO with SFT at its compute, and with PPO from its start."""
        pairs = []
        for row in sft_rows + ppo_rows:
            if row.start:
                pairs.append((self._name(row), self.inits[row.start]))
        for row in ppo_rows:
            if row.training.name in partners:
                pairs.append((self._name(row), self._name(partners[row.training.name])))
        for earlier, later in combinations(ppo_rows, 2):
            if later.start and later.start == earlier.start:
                pairs.append((self._name(later), self._name(earlier)))
        self.pairs = list(dict.fromkeys(pairs))

    def _name(self, row):
        return self.names[row.training.name, row.checkpoints]


def own_start(sft):
    """The checkpoints at sft.init_step of an SFT training, None if they are not all there."""
    found = []
    for last in sft.last:
        step = trained_with(last)["sft"]["init_step"]
        found.append(last.with_name(f"step_{step}"))
    return tuple(found) if all(path.is_dir() for path in found) else None


def steps(checkpoints):
    """Their names, one if all have the same."""
    names = [path.name for path in checkpoints]
    return names[0] if len(set(names)) == 1 else ", ".join(names)


def seen_notes(arms, splits):
    """A line for every arm that was trained on what is played: {trained on: arms} of the splits."""
    trained = {}  # split -> names of arms
    for arm in arms:
        for checkpoint in arm.checkpoints:
            split = trained_with(checkpoint)["env"].get("split")
            trained.setdefault(split, {})[arm.name] = True
    notes = []
    for split, names in trained.items():
        seen = [other for other in splits if split in (other, "all")]
        if seen:
            notes.append(f"{', '.join(names)}: trained with env.split={split}, so what is played "
                         f"under {', '.join(seen)} is not new to it")
    return notes
