"""One arm's folder, without a model: its name, whose it is, whole checkpoints, logs, signals."""

import copy
import signal
import subprocess
import sys
import threading

import pytest
import yaml
from conftest import ROOT
from safetensors import SafetensorError

from lib import errors, runs, settings
from lib.errors import Terminated, UserError
from lib.runs import Run, arm_name, checkpoints, find_init, hold, written_whole
from lib.settings import check, override

signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest in the background ignores it


def contents(folder):
    """{path below the folder: its bytes, or None for a folder}."""
    found = {}
    for path in folder.rglob("*"):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def numbers(folder):
    return [number for number, _ in checkpoints(folder)]


def save(run, step, regular):
    with run.checkpoint(step, regular) as folder:
        (folder / "weights").write_text(str(step))


# ---------------------------------------------------------------- the folder
@pytest.fixture
def open_run(raw, tmp_path):
    """open_run("sft", ["sft.lr=0.5"]) as the script would.

    Changes are made to the YAML; overrides come from the command line and name the arm.
    """
    raw["run"]["dir"] = str(tmp_path)
    raw["ppo"]["init"], raw["sft"]["init_step"] = "none", 10

    def opened(script, changes=(), overrides=()):
        changed = copy.deepcopy(raw)
        for change in (*changes, *overrides):
            override(changed, change)
        run = Run(script, check(changed), list(overrides))
        run.begin()
        return run

    return opened


def test_arm_is_named_after_its_own_overrides():
    assert arm_name("rl", []) == "rl"
    assert arm_name("rl", ["ppo.verify_iters=1"]) == "rl-ppo.verify_iters=1"
    for overrides in (["ppo.gamma=1", "lora.r=8"], ["lora.r=8", "ppo.gamma=1"]):
        assert arm_name("rl", overrides) == "rl-lora.r=8-ppo.gamma=1"
    others = ["sft.lr=1", "eval.n=5"]  # of other arms
    longer = ["sft.steps=9", "ppo.updates=9"]
    assert arm_name("rl", longer) == "rl" and arm_name("sft", longer) == "sft"
    places = ["run.dir=x/y", "model.device=cuda", "ppo.save_every=1"]  # what may change
    assert arm_name("rl", others + places) == "rl"
    mixed = ["ppo.clip=1", "sft.micro_tokens=9", "sft.mistakes=2"]
    assert arm_name("sft", mixed) == "sft-sft.mistakes=2"
    assert "/" not in arm_name("rl", ["ppo.init=sft/step_5"])  # a folder, not a path
    with pytest.raises(UserError, match="named by 305 letters, rl-lora.target_modules=xxx"):
        arm_name("rl", ["lora.target_modules=" + 282 * "x"])


def test_arms_do_not_share_a_folder(open_run, tmp_path):
    runs = [open_run("sft"), open_run("rl"), open_run("rl", overrides=["ppo.verify_iters=1"])]
    assert len({run.dir for run in runs}) == 3
    assert {run.dir.parent for run in runs} == {tmp_path}


@pytest.mark.parametrize(
    "script, change",
    [
        ("sft", "sft.lr=0.5"),
        ("sft", "env.rule=face"),
        ("sft", "run.seed=1"),
        ("rl", "ppo.clip=0.3"),
        ("rl", "lora.r=8"),
        ("rl", "model.max_new_tokens=9"),
    ],
)
def test_folder_of_other_settings_is_refused_and_left_alone(open_run, tmp_path, script, change):
    run = open_run(script)
    with run.checkpoint(1) as folder:
        (folder / "weights").write_text("precious")
    run.log("metrics", {"step": 1})
    run.log("metrics", {"step": 2})  # beyond the checkpoint: opening the run for real would drop it
    (run.dir / ".tmp_2").mkdir()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=change.split("=")[0]):
        open_run(script, [change])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("script, own, other", [("sft", "sft", "ppo"), ("rl", "ppo", "sft")])
def test_what_does_not_shape_the_arm_may_change(open_run, script, own, other):
    run = open_run(script)
    save(run, 1, True)
    changes = [f"{other}.lr=0.7", f"{own}.save_every=3"]
    changes += ["model.device=auto", "model.sample_tokens=64"]
    assert open_run(script, changes).step == 1


def test_settings_name_the_commits_that_a_run_was_trained_at(open_run, monkeypatch):
    run = open_run("rl")
    path = run.dir / "config.yaml"
    assert runs.trained_at(path) == [runs.commit()] and runs.trained_at(path / "none") == []
    save(run, 1, True)
    for later in ("abc1234", "abc1234-dirty", "abc1234"):
        monkeypatch.setattr(runs, "commit", lambda name=later: name)
        open_run("rl")
    first, *others = runs.trained_at(path)
    assert others == ["abc1234", "abc1234-dirty"]
    assert path.read_text().startswith(f"# trained at {first}\n# trained at abc1234\n")
    assert yaml.safe_load(path.read_text()).keys() == run.settings.keys()


def test_run_that_is_older_than_a_key_continues_under_its_default(open_run, monkeypatch):
    run = open_run("rl")
    save(run, 1, True)
    settings_then = yaml.safe_load((run.dir / "config.yaml").read_text())
    clip = settings_then["ppo"].pop("clip")
    del settings_then["env"]["replacement"]
    (run.dir / "config.yaml").write_text(yaml.safe_dump(settings_then))
    with pytest.raises(UserError, match="env.replacement = None"):
        open_run("rl")
    monkeypatch.setitem(settings.DEFAULTS, "ppo.clip", clip)
    monkeypatch.setitem(settings.DEFAULTS, "env.replacement", False)
    assert open_run("rl").step == 1
    with pytest.raises(UserError, match=f"ppo.clip = {clip}, not 0.3"):
        open_run("rl", ["ppo.clip=0.3"])


@pytest.mark.parametrize("text", [b"", b"- a", b"lora: [", b"\xff\xfe\x00\x80"])
def test_folder_with_unreadable_settings_is_refused(open_run, text):
    (open_run("sft").dir / "config.yaml").write_bytes(text)
    with pytest.raises(UserError, match="config.yaml|holds a run"):
        open_run("sft")


def test_run_dir_that_cannot_be_made_is_a_user_error(open_run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        open_run("sft", [f"run.dir={tmp_path}/file"])


@pytest.mark.parametrize(
    "rest",
    [b"", b'{"step": 2, "rew', '{"step": 2, "answer": "é'.encode()[:-1], b"{}\n", b"7\n"],
    ids=["nothing", "half a line", "half a character", "no step", "no object"],
)
def test_lines_beyond_the_last_checkpoint_are_dropped(open_run, rest):
    run = open_run("rl")
    save(run, 2, True)
    whole = {}
    for name in ("metrics", "transcripts"):
        path = run.dir / f"{name}.jsonl"
        for step in (1, 2):
            run.log(name, {"step": step, "answer": "é"})
        whole[path] = path.read_bytes()
        run.log(name, {"step": 3, "answer": "é"})
        with open(path, "ab") as file:
            file.write(rest)  # a kill or a full disk
    again = open_run("rl")
    assert (again.step, again.last.name) == (2, "step_2")
    for path, before in whole.items():
        assert path.read_bytes() == before


def test_answers_of_any_characters_survive_reopening(open_run):
    """U+2028, U+0085 and their like end a line for str.splitlines, not in a JSON Lines file."""
    run = open_run("rl")
    save(run, 2, True)
    run.log("transcripts", {"step": 1, "answer": "a\u2028b\x85c\x1cd\re\nf"})
    run.log("transcripts", {"step": 3, "answer": "beyond the checkpoint"})
    first = (run.dir / "transcripts.jsonl").read_bytes().split(b"\n")[0]
    open_run("rl")
    assert (run.dir / "transcripts.jsonl").read_bytes() == first + b"\n"


def test_without_a_checkpoint_a_run_starts_over(open_run):
    run = open_run("sft")
    run.log("metrics", {"step": 1})
    again = open_run("sft")
    assert (again.step, again.last) == (0, None) and (run.dir / "metrics.jsonl").read_text() == ""


def test_checkpoint_appears_whole_or_not_at_all(open_run):
    run = open_run("sft")
    with run.checkpoint(9) as folder:
        (folder / "a").write_text("1")
        assert checkpoints(run.dir) == []  # not before it is complete
    with pytest.raises(KeyboardInterrupt):
        with run.checkpoint(10) as folder:
            (folder / "a").write_text("half")
            raise KeyboardInterrupt
    (run.dir / ".tmp_11").mkdir()  # what a kill leaves behind
    (run.dir / ".tmp_11" / "a").write_text("half")
    for found in (run, open_run("sft")):
        assert [(n, p.name) for n, p in checkpoints(found.dir)] == [(9, "step_9")]
    assert names(run.dir) == ["config.yaml", "step_9"]  # opening it again swept up


def test_checkpoints_are_in_the_order_of_numbers(open_run, tmp_path):
    for name in ("step_10", "step_9", "step_100", "step_x", "step_", ".tmp_200"):
        (tmp_path / "sft" / name).mkdir(parents=True)
    assert numbers(tmp_path / "sft") == [9, 10, 100]
    assert open_run("sft").step == 100


def test_folder_is_replaced_whole_or_not_at_all(tmp_path):
    final = tmp_path / "model"
    for text in ("old", "new"):
        with written_whole(final) as folder:
            (folder / text).write_text(text)
        assert names(final) == [text]
    with pytest.raises(UserError, match="model: .*disk full"):
        with written_whole(final) as folder:
            (folder / "half").write_text("half")
            raise OSError("disk full")
    assert names(final) == ["new"]
    with written_whole(final):  # what is left of that does not get in
        pass
    assert names(final) == [] and names(tmp_path) == ["model"]


# ---------------------------------------------------------------- where PPO starts
def lay(run_dir, *names):
    for name in names:
        (run_dir / name).mkdir(parents=True)


@pytest.mark.parametrize(
    "init, overrides, found",
    [
        ("none", [], None),
        ("sft/step_5", [], "sft/step_5"),
        ("sft/step_5", ["ppo.lr=1", "sft.steps=7", "eval.seed=3"], "sft/step_5"),
        ("sft/step_5", ["sft.lr=1"], "sft-sft.lr=1/step_5"),
        ("sft/step_5", ["sft.lr=1", "ppo.clip=1", "sft.save_every=1"], "sft-sft.lr=1/step_5"),
        ("sft/step_5", ["lora.r=8"], "sft-lora.r=8/step_5"),
        ("sft/step_5", ["env.rule=face"], "sft/step_5"),  # PPO on another rule than SFT had
        ("sft/step_5", ["env.rule=face", "sft.lr=1"], "sft-sft.lr=1/step_5"),
        ("sft-lora.r=8/step_5", ["sft.lr=1"], "sft-lora.r=8/step_5"),
        ("sft/step_5", ["ppo.init=sft/step_5", "sft.lr=1"], "sft/step_5"),  # said word for word
        ("../other/step_1", [], "../other/step_1"),
    ],
)
def test_same_overrides_find_the_start(tmp_path, init, overrides, found):
    run_dir = tmp_path / "run"
    lay(tmp_path, "other/step_1")
    lay(run_dir, "sft/step_5", "sft-sft.lr=1/step_5", "sft-lora.r=8/step_5")
    assert find_init(run_dir, init, overrides) == (found and run_dir / found)


def test_where_no_start_fits_the_message_says_what_does(tmp_path):
    with pytest.raises(UserError, match="sft/step_5; run sft.py with this configuration first"):
        find_init(tmp_path, "sft/step_5", [])
    lay(tmp_path, "sft-sft.lr=1/step_2", "sft-sft.lr=1/step_10", "sft-sft.lr=1/step_5", "rl/step_5")
    for overrides in ([], ["sft.lr=2"], ["ppo.init=sft/step_5"]):
        with pytest.raises(UserError) as error:
            find_init(tmp_path, "sft/step_5", overrides)
        said = str(error.value)
        assert "ppo.init=sft-sft.lr=1/step_5; there are" in said and "\n" not in said
        listed = [f"sft-sft.lr=1/step_{n}" for n in (5, 2, 10)]
        assert said.endswith("there are " + ", ".join(listed))
    lay(tmp_path, *[f"sft/step_{n}" for n in range(20, 40)])
    with pytest.raises(UserError, match="ppo.init=sft/step_20; .* and 15 more$"):
        find_init(tmp_path, "sft/step_999", [])


def test_arms_with_another_start_have_another_name(raw, tmp_path):
    """And their config.yaml says where they started."""
    raw["run"]["dir"], raw["ppo"]["init"] = str(tmp_path), "sft/step_10"
    lay(tmp_path, "sft/step_10", "sft-sft.lr=0.1/step_10")
    starts = {}
    for overrides in (["ppo.clip=0.3"], ["ppo.clip=0.3", "sft.lr=0.1"]):
        changed = copy.deepcopy(raw)
        for change in overrides:
            override(changed, change)
        run = Run("rl", check(changed), overrides)
        run.begin()
        noted = yaml.safe_load((run.dir / "config.yaml").read_text())
        starts[run.dir.name] = (str(run.init.relative_to(tmp_path)), noted["ppo"]["init"])
    assert starts == {
        "rl-ppo.clip=0.3": ("sft/step_10",) * 2,
        "rl-ppo.clip=0.3-sft.lr=0.1": ("sft-sft.lr=0.1/step_10",) * 2,
    }


def test_a_run_goes_on_from_its_own_start_though_an_sft_arm_that_fits_better_came_later(
        raw, tmp_path):
    raw["run"]["dir"], raw["ppo"]["init"] = str(tmp_path), "sft/step_10"
    lay(tmp_path, "sft/step_10")
    override(raw, "lora.r=8")
    for _ in range(2):
        run = Run("rl", check(raw), ["lora.r=8"])
        run.begin()
        assert str(run.init.relative_to(tmp_path)) == "sft/step_10"
        for step in (10, 20):
            (tmp_path / f"sft-lora.r=8/step_{step}").mkdir(parents=True, exist_ok=True)
    raw["ppo"]["init"] = "sft/step_20"
    with pytest.raises(UserError, match="ppo.init = sft/step_10, not sft-lora.r=8/step_20"):
        Run("rl", check(raw), ["lora.r=8"])


def test_a_run_from_elsewhere_does_not_go_on_from_an_sft_arm(raw, tmp_path):
    """Though the checkpoints have the same name."""
    raw["run"]["dir"], raw["ppo"]["init"] = str(tmp_path / "run"), f"{tmp_path}/other/step_10"
    lay(tmp_path, "other/step_10", "run/sft/step_10")
    Run("rl", check(raw), []).begin()
    raw["ppo"]["init"] = "sft/step_10"
    with pytest.raises(UserError, match="other/step_10, not sft/step_10"):
        Run("rl", check(raw), [])


def test_start_elsewhere_is_noted_as_it_was_given(raw, tmp_path):
    """Runs of before say it so, too. The run folder need not be there yet."""
    lay(tmp_path, "elsewhere/step_3")
    for init in (f"{tmp_path}/elsewhere/step_3", "../elsewhere/step_3"):
        raw["run"]["dir"], raw["ppo"]["init"] = str(tmp_path / "run"), init
        run = Run("rl", check(raw), [])
        assert (run.init.name, run.settings["ppo"]["init"]) == ("step_3", init)


# ---------------------------------------------------------------- more of the same
@pytest.mark.parametrize("script, key", [("sft", "sft.steps"), ("rl", "ppo.updates")])
def test_finished_run_goes_on_under_a_constant_schedule(open_run, cfg, capsys, script, key):
    run = open_run(script, overrides=[f"{key}=40"])
    save(run, 40, True)
    longer = open_run(script, overrides=[f"{key}=90"])
    assert (longer.dir, longer.step) == (run.dir, 40) and longer.goes_on("x.py", cfg)
    noted = yaml.safe_load((run.dir / "config.yaml").read_text())
    section, _, name = key.partition(".")
    assert noted[section][name] == 90
    assert capsys.readouterr().err.endswith(f"-> {run.dir}, from {run.dir / 'step_40'}\n")
    for fewer in (40, 20):
        assert not open_run(script, [f"{key}={fewer}"]).goes_on("x.py", cfg)
        (said,) = "".join(capsys.readouterr()).splitlines()
        assert str(run.dir) in said and "40" in said and key in said


@pytest.mark.parametrize("script, key", [("sft", "sft.steps"), ("rl", "ppo.updates")])
def test_run_under_a_cosine_schedule_has_its_length(open_run, script, key):
    cosine = f"{key.partition('.')[0]}.schedule=cosine"
    run = open_run(script, [f"{key}=40"], overrides=[cosine])
    save(run, 40, True)
    before = contents(run.dir)
    for length in (20, 90):
        with pytest.raises(UserError, match=f"{key} = 40, not {length} .*cosine.*learning rate"):
            open_run(script, [f"{key}={length}"], overrides=[cosine])
    assert contents(run.dir) == before
    assert open_run(script, [f"{key}=40"], overrides=[cosine]).step == 40


# ---------------------------------------------------------------- one process at a time
HOLDER = """
import sys
from pathlib import Path
from lib.runs import hold
file = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kill", [False, True], ids=["it ends", "it is killed"])
def test_second_process_is_refused_until_the_first_is_gone(open_run, kill):
    run = open_run("sft")
    save(run, 3, True)
    run.log("metrics", {"step": 4})
    run.lock.close()
    command = [sys.executable, "-c", HOLDER, str(run.dir / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        before = contents(run.dir)
        with pytest.raises(UserError, match=f"sft is in use by process {other.pid} on "):
            open_run("sft")
        assert contents(run.dir) == before
        assert open_run("sft", overrides=["sft.lr=0.5"]).step == 0  # a neighbour
        if kill:
            other.kill()
        else:
            other.stdin.close()
        other.wait(timeout=60)
    assert open_run("sft").step == 3


def test_folder_that_another_process_made_meanwhile_is_seen(raw, tmp_path):
    """Both found no folder; while this one loaded its model, the other trained and ended."""
    raw["run"]["dir"] = str(tmp_path)
    slow, quick = (Run("sft", check(raw), []) for _ in range(2))
    assert slow.step == 0
    quick.begin()
    save(quick, 5, True)
    slow.begin()
    assert slow.step == 5


def test_where_the_file_system_knows_no_locks_it_goes_without(tmp_path, monkeypatch):
    def unknown(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", unknown)
    assert hold(tmp_path / ".lock").name == str(tmp_path / ".lock")


# ---------------------------------------------------------------- a disk that is full
FULL = [
    OSError(28, "No space left on device"),
    SafetensorError("I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos; No space left"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_full_disk_is_one_line_and_the_last_checkpoint_stays(open_run, error):
    run = open_run("sft")
    save(run, 3, True)
    with pytest.raises(UserError, match="step_4: .*No space left.*last checkpoint") as met:
        with run.checkpoint(4) as folder:
            (folder / "weights").write_text("half")
            raise error
    assert "\n" not in str(met.value)
    again = open_run("sft")
    assert (again.step, (again.last / "weights").read_text()) == (3, "3")
    assert names(run.dir) == ["config.yaml", "step_3"]


def test_what_is_no_failure_to_write_passes(open_run):
    for error in (ZeroDivisionError(), RuntimeError("shapes"), UserError("no")):
        with pytest.raises(type(error)) as met, open_run("sft").checkpoint(4):
            raise error
        assert met.value is error


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, "tests")
import yaml
from conftest import CONFIG
from lib.runs import Run
from lib.errors import run_main
from lib.settings import check

def main(arguments):
    raw = check(yaml.safe_load(CONFIG.read_text()))
    raw["run"]["dir"] = sys.argv[1]
    run = Run("sft", raw, [])
    if sys.argv[2] == "config":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    run.begin()
    with run.checkpoint(1) as folder:
        (folder / "weights").write_text("1")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    if sys.argv[2] == "log":
        run.log("metrics", {"step": 2, "text": "x" * 200})
    with run.checkpoint(2) as folder:
        (folder / "weights").write_text("2" * 200)

run_main(main)
"""


@pytest.mark.parametrize("place, named", [("config", "config.yaml"), ("log", "metrics.jsonl"),
                                          ("checkpoint", "step_2")])
def test_no_room_in_a_real_process(open_run, tmp_path, place, named):
    """A limit on the size of files stands in for a full disk."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path), place]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    (said,) = done.stderr.splitlines()
    assert done.returncode == 2 and said.startswith("error: cannot write ") and named in said
    assert open_run("sft").step == (0 if place == "config" else 1)


# ---------------------------------------------------------------- Ctrl-C and SIGTERM
def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def sigterm():
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def as_script():
    """SIGTERM as run_main sets it."""
    before = signal.signal(signal.SIGTERM, errors.terminate)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_is_as_ctrl_c(open_run, capfd, as_script):
    run = open_run("rl")
    with pytest.raises(Terminated, match="stopped after update 3; .*again to continue"):
        with run.stoppable("update"):
            sigterm()
            save(run, 3, False)
    said = "finishing this update, then saving; a second signal stops at once\n"
    assert capfd.readouterr().err == said
    again = open_run("rl")
    assert again.last.name == "stopped_3"
    for first, second, stopped in ((sigterm, sigterm, Terminated), (ctrl_c, sigterm, Terminated),
                                   (sigterm, ctrl_c, KeyboardInterrupt)):
        with pytest.raises(KeyboardInterrupt) as stop:
            with again.stoppable("update"):
                first()
                second()
                save(again, 4, True)
        assert type(stop.value) is stopped and str(stop.value) == ""
    assert open_run("rl").last.name == "stopped_3"
    assert signal.getsignal(signal.SIGTERM) is errors.terminate


def test_exit_codes_tell_sigterm_from_ctrl_c(capsys):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for stop, code in ((sigterm, 143), (ctrl_c, 130)):
            with pytest.raises(SystemExit) as ended:
                errors.run_main(lambda arguments, stop=stop: stop())
            assert ended.value.code == code and len(capsys.readouterr().err.splitlines()) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_first_ctrl_c_finishes_and_saves_and_the_second_does_not(open_run, capfd):
    run = open_run("rl")
    with pytest.raises(KeyboardInterrupt, match="stopped after update 3; .*again to continue"):
        with run.stoppable("update"):
            save(run, 2, True)
            ctrl_c()
            save(run, 3, False)
    said = "finishing this update, then saving; Ctrl-C again stops at once\n"
    assert capfd.readouterr().err == said
    again = open_run("rl")
    assert (again.step, again.last.name) == (3, "stopped_3")
    assert numbers(run.dir) == [2]
    with pytest.raises(KeyboardInterrupt) as stop:
        with again.stoppable("update"):
            ctrl_c()
            ctrl_c()
            save(again, 4, True)
    assert str(stop.value) == "" and open_run("rl").last.name == "stopped_3"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("regular, name", [(True, "step_11"), (False, "stopped_11")])
def test_what_ctrl_c_left_goes_with_the_next_checkpoint(open_run, regular, name):
    run = open_run("sft")
    save(run, 10, False)
    save(run, 11, regular)
    assert names(run.dir) == ["config.yaml", name]


def test_loop_runs_where_ctrl_c_is_not_ours(open_run):
    """In a thread, where Python allows no handler; in the background, where Ctrl-C is ignored."""
    run = open_run("sft")
    met = []

    def loop():
        with run.stoppable("step"):
            met.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loop()
    finally:
        signal.signal(signal.SIGINT, before)
    assert met == [before, signal.SIG_IGN]
