"""V-IRL with the bundled model: whole runs in words and in pictures through the scripts' own
main(), and what the model sees.
"""

import contextlib
import io
import json
import math
import random

import pytest
import torch
from conftest import CONFIG, policies
from test_runs import assert_same_run, lines, log, run, run_report, stop_after

from lib import settings as config
import virl
from rollout import EVAL_SEEDS, make_env

WORDS, VIEWS = CONFIG.with_name("virl_l.yaml"), CONFIG.with_name("virl_vl.yaml")
TINY = (
    "env.milestones=[2, 2]",
    "sft.steps=2",
    "sft.init_step=1",
    "sft.save_every=1",
    "sft.batch_size=6",
    "ppo.init=sft/step_1",
    "ppo.updates=2",
    "ppo.save_every=1",
    "ppo.envs=4",
    "ppo.turns=3",
    "ppo.minibatch=4",
    "ppo.epochs=2",
    "eval.splits={unseen: 4}",
    "eval.curve_n=0",
    "eval.temperatures=[0.2]",
)
REFERENCES = ("always forward", "copy the compass word", "copy the relative word", "blind")


@pytest.fixture(scope="module", params=[WORDS, VIEWS], ids=lambda path: path.stem)
def walked(request, tmp_path_factory):
    """(configuration, run directory of an SFT and a PPO run, what report.py printed)."""
    folder, printed = tmp_path_factory.mktemp(request.param.stem) / "run", io.StringIO()
    run("sft", folder, config=request.param, tiny=TINY)
    run("rl", folder, config=request.param, tiny=TINY)
    with contextlib.redirect_stdout(printed):
        few = "eval.variants={ID: {}, rule OOD: {rule: relative}, cities: {split: cities}}"
        run("eval", folder, config=request.param, tiny=(*TINY, few))
        run_report(folder)
    return request.param, folder, printed.getvalue()


def test_runs_log_what_happens_on_walks(walked):
    path, folder, _ = walked
    assert all(math.isfinite(r["loss"]) for r in lines(folder / "sft" / "metrics.jsonl"))
    updates = lines(folder / "rl" / "metrics.jsonl")
    for record in updates:
        assert set(record["answers"]) <= {"correct", "wrong_action", "wrong_observation", "illegal"}
        assert 0 <= record["per_step"] <= 1 and record["ratio_gap"] < 3e-4
        assert (record["tokens"]["train_patches"] > 0) == (path == VIEWS)
    assert {r["reward"] for r in lines(folder / "rl" / "transcripts.jsonl")} <= {
        1,
        -1,
        -1.5,
        -2,
        -2.5,
    }
    assert len({r["seed"] for r in lines(folder / "rl" / "transcripts.jsonl")}) > 1


def test_stopped_in_the_middle_of_walks_and_continued_is_the_run_undisturbed(
    walked, tmp_path, monkeypatch, request
):
    path, whole, _ = walked
    if path == VIEWS and not request.config.getoption("--slow"):
        pytest.skip("with pictures test_runs.py does it")
    folder = tmp_path / "run"
    run("sft", folder, config=path, tiny=TINY)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run("rl", folder, config=path, tiny=TINY)
    run("rl", folder, config=path, tiny=TINY)
    assert_same_run(folder / "rl", whole / "rl")
    assert log(folder / "rl", "transcripts") == log(whole / "rl", "transcripts")


def test_evaluation_shows_steps_turns_success_and_the_reference_policies(walked):
    path, folder, printed = walked
    table = json.loads((folder / "evaluation.json").read_text())["table"]
    cell = {(r["variant"], r["arm"]): {m: v[0] for m, v in r["metrics"].items()} for r in table}
    for name in ("per-step accuracy", "turns", "success", *["recognition"] * (path == VIEWS)):
        assert f"paired differences of {name} " in printed
    assert ("recognition" in printed) == (path == VIEWS)
    assert (
        cell["ID", "copy the compass word"]["solved"]
        == cell["rule OOD", "copy the relative word"]["solved"]
        == 100
    )
    assert (
        cell["ID", "copy the relative word"]["per_step"]
        == cell["rule OOD", "copy the compass word"]["per_step"]
        == 0
    )
    for variant in ("ID", "rule OOD"):
        assert cell[variant, "blind"]["solved"] == 100 and cell[variant, "blind"]["first_stop"] == 0
        assert cell[variant, "always forward"]["per_step"] == 0  # the walk starts with a turn
    assert (cell["ID", "blind"]["first_turn"] < 100) == (
        path == VIEWS
    )  # there no text tells of intersections
    assert all(printed.count(name) >= 3 for name in REFERENCES)


# ---------------------------------------------------------------- the bundled model
def stops(path, n, what="is on your"):
    """[(environment, observation)] at a random position each of n walks, where the oracle sees
    what is asked for.
    """
    cfg, *_ = config.load([str(path)])
    found, rng = [], random.Random(0)
    for seed in range(EVAL_SEEDS, EVAL_SEEDS + n):
        env = make_env(cfg.env, 2, split="unseen")
        env.reset(seed)
        places = [i for i, p in enumerate(env.rail) if what in p.observation]
        obs, _ = env.reset(seed, progress=(rng.choice(places) + 0.5) / len(env.rail))
        found.append((env, obs))
    return found


@pytest.fixture(scope="module")
def eyes():
    return policies(config.load([str(VIEWS)])[0])(noise=0)


def test_prompts_and_answers_are_short():
    """Whole phrases are tokens: a prompt of the mini is far from the 400 tokens that made an
    update take minutes.
    """
    policy = policies(config.load([str(WORDS)])[0])(noise=0)
    found = stops(WORDS, 40, what="")
    prompts = [len(s.ids) for s in policy.encode([obs for _, obs in found])]
    answers = [len(ids) for ids in policy.encode_answers([env.expert() for env, _ in found])]
    assert sum(prompts) / 40 < 100 and max(prompts) < 200 and sum(answers) / 40 < 18
    assert max(answers) <= config.load([str(WORDS)])[0].model.max_new_tokens


def test_answers_follow_the_street_views(eyes):
    """The words of a walk stay the same, the picture is that of a place with a landmark, or
    another walk's without.
    """
    near, far = stops(VIEWS, 20), stops(VIEWS, 20, what=virl.NOTHING)

    def reports(images):
        prompts = eyes.encode([{**obs, "image": image} for (_, obs), image in zip(near, images)])
        said = [
            virl.read_answer(eyes.decode(a.ids))["current observation"]
            for a in eyes.sample(prompts, 0, torch.Generator())
        ]
        return sum(bool(virl.sightings(s or "")[0]) for s in said)

    assert (
        reports([obs["image"] for _, obs in near]) >= 15
        and reports([obs["image"] for _, obs in far]) <= 5
    )


def test_images_of_one_walk_are_scored_with_their_own_turns(eyes):
    """The log-probs of an answer do not depend on the walks it is scored beside, each with its
    picture.
    """
    found = stops(VIEWS, 6)
    answers = eyes.encode_answers([env.expert() for env, _ in found])
    sequences = [p.answered(a) for p, a in zip(eyes.encode([obs for _, obs in found]), answers)]
    with torch.no_grad():
        together = eyes.score(sequences)["logprobs"]
        alone = torch.cat([eyes.score([s])["logprobs"] for s in sequences])
    assert torch.allclose(together, alone, atol=1e-4)
