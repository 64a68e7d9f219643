"""tools/first_hour.py: what it would do on a card, in which order; stopping costs nothing."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import first_hour
import pytest
import torch
from conftest import ROOT

from lib.settings import UserError, load


def test_it_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU.*--cpu") as error:
        first_hour.main([])
    assert "\n" not in str(error.value)


def test_the_order_is_that_of_worth_and_every_command_is_valid(tmp_path):
    steps = first_hour.steps_of(False, tmp_path)
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


def test_one_of_each_card_comes_first():
    steps = [SimpleNamespace(name=name) for name in ("a/x", "b/x", "a/y", "b/y", "c/y")]
    first, rest = first_hour.one_of_each_card(steps)
    assert [step.name for step in first] == ["a/x", "b/x", "c/y"]
    assert [step.name for step in rest] == ["a/y", "b/y"]


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    """A step that fails or runs out of time is tried again; figures of its log are kept."""
    asked = []

    def process(command, cwd, timeout):
        assert cwd == ROOT and timeout > 0
        script = Path(command[-1]).name
        asked.append(command[1])
        if command[1] == "rl.py":
            log = Path(command[2].replace(".yaml", "")) / "rl" / "metrics.jsonl"
            log.parent.mkdir(parents=True, exist_ok=True)
            record = dict.fromkeys(first_hour.AVERAGED, 1.0) | {"skipped": 1, "peak_memory_gib": 2}
            later = {**record, "seconds": 3.0, "ratio_noise": None}
            log.write_text(json.dumps(record) + "\n" + json.dumps(later) + "\n")
        if command[1].endswith("benchmark_card.py") and len(asked) < 4:
            raise subprocess.TimeoutExpired(script, timeout)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(first_hour.subprocess, "run", process)
    monkeypatch.setattr(first_hour, "machine", lambda device: {"device": device.type})
    arguments = ["--cpu", "--json", str(tmp_path / "first.json")]
    first_hour.main(arguments)
    steps = json.loads((tmp_path / "first.json").read_text())["steps"]
    assert [record["status"] for record in steps.values()] == [
        "done", "out of time", "done", "done"
    ]
    updates = steps["updates in bfloat16"]
    assert updates["updates"] == updates["skipped"] == 2 and updates["peak_memory_gib"] == 2
    assert updates["mean"]["seconds"] == 2 and updates["mean"]["ratio_noise"] == 1
    count = len(asked)
    first_hour.main(arguments)
    assert [Path(script).name for script in asked[count:]] == ["benchmark_card.py"]
    first_hour.main([*arguments, "--minutes", "0"])
    assert len(asked) == count + 1


@pytest.mark.slow
def test_its_plumbing_works_on_the_mini(tmp_path):
    first_hour.main(["--cpu", "--json", str(tmp_path / "first.json")])
    steps = json.loads((tmp_path / "first.json").read_text())["steps"]
    assert {record["status"] for record in steps.values()} == {"done"}
    assert steps["mini/gp_l on 4 GiB"]["figures"]["mini/gp_l"]["ppo"]["update_seconds"] > 0
    assert steps["updates in float16"]["updates"] == 2
