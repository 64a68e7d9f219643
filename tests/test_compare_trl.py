"""tools/compare_trl.py, as far as it goes without trl: one line where that is missing, both sides
get the same prompts, ratios and settings worked out by hand.
"""

from itertools import count

import pytest
from conftest import CONFIG

import compare_trl
from compare_trl import GROUP, Revised, grading, in_groups, prompts_of, ratios_of, thinned
from lib import settings
from rollout import make_env


def test_without_trl_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(compare_trl, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["compare_trl.py", str(CONFIG)])
    with pytest.raises(SystemExit) as stopped:
        settings.run_main(compare_trl.main)
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
