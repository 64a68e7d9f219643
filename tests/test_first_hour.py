"""tools/first_hour.py: what it would do on a card, in which order; stopping costs nothing."""

import json
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import first_hour
import pytest
import torch
from conftest import ROOT
from first_hour import Card

from lib.errors import UserError
from lib.settings import load


def test_it_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU.*--cpu") as error:
        first_hour.main([])
    assert "\n" not in str(error.value)


QWEN = "configs/8gb/gp_vl.yaml"
BIG = Card(80.0, ("bfloat16", "float16"))
T4 = Card(14.6, ("float16",))


def test_the_order_is_that_of_worth_and_every_command_is_valid(tmp_path):
    steps = first_hour.steps_of(BIG, tmp_path)
    names = [step.name for step in steps]
    assert names[0] == "tests" and len(set(names)) == len(names)
    assert names.index("updates in bfloat16") < names.index("11b/virl_l on 24 GiB")
    assert names.index("11b/gp_vl on 24 GiB") < names.index("updates in bfloat16")
    for step in steps:
        for script, *arguments in step.commands:
            assert script == "-m" or (ROOT / script).is_file()
            known = [argument for argument in arguments if argument.endswith(".yaml")]
            known += [argument for argument in arguments if argument.startswith("model.")]
            if script != "-m":
                load([str(ROOT / known[0]), *known[1:]])


def test_a_card_gets_what_it_holds_in_bits_that_it_has(tmp_path):
    """A T4 has 14.6 GiB and no bfloat16: no 11B, and float16 in place of the YAML's bfloat16."""
    steps = first_hour.steps_of(T4, tmp_path)
    names = [step.name for step in steps]
    assert "16gb/gp_vl on 14.7 GiB" in names and not any("11b" in name for name in names)
    assert "updates in float16" in names and "updates in bfloat16" not in names
    for step in steps:
        for command in step.commands:
            if command[0].endswith("benchmark_card.py"):
                assert "model.dtype=float16" in command


def test_one_of_each_card_comes_first():
    steps = [SimpleNamespace(name=name) for name in ("a/x", "b/x", "a/y", "b/y", "c/y")]
    first, rest = first_hour.one_of_each_card(steps)
    assert [step.name for step in first] == ["a/x", "b/x", "c/y"]
    assert [step.name for step in rest] == ["a/y", "b/y"]


def test_the_updates_are_of_a_real_model_if_one_is_here(tmp_path, monkeypatch):
    paths = {path: str(tmp_path / path.replace("/", "_")) for path in (QWEN, first_hour.SMOLLM2)}
    monkeypatch.setattr(first_hour, "model_of", lambda path: {"path": paths.get(path, "./none")})
    assert first_hour.smallest_real_model() == first_hour.MINI
    Path(paths[first_hour.SMOLLM2]).mkdir()
    assert first_hour.smallest_real_model() == first_hour.SMOLLM2
    Path(paths[QWEN]).mkdir()
    assert first_hour.smallest_real_model() == QWEN


REPORT = """<testsuites><testsuite><testcase name="a"/><testcase name="b[0]"><failure/></testcase>
<testcase name="c"><skipped/></testcase><testcase name="d"><error/></testcase></testsuite>
</testsuites>"""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What first_hour asks for: (script, seconds), of processes that leave what the real ones do.
    The first benchmark runs out of time."""
    asked = []

    def ended(command, seconds):
        script = Path(command[0]).name
        asked.append((script, seconds))
        if script == "-m":
            report = Path(command[-2].partition("=")[2])
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(REPORT)
            return 1
        if script == "rl.py":
            log = Path(command[1].replace(".yaml", "")) / "rl" / "metrics.jsonl"
            log.parent.mkdir(parents=True, exist_ok=True)
            record = dict.fromkeys(first_hour.AVERAGED, 1.0) | {"skipped": 1, "peak_memory_gib": 2}
            later = {**record, "seconds": 3.0, "ratio_noise": None}
            log.write_text(json.dumps(record) + "\n" + json.dumps(later) + "\n")
        first = sum(script == "benchmark_card.py" for script, _ in asked) == 1
        return None if script == "benchmark_card.py" and first else 0

    monkeypatch.setattr(first_hour, "ended", ended)
    monkeypatch.setattr(first_hour, "machine", lambda device: {"device": device.type})
    return asked


def test_what_is_done_is_not_done_again(tmp_path, asked):
    """A step that fails or runs out of time is tried again, after those that nobody has tried;
    figures of its log are kept."""
    arguments = ["--cpu", "--json", str(tmp_path / "first.json")]
    first_hour.main(arguments)
    steps = json.loads((tmp_path / "first.json").read_text())["steps"]
    assert {name: record["status"] for name, record in steps.items()} == {
        "tests": "failed with exit code 1",
        "mini/gp_l on 4 GiB": "out of time",
        "updates in bfloat16": "done",
        "updates in float16": "done",
    }
    counted = {"passed": 1, "failed": 2, "skipped": 1, "failures": ["b[0]", "d"]}
    assert counted.items() <= steps["tests"].items()
    updates = steps["updates in bfloat16"]
    assert updates["updates"] == updates["skipped"] == 2 and updates["peak_memory_gib"] == 2
    assert updates["mean"]["seconds"] == 2 and updates["mean"]["ratio_noise"] == 1
    count = len(asked)
    first_hour.main(arguments)
    assert [script for script, _ in asked[count:]] == ["-m", "benchmark_card.py"]
    first_hour.main([*arguments, "--minutes", "0"])
    assert len(asked) == count + 2


def test_the_tests_leave_time_for_the_rest(tmp_path, asked):
    first_hour.main(["--cpu", "--json", str(tmp_path / "first.json"), "--minutes", "6"])
    (_, first), (_, second), *_ = asked
    assert 179 < first <= 180 and 350 < second <= 360


def test_what_nobody_has_tried_comes_first(tmp_path, asked):
    path = tmp_path / "first.json"
    tried = dict.fromkeys(("tests", "mini/gp_l on 4 GiB"), {"status": "out of time", "tries": 1})
    path.write_text(json.dumps({"steps": tried}))
    first_hour.main(["--cpu", "--json", str(path)])
    scripts = [script for script, _ in asked]
    assert scripts == ["sft.py", "rl.py", "sft.py", "rl.py", "-m", "benchmark_card.py"]


def test_stopped_by_hand_it_keeps_what_it_has(tmp_path, monkeypatch, asked):
    def stopped(command, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(first_hour, "ended", stopped)
    path = tmp_path / "first.json"
    with pytest.raises(KeyboardInterrupt):
        first_hour.main(["--cpu", "--json", str(path)])
    assert json.loads(path.read_text())["steps"] == {"tests": {"status": "stopped", "tries": 1}}


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_process_out_of_time_is_asked_to_stop_first(tmp_path, monkeypatch, handler):
    """In the background of a shell, too, whose jobs ignore Ctrl-C."""
    script, ready, told = (tmp_path / name for name in ("sleeps.py", "ready", "told"))
    script.write_text(f"""import pathlib, time
try:
    pathlib.Path({str(ready)!r}).touch()
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(told)!r}).touch()
""")

    class Sleeper(subprocess.Popen):
        """Its time is over as soon as it sleeps."""

        out_of_time = False

        def wait(self, timeout=None):
            if self.out_of_time:
                return super().wait(timeout)
            self.out_of_time = True
            while not ready.exists():
                time.sleep(0.05)
            raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(first_hour, "GRACE", 60)
    assert first_hour.ended(["-c", "raise SystemExit(3)"], 120) == 3
    monkeypatch.setattr(first_hour.subprocess, "Popen", Sleeper)
    own = signal.signal(signal.SIGINT, handler)
    try:
        assert first_hour.ended([str(script)], 120) is None and told.exists()
    finally:
        signal.signal(signal.SIGINT, own)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"steps"'])
def test_another_json_is_one_line(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match="other.json is not of this script") as error:
        first_hour.main(["--cpu", "--json", str(path)])
    assert "\n" not in str(error.value) and path.read_text() == content


@pytest.mark.slow
def test_its_plumbing_works_on_the_mini(tmp_path):
    first_hour.main(["--cpu", "--json", str(tmp_path / "first.json")])
    steps = json.loads((tmp_path / "first.json").read_text())["steps"]
    assert {record["status"] for record in steps.values()} == {"done"}
    assert steps["mini/gp_l on 4 GiB"]["figures"]["mini/gp_l"]["ppo"]["update_seconds"] > 0
    assert steps["updates in float16"]["updates"] == 2
