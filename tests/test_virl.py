"""Walks: the rail against independent geometry, VIRL.md's worked example, rewards worked out by
hand, any answer at all.

Everything is seeded, hypothesis included: a failure repeats. Oracles and routes are
test_routes.py's.
"""
import copy
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
import soak_answers
import test_routes
from PIL import Image
from test_routes import (COMPASS, FAR, SIDES, SIZES, STOPS, TURNS, between, blocks, degrees_apart,
                         entry, geocode,
                         metres, milestones, nearest, official, turn, vector)

import virl
from scenery import panoramas, routes, streets
from virl import Navigation

saved = test_routes.saved  # a fixture
ROOT = Path(virl.__file__).resolve().parent
FUZZ = settings(max_examples=300, deadline=None, derandomize=True, database=None)
RULES = {"absolute": COMPASS, "relative": TURNS}
NOTHING, CROSSING = "No landmarks nearby.", "You are at an intersection."


# ---------------------------------------------------------------- helpers
@pytest.fixture
def sketch(monkeypatch):
    """Replaces the drawing by a picture of nothing; returns the list of the arguments that it was
    asked for."""
    asked = []
    virl._drawn.cache_clear()

    def draw(*args):
        asked.append(args)
        return Image.new("RGB", (args[-1], args[-1]))

    monkeypatch.setattr(streets, "street_views", draw)
    yield asked
    virl._drawn.cache_clear()


def text(obs):
    """The prompt of a conversation, without the picture."""
    content = obs["messages"][0]["content"]
    return content if isinstance(content, str) else content[1]["text"]


def instructions(obs):
    return re.findall(r"^\d+\. (.*)$", text(obs), re.M)


def history(obs):
    """[(observation, action)] as the prompt tells it; the newest action is empty."""
    lines = re.findall(r"^O_(\d+): (.*)\nA_(\d+): ?(.*)$", text(obs), re.M)
    assert [(int(o), int(a)) for o, _, a, _ in lines] == [(i, i) for i in range(1, len(lines) + 1)]
    return [(observation, action) for _, observation, _, action in lines]


def said(action, observation=None):
    """An answer; no observation: the key is left out."""
    return json.dumps({**({} if observation is None else {"current observation": observation}),
                       "action": action})


def walk(env, seed):
    """The expert's walk: yields (index, position, observation shown, result of the step)."""
    obs, info = env.reset(seed)
    rail = list(env.rail)
    assert info["positions"] == len(rail)
    for i, position in enumerate(rail):
        result = env.step(env.expert())
        yield i, position, obs, result
        obs = result[0]
    assert result[2], "the walk ends at the destination"


def stand(env, seed, *counts):
    """Reset to the first seed, from `seed` on, whose rail has these numbers of forward positions
    per leg."""
    for later in range(2000):
        obs, _ = env.reset(seed + later)
        forward = Counter(p.leg for p in env.rail if p.action == "forward")
        if tuple(forward[leg] for leg in range(len(counts))) == counts:
            return obs
    raise AssertionError("no such rail")


# ---------------------------------------------------------------- VIRL.md's worked example
CAFE, END = "Blue Cafe is on your right front.", "The destination Town Hall is on your left."
TABLE = [  # observation, right action under absolute, under relative
    (NOTHING, "turn_direction(northeast)", "turn_direction(left)"),
    (NOTHING, "forward()", "forward()"), (NOTHING, "forward()", "forward()"),
    (f"{CAFE} {CROSSING}", "turn_direction(northwest)", "turn_direction(left)"),
    (NOTHING, "forward()", "forward()"),
    (f"{NOTHING} {CROSSING}", "turn_direction(north)", "turn_direction(right)"),
    (NOTHING, "forward()", "forward()"), (NOTHING, "forward()", "forward()"),
    (NOTHING, "forward()", "forward()"),
    (END, "stop()", "stop()")]
INSTRUCTIONS = ["Turn left to face northeast.",
                "Move forward until the next intersection, where Blue Cafe is on your right front.",
                "Turn left to face northwest.", "Move forward until the next intersection.",
                "Turn right to face north.",
                "Move forward until you reach the destination, "
                "where the destination Town Hall is on your left."]
FOLLOWED = [0, 1, 1, 2, 3, 4, 5, 5, 5, 5]  # instruction at each step


@pytest.mark.parametrize("rule", RULES)
def test_worked_example(saved, rule):
    env = Navigation(rule=rule, routes=saved([[entry()], 1]))
    obs = stand(env, 0, 2, 1, 3)
    actions = [row[1 + list(RULES).index(rule)] for row in TABLE]
    for i, ((observation, *_), action) in enumerate(zip(TABLE, actions)):
        assert instructions(obs) == INSTRUCTIONS
        assert history(obs) == [*zip([row[0] for row in TABLE[:i]], actions), (observation, "")]
        assert text(obs).endswith(f"\nA_{i + 1}:") and len(obs["messages"]) == 1
        assert obs["image"] is None
        assert env.action() == action
        assert json.loads(env.expert()) == {"current observation": observation, "action": action,
                                            "current instruction": INSTRUCTIONS[FOLLOWED[i]]}
        obs, reward, terminated, truncated, info = env.step(env.expert())
        assert (reward, terminated, truncated, info["category"]) == (1, i == 9, False, "correct")
        assert info == {"category": "correct", "correct": True, "reported": True,
                        "recognized": True, "attempt": 1, "feedback": "",
                        "action": action.split("_")[0].split("(")[0], "cluster": info["cluster"],
                            "positions": len(env.rail)}


def test_prompt_lists_the_words_of_its_rule_and_nothing_else_differs(saved):
    path = saved([entry()])
    absolute, relative = (text(Navigation(rule=rule, routes=path).reset(0)[0]) for rule in RULES)
    assert "one of " + ", ".join(COMPASS) in absolute and "one of " + ", ".join(TURNS) in relative
    assert absolute.replace(", ".join(COMPASS), ", ".join(TURNS)) == relative
    assert "{" not in absolute.replace('{"current observation"', "")


def test_forward_points_are_kept_by_chance_and_away_from_both_ends(saved):
    """Fifths of a leg, each kept in half of the walks, over 8 m from both ends (PAPER.md)."""
    legs = [(0, 100, None), (90, 18, None), (180, 25, None), (90, 4, None),
            (0, 25, "The destination X Hall is on your left")]
    env, kept, walks = Navigation(routes=saved([entry(legs)])), Counter(), 1500
    for seed in range(walks):
        env.reset(seed)
        ends = [p.place for p in env.rail if p.action != "forward"]
        kept.update((p.leg, round(math.dist(p.place, ends[p.leg]), 1))
                    for p in env.rail if p.action == "forward")
        assert [p.action for p in env.rail if p.action != "forward"] == ["turn"] * 5 + ["stop"]
        assert [p.leg for p in env.rail] == sorted(p.leg for p in env.rail)
    assert set(kept) == {(0, 20.0), (0, 40.0), (0, 60.0), (0, 80.0), (2, 10.0), (2, 15.0),
                         (4, 10.0), (4, 15.0)}
    # 4 standard deviations
    assert all(abs(n / walks - 0.5) < 4 * 0.5 / walks ** 0.5 for n in kept.values())


# ----------------------------------------------------------- the rail: the oracle under both rules
@pytest.mark.parametrize("rule", RULES)
def test_expert_earns_one_point_per_position(rule):
    env = Navigation(rule=rule)
    for seed in range(1000):
        results = [result for *_, result in walk(env, seed)]
        assert [r[1] for r in results] == [1] * len(env.rail)
        assert [r[2] for r in results] == [False] * (len(results) - 1) + [True]
        assert not any(r[3] for r in results)


def test_both_rules_say_the_same_turn():
    """Previous heading + signed change = heading of the leg; the words fit what the geocodes
    say."""
    envs, actions = {rule: Navigation(rule=rule) for rule in RULES}, Counter()
    for seed in range(1000):
        for env in envs.values():
            env.reset(seed)
        rail, route = envs["absolute"].rail, official("train")[seed]
        assert rail == envs["relative"].rail
        assert envs["absolute"].instructions == envs["relative"].instructions
        points, leg, facing = milestones(route), -1, rail[0].heading
        assert math.dist(rail[0].place, points[0]) < 0.02 and rail[0].observation == NOTHING
        for i, p in enumerate(rail):
            for env in envs.values():
                env.at = i
            absolute, relative = envs["absolute"].action(), envs["relative"].action()
            actions[p.action] += 1
            assert p.heading == facing  # one looks where one went
            if p.action == "turn":
                leg += 1
                way, after = between(points[leg], points[leg + 1]), blocks(route)[leg][0]
                assert math.dist(p.place, points[leg]) < 0.05
                word = absolute.removeprefix("turn_direction(")[:-1]
                other = relative.removeprefix("turn_direction(")[:-1]
                assert word == nearest(COMPASS, way) and other == turn(p.heading, way)
                change = degrees_apart(p.heading, after) * (1 if "right" in other else -1)
                assert (p.heading + change) % 360 == after
                assert 15 <= abs(change) <= 38 if "slightly" in other else 52 <= abs(change) <= 165
                told = envs["absolute"].instructions[2 * leg]
                assert told == f"Turn {other} to face {word}."
                facing = after
            else:
                assert absolute == relative == f"{p.action}()"
                gone, left = math.dist(points[leg], p.place), math.dist(p.place, points[leg + 1])
                # on the street
                assert abs(gone + left - math.dist(points[leg], points[leg + 1])) < 0.05
                assert left < 0.05 if p.action == "stop" else gone > 7.95 and left > 7.95
            assert p.leg == leg
    share = {action: n / actions.total() for action, n in actions.items()}
    # PAPER.md
    assert all(abs(share[a] - about) < 0.05
               for a, about in (("forward", .62), ("turn", .32), ("stop", .06)))


def test_observations_name_the_landmark_of_the_milestone():
    env = Navigation()
    for seed in range(200):
        env.reset(seed)
        texts = [landmark for *_, landmark in blocks(official("train")[seed])]
        for p in env.rail:
            here = p.leg - (p.action == "turn")  # the milestone one has just reached
            if p.action == "forward" or here < 0:
                assert p.observation == NOTHING
            else:
                seen = f"{texts[here]}." if texts[here] else NOTHING
                assert p.observation == (f"{seen} {CROSSING}" if p.action == "turn" else seen)


@pytest.mark.parametrize("split", SIZES)
def test_what_is_told_can_be_seen_and_nothing_else_can_be_taken_for_it(split):
    """Within 16 m of a position stands the landmark that its observation names, and no other sign;
    what no text names cannot be read from the route (25 m); and only where one must stop is the
    destination's sign to be read on the side that was told.
    """
    env, others = Navigation(split=split), 0
    for seed in range(max(300, SIZES[split])):
        obs, _ = env.reset(seed)
        route, end = official(split)[seed % SIZES[split]], env.rail[-1]
        told = " ".join(landmark for *_, landmark in blocks(route) if landmark)
        sign = metres(route, route["dest_place"]["geocode"])
        side = nearest(SIDES, between(end.place, sign), end.heading)
        name = route["dest_place"]["name"]
        assert end.observation == f"The destination {name} is on your {side}."
        for x, y, name, _ in route["synthetic"]["signs"]:
            away = [math.dist(p.place, (x, y)) for p in env.rail]
            assert [name in p.observation for p in env.rail] == [a < 16 for a in away]
            if name not in told:
                assert name not in text(obs) and min(away) > 25
                others += 1
        for p in env.rail[:-1]:
            seen = nearest(SIDES, between(p.place, sign), p.heading)
            assert math.dist(p.place, sign) > 25 or seen != side
            assert p.leg != end.leg or math.dist(p.place, end.place) > 7.95
    assert others > 1000


# ---------------------------------------------------------------- rewards, worked out by hand
SEEN = f"{CAFE} {CROSSING}"
# at the fourth position of the worked example, under absolute directions
RIGHT = "turn_direction(northwest)"
WRONG_ACTION = "You failed this step: the action is wrong. Try again."
BOTH_WRONG = "You failed this step: the observation and the action are wrong. Try again."
ILLEGAL = "You failed this step: the action is not one of the actions. Try again."
NO_ACTION = 'You failed this step: no "action" was found in the answer. Try again.'
MISSEEN = [None, "", NOTHING, CROSSING, CAFE, f"{NOTHING} {CROSSING}",
           f"Red Cafe is on your right front. {CROSSING}",
           f"Blue Hotel is on your right front. {CROSSING}",
           f"Blue Cafe is on your right. {CROSSING}",
           f"Blue Cafe is on your left front. {CROSSING}",
           f"Blue Cafe is on your front. {CROSSING}",
           f"Blue Cafe is on your right behind. {CROSSING}",
           f"{CAFE} Red Bank is on your left. {CROSSING}", END, "x",
           f"{CAFE[:-1]}, no intersection here", f"{CAFE} There is no intersection.",
           f"{CAFE} You are not at an intersection", f"{CAFE} No landmarks or intersections else.",
           f"Move forward until the next intersection. {CAFE}",
           f"Big {CAFE} {CROSSING}", "You are at an intersection, Red Cafe is on your right front",
           "You are at an intersection, Blue Cafe is not on your right front",
           "You are at an intersection with a cafe", f"{CROSSING} Blue Cafe is near.",
           f"Blue Cafe is on your left, Blue Cafe is on your right front. {CROSSING}"]
WELL_SEEN = [SEEN, SEEN.upper(), SEEN.lower(), f"{CROSSING} {CAFE}", f" {CAFE}\n{CROSSING}",
             SEEN[:-1],
             "blue cafe is on your right front. I stand at an intersection",
             "Blue Cafe is on your right front, and you are at an intersection",
             "You are at an intersection, Blue Cafe is on your right front.",
             "You are at an intersection and the Blue Cafe is on the right front",
             "You are at a four-way intersection: Blue Cafe is located on your front right side",
             "You are at an intersection where the Blue Cafe is to your right-front.",
             "I see that the Blue Cafe is on the right front, at an intersection.",
             f"{CAFE[:-1]}; You observe an intersection"]  # the official wording


@pytest.fixture
def at_cafe(saved):
    """Makes environments that stand at the fourth position of the worked example."""
    path = saved([entry()])

    def make(**options):
        env = Navigation(**{"routes": path, **options})
        stand(env, 0, 2, 1, 3)
        for _ in range(3):
            env.step(env.expert())
        assert env.rail[env.at].observation == SEEN
        return env

    return make


@pytest.mark.parametrize("observation", [*WELL_SEEN, *MISSEEN], ids=repr)
def test_right_action_pays_whatever_was_reported(at_cafe, observation):
    _, reward, terminated, truncated, info = at_cafe().step(said(RIGHT, observation))
    assert (reward, terminated, truncated) == (1, False, False)
    assert (info["category"], info["feedback"]) == ("correct", "")
    assert info["correct"] and info["recognized"] == (observation in WELL_SEEN)
    assert info["action"] == "turn"


CASES = [  # action of the answer, whether the observation is right, reward, category, feedback
    ("forward()", True, -1, "wrong_action", WRONG_ACTION),
    ("forward()", False, -1.5, "wrong_observation", BOTH_WRONG),
    ("stop()", True, -1, "wrong_action", WRONG_ACTION),
    ("stop()", False, -1.5, "wrong_observation", BOTH_WRONG),
    # right at the sixth position
    ("turn_direction(north)", True, -1, "wrong_action", WRONG_ACTION),
    ("turn_direction(northeast)", True, -1, "wrong_action", WRONG_ACTION),  # right at the first
    ("turn_direction(west)", False, -1.5, "wrong_observation", BOTH_WRONG),
    *((action, seen, -1 if seen else -1.5, "illegal", feedback) for seen in (True, False)
      for action, feedback in (
        ("turn_direction(left)", ILLEGAL),  # right, but of the other rule
        ("turn_direction()", ILLEGAL), ("turn_direction", ILLEGAL), ("northwest", ILLEGAL),
        ("forward(), stop()", ILLEGAL), ("forward() stop()", ILLEGAL), ("forward(stop)", ILLEGAL),
        ("turn_direction(northwest, north)", ILLEGAL), ("turn_direction(forward)", ILLEGAL),
        (f"{RIGHT}; {RIGHT}", ILLEGAL), ("turn_direction(northwest", ILLEGAL), (".", ILLEGAL),
        ("x" * 500, ILLEGAL), ("", NO_ACTION),
        ("  ", NO_ACTION), (None, NO_ACTION),
        (4, NO_ACTION), (["stop()"], NO_ACTION), ({"action": None}, NO_ACTION)))]


@pytest.mark.parametrize("action, seen, reward, category, feedback", CASES, ids=str)
def test_reward_and_message_of_a_wrong_action(at_cafe, action, seen, reward, category, feedback):
    for observation in WELL_SEEN[:7] if seen else MISSEEN[:15]:
        env, answer = at_cafe(), said(action, observation)
        # the last one costs a point more
        for extra, attempt, last in ((0, 1, False), (-1, 2, True)):
            obs, got, terminated, truncated, info = env.step(answer)
            assert (got, terminated, truncated) == (reward + extra, False, last)
            assert info == {"category": category, "correct": False, "recognized": seen,
                            "reported": isinstance(observation, str), "attempt": attempt,
                            "action": "turn", "feedback": feedback, "cluster": info["cluster"],
                            "positions": len(env.rail)}
            assert obs["messages"][-1] == {"role": "user", "content": feedback}
        with pytest.raises(RuntimeError):
            env.step(env.expert())


def test_reports_where_there_is_nothing_to_see(at_cafe):
    env = at_cafe(verify_iters=100)
    env.step(env.expert())
    for observation, seen in ((NOTHING, True), ("", True), ("A street.", True), (CROSSING, False),
                              ("no intersection here", True), ("Not at an intersection.", True),
                              ("There is no intersection and no landmark", True),
                              ("There isn't an intersection", True),
                              ("No landmarks or intersections nearby", True),
                              ("No landmark is in front of you", True),
                              ("No landmark is on your left", True),
                              ("No landmarks, but I am at an intersection", False),
                              ("There are no landmarks at this intersection.", False),
                              (SEEN, False), (CAFE, False),
                              (None, False)):
        _, reward, *_, info = env.step(said("stop()", observation))
        assert reward == (-1 if seen else -1.5), observation
        assert (info["recognized"], info["action"]) == (seen, "forward"), observation


@pytest.mark.parametrize("words, side", [
    ("on your left behind", "left behind"), ("to your rear left", "left behind"),
    ("on my right back", "right behind"), ("at the front right", "right front"),
    ("behind you", "behind"), ("in front of me", "front"),
])
def test_side_is_known_by_other_words_in_any_order(words, side):
    assert virl.sightings(f"Blue Cafe is {words}.") == ({("blue cafe", side)}, False)


def test_destination_may_be_called_so_or_by_its_name(at_cafe):
    env = at_cafe(verify_iters=100)
    while env.rail[env.at].action != "stop":
        env.step(env.expert())
    for observation, seen in ((END, True), ("Town Hall is on your left.", True),
                              ("the destination town hall is on your left", True),
                              ("Town Hall is on your left front.", False),
                              ("The destination is on your left.", False),
                              ("You are at the destination, Town Hall is on your left.", True),
                              ("The destination, Town Hall, is on the left", True),
                              (f"{END} {CROSSING}", False), (NOTHING, False)):
        assert env.step(said("forward()", observation))[4]["recognized"] is seen, observation


@pytest.mark.parametrize("rule", RULES)
def test_verdicts_never_tell_the_right_action(at_cafe, rule):
    env, verdicts = at_cafe(rule=rule, verify_iters=100), set()
    for action in ["forward()", "stop()", "x", None,
                   *(f"turn_direction({w})" for w in RULES[rule])]:
        for observation in (SEEN, NOTHING):
            if action != env.action():
                verdicts.add(env.step(said(action, observation))[4]["feedback"])
    assert verdicts == {WRONG_ACTION, BOTH_WRONG, ILLEGAL, NO_ACTION}
    assert not any(re.search(r"north|south|east\b|west|left|right|slight|forward|stop|turn",
                             v.lower()) for v in verdicts)


@pytest.mark.parametrize("rule, other", [("absolute", "relative"), ("relative", "absolute")])
def test_every_other_word_is_rejected_at_every_turn(rule, other):
    env, turns = Navigation(rule=rule, verify_iters=100), 0
    for seed in range(60):
        env.reset(seed)
        for p in list(env.rail):
            for word in [w for w in RULES[rule] if f"turn_direction({w})" != env.action()]:
                _, reward, *_, info = env.step(said(f"turn_direction({word})", p.observation))
                assert (reward, info["category"]) == (-1, "wrong_action")
            for word in RULES[other]:
                _, reward, *_, info = env.step(said(f"turn_direction({word})", p.observation))
                assert (reward, info["category"]) == (-1, "illegal")
            turns += p.action == "turn"
            assert env.step(env.expert())[1] == 1
    assert turns > 200


@pytest.mark.parametrize("action",
                         ["TURN_DIRECTION(NORTHWEST)", " turn_direction( Northwest ) ",
                          "turn_direction(north west)",
                                    "Turn_Direction (northwest)\n", "turn_direction(\tnorthwest)"])
def test_case_and_spaces_of_an_action_do_not_matter(at_cafe, action):
    assert at_cafe().step(said(action))[1] == 1


@pytest.mark.parametrize("action", [
    "turn_direction('northwest')", 'turn_direction("northwest")', f"{RIGHT};", f"{RIGHT}.",
    f" {RIGHT} ; ", f"`{RIGHT}`", "turn_direction(north-west)", "turn_direction(north_west)",
    "turn_direction(x=northwest)", "turn_direction(direction='northwest').",
    "turn direction (northwest)", "turn_direction northwest"])
def test_spelling_of_a_turn_does_not_matter(at_cafe, action):
    assert at_cafe().step(said(action))[1] == 1
    other = action.replace("northwest", "south").replace("north-west", "south-east")
    other = other.replace("north_west", "south_east")
    _, reward, *_, info = at_cafe().step(said(other, SEEN))
    assert (reward, info["category"]) == (-1, "wrong_action")


def test_forward_and_stop_may_lack_their_brackets():
    env = Navigation()
    for seed in range(5):
        env.reset(seed)
        for position in list(env.rail):
            spelt = {"forward": "Forward;", "stop": "stop."}.get(position.action, env.action())
            assert env.step(said(spelt))[1] == 1


@pytest.mark.parametrize("action",
                         ["turn_direction(slightly left)", "turn_direction(slightlyleft)",
                          "Turn_Direction(Slightly  Left)"])
def test_slight_turns_are_words_of_their_own(saved, action):
    path = saved([entry([(350, 60, None), (20, 50, END[:-1])], init=10)])
    env = Navigation(rule="relative", routes=path)
    env.reset(0)
    assert env.step(said("turn_direction(left)", NOTHING))[1] == -1
    assert env.step(said(action))[1] == 1


ANSWER = '"current observation": "%s", "current instruction": "x", "action": "%s"' % (SEEN, RIGHT)
MISTAKEN = ANSWER.replace(RIGHT, "stop()")


@pytest.mark.parametrize("frame", [
    "{%s}", "{%s,}", "%s", "{%s", "Let me see.\n```json\n{%s}\n```\nThat is it!",
    "{%s} or else {\"action\": \"forward()\"}",
    "[{%s}]", "\n\n  {%s}  ", "{\"output\": {%s}}", "{\"thoughts\": \"left?\", \"output\": {%s}}",
    "{\"output\": {%s},}", "{\"a\": {\"b\": {%s}}}"], ids=repr)
@pytest.mark.parametrize("quote", '"\'')
def test_nearly_json_is_read(at_cafe, frame, quote):
    env = at_cafe()
    _, reward, *_, info = env.step(frame % MISTAKEN.replace('"', quote))
    assert (reward, info["recognized"]) == (-1, True)
    spread = ANSWER.replace('"', quote).replace(": ", "\t:\n ").replace(", ", "\n,\n")
    _, reward, *_, info = env.step(frame % spread)
    assert (reward, info["recognized"]) == (1, True)


def test_first_action_counts_in_nearly_json(at_cafe):
    assert at_cafe().step("{%s} no, {%s}" % (MISTAKEN, ANSWER))[1] == -1


@pytest.mark.parametrize("key", ["Action", "ACTION"])
def test_keys_may_be_spelt_otherwise(at_cafe, key):
    observed = f'"current_observation": "{SEEN}"'
    for end in "}", ",}":  # JSON, and nearly so
        _, reward, *_, info = at_cafe().step(f'{{{observed}, "{key}": "{RIGHT}"{end}')
        assert (reward, info["recognized"]) == (1, True)


def test_own_keys_count_before_those_within_and_first_ones_before_later_ones(at_cafe):
    for answer, reward in (('{"output": {"action": "stop()"}, "action": "%s"}', 1),
                           ('{"a": {"action": "%s"}, "b": {"action": "stop()"}}', 1),
                           ('{"action": "%s", "action": "stop()"}', 1),
                           ('{"action": "stop()", "action": "%s"}', -1.5),
                           ('{"output": "{\\"action\\": \\"%s\\"}"}', 1)):
        assert at_cafe().step(answer % RIGHT)[1] == reward, answer


@pytest.mark.parametrize("answer",
                         ["", "I do not know.", "{}", "[]", "null", "4", '"action"', RIGHT,
                          '{"output": {}}', '{"output": {"action": null}}',
                          '{"reaction": "stop()"}'])
def test_no_action_says_so(at_cafe, answer):
    _, reward, *_, info = at_cafe().step(answer)
    assert (reward, info["category"], info["feedback"]) == (-1.5, "illegal", NO_ACTION)


# ---------------------------------------------------------------- attempts
@pytest.mark.parametrize("verify_iters", (1, 2, 3))
def test_last_allowed_answer_ends_the_walk(verify_iters):
    env = Navigation(verify_iters=verify_iters)
    with pytest.raises(RuntimeError):  # nothing to answer before reset
        env.step("x")
    env.reset(0)
    for attempt in range(1, verify_iters + 1):
        _, reward, terminated, truncated, info = env.step(said("stop()", NOTHING))
        last = attempt == verify_iters
        assert (reward, terminated, truncated, info["attempt"]) == (-1 - last, False, last, attempt)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            env.step(env.expert())
    env.reset(0)
    for p in list(env.rail):
        for _ in range(verify_iters - 1):
            assert env.step(said("x", p.observation))[1:4] == (-1, False, False)
        assert env.step(env.expert())[1:4] == (1, p.action == "stop", False)


def test_right_second_answer_goes_on_in_a_fresh_conversation():
    for seed in range(20):
        env = Navigation()
        obs, info = env.reset(seed)
        first, at_last = text(obs), info["positions"] - 1
        for i in range(info["positions"]):
            wrong = env.mistake()
            obs, reward, *_, info = env.step(wrong)
            assert reward in (-1, -1.5) and info["attempt"] == 1
            turns = [(m["role"], m["content"]) for m in obs["messages"]]
            assert turns[1:] == [("assistant", wrong), ("user", info["feedback"])]
            assert text(obs).startswith(first[:200])
            obs, reward, terminated, truncated, info = env.step(env.expert())
            assert (reward, terminated, truncated, info["attempt"]) == (1, i == at_last, False, 2)
            if not terminated:
                (message,) = obs["messages"]
                assert message["role"] == "user" and wrong not in text(obs)
                assert "failed" not in text(obs)
                assert len(history(obs)) == i + 2
        with pytest.raises(RuntimeError):
            env.step(env.expert())


def test_earlier_observations_do_not_change():
    env = Navigation()
    obs, _ = env.reset(0)
    kept = copy.deepcopy(obs["messages"])
    env.step("x \ud800 {words}")
    assert obs["messages"] == kept


# ------------------------------------------------------------ expert, mistakes, reference policies
@pytest.mark.parametrize("options",
                         [dict(rule=rule, split=split) for rule in RULES
                          for split in ("train", "mini")]
                         + [dict(milestones=[1, 1]), dict(milestones=[8, 8], rule="relative")],
                         ids=str)
def test_experts_are_right_and_mistakes_wrong(options):
    env, kinds = Navigation(**options, verify_iters=100), Counter()
    for seed in range(40):
        env.reset(seed)
        for _ in list(env.rail):
            for _ in range(3):
                mistake = env.mistake()
                _, reward, *_, info = env.step(mistake)
                kinds[info["category"]] += 1
                assert reward == {"wrong_action": -1, "wrong_observation": -1.5}[info["category"]]
                read = json.loads(mistake)
                assert list(read) == ["current observation", "current instruction", "action"]
                assert read["action"] in {"forward()", "stop()",
                                          *(f"turn_direction({w})" for w in RULES[env.rule])}
                assert read["current instruction"] in env.instructions
            assert env.expert() == env.expert() and list(json.loads(env.expert())) == list(read)
            assert env.step(env.expert())[1] == 1
    # now and then what is there is seen
    assert min(kinds["wrong_action"], kinds["wrong_observation"]) > 40


def follow(env, seed, name):
    """(steps: list of (position's action, attempt, correct), whether it arrived) of a reference
    policy."""
    env.reset(seed)
    steps, done = [], False
    while not done:
        _, _, arrived, lost, info = env.step(env.reference(name))
        steps.append((info["action"], info["attempt"], info["correct"]))
        done = arrived or lost
    return steps, arrived


def first_right(walks, kind, start=0):
    """Share of positions of a kind, from the start-th step of a walk on, whose first answer was
    right."""
    right = [correct for steps, _ in walks
             for k, attempt, correct in steps[start:] if k == kind and attempt == 1]
    return sum(right) / len(right)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ("words", "pictures", "hidden"))
def test_reference_policies(rule, mode, sketch):
    env = Navigation(rule=rule, split="unseen", image_size=None if mode == "words" else 64,
                     hide_intersection_text=mode == "hidden")
    assert env.references == ("always forward", "copy the compass word", "copy the relative word",
                              "blind")
    walks = {name: [follow(env, seed, name) for seed in range(200)] for name in env.references}
    copies = {"absolute": "copy the compass word", "relative": "copy the relative word"}
    for other, name in copies.items():
        if other == rule:
            assert all(arrived and all(s[1:] == (1, True) for s in steps)
                       for steps, arrived in walks[name])
        else:  # the walk ends at its first turn, which is at its start
            assert all(steps == [("turn", 1, False), ("turn", 2, False)] and not arrived
                       for steps, arrived in walks[name])
    assert all(steps == [("turn", 1, False), ("turn", 2, False)]
               for steps, _ in walks["always forward"])
    blind = walks["blind"]
    assert all(arrived for _, arrived in blind)  # within two attempts, without looking
    assert first_right(blind, "stop") == 0 and first_right(blind, "forward") == 1
    assert all(steps[0] == ("turn", 1, True) for steps, _ in blind)
    assert first_right(blind, "turn", start=1) == (0 if mode == "hidden" else 1)
    # what they report of a picture is what the text says
    for seed in range(20 if mode != "words" else 0):
        obs, _ = env.reset(seed)
        while not env.done:
            told = NOTHING + f" {CROSSING}" * (CROSSING in history(obs)[-1][0])
            assert {json.loads(env.reference(n))["current observation"]
                    for n in ("always forward", "blind")} == {told}
            obs, *_ = env.step(env.expert())


@pytest.mark.parametrize("name", ("nonsense", "", None, "copy", ["blind"]))
def test_unknown_reference_is_named(name):
    env = Navigation()
    env.reset(0)
    with pytest.raises(ValueError, match="^reference: .* is none of always forward, "):
        env.reference(name)


def test_what_an_evaluation_shows():
    words, pictures = Navigation(), Navigation(image_size=64)
    assert [r[2] for r in words.reports] == [("first", "per_step"), ("positions",),
                                             ("first_forward", "first_stop", "first_turn"),
                                             ("solved",)]
    assert pictures.reports[:4] == words.reports
    assert [r[0] for r in pictures.reports[4:]] == ["recognition"]
    assert pictures.reports[4][2] == ("reported", "recognized_if_reported", "recognized")
    assert words.answer_key == '"action"'


# ---------------------------------------------------------------- pictures
def test_pictures_take_the_place_of_the_newest_observation_only(sketch):
    """Same seed: the same rail under both rules, with and without picture, in any city; only the
    newest observation differs."""
    looks = [dict(image_size=64), dict(image_size=64, hide_intersection_text=True),
             dict(image_size=64, city="Lagos")]
    for rule in RULES:
        envs = [Navigation(rule=rule, split="unseen", **look) for look in ({}, *looks)]
        for seed in range(40):
            walks = [list(walk(env, seed)) for env in envs]
            rails = [env.rail for env in envs] + [Navigation(rule="absolute", split="unseen")]
            rails[-1].reset(seed)
            assert all(rail == rails[0] for rail in rails[1:-1]) and rails[-1].rail == rails[0]
            for (i, p, words, _), *others in zip(*walks):
                for (_, _, seen, _), look in zip(others, looks):
                    (message,) = seen["messages"]
                    assert [part["type"] for part in message["content"]] == ["image", "text"]
                    assert seen["image"].size == (64, 64)
                    past, (newest, _) = history(seen)[:-1], history(seen)[-1]
                    # what was seen before is told in words
                    assert past == history(words)[:-1] and len(past) == i
                    assert newest.startswith("The picture shows the views to your front and right "
                                             "(top), back and left (bottom).")
                    told = CROSSING in newest
                    assert told == (p.action == "turn" and i > 0
                                    and "hide_intersection_text" not in look)
                    assert "is on your" not in newest and "landmark" not in newest
                    assert text(seen).replace(f" {newest}\n", f" {p.observation}\n") == text(words)
                    assert words["image"] is None


def test_picture_is_drawn_from_where_one_stands(sketch):
    env = Navigation(split="mini", image_size=96)
    for seed in (0, 5):
        sketch.clear()
        rail = [p for _, p, *_ in walk(env, seed)]
        assert [args[1:] for args in sketch] == [(*p.place, p.heading, 96) for p in rail]
        extra = official("mini")[seed]["synthetic"]
        for scene, *_ in sketch:
            assert [list(n) for n in scene.nodes] == [list(n) for n in extra["nodes"]]
            signs = [(s.x, s.y, s.name, s.category) for s in scene.signs]
            assert signs == [tuple(s) for s in extra["signs"]]
            assert scene.city == extra["city"] and scene.seed == extra["key"]
    sketch.clear()
    Navigation(split="mini", image_size=96, city="Lagos").reset(5)
    ((scene, *_),) = sketch
    assert scene.city == "Lagos" and scene.seed == extra["key"]
    assert len(scene.signs) == len(extra["signs"])


def test_one_picture_per_position(sketch):
    env = Navigation(image_size=64)
    obs, _ = env.reset(0)
    previous = None
    for _ in list(env.rail):
        picture = obs["image"]
        assert picture is not previous
        obs, *_ = env.step(env.mistake())
        assert obs["image"] is picture
        assert all(isinstance(m["content"], str) for m in obs["messages"][1:])
        previous = picture
        obs, *_ = env.step(env.expert())
    assert len(sketch) == len(env.rail)


def test_same_seed_same_pixels_and_another_city_other_pixels():
    def look(seed, **options):
        env = Navigation(image_size=64, **options)
        obs, _ = env.reset(seed)
        shown = [(text(obs), obs["image"].tobytes())]
        for _ in range(3):
            obs, *_ = env.step(env.expert())
            shown.append((text(obs), obs["image"].tobytes()))
        assert obs["image"].size == (64, 64) and obs["image"].mode == "RGB"
        return shown

    first = look(4)
    assert look(4) == look(4, rule="absolute", city="New York") == first
    assert len({pixels for _, pixels in first}) == 4
    for city in list(streets.CITIES)[1:]:
        for (words, pixels), (other_words, other) in zip(first, look(4, city=city)):
            assert words == other_words and pixels != other
    assert [p for _, p in look(4, rule="relative")] == [p for _, p in first]
    assert look(5) != first


def test_real_views_are_shown_and_checked_once(saved, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(panoramas, "panorama_views", lambda picture, yaw,
                        size: asked.append((yaw, size)) or Image.new("RGB", (size, size)))
    for name in "ab":
        Image.new("RGB", (64, 32)).save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.metadata.json").write_text('{"rotation": 10}')
    rows = ["{},{},a".format(*geocode(40.7, -74.0, x, y)) for x, y in STOPS]
    (tmp_path / "panoramas.csv").write_text("\n".join(["lat,lng,pano_id", *rows[:-1]]))
    path = saved([FAR])
    with pytest.raises(ValueError, match="^panoramas: route .*json.0: .* has none within 20 m"):
        Navigation(routes=path, image_size=64, panoramas=str(tmp_path))
    (tmp_path / "panoramas.csv").write_text("\n".join(["lat,lng,pano_id", *rows]))
    envs = [Navigation(routes=path, image_size=64, panoramas=str(tmp_path)) for _ in range(2)]
    assert envs[0]._panoramas is envs[1]._panoramas
    for _, _, obs, _ in walk(envs[0], 0):
        assert obs["image"].size == (64, 64)
    assert asked == [(p.heading - 180 + 10, 64) for p in envs[0].rail]


# ---------------------------------------------------------------- which walk a seed determines
@pytest.mark.parametrize("split", SIZES)
def test_successive_seeds_take_successive_routes(split):
    env = Navigation(split=split)
    for start in (0, 7 * SIZES[split], 10**9):
        keys = [env.reset(seed)[1]["cluster"] for seed in range(start, start + SIZES[split])]
        assert len(set(keys)) == SIZES[split]
    first = official(split)[0]["synthetic"]["key"]
    assert env.reset(0)[1]["cluster"] == env.reset(SIZES[split])[1]["cluster"] == first


def test_each_walk_along_a_route_starts_and_pauses_elsewhere():
    env, starts, rails = Navigation(split="mini"), set(), set()
    for k in range(60):
        env.reset(18 * k)
        starts.add(env.rail[0].heading)
        rails.add(tuple(p.place for p in env.rail))
        deltas = degrees_apart(env.rail[0].heading, blocks(official("mini")[0])[0][0])
        assert 15 <= deltas <= 38 or 52 <= deltas <= 165
    assert len(starts) > 30 and len(rails) > 20


@pytest.mark.parametrize("fewest, most", [(1, 1), (2, 3), (8, 8)])
def test_milestones_decide_the_length(fewest, most):
    env = Navigation(milestones=[fewest, most])
    assert {len(env.route.headings)
            for seed in range(40) if env.reset(seed)} == set(range(fewest, most + 1))


EPISODES = """
import hashlib, json, virl
log = []
for options in (dict(rule="relative"), dict(split="mini", image_size=64)):
    env = virl.Navigation(**options)
    for seed in (0, 1, 12345):
        obs, info = env.reset(seed)
        log += [info, obs["messages"], env.mistake(), env.mistake()]
        log += [hashlib.sha256(obs["image"].tobytes()).hexdigest()] if obs["image"] else []
        log += [env.step(env.expert())[1:], env.step(env.mistake())[0]["messages"]]
print(len(log), hashlib.sha256(json.dumps(log).encode()).hexdigest())
"""


def test_same_seed_same_walk_to_the_byte_in_any_process():
    one, two = (subprocess.run([sys.executable, "-c", EPISODES], cwd=ROOT,
                               env={**os.environ, "PYTHONHASHSEED": seed}, timeout=60,
                               capture_output=True, text=True) for seed in "12")
    assert one.stdout == two.stdout and int(one.stdout.split()[0]) > 30, one.stderr


def test_same_seed_same_walk_whatever_happened_before():
    env, other = Navigation(), Navigation()

    def play(e, seed):
        return e.reset(seed), e.step(e.mistake()), e.step(e.expert()), list(e.rail)

    walks = [play(env, seed) for seed in range(20)]
    other.reset(99)
    other.mistake()
    assert [play(other, seed) for seed in reversed(range(20))][::-1] == walks


def test_global_random_state_is_neither_read_nor_moved():
    starts = []
    for global_seed in (1, 2):
        random.seed(global_seed)
        before, env = random.getstate(), Navigation(image_size=64)
        made = json.dumps(routes.make_route("unseen", 3))
        starts.append((env.reset(5)[0]["image"].tobytes(), made, env.mistake()))
        assert random.getstate() == before
    assert starts[0] == starts[1]


# ---------------------------------------------------------------- the official file
def walked(env, seeds):
    """All that is said along the expert's walks."""
    return [[(text(obs), p, result[1:]) for _, p, obs, result in walk(env, seed)] for seed in seeds]


def test_exported_routes_are_walked_as_the_split(saved, sketch):
    for split in ("train", "mini"):
        routes = official(split)[:18]
        scenes = []
        for options in (dict(split=split), dict(routes=saved([routes, 18])),
                        dict(routes=saved(routes))):
            sketch.clear()
            scenes.append((walked(Navigation(**options), range(18)),
                           walked(Navigation(**options, image_size=64), range(3)),
                           [(vars(scene), *rest) for scene, *rest in sketch]))
        assert scenes[0] == scenes[1] == scenes[2] and len(scenes[0][2]) > 20
    env = Navigation(routes=saved([official("train")[:5], 5]))
    # it is a cache's key
    assert [env.reset(seed) and env.route.scene for seed in (2, 7, 12)] == [env.route.scene] * 3
    third = official("train")[2]["synthetic"]["key"]
    assert env.reset(7)[1]["cluster"] == env.reset(2)[1]["cluster"] == third


def test_two_routes_are_no_pair_of_routes_and_a_number(saved):
    env = Navigation(routes=saved([entry(), entry(init=80)]))
    assert [env.reset(seed) and env.rail[0].heading for seed in range(4)] == [75, 80, 75, 80]
    assert len({env.reset(seed)[1]["cluster"] for seed in range(4)}) == 2


NAMES = ['Joe\'s "Best" Bar', "Cafe {Paris}", "Bar }", "Salt and Pepper, the Diner", "A: B",
         "Ü 5 €"]


@pytest.mark.parametrize("name", NAMES)
def test_official_names_may_hold_anything(saved, name):
    """Quotes, braces, colons: seen and reported, in JSON and nearly so."""
    legs = [(29, 60, f"{name} is on your right front"), (299, 40, END[:-1])]
    env = Navigation(routes=saved([entry(legs)]), verify_iters=3)
    for _, position, _, (_, reward, *_, info) in walk(env, 0):
        assert (reward, info["recognized"]) == (1, True)
        named = name in position.observation
        assert named == (position.action == "turn" and position.leg == 1)
    assert f"where {name} is on your right front." in env.instructions[1]
    env.reset(0)
    while name not in env.rail[env.at].observation:
        env.step(env.expert())
    for report in (f"You are at an intersection, {name} is on the right front.",
                   f"The {name} is on your right front and you are at an intersection"):
        answer = said("stop()", report)
        assert env.step(answer)[4]["recognized"] and env.step(f"```{answer}```")[4]["recognized"]
        env.step(env.expert())
        env.reset(0)
        while name not in env.rail[env.at].observation:
            env.step(env.expert())


def test_given_routes_are_what_is_played(saved):
    path = saved([entry()])
    *_, folder, name = Path(path).parts
    assert Navigation(routes=path, split="unseen").playing == f"routes {folder}/{name}"
    assert Navigation().playing is None


def test_any_integer_is_a_seed_of_its_own():
    env = Navigation()

    def start(seed):
        obs, info = env.reset(seed)
        return text(obs), info, env.rail, env.mistake()

    seeds = [*range(-30, 30), 10 ** 30, -10 ** 30, 2 ** 63]
    assert len({str(start(seed)) for seed in seeds}) == len(seeds)
    for kind in (np.int64, np.int8, np.uint8):
        assert start(kind(5)) == start(5)
    assert start(np.int64(-5)) == start(-5)
    for wrong in (None, 5.0, "5"):
        with pytest.raises(TypeError):
            env.reset(wrong)


def test_start_heading_is_drawn_when_the_file_has_none(saved):
    env, drawn = Navigation(routes=saved([entry(init=0)])), set()
    for seed in range(200):
        env.reset(seed)
        drawn.add(env.rail[0].heading)
        word = turn(env.rail[0].heading, vector(29))
        assert env.instructions[0] == f"Turn {word} to face northeast."
    assert len(drawn) > 80 and {turn(h, vector(29)) for h in drawn} == set(TURNS)
    assert all(15 <= degrees_apart(h, 29) <= 38 or 52 <= degrees_apart(h, 29) <= 165 for h in drawn)
    env = Navigation(routes=saved([entry(init=359.7)]))  # 360 is north, not "draw one"
    assert {env.rail[0].heading for seed in range(20) if env.reset(seed)} == {0}


def test_damaged_file_is_named_as_the_argument(saved):
    path = saved([[entry(), entry(init="75")], 2])
    with pytest.raises(ValueError, match=f"^routes: {re.escape(path)}: route 1: init_heading"):
        Navigation(routes=path)


ANY_TEXT = st.text(st.characters())  # lone surrogates and control characters included
ANY_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
                        lambda x: st.lists(x, max_size=5)
                        | st.dictionaries(ANY_TEXT, x, max_size=5), max_leaves=12)


def paths(data, path=()):
    """Every path into nested lists and dicts."""
    yield path
    if isinstance(data, (list, dict)):
        for key in data if isinstance(data, dict) else range(min(len(data), 4)):
            yield from paths(data[key], (*path, key))


TEMPLATE = [entry(), routes.make_route("mini", 3)]
PATHS = [p for p in paths(TEMPLATE) if p]


@FUZZ
@given(where=st.sampled_from(PATHS), value=st.just(...) | ANY_JSON, scramble=st.tuples(
    st.integers(0, 600), st.integers(0, 40),
    st.sampled_from(["", "{", "}", '"', ":", "-", "{}", "0", "None"]) | ANY_TEXT))
def test_mutated_route_files_load_or_say_what_is_wrong(tmp_path_factory, where, value, scramble):
    data = copy.deepcopy(TEMPLATE)
    at = data
    for key in where[:-1]:
        at = at[key]
    if where[-1] == "milestone_info":
        start, length, new = scramble
        info = at["milestone_info"]
        at["milestone_info"] = info[:start] + new + info[start + length:]
    elif value is ...:
        del at[where[-1]]
    else:
        at[where[-1]] = value
    # another one each time: files are read once
    path = tmp_path_factory.mktemp("fuzz") / "routes.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    try:
        env = Navigation(routes=str(path))
    except ValueError as error:
        field = (r"route [01]: (start_place|route_results|milestone_info|init_heading|synthetic)|"
                 "holds no list of routes")
        assert re.match(f"routes: {re.escape(str(path))}: ({field})", str(error)), error
        return
    for seed in range(2):
        assert [result[1] for *_, result in walk(env, seed)] == [1] * len(env.rail)


# ---------------------------------------------------------------- whatever a model may write
def check_any_answer(answer):
    """No exception; both attempts pay what the table allows; a failure is explained in bounded
    words and bounded time."""
    env = Navigation()
    env.reset(3)
    start = time.process_time()
    for allowed in ({1, -1, -1.5}, {1, -2, -2.5}):
        obs, reward, terminated, truncated, info = env.step(answer)
        assert reward in allowed and not terminated and truncated == (reward < -1.5)
        assert info["category"] in ("correct", "wrong_action", "wrong_observation", "illegal")
        if reward == 1:
            assert len(obs["messages"]) == 1
            return
        assert info["feedback"] in (WRONG_ACTION, BOTH_WRONG, ILLEGAL, NO_ACTION)
        assert obs["messages"][-2] == {"role": "assistant", "content": answer}
    assert time.process_time() - start < 0.5


ACTIONS = st.sampled_from(["forward()", "stop()", "turn_direction(", ")", "north", "left", " ",
                           "\n", "FORWARD()"])
SIGHTS = st.lists(st.sampled_from(["Blue Cafe", " is on your ", "left", "right front", ". ", "; ",
                                   CROSSING, "the destination ",
                                   "intersection", "\n"]), max_size=8).map("".join)
NEAR_JSON = st.lists(st.sampled_from(['"action"', "'action'", '"current observation"', '"', "'",
                                      ":", "[", "]", "{", "}", ",",
                                      "\n", "\\", "forward()", "stop()"]), max_size=30).map("".join)


@FUZZ
@given(ANY_TEXT | NEAR_JSON | ANY_JSON.map(json.dumps) | st.fixed_dictionaries({}, optional={
    "current observation": SIGHTS | ANY_JSON, "current instruction": ANY_JSON,
    "action": st.lists(ACTIONS, max_size=4).map("".join) | ANY_JSON}).map(json.dumps))
def test_any_answer_is_graded(answer):
    check_any_answer(answer)
    check_any_answer(answer[:-1] + ",}")


N = 1_000_000
HUGE = {
    "letters": "a" * N, "brackets": "[" * N, "braces": '{"a":' * (N // 5),
    "quotes": "\"'" * (N // 2), "nul": "\0" * N,
    "open actions": '"action": "' * (N // 11), "keys only": '"action"' * (N // 8),
    "spaces": '"action"' + " " * N + ":",
    "spaced actions": ('"action"  :' + " " * 90 + "[") * (N // 102), "escapes": '"' + "\\" * N,
    "long action": json.dumps({"action": "forward()" * (N // 9)}),
    "long word": json.dumps({"action": "f" * N}),
    "sights": json.dumps({"action": "x", "current observation": "a is on your left. " * (N // 19)}),
    "sights without a side": json.dumps({"action": "x",
                                         "current observation": "a is on your " * (N // 13)}),
    "dots": json.dumps({"action": "x", "current observation": "." * (N // 10)}),
    "integer": '{"action": ' + "9" * N + "}",
    "integer at Python's digit limit": '{"action": ' + "9" * 4301 + "}",
    "exponent": '{"action": 1e' + "9" * 5000 + "}",
    "answer far behind": " " * N + "{" + ANSWER + "}"}


@pytest.mark.parametrize("name", HUGE)
def test_huge_answers_are_graded_in_bounded_time(name):
    check_any_answer(HUGE[name])


@pytest.mark.parametrize("depths", (range(1, 60), range(100, 4990, 97), range(930, 1010)), ids=str)
def test_nesting_at_any_depth_is_graded(depths):
    env = Navigation(verify_iters=1)
    for depth in depths:
        nested = "[" * depth + "]" * depth
        for answer in (f'{{"action": {nested}}}', '{"action":' * depth + "[]" + "}" * depth,
                       f'{{"current observation": {nested}, "action": "stop()"}}'):
            env.reset(3)
            assert env.step(answer)[1] == -2.5


def test_soak_runs_and_can_fail(monkeypatch, capsys):
    """An exception, a slow answer, a right one refused, a broken file read: each is a failure."""
    monkeypatch.setattr(soak_answers, "ROUTE_FILES", 20)
    assert soak_answers.main(["300"]) == 0
    every = len(list(soak_answers.malformed_files(random.Random(0))))
    assert every > 150 and soak_answers.Soak().route_files(every) is None
    assert "FAILED" not in capsys.readouterr().out
    for where, name, value, told in (
            (virl, "sightings", lambda observation: 1 / 0, "ZeroDivisionError"),
            (soak_answers, "LIMIT", 0, " ms: "),
            (virl, "read_answer", lambda answer: dict.fromkeys(virl.KEYS), "though right"),
            (virl, "read_routes", lambda path: [virl.split_route("mini", 0, (2, 8))], "was read")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert soak_answers.main(["100"]) == 1
            assert told in capsys.readouterr().out


# ---------------------------------------------------------------- bad arguments
@pytest.mark.parametrize("name, value", [
    ("rule", "compass"), ("rule", None), ("rule", ["absolute"]), ("rule", {}), ("split", "test"),
    ("split", None), ("split", ["train"]),
    ("milestones", 5), ("milestones", None), ("milestones", []), ("milestones", [2]),
    ("milestones", [2, 3, 4]), ("milestones", [0, 3]),
    ("milestones", [3, 2]), ("milestones", [2, 9]), ("milestones", [2.0, 8]),
    ("milestones", ["2", "8"]), ("milestones", [True, 8]),
    ("milestones", "28"), ("milestones", {2: 8}),
    ("routes", 3), ("routes", ["x"]), ("routes", True), ("routes", "/nowhere/routes.json"),
    ("routes", "\0"),
    ("image_size", 0), ("image_size", 63), ("image_size", 5000), ("image_size", 112.0),
    ("image_size", "112"), ("image_size", [112, 112]),
    ("image_size", True), ("city", "Atlantis"), ("city", 3), ("city", ["Milan"]), ("city", {}),
    ("city", ""),
    ("panoramas", 3), ("panoramas", "folder"), ("panoramas", ["x"]),
    ("hide_intersection_text", 1), ("hide_intersection_text", None),
    ("hide_intersection_text", "yes"), ("hide_intersection_text", True),
    ("verify_iters", 0), ("verify_iters", -1), ("verify_iters", 2.0), ("verify_iters", True),
    ("verify_iters", 101), ("verify_iters", None)])
def test_bad_argument_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: ") as error:
        Navigation(**{name: value})
    assert "\n" not in str(error.value)


def test_pictures_of_real_routes_need_panoramas(saved):
    path = saved([[official("mini")[0], entry()], 2])
    Navigation(routes=path).reset(1)
    with pytest.raises(ValueError, match="^panoramas: routes without a synthetic scene"):
        Navigation(routes=path, image_size=64)
