"""Run what the paper's seven findings need, and say of each whether it is shown.

    python findings.py configs/mini                      all of them; stopped, the same goes on
    python findings.py configs/mini 1 5 7                these
    python findings.py configs/mini --quick              one seed, short: under an hour, 2 cores
    python findings.py configs/mini --list               only prints the commands, for a scheduler
    python findings.py configs/mini --show               runs nothing: the table of what is there
    python findings.py configs/mini --jobs 1 ppo.lr=5e-5 any key=value goes to every command
    python findings.py configs/mini/questions.yaml       another suite: what a reviewer asks

What is run for a finding, and the rule by which it counts as shown, stand in findings.yaml of that
folder, to be read and edited. Here are only sft.py, rl.py and eval.py, called as one would by hand:
each resumes, or ends at once if it is done (lib/suite.py makes the commands, lib/jobs.py runs them
side by side). Findings share what they have in common.

Written to the suite's folder: report.html, the table with all that it is read from, for a browser
(report.py writes it), and findings.json,

    {folder, quick, findings: {number: {name, verdict, minutes, seeds, interval_over,
    evaluations: {name: path}, measured_with: {name: {commit, machine, versions}},
    unfinished: [..], notes: [..], provided: {.., values, holds},
    decides, beside: [{at, says, paper, estimate: [value, low, high], per_seed, verdict}]}}}
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
from contextlib import suppress

from lib.errors import UserError, run_main
from lib.jobs import Board, Crew, cores, minutes_by_job
from lib.results import names_one
from lib.runs import hold, write_atomic, writing
from lib.settings import ROOT
from lib.suite import Suite, chosen
from lib.verdict_table import ONE_SEED, SEEDS, verdict_table
from lib.verdicts import MISSING, Evaluation, verdict_of_all

MADE_WITH = ("commit", "machine", "versions")  # of an evaluation.json


# ---------------------------------------------------------------- what came out
def read_evaluations(suite, number):
    """{name: Evaluation} of a finding, of those that are there."""
    found = {}
    for name in suite.evaluations_of([number]):
        path = suite.folder / name / "evaluation.json"
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError:
            raise UserError(f"{path} is damaged; remove it and run the same again") from None
        names = {arm: suite.trained(arm) for arm in suite.evaluations[name]["arms"]}
        found[name] = Evaluation(written, names)
    return found


def measured(line, evaluations):
    """A line of a finding with what came out, as findings.json holds it."""
    evaluation = evaluations.get(line["at"][0])
    if evaluation is None:
        return {**line, "estimate": None, "per_seed": [], "verdict": MISSING}
    return {**line, **evaluation.found(line)._asdict()}


def finding_result(suite, number, failed):
    """A finding as findings.json holds it.

    Args: failed: {name of a job: what went wrong}.
    """
    finding, evaluations = suite.findings[number], read_evaluations(suite, number)
    result = {"name": finding["name"]}
    for kind in ("decides", "beside"):
        result[kind] = [measured(line, evaluations) for line in finding.get(kind, [])]
    verdicts = [line["verdict"] for line in result["decides"]]
    holds, result["notes"] = True, notes_on(finding, evaluations)
    if "provided" in finding:
        holds, values = provided(finding["provided"], evaluations)
        result["provided"] = {**finding["provided"], "values": values, "holds": holds}
    result["verdict"] = verdict_of_all(verdicts, holds)
    jobs, minutes = suite.jobs_of(number), minutes_by_job(suite.folder)
    result["unfinished"] = [f"{job}: {failed[job]}" for job in jobs if job in failed]
    result["minutes"] = round(sum(minutes.get(job, 0) for job in jobs), 1)
    measured_on = [len(evaluation.written["seeds"]) for evaluation in evaluations.values()]
    planned = [len(suite.seeds(name)) for name in suite.evaluations_of([number])]
    result["seeds"] = min(measured_on or planned)
    result["interval_over"] = SEEDS if result["seeds"] > 1 else ONE_SEED
    folder = suite.folder
    result["evaluations"] = {name: str(folder / name / "evaluation.json") for name in evaluations}
    result["measured_with"] = {}
    for name, evaluation in evaluations.items():
        told = {key: evaluation.written.get(key, "unknown") for key in MADE_WITH}
        result["measured_with"][name] = told
    return result


def provided(condition, evaluations):
    """(Whether it holds, its two values, None where nothing is measured)."""
    evaluation = evaluations.get(condition["at"][0])
    return evaluation.holds(condition) if evaluation else (False, [None, None])


def notes_on(finding, evaluations):
    """What a reader of a finding must know: its evaluations' notes, and unequal compute."""
    notes = []
    for name, evaluation in evaluations.items():
        others = set(evaluation.written["gflops"]) - {"Init", *evaluation.names.values()}
        for note in evaluation.written["notes"]:
            once = note.startswith("one training seed")  # said below the table
            if not once and not names_one(note, others):
                notes.append(f"{name}: {note}")
    for line in finding["decides"]:
        if line["at"][0] in evaluations:
            notes.append(evaluations[line["at"][0]].unequal(line))
    return [note for note in dict.fromkeys(notes) if note]


# ---------------------------------------------------------------- the command
def show(suite, numbers, failed):
    """Print the table and write findings.json, of what there is."""
    findings = {number: finding_result(suite, number, failed) for number in numbers}
    print(*verdict_table(findings).lines(), sep="\n", flush=True)
    path, kept = suite.folder / "findings.json", {}
    with suppress(OSError, ValueError, KeyError):  # none yet, or damaged
        kept = json.loads(path.read_text(encoding="utf-8"))["findings"]  # other findings stay
    known = {**kept, **findings}
    merged = {number: known[number] for number in suite.findings if number in known}
    written = {"folder": str(suite.folder), "quick": suite.quick, "findings": merged}
    write_atomic(path, json.dumps(written, indent=1) + "\n")
    print(f"written: {path}", file=sys.stderr)


def write_page(suite):
    """Write report.html, as `python report.py SUITE` does; what it cannot say, the table has."""
    command = [sys.executable, str(ROOT / "report.py"), str(suite.folder)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0:
        print(f"written: {suite.folder / 'report.html'}", file=sys.stderr)


def list_lines(jobs):
    """A shell line per run folder: lines are independent of each other; && joins what must follow.

    Pooling is left to findings.py itself, which has nothing else to do then.
    """
    lines = {}
    for job in jobs:
        if job.folder:
            script, *arguments = job.command
            words = ["python", os.path.relpath(ROOT / script), *arguments]
            lines.setdefault(job.folder, []).append(shlex.join(words))
    return [" && ".join(commands) for commands in lines.values()]


def parse(arguments):
    """(options, numbers of findings, overrides)."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="findings.py CONFIGS|SUITE.yaml [FINDING ...] [--quick] [--list] [--show] "
              "[--jobs N] [key=value ...]")
    parser.add_argument("--quick", action="store_true", help="one seed, short runs")
    parser.add_argument("--list", action="store_true", help="print the commands instead")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--jobs", type=int, help="so many side by side; without: one per core")
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unknown: {' '.join(rest)}")
    if not rest or "=" in rest[0]:
        parser.error("name a folder of configurations, such as configs/mini, or a suite's YAML")
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs: at least 1")
    options.suite, *rest = rest
    overrides = [word for word in rest if "=" in word]
    return options, [word for word in rest if "=" not in word], overrides


def main(arguments):
    """Run and judge the findings. arguments: of the command line, see above."""
    options, numbers, overrides = parse(arguments)
    suite = Suite(options.suite, options.quick, overrides)
    numbers = chosen(suite.findings, numbers)
    jobs = suite.jobs(numbers)
    if options.list:
        print(*list_lines(jobs), sep="\n")
        print("then the same command without --list shows the table", file=sys.stderr)
        return
    with writing(suite.folder):
        suite.folder.mkdir(parents=True, exist_ok=True)
    lock = hold(suite.folder / ".lock")
    places = options.jobs or cores()
    if not options.show:
        print(f"findings.py: {len(jobs)} jobs, {places} side by side -> {suite.folder}",
              file=sys.stderr)
    crew = Crew([] if options.show else jobs, suite.folder, places, Board())
    try:
        crew.run()
    finally:
        failed = {job.name: ended for job, ended in crew.over.items() if ended}
        show(suite, numbers, failed)
    write_page(suite)
    lock.close()
    told = [f"{job}: {ended}" for job, ended in failed.items() if not ended.startswith("needs ")]
    if told:
        more = f" (and {len(told) - 1} more)" if told[1:] else ""
        raise UserError(f"{told[0]}{more}; the same command goes on from there")


if __name__ == "__main__":
    run_main(main)
