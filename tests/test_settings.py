"""The user's interface: settings, the words of refusals, exit codes."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import CONFIG, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import progress
from lib import settings as config
from lib.errors import UserError, run_main, within_memory
from lib.settings import check, load


PLAIN = yaml.safe_load(CONFIG.read_text())


def refusal(*arguments):
    """The single line with which load() refuses the shipped configuration plus overrides."""
    with pytest.raises(UserError) as error:
        load([str(CONFIG), *arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder):
    """{path below the folder: its bytes, or None for a folder}."""
    found = {}
    for path in folder.rglob("*"):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


# ---------------------------------------------------------------- what is refused, and how
def test_a_key_below_null_is_not_called_unknown():
    assert refusal("lora=null", "lora.r=8") == "lora.r: lora is null here"


@pytest.mark.parametrize(
    "override, meant",
    [
        ("ppo.clp=0.2", "ppo.clip"),
        ("ppo.verify_iter=1", "ppo.verify_iters"),
        ("pp.clip=0.2", "ppo.clip"),
        ("model.pth=x", "model.path"),
        ("sft.lr_=1", "sft.lr"),
        ("eval.temperature=[1]", "eval.temperatures"),
        ("rn.seed=1", "run.seed"),
        ("lora.rank=8", ""),
        ("seed=1", ""),
        ("ppo.clip.x=1", "ppo.clip"),
    ],
)
def test_misspelt_override_names_the_nearest_key(override, meant):
    message = refusal(override)
    assert f"unknown key {override.split('=')[0]}" in message
    assert meant in message.partition("did you mean")[2]


@pytest.mark.parametrize(
    "section, key, meant",
    [
        ("ppo", "lamb", "lam"),
        ("sft", "batchsize", "batch_size"),
        ("model", "quantisation", "quantization"),
        ("run", 5, ""),
    ],
)
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
        if section == "env":
            continue  # the environment's own
        for key in keys:
            if f"{section}.{key}" in config.DEFAULTS:
                continue
            others = {k: v for k, v in keys.items() if k != key}
            with pytest.raises(UserError, match=f"{section}.{key}"):
                check({**raw, section: others})


def test_newer_key_may_be_left_out(raw, monkeypatch):
    """It then has the value that means "as before"; one that is given counts."""
    monkeypatch.setitem(config.DEFAULTS, "ppo.clip", 0.25)
    raw["ppo"]["clip"] = 0.1
    assert check(raw)["ppo"]["clip"] == 0.1
    del raw["ppo"]["clip"]
    assert check(raw)["ppo"]["clip"] == 0.25
    config.override(raw, "ppo.clip=0.5")
    assert check(raw)["ppo"]["clip"] == 0.5


def test_defaults_are_of_known_keys_and_accepted():
    for name, value in config.DEFAULTS.items():
        if not name.startswith("env."):
            config.checked(name, value, config.SCHEMA[name])


@pytest.mark.parametrize(
    "override, words",
    [
        ("ppo.clip=x", "ppo.clip: 'x' is not a number"),
        ("ppo.lam=2", "ppo.lam: 2.0 is not between 0 and 1"),
        ("eval.splits={all: x}", "eval.splits.all: 'x' is not a whole number"),
        ("eval.variants={ID: 5}", "eval.variants.ID: 5 is not a mapping"),
        ("eval.temperatures=[]", "eval.temperatures is empty"),
        ("eval.temperatures=[0, 0.2, 0]", "eval.temperatures: one of them stands there twice"),
        ("ppo.adam_eps=0", "ppo.adam_eps: 0.0 is not between 1e-30 and 1"),
        ("model.dtype=fp16", "model.dtype: 'fp16' is none of float32, bfloat16, float16"),
        ("ppo.value_warmup=-1", "ppo.value_warmup: -1 is not between 0 and inf"),
        (
            "ppo.init=None",
            "ppo.init: 'None' is no checkpoint; for the bare base model write \"none\"",
        ),
        ("ppo.init=", 'ppo.init: None is no checkpoint; for the bare base model write "none"'),
        ('run.dir="a\\0b"', "run.dir: 'a\\x00b' holds a null character"),
    ],
)
def test_refusal_names_the_setting_and_the_reason(override, words):
    assert refusal(override) == words


@pytest.mark.parametrize(
    "override, reason",
    [
        ("ppo.updates=many", "whole number"),
        ("ppo.updates=1.5", "whole number"),
        ("ppo.updates=true", "whole number"),
        ("ppo.clip=wide", "number"),
        ("ppo.clip=true", "number"),
        ("ppo.clip=", "number"),
        ("ppo.clip=[0.1]", "number"),
        ("ppo.normalize_advantages=1", "true or false"),
        ("ppo.normalize_advantages='true'", "true or false"),
        ("ppo.init=3", "text"),
        ("ppo.value_hidden=8", "list"),
        ("ppo.value_hidden=[8, x]", "whole number"),
        ("ppo.ratio=word", "turn, token"),
        ("model.device=gpu", "cpu, cuda, auto"),
        ("eval.variants=[ID]", "mapping"),
        ("ppo=5", "unknown key"),
        ("lora=5", "mapping"),
        ("eval.splits=[all]", "mapping"),
        ("eval.splits={all: x}", "whole number"),
        ("sft.steps=0", "between"),
        ("ppo.gamma=1.01", "between"),
        ("ppo.lr=-1e-6", "between"),
        ("ppo.lr=.nan", "between"),
        ("ppo.temperature=0", "between"),
        ("eval.temperatures=[0.2, -1]", "between"),
        ("eval.temperatures=[{T: 0.6}]", "has no top_p"),
        ("eval.temperatures=[{T: 0.6, top_p: 1.1}]", "top_p: 1.1 is not between"),
        ("run.seed=-1", "between"),
        ("sft.init_step=100000", "sft.init_step"),
        ("ppo.clip=[", "not YAML"),
        ("ppo.clip", "key=value"),
    ],
)
def test_wrong_value_is_refused(override, reason):
    message = refusal(override)
    assert reason in message and override.split("=")[0] in message


NUMBERS = st.integers() | st.just(10**400) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)


def containers(items):
    names = st.text(max_size=3) | st.integers()
    return st.lists(items, max_size=3) | st.dictionaries(names, items, max_size=3)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(sorted(config.SCHEMA)),
    st.recursive(SCALARS, containers, max_leaves=4),
)
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
    """It alone names the arm, too."""
    given = ["env.rule={J: 1, Q: 2, K: 3}", "ppo.envs=2", "ppo.envs=3"]
    cfg, _, overrides = load([str(CONFIG), *given])
    assert cfg.env["rule"] == {"J": 1, "Q": 2, "K": 3} and cfg.ppo.envs == 3
    assert overrides == [given[0], given[2]]


@pytest.mark.parametrize(
    "text, named",
    [
        ("a: 1\nb: 2\na: 3\n", "a is given twice, in lines 1 and 3"),
        ("ppo:\n  clip: 1\n\n  lam: 2\n  clip: 1\n", "ppo.clip is given twice, in lines 2 and 5"),
        ("env: {rule: ten, 'rule': face}", "env.rule is given twice, in lines 1 and 1"),
        ("eval:\n  runs:\n  - a: 1\n    a: 2\n", "eval.runs.a is given twice, in lines 3 and 4"),
        ("? [1]\n: 2\n? [1]\n: 3", "is given twice, in lines 1 and 3"),
        ("[" * 9999, "nested too deeply"),
        ("a: 2001-99-99", "month"),
    ],
)
def test_key_given_twice_is_refused_with_both_lines(tmp_path, text, named):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="my.yaml: .*" + named) as error:
        load([str(path)])
    assert "\n" not in str(error.value)


def test_second_section_of_the_same_name_is_refused(tmp_path):
    lines = CONFIG.read_text().splitlines()
    path = tmp_path / "my.yaml"
    path.write_text("\n".join([*lines, "env: {name: virl}"]))
    first = next(n for n, line in enumerate(lines, 1) if line.startswith("env:"))
    last = len(lines) + 1
    with pytest.raises(UserError, match=f"env is given twice, in lines {first} and {last}"):
        load([str(path)])
    assert "J is given twice" in refusal("env.rule={J: 1, J: 2}")


def test_anchors_and_merge_keys_are_no_doubles():
    text = """
a: &a {m: 1, n: {q: 1}}
b: &b {<<: *a, m: 2}
c: {<<: *b, <<: *a, m: 3}
d: [*a, *b, {x: *a, y: *a}]
e: {f: &f {<<: *a, m: 4}}
g: {<<: *f, m: 5}
"""
    assert config._parse(text) == yaml.safe_load(text)
    itself = config._parse("&a {x: *a}")
    assert itself["x"] is itself


@pytest.mark.parametrize(
    "text",
    [None, b"\x00\xff\xfe\x80", b"ppo: [1, 2", b"a: b: c", b"\tx: 1", b"just words", b"", b"- 1"],
)
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
    assert "model.dtype=float32" in refusal(
        "lora=null", "model.quantization=none", "model.dtype=bfloat16"
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*_*l.yaml")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_shipped_configuration_loads_and_explains_every_key(path):
    load([str(path)])
    section = ""
    for line in path.read_text().splitlines():
        indent, key, rest = re.match(r"( *)([\w ]+)?(?::(.*))?", line).groups()
        section = key if key and not indent else section
        if len(indent) == 2 and key and rest is not None:
            assert "#" in rest, f"{section}.{key} says nothing about itself"


# ---------------------------------------------------------------- out of memory
class OutOfMemoryError(RuntimeError):
    """torch's, by its name."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("Tried to allocate 2.00 GiB.\nGPU 0 has"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    ],
    ids=repr,
)
def test_out_of_memory_names_what_to_change(error):
    cfg, *_ = load([str(CONFIG), "ppo.envs=1", "model.sample_tokens=512"])
    to_lower = ("model.sample_tokens", "ppo.envs")
    to_set = ("model.quantization=nf4", "model.merge_for_sampling=false")
    with pytest.raises(UserError) as met, within_memory("sampling", cfg, *to_lower, *to_set):
        raise error
    message = str(met.value)  # without ppo.envs and model.quantization: they are there already
    assert message.startswith(
        "out of memory while sampling: lower model.sample_tokens (512) or set "
        "model.merge_for_sampling=false; `python plan.py CONFIG` shows"
    )
    assert "\n" not in message and "last checkpoint is intact" in message
    with pytest.raises(UserError, match="larger machine"):
        with within_memory("loading", cfg, "model.quantization=nf4"):
            raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes"), ValueError("out of memory"), UserError("no")], ids=repr
)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as met, within_memory("sampling", None):
        raise error
    assert met.value is error


# ---------------------------------------------------------------- what a script says on the way
class Clock:
    """time.monotonic, moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_without_a_terminal_a_line_comes_now_and_then_with_the_same_figures(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with progress.progress_bar(range(4, 10), desc="SFT", initial=4, total=10, unit="step") as bar:
        for step in bar:
            clock.now += progress.EVERY / 2
            bar.set_postfix_str(f"loss 0.{step} 5,000 tok/s", refresh=False)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in said] == [
        "SFT: 6/10 steps",
        "SFT: 8/10 steps",
        "SFT: 10/10 steps",
    ]
    assert said[0].endswith(", loss 0.5 5,000 tok/s") and said[-1].endswith("loss 0.9 5,000 tok/s")


def test_lines_of_a_bar_that_is_moved_by_hand(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    bar = progress.progress_bar(total=20, unit="episode")
    for arm in ("Init", "rl"):
        bar.set_description(f"{arm}, ID, all, greedy")
        for _ in range(10):
            clock.now += 0.01
            bar.update(1)
    clock.now += progress.EVERY
    bar.set_description("rl, ID, all, T = 1")
    bar.close()
    bar.close()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("rl, ID, all, T = 1: 20/20 episodes in ")


def test_nothing_done_says_nothing(capsys):
    with progress.progress_bar(range(7, 7), initial=7, total=7, unit="step") as bar:
        assert list(bar) == []
    assert capsys.readouterr().err == ""


def test_loop_that_is_stopped_says_why_and_no_more(capsys):
    with pytest.raises(KeyboardInterrupt):
        with progress.progress_bar(range(9), total=9, unit="step") as bar:
            for step in bar:
                if step == 4:
                    raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


def test_first_line_says_what_is_about_to_happen(capsys):
    cfg = load([str(CONFIG), "model.device=auto"])[0]
    progress.announce("sft.py", cfg, "-> runs/a/sft")
    progress.warn_of_split("sft.py", cfg)
    assert capsys.readouterr().err == "sft.py: gp (rule ten), mini/gp on auto -> runs/a/sft\n"


def test_training_on_what_is_kept_unseen_is_said(capsys):
    cfg = load([str(CONFIG), "env.split=all", "env.rule=face"])[0]
    progress.announce("rl.py", cfg, "-> runs/a/rl-env.split=all")
    progress.warn_of_split("rl.py", cfg)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("rl.py: gp (rule face, split all), mini/gp on cpu -> runs/a/rl-env")
    assert "env.split=all" in second and "unseen" in second


WITHOUT_GPU = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")


# ---------------------------------------------------------------- scripts as a user runs them
@pytest.mark.parametrize(
    "script, override, named",
    [
        ("sft", "ppo.clp=0.2", "ppo.clip"),
        ("sft", "model.path=/no/such/model", "/no/such/model"),
        pytest.param("sft", "model.device=cuda", "model.device", marks=WITHOUT_GPU),
        ("rl", "ppo.init=sft/step_7", "sft/step_7"),
        ("rl", "ppo.init=damaged", "damaged"),
    ],
)
def test_user_error_ends_a_script_with_exit_code_2(
    tmp_path, monkeypatch, capsys, script, override, named
):
    """As below, in this process: libraries are loaded already."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "trainer.pt").write_bytes(b"not a tensor in sight")
    monkeypatch.setattr(sys, "argv", [script, str(CONFIG), f"run.dir={tmp_path}", override])
    with pytest.raises(SystemExit) as stopped:
        run_main(importlib.import_module(script).main)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error: ") and named in error
    assert list(tmp_path.iterdir()) == [damaged]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, override, named",
    [
        ("sft.py", "ppo.clp=0.2", "ppo.clip"),
        ("sft.py", "model.path=/no/such/model", "/no/such/model"),
        pytest.param("sft.py", "model.device=cuda", "model.device", marks=WITHOUT_GPU),
        ("rl.py", "ppo.init=sft/step_7", "sft/step_7"),
        ("rl.py", "ppo.init=damaged", "damaged"),
    ],
)
def test_user_error_is_one_line_and_exit_code_2(tmp_path, script, override, named):
    """Whatever libraries say while loading, the user sees the error alone; nothing is written."""
    (tmp_path / "damaged").mkdir()
    for name in ("adapter_model.safetensors", "value_head.safetensors", "trainer.pt"):
        (tmp_path / "damaged" / name).write_bytes(b"not a tensor in sight")
    before = contents(tmp_path)
    done = subprocess.run(
        [sys.executable, script, str(CONFIG), f"run.dir={tmp_path}", override],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    *first, error = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and contents(tmp_path) == before
    assert error.startswith("error: ") and named in error, done.stderr
    model = override.startswith("model.") or named == "damaged"  # it was about to load one
    assert [line.partition(" ")[0] for line in first] == [f"{script}:"] * model, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("given", ["override", "file"])
def test_name_that_the_locale_cannot_write_is_one_line(tmp_path, given):
    path = tmp_path / "ü.yaml"
    overrides = [f"run.dir={tmp_path}/é"]
    path.write_text(CONFIG.read_text(), encoding="utf-8")
    if given == "file":
        path.write_text(CONFIG.read_text().replace("runs/mini_gp_l", "é"), encoding="utf-8")
        overrides = []
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "sft.py", str(path), *overrides],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, **ascii_alone},
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "run.dir" in line and "set PYTHONUTF8=1" in line


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
    def main(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 130 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("lines", [1, 100_000])  # still in the buffer at the end, or long flushed
def test_output_that_nobody_reads_is_no_error(lines):
    program = ("from lib.errors import run_main\n"
               f"run_main(lambda arguments: [print('line') for _ in range({lines})])")
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as closed:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, timeout=60,
                              stdout=closed, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, "")
