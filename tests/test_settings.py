"""The user's interface: settings, error messages, run directories; and the shape of the program itself. No torch here."""
import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import yaml
from conftest import CONFIG, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import settings as config
from lib.runs import Run, arm_name, checkpoints, written_whole
from lib.settings import UserError, check, load, within_memory


PLAIN = yaml.safe_load(CONFIG.read_text())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts pytest in the background has it ignored


def refusal(*arguments):
    """The message with which load() refuses the shipped configuration plus these overrides: always a single line."""
    with pytest.raises(UserError) as error:
        load([str(CONFIG), *arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder):
    """Every path below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# ---------------------------------------------------------------- what is refused, and in which words
@pytest.mark.parametrize("override, meant", [
    ("ppo.clp=0.2", "ppo.clip"), ("ppo.verify_iter=1", "ppo.verify_iters"), ("pp.clip=0.2", "ppo.clip"),
    ("model.pth=x", "model.path"), ("sft.lr_=1", "sft.lr"), ("eval.temperature=[1]", "eval.temperatures"),
    ("rn.seed=1", "run.seed"), ("lora.rank=8", ""), ("seed=1", ""), ("ppo.clip.x=1", "ppo.clip")])
def test_misspelt_override_names_the_nearest_key(override, meant):
    message = refusal(override)
    assert f"unknown key {override.split('=')[0]}" in message
    assert meant in message.partition("did you mean")[2]


@pytest.mark.parametrize("section, key, meant", [("ppo", "lamb", "lam"), ("sft", "batchsize", "batch_size"),
                                                 ("model", "quantisation", "quantization"), ("run", 5, "")])
def test_misspelt_key_in_the_file_names_the_nearest_key(raw, section, key, meant):
    raw[section][key] = 1
    with pytest.raises(UserError, match=f"unknown key {section}.{key}.*{meant}"):
        check(raw)


def test_misspelt_section_names_the_nearest_section(raw):
    raw["pppo"] = raw.pop("ppo")
    with pytest.raises(UserError, match="'pppo'.*ppo?"):
        check(raw)


def test_missing_key_or_section_is_named(raw):
    for section, keys in raw.items():
        rest = {k: v for k, v in raw.items() if k != section}
        with pytest.raises(UserError, match=section):
            check(rest)
        for key in keys if section != "env" else ():
            with pytest.raises(UserError, match=f"{section}.{key}"):
                check({**raw, section: {k: v for k, v in keys.items() if k != key}})


@pytest.mark.parametrize("override, reason", [
    ("ppo.updates=many", "whole number"), ("ppo.updates=1.5", "whole number"), ("ppo.updates=true", "whole number"),
    ("ppo.clip=wide", "number"), ("ppo.clip=true", "number"), ("ppo.clip=", "number"), ("ppo.clip=[0.1]", "number"),
    ("ppo.normalize_advantages=1", "true or false"), ("ppo.normalize_advantages='true'", "true or false"),
    ("ppo.init=3", "text"), ("ppo.value_hidden=8", "list"), ("ppo.value_hidden=[8, x]", "whole number"),
    ("ppo.ratio=word", "turn, token"), ("model.device=gpu", "cpu, cuda, auto"), ("eval.variants=[ID]", "mapping"),
    ("ppo=5", "unknown key"), ("lora=5", "mapping"), ("eval.splits=[all]", "mapping"), ("eval.splits={all: x}", "whole number"),
    ("sft.steps=0", "between"), ("ppo.gamma=1.01", "between"), ("ppo.lr=-1e-6", "between"), ("ppo.lr=.nan", "between"),
    ("ppo.temperature=0", "between"), ("eval.temperatures=[0.2, -1]", "between"), ("run.seed=-1", "between"),
    ("sft.init_step=100000", "sft.init_step"), ("ppo.clip=[", "not YAML"), ("ppo.clip", "key=value")])
def test_wrong_value_is_refused(override, reason):
    message = refusal(override)
    assert reason in message and override.split("=")[0] in message


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(config.SCHEMA)), st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), x, max_size=3), max_leaves=4))
def test_any_value_is_either_taken_or_refused_in_words(key, value):
    raw = dict(PLAIN)
    section, _, name = key.partition(".")
    raw[section] = {**raw[section], name: value} if name else value
    try:
        check(raw)
    except UserError as error:
        assert key in str(error) or key == "sft.steps"  # that one may also clash with sft.init_step


def test_scientific_notation_becomes_a_number():
    """YAML itself reads 1e-6 as text."""
    cfg, raw, _ = load([str(CONFIG), "ppo.lr=1e-6", "ppo.clip=1", "eval.temperatures=[1, 2e-1]"])
    assert yaml.safe_load("1e-6") == "1e-6" and cfg.ppo.lr == raw["ppo"]["lr"] == 1e-6
    assert type(cfg.ppo.clip) is float and cfg.eval.temperatures == [1.0, 0.2]


def test_overrides_reach_the_environment_and_the_last_one_counts():
    cfg, *_ = load([str(CONFIG), "env.rule={J: 1, Q: 2, K: 3}", "ppo.envs=2", "ppo.envs=3"])
    assert cfg.env["rule"] == {"J": 1, "Q": 2, "K": 3} and cfg.ppo.envs == 3


@pytest.mark.parametrize("text", [None, b"\x00\xff\xfe\x80", b"ppo: [1, 2", b"a: b: c", b"\tx: 1", b"just words", b"", b"- 1"])
def test_unreadable_file_is_named(tmp_path, text):
    path = tmp_path / "my.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match="my.yaml") as error:
        load([str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [[], ["--help"], [str(ROOT)]])
def test_without_a_file_the_usage_is_shown(arguments):
    with pytest.raises(UserError, match="CONFIG.yaml"):
        load(arguments)


def test_tuning_all_parameters_needs_unquantised_weights():
    assert "model.quantization" in refusal("lora=null", "model.quantization=nf4")
    assert load([str(CONFIG), "lora=null", "model.quantization=none"])[0].lora is None
    assert "model.dtype=float32" in refusal("lora=null", "model.quantization=none", "model.dtype=bfloat16")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_configuration_loads_and_explains_every_key(path):
    load([str(path)])
    section = ""
    for line in path.read_text().splitlines():
        indent, key, rest = re.match(r"( *)([\w ]+)?(?::(.*))?", line).groups()
        section = key if key and not indent else section
        if len(indent) == 2 and key and rest is not None:
            assert "#" in rest, f"{section}.{key} says nothing about itself"


# ---------------------------------------------------------------- run directories
@pytest.fixture
def open_run(raw, tmp_path):
    """open_run("sft", ["sft.lr=0.5"]) as the script would; the settings go into the YAML unless overrides are given."""
    raw["run"]["dir"] = str(tmp_path)

    def opened(script, changes=(), overrides=()):
        settings = copy.deepcopy(raw)
        for change in (*changes, *overrides):
            config.override(settings, change)
        return Run(script, check(settings), list(overrides))

    return opened


def test_arm_is_named_after_its_own_overrides():
    assert arm_name("rl", []) == "rl"
    assert arm_name("rl", ["ppo.verify_iters=1"]) == "rl-ppo.verify_iters=1"
    assert arm_name("rl", ["ppo.gamma=1", "lora.r=8"]) == arm_name("rl", ["lora.r=8", "ppo.gamma=1"]) == "rl-lora.r=8-ppo.gamma=1"
    # other arms' settings, how far and where to run do not make another arm
    assert arm_name("rl", ["sft.lr=1", "eval.n=5", "run.dir=x/y", "model.device=cuda", "ppo.save_every=1"]) == "rl"
    assert arm_name("sft", ["ppo.clip=1", "sft.micro_tokens=9", "sft.mistakes=2"]) == "sft-sft.mistakes=2"
    assert "/" not in arm_name("rl", ["ppo.init=sft/step_5"])  # a folder, not a path


def test_arms_do_not_share_a_folder(open_run, tmp_path):
    folders = [open_run("sft").dir, open_run("rl").dir, open_run("rl", overrides=["ppo.verify_iters=1"]).dir]
    assert len(set(folders)) == 3 and all(f.parent == tmp_path for f in folders)


@pytest.mark.parametrize("script, change", [("sft", "sft.lr=0.5"), ("sft", "env.rule=face"), ("sft", "run.seed=1"),
                                            ("rl", "ppo.clip=0.3"), ("rl", "lora.r=8"), ("rl", "model.max_new_tokens=9")])
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
    other = "sft" if script == "rl" else "ppo"  # what this arm does not use may change, and so may device and length
    again = open_run(script, [f"{other}.lr=0.7", "model.device=auto", f"{'ppo' if script == 'rl' else 'sft'}.save_every=3",
                              "model.sample_tokens=64"])
    assert again.step == 1


@pytest.mark.parametrize("text", [b"", b"- a", b"lora: [", b"\xff\xfe\x00\x80"])
def test_folder_with_unreadable_settings_is_refused(open_run, text):
    (open_run("sft").dir / "config.yaml").write_bytes(text)
    with pytest.raises(UserError, match="config.yaml|holds a run"):
        open_run("sft")


def test_run_dir_that_cannot_be_made_is_a_user_error(open_run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        open_run("sft", [f"run.dir={tmp_path}/file"])


@pytest.mark.parametrize("rest", [b"", b'{"step": 2, "rew', '{"step": 2, "answer": "é'.encode()[:-1], b"{}\n", b"7\n"],
                         ids=["nothing", "half a line", "half a character", "no step", "no object"])
def test_lines_beyond_the_last_checkpoint_are_dropped(open_run, rest):
    run = open_run("rl")
    with run.checkpoint(2) as folder:
        (folder / "weights").write_text("w")
    whole = []
    for name in ("metrics", "transcripts"):
        for step in (1, 2, 3):
            run.log(name, {"step": step, "answer": "é"})
        whole.append((run.dir / f"{name}.jsonl").read_bytes().splitlines(keepends=True)[:2])
        with open(run.dir / f"{name}.jsonl", "ab") as file:
            file.write(rest)  # a kill or a full disk
    again = open_run("rl")
    assert (again.step, again.last.name) == (2, "step_2")
    assert [(run.dir / f"{n}.jsonl").read_bytes() for n in ("metrics", "transcripts")] == [b"".join(w) for w in whole]


def test_answers_of_any_characters_survive_reopening(open_run):
    """U+2028, U+0085 and their like end a line for str.splitlines, not in a JSON Lines file."""
    run = open_run("rl")
    with run.checkpoint(2) as folder:
        (folder / "weights").write_text("w")
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
    assert sorted(p.name for p in run.dir.iterdir()) == ["config.yaml", "step_9"]  # opening it again swept up


def test_checkpoints_are_in_the_order_of_numbers(open_run, tmp_path):
    for name in ("step_10", "step_9", "step_100", "step_x", "step_", ".tmp_200"):
        (tmp_path / "sft" / name).mkdir(parents=True)
    assert [n for n, _ in checkpoints(tmp_path / "sft")] == [9, 10, 100]
    assert open_run("sft").step == 100


def test_folder_is_replaced_whole_or_not_at_all(tmp_path):
    final = tmp_path / "model"
    for text in ("old", "new"):
        with written_whole(final) as folder:
            (folder / text).write_text(text)
        assert [p.name for p in final.iterdir()] == [text]
    with pytest.raises(OSError):
        with written_whole(final) as folder:
            (folder / "half").write_text("half")
            raise OSError("disk full")
    assert [p.name for p in final.iterdir()] == ["new"]
    with written_whole(final):  # what is left of that does not get in
        pass
    assert list(final.iterdir()) == [] and list(tmp_path.iterdir()) == [final]


# ---------------------------------------------------------------- Ctrl-C
def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def save(run, step, regular):
    with run.checkpoint(step, regular) as folder:
        (folder / "weights").write_text(str(step))


def test_first_ctrl_c_finishes_and_saves_and_the_second_does_not(open_run, capfd):
    run = open_run("rl")
    with pytest.raises(KeyboardInterrupt, match="stopped after update 3; .*again to continue"):
        with run.stoppable("update"):
            save(run, 2, True)
            ctrl_c()
            save(run, 3, False)
    assert capfd.readouterr().err == "finishing this update, then saving; Ctrl-C again stops at once\n"
    again = open_run("rl")
    assert (again.step, again.last.name) == (3, "stopped_3") and [n for n, _ in checkpoints(run.dir)] == [2]
    with pytest.raises(KeyboardInterrupt) as stop:
        with again.stoppable("update"):
            ctrl_c()
            ctrl_c()
            save(again, 4, True)
    assert str(stop.value) == "" and open_run("rl").last.name == "stopped_3"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("regular", [True, False])
def test_what_ctrl_c_left_goes_with_the_next_checkpoint(open_run, regular):
    run = open_run("sft")
    save(run, 10, False)
    save(run, 11, regular)
    assert sorted(p.name for p in run.dir.iterdir()) == ["config.yaml", "step_11" if regular else "stopped_11"]


def test_loop_runs_where_ctrl_c_is_not_ours(open_run):
    """In a thread, where Python allows no handler, and in the background, where Ctrl-C is ignored."""
    run, met = open_run("sft"), []

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


# ---------------------------------------------------------------- out of memory
class OutOfMemoryError(RuntimeError):
    """torch's, by its name."""


@pytest.mark.parametrize("error", [
    OutOfMemoryError("Tried to allocate 2.00 GiB.\nGPU 0 has"), MemoryError(), RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED")], ids=repr)
def test_out_of_memory_names_what_to_change(error):
    cfg, *_ = load([str(CONFIG), "ppo.envs=1", "model.sample_tokens=512"])
    keys = ("model.sample_tokens", "ppo.envs", "model.quantization=nf4", "model.merge_for_sampling=false")
    with pytest.raises(UserError) as met, within_memory("sampling", cfg, *keys):
        raise error
    assert str(met.value).startswith("out of memory while sampling: lower model.sample_tokens (512) or set "
                                     "model.merge_for_sampling=false; `python plan.py CONFIG` shows")  # the others are there
    assert "\n" not in str(met.value) and "last checkpoint is intact" in str(met.value)
    with pytest.raises(UserError, match="larger machine"), within_memory("loading", cfg, "model.quantization=nf4"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("out of memory"), UserError("no")], ids=repr)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as met, within_memory("sampling", None):
        raise error
    assert met.value is error


# ---------------------------------------------------------------- scripts as a user runs them
def gpu():
    return shutil.which("nvidia-smi") is not None


@pytest.mark.parametrize("script, override, named", [
    ("sft.py", "ppo.clp=0.2", "ppo.clip"),
    ("sft.py", "model.path=/no/such/model", "/no/such/model"),
    pytest.param("sft.py", "model.device=cuda", "model.device", marks=pytest.mark.skipif(gpu(), reason="there is a GPU")),
    ("rl.py", "ppo.init=sft/step_7", "sft/step_7"),
    ("rl.py", "ppo.init=damaged", "damaged")])
def test_user_error_is_one_line_and_exit_code_2(tmp_path, script, override, named):
    """Whatever libraries have to say while loading, the user sees the error alone; and nothing has been written."""
    (tmp_path / "damaged").mkdir()
    for name in ("adapter_model.safetensors", "value_head.safetensors", "trainer.pt"):
        (tmp_path / "damaged" / name).write_bytes(b"not a tensor in sight")
    before = contents(tmp_path)
    done = subprocess.run([sys.executable, script, str(CONFIG), f"run.dir={tmp_path}", override], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and contents(tmp_path) == before
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], done.stderr


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
    def main(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        config.run_main(main)
    assert stop.value.code == 130 and len(capsys.readouterr().err.splitlines()) == 1
