"""Episodes of many positions, from SFT examples to evaluation.json, on a toy environment."""

import contextlib
import itertools
import json
import math
import random
import resource
import shutil
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import CONFIG, ROOT

import eval as evaluation
import environments
import rollout
import sft
import pack_runs
import report
from lib import bootstrap, cells, measures, training
from lib.arms import Comparison, Seed, seed_names, seen_notes
from lib.batching import Sequence
from lib.checks import choice, optional, text, whole
from lib.decoding import truncated
from lib.errors import UserError
from lib.results import Nucleus
from policy import Policy
from rollout import Play, counts, evaluate, grades, make_env, play_reference


class Corridor:
    """Forward or turn at each position, stop at the last; each begins a new conversation."""

    SETTINGS = {"longest": whole(1), "split": choice("all", "unseen"), "plan": optional(text)}
    answer_key, references = "", ("always forward", "expert")

    def __init__(self, longest=4, split="all", plan=None, verify_iters=2):
        self.longest, self.verify_iters = longest, verify_iters
        self.playing = plan and "the plan"
        self.reports = [
            (
                "per-step accuracy",
                "accuracy %, first attempts / all answers",
                ("first", "per_step"),
            ),
            (
                "turns",
                "first-attempt accuracy %, forward / stop / turn",
                ("first_forward", "first_stop", "first_turn"),
            ),
            ("success", f"success % within {verify_iters}", ("solved",)),
        ]

    def reset(self, seed, progress=0.0):
        rng = random.Random(f"corridor {seed}")
        self.rail = [
            rng.choice(("forward", "turn")) for _ in range(rng.randint(1, self.longest))
        ] + ["stop"]
        self.arrive(int(progress * len(self.rail)))
        return self.obs(), {"cluster": str(len(self.rail))}

    def arrive(self, at):
        self.at, self.attempt = at, 0
        self.messages = [
            {"role": "user", "content": f"{at} {self.rail[at] if at < len(self.rail) else 'end'}"}
        ]

    def obs(self):
        return {"messages": list(self.messages), "image": None}

    def step(self, answer):
        action, self.attempt = self.rail[self.at], self.attempt + 1
        correct = answer == action
        terminated = correct and action == "stop"
        truncated = not correct and self.attempt == self.verify_iters
        info = {
            "category": "correct" if correct else "wrong",
            "correct": correct,
            "recognized": True,
            "action": action,
            "attempt": self.attempt,
            "feedback": "" if correct else "No.",
            "cluster": str(len(self.rail)),
        }
        if correct:
            self.arrive(self.at + 1)
        else:
            self.messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "No."},
            ]
        return self.obs(), 1.0 if correct else -1.0, terminated, truncated, info

    def expert(self):
        return self.rail[self.at]

    def mistake(self):
        return "jump"

    def reference(self, name):
        return "forward" if name == "always forward" else self.expert()


class Walker:
    """A policy of known skill, told by its checkpoint.

    Init: always forward. sft: right, but never stops. rl: right, but turns at the second attempt.
    """

    device = "cpu"

    def __init__(self, model=None, lora=None, seed=0):
        self.model, self.skill = model, "rl"

    def save_merged(self, folder):
        (folder / "weights").write_text(
            f"{self.loaded} {self.model.quantization} {self.model.dtype} {self.model.device}"
        )

    def load(self, checkpoint, value_head):
        self.loaded = checkpoint
        kind = checkpoint.parent.name.split("-")[0]
        self.skill = "Init" if checkpoint.name == "step_1" else kind

    def inference(self):
        return contextlib.nullcontext()

    def encode(self, observations):
        return observations

    def sample(self, prompts, temperature, generator):
        return [
            SimpleNamespace(ids=self.say(p["messages"]), logprobs=None, value=0.0) for p in prompts
        ]

    def say(self, messages):
        action = messages[0]["content"].split()[1]
        slow = action == "turn" and len(messages) == 1
        return {
            "Init": "forward",
            "sft": action.replace("stop", "forward"),
            "rl": "forward" if slow else action,
        }[self.skill]

    def decode(self, ids):
        return ids


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(environments.ENVIRONMENTS, "toy", Corridor)
    return {"name": "toy"}


# ---------------------------------------------------------------- what an episode counts for
def answers(*given):
    return [
        {"attempt": attempt, "correct": correct, "recognized": recognized, "action": action}
        for action, attempt, correct, recognized in given
    ]


def test_counts_of_an_episode_of_several_positions():
    """Forward at once, turn on the second attempt, forward at once, then twice not to stop."""
    infos = answers(
        ("forward", 1, True, True),
        ("turn", 1, False, True),
        ("turn", 2, True, False),
        ("forward", 1, True, False),
        ("stop", 1, False, False),
        ("stop", 2, False, True),
    )
    assert counts(infos, False) == {
        "solved": (0, 1),
        "per_step": (3, 6),
        "first": (2, 4),
        "recognized": (2, 4),
        "first_forward": (2, 2),
        "first_turn": (0, 1),
        "first_stop": (0, 1),
    }


def test_what_is_reported_is_apart_from_what_is_right():
    """Three first attempts: right, wrong and none; the retry does not count."""
    infos = answers(*[("stop", 1, True, right) for right in (True, False, False)],
                    ("stop", 2, True, True))
    for info, reported in zip(infos, (True, True, False, True)):
        info["reported"] = reported
    found = counts(infos, False)
    assert (found["reported"], found["recognized_if_reported"]) == ((2, 3), (1, 2))
    assert found["recognized"] == (1, 3)


def test_positions_that_a_walk_never_reached_are_not_solved():
    """Of ten positions the first is solved, the second not; per step the denominators differ."""
    infos = answers(("forward", 1, True, True), ("turn", 1, False, True), ("turn", 2, False, True))
    for info in infos:
        info["positions"] = 10
    found = counts(infos, False)
    assert (found["positions"], found["per_step"], found["first"]) == ((1, 10), (1, 3), (1, 2))
    assert "positions" not in counts(answers((None, 1, True, True)), True)


def test_counts_of_a_hand():
    """One position, one type of action: right on the third attempt, read right from the second."""
    infos = answers((None, 1, False, False), (None, 2, False, True), (None, 3, True, True))
    assert counts(infos, True) == {
        "solved": (1, 1),
        "per_step": (1, 3),
        "first": (0, 1),
        "recognized": (0, 1),
    }
    assert counts(infos[2:], True)["per_step"] == (1, 1)


def test_grades_of_an_episode():
    """Wrong, the same again, then right; at the next position the first answer's words are new."""
    infos = [
        {"attempt": attempt, "category": category}
        for attempt, category in ((1, "wrong"), (2, "wrong"), (3, "correct"), (1, "illegal"))
    ]
    assert grades(infos, ["a", "a", "b", "a"]) == {
        "first": {"wrong": 1, "illegal": 1},
        "retries": {"wrong": 1, "correct": 1},
        "repeated": 1,
    }


# ---------------------------------------------------------------- SFT examples
def test_example_stands_anywhere_on_the_way(toy):
    """At every position, after every number of mistakes; the same seed, the same example."""
    env, met = make_env({**toy, "longest": 3}, 3), set()
    for seed in range(300):
        obs, answer = sft.example(env, seed, 2)
        at, action = obs["messages"][0]["content"].split()
        assert answer == action == env.rail[int(at)] and env.step(answer)[1] == 1
        assert [m["content"] for m in obs["messages"][1:]] == ["jump", "No."] * (
            len(obs["messages"]) // 2
        )
        assert sft.example(env, seed, 2) == (obs, answer)
        met.add((len(env.rail), int(at), len(obs["messages"]) // 2))
    assert met == {(n, at, mistakes) for n in (2, 3, 4) for at in range(n) for mistakes in range(3)}


@pytest.mark.parametrize("mistakes", [0, 1, 3])
def test_example_of_a_hand_is_the_deal_and_its_mistakes(mistakes):
    """GP has one position: nothing is drawn or played before the mistakes."""
    settings = {"name": "gp", "expert": "varied"}
    env, other = make_env(settings, mistakes + 1), make_env(settings, mistakes + 1)
    met = set()
    for seed in range(60):
        example, answer = sft.example(env, seed, mistakes)
        obs, _ = other.reset(seed)
        played = len(example["messages"]) // 2  # of a wrong answer and the verifier's text
        for _ in range(played):
            obs, *_ = other.step(other.mistake())
        assert (example, answer) == (obs, other.expert())
        met.add(played)
    assert met == set(range(mistakes + 1))


def test_the_hand_does_not_tell_how_many_mistakes():
    """Deal and mistakes are drawn apart: from one stream, half of all hands had one count only."""
    env = make_env({"name": "gp", "split": "unseen"}, 2)
    counts = {}  # hand -> how many mistakes came before its examples
    for seed in range(3000):
        messages = sft.example(env, seed, 1)[0]["messages"]
        counts.setdefault(str(env.values), []).append(len(messages) // 2)
    often = [met for met in counts.values() if len(met) >= 20]
    assert len(often) > 20 and all(0 < sum(met) < len(met) for met in often)


# ---------------------------------------------------------------- episodes
def expected(skill, rail):
    """Counts of one episode, from the description of the skill."""
    forward, turn, n = rail.count("forward"), rail.count("turn"), len(rail)
    if skill == "rl":
        found = {
            "solved": (1, 1),
            "per_step": (n, n + turn),
            "first": (n - turn, n),
            "first_forward": (forward, forward),
            "first_turn": (0, turn),
            "first_stop": (1, 1),
        }
    elif skill == "sft":
        found = {
            "solved": (0, 1),
            "per_step": (n - 1, n + 1),
            "first": (n - 1, n),
            "first_forward": (forward, forward),
            "first_turn": (turn, turn),
            "first_stop": (0, 1),
        }
    else:
        k = next(i for i, action in enumerate(rail) if action != "forward")
        found = {
            "solved": (0, 1),
            "per_step": (k, k + 2),
            "first": (k, k + 1),
            "first_forward": (k, k),
            f"first_{rail[k]}": (0, 1),
        }
    found["recognized"] = (found["first"][1],) * 2
    return {name: pair for name, pair in found.items() if pair[1]}


def rails(toy, n, seed, **changes):
    env = make_env(toy, 2, **changes)
    return [
        env.reset(s) and env.rail
        for s in range(rollout.EVAL_SEEDS + seed * 10**6, rollout.EVAL_SEEDS + seed * 10**6 + n)
    ]


def test_evaluation_counts_every_position(toy):
    policy, n = Walker(), 40
    for skill in ("Init", "sft", "rl"):
        policy.skill = skill
        records = evaluate(policy, toy, n, 7, 2, 0, 6)
        assert [r["counts"] for r in records] == [
            expected(skill, rail) for rail in rails(toy, n, 7)
        ]
        assert [r["cluster"] for r in records] == [str(len(rail)) for rail in rails(toy, n, 7)]
    assert all(turn.info["attempt"] <= 2 for r in records for turn in r["turns"])


def test_reference_policies_play_the_same_episodes(toy):
    policy = Walker()
    policy.skill = "Init"
    still, known = (
        play_reference(toy, name, 30, 7, 2, longest=6) for name in ("always forward", "expert")
    )
    keys = ("seed", "cluster", "counts", "grades")
    assert still == [
        {k: r[k] for k in keys} for r in evaluate(policy, toy, 30, 7, 2, 0, 8, longest=6)
    ]
    assert [r["seed"] for r in known] == [r["seed"] for r in still]
    assert all(r["counts"][m][0] == r["counts"][m][1] for r in known for m in r["counts"])


def test_tables_resume_between_positions(toy):
    policy = Walker()

    def turn(tables):
        return [
            (t.slot, t.seed, t.prompt, t.text, t.info) for t in tables.answer_all(policy, 0, None)
        ]

    one = Play([make_env({**toy, "longest": 8}, 2) for _ in range(5)], iter(range(1000)))
    for _ in range(4):
        turn(one)
    state = json.loads(json.dumps(one.state()))
    two = Play([make_env({**toy, "longest": 8}, 2) for _ in range(5)], iter(range(1000, 2000)))
    two.restore(state)
    assert any(len(given) > 2 for _, given in state["episodes"])
    for _ in range(30):
        assert turn(one) == turn(two)


def test_training_begins_spread_along_the_walks(toy):
    """Four walks begin at their start, a quarter, half and three quarters of the way, those after
    them at their start; a continued run begins them where it did.
    """

    def walks():
        return [make_env({**toy, "longest": 20}, 2) for _ in range(4)]

    policy, play = Walker(), Play(walks(), iter(range(100)), spread=True)
    assert [env.at for env in play.envs] == [int(i / 4 * len(play.envs[i].rail)) for i in range(4)]
    assert sum(env.at > 0 for env in play.envs) >= 2
    play.burn_in(policy, 1, 0, None)
    state = json.loads(json.dumps(play.state()))
    again = Play(walks(), iter(range(100)))
    again.restore(state)
    for _ in range(20):
        played = [play.answer_all(policy, 0, None), again.answer_all(policy, 0, None)]
        assert [t.text for t in played[0]] == [t.text for t in played[1]]
        assert [t.seed for t in played[0]] == [t.seed for t in played[1]]
    assert all(e.progress == 0 for e in play.episodes if e.seed > 3)


# ---------------------------------------------------------------- the table
def spent(checkpoint):
    """100 GFLOPs a step, which the official code counts as 300 of SFT, and as 400 of PPO."""
    step = int(checkpoint.name[-1])
    official = (400 if checkpoint.parent.name == "rl" else 300) * step
    return {"optimizer": {}, "gflops": 100 * step, "official_gflops": official}


@pytest.fixture
def main(tmp_path, monkeypatch):
    """eval.main over three arms of Walkers: a function of the overrides, and the run directory."""
    folder, settings = tmp_path / "run", yaml.safe_load(CONFIG.read_text())
    settings.update(env={"name": "toy"}, run={"dir": str(folder), "seed": 0})
    settings["ppo"]["init"] = "sft/step_1"
    settings["eval"].update(
        verify_iters=2,
        temperatures=[0.2, 0],
        splits={"all": 40},
        batch_size=16,
        curve_n=10,
        seed=7,
        variants={"ID": {}, "long": {"longest": 9}},
    )
    for name in ("sft/step_1", "sft/step_3", "rl/step_4"):
        (folder / name).mkdir(parents=True)
        (folder / name).with_name("config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(evaluation, "Policy", Walker)
    monkeypatch.setattr(evaluation, "load_state", spent)
    monkeypatch.setattr(yaml, "SafeLoader", yaml.CSafeLoader)  # else a third of the time
    return lambda *overrides: evaluation.main([str(tmp_path / "toy.yaml"), *overrides]), folder


def ratio(found, name):
    right, of = (sum(c.get(name, (0, 0))[i] for c in found) for i in (0, 1))
    return 100 * Fraction(right, of)


def own_metrics(row):
    """Of a row those that `counts` counts, not the shares of categories."""
    return [(m, found) for m, found in row["metrics"].items() if not m.startswith("first ")]


def saved(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_table_of_an_environment_with_many_positions(main, toy):
    run, folder = main
    run()
    report = saved(folder)
    played = {
        (v, s): [expected(s, rail) for rail in rails(toy, 40, 7, **changes)]
        for v, changes in (("ID", {}), ("long", {"longest": 9}))
        for s in ("Init", "sft", "rl")
    }
    for row in report["table"]:
        assert row["n"] == 40 and (row["temperature"] is None) == (
            row["arm"] in Corridor.references
        )
        for m, (value, low, high) in own_metrics(row):
            found = (
                100
                if row["arm"] == "expert"
                else ratio(played[row["variant"], row["arm"].replace("always forward", "Init")], m)
            )
            assert value == pytest.approx(float(found), abs=1e-4)
            assert low <= value + 1e-4 and value - 1e-4 <= high, (row["arm"], m)
    shares = {row["arm"]: row["grades"] for row in report["table"] if row["variant"] == "ID"}
    assert shares["rl"]["retries"] == {"correct": 100} and shares["rl"]["repeated"] == 0
    first = float(ratio(played["ID", "rl"], "first"))
    assert shares["rl"]["first"] == pytest.approx({"correct": first, "wrong": 100 - first})
    rl, *_ = [row for row in report["differences"]
             if [row["variant"], row["arm"], row["base"]] == ["ID", "rl", "Init"]]
    gained, low, high = rl["metrics"]["first"]
    assert rl["metrics"]["first wrong"] == pytest.approx([-gained, -high, -low])
    assert shares["sft"]["retries"] == {"wrong": 100} and shares["sft"]["repeated"] == 100
    assert shares["expert"] == {"first": {"correct": 100}, "retries": {}, "repeated": 0}
    for row in report["differences"]:
        for m, (value, low, high) in own_metrics(row):
            assert value == pytest.approx(
                float(
                    ratio(played[row["variant"], row["arm"]], m)
                    - ratio(played[row["variant"], row["base"]], m)
                ),
                abs=1e-4,
            )
            assert low - 1e-4 <= value <= high + 1e-4
    assert report["gflops"] == {"Init": 100, "sft": 300, "rl": 400}
    assert report["official_gflops"] == {"Init": 300, "sft": 900, "rl": 1600}
    assert "sft has spent 900 GFLOPs and rl 1,600: 44 % less, so not equal" in report["notes"][1]
    assert [r["name"] for r in report["reports"]] == ["per-step accuracy", "turns", "success"]
    assert all(report["reports"][i]["metrics"] == list(Corridor().reports[i][2]) for i in range(3))


def test_curves_start_at_init_and_follow_every_checkpoint(main, toy):
    run, folder = main
    run()
    found = [expected("Init", rail) for rail in rails(toy, 10, 7)]
    for arms in saved(folder)["curves"].values():
        assert {arm: [point[0] for point in points] for arm, points in arms.items()} == {
            "Init": [100],
            "sft": [100, 300],
            "rl": [100, 400],
        }
        assert arms["rl"][0][:6] == arms["Init"][0][:6]
        assert arms["sft"][0] == arms["Init"][0]
        steps = {arm: [point[6] for point in points] for arm, points in arms.items()}
        assert steps == {"Init": [1], "sft": [1, 3], "rl": [0, 4]}
        for _, value, low, high, recognition, seeds, *_ in itertools.chain(*arms.values()):
            assert low <= value + 1e-4 and value - 1e-4 <= high and recognition == 100
            assert seeds == [[pytest.approx(value), 100]]
    assert saved(folder)["curves"]["ID"]["Init"][0][1] == pytest.approx(
        float(ratio(found, "per_step")), abs=1e-4
    )
    (row,) = saved(folder)["frontier"]
    assert (row["variant"], row["arm"], row["base"]) == ("long", "rl", "sft")
    assert not row["metrics"]  # PPO spent 400, SFT 300, and SFT's curve never comes to PPO's ID


def test_curve_of_sft_that_began_elsewhere_has_its_init(main):
    run, folder = main
    (folder / "sft-sft.lr=1/step_3").mkdir(parents=True)
    settings = yaml.safe_load((folder / "sft/config.yaml").read_text())
    settings["sft"]["init"] = "sft/step_1"
    (folder / "sft-sft.lr=1/config.yaml").write_text(yaml.safe_dump(settings))
    run("eval.temperatures=[0]", "eval.splits={all: 2}", "eval.curve_n=2")
    found = saved(folder)["curves"]["ID"]
    assert [point[0] for point in found["sft-sft.lr=1"]] == [100, 300]
    assert [point[0] for point in found["sft"]] == [100, 300]
    assert {row["base"] for row in saved(folder)["frontier"]} == {"sft", "sft-sft.lr=1"}


def test_curve_has_as_many_points_as_asked_for(main):
    run, folder = main
    for step in (2, 3, 5, 7, 9):
        (folder / f"sft/step_{step}").mkdir(exist_ok=True)
    everywhere = [1, 2, 3, 5, 7, 9]
    for points, steps in ((0, everywhere), (1, [1, 9]), (3, [1, 3, 9]), (8, everywhere)):
        run("eval.temperatures=[0]", "eval.splits={all: 2}", "eval.curve_n=2",
            f"eval.curve_points={points}")
        found = saved(folder)["curves"]["ID"]["sft"]
        assert [point[0] for point in found] == [100 * step for step in steps]
    assert set(saved(folder)["frontier"][0]["metrics"]) >= {"equal FLOPs"}


def test_kl_is_measured_from_init_once(main, monkeypatch):
    """In the trained variant, of every point, from where its training began; kept as cells are."""
    run, folder = main
    asked = []

    def known(records, policy_at, init, checkpoint, micro_tokens):
        asked.append((init.parent.name, init.name, checkpoint.parent.name, checkpoint.name))
        assert len(records) == 10 and policy_at(init).loaded == init
        nats = {"step_1": 0.0, "step_3": 2.0, "step_4": 0.5}[checkpoint.name]
        return [(nats * len(record["turns"]), len(record["turns"])) for record in records]

    monkeypatch.setattr(evaluation, "log_ratios", known)
    run("eval.kl=true")
    from_init = [("sft", "step_1", *point) for point in
                 [("sft", "step_1"), ("sft", "step_3"), ("rl", "step_4")]]
    assert set(asked) == set(from_init) and len(asked) == 3  # sft/step_1 is both Init and its own
    found = saved(folder)["curves"]
    kl = {arm: [point[7][0][0] for point in points] for arm, points in found["ID"].items()}
    assert kl == {"Init": [0], "sft": [0, 2], "rl": [0, 0.5]}
    assert all(point[7] is None for points in found["long"].values() for point in points)
    (row,) = saved(folder)["frontier"]
    assert {"equal KL", "equal KL, first attempt"} <= set(row["metrics"])
    run("eval.kl=true")
    assert len(asked) == 3


def test_kl_from_two_inits_is_not_compared(main, monkeypatch):
    run, folder = main
    shutil.copytree(folder / "rl", folder / "rl-ppo.init=sft_step_3")
    settings = yaml.safe_load((folder / "rl/config.yaml").read_text())
    settings["ppo"]["init"] = "sft/step_3"
    (folder / "rl-ppo.init=sft_step_3/config.yaml").write_text(yaml.safe_dump(settings))
    settings["sft"]["init_step"] = 1
    (folder / "sft/config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(evaluation, "log_ratios",
                        lambda records, *_: [(0.0, len(r["turns"])) for r in records])
    run("eval.kl=true")
    compared = {row["arm"]: "equal KL" in row["metrics"] for row in saved(folder)["frontier"]}
    assert compared == {"rl": True, "rl-ppo.init=sft_step_3": False}


def test_ppo_that_is_unfinished_in_one_run_is_not_pooled(main, tmp_path):
    """Its row would mix updates; finished, or left out, the rest is played."""
    run, folder = main
    shutil.copytree(folder, tmp_path / "other")
    (folder / "rl/step_5").mkdir()
    runs = f"eval.runs=[{folder}, {tmp_path / 'other'}]"
    with pytest.raises(UserError, match="rl has come to rl/step_5, rl/step_4: let rl.py finish it"):
        run(runs)
    run(runs, "eval.arms=[sft]", "eval.temperatures=[0]")


def test_curve_has_the_steps_that_all_runs_have(main, tmp_path):
    run, folder = main
    shutil.copytree(folder, tmp_path / "other")
    for path in (tmp_path / "other").glob("*/config.yaml"):
        path.write_text(path.read_text().replace("seed: 0", "seed: 5"))
    for step in (5, 7):
        (folder / f"rl/step_{step}").mkdir()
    (tmp_path / "other/rl/step_7").mkdir()
    run(f"eval.runs=[{folder}, {tmp_path / 'other'}]", "eval.temperatures=[0]")
    assert [point[6] for point in saved(folder)["curves"]["ID"]["rl"]] == [0, 4, 7]


def test_evaluation_says_what_was_played_and_where(main, tmp_path, capsys):
    run, folder = main
    shutil.copytree(folder, tmp_path / "other")
    for path in (tmp_path / "other").glob("*/config.yaml"):
        path.write_text(path.read_text().replace("seed: 0", "seed: 5"))
    (folder / "rl" / "metrics.jsonl").write_text('{"seconds": 60}\n{"seconds": 30}\n{"secon')
    trained = folder / "rl" / "config.yaml"
    trained.write_text("# trained at abc1234\n" + trained.read_text())
    run()
    one = saved(folder)
    assert (one["splits"], one["temperatures"], one["curve_n"]) == ({"all": 40}, [0.2, 0], 10)
    assert (
        one["variants"] == {"ID": {}, "long": {"longest": 9}}
        and one["seeds"] == [0]
        and "one training seed" in one["notes"][-1]
    )
    assert one["minutes"]["rl"] == 1.5 and set(one["minutes"]) == {"rl", "eval"}
    assert one["trained_at"] == {"rl": ["abc1234"]}
    assert (
        "torch" in one["versions"] and one["machine"] and one["commit"] and "transcripts" not in one
    )
    captured = capsys.readouterr()
    assert f"python report.py {folder}" in captured.err and captured.out == ""
    run(f"eval.runs=[{folder}, {tmp_path / 'other'}]")
    two = saved(folder)
    assert two["seeds"] == [0, 5] and not any("one training seed" in note for note in two["notes"])
    for kind in ("table", "differences"):
        for row, single in zip(two[kind], one[kind]):
            for metric, values in row["per_seed"].items():
                assert values == pytest.approx(2 * [single["metrics"][metric][0]], abs=1e-4)


def test_one_seed_on_several_models_is_told_apart_by_model():
    seeds = [Seed(1, "mini/gp"), Seed(2, "mini/gp")]
    assert seed_names(seeds) == [1, 2]
    assert seed_names([*seeds, Seed(1, "runs/gp1")]) == ["1 of gp", "2 of gp", "1 of gp1"]


def test_transcripts_hold_whole_episodes(main, toy):
    run, folder = main
    run("eval.transcripts=2", "eval.curve_n=0")
    found = {(t["arm"], t["variant"]): t["episodes"] for t in saved(folder)["transcripts"]}
    assert set(found) == {
        (arm, variant) for arm in ("Init", "sft", "rl") for variant in ("ID", "long")
    }
    for rail, episode in zip(rails(toy, 2, 7), found["rl", "ID"]):
        right = [turn["answer"] for turn in episode if turn["reward"] == 1]
        assert right == rail and all(
            turn["verifier"] == "No." for turn in episode if turn["reward"] == -1
        )


def conversations(folder):
    """{(arm, variant): turns of episodes} of conversations.jsonl."""
    text = (folder / "conversations.jsonl").read_text()
    found = {}
    for line in map(json.loads, text.splitlines()):
        found[line["arm"], line["variant"]] = line["episodes"]
    return found


def test_conversations_are_the_episodes_of_the_table(main, toy, monkeypatch):
    """The first of each leading cell, kept as it is played; as many played anew for more."""
    run, folder = main
    few = ("eval.curve_n=0", "eval.splits={all: 5}")
    run("eval.conversations=3", *few)
    kept = conversations(folder)
    assert len(kept) == 6 and all(len(episodes) == 3 for episodes in kept.values())
    for rail, episode in zip(rails(toy, 3, 7), kept["rl", "ID"]):
        assert [turn["answer"] for turn in episode if turn["correct"]] == rail
    first = kept["Init", "ID"][0][0]
    assert set(first) == {"seed", "attempt", "answer", "reward", "verifier", "category", "correct",
                          "recognized"}
    found = played(monkeypatch)
    run("eval.conversations=2", *few)
    assert not found  # fewer are a part of what is known
    run("eval.conversations=9", *few)
    assert len(found) == 6
    more = conversations(folder)
    assert all(len(episodes) == 5 for episodes in more.values())  # no more than the table has
    assert more["rl", "ID"][:3] == kept["rl", "ID"]
    run("eval.conversations=0", *few)
    assert all(not episodes for episodes in conversations(folder).values())
    settings = yaml.safe_load((folder / "evaluation.yaml").read_text())
    assert settings["eval"]["conversations"] == 0


def played(monkeypatch):
    """A list of the checkpoints and references that are played from now on."""
    found, evaluate, reference = [], evaluation.evaluate, evaluation.play_reference
    monkeypatch.setattr(
        evaluation, "evaluate", lambda p, *a: found.append(p.loaded.name) or evaluate(p, *a)
    )
    monkeypatch.setattr(
        evaluation, "play_reference", lambda env, *a: found.append(a[0]) or reference(env, *a)
    )
    return found


@pytest.mark.parametrize("what", ["code_digest", "model_digest", "versions", "data_digest"])
def test_what_other_means_made_is_played_again_and_that_is_said_once(
    main, monkeypatch, capsys, what
):
    run, folder = main
    few = ("eval.temperatures=[0]", "eval.curve_n=0", "eval.splits={all: 3}")
    run(*few)
    first = saved(folder)["table"]
    capsys.readouterr()
    usual = getattr(cells, what)
    monkeypatch.setattr(cells, what, lambda *_: "other")
    found = played(monkeypatch)
    run(*few)
    part = {"versions": "libraries"}.get(what, what.split("_")[0])
    said = f"{folder}/evaluations.jsonl: what other {part} made is played again\n"
    assert capsys.readouterr().err.count(said) == 1
    references = [] if part == "model" else 2 * list(Corridor.references)  # in both variants
    assert sorted(found) == sorted(2 * ["step_1", "step_3", "step_4"] + references)
    assert saved(folder)["table"] == first
    found.clear()
    run(*few)
    monkeypatch.setattr(cells, what, usual)
    run(*few)
    assert not found and "played again" not in capsys.readouterr().err  # both are kept


def test_cells_that_do_not_say_what_made_them_are_played_again(main, monkeypatch, capsys):
    run, folder = main
    few = ("eval.temperatures=[0]", "eval.curve_n=0", "eval.splits={all: 3}")
    run(*few)
    path, found = folder / "evaluations.jsonl", played(monkeypatch)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["made_by"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(*few)
    assert len(found) == len(lines)
    assert "what an older version made is played again" in capsys.readouterr().err


def test_model_that_is_not_here_may_be_the_one_that_played(main, monkeypatch):
    """A table can be made again on a machine without the weights."""
    run, _ = main
    run("eval.curve_n=0")
    found = played(monkeypatch)
    monkeypatch.setattr(cells, "model_folder", lambda name: None)
    run("eval.curve_n=0")
    assert not found


def test_code_is_what_the_players_import(tmp_path):
    """Not what they do not import, nor comments."""

    def digest(**files):
        for name, source in files.items():
            (tmp_path / f"{name}.py").write_text(source)
        cells.code_digest.cache_clear()
        return cells.code_digest(tmp_path)

    first = digest(
        rollout="import game\n", policy="import torch\n", game="def f():\n  import deck\n",
        deck="x = 1\n", report="y = 1\n",
    )
    assert digest(report="y = 2\n", deck="x = 1  # one\n\n") == first
    assert digest(deck="x = 2\n") != first
    assert digest(deck="x = 1\n") == first
    cells.code_digest.cache_clear()


def test_files_are_known_by_what_they_hold(tmp_path):
    def digest(**env):
        cells.files_digest.cache_clear()
        return cells.data_digest({"name": str(tmp_path), "longest": 3, **env})

    routes = tmp_path / "routes.json"
    routes.write_text("[1]")
    assert digest() == digest(plan="no such file") == ""
    first = digest(plan=str(routes))
    routes.write_text("[2]")
    assert digest(plan=str(routes)) != first
    routes.write_text("[1]")
    assert digest(plan=str(routes)) == first


def test_what_is_played_in_place_of_the_splits_is_named_and_shown_once(main):
    run, folder = main
    run(
        "eval.variants={ID: {}, given: {plan: x}}",
        "eval.splits={all: 5, unseen: 4}",
        "eval.temperatures=[0]",
    )
    found = saved(folder)
    assert found["splits"] == {"all": 5, "the plan": 5, "unseen": 4}
    for rows in (found["table"], found["differences"]):
        shown = {(row["split"], row["variant"]) for row in rows}
        assert shown == {("all", "ID"), ("the plan", "given"), ("unseen", "ID")}
    assert set(found["curves"]) == {"ID", "given"}
    report.main([str(folder)])  # draws each variant at its own split
    assert (folder / "growth.png").exists()
    assert found["notes"][:-2] == [
        "not at equal compute: sft/step_3 has 300 model GFLOPs, 25.0 % less than rl/step_4 (400)"
    ]


@pytest.mark.parametrize(
    "name", ["evaluations.jsonl", "evaluation.yaml", "evaluation.json", "rl/merged"]
)
def test_full_disk_is_one_line_and_loses_nothing(main, monkeypatch, capsys, name):
    run, folder = main
    few = ("eval.temperatures=[0]", "eval.curve_n=0", "eval.splits={all: 3}")
    few = (*few, "eval.conversations=0")
    run(*few, "eval.save_merged=[rl]")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if name == "evaluations.jsonl":
        few = (*few, "eval.seed=8")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = {"evaluation.json": 4000, "rl/merged": 10**5}.get(name, 100)
    large = bytes(10**6)
    monkeypatch.setattr(Walker, "save_merged", lambda self, out: (out / "w").write_bytes(large))
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=f"cannot write {folder / name}: File too large"):
            run(*few, "eval.save_merged=[rl]")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    for path, held in before.items():
        if name != "rl/merged" or path.name != "evaluation.json":  # made anew before the weights
            assert path.read_bytes().startswith(held)


def test_second_evaluation_plays_neither_arms_nor_references_again(main, monkeypatch):
    run, folder = main
    run()
    first = saved(folder)
    for name in ("evaluate", "play_reference"):
        monkeypatch.setattr(evaluation, name, None)
    run()
    assert {**saved(folder), "minutes": None} == {**first, "minutes": None}


def test_packed_run_gives_the_same_tables_without_weights(main, monkeypatch, tmp_path, capsys):
    """Also when the code that played has changed since: nothing can be played again."""
    run, folder = main
    for checkpoint in folder.glob("*/step_*"):
        (checkpoint / "trainer.pt").touch()
    run()
    first = saved(folder)
    states = {"tokens": {}, "official_extra": 0.0}
    monkeypatch.setattr(pack_runs, "load_state", lambda path: {**spent(path), **states})
    for config in folder.glob("*/config.yaml"):
        log = {"step": 1, "seconds": 1.23456789, "gflops": 123456789}
        config.with_name("metrics.jsonl").write_text(json.dumps(log) + "\n")
    pack_runs.main([str(tmp_path / "packed"), str(folder)])
    shutil.rmtree(folder)
    shutil.unpack_archive(tmp_path / "packed/run.tar.xz", tmp_path)
    kept = json.loads((folder / "rl/metrics.jsonl").read_text())
    assert kept == {"step": 1, "seconds": 1.235, "gflops": 123456789}
    monkeypatch.setattr(evaluation, "load_state", training.load_state)
    monkeypatch.setattr(cells, "code_digest", lambda *_: "changed since")
    monkeypatch.setattr(evaluation, "Policy", None)
    run()
    for part in ("table", "differences", "curves", "frontier", "gflops"):
        assert saved(folder)[part] == first[part]
    lacking = "packed without its weights, and has not kept Init, ID, all, T = 0.2, 41 episodes"
    with pytest.raises(UserError, match=lacking):
        run("eval.splits={all: 41}")


def test_pooled_runs_fill_what_one_of_them_never_met(main, tmp_path, capsys):
    """One seed's Init never comes to a turn, the other's does: 0 of 0 there adds nothing."""
    run, folder = main
    run("eval.temperatures=[0]", "eval.curve_n=0")
    single = json.loads((folder / "evaluation.json").read_text())["table"]
    cells = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    other = tmp_path / "other"
    (folder / "evaluation.json").unlink()
    folder.rename(other)
    for name in ("sft/step_1", "sft/step_3", "rl/step_4"):
        (folder / name).mkdir(parents=True)
        shutil.copy(other / name / "../config.yaml", folder / name / "..")
    for cell in cells:
        if cell["key"][1] is not None:  # keys hold the time of the checkpoint
            cell["key"][1] = int((folder / cell["key"][0]).stat().st_mtime)
        for episode in cell["episodes"]:
            episode["counts"].pop("first_turn", None)
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    run("eval.temperatures=[0]", "eval.curve_n=0", f"eval.runs=[{folder}, {other}]")
    for a, b in zip(single, json.loads((folder / "evaluation.json").read_text())["table"]):
        assert b["n"] == 2 * a["n"]
        for name, values in a["metrics"].items():
            assert b["metrics"][name][0] == pytest.approx(values[0], abs=1e-3)


def test_pooled_runs_share_one_model(main, tmp_path, monkeypatch):
    """Of other seeds, whose adapters alone differ."""
    run, folder = main
    shutil.copytree(folder, tmp_path / "other")
    for path in (tmp_path / "other").glob("*/config.yaml"):
        path.write_text(path.read_text().replace("seed: 0", "seed: 5"))
    made = []
    monkeypatch.setattr(
        evaluation, "Policy", lambda **settings: made.append(settings) or Walker(**settings)
    )
    run("eval.temperatures=[0]", "eval.curve_n=0", f"eval.runs=[{folder}, {tmp_path / 'other'}]")
    assert len(made) == 1


def test_merged_arms_are_those_of_the_table(main, tmp_path, capsys):
    """In 16 bits on the CPU; of pooled runs, the first's; in place of what was merged before."""
    run, folder = main
    shutil.copytree(folder, tmp_path / "other")
    for old in ("weights", "shard"):
        (tmp_path / "pool/rl/merged").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pool/rl/merged" / old).write_text("old")
    run(
        "eval.save_merged=[rl, Init]",
        f"eval.runs=[{tmp_path / 'other'}, {folder}]",
        f"run.dir={tmp_path / 'pool'}",
    )
    printed = capsys.readouterr().err
    for arm, checkpoint in (("rl", "rl/step_4"), ("Init", "sft/step_1")):
        (written,) = (tmp_path / "pool" / arm / "merged").iterdir()
        assert written.read_text() == f"{tmp_path / 'other' / checkpoint} none bfloat16 cpu"
        assert f"written: {written.parent}\n" in printed
    assert [p.name for p in (tmp_path / "pool" / "rl").iterdir()] == ["merged"]


def test_unknown_arm_to_merge_is_named_before_anything_is_played(main):
    run, folder = main
    with pytest.raises(UserError, match="eval.save_merged: 'dpo' is none of Init, sft, rl"):
        run("eval.save_merged=[rl, dpo]")
    assert not (folder / "evaluations.jsonl").exists()


def test_arm_keeps_its_own_model_but_for_what_follows_the_machine(cfg, tmp_path):
    """Also one that was trained before some keys existed."""
    own = {
        **vars(cfg.model),
        "max_new_tokens": 5,
        "path": "its/own",
        "sample_tokens": 7,
        "device": "cuda",
        "image_cache": 99.0,
    }
    for key in ("random_init", "gradient_checkpointing", "memory"):
        del own[key]
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"model": own, "lora": {"r": 9}, "run": {"seed": 3}})
    )
    found = evaluation.arm_settings(tmp_path / "step_1", cfg)
    assert vars(found["model"]) == {**vars(cfg.model), "max_new_tokens": 5}
    assert vars(found["lora"]) == {"r": 9} and found["seed"] == 0
    cfg.model.random_init = True  # then the seed makes the base
    assert evaluation.arm_settings(tmp_path / "step_1", cfg)["seed"] == 3


def test_what_never_occurs_is_left_out(main, toy):
    """On a rail without a turn nobody turns: no value, no interval, no difference."""
    run, folder = main
    assert rails(toy, 1, 7, longest=1) == [["forward", "stop"]]
    run(
        "eval.variants={ID: {longest: 1}}",
        "eval.splits={all: 1}",
        "eval.temperatures=[0]",
        "eval.curve_n=0",
    )
    assert all(
        {"first_forward", "first_stop"} <= set(row["metrics"]) for row in saved(folder)["table"]
    )
    for row in saved(folder)["table"] + saved(folder)["differences"]:
        assert "first_turn" not in {**row["metrics"], **row["per_seed"]}
    assert "NaN" not in (folder / "evaluation.json").read_text()


# ---------------------------------------------------------------- compute, counted officially
@pytest.mark.parametrize(
    "ids, spans, patches, extra",
    [
        ([0] * 4, [], None, 0),  # a prompt
        ([0] * 10, [(3, 10)], None, 0),  # one answer
        ([0] * 10, [(3, 5), (8, 10)], None, 5),  # its first 5 tokens are read twice
        ([9] + [0] * 3, [], 1601, 1600),  # 6 (len + 1600) for an image of one tile
        ([9] + [0] * 9, [(3, 5), (8, 10)], 1601, 5 + 2 * 1600),
        ([9] * 4, [], 16, 0),  # Qwen's image tokens are in the prompt already
    ],
)
def test_what_the_official_code_counts_beside_ours(ids, spans, patches, extra):
    family = SimpleNamespace(image_token=9, count_patches=lambda features: features)
    policy = SimpleNamespace(family=family, official_extra={"train": 0, "inference": 0})
    Policy._count_official_extra(policy, "train", 2 * [Sequence(ids, spans)], 2 * [patches])
    assert policy.official_extra == {"train": 2 * extra, "inference": 0}


def test_official_compute_of_an_older_run_is_not_known(main, monkeypatch):
    run, folder = main
    older = {"official_gflops": math.nan}
    monkeypatch.setattr(evaluation, "load_state", lambda path: {**spent(path), **older})
    run("eval.temperatures=[0]", "eval.splits={all: 2}", "eval.curve_n=0")
    assert set(saved(folder)["official_gflops"].values()) == {None}
    assert not any("official" in note for note in saved(folder)["notes"])


# ---------------------------------------------------------------- truncation
PROBABILITIES = torch.tensor([[0.3, 0.05, 0.5, 0.15]])


@pytest.mark.parametrize(
    "top_p, kept", [(0.45, [2]), (0.79, [0, 2]), (0.81, [0, 2, 3]), (0.96, [0, 1, 2, 3])]
)
def test_nucleus_is_the_fewest_likeliest_that_reach_top_p(top_p, kept):
    left = truncated(PROBABILITIES.log(), top_p)
    assert left.isfinite().nonzero()[:, 1].tolist() == kept
    assert left[0, kept].tolist() == PROBABILITIES.log()[0, kept].tolist()


def test_truncated_answers_are_sampled_from_the_nucleus_at_its_temperature():
    """At T = 0.5 logits are halved log-probs; of 0.3, 0.05, 0.5 and 0.15 all but 0.05 stay."""
    logits = (0.5 * PROBABILITIES.log()).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    tokens, logprobs = Policy._choose(None, logits, Nucleus(0.5, 0.9), generator)
    share = tokens.bincount(minlength=4) / 4000
    wanted = torch.tensor([0.3, 0, 0.5, 0.15]) / 0.95
    assert share[1] == 0 and share.tolist() == pytest.approx(wanted.tolist(), abs=0.03)
    assert logprobs.tolist() == pytest.approx(wanted[tokens].log().tolist(), abs=1e-5)


def test_temperatures_with_truncation_are_played_kept_and_shown(main, monkeypatch, capsys):
    run, folder = main
    sampled = []
    sample = Walker.sample
    monkeypatch.setattr(
        Walker, "sample", lambda self, p, t, g: sampled.append(t) or sample(self, p, t, g)
    )
    asked = ("eval.temperatures=[0.2, {T: 0.6, top_p: 0.9}]", "eval.splits={all: 2}",
             "eval.curve_n=0")
    run(*asked)
    assert set(sampled) == {0.2, Nucleus(0.6, 0.9)}
    sampled.clear()
    run(*asked)
    assert not sampled
    capsys.readouterr()
    report.main([str(folder)])
    assert capsys.readouterr().out.count("T = 0.6, top-p 0.9") == 6  # tables and differences


# ---------------------------------------------------------------- intervals
def interval(pairs, clusters, base=None, seeds=None):
    """Of the ratio of sums of pairs, or of its difference to the base's."""
    cells = [pairs] if base is None else [pairs, base]
    counts = torch.tensor(cells).float().transpose(0, 1)
    statistic = bootstrap.value if base is None else bootstrap.difference
    return bootstrap.measure(counts, clusters, seeds or len(clusters) * [0], statistic).estimate


def test_whole_groups_are_drawn_as_many_as_there_are():
    weights = bootstrap.draws(3)
    assert set(weights.sum(1).tolist()) == {3} and weights.std(0).min() > 0.7
    counts = torch.tensor([[[1.0, 2]], [[3, 4]], [[0, 1]]])
    assert bootstrap.sums_by(["a", "b", "a"], counts).tolist() == [[[1, 3]], [[3, 4]]]


def test_whole_clusters_are_drawn():
    """Clusters a = {0} and b = {1, 1, 1}: the resamples aa, ab (or ba) and bb have the means 0,
    3/4 and 1.
    """
    pairs, clusters = [(1, 1), (0, 1), (1, 1), (1, 1)], ["b", "a", "b", "b"]
    sums = bootstrap.sums_by(clusters, torch.tensor(pairs).float()[:, None])
    assert set(bootstrap.ratios(sums, bootstrap.draws(2))[:, 0].tolist()) == {0, 0.75, 1}
    assert interval(pairs, clusters) == (0.75, 0, 1)


def test_interval_of_a_ratio_of_sums():
    """Clusters a = {1 of 2, 0 of 1} and b = {3 of 4}: aa 2/6, ab 4/7, bb 6/8."""
    found = interval([(1, 2), (3, 4), (0, 1)], ["a", "b", "a"])
    assert found == pytest.approx((4 / 7, 1 / 3, 3 / 4))  # the mean of shares would be 5/12


def test_difference_of_ratios_by_hand():
    """Arm a 1/2, b 3/4, base a 1/1, b 1/5: aa 1/2 - 1, ab 4/6 - 2/6, bb 3/4 - 1/5, not the
    ratio of any differences.
    """
    arm, base = [(1, 2), (3, 4)], [(1, 1), (1, 5)]
    assert interval(arm, "ab", base) == pytest.approx((1 / 3, -1 / 2, 0.55))
    assert interval(base, "ab", arm) == pytest.approx((-1 / 3, -0.55, 1 / 2))
    assert interval(arm, "ab", arm) == (0, 0, 0)


def test_resamples_in_which_nothing_was_asked_do_not_count():
    """Nothing is asked in cluster b: bb says nothing, aa and ab say 1/3."""
    assert interval([(1, 3), (0, 0)], "ab") == pytest.approx((1 / 3,) * 3)
    assert interval([(1, 3), (0, 0)], "ab", [(3, 3), (4, 4)]) == pytest.approx((-2 / 3,) * 3)


def test_several_seeds_that_tell_nothing_alone_have_no_interval():
    """Seed 1 was asked of the arm alone, seed 2 of the base: together they differ by 1."""
    assert interval([(1, 1), (0, 0)], "ab", [(0, 0), (0, 1)], seeds=[1, 2]) is None
    assert interval([(1, 1), (0, 0)], "ab", [(0, 0), (0, 1)], seeds=[1, 1]).value == 1


def test_what_one_of_several_seeds_alone_was_asked_is_left_out():
    def episode(seed, counts):
        return {"cluster": "c", "training": seed, "counts": counts, "grades": {"first": {}}}

    both, alone = {"solved": (1, 1)}, {"solved": (0, 1), "first_stop": (1, 1)}
    row = measures.measured([episode(1, both), episode(2, alone)])
    assert set(row["metrics"]) == set(row["per_seed"]) == {"solved"}
    assert "first_stop" in measures.measured([episode(2, alone)])["metrics"]


def test_one_cluster_has_no_width():
    found = interval([(0, 1), (1, 1), (1, 1), (0, 1), (1, 1)], ["same"] * 5)
    assert found == pytest.approx((0.6,) * 3)


@pytest.mark.parametrize("copies", [1, 4])
def test_interval_is_that_of_as_many_independent_values_as_clusters(copies):
    """Mean of 400 coins: the normal interval is +- 1.96 sqrt(0.3 * 0.7 / 400); copying every
    coin narrows nothing, whether its copies are of one seed or of several.
    """
    values = [(int(i % 10 < 3), 1) for i in range(400) for _ in range(copies)]
    clusters = [i for i in range(400) for _ in range(copies)]
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    for seeds in (None, [i % copies for i in range(400 * copies)]):
        mean, low, high = interval(values, clusters, seeds=seeds)
        assert mean == pytest.approx(0.3, abs=1e-5)
        assert mean - low == pytest.approx(half, rel=0.1)
        assert high - mean == pytest.approx(half, rel=0.1)


def test_few_seeds_by_hand():
    """Seeds that all hands agree on: the t interval of 1/4, 1/2 and 3/4 (t(2) = 4.303, standard
    deviation 1/4). Hands differ in nothing.
    """
    pairs = [(share, 4) for share in (1, 2, 3) for _ in range(50)]
    clusters, seeds = 3 * list(range(50)), [seed for seed in "abc" for _ in range(50)]
    mean, low, high = interval(pairs, clusters, seeds=seeds)
    assert mean == 0.5 and high - mean == pytest.approx(mean - low)
    assert mean - low == pytest.approx(4.303 * 0.25 / math.sqrt(3), rel=0.03)
    assert interval(pairs, clusters, pairs, seeds) == (0, 0, 0)


def test_variances_of_seeds_and_clusters_add_up():
    """t at Satterthwaite's degrees of freedom: the seeds' alone, (1 + 1)^2 / (1/2 + 1/600) = 7.97,
    the clusters' alone.
    """
    assert bootstrap.half_width(4, 3, 0, 601) == pytest.approx(2 * 4.303, rel=1e-3)
    assert bootstrap.half_width(1, 3, 1, 601) == pytest.approx(2.365 * math.sqrt(2), rel=1e-3)
    assert bootstrap.half_width(0, 3, 4, 601) == pytest.approx(2 * 1.964, rel=1e-3)


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (4.9, 2.776), (11, 2.201), (60, 2.0003)])
def test_quantiles_of_student(freedom, t):
    assert bootstrap.student_t(freedom) == pytest.approx(t, rel=3e-3)


@pytest.mark.parametrize("seeds, spread", [(5, 0.13), (3, 0.13), (5, 0.02), (3, 0)])
def test_intervals_cover_what_another_training_would_show(seeds, spread):
    """Success near 0.4 whose runs differ by `spread`, 1000 hands of 700 kinds, the same for all
    runs. Hands alone (one seed's interval) cover less than half where runs differ by 13 points.
    """
    generator = torch.Generator().manual_seed(0)
    hands = torch.randint(700, (1000,), generator=generator)
    labels = [seed for seed in range(seeds) for _ in hands]

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    deviation = math.sqrt(spread**2 + 0.25**2 + 0.1**2)
    truth = (0.4 + deviation * normal(10**6)).clamp(0, 1).mean()
    covered, by_hands_alone, trials = 0, 0, 200
    for _ in range(trials):
        kinds = 0.25 * normal(700) + 0.1 * normal(seeds, 700)
        chance = 0.4 + spread * normal(seeds, 1) + kinds[:, hands]  # (seeds, 1000)
        solved = torch.rand(chance.shape, generator=generator) < chance
        counts = torch.stack([solved.flatten(), torch.ones(solved.numel())], -1)[:, None]
        clusters = seeds * hands.tolist()
        _, low, high = bootstrap.measure(counts, clusters, labels, bootstrap.value).estimate
        covered += low <= truth <= high
        if spread > 0.1:
            alone = bootstrap.measure(counts, clusters, [0] * len(labels), bootstrap.value).estimate
            by_hands_alone += alone.low <= truth <= alone.high
    assert covered >= 0.9 * trials
    assert by_hands_alone < 0.5 * trials


@pytest.mark.parametrize("seeds", [5, 3])
def test_intervals_of_paired_differences_cover_what_another_training_would_show(seeds):
    """Two arms on the same 400 hands, from a start near 0.4 that differs by 13 points between
    runs, with a gain of 5 points that differs by 4.
    """
    generator = torch.Generator().manual_seed(0)
    labels = [seed for seed in range(seeds) for _ in range(400)]

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def chances(runs, hands):
        start = 0.4 + 0.13 * normal(runs, 1) + 0.25 * normal(1, hands)
        arm = start + 0.05 + 0.04 * normal(runs, 1) + 0.1 * normal(1, hands)
        return torch.stack([arm, start]).clamp(0, 1)  # (2, runs, hands)

    arm, start = chances(2000, 2000).mean([1, 2])
    covered, trials = 0, 200
    for _ in range(trials):
        chance = chances(seeds, 400)
        solved = (torch.rand(chance.shape, generator=generator) < chance).flatten(1)
        counts = torch.stack([solved, torch.ones_like(solved)], -1).transpose(0, 1).float()
        clusters = seeds * list(range(400))
        _, low, high = bootstrap.measure(counts, clusters, labels, bootstrap.difference).estimate
        covered += low <= arm - start <= high
    assert covered >= 0.9 * trials


@pytest.mark.parametrize(
    "at, y",
    [(25, 40 - 15), (10, 50), (30, 10), (12, 48), (9.9, None), (35, 90 - 60 * 15 / 20), (41, None)],
)
def test_curve_is_read_where_it_first_comes_to_x(at, y):
    """From (10, 50) by (20, 40) to (30, 10), back to (20, 90), stays there, then to (40, 30)."""
    x = torch.tensor([[10.0, 20, 30, 20, 20, 40]]).double()
    values = torch.tensor([[50.0, 40, 10, 90, 90, 30]]).double()
    found = bootstrap.curve_at(x, values, torch.tensor([[at]]).double()).item()
    assert math.isnan(found) if y is None else found == pytest.approx(y)


def at_shares(*shares, seed=0, gflops=0):
    """A Checkpoint per variant that solves these shares of 20 hands."""
    found = []
    for variant, share in enumerate(shares):
        episodes = []
        for hand in range(20):
            counts = {"solved": (int(hand < 20 * share), 1)}
            episodes.append({"cluster": (variant, hand), "training": seed, "counts": counts})
        found.append(measures.Checkpoint(gflops, episodes))
    return found


def test_ppo_above_the_curve_of_sft_by_hand():
    """SFT goes from 20 % ID and 50 % OOD to 60 and 10, so by 40 and 30 half-way, and by 30 and 40
    at a quarter of its compute. PPO has 40 and 60.
    """
    sft = [at_shares(0.2, 0.5, gflops=100), at_shares(0.6, 0.1, gflops=300)]
    found = measures.above_curve(*zip(*sft, at_shares(0.4, 0.6, gflops=150)), "solved")
    assert found["metrics"]["equal ID"].value == pytest.approx(60 - 30)
    assert found["metrics"]["equal FLOPs"].value == pytest.approx(60 - 40)
    assert found["per_seed"]["equal ID"] == pytest.approx([30])
    low, high = found["metrics"]["equal ID"][1:]
    assert -20 < low < 15 and 45 < high < 80  # 20 hands
    further = measures.above_curve(*zip(*sft, at_shares(0.7, 0.6, gflops=301)), "solved")
    assert further == {"metrics": {}, "per_seed": {}}


def test_paired_difference_of_identical_arms_is_exactly_zero():
    def cell(solved):
        counts = [{"first": (i % 2, 1), "solved": (solved[i], 1)} for i in range(100)]
        return [{"cluster": i // 3, "training": 0, "counts": counts[i], "grades": {"first": {}}}
                for i in range(100)]

    one, two = cell([1, 1, 0, 1] * 25), cell([1, 1, 1, 1] + [1, 1, 0, 1] * 24)  # one hand more
    arms = {"a": one, "b": one, "c": two}
    cells = {measures.Place("all", "ID", arm, 0.2): episodes for arm, episodes in arms.items()}
    same, other = measures.differences(cells, [("a", "b"), ("c", "a")])
    assert same["metrics"] == {"first": (0, 0, 0), "solved": (0, 0, 0)}
    mean, low, high = other["metrics"]["solved"]  # in points
    # the one cluster is drawn 0 to 3 or 4 times: unpaired would be +- 8
    assert mean == pytest.approx(1) and low == 0 and 2 < high < 5
    assert other["per_seed"]["solved"] == pytest.approx([1])


# ---------------------------------------------------------------- which arms, which pairs
def compare(run, arms, init="sft/step_1", runs=None):
    """The Comparison of arms {name: (steps, ppo.init or sft.init_step)}, 10 GFLOPs per step."""
    for name, (steps, start) in arms.items():
        section = {"sft": {"init_step": start}, "ppo": {"init": start}}
        for step in steps:
            (run / name / f"step_{step}").mkdir(parents=True)
        (run / name / "config.yaml").write_text(yaml.safe_dump({**section, "env": {}}))
    return Comparison(runs or [run], init, lambda path: 10 * int(path.name.split("_")[1]))


def shown(comparison):
    return {arm.name: [path.name for path in arm.checkpoints] for arm in comparison.arms}


SFT = ([1, 5, 20, 40, 100], 1)


def test_one_ppo_has_init_and_sft(tmp_path):
    found = compare(tmp_path, {"sft": SFT, "rl": ([10, 41], "sft/step_1")})
    assert shown(found) == {"Init": ["step_1"], "sft": ["step_40"], "rl": ["step_41"]}
    assert found.pairs() == [("sft", "Init"), ("rl", "Init"), ("rl", "sft")]
    assert found.notes == []


def test_each_ppo_has_its_own_start_and_sft_at_its_compute(tmp_path):
    """In natural order, whatever ppo.init is given; among themselves those of one start."""
    arms = {
        "sft": SFT,
        "rl-ppo.verify_iters=10": ([100], "sft/step_1"),
        "rl-ppo.verify_iters=3": ([20], "sft/step_1"),
        "rl-ppo.init=sft_step_5": ([99], "sft/step_5"),
        "rl-ppo.init=none": ([100], "none"),
    }
    found = compare(tmp_path, arms, init="sft/step_77")
    first, later = "Init @ sft/step_1", "Init @ sft/step_5"
    assert list(shown(found)) == [
        first, later, "sft @ step_20", "sft @ step_100",
        "rl-ppo.init=none", "rl-ppo.init=sft_step_5",
        "rl-ppo.verify_iters=3", "rl-ppo.verify_iters=10",
    ]
    assert set(found.pairs()) == {
        ("sft @ step_20", first), ("sft @ step_100", first), ("sft @ step_100", later),
        ("rl-ppo.init=sft_step_5", later),
        ("rl-ppo.verify_iters=3", first), ("rl-ppo.verify_iters=10", first),
        ("rl-ppo.init=none", "sft @ step_100"), ("rl-ppo.init=sft_step_5", "sft @ step_100"),
        ("rl-ppo.verify_iters=3", "sft @ step_20"), ("rl-ppo.verify_iters=10", "sft @ step_100"),
        ("rl-ppo.verify_iters=10", "rl-ppo.verify_iters=3"),
    }


def test_ppo_is_compared_with_the_sft_in_which_it_began(tmp_path):
    arms = {
        "sft": SFT,
        "sft-sft.mistakes=3": ([2, 30], 2),
        "rl": ([40], "sft/step_1"),
        "rl-x": ([30], "sft-sft.mistakes=3/step_2"),
    }
    found = compare(tmp_path, arms)
    other = "Init @ sft-sft.mistakes=3/step_2"
    assert ("rl-x", "sft-sft.mistakes=3") in found.pairs() and ("rl-x", other) in found.pairs()
    assert ("sft-sft.mistakes=3", other) in found.pairs() and ("rl", "rl-x") not in found.pairs()
    assert ("rl-x", "sft") not in found.pairs() and ("rl-x", "rl") not in found.pairs()


def test_ppo_is_compared_with_every_sft_that_went_on_from_its_start(tmp_path):
    """One that began elsewhere is compared with its own start alone."""
    arms = {"sft": SFT, "sft-gentle": ([10, 39], 1), "sft-late": ([30], 1),
            "rl": ([40], "sft/step_1")}
    compare(tmp_path, arms)
    for name, init in {"sft-gentle": "sft/step_1", "sft-late": "sft/step_5"}.items():
        settings = {"sft": {"init_step": 1, "init": init}, "env": {}}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(settings))
    found = compare(tmp_path, {}).pairs()
    bases = {base for arm, base in found if arm == "rl"}
    assert bases == {"Init @ sft/step_1", "sft", "sft-gentle"}
    assert ("sft-gentle", "Init @ sft/step_1") in found
    assert ("sft-late", "Init @ sft/step_5") in found


def test_ppo_that_began_in_another_run_leaves_sft_its_own_start(tmp_path):
    compare(tmp_path / "a", {"sft": SFT})
    arms = {"sft": SFT, "rl": ([40], "../a/sft/step_5")}
    assert set(compare(tmp_path / "b", arms).pairs()) == {
        ("sft", "Init @ sft/step_1"),
        ("rl", "Init @ ../a/sft/step_5"),
        ("rl", "sft"),
    }


def test_sft_without_ppo_is_compared_with_its_own_first_steps(tmp_path):
    arms = {"sft": SFT, "sft-sft.lr=1": ([1, 38], 1)}
    found = compare(tmp_path, arms, init="sft/step_5")
    other = "Init @ sft-sft.lr=1/step_1"
    assert found.pairs() == [("sft", "Init @ sft/step_5"), ("sft-sft.lr=1", other)]
    assert shown(found)["sft"] == ["step_100"]
    assert Comparison([tmp_path], "none", found.gflops).pairs() == []
    assert "no checkpoint" in Comparison([tmp_path], "sft/step_6", found.gflops).notes[0]
    found = compare(tmp_path, {"rl": ([40], "sft/step_1")})
    assert shown(found)["sft-sft.lr=1"] == ["step_38"]  # at the compute of the PPO there is


def test_pooled_runs_may_have_spent_their_compute_at_other_steps(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    rl = {"rl": ([40], "sft/step_1"), "rl-x": ([20], "sft/step_1")}
    compare(one, {"sft": SFT, **rl, "rl-y": ([20], "sft/step_1")})
    compare(two, {"sft": ([1, 19, 40], 1), **rl})
    found = Comparison([one, two], "none", lambda path: 10 * int(path.name.split("_")[1]))
    assert shown(found) == {
        "Init": ["step_1"] * 2, "sft @ step_20, step_19": ["step_20", "step_19"],
        "sft @ step_40": ["step_40"] * 2, "rl": ["step_40"] * 2, "rl-x": ["step_20"] * 2,
    }
    assert found.pairs()[-3:] == [
        ("rl", "sft @ step_40"), ("rl-x", "sft @ step_20, step_19"), ("rl-x", "rl")
    ]


def test_one_note_says_how_far_the_compute_of_pooled_runs_is_apart(tmp_path):
    runs = [tmp_path / name for name in ("one", "two", "three", "four")]
    for run, last in zip(runs, (30, 60, 39, 36)):
        compare(run, {"sft": ([1, last], 1), "rl": ([40], "sft/step_1")})

    def notes(runs):
        return Comparison(runs, "none", lambda path: 10 * int(path.name.split("_")[1])).notes

    assert notes(runs[:3]) == [
        "not at equal compute in 2 of 3 runs: sft/step_30, sft/step_60, sft/step_39 has 430 model "
        "GFLOPs, 25.0 % less to 50.0 % more than rl/step_40 (400)"
    ]
    (note,) = notes([runs[0], runs[3]])
    assert "10.0 to 25.0 % less than rl/step_40 (400)" in note
    (note,) = notes([runs[1], runs[2]])
    assert "in 1 of 2 runs" in note and "50.0 % more than" in note


def test_chosen_arms_alone_are_compared_and_ppo_of_any_start_with_each_other(tmp_path):
    arms = {
        "sft": SFT, "sft-x": ([30], 1), "rl": ([40], "sft/step_1"), "rl-y": ([30], "sft/step_1"),
        "rl-ppo.init=none": ([20], "none"),
    }
    compare(tmp_path, arms)
    chosen = ["rl", "rl-ppo.init=none"]
    found = Comparison([tmp_path], "none", lambda path: 10, chosen)
    assert shown(found) == {
        "Init": ["step_1"], "rl": ["step_40"], "rl-ppo.init=none": ["step_20"],
    }
    assert found.pairs() == [("rl", "Init"), ("rl-ppo.init=none", "rl")]
    with pytest.raises(UserError, match="eval.arms: no rl-z with a checkpoint"):
        Comparison([tmp_path], "none", lambda path: 10, ["rl", "rl-z"])


@pytest.mark.parametrize("step, told", [(95, False), (105, False), (94, True), (106, True)])
def test_compute_that_differs_by_more_than_a_twentieth_is_told(tmp_path, step, told):
    found = compare(tmp_path, {"sft": ([1, step], 1), "rl": ([100], "sft/step_1")})
    assert bool(found.notes) == told
    if told:
        more = "6.0 % more" if step > 100 else "6.0 % less"
        (note,) = found.notes
        assert f"sft/step_{step} has {10 * step:,} model GFLOPs, {more} than" in note


def test_start_that_is_gone_is_told(tmp_path):
    found = compare(tmp_path, {"sft": ([1, 9], 1), "rl": ([9], "sft/step_3")})
    assert found.pairs() == [("sft", "Init"), ("rl", "sft")]
    assert found.notes == ["rl: sft/step_3, where it began, is gone"]


def test_arms_trained_on_what_is_played_are_told(tmp_path):
    compare(tmp_path, {"sft": ([1, 9], 1), "rl": ([9], "sft/step_1")})
    arms = Comparison([tmp_path], "none", lambda path: 1).arms
    for split, seen in (("all", "all, unseen"), ("unseen", "unseen"), ("train", None)):
        settings = {"ppo": {"init": "sft/step_1"}, "env": {"split": split}}
        (tmp_path / "rl" / "config.yaml").write_text(yaml.safe_dump(settings))
        told = seen_notes(arms, {"all": 5, "unseen": 3})
        wanted = f"rl: trained with env.split={split}, so what is played under {seen} is not new to"
        assert [line.removesuffix(" it") for line in told] == ([wanted] if seen else [])
    (tmp_path / "rl" / "config.yaml").write_text(yaml.safe_dump({**settings, "env": {}}))
    assert "sft, rl: trained with env.split=train" in seen_notes(arms, {"train": 5})[0]


def test_a_checkpoint_that_was_copied_may_have_any_name(main):
    run, folder = main
    shutil.copytree(folder / "sft/step_1", folder / "sft/copy-1")
    run("ppo.init=sft/copy-1", "eval.arms=[sft]", "eval.temperatures=[0]", "eval.splits={all: 2}")
    assert saved(folder)["curves"]["ID"]["Init"][0][6] == 0


# ---------------------------------------------------------------- what is published
FINDINGS = ["findings_1", "findings_2", "findings_3"]
QUESTIONS = ["questions_1", "questions_2", "questions_3"]
FIVE = ["gp_l_1", "gp_l_2", "gp_l_3", "gp_l_4", "gp_l_5"]
AT_5E5, AT_2E4 = (f"sft-sft.init=sft_step_80-sft.lr={rate}" for rate in ("5e-5", "2e-4"))
WALKING = "sft-sft.init=sft_step_35-sft.lr={}"
CURVES = ["eval.curve_n=100", f"eval.arms=[sft,{AT_5E5},rl]"]
ENDS = ["eval.curve_n=0", f"eval.arms=[{AT_5E5},rl]"]
NUMBERS = ('eval.variants={"7, 8, 9": {rule: {J: 7, Q: 8, K: 9}, require_face: true}, '
           '"12, 11, 13": {rule: {J: 12, Q: 11, K: 13}, require_face: true}}')
BACKBONES = ["eval.splits={all: 1000}", "eval.curve_n=100", "eval.curve_points=6"]
LONGER = ["eval.splits={all: 500}", "eval.curve_n=100", "eval.curve_points=8"]
PUBLISHED = {  # file of results/: task, packed runs, settings
    "virl_vl_mini": ("virl_vl", [f"virl_vl_{seed}" for seed in range(1, 6)], [
        "eval.temperatures=[0.2]", "eval.curve_n=40", "eval.curve_points=4"]),
    "virl_l_mini": ("virl_l", [f"virl_l_{seed}" for seed in range(1, 6)], [
        "eval.splits={unseen: 200}", "eval.temperatures=[0.2]", "eval.curve_n=40",
        "eval.curve_points=8", f"eval.arms=[sft,{WALKING.format('2e-4')},"
        f"{WALKING.format('5e-5')},rl]"]),
    "virl_l_mini_kl": ("virl_l", [f"virl_l_{seed}" for seed in (1, 2, 3)], [
        "eval.splits={unseen: 200}", "eval.temperatures=[0.2]", "eval.curve_n=40",
        "eval.curve_points=8", "eval.arms=[rl-ppo.kl_coef=0]"]),
    "virl_l_mini_sampling": ("virl_l", [f"virl_l_{seed}" for seed in (1, 2, 3)], [
        "eval.splits={unseen: 200}", "eval.temperatures=[0,{T: 0.6, top_p: 0.9},1]",
        "eval.curve_n=0", f"eval.arms=[{WALKING.format('2e-4')},rl]"]),
    "gp_vl_mini": ("gp_vl", [f"gp_vl_long_{seed}" for seed in range(1, 6)], [
        "eval.splits={all: 1000}", "eval.curve_n=60", "eval.curve_points=5",
        f"eval.arms=[sft-early,{AT_2E4},rl]"]),
    "gp_vl_mini_60": ("gp_vl", [f"gp_vl_{seed}" for seed in range(1, 6)], [
        "eval.splits={all: 500}", "eval.curve_n=60", "eval.curve_points=5"]),
    "gp_vl_mini_sampling": ("gp_vl", [f"gp_vl_long_{seed}" for seed in (1, 2, 3)], [
        "eval.splits={all: 200}", "eval.temperatures=[0,{T: 0.6, top_p: 0.9},1]",
        "eval.curve_n=0", f"eval.arms=[{AT_2E4},rl]"]),
    "gp_l_mini": ("gp_l", FIVE, [
        "eval.splits={all: 1000}", "eval.curve_n=100", "eval.curve_points=5",
        f"eval.arms=[sft,sft-early,{AT_5E5},{AT_2E4},rl]"]),
    "gp_l_mini_kl": ("gp_l", FIVE, [
        *CURVES, "eval.splits={all: 100}", "eval.curve_points=9", "eval.kl=true"]),
    "gp_l_mini_rules": ("gp_l", FIVE, [*ENDS, NUMBERS]),
    "gp_l_mini_unseen": ("gp_l", FIVE[:3], [*ENDS, "eval.splits={unseen: 200}"]),
    "gp_l_mini_sampling": ("gp_l", FIVE[:3], [
        *ENDS, "eval.splits={all: 200}", "eval.temperatures=[0,{T: 0.6, top_p: 0.9},1]"]),
    "gp_l_mini_backbones": ("gp_l", ["gp_l_backbone_0", "gp_l_backbone_1", "gp_l_backbone_2"], [
        "eval.splits={all: 1000}", "eval.curve_n=0", "eval.arms=[sft,rl]"]),
    "gp_l_mini_base_2.8m": ("gp_l", [f"gp_l_base_2.8m_{seed}" for seed in (1, 2, 3)], BACKBONES),
    "gp_l_mini_base_4.2m": ("gp_l", [f"gp_l_base_4.2m_{seed}" for seed in (1, 2, 3)], BACKBONES),
    "gp_l_mini_no_cards": ("gp_l", [f"gp_l_no_cards_{seed}" for seed in (1, 2, 3)], BACKBONES),
    "gp_l_mini_base_2.8m_first": ("gp_l", ["gp_l_base_2.8m"], LONGER),
    "gp_l_mini_base_4.2m_first": ("gp_l", ["gp_l_base_4.2m"], LONGER),
    "gp_l_mini_no_cards_first": ("gp_l", ["gp_l_no_cards"], [
        "eval.splits={all: 1000}", "eval.curve_n=100", "eval.curve_points=8"]),
    "questions_kl_mini": ("gp_l", QUESTIONS, [
        "eval.kl=true", "eval.curve_n=100", "eval.arms=[sft,rl,rl-ppo.kl_coef=0]"]),
    "questions_before_mini": ("gp_l", QUESTIONS, [
        "eval.arms=[sft-sft.init=sft_step_40,rl-ppo.init=sft_step_40]"]),
    "questions_after_mini": ("gp_l", QUESTIONS, [
        "eval.arms=[sft,rl,rl-ppo.init=sft_step_320]"]),
    "questions_dft_mini": ("gp_l", QUESTIONS, [
        "eval.arms=[sft-sft.init=sft_step_80-sft.loss=dft,rl]"]),
    "f6_mini": ("gp_vl", [f"findings_vl_{seed}" for seed in (1, 2, 3)], [
        "ppo.init=none", "eval.splits={all: 300}", "eval.temperatures=[0.2]", "eval.curve_n=0"]),
    "viter_mini": ("gp_l", FINDINGS, ["eval.arms=[" + ",".join(
        f"rl-ppo.verify_iters={attempts}" for attempts in (1, 3, 5, 10)) + "]"]),
    "overfit_mini": ("gp_l", FINDINGS, [
        "eval.arms=[rl-ppo.verify_iters=5,"
        "rl-ppo.init=sft-sft.init=sft_step_80-sft.lr=3e-3_step_600]"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("published", PUBLISHED)
def test_published_numbers_are_those_of_the_packed_runs(tmp_path, monkeypatch, published):
    """From every episode to the tables, by the code of today, without a model."""
    task, names, settings = PUBLISHED[published]
    for name in names:
        shutil.unpack_archive(ROOT / f"results/episodes/{name}.tar.xz", tmp_path)
    monkeypatch.setattr(evaluation, "made_by", lambda *_: {})  # reference policies, too, as played
    monkeypatch.setattr(evaluation, "Policy", None)
    runs = ",".join(str(tmp_path / name) for name in names)
    evaluation.main([str(CONFIG.with_name(f"{task}.yaml")), f"run.dir={tmp_path / 'pooled'}",
                     f"eval.runs=[{runs}]", "eval.conversations=0", *settings])
    made = json.loads((tmp_path / "pooled/evaluation.json").read_text(),
                      parse_float=lambda number: round(float(number), 3))
    known = json.loads((ROOT / "results" / f"{published}.json").read_text())
    assert made["gflops"] == known["gflops"]
    for part in ("table", "differences", "frontier"):
        for ours, theirs in zip(made[part], known[part], strict=True):
            assert theirs["metrics"].items() <= ours["metrics"].items()  # newer metrics may be more
            assert theirs["per_seed"].items() <= ours["per_seed"].items()
