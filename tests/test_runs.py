"""Whole runs at tiny settings through the scripts' own main().

They repeat, continue wherever they were stopped, and are evaluated as one table.
"""

import contextlib
import copy
import io
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIG, PICTURES, ROOT
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import eval as evaluation
import report
import rl
import sft
from lib import training
from lib.arms import Comparison
from lib.errors import UserError
from lib.loading import load_base
from lib.ppo import ppo_statistics
from lib.runs import Run, checkpoints
from lib.settings import override as override_one
from lib.training import load_state
from policy import Policy
from rollout import make_env, outcome

TINY = (
    "sft.steps=5",
    "sft.warmup=0",
    "sft.init_step=2",
    "sft.save_every=2",
    "sft.batch_size=8",
    "ppo.init=sft/step_2",
    "ppo.updates=3",
    "ppo.save_every=1",
    "ppo.temperature=0.7",
    "ppo.envs=4",
    "ppo.turns=2",
    "ppo.minibatch=4",
    "ppo.epochs=2",
    "model.max_new_tokens=32",  # a right answer has 29
    "eval.splits={all: 4}",
    "eval.curve_n=2",
    "eval.verify_iters=2",
    "eval.batch_size=8",
    "eval.temperatures=[0.2, 0]",
)
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest in the background ignores it
MAIN = {"sft": sft.main, "rl": rl.main, "eval": evaluation.main}


def run_report(folder):
    report.main([str(folder)])


def run(script, folder, *overrides, config=CONFIG, tiny=TINY):
    """main() as `python script.py CONFIG ...` would call it.

    The tiny settings live in a YAML file, so that they do not name the arm.
    """
    settings = yaml.safe_load(config.read_text())
    for override in tiny:
        override_one(settings, override)
    path = folder.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    MAIN[script]([str(path), f"run.dir={folder}", *overrides])
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def log(folder, name="metrics"):
    """What a run logged, but for what depends on the machine's mood."""
    records = lines(folder / f"{name}.jsonl")
    for record in records:
        record.pop("seconds", None)
        record.pop("peak_memory_gib", None)
    return records


def numbers(folder, kind="step"):
    return [number for number, _ in checkpoints(folder, kind)]


def assert_same_run(one, two):
    assert log(one) == log(two)
    assert numbers(one) == numbers(two)
    assert_same_weights(one, two)


def assert_same_weights(one, two):
    """Of the last checkpoints of two arms."""
    _, last = checkpoints(one)[-1]
    _, other = checkpoints(two)[-1]
    weights = list(last.glob("*.safetensors"))
    assert len(weights) == 2
    for path in weights:
        assert path.read_bytes() == (other / path.name).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An SFT and a PPO run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run("sft", folder)
    return run("rl", folder)


@pytest.fixture
def after_sft(whole, tmp_path):
    """A fresh run directory that has the SFT arm already."""
    return ready_for("rl", whole, tmp_path)


def ready_for(script, whole, tmp_path):
    """A fresh run directory that has what the script starts from."""
    folder = tmp_path / "run"
    if script == "rl":
        shutil.copytree(whole / "sft", folder / "sft")
    return folder


# ---------------------------------------------------------------- what a run leaves behind
def test_sft_logs_every_step(whole):
    records = lines(whole / "sft" / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert numbers(whole / "sft") == [2, 4, 5]  # every second, Init's and the last
    assert all(math.isfinite(v) for r in records for k, v in r.items() if k != "tokens")


def test_ppo_logs_what_the_docstrings_say(whole):
    records = lines(whole / "rl" / "metrics.jsonl")
    text = rl.__doc__ + outcome.__doc__ + ppo_statistics.__doc__
    assert [r["step"] for r in records] == numbers(whole / "rl") == [1, 2, 3]
    for record in records:
        assert all(key in text for key in record if key != "step")
        assert record["ratio_gap"] < 1e-4  # sampling and scoring agree: the first ratio is 1
        assert math.isclose(sum(record["answers"].values()), 1, abs_tol=1e-3)
    first = lines(whole / "rl" / "transcripts.jsonl")[0]
    assert first["answer"] and first["reward"] in (5, -1, -2, -3, -4)
    assert 1 <= first["attempt"] <= 5  # hands may have begun before the first update


def test_ppo_starts_from_init_and_its_compute(whole, after_sft):
    """At learning rate 0 the arm ends as Init, at KL 0.

    Init's FLOPs are on its bill (X_RL of the paper's C.3).
    """
    run("rl", after_sft, "ppo.lr=0", "ppo.updates=1")
    (folder,) = after_sft.glob("rl-*")
    end = folder / "step_1" / "adapter_model.safetensors"
    start = whole / "sft" / "step_2" / "adapter_model.safetensors"
    assert end.read_bytes() == start.read_bytes()
    (still,) = log(folder)
    moving = log(whole / "rl")[0]
    assert abs(still["kl_start"]) < 1e-6 < moving["kl_start"]
    init = log(whole / "sft")[1]
    train, inference = still["tokens"]["train"], still["tokens"]["inference"]
    assert train > init["tokens"]["train"] and still["gflops"] > init["gflops"]
    n = init["gflops"] / 6 / init["tokens"]["train"]
    assert still["gflops"] == pytest.approx(n * (6 * train + 2 * inference))


# --------------------------------------------------------------- the same again, undisturbed or not
def test_sft_begins_at_a_checkpoint_with_its_weights_and_compute(after_sft):
    """The common start of PPO and of SFT at other rates; eval.py finds it."""
    folder = run("sft", after_sft, "sft.init=sft/step_2", "sft.lr=1e-9", "sft.steps=1",
                 "sft.init_step=1")
    arm = folder / "sft-sft.init=sft_step_2-sft.lr=1e-9"
    begun, trained = load_state(folder / "sft/step_2"), load_state(arm / "step_1")
    assert trained["gflops"] > begun["gflops"]
    weights = load_file(folder / "sft/step_2/adapter_model.safetensors")
    for name, tensor in load_file(arm / "step_1/adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-8)  # a rate of 1e-9
    with pytest.raises(UserError, match="sft.init: no checkpoint .*; give .* or sft.init=sft/"):
        run("sft", after_sft, "sft.init=sft/step_99")
    comparison = Comparison([folder], "sft/step_2", lambda path: 1.0)
    names = {arm.name: [start.name for start in arm.starts] for arm in comparison.sft}
    assert names[arm.name] == ["Init"]


def test_same_seed_same_numbers_and_other_seed_others(whole, tmp_path):
    """Of SFT; PPO that is stopped in its first update, see below, begins again."""
    assert_same_run(run("sft", tmp_path / "again") / "sft", whole / "sft")
    assert log(run("sft", tmp_path / "other", "run.seed=1") / "sft") != log(whole / "sft")


def stop_after(monkeypatch, records, times=2):
    """Ctrl-C after that many lines of metrics: once to save and stop, twice to stop at once."""
    log_line = Run.log
    logged = []

    def interrupted(self, name, record):
        log_line(self, name, record)
        if name != "metrics":
            return
        logged.append(record)
        if len(logged) == records:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "log", interrupted)


def stop_in_checkpoint(monkeypatch, number):
    """Ctrl-C while writing that checkpoint: the weights are there, the trainer's state cut off."""
    save = training.save_state
    folders = []

    def interrupted(folder, state):
        folders.append(folder)
        if len(folders) == number:
            (folder / "trainer.pt").write_bytes(b"half")
            raise KeyboardInterrupt
        save(folder, state)

    monkeypatch.setattr(training, "save_state", interrupted)


STOPS = [
    ("sft", "step", 1),
    ("sft", "step", 3),
    ("sft", "step", 4),
    ("sft", "checkpoint", 2),
    ("rl", "step", 1),
    pytest.param("rl", "step", 3, marks=pytest.mark.slow),
    pytest.param("rl", "checkpoint", 1, marks=pytest.mark.slow),
    pytest.param("rl", "checkpoint", 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("script, where, k", STOPS, ids=str)
def test_stopped_and_continued_is_the_run_undisturbed(
    whole, tmp_path, monkeypatch, script, where, k
):
    """Stopped before the first checkpoint, between two, after one, and while writing one.

    save_every is 2 steps of SFT and 1 update of PPO.
    """
    folder = ready_for(script, whole, tmp_path)
    with monkeypatch.context() as patch:
        if where == "step":
            stop_after(patch, k)
        else:
            stop_in_checkpoint(patch, k)
        with pytest.raises(KeyboardInterrupt):
            run(script, folder)
    run(script, folder)
    assert_same_run(folder / script, whole / script)
    if script == "rl":
        assert log(folder / "rl", "transcripts") == log(whole / "rl", "transcripts")
    finished = log(folder / script)
    run(script, folder)  # nothing is left to do
    assert log(folder / script) == finished


@pytest.mark.parametrize(
    "script, k, kept", [("sft", 3, [2]), ("sft", 4, [2, 4]), ("rl", 1, [])], ids=str
)
def test_ctrl_c_once_saves_the_step_under_way(whole, tmp_path, monkeypatch, script, k, kept):
    """Apart from the checkpoints that evaluation sees, and until the next; no step is redone."""
    folder = ready_for(script, whole, tmp_path)
    arm = folder / script
    with monkeypatch.context() as patch:
        stop_after(patch, k, times=1)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after .* {k};"):
            run(script, folder, "ppo.save_every=3")
    assert numbers(arm) == kept
    assert numbers(arm, "stopped") == ([] if k in kept else [k])
    logged = (arm / "metrics.jsonl").read_text()
    run(script, folder, "ppo.save_every=3")
    assert (arm / "metrics.jsonl").read_text().startswith(logged)  # seconds too
    assert log(arm) == log(whole / script)
    assert numbers(arm) == {"sft": [2, 4, 5], "rl": [3]}[script] and not numbers(arm, "stopped")
    assert_same_weights(arm, whole / script)


@pytest.mark.parametrize(
    "script, unit, records, kept, number, code, again",
    [
        ("sft", "step", 2, [2, 5], signal.SIGTERM, 143, "a second signal"),
        pytest.param(
            "rl", "update", 1, [3], signal.SIGINT, 130, "Ctrl-C again", marks=pytest.mark.slow
        ),
    ],
)
def test_signal_in_a_real_process(
    whole, tmp_path, script, unit, records, kept, number, code, again
):
    folder = ready_for(script, whole, tmp_path)
    arm = folder / script
    metrics = arm / "metrics.jsonl"
    rarely = ["sft.save_every=9", "ppo.save_every=9"]
    settings = [str(whole.parent / "tiny.yaml"), f"run.dir={folder}", *rarely]
    command = [sys.executable, f"{script}.py", *settings]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (metrics.exists() and len(lines(metrics)) >= records):
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1].splitlines()
    last = len(lines(metrics))
    assert process.returncode == code
    start = {"sft": "", "rl": f", from {folder}/sft/step_2"}[script]
    assert said == [
        f"{script}.py: gp (rule ten), mini/gp on cpu -> {arm}{start}",
        f"finishing this {unit}, then saving; {again} stops at once",
        f"stopped after {unit} {last}; run the same command again to continue",
    ]
    assert last in numbers(arm) + numbers(arm, "stopped")
    run(script, folder, *rarely)
    assert log(arm) == log(whole / script)
    assert numbers(arm) == kept and not numbers(arm, "stopped")


def test_run_continues_in_another_place(whole, after_sft, tmp_path, monkeypatch):
    """Moved, started from another working directory and with the model elsewhere.

    Its state holds nothing of a device's: no random stream.
    """
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run("rl", after_sft)
    (tmp_path / "elsewhere").mkdir()
    after_sft.rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(ROOT / "mini" / "gp", "weights")
    run("rl", Path("moved"), "model.path=./weights")
    assert_same_run(Path("moved/rl"), whole / "rl")
    state = torch.load("moved/rl/step_3/trainer.pt", weights_only=True)
    counted = {"tokens", "official_extra", "gflops", "official_gflops"}
    assert set(state) == {"optimizer", *counted, "play", "scaler"}


@pytest.mark.gpu
@pytest.mark.parametrize("script", ["sft", "rl"])
def test_run_moves_from_cpu_to_gpu_and_back(whole, after_sft, tmp_path, monkeypatch, script):
    folder = after_sft if script == "rl" else tmp_path / "other"
    for device in ("cpu", "cuda"):
        with monkeypatch.context() as patch:
            stop_after(patch, 1, times=1)
            with pytest.raises(KeyboardInterrupt):
                run(script, folder, f"model.device={device}")
    run(script, folder)
    records, expected = log(folder / script), log(whole / script)
    assert [r["step"] for r in records] == [r["step"] for r in expected]
    assert all(finite(record) for record in records)
    assert records[0] == expected[0]
    if script == "sft":  # the same hands whatever the device; the GPU draws other answers
        losses = [r["loss"] for r in expected]
        assert [r["loss"] for r in records] == pytest.approx(losses, rel=0.05)


def test_how_often_it_saves_may_change_on_the_way(whole, tmp_path, monkeypatch):
    """What may change between stop and resume does not change the numbers."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run("sft", tmp_path / "run", "sft.save_every=1")
    run("sft", tmp_path / "run")
    assert log(tmp_path / "run" / "sft") == log(whole / "sft")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [".", "tests"]
import test_runs
from lib import training
from lib.arms import Comparison
from lib.loading import load_base
save = training.save_state

def killed(folder, state):
    if folder.name == ".tmp_new_step_4":
        (folder / "trainer.pt").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(folder, state)

training.save_state = killed
test_runs.run("sft", Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_killed_while_writing_a_checkpoint(whole, tmp_path):
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, timeout=600)
    assert done.returncode == -9
    assert numbers(folder / "sft") == [2]
    assert (folder / "sft" / ".tmp_new_step_4").is_dir()
    run("sft", folder)
    assert_same_run(folder / "sft", whole / "sft")


@pytest.mark.parametrize(
    "dtype, capability, advice",
    [
        ("bfloat16", (7, 5), "model.dtype=bfloat16, but Tesla T4 .*; use model.dtype=float16 "),
        ("bfloat16", (5, 2), "model.dtype=bfloat16, but Tesla T4 .*; use model.dtype=float32 "),
        ("float16", (5, 2), "model.dtype=float16, but Tesla T4 .*; use model.dtype=float32 "),
    ],
)
def test_card_without_these_16_bits_is_a_user_error(cfg, monkeypatch, dtype, capability, advice):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kinds: asked.append(kinds))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cfg.model.dtype = dtype
    with pytest.raises(UserError, match=advice) as error:
        load_base(cfg.model, torch.device("cuda"))
    assert "\n" not in str(error.value)
    assert asked == [{"including_emulation": False}]  # PyTorch emulates it


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cpu_without_these_16_bits_is_a_user_error(cfg, monkeypatch, dtype):
    """As PyTorch's before 2.2, and of some builds, in float16."""

    def linear(*arguments):
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    cfg.model.dtype = dtype
    with pytest.raises(UserError, match=f"{dtype}, but .* on this CPU .*float32") as error:
        load_base(cfg.model, torch.device("cpu"))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- float16, the value head's start
def test_float16_learns_and_goes_on_to_the_same_numbers(tmp_path):
    """SFT 5 steps and an update of PPO, whole and stopped in between; a step that float16 overflows
    is one that is logged as skipped.
    """
    half = ("model.dtype=float16", "ppo.updates=1", "sft.batch_size=2", "ppo.envs=2")
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    for folder in (whole, parts):
        folder.parent.mkdir()
    run("sft", whole, *half)
    run("sft", parts, *half, "sft.steps=2")
    run("sft", parts, *half)
    (sft_arm,) = whole.glob("sft*")
    assert_same_run(sft_arm, parts / sft_arm.name)
    records = log(sft_arm)
    kept = [record for record in records if not record["skipped"]]
    assert records[-1]["loss"] < records[0]["loss"] and len(kept) >= 3
    assert all(record["grad_norm"] > 0 for record in kept)
    run("rl", whole, *half)
    (rl_arm,) = whole.glob("rl*")
    (record,) = log(rl_arm)
    assert record["steps"] > 0 and record["ratio_gap"] < 0.02 and record["ratio_noise"] > 0
    scaler = load_state(rl_arm / "step_1")["scaler"]
    assert scaler["scale"] == 2.0 ** (16 - record["skipped"])


def test_the_value_head_learns_first_and_the_run_goes_on(whole, after_sft, tmp_path):
    """Two updates of the value head alone leave Init's adapter; the third moves it. Stopped after
    the first, the run ends the same.
    """
    warm = (*TINY, "ppo.value_warmup=2", "ppo.envs=2")
    parts = tmp_path / "parts" / "run"
    shutil.copytree(after_sft, parts)
    run("rl", after_sft, tiny=warm)
    run("rl", parts, "ppo.updates=1", tiny=warm)
    run("rl", parts, tiny=warm)
    assert_same_run(after_sft / "rl", parts / "rl")
    init = (whole / "sft" / "step_2" / "adapter_model.safetensors").read_bytes()
    adapters, heads = [], []
    for _, folder in checkpoints(after_sft / "rl"):
        adapters.append((folder / "adapter_model.safetensors").read_bytes() == init)
        heads.append((folder / "value_head.safetensors").read_bytes())
    assert adapters == [True, True, False] and len(set(heads)) == 3
    assert [record["grad_norm"] > 0 for record in log(after_sft / "rl")] == [False, False, True]


# ---------------------------------------------------------------- out of memory
LOADING = "loading the model: it needs a larger machine"
SAMPLING = "sampling: lower model.sample_tokens (4096) or "
TRAINING = ("training: lower {}.micro_tokens (1024) or set model.gradient_checkpointing=true or "
            "set model.merge_for_sampling=false;")


@pytest.mark.parametrize(
    "script, place, said",
    [
        ("sft", "Policy", LOADING),
        ("rl", "Policy", LOADING),
        ("eval", "Policy", LOADING),
        ("sft", "train_step", TRAINING.format("sft")),
        ("rl", "update", TRAINING.format("ppo")),
        ("rl", "collect", SAMPLING + "set model.merge_for_sampling=false"),
        ("eval", "evaluate", SAMPLING + "lower eval.batch_size (8) or set"),
    ],
)
def test_out_of_memory_is_a_user_error(after_sft, monkeypatch, script, place, said):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    monkeypatch.setattr(sys.modules[MAIN[script].__module__], place, full)
    more = ["sft.steps=6"] if script == "sft" else []  # else nothing is left to do
    with pytest.raises(UserError, match=re.escape(f"out of memory while {said}")) as error:
        run(script, after_sft, *more)
    assert "\n" not in str(error.value)


def test_after_an_allocation_that_failed_the_run_continues(whole, tmp_path, monkeypatch):
    """Torch's own error, from the CPU's allocator, in the fourth step."""
    score = Policy.score
    calls = []

    def greedy(self, *args):
        calls.append(torch.empty(2**50 if len(calls) == 3 else 1, dtype=torch.uint8))
        return score(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "score", greedy)
        with pytest.raises(UserError, match="sft.micro_tokens .*last checkpoint is intact"):
            run("sft", tmp_path / "run")
    assert numbers(tmp_path / "run" / "sft") == [2]
    run("sft", tmp_path / "run")
    assert_same_run(tmp_path / "run" / "sft", whole / "sft")


# --------------------------------------------------------------- the settings that the paper varies
def finite(value):
    if isinstance(value, dict):
        return all(finite(item) for item in value.values())
    return value is None or math.isfinite(value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["ppo.ratio=token", "ppo.value_hidden=[8]"],
        ["ppo.kl_coef=0", "ppo.value_detach=false"],
        ["ppo.verify_iters=1"],
        ["ppo.entropy_coef=0.01", "ppo.schedule=cosine"],
        ["ppo.envs=1", "ppo.turns=1"],
        ["ppo.init=none", "ppo.normalize_advantages=false"],
    ],
    ids=str,
)
def test_variants_of_ppo_run(after_sft, overrides):
    run("rl", after_sft, "ppo.updates=1", *overrides, tiny=(*TINY, "ppo.envs=2"))
    (folder,) = after_sft.glob("rl-*")
    (record,) = lines(folder / "metrics.jsonl")
    assert finite(record), record
    assert numbers(folder) == [1]
    if overrides == ["ppo.verify_iters=1"]:
        assert record["first_attempt"] == pytest.approx(record["success"])
        assert all(r["attempt"] == 1 for r in lines(folder / "transcripts.jsonl"))


def test_example_after_mistakes(cfg):
    """The prompt holds wrong attempts and the verifier's texts; the expert's last word is right."""
    env = make_env(cfg.env, 3)
    lengths = set()
    for seed in range(30):
        obs, answer = sft.example(env, seed, 2)
        messages = obs["messages"]
        assert obs["image"] is None
        assert all(m["role"] == "user" for m in messages[::2])
        assert all(m["role"] == "assistant" for m in messages[1::2])
        assert all(m["content"].startswith("You failed this trial: ") for m in messages[2::2])
        assert env.step(answer)[1] == 5
        assert sft.example(env, seed, 2) == (obs, answer)
        lengths.add(len(messages))
    assert lengths == {1, 3, 5}
    assert all(len(sft.example(env, seed, 0)[0]["messages"]) == 1 for seed in range(5))


def test_sft_on_mistakes_runs(tmp_path):
    run("sft", tmp_path / "run", "sft.mistakes=2", "sft.steps=2")
    (folder,) = (tmp_path / "run").glob("sft*")
    assert folder.name == "sft-sft.mistakes=2"
    assert len(lines(folder / "metrics.jsonl")) == 2
    run("rl", tmp_path / "run", "sft.mistakes=2", "ppo.updates=1")  # which starts from it
    (arm,) = (tmp_path / "run").glob("rl*")
    assert arm.name == "rl-sft.mistakes=2"
    noted = yaml.safe_load((arm / "config.yaml").read_text())
    assert noted["ppo"]["init"] == "sft-sft.mistakes=2/step_2"


@pytest.mark.parametrize("script, shorter", [("sft", "sft.steps=3"), ("rl", "ppo.updates=2")])
def test_prolonged_run_is_the_longer_run(whole, tmp_path, script, shorter):
    folder = ready_for(script, whole, tmp_path)
    run(script, folder, shorter)
    short = log(folder / script)
    assert short == log(whole / script)[: len(short)]
    run(script, folder)
    assert log(folder / script) == log(whole / script)
    assert numbers(folder / script) == sorted({*numbers(whole / script), len(short)})
    assert_same_weights(folder / script, whole / script)


def test_tuning_all_parameters_resumes(tmp_path, monkeypatch):
    full = ["lora=null", "model.quantization=none"]
    full += ["sft.lr=1e-4", "sft.steps=3", "sft.save_every=1"]
    run("sft", tmp_path / "whole", *full)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run("sft", tmp_path / "parts", *full)
    run("sft", tmp_path / "parts", *full)
    (one,), (two,) = ((tmp_path / name).glob("sft*") for name in ("whole", "parts"))
    assert_same_run(one, two)
    base = load_file(ROOT / "mini/gp/model.safetensors")
    tuned = load_file(one / "step_3/model.safetensors")
    assert set(base) == set(tuned)
    embeddings = [name for name in base if "embed_tokens" in name]
    assert any(not torch.equal(base[n].float(), tuned[n].float()) for n in embeddings)
    one_update = ["ppo.updates=1", f"ppo.init={one.name}/step_2", "ppo.lr=1e-6"]
    run("rl", tmp_path / "whole", *full, *one_update)


# ---------------------------------------------------------------- evaluation
@pytest.fixture(scope="module")
def evaluated(whole, tmp_path_factory):
    """(run directory, what report.py printed of its evaluation)."""
    folder, printed = tmp_path_factory.mktemp("evaluated") / "run", io.StringIO()
    shutil.copytree(whole, folder)
    run("eval", folder)
    with contextlib.redirect_stdout(printed):
        run_report(folder)
    return folder, printed.getvalue()


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluation, "Policy", refuse)


def test_evaluation_shows_every_arm(evaluated):
    folder, printed = evaluated
    arms = ("Init", "sft", "rl", "rl - Init", "sft - Init", "rl - sft")
    for word in (*arms, "ID", "rule OOD", "greedy", "T = 0.2"):
        assert word in printed
    report = json.loads((folder / "evaluation.json").read_text())
    assert len(report["table"]) == 2 * 2 * 3 and all(r["n"] == 4 for r in report["table"])
    for row in report["table"]:
        assert {"solved", "per_step", "first", "recognized"} <= set(row["metrics"])
        for mean, low, high in row["metrics"].values():
            assert 0 <= low <= mean + 1e-3 and mean - 1e-3 <= high <= 100.001
        assert row["metrics"]["first"][0] <= row["metrics"]["solved"][0]
    assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def clusters(cell):
    return [episode["cluster"] for episode in cell["episodes"]]


def test_arms_play_the_same_hands_at_equal_compute(evaluated):
    folder, _ = evaluated
    hands = {}
    for cell in lines(folder / "evaluations.jsonl"):
        checkpoint, _, env, split, temperature, n, *_ = cell["key"]
        hands.setdefault((json.dumps(env), split, n), []).append(clusters(cell))
    assert all(len(c) >= 3 and all(x == c[0] for x in c) for c in hands.values())  # paired
    assert len({str(c[0]) for c in hands.values()}) == len(hands)
    report = json.loads((folder / "evaluation.json").read_text())
    available = {}
    for number, path in checkpoints(folder / "sft"):
        available[number] = torch.load(path / "trainer.pt", weights_only=True)["gflops"]
    budget = report["gflops"]["rl"]
    assert report["gflops"]["sft"] == min(available.values(), key=lambda g: abs(g - budget))
    assert report["gflops"]["Init"] == available[2]


def test_second_evaluation_plays_nothing_and_says_the_same(evaluated, no_model, capsys):
    folder, printed = evaluated
    before = (folder / "evaluations.jsonl").read_bytes()
    run("eval", folder)
    run_report(folder)
    assert capsys.readouterr().out == printed
    assert (folder / "evaluations.jsonl").read_bytes() == before


def table_lines(printed):
    return [line for line in printed.splitlines() if "written" not in line]


def test_stopped_evaluation_continues(evaluated, tmp_path, capsys):
    """Cells that were finished are kept; one that was cut in half is played again."""
    folder, printed = evaluated
    shutil.copytree(folder, tmp_path / "run")
    cells = (folder / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "evaluations.jsonl").write_text("".join(cells[:-2]) + cells[-2][:40])
    run("eval", tmp_path / "run")
    run_report(tmp_path / "run")
    again = capsys.readouterr().out
    assert table_lines(again) == table_lines(printed)
    again = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert sorted(again) == sorted(c.strip() for c in cells)


def test_pooled_runs_join_their_hands(evaluated, tmp_path, no_model, capsys):
    """The same run twice: same means, twice the hands, and no tighter an interval.

    Where clusters are the same, there is nothing to tighten it.
    """
    folder, _ = evaluated
    shutil.copytree(folder, tmp_path / "b")
    run("eval", tmp_path / "pool", f"eval.runs=[{folder}, {tmp_path / 'b'}]")
    one = json.loads((folder / "evaluation.json").read_text())["table"]
    two = json.loads((tmp_path / "pool" / "evaluation.json").read_text())["table"]
    for a, b in zip(one, two):
        assert (2 * a["n"], a["arm"]) == (b["n"], b["arm"])
        for name, values in a["metrics"].items():
            assert values == pytest.approx(b["metrics"][name], abs=1e-3)


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["eval.splits={everything: 8}"], "everything"),
        (["eval.splits={}"], "eval.splits"),
        (["eval.temperatures=[]"], "eval.temperatures"),
        (["eval.variants={}"], "eval.variants"),
        (["eval.variants={ID: 5}"], "ID"),
        (["eval.variants={ID: {rul: ten}}"], "rule"),
        (["eval.variants={ID: {rule: eleven}}"], "rule"),
        (["env.name=chess"], "chess"),
        (["env.nam=gp"], "env.nam"),
        (["env.name=[]"], "env.name"),
        (["env.5=1"], "env.5"),
        (["env.verify_iters=2"], "verify_iters"),
        (["eval.runs=[nowhere]"], "nowhere"),
    ],
    ids=str,
)
def test_bad_evaluation_settings_are_user_errors(evaluated, no_model, overrides, named):
    with pytest.raises(UserError, match=named) as error:
        run("eval", evaluated[0], *overrides)
    assert "\n" not in str(error.value)


def test_evaluation_of_nothing_is_a_user_error(tmp_path, no_model):
    for init in ("sft/step_2", "none"):
        with pytest.raises(UserError, match=str(tmp_path)):
            run("eval", tmp_path / "empty", f"ppo.init={init}")


# ---------------------------------------------------------------- merged weights
def assert_base_files(folder, base):
    """All but the weights are the base's, in a form that transformers 4.57 reads, too."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in base.iterdir()}
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja"):
            assert path.read_bytes() == (base / path.name).read_bytes(), path
    assert "TokenizersBackend" not in (folder / "tokenizer_config.json").read_text()
    assert "rope_parameters" not in (folder / "config.json").read_text()  # 4.57: rope_scaling


def test_files_beside_merged_weights_of_a_hub_model_are_its_own(cfg, tmp_path, monkeypatch):
    """As they lie in the snapshot, without network; in fp32 the dtype is all that differs."""
    repository = tmp_path / "models--someone--mini"
    snapshot, out = repository / "snapshots" / "abc", tmp_path / "out"
    shutil.copytree(ROOT / "mini" / "virl", snapshot)
    (snapshot / "model.safetensors.index.json").write_text("{}")  # of other shards than ours
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    vars(cfg.model).update(path="someone/mini", quantization="none", dtype="bfloat16")
    policy = Policy(cfg.model, cfg.lora)
    out.mkdir()
    policy.save_merged(out)
    (snapshot / "model.safetensors.index.json").unlink()
    assert_base_files(out, snapshot)
    config = (out / "config.json").read_text()
    policy.base.float()
    policy.save_merged(out)
    assert (out / "config.json").read_text() == config.replace("bfloat16", "float32")


@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "all parameters"])
def test_merged_arm_is_a_model_folder_for_any_program(cfg, raw, make_policy, tmp_path, full):
    """LoRA is added to the 16-bit weights, not to what is left of them in NF4.

    In fp32 that is exactly the adapter. bfloat16 rounds each weight by at most 2^-9, 0.08 % rms:
    over the 42 matmuls on the way, in quadrature, 0.5 % of the logits.
    """
    plain = {"quantization": "none", "dtype": "float32", "full": full}
    policy, start = make_policy(3, **plain), make_policy(0, **plain)
    if full:
        for parameter in policy.trainable.values():
            generator = torch.Generator().manual_seed(0)
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        raw["lora"] = None
    raw["model"]["quantization"] = "none" if full else "nf4"
    checkpoint, folder = tmp_path / "rl" / "step_1", tmp_path / "out" / "rl" / "merged"
    checkpoint.mkdir(parents=True)
    policy.save(checkpoint)
    (checkpoint.parent / "config.yaml").write_text(yaml.safe_dump(raw))
    ids = torch.tensor([policy.encode_answers(["the cards are a jack, 3, 5 and 9"])[0]])
    with torch.no_grad():
        logits = [p.net(input_ids=ids).logits for p in (policy, start)]  # (1, T, V) each
    evaluation.save_merged(checkpoint, cfg, folder)
    policy.save_merged(tmp_path / "exact")
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert_base_files(folder, ROOT / "mini" / "gp")
    for place, dtype, tolerance in (
        (folder, torch.bfloat16, 0.01),
        (tmp_path / "exact", torch.float32, 1e-5),
    ):
        merged = AutoModelForImageTextToText.from_pretrained(place, dtype="auto")
        assert merged.dtype == dtype
        with torch.no_grad():
            error = merged.float()(input_ids=ids).logits - logits[0]
        assert error.std() < tolerance * logits[0].std()
    assert (logits[0] - logits[1]).std() > 0.1 * logits[0].std()  # else there was nothing to merge


# ---------------------------------------------------------------- pictures (GP-VL)
TINY_PICTURES = (
    *TINY,
    "sft.steps=3",
    "sft.init_step=1",
    "sft.save_every=1",
    "sft.batch_size=2",
    "ppo.init=sft/step_1",
    "ppo.updates=2",
    "ppo.envs=4",
    "ppo.verify_iters=2",  # as many as there are turns: each update has first attempts
    "eval.splits={all: 3, unseen: 2}",
    "eval.curve_n=1",
    "eval.verify_iters=2",
    "eval.temperatures=[0.2]",
)


def run_pictures(script, folder, *overrides):
    return run(script, folder, *overrides, config=PICTURES, tiny=TINY_PICTURES)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """(run directory of an SFT and a PPO run on pictures, what report.py printed)."""
    folder, printed = tmp_path_factory.mktemp("seeing") / "run", io.StringIO()
    run_pictures("sft", folder)
    run_pictures("rl", folder)
    run_pictures("eval", folder)
    with contextlib.redirect_stdout(printed):
        run_report(folder)
    return folder, printed.getvalue()


def test_runs_on_pictures_log_recognition_and_the_compute_of_seeing(seeing):
    folder, _ = seeing
    supervised = lines(folder / "sft" / "metrics.jsonl")
    updates = lines(folder / "rl" / "metrics.jsonl")
    assert [r["step"] for r in supervised] == [1, 2, 3]
    assert [r["step"] for r in updates] == [1, 2]
    for record in supervised:
        assert math.isfinite(record["loss"])
        assert record["tokens"]["train_patches"] == 2 * 65 * record["step"]
    categories = {"correct", "wrong_value", "wrong_numbers", "illegal", "misread"}
    for record in updates:
        assert 0 <= record["recognition"] <= 1 and record["ratio_gap"] < 3e-4
        assert set(record["answers"]) <= categories
        assert record["first_attempt"] <= record["recognition"]  # gate: nothing is solved unread
        assert record["tokens"]["inference_patches"] > 0
    for now, before in zip(updates[1:], updates):
        assert all(now["tokens"][kind] > before["tokens"][kind] for kind in before["tokens"])
    rewards = {5, -1, -2, -3, -4, -1.5, -2.5}
    assert {r["reward"] for r in lines(folder / "rl" / "transcripts.jsonl")} <= rewards


def test_evaluation_of_pictures_shows_recognition_beside_success(seeing):
    folder, printed = seeing
    report = json.loads((folder / "evaluation.json").read_text())
    variants = ("ID", "rule OOD", "visual OOD")
    arms = {"Init": 0.2, "sft": 0.2, "rl": 0.2, "likeliest cards": None}
    assert len(report["table"]) == 2 * 3 * 4  # splits x variants x arms and the reference
    rows = {(r["split"], r["variant"], r["arm"], r["temperature"]) for r in report["table"]}
    cells = itertools.product(("all", "unseen"), variants, arms.items())
    assert rows == {(split, variant, *arm) for split, variant, arm in cells}
    assert len(report["differences"]) == 2 * 3 * 3  # two against Init and one against SFT
    for row in report["table"] + report["differences"]:
        lowest = -100 if "base" in row else 0
        for mean, low, high in row["metrics"].values():
            assert lowest - 1e-3 <= low <= mean + 1e-3 and mean - 1e-3 <= high <= 100.001
    for row in report["table"]:
        first, recognized = row["metrics"]["first"][0], row["metrics"]["recognized"][0]
        assert first <= recognized + 1e-3  # gate: nothing is solved unread
    for split in ("all", "unseen"):
        assert f"{split}: recognition %" in printed and f"{split}: success %" in printed
    lines_of = [line for line in printed.splitlines() if "likeliest cards" in line]
    assert len(lines_of) == 2 * 2 * 3  # splits x reports x variants
    assert not any("±" in line for line in lines_of)
    assert "paired differences of success" in printed
    assert "paired differences of recognition" in printed
    assert "visual OOD" in printed and "rl - sft" in printed
    for curves in report["curves"].values():
        for points in curves.values():
            assert all(len(point[5]) == 1 for point in points)  # seeds
    assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_visual_ood_plays_the_hands_of_id_by_all_arms(seeing):
    folder, _ = seeing
    hands = {"red": set(), "black": set()}
    for cell in lines(folder / "evaluations.jsonl"):
        _, _, env, split, _, n, *_ = cell["key"]
        suits = env.get("suits")
        if suits in hands and env["rule"] == "ten" and split == "all" and n == 3:
            hands[suits].add(tuple(clusters(cell)))
    assert len(hands["red"]) == 1 and hands["red"] == hands["black"]


def test_text_evaluation_does_not_speak_of_recognition(evaluated):
    folder, printed = evaluated
    report = json.loads((folder / "evaluation.json").read_text())
    assert "recognition" not in printed and {r["temperature"] for r in report["table"]} == {0.2, 0}


def test_cells_of_an_older_version_are_played_again(evaluated, tmp_path, capsys):
    folder, printed = evaluated
    shutil.copytree(folder, tmp_path / "run")
    cells = lines(folder / "evaluations.jsonl")
    stored = copy.deepcopy(cells)
    for cell in stored[:2]:
        episodes = cell.pop("episodes")
        cell["cluster"] = [episode["cluster"] for episode in episodes]
        for name in ("first", "solved"):
            cell[name] = [episode["counts"][name][0] for episode in episodes]
    path = tmp_path / "run" / "evaluations.jsonl"
    path.write_text("".join(json.dumps(cell) + "\n" for cell in stored))
    run("eval", tmp_path / "run")
    run_report(tmp_path / "run")
    assert capsys.readouterr().out.replace(str(tmp_path / "run"), str(folder)) == printed
    assert sorted(map(json.dumps, lines(path))) == sorted(map(json.dumps, cells))


def test_ppo_on_pictures_stopped_and_continued_is_the_run_undisturbed(
    seeing, tmp_path, monkeypatch
):
    """Stopped after the second update of two.

    The first checkpoint holds environments in mid-episode, whose pictures are drawn again.
    """
    state = torch.load(seeing[0] / "rl" / "step_1" / "trainer.pt", weights_only=True)
    assert any(answers for _, answers in state["play"]["episodes"])
    folder = tmp_path / "run"
    shutil.copytree(seeing[0] / "sft", folder / "sft")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run_pictures("rl", folder)
    assert numbers(folder / "rl") == [1]
    run_pictures("rl", folder)
    assert_same_run(folder / "rl", seeing[0] / "rl")
    assert log(folder / "rl", "transcripts") == log(seeing[0] / "rl", "transcripts")
