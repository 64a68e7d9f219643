"""A suite of findings, as a findings.yaml or its like writes it down, and its jobs. No torch.

    suite          the folder of the suite
    arms           name: {run: "sft.py gp_l.yaml key=value ..", quick, after, minutes}
    evaluations    name: {run: "eval.py gp_l.yaml ..", quick, arms, seeds, minutes}
    findings       number: {name, decides, beside, provided}, see lib/verdicts.py

What they mean is said in configs/mini/findings.yaml. On disk:

    SUITE/sSEED/CONFIG/             the run folder of a seed and a configuration, with its arms
    SUITE/sSEED/evaluations/NAME/   an evaluation of that seed alone
    SUITE/NAME/evaluation.json      the same, all seeds pooled: what the verdicts are read from

An evaluation keeps what it has played in the run folders, so that pooling plays nothing again. Two
at once must not write there: those of a configuration wait for each other.
"""
import json
import shlex
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from lib.checks import (
    check_settings, checked, choice, fields, list_of, mapping_of, nearest, text, whole)
from lib.checks import number as numeric
from lib.errors import UserError
from lib.runs import arm_name
from lib.settings import ROOT, load, read_yaml
from lib.verdicts import FINDING

MINUTES = list_of(numeric(0), 2)  # as published and --quick
ARM = {"run": text, "quick": text, "after": text, "minutes": MINUTES}
EVALUATION = {"run": text, "quick": text, "arms": list_of(text), "seeds": whole(1, 1000),
              "minutes": MINUTES}
SCHEMA = {"suite": text, "arms": mapping_of(lambda arm: check_settings(arm, ARM)),
          "evaluations": mapping_of(fields(EVALUATION)),
          "findings": mapping_of(lambda finding: check_settings(finding, FINDING))}
OURS = ("run.seed", "eval.runs", "eval.arms")  # keys that each command has a value of its own for


@dataclass(eq=False)
class Job:
    """A command of the suite.

    Attributes: folder: the run folder that it writes to, None if several; minutes: expected;
        needs: Jobs that must have succeeded before; waits: Jobs that must be over before.
    """
    name: str
    command: list  # ["sft.py", "configs/mini/gp_l.yaml", "run.seed=1", ...]
    folder: Path | None
    minutes: float
    needs: list = field(default_factory=list)
    waits: list = field(default_factory=list)

    def words(self, python):
        """The command line, by that python."""
        script, *arguments = self.command
        return [python, str(ROOT / script), *arguments]


class Suite:
    """A findings.yaml, or another of its kind, under overrides of the command line.

    Args: where: a folder of configurations that has a findings.yaml, or such a file, the
        configurations beside it; quick: one seed, short runs; overrides: "ppo.clip=0.3", for every
        command (run.dir=X is the suite's folder).
    Attributes: folder: of the suite; findings: {number: of the YAML}; training, trained: functions
        of an arm's name, its command and its folder.
    Raises: UserError for a YAML or an override that is wrong, before anything runs.
    """

    def __init__(self, where, quick=False, overrides=()):
        where, self.quick = Path(where), quick
        self.path = where if where.suffix == ".yaml" else where / "findings.yaml"
        self.configs = self.path.parent
        written = read_yaml(self.path, "name a folder that has one, such as configs/mini")
        try:
            written = checked(str(self.path), written, fields(SCHEMA))
        except ValueError as error:
            raise UserError(str(error)) from None
        self.arms, self.evaluations = written["arms"], written["evaluations"]
        self.findings = written["findings"]
        self.folder = Path(written["suite"] + ("_quick" if quick else ""))
        self.overrides = []
        for override in overrides:
            key, _, value = override.partition("=")
            if key in OURS:
                raise UserError(f"{key}: {self.path} decides about it")
            if key == "run.dir":
                self.folder = Path(value)
            else:
                self.overrides.append(override)
        self.training, self.trained = cache(self._training), cache(self._trained)
        self._check_names()

    def _check_names(self):
        """Raises: UserError if an arm, an evaluation or a line names what is not there."""
        for name, arm in self.arms.items():
            if not {"run", "minutes"} <= set(arm):
                raise UserError(f"{self.path}: arms.{name} needs run and minutes")
            if "after" in arm:
                self._known(arm["after"], self.arms, f"arms.{name}.after")
        for name, evaluation in self.evaluations.items():
            for arm in evaluation["arms"]:
                self._known(arm, self.arms, f"evaluations.{name}.arms")
        for number in self.findings:
            for line in self.lines(number):
                where = f"findings.{number}"
                self._known(line["at"][0], self.evaluations, where)
                for arm in arms_of(line):
                    self._known(arm, self.evaluations[line["at"][0]]["arms"], where)

    def _known(self, name, names, where):
        if name not in names:
            raise UserError(f"{self.path}: {where}: no {name}"
                            f"{nearest(name, names)}")

    def lines(self, number):
        """All lines of a finding that name an evaluation."""
        finding = self.findings[number]
        provided = [finding["provided"]] if "provided" in finding else []
        return [*finding["decides"], *finding.get("beside", []), *provided]

    # ------------------------------------------------------------ names and commands
    def seeds(self, evaluation):
        last = 1 if self.quick else self.evaluations[evaluation]["seeds"]
        return list(range(1, last + 1))

    def evaluations_of(self, numbers):
        """Names of the evaluations that findings need, in their order."""
        lines = [line for number in numbers for line in self.lines(number)]
        return list(dict.fromkeys(line["at"][0] for line in lines))

    def _trained(self, arm):
        """The name of an arm's folder, as the scripts make it of the command line."""
        script, config, given = self.training(arm)
        _, raw, overrides = load([config, *given])
        return arm_name(script.removesuffix(".py"), overrides, raw["ppo"]["init"])

    def _training(self, arm):
        """(script, path of the configuration, overrides) of an arm. Raises: UserError."""
        before = self.arms[arm].get("after")
        start = self.trained(before) if before else ""
        return self._command(self.arms[arm], start, "sft.py", "rl.py")

    def _command(self, entry, start, *scripts):
        words = shlex.split(entry["run"])
        if self.quick:
            words += shlex.split(entry.get("quick", ""))
        words = [word.replace("{start}", start) for word in words]
        if len(words) < 2 or words[0] not in scripts:
            raise UserError(f"{self.path}: {entry['run']!r} is not "
                            f"{' or '.join(scripts)} CONFIG.yaml [key=value ...]")
        config, given = str(self.configs / words[1]), [*words[2:], *self.overrides]
        load([config, *given])
        return words[0], config, given

    def run_folder(self, config, seed):
        return self.folder / f"s{seed}" / Path(config).stem

    # ------------------------------------------------------------ jobs
    def jobs(self, numbers):
        """The Jobs of findings, each once, those that come first in the findings' order first."""
        self._jobs = {}  # command -> Job
        self._last = {}  # configuration -> Job that pooled its latest evaluation
        for name in self.evaluations_of(numbers):
            self._evaluation_jobs(name)
        return list(self._jobs.values())

    def jobs_of(self, number):
        """Names of the jobs of one finding."""
        return [job.name for job in self.jobs([number])]

    def _add(self, name, command, folder, minutes, needs, waits=()):
        """The Job of a command, one for all who want it."""
        job = Job(name, command, folder, minutes[self.quick], list(needs), list(waits))
        return self._jobs.setdefault(tuple(command), job)

    def _arm_job(self, arm, seed):
        before = self.arms[arm].get("after")
        needs = [self._arm_job(before, seed)] if before else []
        script, config, given = self.training(arm)
        folder = self.run_folder(config, seed)
        command = [script, config, *given, f"run.seed={seed}", f"run.dir={folder}"]
        return self._add(f"{arm} seed {seed}", command, folder, self.arms[arm]["minutes"], needs)

    def _evaluation_jobs(self, name):
        """Of each seed, and of all of them."""
        evaluation = self.evaluations[name]
        script, config, given = self._command(evaluation, "", "eval.py")
        self._check_places(name, config, given)
        arms = [self.trained(arm) for arm in evaluation["arms"]]
        command = [script, config, *given, f"eval.arms={json.dumps(arms)}"]
        waits = [self._last[config]] if config in self._last else []
        needs, runs = [], []
        for seed in self.seeds(name):
            trained = [self._arm_job(arm, seed) for arm in evaluation["arms"]]
            folder = self.run_folder(config, seed)
            runs.append(str(folder))
            played = [*command, f"eval.runs={json.dumps(runs[-1:])}",
                      f"run.dir={self.folder / f's{seed}' / 'evaluations' / name}"]
            needs.append(self._add(f"{name} seed {seed}", played, folder, evaluation["minutes"],
                                   trained, waits))
        pooled = [*command, f"eval.runs={json.dumps(runs)}", f"run.dir={self.folder / name}"]
        self._last[config] = self._add(f"{name}, all seeds", pooled, None, [0.5, 0.5], needs)

    def _check_places(self, name, config, given):
        """Raises: UserError if a finding reads a split or variant that is not played."""
        _, raw, _ = load([config, *given])
        for number in self.findings:
            for line in self.lines(number):
                evaluation, split, variant, _ = line["at"]
                if evaluation == name:
                    self._known(split, raw["eval"]["splits"], f"findings.{number}: eval.splits")
                    self._known(variant, raw["eval"]["variants"],
                                f"findings.{number}: eval.variants")


def arms_of(line):
    """The arms that a line of a finding, or its `provided`, names."""
    if "says" in line:
        return [word for word in line["says"].split() if "/" in word]
    return [line["start_of"], line["of_start_of"]]


def chosen(findings, numbers):
    """The numbers of findings as the command line names them, none: all. Raises: UserError."""
    for number in numbers:
        try:
            checked("finding", number, choice(*findings))
        except ValueError as error:
            raise UserError(str(error)) from None
    return [number for number in findings if number in numbers or not numbers]
