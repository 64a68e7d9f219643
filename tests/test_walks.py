"""V-IRL with the bundled model: whole runs in words and in pictures through the scripts' own
main(), and what the model sees.
"""

import contextlib
import io
import json
import math
import random
import re

import pytest
import torch
import yaml
from conftest import CONFIG, ROOT, policies
from test_runs import assert_same_run, lines, log, run, run_report, stop_after

from lib import settings as config
import virl
from mini import corpus_virl
from rollout import EVAL_SEEDS, make_env
from scenery.routes import COMPASS, SIDES, SPLITS

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
    "model.max_new_tokens=32",
    "eval.splits={unseen: 2}",
    "eval.curve_n=0",
    "eval.temperatures=[0.2]",
)
NAMES = re.compile(r"([A-Z]\w+ [A-Z]\w+) is on your")
KINDS = re.compile(r"(\w+) \w+ is on your")
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
    update take minutes. Answers are put together from smaller pieces, which the backbone knows.
    """
    policy = policies(config.load([str(WORDS)])[0])(noise=0)
    found = stops(WORDS, 40, what="")
    prompts = [len(s.ids) for s in policy.encode([obs for _, obs in found])]
    answers = [len(ids) for ids in policy.encode_answers([env.expert() for env, _ in found])]
    assert sum(prompts) / 40 < 130 and max(prompts) < 250 and sum(answers) / 40 < 27
    assert max(answers) <= config.load([str(WORDS)])[0].model.max_new_tokens


def test_answers_follow_the_street_views(eyes):
    """Asked as the backbone was taught, what is seen is of the kind that the picture shows: with
    the walk's own picture, and with another walk's (the names of both are given; who names one
    of them without looking is right in 3 of 20)."""
    near = stops(VIEWS, 20)

    def right_kinds(shift):
        pictured = near[shift:] + near[:shift]
        asked = []
        for (env, _), (other, obs) in zip(near, pictured):
            names = NAMES.findall(" ".join(env.instructions + other.instructions))
            on_the_way = corpus_virl.ON_THE_WAY.format(names=", ".join(dict.fromkeys(names)))
            request = f"{virl.PICTURE}{on_the_way}{corpus_virl.SEE}"
            message = {"role": "user", "content": request}
            asked.append({"messages": [message], "image": obs["image"]})
        answers = eyes.sample(eyes.encode(asked), 0, torch.Generator())
        kinds = [KINDS.findall(eyes.decode(answer.ids))[:1] for answer in answers]
        return sum(kind == KINDS.findall(env.expert())[:1]
                   for kind, (env, _) in zip(kinds, pictured))

    assert right_kinds(0) >= 12 and right_kinds(1) >= 8


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


# ---------------------------------------------------------------- what the backbone reads
RECIPE = yaml.safe_load((ROOT / "mini/virl.yaml").read_text())
SLOW = pytest.mark.slow
SLIGHT = {"slightly left": -1, "slightly right": 1}  # octants


def reader(image_size=None, routes=100, **changes):
    stage = RECIPE["vision"] if image_size else {}
    data = {**RECIPE["data"], **stage, "routes": routes, **changes}
    return corpus_virl.Corpus(data, 1, image_size)


@pytest.fixture
def any_route(monkeypatch):
    """A reader takes seconds less if it need not know the routes of every split."""
    monkeypatch.setattr(corpus_virl, "evaluated", lambda _: set())


def lines_of(document):
    """The numbered lines of the instructions that a document shows."""
    block = re.findall(r"^\d+\. (Turn .*|Move .*)$", document.text, re.MULTILINE)
    return tuple(block)


@pytest.mark.parametrize(
    "n, image_size, routes",
    [(1500, None, 100), (60, [224, 224], 20), pytest.param(100_000, None, 4000, marks=SLOW),
     pytest.param(3000, [224, 224], 250, marks=SLOW)])
def test_backbone_reads_no_route_of_any_split_and_no_answer_of_the_task(
        monkeypatch, n, image_size, routes):
    """The first turn hangs on where a walk starts to look; the other lines are the route's, here
    with the landmarks' own names, which documents with pictures replace."""
    monkeypatch.setattr(corpus_virl.Corpus, "renamed", lambda self, document: document)
    kept = set()
    for split, size in SPLITS.items():
        env = virl.Navigation(split=split, milestones=RECIPE["data"]["milestones"])
        for seed in range(size):
            env.reset(seed)
            kept.add(tuple(env.instructions[1:]))
    corpus, shown = reader(image_size, routes), 0
    for _ in range(n):
        document = corpus.document()
        rest = lines_of(document)[1:]
        assert rest not in kept, document.text
        shown += bool(rest)
        assert not re.search(r"turn_direction\(|forward\(\)|stop\(\)", document.text)
        for key in virl.KEYS:
            assert f'"{key}"' not in document.text
        assert (document.image is not None) == bool(image_size)
    assert shown > n / (8 if image_size else 4)


def test_a_route_of_the_corpus_that_reads_like_one_of_the_task_is_left_out(monkeypatch):
    milestones = tuple(RECIPE["data"]["milestones"])
    twin = corpus_virl.routes.split_route("corpus", 3, milestones)
    taken = {corpus_virl.told_by(twin)}
    monkeypatch.setattr(corpus_virl, "evaluated", lambda _: taken)
    own = reader(routes=10).env._routes
    assert len(own) == 9 and twin not in own


def wanted_step(document):
    """(observation, number of the instruction, pattern of the next step) by a count of its own:
    the instruction after as many turns as were done, in the words that were asked for."""
    lines = lines_of(document)
    story = re.search(r"\n(?:Step 1: |So far: )(.*)\nNow", document.text, re.DOTALL)
    (now,) = re.findall("Now: (.*?) (?:What |Which |Read |JSON: )", document.text)
    done = len(re.findall(r"You turned|I went|go\(", story[1] if story else ""))
    if "destination" in now:
        return now, len(lines), r"You have arrived\.|Stop, this is it\.|arrive\(\)"
    if story and "intersection" not in now:
        return now, 2 * done, r"Walk on\.|Just keep going\.|walk\(\)"
    turn, compass = re.fullmatch("Turn (.*) to face (.*).", lines[2 * done]).groups()
    word = compass if ": north, " in document.text else turn
    return now, 2 * done + 1, rf"Now turn {word}\.|Go {word}, please\.|go\({word}\)"


def test_a_diary_tells_every_turn_in_the_words_asked_for(any_route):
    corpus = reader()
    for _ in range(50):
        document = corpus.diary()
        (_, learned), (told, told_learned) = document.parts[1:]
        turns = [re.fullmatch("Turn (.*) to face (.*).", line)
                 for line in lines_of(document) if line.startswith("Turn")]
        words = [turn[2] if ": north, " in document.text else turn[1] for turn in turns]
        assert re.findall(r"(?:turned |went |go\()(.*?)[.)]", told) == words
        assert re.search(r"(You have arrived\.|Stop, this is it\.|arrive\(\))$", told)
        assert told_learned and not learned


def test_next_steps_are_told_in_the_words_asked_for(any_route):
    corpus, met = reader(slip=0, blind=0, mixed=0), set()
    for _ in range(400):
        document = corpus.told()
        now, number, step = wanted_step(document)
        line = lines_of(document)[number - 1]
        for asked, reply in re.findall(r"([^>]*)<\|assistant\|>([^<]*)", document.text):
            if "JSON: " in asked:
                keys = asked.split("JSON: ")[1].strip().split(", ")
                report = json.loads(reply)
                assert list(report) == keys
                for key, text in report.items():
                    (what,) = [w for w, named in corpus_virl.REPORT.items() if key in named]
                    right = {"seen": re.escape(now), "line": re.escape(line), "next": step}
                    assert re.fullmatch(right[what], text)
                    met.add(what)
            elif asked.endswith("What do you see?"):
                assert reply == now
            elif asked.endswith("Which instruction is it?"):
                assert reply == f"Number {number}: {line}"
            elif asked.endswith("then say what to do."):
                assert re.fullmatch(f"{line} ({step})", reply)
            else:
                assert re.fullmatch(step, reply)
                met.add(reply)
    assert len(met) > 25


def test_turns_and_sides_are_told_right(any_route):
    """By the octants of COMPASS and SIDES, a turn of one of them being slight."""
    corpus, found = reader(), 0
    for _ in range(100):
        for line in corpus.turning().text.splitlines():
            a, turn, b = re.findall("slightly left|slightly right|north\\w*|south\\w*|"
                                    "east|west|left|right", line)
            if "want" in line:
                turn, b = b, turn
            change = (COMPASS.index(b) - COMPASS.index(a) + 4) % 8 - 4
            assert (abs(change) == 1) == (turn in SLIGHT)
            assert (change > 0) == turn.endswith("right")
            found += 1
        for line in corpus.sides().text.splitlines():
            name, side, rest = re.search(r"(\w+ \w+) is on your ([a-z ]+)(.*)", line).groups()
            if "You turn" in rest:
                turned = 2 if "right" in rest.split(":")[0] else -2
                after = rest.split("on your ")[1].rstrip(".")
                assert SIDES.index(after) == (SIDES.index(side) - turned) % 8
                found += 1
    assert found > 600


def test_pictures_are_shown_again_under_other_names(any_route):
    """What a picture shows is asked for with new proper names each time, the same in question and
    answer; of a fair it is what was drawn, turned with the one who looks."""
    corpus = reader([224, 224], routes=3, pictures=2, documents={"look": 1, "fair": 1})
    met = {}
    for _ in range(40):
        document = corpus.document()
        (request, _), (reply, _) = document.parts[1:]
        names = re.findall(r"(\w+ \w+) is on your", reply)
        assert all(name.removeprefix("The destination ") in request for name in names)
        plain = re.sub(r"(The destination )?(\w+) \w+ is on your", r"\2 is on your", reply)
        met.setdefault(document.image.tobytes(), set()).add((plain, reply))
        assert document.probe == corpus_virl.probe_targets(reply)
    assert len(met) == 4  # two of walks, two of one fair
    for replies in met.values():
        assert len({plain for plain, _ in replies}) == 1
    first, second = ([side for side, _ in standing] for _, _, standing in corpus.drawn["fairs"])
    assert sorted((side - 1) % 8 for side in first) == second


def test_wrong_replies_carry_no_loss_and_the_next_is_another_one(any_route):
    corpus, corrected = reader(slip=0.6), 0
    for kind in (corpus.tour, corpus.told, corpus.json_task):
        for _ in range(100):
            parts = kind().parts
            for (reply, learned), (request, _), (other, _) in zip(parts, parts[1:], parts[2:]):
                if "Try again." in request:
                    assert not learned and reply != other
                    corrected += 1
                elif reply.endswith("<|end|>"):
                    assert learned
    assert corrected > 300
