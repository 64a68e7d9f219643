"""Which checkpoints are compared with which: the arms of eval.py, from the folders of a run.

    Init    where an arm began: ppo.init of an rl* folder's own config.yaml; of an sft* folder in
            which no PPO began, its sft.init, or else its step sft.init_step
    sft*    at the compute of PPO, of that which shares its Init or began at one of its checkpoints:
            the checkpoint of nearest model FLOPs. Without such PPO: at the compute of the first
            rl*; without any, the last
    rl*     the last checkpoint

Several runs (seeds) are pooled: an arm is one checkpoint of each. Where one name would stand for
several arms they say which: "Init @ sft/step_10", "sft @ step_480".
"""
import os
import re
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import NamedTuple

import yaml

from lib.errors import UserError
from lib.runs import checkpoints
from lib.settings import with_defaults

EQUAL_COMPUTE = 0.05  # model FLOPs of SFT and PPO may differ by this share


class Training(NamedTuple):
    """A folder sft* or rl* that all runs have."""
    name: str
    checkpoints: list  # per run: its paths in order

    @property
    def last(self):
        return tuple(paths[-1] for paths in self.checkpoints)

    def common(self):
        """The checkpoints, one per run, of each step that all runs have."""
        first, *others = [{path.name: path for path in paths} for paths in self.checkpoints]
        found = []
        for name, path in first.items():
            if all(name in other for other in others):
                found.append((path, *[other[name] for other in others]))
        return found

    @property
    def folder(self):
        """Of the first run."""
        return self.last[0].parent


@dataclass(eq=False)  # compared by identity
class Arm:
    """A row of the table: where trainings began (Init), or a training at one of its checkpoints."""
    name: str
    checkpoints: tuple  # one per run
    starts: list = field(default_factory=list)  # the Inits that it began from, if they are known
    partners: list = field(default_factory=list)  # of PPO: SFT from the same start, at its compute


def trained_with(checkpoint):
    """The settings that a checkpoint's arm was trained with: the nested dict of its config.yaml.

    Raises: UserError if they cannot be read.
    """
    path = checkpoint.parent / "config.yaml"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        raise UserError(f"{path} is missing or unreadable: it says what {checkpoint} is") from None


class Seed(NamedTuple):
    """What trainings have in common that are one seed: they began from one Init."""
    training: int  # run.seed
    model: str


def seed_of(checkpoint):
    settings = trained_with(checkpoint)
    return Seed(settings["run"]["seed"], settings["model"]["path"])


def seed_names(seeds):
    """What tells Seeds apart: their numbers, or, where one number stands for several, their models.
    """
    numbers = [seed.training for seed in seeds]
    if len(set(numbers)) == len(numbers):
        return numbers
    return [f"{seed.training} of {os.path.basename(seed.model)}" for seed in seeds]


def find_trainings(runs, kind, chosen=()):
    """The Trainings of a kind, "sft" or "rl", in natural order: 1, 3, 10; of those that are chosen.
    """
    found = []
    names = {path.name for path in runs[0].glob(f"{kind}*")}
    if chosen:
        names &= set(chosen)
    for name in sorted(names, key=natural_order):
        paths = []
        for run in runs:
            paths.append([path for _, path in checkpoints(run / name)])
        if all(paths):
            found.append(Training(name, paths))
    return found


def natural_order(name):
    parts = re.split(r"(\d+)", name)  # every second one is digits
    return [int(part) if part.isdigit() else part for part in parts]


class Comparison:
    """The arms of runs, and which differences are of interest.

    Args:
        runs: folders (Paths); init: ppo.init of the given configuration, for runs without PPO;
        gflops: function of a checkpoint's path;
        chosen: names of the trainings to compare (eval.arms), none: all.
    Attributes:
        trainings: those that all runs have; inits, sft, ppo: Arms; notes: lines that a reader of
        the table must know.
    Raises: UserError if there is nothing to evaluate.
    """

    def __init__(self, runs, init, gflops, chosen=()):
        self.runs, self.gflops, self.notes = runs, gflops, []
        self.chosen = chosen
        sft, rl = find_trainings(runs, "sft", chosen), find_trainings(runs, "rl", chosen)
        self.trainings = sft + rl
        there = [training.name for training in self.trainings]
        for name in chosen:
            if name not in there:
                raise UserError(f"eval.arms: no {name} with a checkpoint in {runs[0]} (and in all "
                                "other runs, if several are pooled)")
        if not self.trainings:
            raise UserError(f"nothing to evaluate under {runs[0]}: run sft.py and rl.py first")
        self._inits = {}  # Arms by their checkpoints
        self._sft = {training.name: {} for training in sft}  # {training: {checkpoints: Arm}}
        self.ppo = []
        for training in rl:
            self._add_ppo(training, sft)
        for training in sft:
            if not self._sft[training.name]:
                self._add_sft_alone(training, init)
        self.inits = self._named_apart("Init", self._inits)
        self.sft = []
        for name, arms in self._sft.items():
            self.sft += self._named_apart(name, arms)

    @property
    def arms(self):
        """In the order of the table."""
        return self.inits + self.sft + self.ppo

    def pairs(self):
        """(arm, base) names: all with their starts; PPO with its SFT partners, and with other PPO
        from its start (where arms were chosen: with other PPO)."""
        found = []
        for arm in self.sft + self.ppo:
            found += product([arm], arm.starts)
        for arm in self.ppo:
            found += product([arm], arm.partners)
        for earlier, later in combinations(self.ppo, 2):
            if self.chosen or (later.starts and later.starts == earlier.starts):
                found.append((later, earlier))
        return [(arm.name, base.name) for arm, base in found]

    def starts_of_trainings(self):
        """{training: name of the Init that it began from}, where that is known: SFT's own, else the
        one that PPO shares with it."""
        found = {arm.name: arm.starts[0].name for arm in self.ppo if arm.starts}
        names = {init.checkpoints: init.name for init in self.inits}
        for training in self.trainings:
            if training.name not in self._sft:
                continue
            shared = [init.checkpoints for arm in self._sft[training.name].values()
                      for init in arm.starts]
            start = own_start(training)
            if start not in names and len(shared) == 1:
                (start,) = shared
            if start in names:
                found[training.name] = names[start]
        return found

    # ------------------------------------------------------------ the arms
    def _add_ppo(self, training, sft):
        """PPO, where it began, and every SFT that went on from there (else the plain one)."""
        arm = Arm(training.name, training.last)
        if len({path.name for path in training.last}) > 1:
            raise UserError(f"{training.name} has come to {self._names(training.last)}: let rl.py "
                            "finish it in all runs, or leave it out (eval.arms)")
        self.ppo.append(arm)
        start = self._start_of_ppo(training)
        self._note_start(arm, start)
        for source in sft:
            if start and (source.folder == start[0].parent or own_start(source) == start):
                self._add_partner(arm, source, start)
        if not arm.partners:
            for source in sft:
                if source.name == "sft":
                    self._add_partner(arm, source, own_start(source))

    def _add_partner(self, arm, source, start):
        partner = self._add_sft(source, self._nearest(source, arm))
        self._note_start(partner, start)
        arm.partners.append(partner)

    def _add_sft_alone(self, training, init):
        """SFT that no PPO is compared with."""
        if self.ppo:
            shown, start = self._nearest(training, self.ppo[0]), own_start(training)
        else:
            shown, start = training.last, self._given_start(training, init)
        self._note_start(self._add_sft(training, shown), start)

    def _add_sft(self, training, shown):
        return self._sft[training.name].setdefault(shown, Arm(training.name, shown))

    def _note_start(self, arm, start):
        """Note that an arm began from the checkpoints `start` (None: not known)."""
        if start:
            init = self._inits.setdefault(start, Arm("Init", start))
            if init not in arm.starts:
                arm.starts.append(init)

    def _named_apart(self, name, arms):
        """The Arms {checkpoints: Arm} in natural order; several of one name say which they are."""
        for arm in arms.values():
            paths = zip(self.runs, arm.checkpoints)
            where = [os.path.relpath(path, run).removeprefix(f"{name}/") for run, path in paths]
            same = len(set(where)) == 1
            if len(arms) > 1:
                arm.name = f"{name} @ {where[0] if same else ', '.join(where)}"
        return sorted(arms.values(), key=lambda arm: natural_order(arm.name))

    # ------------------------------------------------------------ where an arm began
    def _start_of_ppo(self, training):
        """By its own ppo.init; None for the bare base, or if the checkpoints are gone."""
        start = []
        for run, last in zip(self.runs, training.last):
            init = trained_with(last)["ppo"]["init"]
            start.append(run / init)
            if init != "none" and not start[-1].is_dir():
                self.notes.append(f"{training.name}: {init}, where it began, is gone")
        return all_there(start)

    def _given_start(self, training, init):
        """Where PPO would begin by the given configuration, if that lies in this SFT training."""
        if init == "none":
            return None
        start = None
        if init.startswith(f"{training.name}/"):
            start = all_there([run / init for run in self.runs])
            if start is None:
                self.notes.append(f"ppo.init: no checkpoint {init}, so Init is the step "
                                  "sft.init_step")
        return start or own_start(training)

    # ------------------------------------------------------------ equal compute
    def mean_gflops(self, paths):
        return sum(map(self.gflops, paths)) / len(paths)

    def _nearest(self, training, ppo):
        """The checkpoints of an SFT training, one per run, nearest to the compute of a PPO arm."""
        nearest, gaps = [], []  # gaps: what those that are off have spent more, as a share
        for paths, last in zip(training.checkpoints, ppo.checkpoints):
            budget = self.gflops(last)
            path = min(paths, key=lambda path: abs(self.gflops(path) - budget))
            nearest.append(path)
            spent = self.gflops(path)
            if abs(spent - budget) > EQUAL_COMPUTE * budget:
                gaps.append(spent / budget - 1)
        if gaps:
            self._note_gap(nearest, ppo.checkpoints, gaps)
        return tuple(nearest)

    def _note_gap(self, sft, ppo, gaps):
        where = f" in {len(gaps)} of {len(sft)} runs" if len(sft) > 1 else ""
        self.notes.append(
            f"not at equal compute{where}: {self._names(sft)} has {self.mean_gflops(sft):,.0f} "
            f"model GFLOPs, {_apart(gaps)} than {self._names(ppo)} ({self.mean_gflops(ppo):,.0f})")

    def _names(self, checkpoints):
        """The checkpoints of an arm, one per run, by their paths in it."""
        paths = [str(path.relative_to(run)) for run, path in zip(self.runs, checkpoints)]
        return ", ".join(dict.fromkeys(paths))


def _apart(gaps):
    """Shares in words: "8.0 % less", "8.0 to 9.5 % less", "8.0 % less to 7.0 % more"."""
    low, high = min(gaps), max(gaps)
    if low < 0 < high:
        return f"{-100 * low:.1f} % less to {100 * high:.1f} % more"
    sizes = dict.fromkeys([f"{100 * abs(gap):.1f}" for gap in sorted([low, high], key=abs)])
    return f"{' to '.join(sizes)} % {'more' if low > 0 else 'less'}"


def official_notes(comparison, official):
    """Whether PPO and SFT have spent equal compute as the official code counts it.

    Args: official: {arm: GFLOPs so counted, None if not known}.
    """
    notes = []
    pairs = [(arm, partner) for arm in comparison.ppo for partner in arm.partners]
    for arm, sft in pairs:
        if official[sft.name] is None or official[arm.name] is None:
            continue
        spent, budget = official[sft.name], official[arm.name]
        share = spent / budget - 1
        more = "more" if share > 0 else "less"
        verdict = f"{100 * abs(share):.0f} % {more}, so not equal"
        if abs(share) <= EQUAL_COMPUTE:
            verdict = "equal, too"
        notes.append(f"counted as the official code does, {sft.name} has spent {spent:,.0f} GFLOPs "
                     f"and {arm.name} {budget:,.0f}: {verdict}")
    return notes


def own_start(training):
    """Where an SFT training began, by its sft.init: the checkpoints there, or its own ones at
    sft.init_step."""
    start = []
    for last in training.last:
        sft = with_defaults(trained_with(last)["sft"], "sft.")
        own = last.with_name(f"step_{sft['init_step']}")
        start.append(own if sft["init"] == "none" else last.parent.parent / sft["init"])
    return all_there(start)


def all_there(paths):
    """The checkpoints, None if not all are there."""
    return tuple(paths) if all(path.is_dir() for path in paths) else None


def seen_notes(arms, splits):
    """Lines on the arms whose training split is one of those played, or holds them all."""
    trained = {}  # split -> names of arms
    for arm in arms:
        for checkpoint in arm.checkpoints:
            split = trained_with(checkpoint)["env"].get("split", "train")
            trained.setdefault(split, {})[arm.name] = True
    notes = []
    for split, names in trained.items():
        seen = [other for other in splits if split in (other, "all")]
        if seen:
            notes.append(f"{', '.join(names)}: trained with env.split={split}, so what is played "
                         f"under {', '.join(seen)} is not new to it")
    return notes
