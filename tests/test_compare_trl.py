"""tools/compare_trl.py, as far as it goes without trl: one line where that is missing, both sides
get the same prompts, ratios and settings worked out by hand.
"""

import json
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIG

import compare_trl
from compare_trl import GROUP, Revised, grading, in_groups, prompts_of, ratios_of, thinned
from lib import errors
from rollout import make_env


def test_without_trl_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(compare_trl, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["compare_trl.py", str(CONFIG)])
    with pytest.raises(SystemExit) as stopped:
        errors.run_main(compare_trl.main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {compare_trl.MISSING}\n"


@pytest.mark.parametrize("failures", [0, 3])
def test_both_sides_get_the_same_prompts(cfg, failures):
    for seed, attempts, messages in prompts_of(cfg.env, failures, range(20)):
        env = Revised(cfg.env, failures)
        observation, _ = env.reset(seed)
        assert observation["messages"] == messages and len(attempts) == failures
        assert [m["role"] for m in messages] == ["user", "assistant"] * failures + ["user"]
        _, _, terminated, truncated, info = env.step("no formula")
        assert truncated and not terminated and info["attempt"] == failures + 1


def test_a_completion_is_graded_after_the_attempts_before_it(cfg):
    env = make_env(cfg.env, verify_iters=2)
    env.reset(7)
    right, wrong = env.expert(), env.mistake()
    reward = grading(cfg.env, verify_iters=2)
    completions = [[{"role": "assistant", "content": text}] for text in (right, right, wrong)]
    rewards = reward(completions=completions, seed=[7, 7, 7], attempts=[[], [wrong], [wrong]])
    assert rewards[:2] == [5.0, 5.0]
    assert rewards[2] <= -2.0  # wrong, and the last attempt


def test_prompts_come_in_groups():
    assert in_groups(count(5), 6, 2) == [5, 5, 6, 6, 7, 7]


def test_every_second_prompt_in_the_order_of_lengths():
    asked = [(seed, [], [{"content": "x" * length}]) for seed, length in enumerate([9, 1, 5, 3])]
    assert [seed for seed, *_ in thinned(asked, 2)] == [3, 0]  # of lengths 1 3 5 9


def test_a_ratio_is_taken_within_a_round():
    def record(sampling, both, wall):
        return compare_trl.seconds_of(sampling, both, wall)

    ours = [record(1.0, 3.0, 3.0), record(2.0, 4.0, 4.0), record(1.0, 2.0, 8.0)]
    trl = [record(2.0, 6.0, 6.0), record(2.0, 12.0, 12.0), record(4.0, 8.0, 8.0)]
    ratios = ratios_of({"ours": ours, "trl": trl})
    assert ratios["sampling"] == {"median": 2.0, "rounds": [2.0, 1.0, 4.0]}
    assert ratios["update"] == {"median": 4.0, "rounds": [2.0, 5.0, 4.0]}
    assert ratios["all"] == {"median": 3.0, "rounds": [2.0, 3.0, 4.0]}
    assert ratios["wall"] == {"median": 2.0, "rounds": [2.0, 3.0, 1.0]}


def test_trl_is_told_what_the_configuration_says(cfg):
    settings = compare_trl.grpo_settings(cfg, answers=256, rows=32, folder="out")
    assert settings["max_steps"] == 12  # 3 epochs of 256 answers in minibatches of 64
    assert settings["steps_per_generation"] == 8 and settings["gradient_accumulation_steps"] == 2
    assert settings["num_generations"] == GROUP and settings["num_iterations"] == 3
    assert (settings["temperature"], settings["beta"], settings["learning_rate"]) == (0.8, 0.01, 0)


def test_rounds_become_a_table_and_a_file(monkeypatch, tmp_path, capsys):
    """Both sides replaced: TRL takes 4 s in all, ours 2 s, and the round to warm up is left out."""
    asked = []

    def one_round(case, iteration, cfg, answers, rows, seed):
        asked.append((case, answers))
        sizes = {"answers": answers, "steps": 12, "prompt": 18.0, "answer": 21.0}
        ours = {**sizes, **compare_trl.seconds_of(0.5, 2.0, 3.0)}
        return ours, {**sizes, **compare_trl.seconds_of(1.5, 4.0, 6.0)}

    iteration = SimpleNamespace(policy=SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(compare_trl, "find_spec", lambda name: name)
    monkeypatch.setattr(compare_trl, "version", lambda name: "1")
    monkeypatch.setattr(compare_trl, "new_policy", lambda cfg: None)
    monkeypatch.setattr(compare_trl, "Iteration", lambda policy, cfg: iteration)
    monkeypatch.setattr(compare_trl, "one_round", one_round)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    path = tmp_path / "trl.json"
    arguments = [str(CONFIG), "--rounds", "2", "--cases", "first,revision", "--json", str(path)]
    compare_trl.main(arguments)
    warm_up = [("first", 64), ("revision", 64)]
    assert asked == warm_up + [("first", 256), ("revision", 256)] * 2
    found = json.loads(path.read_text())["cases"]["revision"]
    assert len(found["rounds"]["trl"]) == 2
    assert {phase: ratio["median"] for phase, ratio in found["ratios"].items()} == {
        "sampling": 3.0, "update": 2.5 / 1.5, "all": 2.0, "wall": 2.0}
    shown = capsys.readouterr().out
    assert "all: rounds 2.00 to 2.00, at least 1.5 wanted: ok" in shown
    assert "all: rounds 2.00 to 2.00, at least 3 wanted: MISSED" in shown
