"""One arm's folder, without a model: its name, whose it is, whole checkpoints, logs, Ctrl-C."""

import copy
import os
import signal
import threading

import pytest
import yaml

from lib import settings
from lib.runs import Run, arm_name, checkpoints, written_whole
from lib.settings import UserError, check, override

signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest in the background ignores it


def contents(folder):
    """{path below the folder: its bytes, or None for a folder}."""
    found = {}
    for path in folder.rglob("*"):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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

    def opened(script, changes=(), overrides=()):
        changed = copy.deepcopy(raw)
        for change in (*changes, *overrides):
            override(changed, change)
        return Run(script, check(changed), list(overrides))

    return opened


def test_arm_is_named_after_its_own_overrides():
    assert arm_name("rl", []) == "rl"
    assert arm_name("rl", ["ppo.verify_iters=1"]) == "rl-ppo.verify_iters=1"
    for overrides in (["ppo.gamma=1", "lora.r=8"], ["lora.r=8", "ppo.gamma=1"]):
        assert arm_name("rl", overrides) == "rl-lora.r=8-ppo.gamma=1"
    others = ["sft.lr=1", "eval.n=5"]  # of other arms
    places = ["run.dir=x/y", "model.device=cuda", "ppo.save_every=1"]  # what may change
    assert arm_name("rl", others + places) == "rl"
    mixed = ["ppo.clip=1", "sft.micro_tokens=9", "sft.mistakes=2"]
    assert arm_name("sft", mixed) == "sft-sft.mistakes=2"
    assert "/" not in arm_name("rl", ["ppo.init=sft/step_5"])  # a folder, not a path


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


def test_run_that_is_older_than_a_key_continues_under_its_default(open_run, monkeypatch):
    run = open_run("rl")
    save(run, 1, True)
    settings_then = yaml.safe_load((run.dir / "config.yaml").read_text())
    del settings_then["ppo"]["clip"], settings_then["env"]["replacement"]
    (run.dir / "config.yaml").write_text(yaml.safe_dump(settings_then))
    with pytest.raises(UserError, match="env.replacement = None"):
        open_run("rl")
    monkeypatch.setitem(settings.DEFAULTS, "ppo.clip", 0.1)
    monkeypatch.setitem(settings.DEFAULTS, "env.replacement", False)
    assert open_run("rl").step == 1
    with pytest.raises(UserError, match="ppo.clip = 0.1, not 0.3"):
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
    with pytest.raises(OSError):
        with written_whole(final) as folder:
            (folder / "half").write_text("half")
            raise OSError("disk full")
    assert names(final) == ["new"]
    with written_whole(final):  # what is left of that does not get in
        pass
    assert names(final) == [] and names(tmp_path) == ["model"]


# ---------------------------------------------------------------- Ctrl-C
def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


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
