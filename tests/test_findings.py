"""findings.py: which commands a suite comes to, how they run side by side, and the verdicts.

The children are tiny scripts that stand in for sft.py, rl.py and eval.py; one slow test runs the
real ones.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import findings
from lib import jobs as jobs_module
from lib import suite as suite_module
from lib.errors import UserError
from lib.jobs import Board, Crew, minutes_by_job
from lib.results import Estimate
from lib.settings import load
from lib.settings import override as override_one
from lib.suite import Job, Suite, chosen
from lib.verdicts import Evaluation, sentence, verdict, verdict_of_all

MINI = str(ROOT / "configs" / "mini")
SEVEN = list("1234567")
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest in the background ignores it

CHILD = """
import json, os, pathlib, sys, time
script, config, *given = sys.argv
keys = dict(word.split("=", 1) for word in given)
folder = pathlib.Path(keys["run.dir"])
folder.mkdir(parents=True, exist_ok=True)
name = f"{os.path.basename(script)} {folder.name} " + " ".join(sorted(given))
with open(os.environ["DIARY"], "a") as file:
    file.write(json.dumps([name, os.environ["OMP_NUM_THREADS"]]) + "\\n")
"""


# ---------------------------------------------------------------- the commands
def commands(numbers, quick=True, overrides=()):
    return [job.command for job in Suite(MINI, quick, overrides).jobs(numbers)]


def test_all_findings_share_what_they_have_in_common():
    together = commands(SEVEN)
    assert len({tuple(command) for command in together}) == len(together)
    apart = [command for number in SEVEN for command in commands([number])]
    assert {tuple(command) for command in together} == {tuple(command) for command in apart}
    plain = [command for command in together if command[0] == "sft.py" and "gp_l" in command[1]
             and not any("init" in word or "lr" in word for word in command)]
    assert len(plain) == 1 < sum(command == plain[0] for command in apart)  # serves 1, 4, 5 and 7


def test_seeds_are_those_of_the_published_results_or_one():
    def seeds(quick, number):
        words = [word for command in commands([number], quick) for word in command]
        return sorted({word for word in words if word.startswith("run.seed=")})

    assert seeds(True, "1") == ["run.seed=1"]
    assert seeds(False, "1") == [f"run.seed={seed}" for seed in range(1, 6)]
    assert seeds(False, "5") == [f"run.seed={seed}" for seed in range(1, 4)]


def test_every_job_comes_after_what_it_needs_and_evaluations_of_a_folder_in_turn():
    jobs = Suite(MINI, True).jobs(SEVEN)
    for place, job in enumerate(jobs):
        assert all(jobs.index(other) < place for other in [*job.needs, *job.waits]), job.name
    by_name = {job.name: job for job in jobs}
    assert by_name["gp_l/rl seed 1"].needs == [by_name["gp_l/sft seed 1"]]
    assert by_name["bare seed 1"].waits == [by_name["gp_l, all seeds"]]
    assert by_name["gp_l/rl_bare seed 1"].needs == []


def test_overrides_go_to_every_command_and_name_the_arms():
    suite = Suite(MINI, True, ["ppo.clip=0.3", "sft.steps=90", "run.dir=elsewhere"])
    jobs = suite.jobs(["7"])
    assert all({"ppo.clip=0.3", "sft.steps=90"} <= set(job.command) for job in jobs)
    assert str(suite.folder) == "elsewhere" and jobs[0].command[-1] == "run.dir=elsewhere/s1/gp_l"
    played = [job.command for job in jobs if job.command[0] == "eval.py"][0]
    (arms,) = [word for word in played if word.startswith("eval.arms=")]
    assert json.loads(arms.removeprefix("eval.arms="))[0] == "rl-ppo.clip=0.3-ppo.verify_iters=5"
    given = Suite(MINI, True, ["sft.lr=5e-4"]).training("gp_l/sft_overfit")[2]
    assert "sft.init=sft-sft.lr=5e-4/step_80" in given  # the arm that these overrides make


@pytest.mark.parametrize("where", [MINI, f"{MINI}/questions.yaml"], ids=["findings", "questions"])
@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_accepted(quick, where):
    once = {}  # of seeds, which differ in run.* alone, the last
    suite = Suite(where, quick)
    for script, *arguments in [job.command for job in suite.jobs(list(suite.findings))]:
        assert (ROOT / script).is_file()
        apart = tuple(word for word in arguments if not word.startswith("run."))
        once[script, apart] = arguments
    for arguments in once.values():
        load(arguments)


def test_list_has_independent_lines_of_commands_in_order(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    findings.main(["configs/mini", "--list", "1", "5", "run.dir=/x y"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 * 4  # seeds and configurations
    first = lines[0].split(" && ")
    assert first[0].startswith("python sft.py configs/mini/gp_l.yaml ")
    assert first[0].endswith("'run.dir=/x y/s1/gp_l'")
    assert [command.split()[1] for command in first[:4]] == ["sft.py", "sft.py", "rl.py", "eval.py"]
    folders = []
    for line in lines:
        runs = {word for word in line.split("'") if word.startswith("run.dir=/x y/s")
                and "evaluations" not in word}
        assert len(runs) == 1  # a line writes to one run folder,
        folders += runs
    assert len(set(folders)) == len(lines)  # no two to the same


def test_quick_plan_fits_an_hour_on_two_cores():
    start_up = 0.15  # minutes of a process before it does anything
    jobs = Suite(MINI, True).jobs(SEVEN)
    assert sum(job.minutes + start_up for job in jobs) / 2 < 60


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("arguments, told", [
    ([MINI, "9"], "finding: '9' is none of 1, 2"),
    (["nowhere"], "cannot read nowhere/findings.yaml: No such file"),
    ([str(ROOT / "configs/11b")], "findings.yaml: No such file"),
    ([MINI, "ppo.clib=1"], "unknown key ppo.clib .did you mean ppo.clip"),
    ([MINI, "run.seed=3"], "run.seed: .*findings.yaml decides"),
    ([MINI, "1", "eval.splits={unseen: 9}"], "eval.splits: no all"),
])
def test_bad_input_is_one_line_before_anything_runs(tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told) as error:
        findings.main([*arguments, "--quick"])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old, new, told", [
    ("after: gp_l/sft\n", "after: gp_l/stf\n", "no gp_l/stf .did you mean gp_l/sft"),
    ("run: rl.py virl_vl.yaml ", "run: lr.py virl_vl.yaml ", "is not sft.py or rl.py"),
    ("says: gp_l/sft < Init", "says: gp_l/sft is better", "is not 'a > b'|none of"),
    ("at: [gp_l, all, rule OOD, solved]", "at: [gp_l, al, rule OOD, solved]", "no al"),
    ("decides:", "decide:", "unknown key decide .did you mean decides"),
    ("seeds: 5", "seeds: 0", "seeds: 0 is not between"),
    ("of_start_of: gp_l/rl_5", "of_start_of: gp_l/rl5", "findings.7: no gp_l/rl5 .did you mean"),
])
def test_mistake_in_the_yaml_is_named(tmp_path, old, new, told):
    for path in Path(MINI).glob("*.yaml"):
        text = path.read_text()
        if path.name == "findings.yaml":
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / path.name).write_text(text)
    with pytest.raises(UserError, match=told):
        Suite(tmp_path, True).jobs(SEVEN)


def test_findings_keep_the_readers_order():
    assert chosen({"1": 0, "2": 0, "3": 0}, ["3", "1"]) == ["1", "3"]
    assert chosen({"1": 0, "2": 0}, []) == ["1", "2"]


# ---------------------------------------------------------------- jobs side by side
class Silent(Board):
    def __init__(self):
        super().__init__()
        self.said = []

    def say(self, line):
        self.said.append(line)


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """make(name, code, needs=..) a Job that runs a script of its own."""
    monkeypatch.setattr(suite_module, "ROOT", tmp_path)
    monkeypatch.setattr(jobs_module, "PAUSE", 0.02)

    def make(name, code, needs=(), waits=()):
        (tmp_path / f"{name}.py").write_text(code)
        return Job(name, [f"{name}.py"], tmp_path, 1.0, list(needs), list(waits))

    return make


def crew_of(jobs, tmp_path, places=2):
    return Crew(jobs, tmp_path / "suite", places, Silent())


def ended(crew):
    return {job.name: how for job, how in crew.over.items()}


def test_jobs_run_side_by_side_and_after_what_they_need(scripts, tmp_path):
    """Two places: a and b meet (each waits for the other's file), c comes after both."""
    meet = ("import pathlib, time\npathlib.Path({mine!r}).touch()\n"
            "while not pathlib.Path({other!r}).exists(): time.sleep(0.01)")
    mine, other = str(tmp_path / "mine"), str(tmp_path / "other")
    a = scripts("a", meet.format(mine=mine, other=other))
    b = scripts("b", meet.format(mine=other, other=mine))
    both = f"import os\nassert os.path.exists({mine!r}) and os.path.exists({other!r})\n"
    c = scripts("c", both + "assert os.environ['OMP_NUM_THREADS'] == '1'", [a, b])
    crew = crew_of([a, b, c], tmp_path)
    crew.run()
    assert ended(crew) == {"a": "", "b": "", "c": ""}
    assert [line.split(" (")[0] for line in crew.board.said][-1] == "c: done"
    assert set(minutes_by_job(tmp_path / "suite")) == {"a", "b", "c"}


def test_no_more_than_the_places_at_a_time(scripts, tmp_path):
    code = ("import os, time\npath = {path!r}\n"
            "os.close(os.open(path, os.O_CREAT | os.O_EXCL))\ntime.sleep(0.1)\nos.remove(path)")
    jobs = [scripts(name, code.format(path=str(tmp_path / "one"))) for name in "abc"]
    crew = crew_of(jobs, tmp_path, places=1)
    crew.run()
    assert set(ended(crew).values()) == {""}


def test_killed_and_failing_children_take_only_those_that_need_them(scripts, tmp_path):
    killed = scripts("killed", "import os\nos.kill(os.getpid(), 9)")
    wrong = scripts("wrong", "import sys\nprint('error: the disk is full')\nsys.exit(2)")
    crash = scripts("crash", "raise ValueError('x')")
    child = scripts("child", "", [killed])
    grandchild = scripts("grandchild", "", [child])
    later = scripts("later", "", waits=[grandchild])
    crew = crew_of([killed, wrong, crash, child, grandchild, later], tmp_path)
    crew.run()
    found = ended(crew)
    assert found["crash"].startswith("exit code 1, see ")
    del found["crash"]
    assert found == {"killed": "killed by SIGKILL", "wrong": "error: the disk is full",
                     "child": "needs killed", "grandchild": "needs child", "later": ""}


def test_folder_that_cannot_be_written_ends_all_children(scripts, tmp_path):
    sleeper = scripts("sleeper", "import time\ntime.sleep(60)")
    other = scripts("other", "")
    crew = crew_of([sleeper, other], tmp_path, places=1)
    (tmp_path / "suite").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        crew.run()
    crew = Crew([sleeper, other], tmp_path / "full", 2, Silent())
    (tmp_path / "full" / "jobs.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write .*jobs.jsonl"):
        crew.run()
    assert crew.running and all(child.process.poll() is not None for child in crew.running)


SAVES = """
import pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.3)
    pathlib.Path(__file__).with_suffix(".saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(__file__).with_suffix(".there").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_lets_children_save_and_the_same_goes_on(scripts, tmp_path, number, code):
    scripts("one", SAVES), scripts("two", SAVES), scripts("three", "")
    program = (
        "import sys\nfrom pathlib import Path\nfrom lib import suite\n"
        "from lib.jobs import Board, Crew\nfrom lib.errors import run_main\n"
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"here = Path({str(tmp_path)!r})\nsuite.ROOT = here\n"
        "jobs = [suite.Job(n, [n + '.py'], here, 1) for n in ('one', 'two', 'three')]\n"
        "run_main(lambda arguments: Crew(jobs, here / 'suite', 2, Board()).run())\n")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True)
    there = [tmp_path / f"{name}.there" for name in ("one", "two")]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in there) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.splitlines()[-1] == "stopped; run the same command again to continue"
    assert (tmp_path / "one.saved").exists() and (tmp_path / "two.saved").exists()
    logged = (tmp_path / "suite" / "jobs.jsonl").read_text().splitlines()
    assert [json.loads(line)["ended"] for line in logged] == ["stopped"] * 2  # three never began


def test_clock_follows_the_pace(scripts, tmp_path):
    crew = crew_of([scripts(name, "") for name in "abcd"], tmp_path)
    assert crew.minutes_left() == 2  # four minutes on two cores
    crew.planned, crew.spent = 1, 3
    assert crew.minutes_left() == 6


# ---------------------------------------------------------------- verdicts
@pytest.mark.parametrize("low, high, sign, said", [
    (0.1, 5, ">", "shown"), (0.1, 5, "<", "the other way"), (-5, -0.1, "<", "shown"),
    (-5, -0.1, ">", "the other way"), (-1, 1, ">", "not shown"), (0, 4, ">", "not shown"),
    (-4, 0, "<", "not shown"),
])
def test_line_is_shown_if_its_interval_excludes_zero(low, high, sign, said):
    assert verdict(Estimate((low + high) / 2, low, high), sign) == said


def test_finding_is_shown_if_all_its_lines_are():
    assert verdict_of_all(["shown", "shown"]) == "shown"
    assert verdict_of_all(["shown", "shown"], holds=False) == "not shown"
    assert verdict_of_all(["shown", "not shown"]) == "not shown"
    assert verdict_of_all(["the other way", "not shown", "shown"]) == "the other way"
    assert verdict_of_all(["shown", "the other way", "not measured"]) == "not measured"


def row(arm, base, value, low, high, variant="rule OOD"):
    found = {"split": "all", "variant": variant, "temperature": 0.2, "arm": arm,
             "metrics": {"solved": [value, low, high]}, "per_seed": {"solved": [value]}}
    return {**found, "base": base} if base else found


def evaluation(**more):
    """Arms r (from Init), q (from a start that has lost the rule) and s (SFT)."""
    init, lost = "Init @ sft/step_80", "Init @ sft-x/step_600"
    written = {
        "temperatures": [0.2], "gflops": {"rl": 100.0, "rl-q": 104.0, "sft": 120.0},
        "table": [row(init, None, 36, 33, 39), row(lost, None, 12, 10, 14),
                  row("sft", None, 80, 75, 85, "ID"), row("rl", None, 40, 37, 43)],
        "differences": [row("rl", init, 4, 1, 7), row("rl-q", lost, 2, -1, 5),
                        row("rl-q", "rl", -26, -30, -22), row("sft", init, -9, -12, -6)],
        "notes": []}
    return Evaluation({**written, **more}, {"g/r": "rl", "g/q": "rl-q", "g/s": "sft"})


@pytest.mark.parametrize("says, variant, estimate, said", [
    ("g/r > Init", "rule OOD", (4, 1, 7), "shown"),
    ("g/s < Init", "rule OOD", (-9, -12, -6), "shown"),
    ("g/q > start", "rule OOD", (2, -1, 5), "not shown"),  # not the Init of the other arms
    ("g/q > g/r", "rule OOD", (-26, -30, -22), "the other way"),
    ("g/r > g/q", "rule OOD", (26, 22, 30), "shown"),  # written the other way round
    ("g/s < 30", "ID", (50, 45, 55), "the other way"),
    ("g/s > 79", "ID", (1, -4, 6), "not shown"),
])
def test_line_is_read_from_the_evaluation(says, variant, estimate, said):
    found = evaluation().found({"at": ["g", "all", variant, "solved"], "says": says})
    assert (found.estimate, found.verdict) == (estimate, said)
    assert found.per_seed == [estimate[0]]


def test_what_is_not_there_is_not_measured():
    for says, metric in (("g/s < Init", "recognized"), ("g/s < g/r", "solved")):
        found = evaluation().found({"at": ["g", "all", "rule OOD", metric], "says": says})
        assert (found.estimate, found.verdict) == (None, "not measured")


@pytest.mark.parametrize("at_most, holds", [(0.34, True), (0.33, False)])
def test_start_must_have_over_fitted(at_most, holds):
    """12 of 36 is a third."""
    condition = {"at": ["g", "all", "rule OOD", "solved"], "start_of": "g/q",
                 "at_most": at_most, "of_start_of": "g/r"}
    assert evaluation().holds(condition) == (holds, [12, 36])


def test_unequal_compute_is_told():
    assert evaluation().unequal({"says": "g/q > g/r"}) is None  # 4 %
    assert "g/s has spent 120 " in evaluation().unequal({"says": "g/s < g/r"})
    assert evaluation().unequal({"says": "g/s < Init"}) is None


@pytest.mark.parametrize("text", ["g/a > ", "g/a = g/b", "g/a > g/b > g/c", 3, "g/a > Inti",
                                  "Init < g/a"])
def test_sentence_that_compares_nothing_is_refused(text):
    with pytest.raises(ValueError):
        sentence(text)


# ---------------------------------------------------------------- the whole command
FAKE = CHILD + """
if script.endswith("eval.py") and "evaluations" not in keys["run.dir"]:
    differences = []
    tuned = ["sft-sft.init=sft_step_80-sft.lr=5e-5", "sft-sft.init=sft_step_80-sft.lr=2e-4",
             "sft-sft.init=sft_step_35-sft.lr=2e-4", "sft-sft.init=sft_step_25-sft.lr=5e-4"]
    for arm, base, value in [("rl", "Init", 4), *[(sft, "Init", -9) for sft in ["sft", *tuned]]]:
        metrics = {name: [value, value - 3, value + 3] for name in ("solved", "per_step",
                                                                    "recognized")}
        for split, variant in [("all", "rule OOD"), ("all", "ID"), ("unseen", "rule OOD"),
                               ("unseen", "ID")]:
            differences.append({"split": split, "variant": variant, "temperature": 0.2,
                                "arm": arm, "base": base, "metrics": metrics,
                                "per_seed": {name: [value] for name in metrics}})
    written = {"temperatures": [0.2], "seeds": [1], "gflops": {}, "notes": ["a note"], "table": [],
               "commit": "abc", "machine": "here", "versions": "1",
               "differences": differences}
    (folder / "evaluation.json").write_text(json.dumps(written))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """run(*arguments): findings.py with scripts that only note that they were called."""
    for name in ("sft", "rl", "eval"):
        (tmp_path / f"{name}.py").write_text(FAKE)
    monkeypatch.setattr(suite_module, "ROOT", tmp_path)
    monkeypatch.setattr(jobs_module, "PAUSE", 0.02)
    monkeypatch.setenv("DIARY", str(tmp_path / "diary"))

    def run(*arguments):
        findings.main([MINI, "--quick", "--jobs", "1", f"run.dir={tmp_path / 'suite'}", *arguments])
        return json.loads((tmp_path / "suite" / "findings.json").read_text())

    return run


def diary(tmp_path):
    return [json.loads(line)[0] for line in (tmp_path / "diary").read_text().splitlines()]


def test_one_table_and_its_json(fake, tmp_path, capsys):
    written = fake("1")
    out, said = capsys.readouterr()
    assert said.splitlines()[-1] == f"written: {tmp_path / 'suite' / 'report.html'}"
    first = next(line for line in out.splitlines() if line.startswith("1. "))
    assert "SHOWN" in first and "1 (hands or routes alone)" in first
    assert "-9.0 [-12.0, -6.0]" in out and "-8.1" in out
    assert "one seed: intervals count hands or routes alone" in out and "gp_l: a note" in out
    (number, result), = written["findings"].items()
    assert (number, result["verdict"], result["seeds"]) == ("1", "shown", 1)
    assert result["decides"][1]["estimate"] == [4, 1, 7] and result["unfinished"] == []
    assert result["interval_over"] == "hands or routes alone" and len(result["evaluations"]) == 4
    assert len(diary(tmp_path)) == len(commands(["1"]))
    assert "1. SFT loses the rule" in (tmp_path / "suite" / "report.html").read_text()
    assert set(fake("2")["findings"]) == {"1", "2"}  # another time: what was there stays


def test_show_runs_nothing_and_counts_the_seeds_that_are_there(fake, tmp_path, capsys):
    result = fake("1", "--show")["findings"]["1"]
    assert (result["verdict"], result["evaluations"]) == ("not measured", {})
    fake("1")
    ran = diary(tmp_path)
    for path in (tmp_path / "suite").glob("*/evaluation.json"):
        written = json.loads(path.read_text())
        path.write_text(json.dumps({**written, "seeds": [1, 2, 3]}))
    capsys.readouterr()
    result = fake("1", "--show")["findings"]["1"]
    assert (result["verdict"], result["seeds"]) == ("shown", 3) and diary(tmp_path) == ran
    assert result["measured_with"]["gp_l"]["commit"] == "abc"
    assert "SHOWN" in capsys.readouterr().out


def test_failed_child_is_told_and_the_rest_kept(fake, tmp_path, capsys):
    (tmp_path / "rl.py").write_text(
        FAKE + "if 'virl_vl' in config: os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="virl_vl/rl seed 1: killed by SIGKILL; the same command"):
        fake("1")
    out = capsys.readouterr().out
    assert "NOT MEASURED" in out and "-9.0 [-12.0, -6.0]" in out
    unfinished = "unfinished, virl_vl/rl seed 1: killed by SIGKILL"
    assert unfinished in out and unfinished in (tmp_path / "suite" / "report.html").read_text()
    (tmp_path / "rl.py").write_text(FAKE)
    assert fake("1")["findings"]["1"]["verdict"] == "shown"


def test_two_at_once_are_refused(fake, tmp_path):
    (tmp_path / "suite").mkdir()
    code = ("import sys, time\nfrom pathlib import Path\nfrom lib.runs import hold\n"
            "lock = hold(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)")
    command = [sys.executable, "-c", code, str(tmp_path / "suite" / ".lock")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="in use by process"):
            fake("1")
        other.kill()


# ---------------------------------------------------------------- the real thing
TINY = ("sft.warmup=0", "sft.init_step=2", "sft.save_every=2", "sft.batch_size=8",
        "ppo.init=sft/step_2", "ppo.save_every=1", "ppo.envs=6", "ppo.turns=2", "ppo.minibatch=4",
        "ppo.epochs=2", "eval.batch_size=8")


@pytest.mark.slow
def test_findings_1_and_5_for_real(tmp_path, capsys):
    for path in Path(MINI).glob("*_*.yaml"):
        settings = yaml.safe_load(path.read_text())
        for override in TINY:
            override_one(settings, override)
        (tmp_path / path.name).write_text(yaml.safe_dump(settings))
    text = (Path(MINI) / "findings.yaml").read_text()
    text = re.sub(r"{start}/step_\d+", "{start}/step_2", text)  # Init of every task
    text = text.replace("{all: 300}", "{all: 4}").replace("{unseen: 100}", "{unseen: 2}")
    (tmp_path / "findings.yaml").write_text(text.replace("{unseen: 80}", "{unseen: 2}"))
    arguments = [str(tmp_path), "1", "5", "--quick", f"run.dir={tmp_path / 'suite'}",
                 "sft.steps=4", "ppo.updates=2", "--jobs", str(len(os.sched_getaffinity(0)))]
    findings.main(arguments)
    result = json.loads((tmp_path / "suite" / "findings.json").read_text())["findings"]
    assert list(result) == ["1", "5"]
    for finding in result.values():
        for line in [*finding["decides"], *finding["beside"]]:
            assert line["estimate"] is not None, line
    before = (tmp_path / "suite" / "s1" / "gp_l" / "evaluations.jsonl").read_bytes()
    findings.main(arguments)  # again: nothing is trained or played
    assert (tmp_path / "suite" / "s1" / "gp_l" / "evaluations.jsonl").read_bytes() == before
