"""GeneralPoints against independent oracles (an own search, Python's `ast`) and numbers by hand.

Everything is seeded, hypothesis included: a failure repeats.
"""
import ast
import hashlib
import json
import operator
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement, count, permutations, product

import numpy as np
import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cards import cut_out, read_card

import gp
from gp import GeneralPoints
from mini import corpus_gp

ALL_VALUES = list(combinations_with_replacement(range(1, 14), 4))
FUZZ = settings(max_examples=300, deadline=None, derandomize=True, database=None)
OTHER_RULE = {"J": 7, "Q": 20, "K": 99}


# ---------------------------------------------------------------- independent oracles
def solvable(numbers, target):
    """Plain search over (n, d) = n/d: replace any two by what one operation makes of them."""
    if len(numbers) == 1:
        return numbers[0][0] == target * numbers[0][1]
    for i, j in permutations(range(len(numbers)), 2):
        (a, b), (c, d) = numbers[i], numbers[j]
        rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
        made = [(a * d - c * b, b * d), (a * d, b * c)]
        if i < j:
            made += [(a * d + c * b, b * d), (a * c, b * d)]
        if any(solvable(rest + [x], target) for x in made if x[1]):
            return True
    return False


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}


def evaluate(text):
    """(Fraction, sorted numbers) by Python's parser; SyntaxError, ZeroDivisionError if illegal."""
    numbers = []

    def walk(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        raise SyntaxError(f"not a formula: {text}")

    return walk(ast.parse(text.strip(), mode="eval").body), sorted(numbers)


def category_of(text, values, target=24):
    """The category of the decided rewards table that a formula belongs to."""
    try:
        value, numbers = evaluate(text)
    except (SyntaxError, ZeroDivisionError):
        return "illegal"
    if numbers != sorted(values):
        return "wrong_numbers"
    return "correct" if value == target else "wrong_value"


def shape(node):
    """Normal form without unary minus, the same for formulas equal up to order and brackets."""
    if isinstance(node, str):
        node = ast.parse(node, mode="eval").body
    if isinstance(node, ast.Constant):
        return str(node.value)
    is_sum = isinstance(node.op, (ast.Add, ast.Sub))
    kind = (ast.Add, ast.Sub) if is_sum else (ast.Mult, ast.Div)

    def parts(x, sign):
        if isinstance(x, ast.BinOp) and isinstance(x.op, kind):
            right = -sign if isinstance(x.op, kind[1]) else sign
            return parts(x.left, sign) + parts(x.right, right)
        return [(sign, shape(x))]

    return f"{kind[0].__name__}{sorted(parts(node, 1))}"


def has_leading_zero(text):
    """Python refuses 08, gp reads it as 8: the one spelling on which the two may differ."""
    return re.search(r"(?<!\d)0\d", text) is not None


@pytest.fixture(scope="module")
def solvable_values():
    return {v for v in ALL_VALUES if solvable([(n, 1) for n in v], 24)}


# ---------------------------------------------------------------- helpers
@lru_cache(maxsize=None)
def seed_of(cards, rule):
    """First seed that deals these cards, found without drawing pictures."""
    env = GeneralPoints(split="all", replacement=True, rule=dict(rule))
    return next(s for s in count() if env.reset(s) and sorted(env.cards) == sorted(cards))


def deal(*cards, rule="ten", **options):
    """A fresh environment with exactly these cards on the table."""
    env = GeneralPoints(split="all", replacement=True, rule=rule, **options)
    env.reset(seed_of(cards, tuple(env.rule.items())))
    return env


def deal_3388(**options):
    return deal("3", "3", "8", "8", **options)


def pictured(**options):
    return GeneralPoints(**{"image_size": [112, 112], **options})


def dealt(n=400, **options):
    """The tables of seeds 0..n-1, as (cards, values)."""
    env = GeneralPoints(**options)
    for seed in range(n):
        env.reset(seed)
        yield list(env.cards), tuple(env.values)


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment},
                          timeout=120, stdout=subprocess.PIPE, text=True, check=True).stdout


# ---------------------------------------------------------------- the solver
def test_solvability_agrees_with_plain_search_on_every_hand(solvable_values):
    assert {v for v in ALL_VALUES if gp.solutions(v)} == solvable_values
    small = [v for v in ALL_VALUES if max(v) <= 10]
    assert (len(ALL_VALUES), len(solvable_values)) == (1820, 1362)  # PAPER.md section 3
    assert (len(small), sum(v in solvable_values for v in small)) == (715, 566)


@pytest.mark.parametrize("target", (1, 36, 97))
def test_solvability_agrees_for_other_targets(target):
    sample = random.Random(target).sample(ALL_VALUES, 60)
    wanted = [solvable([(n, 1) for n in v], target) for v in sample]
    assert [bool(gp.solutions(v, target)) for v in sample] == wanted and len(set(wanted)) == 2
    for v in sample:
        assert {category_of(f, v, target) for f in gp.solutions(v, target)} <= {"correct"}


def test_every_listed_solution_is_right_and_listed_once_the_shortest_first():
    assert shape("1-2+(3+4)*5") == shape("5*(4+3)-(2-1)") != shape("2-1+(3+4)*5")  # the yardstick
    for v in ALL_VALUES:
        formulas = gp.solutions(v)
        assert len(set(map(shape, formulas))) == len(formulas)
        assert list(formulas) == sorted(formulas, key=lambda f: (len(f), f))
        for f in formulas:
            assert evaluate(f) == (24, list(v)), f


@pytest.mark.parametrize("values, known", [
    ((3, 3, 8, 8), 1), ((3, 3, 7, 7), 1), ((1, 5, 5, 5), 1), ((1, 3, 4, 6), 1), ((4, 4, 10, 10), 1),
    ((1, 1, 1, 8), 1),  # (1+1+1)*8 in any order
    ((6, 6, 6, 6), 2),  # 6+6+6+6 and 6*6-6-6
    ((1, 1, 1, 1), 0)])
def test_solutions_equal_up_to_order_count_once(values, known):
    assert len(gp.solutions(values)) == known
    assert gp.solutions((3, 3, 8, 8)) == ("8/(3-8/3)",)  # floats get this one wrong


BRACKETS = ("(({0}{4}{1}){5}{2}){6}{3}", "({0}{4}({1}{5}{2})){6}{3}", "({0}{4}{1}){5}({2}{6}{3})",
            "{0}{4}(({1}{5}{2}){6}{3})", "{0}{4}({1}{5}({2}{6}{3}))")


@pytest.mark.parametrize("values", [(1, 2, 3, 4), (2, 3, 5, 12), (4, 7, 8, 8), (6, 6, 6, 6)])
def test_no_way_to_24_is_missing(values):
    """All permutations x operators x 5 bracketings, written out."""
    orders = set(permutations(values))
    every = [b.format(*p, *ops) for p in orders for ops in product("+-*/", repeat=3)
             for b in BRACKETS]
    right = {shape(f) for f in every if category_of(f, values) == "correct"}
    assert set(map(shape, gp.solutions(values))) == right


# ---------------------------------------------------------------- grading against Python's parser
TOKENS = st.lists(st.sampled_from([*"01234510 ()", *"+-*/" * 2]), max_size=40).map("".join)
NUMBERS = st.sampled_from(["3", "3", "8", "8", "-8", "(3)", " 8 ", "24", "0"])
FORMULA = st.recursive(NUMBERS, lambda x: st.tuples(x, st.sampled_from("+-*/"), x).flatmap(
    lambda parts: st.sampled_from(["({}{}{})", "{}{}{}"]).map(lambda f: f.format(*parts))))


@FUZZ
@given((TOKENS | FORMULA).filter(lambda text: not has_leading_zero(text)))
def test_verifier_agrees_on_any_text_over_the_formula_alphabet(text):
    category, reason = gp.grade(text, [3, 3, 8, 8], 24)
    assert category == category_of(text, [3, 3, 8, 8])
    if category == "wrong_value":
        assert reason == f"the formula equals {evaluate(text)[0]} instead of 24"


@pytest.mark.parametrize("values", random.Random(0).sample(ALL_VALUES, 40), ids=str)
def test_verifier_agrees_on_orders_operators_and_brackets(values):
    rng = random.Random(str(values))
    for _ in range(50):
        ops = rng.choices("+-*/", k=3)
        text = rng.choice(BRACKETS).format(*rng.sample(values, 4), *ops)
        assert gp.grade(text, list(values), 24)[0] == category_of(text, values), text


# ---------------------------------------------------------------- the decided rewards, by hand
RIGHT, WRONG = "8/(3-8/3)", "3+3+8+8"  # for the table 3 3 8 8; the second equals 22
CASES = [  # formula, reward of an answer that is not the last, what the verifier says
    (RIGHT, 5, ""),
    (" ( (8) ) / ( 3 - (8/3) ) ", 5, ""),
    ("-8/(--(8/3)+-3)", 5, ""),  # unary minus is legal
    (RIGHT + " = 25 = x", 5, ""),  # what follows '=' is dropped, whatever it says
    ("8/[3-8/3]", 5, ""),
    ("{8}/[(3)-{8/3}] = 24", 5, ""),
    (RIGHT + ".", 5, ""),
    (RIGHT + " ;", 5, ""),
    ("8/(3\n- 8/3)\t", 5, ""),
    (WRONG + "=24", -1, "the formula equals 22 instead of 24"),
    ("8-3-3+8", -1, "the formula equals 10 instead of 24"),  # from left to right
    ("8/3/8*3", -1, "the formula equals 1 instead of 24"),
    ("8*3+3/8", -1, "the formula equals 195/8 instead of 24"),
    ("-8*3-(8-8)*3", -2, "the number 8 is used too often"),
    ("3*8", -2, "the number 3 is used too rarely"),
    ("3*8+3-3", -2, "the number 8 is used too rarely"),
    ("8+8+8", -2, "the number 3 is not used"),
    ("3+3+3+3+3+3+8-8+8-8+3+3", -2, "the number 3 is used too often"),
    ("3*8*(9-8)", -2, "the number 9 is not on the table"),  # equals 24: penalties never add up
    ("24=" + RIGHT, -2, "the number 24 is not on the table"),
    ("33-8/8", -2, "the number 33 is not on the table"),  # digits may not be glued together
    ("=24", -3, "empty"),
    ("8/(3-3)+8", -3, "divides by zero"),  # illegal outweighs the missing number
    ("3*8/(8-8/(3-3))", -3, "divides by zero"),
    ("8/(3-8/3", -3, "unbalanced bracket"),
    ("8/(3-8)/3)", -3, "unbalanced bracket"),
    ("8/(3-8/3]", -3, "unbalanced bracket"),
    ("8/[3-{8/3]}", -3, "unbalanced bracket"),
    ("8/3]", -3, "unbalanced bracket"),
    ("3+3+8+", -3, "a number is missing"),
    ("3+()+8+8", -3, "a number is missing"),
    ("3**8", -3, "a number is missing"),  # Python's power and floor division do not exist here
    ("8//3", -3, "a number is missing"),
    ("3 3 8 8", -3, "an operator is missing"),
    ("(3+3)(8+8)", -3, "an operator is missing"),
    ("(3 3)", -3, "an operator is missing"),
    ("3+3+8x8", -3, "illegal character 'x'"),
    ("8.0*3", -3, "illegal character '.'"),
    ("3+3+8+８", -3, "illegal character '８'"),  # a full-width digit is \d to `re`
    ("3×8", -3, "illegal character '×'"),  # operators are those of ASCII
    ("3\u2003+8", -3, "illegal character"),  # and so are spaces
    (RIGHT + ", " + RIGHT, -3, "illegal character ','"),
    ("+".join("3" * 65), -3, "too long"),
    (None, -3, 'no "formula" was found in the answer'),
    (24, -3, 'no "formula" was found in the answer'),
    ([RIGHT], -3, 'no "formula" was found in the answer')]
CATEGORIES = {5: "correct", -1: "wrong_value", -2: "wrong_numbers", -3: "illegal"}


@pytest.mark.parametrize("picture", (None, "gate", "additive"))
@pytest.mark.parametrize("formula, reward, message", CASES)
def test_reward_and_message_of_one_answer(formula, reward, message, picture):
    """In words, and with the cards read right from a picture, whatever the recognition rule."""
    look = {"image_size": [112, 112], "recognition": picture} if picture else {}
    env = deal_3388(verify_iters=2, **look)
    answer = env.answer(formula)
    _, got, terminated, truncated, info = env.step(answer)
    assert (got, terminated, truncated, info["attempt"]) == (reward, reward == 5, False, 1)
    assert info["correct"] is terminated and info["action"] is None and info["recognized"]
    assert message in info["feedback"] and bool(info["feedback"]) == (reward != 5)
    assert info["category"] == CATEGORIES[reward]
    if reward != 5:  # the same answer as the last one costs exactly one point more
        assert env.step(answer)[1:4] == (reward - 1, False, True)


@pytest.mark.parametrize("verify_iters, formulas, rewards", [
    (5, (WRONG, "3*8", "8/0", WRONG, WRONG), (-1, -2, -3, -1, -2)),
    (5, (WRONG, WRONG, WRONG, WRONG, RIGHT), (-1, -1, -1, -1, 5)),  # the last attempt pays in full
    (1, (RIGHT,), (5,)), (1, (WRONG,), (-2,)), (1, ("3*8",), (-3,)), (1, ("8/0",), (-4,))])
def test_rewards_over_an_episode(verify_iters, formulas, rewards):
    env = deal_3388(verify_iters=verify_iters)
    results = [env.step(env.answer(formula)) for formula in formulas]
    before = [False] * (len(formulas) - 1)
    assert [r[1] for r in results] == list(rewards)
    assert [r[2] for r in results] == before + [rewards[-1] == 5]
    assert [r[3] for r in results] == before + [rewards[-1] != 5]
    assert [r[4]["attempt"] for r in results] == list(range(1, len(formulas) + 1))
    with pytest.raises(RuntimeError):
        env.step(env.answer(RIGHT))
    env.reset(0)  # and a new episode starts from one
    assert env.step(env.mistake())[4]["attempt"] == 1


@pytest.mark.parametrize("rule, cards, other, right", [  # the numbers of another rule are not there
    ("face", "A A 2 Q", "10*2+1+1", "12*2*1*1"), ("ten", "2 2 Q K", "12*2*(13-2)", "10+10+2+2"),
    ({"J": 7, "Q": 20, "K": 1}, "A 3 J Q", "11+12+3-1", "20+7-3*1")])
def test_rule_decides_what_a_face_card_is_worth(rule, cards, other, right):
    env = deal(*cards.split(), rule=rule)
    assert "is not on the table" in env.step(env.answer(other))[4]["feedback"]
    assert env.step(env.answer(right))[1] == 5


# ---------------------------------------------------------------- the conversation
@pytest.mark.parametrize("rule, numbers", [
    ("ten", (10, 10, 10)), ("face", (11, 12, 13)), (OTHER_RULE, (7, 20, 99))])
def test_prompt_states_task_rule_and_cards(rule, numbers):
    env = GeneralPoints(rule=rule, target=36)
    obs, info = env.reset(7)
    (turn,) = obs["messages"]
    assert turn["role"] == "user" and obs["image"] is None
    for rank, number in zip("JQK", numbers):
        assert f"'{rank}' counts as {number}" in turn["content"]
    assert "36" in turn["content"] and "24" not in turn["content"] and "{{" not in turn["content"]
    assert json.loads(turn["content"].rsplit("Cards: ", 1)[1]) == env.cards
    worth = {"A": 1, **dict(zip("JQK", numbers))}
    assert info["cluster"] == str(sorted(worth.get(card) or int(card) for card in env.cards))


def test_sequential_revision_keeps_every_answer_and_verdict():
    """v_in(t) = prompt, then (answer, verdict) of each earlier attempt, verbatim."""
    env = deal_3388()
    answers = ["nonsense {cards} {target} \ud800", env.answer(WRONG), env.answer(RIGHT)]
    observations, _, _, _, infos = zip(*map(env.step, answers))
    turns = [(m["role"], m["content"]) for m in observations[-1]["messages"]]
    says = "You failed this trial: the formula equals 22 instead of 24. Try again."
    assert infos[1]["feedback"] == says
    assert turns[1:] == [("assistant", answers[0]), ("user", infos[0]["feedback"]),
                         ("assistant", answers[1]), ("user", says), ("assistant", answers[2])]
    assert [len(o["messages"]) for o in observations] == [3, 5, 6]  # earlier ones do not change


# ---------------------------------------------------------------- whatever a model may write
GOOD = '"cards": ["3", "8", "3", "8"], "number": [3, 8, 3, 8], "formula": "8/(3-8/3)=24"'
BAD = '"cards": ["2"], "number": [2], "formula": "1+1"'


@pytest.mark.parametrize("answer", [
    "{" + GOOD + "}", "{" + GOOD + ",}", GOOD, "{" + GOOD,
    "{" + GOOD.replace('"8"]', '"8" , ]') + ",}",
    "{" + GOOD.replace('"', "'") + "}",
    "{" + GOOD.replace('"3"', "3") + ",}",
    "Let me see.\n```json\n{" + GOOD + "}\n```\nThat is it!",
    "{" + GOOD + "} or else {" + BAD + "}",
    "[{" + GOOD + "}]",
    "{" + GOOD.replace(": ", "\t:\n ").replace(", ", "\n,\n\t").replace("]", "\r\n]") + ",}",
], ids=lambda a: ascii(a)[:40])
def test_nearly_json_is_read_and_its_first_fields_count(answer):
    _, reward, *_, info = deal_3388().step(answer)
    assert (reward, info["recognized"]) == (5, True)
    _, reward, *_, info = deal_3388().step("{" + BAD + "} no, " + answer)
    assert (reward, info["recognized"]) == (-2, False)


@pytest.mark.parametrize("frame", [
    '{"answer": {%s}}', '{"answer": {%s},}', '{"thoughts": "3+8?", "output": {%s}}',
    '{"a": {"b": {%s}}}', '{"attempts": [{%s}]}', '{"first": {%s}, "then": {%s}}' % ("%s", BAD)])
def test_an_object_may_hold_the_answer(frame):
    for good in (GOOD, GOOD.replace('"formula"', '"Formula"'), GOOD.replace('"cards"', '"CARDS"')):
        _, reward, *_, info = deal_3388().step(frame % good)
        assert (reward, info["recognized"]) == (5, True)


def test_answer_that_is_a_text_in_json_is_read():
    _, reward, *_, info = deal_3388().step(json.dumps({"answer": "{" + GOOD + "}"}))
    assert (reward, info["recognized"]) == (5, True)


@pytest.mark.parametrize("answer", [
    '{"formula": "%s", "formula": "%s"}', '{"formula": "%s", "answer": {"formula": "%s"}}',
    '{"formula": "%s"} {"formula": "%s"}', '{"a": {"formula": "%s"}, "b": {"formula": "%s"}}'])
def test_first_formula_counts(answer):
    assert deal_3388().step(answer % (RIGHT, WRONG))[1] == 5
    assert deal_3388().step(answer % (WRONG, RIGHT))[1] == -1


def pictured_hand(*hand):
    """An environment whose picture shows these (rank, suit) cards."""
    env = deal(*(rank for rank, _ in hand), image_size=[112, 112], verify_iters=100)
    env.table = list(hand)
    return env


@pytest.mark.parametrize("king", [
    "K", "k", "King", "KING", "K♠", "♠K", "K ♠\ufe0f", "KS", "ks", "K of spades", "King of Spades",
    "Spade K", "king-spades", "K_of_spades", {"rank": "K"}, {"rank": "king", "suit": "spades"},
    {"suit": "♠", "rank": "K"}, {"card": "K♠"}, {"Rank": "K", "value": 13}, ["K", "spades"]])
@pytest.mark.parametrize("ten, ace", [("T", 1), ("ten", "1"), (10, "Ace"), ("10c", "A of hearts")])
def test_cards_may_be_spelt_otherwise(king, ten, ace):
    env = pictured_hand(("A", "hearts"), ("K", "spades"), ("10", "clubs"), ("4", "spades"))
    for named, right in (([king, ten, ace, "four"], True), ([king, ten, ace, "5"], False),
                         ([king, ten, ace], False), ([king, ten, ace, "4", "4"], False)):
        assert env.step(json.dumps({"cards": named, "formula": "1"}))[4]["recognized"] is right


@pytest.mark.parametrize("card", [
    "K♥", "K of hearts", "Q", "KK", "K Q", "13", "joker", "", "spades", "of spades", "K♠♠", "♠K♠",
    "K of", "K of kings", "‍K♠ 7", {"suit": "spades"}, {}, [], None, 13, True, [["K"]], "Кing"])
def test_what_names_another_card_or_none_is_misread(card):
    env = pictured_hand(("A", "hearts"), ("K", "spades"), ("10", "clubs"), ("4", "spades"))
    answer = json.dumps({"cards": ["A", card, "10", "4"], "formula": "1"})
    assert not env.step(answer)[4]["recognized"]


def test_suits_count_only_where_they_can_be_seen():
    env = pictured_hand(("6", "spades"), ("6", "clubs"), ("6", "spades"), ("6", "clubs"))
    for named, right in (("6♠ 6♠ 6♣ 6♣", True), ("6♠ 6 6 6♣", True), ("6♠ 6♠ 6♠ 6", False)):
        answer = json.dumps({"cards": named.split(), "formula": "1"})
        assert env.step(answer)[4]["recognized"] is right
    words = deal(*"6666")
    assert words.step(json.dumps({"cards": ["6♠"] * 4, "formula": "1"}))[4]["recognized"]


@pytest.mark.parametrize("cards, recognized", [
    (["J", "4", "10", "4"], True), (["4", "4", "10", "J"], True), (["J", 10, "4", 4], True),
    (["J", "4", "4"], False), (["J", "10", "4", "4", "4"], False), (["J", "4", "4", "4"], False),
    (["10", "10", "4", "4"], False),  # a jack is no ten, though it counts as one
    (["J", "1", "0", "4", "4"], False), (["J1044"], False), ([], False), ("J 10 4 4", False),
    (None, False), ([["J", "10", "4", "4"]], False), (["J", "10", "4", "4", ""], False)])
def test_recognition_compares_multisets(cards, recognized):
    answer = {"cards": cards, "formula": "(10*10-4)/4"}
    for text in (json.dumps(answer), json.dumps(answer)[:-1] + ",}"):  # strict and nearly JSON
        _, reward, *_, info = deal("J", "10", "4", "4").step(text)
        assert (reward, info["recognized"]) == (5, recognized)  # text pays for the formula alone
        env = deal("J", "10", "4", "4", image_size=[112, 112], recognition="additive")
        assert env.step(text)[1] == (5 if recognized else 3.5)


READ, MISREAD = ["8", "3", "8", "3"], ["8", "3", "8", "4"]
MISREAD_TEXT = ('You failed this trial: the "cards" in the answer are not the cards in the picture.'
                " Try again.")
NO_CARDS_TEXT = 'You failed this trial: no "cards" were found in the answer. Try again.'
ANY_TEXT = st.text(st.characters())  # lone surrogates and control characters included
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda x: st.lists(x, max_size=5) | st.dictionaries(ANY_TEXT, x, max_size=5), max_leaves=12)
PIECES = ['"cards"', "'number'", '"formula"', *"\"':[]{},\n\\()=", "10", "K", "1+2", "/0"]
NEAR_JSON = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
CARDS = st.lists(st.sampled_from([*gp.RANKS, "1", "", 10, None, "spades"]), max_size=5) | ANY_JSON
FORMULAS = st.sampled_from([RIGHT, WRONG, "3*8", "1/0", "(", "x", None, 24]) | TOKENS | ANY_JSON
FIELDS = st.fixed_dictionaries({}, optional={"cards": CARDS, "formula": FORMULAS})
PAID = {None: {5, -1, -2, -3}, "gate": {5, -1, -2, -3, -1.5},
        "additive": {5, 3.5, -1, -2.5, -2, -3.5, -3, -4.5}}


def check_any_answer(answer, pictures=("gate", "additive")):
    """Whatever is said is paid from the table and explained in bounded words and bounded time.

    The cards of a picture are never given away: two sentences hold for any table.
    """
    for picture in (None, *pictures):
        look = {"image_size": [112, 112], "recognition": picture} if picture else {}
        env = GeneralPoints(verify_iters=2, **look)
        env.reset(3)
        start = time.process_time()
        for last in (False, True):
            obs, reward, terminated, truncated, info = env.step(answer)
            assert reward + (last and not terminated) in PAID[picture]
            assert terminated == (reward > 0) == (info["category"] == "correct")
            assert truncated == (last and not terminated)
            assert all(isinstance(m["content"], str) for m in obs["messages"][1:])
            if terminated:
                assert info["feedback"] == ""
                break
            assert info["feedback"].startswith("You failed this trial: ")
            assert len(info["feedback"]) < 500  # it goes into the next prompt
            if picture and not info["recognized"]:
                assert info["feedback"] in (MISREAD_TEXT, NO_CARDS_TEXT)
        assert time.process_time() - start < 0.5


@FUZZ
@given(ANY_TEXT | NEAR_JSON | ANY_JSON.map(json.dumps) | FIELDS.map(json.dumps)
       | FIELDS.map(lambda x: json.dumps(x, ensure_ascii=False)[:-1] + ",}"))
def test_any_answer_is_graded(answer):
    check_any_answer(answer)


N = 1_000_000
HUGE = {
    "open lists": '"cards": [' * (N // 10), "single quotes": "'number':[" * (N // 10),
    "open formulas": '"formula": "' * (N // 12), "spaces": '"cards"' + " " * N + ":",
    "spaced lists": ('"cards"  :' + " " * 90 + "[") * (N // 100), "brackets": "[" * N,
    "braces": '{"a":' * (N // 5), "quotes": "\"'" * (N // 2), "escapes": '"' + "\\" * N,
    "commas": '"cards": [' + "," * N + "]", "nul": "\0" * N,
    "minus": json.dumps({"formula": "-" * N}), "digits": json.dumps({"formula": "9" * N}),
    "big exponent": '{"formula": "1", "cards": [1e' + "9" * 5000 + "]}",
    "Python's digit limit": '{"formula": "1", "cards": [' + "9" * 4301 + "]}",
    "product of 32": json.dumps({"formula": "*".join(["9999999"] * 32)}),
    "quotients": json.dumps({"formula": "/".join(["9999999"] * 32)}),
    "answer far behind": " " * N + "{" + GOOD + "}",
    "digits that fit": json.dumps({"formula": "9" * 9000}),  # more than Python turns into an int
    "spaces that fit": json.dumps({"formula": "1" + " " * 9000 + "x"}),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_answers_are_graded_in_bounded_time(name):
    check_any_answer(HUGE[name], pictures=())


@pytest.mark.parametrize("depths", (range(1, 60), range(100, 4990, 37), range(930, 1010)), ids=str)
def test_nested_brackets_at_any_depth_are_graded(depths):
    """Around every depth at which Python's recursion limit could bite: JSON, and str() of it."""
    env = GeneralPoints(verify_iters=1)
    for depth in depths:
        nested = "[" * depth + "]" * depth
        brackets = "(" * depth + "1" + ")" * depth
        for answer in (f'{{"cards": [{nested}], "formula": {nested}}}',
                       '{"cards":' * depth + "[]" + "}" * depth, env.answer(brackets, ["A"]),
                       env.answer(brackets.replace("(", "-("), ["A"])):
            env.reset(3)
            assert env.step(answer)[1] in (-3, -4)


# ---------------------------------------------------------------- expert answers and mistakes
@pytest.mark.parametrize("target", (24, 36))
@pytest.mark.parametrize("rule", ("ten", "face", OTHER_RULE), ids=str)
@pytest.mark.parametrize("expert, split", [
    ("canonical", "train"), ("varied", "all"), ("varied", "unseen")])
def test_experts_are_right_and_mistakes_wrong(rule, target, expert, split):
    env, slips = GeneralPoints(rule=rule, target=target, expert=expert, split=split), Counter()
    for seed in range(100):
        env.reset(seed)
        mistake, right = env.mistake(), env.expert()
        _, reward, *_, info = env.step(mistake)
        assert reward == {"wrong_value": -1, "wrong_numbers": -2}[info["category"]]
        assert env.step(right)[1:3] == (5, True)
        for answer in (mistake, right):
            read = json.loads(answer)
            assert list(read) == ["cards", "number", "formula"]  # in the order the prompt asks for
            assert read["cards"] == env.cards and sorted(read["number"]) == env.values
            assert read["formula"].endswith(f"={target}")
        formula, wrong = (json.loads(a)["formula"].split("=")[0] for a in (right, mistake))
        assert evaluate(formula) == (target, env.values)
        slips[info["category"], len(evaluate(wrong)[1])] += 1
    assert set(slips) == {("wrong_value", 4), ("wrong_numbers", 3), ("wrong_numbers", 4)}


def test_canonical_expert_is_one_formula_per_multiset_and_varied_is_not():
    formulas = {"canonical": defaultdict(set), "varied": defaultdict(set)}
    for kind, known in formulas.items():
        env = GeneralPoints(expert=kind)
        for seed in range(3000):
            _, info = env.reset(seed)
            known[info["cluster"]].add(json.loads(env.expert())["formula"])
    assert {len(f) for f in formulas["canonical"].values()} == {1}
    assert sum(len(f) > 1 for f in formulas["varied"].values()) > 100


# ---------------------------------------------------------------- which hands are dealt
def multisets(**options):
    """Every value multiset that may be dealt. Reads the private list: sampling misses rare ones."""
    env = GeneralPoints(**options)
    return {tuple(sorted(env.number[c] for c in hand)) for hand in env._hands}


def test_train_and_unseen_share_no_multiset_and_make_up_all(solvable_values):
    both = {"train": set(), "unseen": set()}
    for rule in ("ten", "face"):
        train, unseen, every = (multisets(rule=rule, split=s) for s in ("train", "unseen", "all"))
        assert not train & unseen and train | unseen == every
        assert every == {v for v in solvable_values if rule == "face" or max(v) <= 10}
        both["train"] |= train
        both["unseen"] |= unseen
    assert not both["train"] & both["unseen"]  # nor across rules
    assert {values for _, values in dealt(split="unseen")} <= both["unseen"]


def is_apart(values):
    return hashlib.sha256(f"gp|{values}".encode()).hexdigest()[1] in "08"


def test_unseen_is_an_eighth_for_ever():
    """Trained checkpoints depend on this choice: pinned, computed apart from gp.py."""
    unseen = [v for v in ALL_VALUES if gp.is_unseen(v)]
    assert abs(len(unseen) / 1820 - 1 / 8) < 0.03  # 4 standard deviations
    assert unseen == [v for v in ALL_VALUES if is_apart(v)]
    assert unseen[:3] == [(1, 1, 1, 3), (1, 1, 1, 8), (1, 1, 3, 9)]
    assert all(gp.is_unseen(v[::-1]) and gp.is_unseen(list(v)) for v in unseen)


# card hands per rank hand: of one deck 4^4, 6*4*4, 6*6, 4*4, 1; with replacement the orders
ODDS = {False: {(1, 1, 1, 1): 256, (1, 1, 2): 96, (2, 2): 36, (1, 3): 16, (4,): 1},
        True: {(1, 1, 1, 1): 24, (1, 1, 2): 12, (2, 2): 6, (1, 3): 4, (4,): 1}}


def pattern(cards):
    return tuple(sorted(Counter(cards).values()))


def odds_of_hands(solvable_values, *, rule="ten", split="train", replacement=False,
                  require_face=False):
    """{hand that may be dealt: its odds}, apart from gp.py."""
    odds, most = {}, 13 if rule == "face" else 10
    for hand in combinations_with_replacement(gp.RANKS, 4):
        values = tuple(min(gp.RANKS.index(r) + 1, most) for r in hand)
        fits = split == "all" or is_apart(values) == (split == "unseen")
        if fits and values in solvable_values and (not require_face or set(hand) & {*"JQK"}):
            odds[hand] = ODDS[replacement][pattern(hand)]
    return odds


@pytest.mark.parametrize("options", [
    {}, {"replacement": True, "split": "all"}, {"require_face": True, "rule": "face"},
    {"replacement": True, "require_face": True}], ids=str)
def test_hands_come_with_the_odds_of_the_deck(options, solvable_values):
    """Within 4 standard deviations; the cards of a hand lie in any order."""
    odds, n = odds_of_hands(solvable_values, **options), 6000
    tables = [cards for cards, _ in dealt(n, **options)]
    hands = [tuple(sorted(cards, key=gp.RANKS.index)) for cards in tables]
    assert set(hands) <= set(odds)
    events = [lambda h, p=p: pattern(h) == p for p in ODDS[False]]
    events += [lambda h, r=r: r in h for r in ("A", "7", "10", "Q")]
    for event in events:
        p = sum(w for h, w in odds.items() if event(h)) / sum(odds.values())
        assert abs(sum(map(event, hands)) / n - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1 / n
    lowest_first = [t[0] == h[0] for t, h in zip(tables, hands) if pattern(h) == (1, 1, 1, 1)]
    assert abs(sum(lowest_first) / len(lowest_first) - 1 / 4) < 0.03


def test_only_hands_that_can_make_the_target_are_dealt():
    for cards, values in dealt(150, target=36, rule="face", split="all"):
        assert solvable([(n, 1) for n in values], 36), cards
    only = {values for _, values in dealt(20, target=10_000, split="all")}
    assert only == {(10, 10, 10, 10)}


# ---------------------------------------------------------------- the seed decides everything
LOOKS = [{"image_size": [112, 112], "suits": suits, "jitter": jitter}
         for suits in ("black", "red", "mixed") for jitter in (False, True)]
EPISODES = f"""
import json, gp
for options in ({{"expert": "varied"}}, {{"rule": "face", "replacement": True}}, *{LOOKS!r}):
    env = gp.GeneralPoints(**options)
    for seed in (0, 1, 2, 12345):
        turns = [env.reset(seed), *map(env.step, (env.mistake(), env.mistake(), env.expert()))]
        print(json.dumps(turns, default=lambda image: image.tobytes().hex()))
"""


def test_same_seed_same_episode_to_the_byte_in_any_process():
    one, two = (python(EPISODES, PYTHONHASHSEED=seed) for seed in "12")
    assert one == two and len(one) > 1000


def test_same_seed_same_episode_whatever_happened_before():
    env, other = GeneralPoints(expert="varied"), GeneralPoints(expert="varied")

    def play(e, seed):
        random.seed(seed + len(episodes))  # the global generator is neither read ...
        before = random.getstate()
        episode = e.reset(seed), e.step(e.mistake()), e.step(e.expert())
        assert random.getstate() == before  # ... nor moved
        return episode

    episodes = []
    for seed in range(20):
        episodes.append(play(env, seed))
    other.reset(99)
    other.mistake()
    assert [play(other, seed) for seed in reversed(range(20))][::-1] == episodes
    assert len({str(e[0]) for e in episodes}) > 15  # and other seeds deal other hands


@pytest.mark.parametrize("look", [{}, {"image_size": [112, 112], "jitter": True}], ids=str)
def test_any_integer_is_a_seed_of_its_own(look):
    env = GeneralPoints(expert="varied", **look)

    def start(seed):
        obs, info = env.reset(seed)
        image = obs["image"] and obs["image"].tobytes()
        return env.cards, env.mistake(), env.mistake(), env.mistake(), info, image

    seeds = [*range(-20, 20), 10 ** 30, -10 ** 30, 2 ** 63]
    assert len({str(start(seed)) for seed in seeds}) == len(seeds)
    assert len({str(start(seed)[0]) for seed in range(-40, 0)}) > 30
    for kind in (np.int64, np.int8, np.uint8):
        assert start(kind(5)) == start(5)
    assert start(np.int64(-5)) == start(-5) == start(-5)
    for wrong in (None, 5.0, "5"):
        with pytest.raises(TypeError):
            env.reset(wrong)


def test_pictures_change_nothing_about_the_game():
    """Same seed: same cards in the same order, same answers, in words and in any suits."""
    def episodes(**options):
        env = GeneralPoints(expert="varied", **options)
        return [(env.reset(seed)[1], list(env.cards), env.expert(), env.mistake(), env.expert())
                for seed in range(40)]

    words = episodes()
    assert all(episodes(**look) == words for look in LOOKS)
    assert episodes(image_size=[300, 100], recognition="additive") == words
    assert episodes(recognition="additive") == words


# ---------------------------------------------------------------- GP-VL: cards misread
PICTURE_CASES = [  # recognition, cards named, formula, reward if not the last, category, feedback
    ("gate", MISREAD, RIGHT, -1.5, "misread", MISREAD_TEXT),  # the right formula does not count
    ("gate", MISREAD, "3*8", -1.5, "misread", MISREAD_TEXT),
    ("gate", MISREAD, "8/0", -1.5, "misread", MISREAD_TEXT),
    ("gate", MISREAD, None, -1.5, "misread", MISREAD_TEXT),
    ("gate", [], RIGHT, -1.5, "misread", MISREAD_TEXT),  # an empty list is a list
    ("gate", None, RIGHT, -3, "illegal", NO_CARDS_TEXT),
    ("gate", None, None, -3, "illegal", NO_CARDS_TEXT),
    ("gate", "3388", WRONG, -3, "illegal", NO_CARDS_TEXT),  # no list
    ("additive", MISREAD, RIGHT, 3.5, "correct", ""),  # solved: 5 - 1.5
    ("additive", None, RIGHT, 3.5, "correct", ""),
    ("additive", MISREAD, WRONG, -2.5, "wrong_value", MISREAD_TEXT),
    ("additive", MISREAD, "3*8", -3.5, "wrong_numbers", MISREAD_TEXT),
    ("additive", MISREAD, "8/0", -4.5, "illegal", MISREAD_TEXT),
    ("additive", None, WRONG, -2.5, "wrong_value", NO_CARDS_TEXT),
    ("additive", "3388", None, -4.5, "illegal", NO_CARDS_TEXT)]


@pytest.mark.parametrize("recognition, cards, formula, reward, category, feedback", PICTURE_CASES)
def test_reward_of_misread_cards(recognition, cards, formula, reward, category, feedback):
    """PAPER.md, rewards decided; in words the cards named count for nothing."""
    env = deal_3388(image_size=[112, 112], recognition=recognition, verify_iters=3)
    fields = {"cards": cards, "formula": formula}
    answer = json.dumps({key: value for key, value in fields.items() if value is not None})
    solved = category == "correct"
    _, got, terminated, truncated, info = env.step(answer)
    assert (got, terminated, truncated) == (reward, solved, False)
    assert (info["category"], info["recognized"], info["feedback"]) == (category, False, feedback)
    if not solved:
        assert env.step(answer)[1] == reward
        assert env.step(answer)[1:4] == (reward - 1, False, True)  # the last costs one more
        again = deal_3388(image_size=[112, 112], recognition=recognition, verify_iters=2)
        again.step(answer)
        right = json.dumps({"cards": READ, "formula": RIGHT})
        assert again.step(right)[1:4] == (5, True, False)  # a second look is paid in full
    _, got, *_, info = deal_3388(recognition=recognition).step(answer)
    assert got == {RIGHT: 5, WRONG: -1, "3*8": -2, "8/0": -3, None: -3}[formula]
    assert not info["recognized"]


# ---------------------------------------------------------------- GP-VL: the table as a picture
def test_prompt_is_the_picture_and_a_text_that_knows_nothing_of_it():
    for options in ({}, {"rule": "face", "require_face": True}, {"jitter": True}):
        env, texts = pictured(**options), set()
        for seed in range(60):
            (message,) = env.reset(seed)[0]["messages"]
            assert message["role"] == "user"
            assert [part["type"] for part in message["content"]] == ["image", "text"]
            texts.add(message["content"][1]["text"])
        (text,) = texts  # the same words whatever the cards
        assert text.endswith(f"Cards: {gp.PICTURE}")
        words = GeneralPoints(**options).reset(0)[0]["messages"][0]["content"]
        assert text.split("Cards:")[0] == words.split("Cards:")[0]  # else that of GP-L


@pytest.fixture
def undrawn(monkeypatch):
    """Observations hold what would be drawn, (cards, width, height, jittered), not pictures."""
    monkeypatch.setattr(gp.cards, "draw_table", lambda table, width, height, jitter: (
        tuple(table), width, height, jitter is not None))


@pytest.mark.parametrize("suits, allowed", [
    ("black", ["clubs", "spades"]), ("red", ["diamonds", "hearts"]),
    ("mixed", ["clubs", "diamonds", "hearts", "spades"])])
def test_picture_shows_the_table_in_the_suits_asked_for(suits, allowed, undrawn):
    """Ranks in the order that the expert names them, equal ranks in different suits."""
    env, seen, most = pictured(suits=suits, split="all", replacement=True), Counter(), 0
    alike = seed_of(tuple("6666"), tuple(gp.RULES["ten"].items()))
    for seed in [*range(1000), alike]:
        table, *others = env.reset(seed)[0]["image"]
        assert others == [112, 112, False]
        assert [rank for rank, _ in table] == env.cards == json.loads(env.expert())["cards"]
        for rank, number in Counter(env.cards).items():
            assert len({suit for r, suit in table if r == rank}) == min(number, len(allowed))
            most = max(most, number)
        seen.update(suit for _, suit in table)
    assert sorted(seen) == allowed and most == 4
    assert min(seen.values()) > 0.8 * max(seen.values())


def test_jitter_moves_the_cards_and_not_the_answer(undrawn):
    """Another order on the table than in the expert's list, which earns the full reward."""
    jittered, plain = pictured(jitter=True, suits="mixed"), pictured(suits="mixed")
    orders = set()
    for seed in range(60):
        (moved, *_, shaken), (still, *_) = (e.reset(seed)[0]["image"] for e in (jittered, plain))
        assert shaken and Counter(moved) == Counter(still) and plain.cards == jittered.cards
        if len(set(still)) == 4:
            orders.add(tuple(map(moved.index, still)))
        assert jittered.step(jittered.expert())[1:3] == (5, True)
    assert len(orders) > 10


def test_picture_is_what_test_cards_reads():
    env = pictured()
    for seed in range(10):
        pictures = cut_out(env.reset(seed)[0]["image"])
        assert [read_card(picture[1:-1, 1:-1])[0] for picture in pictures] == env.cards


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_one_picture_per_episode(look):
    """The very same object at every step, so that it is encoded once; a new one after `reset`."""
    env, answer = GeneralPoints(**look), json.dumps({"cards": ["A"], "formula": "1"})
    first = env.reset(0)[0]["image"]
    pixels = first.tobytes()
    assert all(env.step(answer)[0]["image"] is first for _ in range(5))
    again = env.reset(0)[0]["image"]
    assert again is not first and again.tobytes() == first.tobytes() == pixels
    others = [env.reset(seed)[0]["image"].tobytes() for seed in range(1, 20)]
    assert len({pixels, *others}) > 15
    assert GeneralPoints(**look).reset(7)[0]["image"].tobytes() == others[6]


@pytest.mark.parametrize("options", [
    {}, {"split": "unseen"}, {"rule": "face", "require_face": True},
    {"rule": "face", "split": "unseen", "require_face": True, "replacement": True},
    {"split": "all", "replacement": True}], ids=str)
def test_reference_names_the_likeliest_hand_of_the_deck(options, solvable_values):
    """Whatever lies on the table, and with a formula for it."""
    env = pictured(jitter=True, suits="red", **options)
    assert env.references == ("likeliest cards",)
    (answer,) = {env.reference("likeliest cards") for seed in range(5) if env.reset(seed)}
    answer, odds = json.loads(answer), odds_of_hands(solvable_values, **options)
    hand = tuple(sorted(answer["cards"], key=gp.RANKS.index))
    assert odds[hand] == max(odds.values())
    most = 13 if options.get("rule") == "face" else 10
    assert answer["number"] == [min(gp.RANKS.index(c) + 1, most) for c in answer["cards"]]
    assert evaluate(answer["formula"].split("=")[0]) == (24, sorted(answer["number"]))
    with pytest.raises(ValueError, match="none of likeliest cards"):
        env.reference("blind")


def test_reference_is_right_where_its_cards_lie_and_moves_nothing():
    env = pictured()
    guess = sorted(json.loads(env.reference("likeliest cards"))["cards"])
    for seed in range(300):
        env.reset(seed)
        mistake = env.mistake()
        env.reset(seed)
        _, _, solved, _, info = env.step(env.reference("likeliest cards"))
        assert solved == info["recognized"] == (sorted(env.cards) == guess)
        assert env.mistake() == mistake
    assert [name for name, *_ in env.reports] == ["success", "recognition"]
    words = GeneralPoints()
    assert words.references == () and [name for name, *_ in words.reports] == ["success"]


# ---------------------------------------------------------------- bad arguments
BAD_ARGUMENTS = {
    "rule": ["eleven", None, ["J", "Q", "K"], {"J": 11, "Q": 12}, {"J": 11, "Q": 12, 13: "K"},
             {"J": 11, "Q": 12, "K": 13, "A": 1},
             *({"J": 11, "Q": 12, "K": king} for king in (0, 100, 13.0, "13", True))],
    "target": [0, 24.0, "24", True, None, 10_001], "split": ["test", None, ["train"]],
    "expert": ["random", None], "replacement": [1, "yes", None], "require_face": [0, None],
    "verify_iters": [0, 5.0, True, 101], "suits": ["blue", None, "spades", ["black"]],
    "image_size": [112, "112x112", [112], [112] * 3, [112.0, 112], ["112", 112], [True, True],
                   {112: 112}, [None, None], False, [0, 0], [-112, 112], [112, 20], [10, 10]],
    "recognition": ["none", None, ["gate"]], "jitter": [1, None, 0.5]}


@pytest.mark.parametrize("name, value", [(k, v) for k, bad in BAD_ARGUMENTS.items() for v in bad])
def test_bad_argument_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: ") as error:
        GeneralPoints(**{name: value})
    assert "\n" not in str(error.value)


def test_picture_too_small_for_jitter_is_found_before_the_first_hand():
    """Jittered cards are smaller: what suffices without may not do with it."""
    pictured(image_size=[80, 30]).reset(0)
    with pytest.raises(ValueError, match="^image_size: 80x30 is too small"):
        pictured(image_size=[80, 30], jitter=True)


def test_no_hand_left_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="^target: no solvable hand makes 9999"):
        GeneralPoints(target=9999)
    split = "train" if gp.is_unseen((10, 10, 10, 10)) else "unseen"  # its only hand lies elsewhere
    with pytest.raises(ValueError, match=f"no solvable hand makes 10000 with split {split}"):
        GeneralPoints(target=10_000, split=split)


# ---------------------------------------------------------------- what the backbone reads
RECIPE = yaml.safe_load((ROOT / "mini/gp.yaml").read_text())


def hands_shown(text, drawn=()):
    """Multisets of four numbers that stand together in a document: lists, formulas, and what four
    cards, spelt or drawn (ranks), count as under the rule that the text states."""
    shown = []
    for found in re.findall(r"(?<![\d,] )(?:\d+, )+\d+|[\d()+*/-]*\d[\d()+*/-]*", text):
        shown.append([int(number) for number in re.findall(r"\d+", found)])
    rule = {face: int(n) for face, n in re.findall(r"'([AJQK])' counts as (\d+)", text)}
    for found in re.findall(r'(?:"(?:[2-9AJQK]|10)", )+"(?:[2-9AJQK]|10)"', text if rule else ""):
        ranks = re.findall(r'"(\w+)"', found)
        shown.append([rule[rank] if rank in rule else int(rank) for rank in ranks])
    if rule and drawn:
        shown.append([rule[rank] if rank in rule else int(rank) for rank in drawn])
    return [tuple(sorted(numbers)) for numbers in shown if len(numbers) == 4]


def test_hands_shown_are_found():
    """The reader above, on documents written by hand."""
    assert hands_shown("3, 8, 3, 8 make 24: 8/(3-8/3)\n1, 2, 3, 4, 5") == [(3, 3, 8, 8)] * 2
    text = """'A' counts as 1, 'J' counts as 7, 'Q' counts as 12, 'K' counts as 2.
Cards: ["A", "10", "K", "J"]<|assistant|>{"hand": ["A", "10", "K"]}"""
    assert hands_shown(text) == [(1, 2, 7, 10)]
    assert hands_shown(text.split("Cards")[0], ["10", "J", "2", "Q"]) == [(2, 7, 10, 12)]
    assert hands_shown("12-((5*8))=6, (1+2)-3*4=") == [(1, 2, 3, 4)]


@pytest.mark.parametrize(
    "n, image_size", [(3000, None), (200, [112, 112]),
                      pytest.param(100_000, None, marks=pytest.mark.slow),
                      pytest.param(100_000, [112, 112], marks=pytest.mark.slow)])
def test_backbone_reads_no_unseen_hand_and_no_answer_of_the_task(n, image_size):
    """Wrong tries and corrupted lists included; and nobody repeats what was refused."""
    corpus = corpus_gp.Corpus(RECIPE["data"] | RECIPE["vision"], 1, image_size)
    hands = 0
    for _ in range(n):
        document = corpus.document()
        drawn = [gp.RANKS[index] for index in document.probe or ()]
        shown = hands_shown(document.text.replace(gp.PICTURE, ""), drawn)
        assert not any(map(is_apart, shown)), document.text
        hands += len(shown)
        replies = re.findall(r"<\|assistant\|>(.*?)<\|end\|>", document.text, re.DOTALL)
        assert len(replies) == len(set(replies)) or '{"' in document.text
        for reply in replies:
            assert gp.read_answer(reply).formula is None
            assert '"cards"' not in reply and '"number"' not in reply
    assert hands > n


@pytest.mark.slow
def test_rules_that_the_shipped_language_model_has_never_read():
    """In all documents of its stage, from the recipe's own seed; docs/results_gp_l.md has these."""
    from mini.pretrain import batches, build_processor  # torch, which the others here do not need

    read = Counter()

    class Noted(corpus_gp.Corpus):
        def document(self):
            found = super().document()
            read.update(re.findall(r"'J' counts as (\d+), 'Q' counts as (\d+), 'K' counts as (\d+)",
                                   found.text))
            return found

    processor = build_processor(112, corpus_gp.phrases())
    tokens = 0
    for batch in batches(Noted(RECIPE["data"], RECIPE["seed"]), processor, RECIPE["text"]):
        tokens += int(batch.mask.sum())
        if tokens >= RECIPE["text"]["tokens"]:
            break
    shown = json.loads((ROOT / RECIPE["out"] / "training.json").read_text())["text"]
    assert tokens == shown["tokens"]  # the very documents
    assert read["10", "10", "10"] > 5000 < read["11", "12", "13"] and len(read) > 1000
    assert read["7", "8", "9"] == read["12", "11", "13"] == 0


def test_wrong_tries_are_refused_for_the_right_reason_and_not_learned():
    corpus = corpus_gp.Corpus(RECIPE["data"], 2)
    refused = 0
    for _ in range(300):
        parts = corpus.game().parts[1:]  # requests and replies
        for (reply, learned), (request, _) in zip(parts[1::2], parts[2::2]):
            numbers, formula = reply.removesuffix("<|end|>").split(" make 24: ")
            values = sorted(int(number) for number in numbers.split(", "))
            assert not learned and gp.grade(formula, values, 24)[1] in request
            refused += 1
    assert refused > 100
