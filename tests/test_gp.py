"""GeneralPoints against independent oracles (an own search, Python's `ast` with fractions) and numbers worked out by hand.

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
from itertools import combinations, combinations_with_replacement, count, permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cards import cut_out, read_card

import gp
from gp import GeneralPoints

ROOT = Path(gp.__file__).resolve().parent
ALL_VALUES = list(combinations_with_replacement(range(1, 14), 4))
FUZZ = settings(max_examples=300, deadline=None, derandomize=True, database=None)
OTHER_RULE = {"J": 7, "Q": 20, "K": 99}


# ---------------------------------------------------------------- oracles, sharing nothing with gp.py
def solvable(numbers, target):
    """Plain search over integer pairs (n, d) = n/d: replace any two by what one operation makes of them, until one is left."""
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


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(text):
    """(Fraction, sorted numbers) of a formula read by Python's own parser; SyntaxError or ZeroDivisionError if illegal."""
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


def judge(text, values, target=24):
    """The category of the decided rewards table that a formula belongs to."""
    try:
        value, numbers = evaluate(text)
    except (SyntaxError, ZeroDivisionError):
        return "illegal"
    return "wrong_numbers" if numbers != sorted(values) else "wrong_value" if value != target else "correct"


def shape(node):
    """Normal form of a formula without unary minus: nested sorted terms (or factors) with their signs. Formulas equal up
    to order and brackets, and only those, have the same one."""
    if isinstance(node, str):
        node = ast.parse(node, mode="eval").body
    if isinstance(node, ast.Constant):
        return str(node.value)
    kind = (ast.Add, ast.Sub) if isinstance(node.op, (ast.Add, ast.Sub)) else (ast.Mult, ast.Div)

    def parts(x, sign):
        if isinstance(x, ast.BinOp) and isinstance(x.op, kind):
            return parts(x.left, sign) + parts(x.right, -sign if isinstance(x.op, kind[1]) else sign)
        return [(sign, shape(x))]

    return f"{kind[0].__name__}{sorted(parts(node, 1))}"


def has_leading_zero(text):
    """Python refuses 08, gp reads it as 8: the one spelling on which the two parsers may differ."""
    return re.search(r"(?<!\d)0\d", text) is not None


@pytest.fixture(scope="module")
def solvable_values():
    return {v for v in ALL_VALUES if solvable([(n, 1) for n in v], 24)}


# ---------------------------------------------------------------- helpers
def deal(*cards, **options):
    """A fresh environment with exactly these cards on the table, found by trying seeds."""
    env = GeneralPoints(**{"split": "all", "replacement": True, **options})
    for seed in count():
        env.reset(seed)
        if sorted(env.cards) == sorted(cards):
            return env


def formula_of(answer):
    return json.loads(answer)["formula"]


def dealt(n=400, **options):
    """The tables of seeds 0..n-1, as (cards, values)."""
    env = GeneralPoints(**options)
    for seed in range(n):
        env.reset(seed)
        yield list(env.cards), tuple(env.values)


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
    assert [bool(gp.solutions(v, target)) for v in sample] == wanted
    assert len(set(wanted)) == 2, "the sample must hold both kinds"
    for v in sample:
        assert {judge(f, v, target) for f in gp.solutions(v, target)} <= {"correct"}


def test_every_listed_solution_is_right_and_listed_once():
    assert shape("1-2+(3+4)*5") == shape("5*(4+3)-(2-1)") != shape("2-1+(3+4)*5")  # the yardstick itself
    for v in ALL_VALUES:
        formulas = gp.solutions(v)
        assert len(set(map(shape, formulas))) == len(formulas), formulas
        for f in formulas:
            assert evaluate(f) == (24, list(v)), f


@pytest.mark.parametrize("values, known", [
    ((3, 3, 8, 8), 1), ((3, 3, 7, 7), 1), ((1, 5, 5, 5), 1), ((1, 3, 4, 6), 1), ((4, 4, 10, 10), 1),  # the classics
    ((1, 1, 1, 8), 1),  # (1+1+1)*8 in any order
    ((6, 6, 6, 6), 2),  # 6+6+6+6 and 6*6-6-6
    ((1, 1, 1, 1), 0)])
def test_solutions_equal_up_to_order_count_once(values, known):
    assert len(gp.solutions(values)) == known


def test_the_hand_that_floats_get_wrong():
    assert gp.solutions((3, 3, 8, 8)) == ("8/(3-8/3)",)


BRACKETS = ("(({0}{4}{1}){5}{2}){6}{3}", "({0}{4}({1}{5}{2})){6}{3}", "({0}{4}{1}){5}({2}{6}{3})",
            "{0}{4}(({1}{5}{2}){6}{3})", "{0}{4}({1}{5}({2}{6}{3}))")


@pytest.mark.parametrize("values", [(1, 2, 3, 4), (2, 3, 5, 12), (4, 7, 8, 8), (2, 6, 11, 13), (6, 6, 6, 6)])
def test_no_way_to_24_is_missing(values):
    """All permutations x operators x 5 bracketings, written out."""
    every = (b.format(*p, *ops) for p in set(permutations(values)) for ops in product("+-*/", repeat=3) for b in BRACKETS)
    assert set(map(shape, gp.solutions(values))) == {shape(f) for f in every if judge(f, values) == "correct"}


# ---------------------------------------------------------------- the verifier against Python's parser
def random_formula(rng, values):
    """A formula over the table; now and then a wrong number, a spare sign or bracket, or one character damaged."""
    def tree(numbers):
        if len(numbers) == 1:
            return rng.choice(("{}",) * 6 + ("-{}", "({})", " {} ")).format(numbers[0])
        k = rng.randrange(1, len(numbers))
        text = tree(numbers[:k]) + rng.choice("+-*/") + tree(numbers[k:])
        return f"({text})" if rng.random() < 0.5 else text

    numbers, slip = rng.sample(values, 4), rng.random()
    if slip < 0.1:
        numbers.pop()
    elif slip < 0.2:
        numbers.append(rng.choice(values))
    elif slip < 0.3:
        numbers[0] = rng.randint(0, 14)
    known = gp.solutions(values)
    text = rng.choice(known) if known and rng.random() < 0.3 else tree(numbers)
    if rng.random() < 0.25:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(("", *"0123456789+-*/() ^x.")) + text[at + rng.randrange(2):]
    return text


def test_verifier_agrees_on_random_formulas():
    rng, seen = random.Random(0), Counter()
    while seen.total() < 4000:
        values = rng.choice(ALL_VALUES)
        text = random_formula(rng, values)
        if has_leading_zero(text):
            continue
        category, reason = gp.grade(text, list(values), 24)
        assert category == judge(text, values), (text, values)
        if category == "wrong_value":
            assert reason == f"the formula equals {evaluate(text)[0]} instead of 24"
        seen[category] += 1
    assert len(seen) == 4 and min(seen.values()) > 200, seen  # every kind was really tried


TOKENS = st.lists(st.sampled_from(["0", "1", "2", "3", "4", "5", "10", " ", "(", ")", *"+-*/+-*/"]), max_size=40)


@FUZZ
@given(TOKENS.map("".join).filter(lambda text: not has_leading_zero(text)))
def test_verifier_agrees_on_any_text_over_the_formula_alphabet(text):
    env = GeneralPoints()
    env.reset(0)
    assert env.step(env.answer(text))[4]["category"] == judge(text, env.values)


# ---------------------------------------------------------------- the decided rewards, worked out by hand
RIGHT, WRONG = "8/(3-8/3)", "3+3+8+8"  # for the table 3 3 8 8; the second equals 22
CASES = [  # formula for the table 3 3 8 8, reward of an answer that is not the last, what the verifier says
    (RIGHT, 5, ""),
    (" ( (8) ) / ( 3 - (8/3) ) ", 5, ""),
    ("8/(-(8/3)+3)", 5, ""),  # unary minus is legal
    ("-8/(--(8/3)+-3)", 5, ""),
    (RIGHT + "=24", 5, ""),
    (RIGHT + " = 25 = x", 5, ""),  # what follows '=' is dropped, whatever it says
    (WRONG, -1, "the formula equals 22 instead of 24"),
    (WRONG + "=24", -1, "the formula equals 22 instead of 24"),
    ("8*3+3/8", -1, "the formula equals 195/8 instead of 24"),
    ("-8*3-(8-8)*3", -2, "the number 8 is used too often"),
    ("3*8", -2, "the number 3 is used too rarely"),
    ("3*8+3-3", -2, "the number 8 is used too rarely"),
    ("8+8+8", -2, "the number 3 is not used"),
    ("3+3+3+3+3+3+8-8+8-8+3+3", -2, "the number 3 is used too often"),
    ("3*8*(9-8)", -2, "the number 9 is not on the table"),  # equals 24, yet only -2: penalties never add up
    ("24", -2, "the number 24 is not on the table"),
    ("24=" + RIGHT, -2, "the number 24 is not on the table"),
    ("33-8/8", -2, "the number 33 is not on the table"),  # digits may not be glued together
    ("", -3, "empty"),
    ("=24", -3, "empty"),
    ("8/(3-3)+8", -3, "divides by zero"),
    ("8/(3-3)", -3, "divides by zero"),  # illegal outweighs the missing number
    ("3*8/(8-8/(3-3))", -3, "divides by zero"),
    ("8/(3-8/3", -3, "unbalanced bracket"),
    ("8/(3-8)/3)", -3, "unbalanced bracket"),
    (")3+3+8+8(", -3, ""),
    ("3+3+8+", -3, "a number is missing"),
    ("3+()+8+8", -3, "a number is missing"),
    ("3**8", -3, "a number is missing"),  # Python's power and floor division do not exist here
    ("8//3", -3, "a number is missing"),
    ("3 3 8 8", -3, "an operator is missing"),
    ("(3+3)(8+8)", -3, "an operator is missing"),
    ("3+3+8x8", -3, "illegal character 'x'"),
    ("3^3+8+8", -3, "illegal character '^'"),
    ("8.0*3", -3, "illegal character '.'"),
    ("3+3+8+８", -3, "illegal character '８'"),  # a full-width digit is \d to `re`
    ("3+3\n+8+8", -3, "illegal character '\\n'"),
    ("__import__('os')", -3, "illegal character '_'"),
    ("+".join("3" * 65), -3, "too long"),
]


@pytest.mark.parametrize("formula, reward, message", CASES)
def test_reward_and_message_of_one_answer(formula, reward, message):
    env = deal("3", "3", "8", "8", verify_iters=2)
    _, got, terminated, truncated, info = env.step(env.answer(formula))
    assert (got, terminated, truncated, info["attempt"]) == (reward, reward == 5, False, 1)
    assert info["correct"] is terminated and info["action"] is None
    assert message in info["feedback"] and bool(info["feedback"]) == (reward != 5)
    assert info["category"] == {5: "correct", -1: "wrong_value", -2: "wrong_numbers", -3: "illegal"}[reward]
    if reward != 5:  # the same answer as the last one costs exactly one point more
        _, got, terminated, truncated, info = env.step(env.answer(formula))
        assert (got, terminated, truncated, info["attempt"]) == (reward - 1, False, True, 2)


def test_message_is_the_sentence_the_model_reads():
    env = deal("2", "3", "4", "5")
    obs, *_, info = env.step(env.answer("3*5+4*2=24"))
    assert info["feedback"] == "You failed this trial: the formula equals 23 instead of 24. Try again."
    assert obs["messages"][-1] == {"role": "user", "content": info["feedback"]}


@pytest.mark.parametrize("answer", ["", "I do not know.", "{}", "[]", "null", "24", '"formula"', '{"formula": null}',
                                    '{"formula": 24}', '{"formula": ["8/(3-8/3)"]}', '{"Formula": "8/(3-8/3)"}'])
def test_no_formula_is_illegal_and_says_so(answer):
    _, reward, *_, info = deal("3", "3", "8", "8").step(answer)
    assert reward == -3 and 'no "formula" was found' in info["feedback"]


def test_rewards_over_an_episode_that_runs_out():
    env = deal("3", "3", "8", "8")  # the paper's five attempts
    results = [env.step(env.answer(f)) for f in (WRONG, "3*8", "8/0", WRONG, WRONG)]
    assert [r[1] for r in results] == [-1, -2, -3, -1, -2]
    assert [r[2] for r in results] == [False] * 5
    assert [r[3] for r in results] == [False] * 4 + [True]
    assert [r[4]["attempt"] for r in results] == [1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError):
        env.step(env.answer(RIGHT))
    env.reset(0)  # and a new episode starts from one
    assert env.step(env.mistake())[4]["attempt"] == 1


def test_success_on_the_last_attempt_earns_the_full_reward():
    env = deal("3", "3", "8", "8")
    for _ in range(4):
        env.step(env.answer(WRONG))
    _, reward, terminated, truncated, _ = env.step(env.answer(RIGHT))
    assert (reward, terminated, truncated) == (5, True, False)
    with pytest.raises(RuntimeError):
        env.step(env.answer(RIGHT))


@pytest.mark.parametrize("formula, reward", [(RIGHT, 5), (WRONG, -2), ("3*8", -3), ("8/0", -4), ("x", -4)])
def test_a_single_attempt_is_first_and_last(formula, reward):
    env = deal("3", "3", "8", "8", verify_iters=1)
    _, got, terminated, truncated, _ = env.step(env.answer(formula))
    assert (got, terminated, truncated) == (reward, reward == 5, reward != 5)
    with pytest.raises(RuntimeError):
        env.step(env.answer(RIGHT))


def test_rule_decides_what_a_face_card_is_worth():
    """The numbers of one rule are not on the table under another."""
    env = deal("A", "A", "2", "Q", rule="face")
    assert "the number 10 is not on the table" in env.step(env.answer("10*2+1+1"))[4]["feedback"]
    assert env.step(env.answer("12*2*1*1"))[1] == 5
    env = deal("2", "2", "Q", "K", rule="ten")
    assert "the number 12 is not on the table" in env.step(env.answer("12*2*(13-2)"))[4]["feedback"]
    assert env.step(env.answer("10+10+2+2"))[1] == 5
    env = deal("A", "3", "J", "Q", rule={"J": 7, "Q": 20, "K": 1})
    assert env.step(env.answer("20+7-3*1"))[1] == 5


# ---------------------------------------------------------------- the conversation
@pytest.mark.parametrize("rule, numbers", [("ten", (10, 10, 10)), ("face", (11, 12, 13)), (OTHER_RULE, (7, 20, 99))])
def test_prompt_states_task_rule_and_cards(rule, numbers):
    env = GeneralPoints(rule=rule, target=36)
    obs, info = env.reset(7)
    (turn,) = obs["messages"]
    assert turn["role"] == "user" and obs["image"] is None
    for rank, number in zip("JQK", numbers):
        assert f"'{rank}' counts as {number}" in turn["content"]
    assert "36" in turn["content"] and "24" not in turn["content"]
    assert json.loads(turn["content"].rsplit("Cards: ", 1)[1]) == env.cards
    assert "{{" not in turn["content"] and "{cards}" not in turn["content"]
    assert info["cluster"] == str(sorted({"A": 1, **dict(zip("JQK", numbers))}.get(c) or int(c) for c in env.cards))


def test_sequential_revision_keeps_every_answer_and_verdict():
    """v_in(t) = prompt, then (answer, verdict) of each earlier attempt, verbatim; earlier observations do not change."""
    env = deal("3", "3", "8", "8")
    answers = ["nonsense {cards} {target} \ud800", env.answer(WRONG), env.answer(RIGHT)]
    (first, _, _, _, i0), (second, _, _, _, i1), (third, *_) = [env.step(a) for a in answers]
    turns = [(m["role"], m["content"]) for m in third["messages"]]
    assert turns[1:] == [("assistant", answers[0]), ("user", i0["feedback"]), ("assistant", answers[1]),
                         ("user", i1["feedback"]), ("assistant", answers[2])]  # no verdict after success
    assert [len(o["messages"]) for o in (first, second, third)] == [3, 5, 6]


# ---------------------------------------------------------------- answers that are nearly JSON
GOOD = '"cards": ["3", "8", "3", "8"], "number": [3, 8, 3, 8], "formula": "8/(3-8/3)=24"'
BAD = '"cards": ["2"], "number": [2], "formula": "1+1"'


@pytest.mark.parametrize("answer", [
    "{" + GOOD + "}", "{" + GOOD + ",}", GOOD, "{" + GOOD,
    "{" + GOOD.replace('"8"]', '"8",]') + "}",
    "{" + GOOD.replace('"8"]', '"8" , ]') + ",}",
    "{" + GOOD.replace('"', "'") + "}",
    "{" + GOOD.replace('"3"', "3") + ",}",
    "Let me see.\n```json\n{" + GOOD + "}\n```\nThat is it!",
    "{" + GOOD + "} or else {" + BAD + "}",
    "[{" + GOOD + "}]",
    "{" + GOOD.replace(": ", "\t:\n ").replace(", ", "\n,\n\t").replace("[", "[ \n").replace("]", "\n]") + ",}",
    "{" + GOOD.replace(", ", ",\r\n  ").replace("]", "\r\n]") + ",}",
], ids=lambda a: ascii(a)[:40])
def test_nearly_json_is_read(answer):
    _, reward, *_, info = deal("3", "3", "8", "8").step(answer)
    assert (reward, info["recognized"]) == (5, True)


def test_first_occurrence_wins_even_when_a_later_one_is_right():
    _, reward, *_, info = deal("3", "3", "8", "8").step("{" + BAD + "} no, {" + GOOD + "}")
    assert (reward, info["recognized"]) == (-2, False)


@pytest.mark.parametrize("cards, recognized", [
    (["10", "4", "10", "4"], True), (["4", "4", "10", "10"], True), ([10, 10, "4", 4], True),
    (["10", "4", "4"], False), (["10", "10", "4", "4", "4"], False), (["10", "10", "10", "4"], False),
    (["J", "10", "4", "4"], False),  # a jack is no ten, though it counts as one
    (["1", "0", "4", "4"], False), ([], False), ("10 10 4 4", False), (None, False), ([["10", "10", "4", "4"]], False)])
def test_recognition_compares_multisets_and_leaves_the_text_reward_alone(cards, recognized):
    answer = {"cards": cards, "formula": "(10*10-4)/4"}
    for text in (json.dumps(answer), json.dumps(answer)[:-1] + ",}"):  # strict and nearly JSON
        _, reward, *_, info = deal("10", "10", "4", "4").step(text)
        assert (reward, info["recognized"]) == (5, recognized)


# ---------------------------------------------------------------- whatever a model may write
def check_any_answer(answer):
    """No exception; both attempts pay what the table allows; a failure is explained, in bounded words and bounded time."""
    env = GeneralPoints(verify_iters=2)
    env.reset(3)
    start = time.process_time()
    for allowed in ({5, -1, -2, -3}, {5, -2, -3, -4}):
        _, reward, terminated, truncated, info = env.step(answer)
        assert reward in allowed and terminated == (reward == 5) and info["category"] in gp.REWARDS
        if terminated:
            assert info["feedback"] == ""
            return
        assert info["feedback"].startswith("You failed this trial: ")
        assert len(info["feedback"]) < 500  # it goes into the next prompt
    assert truncated
    assert time.process_time() - start < 0.5


ANY_TEXT = st.text(st.characters())  # lone surrogates and control characters included
ANY_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
                        lambda x: st.lists(x, max_size=5) | st.dictionaries(ANY_TEXT, x, max_size=5), max_leaves=12)
NEAR_JSON = st.lists(st.sampled_from(['"cards"', "'number'", '"formula"', '"', "'", ":", "[", "]", "{", "}", ",", "\n", "\\",
                                      "10", "K", "1+2", "(", ")", "=", "/0"]), max_size=30).map("".join)


@FUZZ
@given(ANY_TEXT | NEAR_JSON | ANY_JSON.map(json.dumps))
def test_any_text_is_graded(answer):
    check_any_answer(answer)


@FUZZ
@given(st.fixed_dictionaries({}, optional={"cards": ANY_JSON, "number": ANY_JSON, "formula": ANY_JSON | TOKENS.map("".join)}))
def test_any_json_under_the_right_keys_is_graded(answer):
    check_any_answer(json.dumps(answer))
    check_any_answer(json.dumps(answer, ensure_ascii=False)[:-1] + ",}")


N = 1_000_000
HUGE = {
    "open lists": '"cards": [' * (N // 10), "open lists, single quotes": "'number':[" * (N // 10),
    "open formulas": '"formula": "' * (N // 12), "keys only": '"cards"' * (N // 7), "spaces": '"cards"' + " " * N + ":",
    "spaced lists": ('"cards"  :' + " " * 90 + "[") * (N // 100), "brackets": "[" * N, "braces": '{"a":' * (N // 5),
    "quotes": "\"'" * (N // 2), "commas": '"cards": [' + "," * N + "]", "escapes": '"' + "\\" * N,
    "letters": "a" * N, "minus": json.dumps({"formula": "-" * N}), "digits": json.dumps({"formula": "9" * N}),
    "big integer": '{"cards": [' + "9" * N + "]}", "big exponent": '{"formula": "1", "cards": [1e' + "9" * 5000 + "]}",
    "integer at Python's digit limit": '{"formula": "1", "cards": [' + "9" * 4301 + "]}",
    "long product": json.dumps({"formula": "*".join(["9" * 200] * 1000)}),
    "product within the token limit": json.dumps({"formula": "*".join(["9999999"] * 32)}),
    "quotients": json.dumps({"formula": "/".join(["9999999"] * 32)}),
    "answer far behind": " " * N + "{" + GOOD + "}",
    "nul": "\0" * N,
    "digits that fit into an answer": json.dumps({"formula": "9" * 9000}),  # more than Python turns into an int
    "spaces that fit into an answer": json.dumps({"formula": "1" + " " * 9000 + "x"}),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_answers_are_graded_in_bounded_time(name):
    check_any_answer(HUGE[name])


@pytest.mark.parametrize("depths", (range(1, 60), range(100, 4990, 37), range(930, 1010)), ids=str)
def test_nested_brackets_at_any_depth_are_graded(depths):
    """Around every depth at which Python's own recursion limit could bite: JSON in, and str() of what it held."""
    env = GeneralPoints(verify_iters=1)
    for depth in depths:
        nested = "[" * depth + "]" * depth
        for answer in (f'{{"cards": [{nested}], "formula": {nested}}}', '{"cards":' * depth + "[]" + "}" * depth,
                       json.dumps({"formula": "(" * depth + "1" + ")" * depth}),
                       json.dumps({"formula": "-(" * depth + "1" + ")" * depth})):
            env.reset(3)
            assert env.step(answer)[1] in (-3, -4)


# ---------------------------------------------------------------- expert answers and mistakes
@pytest.mark.parametrize("options", [
    dict(rule=rule, target=target, expert=expert, split=split)
    for rule in ("ten", "face", OTHER_RULE) for target in (24, 36)
    for expert, split in (("canonical", "train"), ("varied", "all"), ("varied", "unseen"))], ids=str)
def test_experts_are_right_and_mistakes_wrong(options):
    env, slips = GeneralPoints(**options), Counter()
    for seed in range(100):
        env.reset(seed)
        mistake, expert = env.mistake(), env.expert()
        _, reward, *_, info = env.step(mistake)
        slips[info["category"], len(re.findall(r"\d+", formula_of(mistake).split("=")[0]))] += 1
        assert reward == {"wrong_value": -1, "wrong_numbers": -2}[info["category"]]
        _, reward, terminated, _, info = env.step(expert)
        assert (reward, terminated, info["recognized"]) == (5, True, True)
        for answer in (mistake, expert):
            read = json.loads(answer)
            assert list(read) == ["cards", "number", "formula"]  # in the order the prompt asks for
            assert read["cards"] == env.cards and sorted(read["number"]) == env.values
            assert read["formula"].endswith(f"={options['target']}")
        assert evaluate(formula_of(expert).split("=")[0]) == (options["target"], env.values)
    assert set(slips) == {("wrong_value", 4), ("wrong_numbers", 3), ("wrong_numbers", 4)}  # every kind of slip is made


def test_canonical_expert_is_one_formula_per_multiset_and_varied_is_not():
    env, formulas = {}, {}
    for kind in ("canonical", "varied"):
        env, formulas[kind], orders = GeneralPoints(expert=kind), defaultdict(set), defaultdict(set)
        for seed in range(3000):
            _, info = env.reset(seed)
            formulas[kind][info["cluster"]].add(formula_of(env.expert()))
            orders[info["cluster"]].add(tuple(env.cards))
        assert sum(len(o) > 1 for o in orders.values()) > 100  # the same values really came in other orders
    assert {len(f) for f in formulas["canonical"].values()} == {1}
    assert sum(len(f) > 1 for f in formulas["varied"].values()) > 100


# ---------------------------------------------------------------- which hands are dealt
def multisets(**options):
    """Every value multiset that may be dealt. Reads the private list: sampling would miss the rare hands."""
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
    assert not both["train"] & both["unseen"]  # nor does training under one rule touch the other's unseen hands
    assert {values for _, values in dealt(split="unseen")} <= both["unseen"]


def test_unseen_is_an_eighth_for_ever():
    """Trained checkpoints depend on this choice: the count and the first few are pinned, computed apart from gp.py."""
    unseen = [v for v in ALL_VALUES if gp.is_unseen(v)]
    assert abs(len(unseen) / 1820 - 1 / 8) < 0.03  # 4 standard deviations
    assert unseen == [v for v in ALL_VALUES if hashlib.sha256(f"gp|{v}".encode()).hexdigest()[1] in "08"]
    assert unseen[:3] == [(1, 1, 1, 3), (1, 1, 1, 8), (1, 1, 3, 9)]
    assert all(gp.is_unseen(v[::-1]) and gp.is_unseen(list(v)) for v in unseen)


@pytest.mark.parametrize("replacement", (False, True))
def test_require_face(replacement):
    def holds_face(cards):
        return bool(set(cards) & {"J", "Q", "K"})
    for rule in ("ten", "face"):
        hands = [cards for cards, _ in dealt(rule=rule, replacement=replacement, require_face=True)]
        assert all(map(holds_face, hands))
        assert {rank for h in hands for rank in h} == set(gp.RANKS)  # beside a face any other rank may lie
    assert {holds_face(cards) for cards, _ in dealt(replacement=replacement)} == {True, False}


# card hands per rank hand: of one deck 4^4, 6*4*4, 6*6, 4*4, 1; with replacement the orders 4!, 4!/2, 4!/2/2, 4!/3!, 1
ODDS = {False: {(1, 1, 1, 1): 256, (1, 1, 2): 96, (2, 2): 36, (1, 3): 16, (4,): 1},
        True: {(1, 1, 1, 1): 24, (1, 1, 2): 12, (2, 2): 6, (1, 3): 4, (4,): 1}}


def pattern(cards):
    return tuple(sorted(Counter(cards).values()))


@pytest.mark.parametrize("replacement", (False, True))
def test_hands_come_with_the_odds_of_the_deck(replacement, solvable_values):
    """Among solvable hands; a loose check (4 standard deviations) that still tells the two ways of dealing apart."""
    ranks, n = "A 2 3 4 5 6 7 8 9 10 J Q K".split(), 6000
    weight = {h: ODDS[replacement][pattern(h)] for h in combinations_with_replacement(ranks, 4)
              if tuple(sorted(min(ranks.index(r) + 1, 10) for r in h)) in solvable_values}
    hands = [cards for cards, _ in dealt(n, split="all", replacement=replacement)]
    events = [lambda h, p=p: pattern(h) == p for p in ODDS[replacement]] + [lambda h, r=r: r in h for r in ("A", "7", "10", "Q")]
    for event in events:
        p = sum(w for h, w in weight.items() if event(h)) / sum(weight.values())
        assert abs(sum(map(event, hands)) / n - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1 / n
    first_is_lowest = sum(h[0] == min(h, key=ranks.index) for h in hands if pattern(h) == (1, 1, 1, 1))
    distinct = sum(pattern(h) == (1, 1, 1, 1) for h in hands)
    assert abs(first_is_lowest / distinct - 1 / 4) < 0.03  # the cards lie in any order


def test_only_hands_that_can_make_the_target_are_dealt():
    for cards, values in dealt(150, target=36, rule="face", split="all"):
        assert solvable([(n, 1) for n in values], 36), cards
    assert {values for _, values in dealt(20, target=10_000, split="all")} == {(10, 10, 10, 10)}


# ---------------------------------------------------------------- the seed decides everything
EPISODES = """
import json, gp
log = []
for options in (dict(expert="varied"), dict(rule="face", split="all", replacement=True, require_face=True)):
    env = gp.GeneralPoints(**options)
    for seed in (0, 1, 2, 12345):
        log.append(env.reset(seed))
        log.extend(env.step(answer) for answer in (env.mistake(), env.mistake(), env.expert()))
print(json.dumps(log))
"""


def python(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_same_seed_same_episode_to_the_byte_in_any_process():
    one, two = (python(EPISODES, PYTHONHASHSEED=seed) for seed in "12")
    assert one == two and len(one) > 1000


def test_same_seed_same_episode_whatever_happened_before():
    env, other = GeneralPoints(expert="varied"), GeneralPoints(expert="varied")

    def play(e, seed):
        return e.reset(seed), e.step(e.mistake()), e.step(e.expert())

    episodes = [play(env, seed) for seed in range(20)]
    other.reset(99)
    other.mistake()
    assert [play(other, seed) for seed in reversed(range(20))][::-1] == episodes
    assert len({str(e[0]) for e in episodes}) > 15  # and other seeds deal other hands


def test_global_random_state_is_neither_read_nor_moved():
    env, starts = GeneralPoints(expert="varied"), []
    for global_seed in (1, 2):
        random.seed(global_seed)
        before = random.getstate()
        starts.append((env.reset(5), env.mistake(), env.expert()))
        assert random.getstate() == before
    assert starts[0] == starts[1]


# ---------------------------------------------------------------- GP-VL: the table as a picture
MISREAD_TEXT = 'You failed this trial: the "cards" in the answer are not the cards in the picture. Try again.'
NO_CARDS_TEXT = 'You failed this trial: no "cards" were found in the answer. Try again.'


def pictured(**options):
    return GeneralPoints(**{"image_size": [112, 112], **options})


@lru_cache(maxsize=None)
def seed_of(*cards):
    """First seed of the split `all`, dealt with replacement, that deals these cards; found without drawing pictures."""
    env = GeneralPoints(split="all", replacement=True)
    return next(seed for seed in count() if env.reset(seed) and sorted(env.cards) == sorted(cards))


def deal_pictured(*cards, **options):
    env = pictured(split="all", replacement=True, **options)
    env.reset(seed_of(*cards))
    assert sorted(env.cards) == sorted(cards)
    return env


def spoken(obs):
    """All that the environment wrote into a conversation, as texts."""
    said = [m["content"] for m in obs["messages"] if m["role"] == "user"]
    return [part["text"] for part in said[0] if part["type"] == "text"] + said[1:]


def table_in(image):
    """(rank, suit) pairs from left to right, read from the pixels of an unjittered 112 x 112 picture."""
    return [read_card(picture[1:-1, 1:-1]) for picture in cut_out(image)]


def test_prompt_is_the_picture_and_a_text_that_knows_nothing_of_it():
    for options in ({}, {"rule": "face", "require_face": True}, {"suits": "red"}, {"jitter": True}):
        env, texts = pictured(**options), set()
        for seed in range(60):
            obs, _ = env.reset(seed)
            (message,) = obs["messages"]
            assert message["role"] == "user" and [part["type"] for part in message["content"]] == ["image", "text"]
            texts.add(message["content"][1]["text"])
        (text,) = texts  # the same words whatever the cards
        assert text.endswith("Cards: in the picture.") and "[\"" not in text
        words = GeneralPoints(**{k: v for k, v in options.items() if k != "jitter"}).reset(0)[0]["messages"][0]["content"]
        assert text.split("Cards:")[0] == words.split("Cards:")[0]  # else that of GP-L


def check_nothing_is_given_away(answer):
    """An answer that does not name the cards gets one of two sentences, which hold for any table."""
    for recognition in ("gate", "additive"):
        env = pictured(recognition=recognition, verify_iters=2)
        env.reset(3)
        for _ in range(2):
            obs, _, terminated, _, info = env.step(answer)
            if info["recognized"] or terminated:
                break
            assert info["feedback"] in (MISREAD_TEXT, NO_CARDS_TEXT)
            assert spoken(obs)[1:] == [info["feedback"]] * info["attempt"]
        assert [m["content"] for m in obs["messages"] if m["role"] == "assistant"] == [answer] * info["attempt"]
        assert all(isinstance(m["content"], str) for m in obs["messages"][1:])  # one picture, in the first message


CARD_LISTS = st.lists(st.sampled_from([*gp.RANKS, "1", "", 10, 7, None, "spades", "\n"]), max_size=5)
FORMULAS = st.sampled_from(["8/(3-8/3)", "1+1", "3*8", "1/0", "(", "x", "", None, 24]) | TOKENS.map("".join)


@FUZZ
@given(ANY_TEXT | NEAR_JSON | ANY_JSON.map(json.dumps)
       | st.fixed_dictionaries({}, optional={"cards": CARD_LISTS | ANY_JSON, "formula": FORMULAS}).map(json.dumps))
def test_feedback_on_cards_not_read_says_nothing_about_them(answer):
    check_nothing_is_given_away(answer)


@pytest.mark.parametrize("formula", [RIGHT, WRONG, "3*8", "8*8*9", "3+3+8+x", "8/(3-3)+8", "", "(", None])
def test_feedback_on_any_formula_is_the_same_while_the_cards_are_misread(formula):
    """The numbers that a formula lacks or equals would tell the table."""
    check_nothing_is_given_away(json.dumps({"cards": ["A", "A", "A", "A"], "formula": formula}))
    check_nothing_is_given_away(json.dumps({"formula": formula}))


GRADED = {RIGHT: 5, WRONG: -1, "3*8": -2, "8*3*9/9": -2, "8/0": -3, "3+": -3, None: -3}  # table 3 3 8 8
READ, MISREAD = ["8", "3", "8", "3"], ["8", "3", "8", "4"]
PICTURE_CASES = [  # recognition, cards named, formula, reward when it is not the last answer, category, feedback
    ("gate", MISREAD, RIGHT, -1.5, "misread", MISREAD_TEXT),  # the right formula does not count
    ("gate", MISREAD, WRONG, -1.5, "misread", MISREAD_TEXT),
    ("gate", MISREAD, "3*8", -1.5, "misread", MISREAD_TEXT),
    ("gate", MISREAD, "8/0", -1.5, "misread", MISREAD_TEXT),
    ("gate", MISREAD, None, -1.5, "misread", MISREAD_TEXT),
    ("gate", [], RIGHT, -1.5, "misread", MISREAD_TEXT),  # an empty list is a list
    ("gate", None, RIGHT, -3, "illegal", NO_CARDS_TEXT),
    ("gate", None, WRONG, -3, "illegal", NO_CARDS_TEXT),
    ("gate", None, None, -3, "illegal", NO_CARDS_TEXT),
    ("gate", "3388", RIGHT, -3, "illegal", NO_CARDS_TEXT),  # no list
    ("additive", MISREAD, RIGHT, 3.5, "correct", ""),  # solved: 5 - 1.5
    ("additive", None, RIGHT, 3.5, "correct", ""),
    ("additive", MISREAD, WRONG, -2.5, "wrong_value", MISREAD_TEXT),
    ("additive", MISREAD, "3*8", -3.5, "wrong_numbers", MISREAD_TEXT),
    ("additive", MISREAD, "8/0", -4.5, "illegal", MISREAD_TEXT),
    ("additive", MISREAD, None, -4.5, "illegal", MISREAD_TEXT),
    ("additive", None, WRONG, -2.5, "wrong_value", NO_CARDS_TEXT),
    ("additive", None, "3+", -4.5, "illegal", NO_CARDS_TEXT),
    ("additive", "3388", None, -4.5, "illegal", NO_CARDS_TEXT)]


@pytest.mark.parametrize("recognition, cards, formula, reward, category, feedback", PICTURE_CASES)
def test_reward_of_misread_cards(recognition, cards, formula, reward, category, feedback):
    """PAPER.md, rewards decided: gate pays -1.5 instead of the grading, additive the grading - 1.5; the last costs 1 more."""
    env = deal_pictured("3", "3", "8", "8", recognition=recognition, verify_iters=2)
    answer = {k: v for k, v in (("cards", cards), ("formula", formula)) if v is not None}
    solved = category == "correct"
    _, got, terminated, truncated, info = env.step(json.dumps(answer))
    assert (got, terminated, truncated) == (reward, solved, False)
    assert (info["category"], info["recognized"], info["feedback"]) == (category, False, feedback)
    if not solved:
        _, got, terminated, truncated, info = env.step(json.dumps(answer))
        assert (got, terminated, truncated, info["category"]) == (reward - 1, False, True, category)
    with pytest.raises(RuntimeError):
        env.step(env.answer(RIGHT))


@pytest.mark.parametrize("formula, reward", GRADED.items())
@pytest.mark.parametrize("recognition", ("gate", "additive"))
def test_cards_read_right_are_graded_as_in_text(recognition, formula, reward):
    answer = json.dumps({"cards": READ, "formula": formula})
    texts = []
    for env in (deal_pictured("3", "3", "8", "8", recognition=recognition, verify_iters=2),
                deal("3", "3", "8", "8", verify_iters=2)):
        _, got, terminated, _, info = env.step(answer)
        assert (got, terminated, info["recognized"]) == (reward, reward == 5, True)
        texts.append(info["feedback"])
        if reward != 5:
            assert env.step(answer)[1:4] == (reward - 1, False, True)
    assert texts[0] == texts[1] and bool(texts[0]) == (reward != 5)


@pytest.mark.parametrize("recognition", ("gate", "additive"))
def test_recognition_is_judged_as_a_multiset(recognition):
    def reward(cards, formula=RIGHT, table=("3", "3", "8", "8")):
        _, got, *_, info = deal_pictured(*table, recognition=recognition).step(json.dumps({"cards": cards, "formula": formula}))
        assert info["recognized"] == (got == 5)
        return got

    misread = -1.5 if recognition == "gate" else 3.5
    assert {reward(p) for p in set(permutations(["3", "3", "8", "8"]))} == {5}
    assert reward([3, 8, "3", 8]) == 5  # numbers are as good as strings
    for wrong in (["3", "3", "8", "9"], ["3", "3", "8"], ["3", "3", "8", "8", "8"], ["3", "3", "3", "8"], ["3", "8"],
                  ["3", "3", "8", "8", ""], ["3388"], ["A", "2", "4", "5"], []):
        assert reward(wrong) == misread, wrong
    face = "(10*10-4)/4", ("J", "10", "4", "4")
    assert reward(["4", "J", "4", "10"], *face) == 5
    assert reward(["4", "10", "4", "10"], *face) == reward(["4", "J", "4", "J"], *face) == misread  # counts as ten, is none


def test_right_cards_on_the_second_look_are_paid_in_full():
    for recognition, first in (("gate", -1.5), ("additive", -2.5)):
        env = deal_pictured("3", "3", "8", "8", recognition=recognition, verify_iters=2)
        assert env.step(json.dumps({"cards": MISREAD, "formula": WRONG}))[1] == first
        assert env.step(env.answer(RIGHT))[1:4] == (5, True, False)


def test_recognition_setting_is_nothing_to_text():
    def play(recognition):
        env = deal("3", "3", "8", "8", recognition=recognition)
        assert env.references == () and [name for name, *_ in env.reports] == ["success"]
        return [env.step(json.dumps({"cards": cards, "formula": f})) for cards, f in
                ((MISREAD, WRONG), (None, "3*8"), (MISREAD, None), (MISREAD, RIGHT))]

    assert play("gate") == play("additive")
    assert [turn[1] for turn in play("gate")] == [-1, -2, -3, 5]
    assert [turn[4]["recognized"] for turn in play("gate")] == [False] * 4


@FUZZ
@given(ANY_TEXT | NEAR_JSON | ANY_JSON.map(json.dumps)
       | st.fixed_dictionaries({}, optional={"cards": CARD_LISTS, "formula": FORMULAS}).map(json.dumps))
def test_any_answer_to_a_picture_is_paid_from_the_table(answer):
    for recognition, rewards in (("gate", {5, -1, -2, -3, -1.5}), ("additive", {5, 3.5, -1, -2.5, -2, -3.5, -3, -4.5})):
        env = pictured(recognition=recognition, verify_iters=2)
        env.reset(3)
        for last in (False, True):
            _, reward, terminated, truncated, info = env.step(answer)
            assert reward + (last and not terminated) in rewards and truncated == (last and not terminated)
            assert terminated == (reward > 0) == (info["category"] == "correct")
            if terminated:
                break


# ---------------------------------------------------------------- GP-VL: which cards lie there
LOOKS = [dict(image_size=[112, 112], suits=s, jitter=j) for s in ("black", "red", "mixed") for j in (False, True)]


def test_pictures_change_nothing_about_the_game():
    """Same seed: same cards in the same order, same expert answers and mistakes, in words, in any suits, jittered or not."""
    def episodes(**options):
        env = GeneralPoints(expert="varied", **options)
        return [(env.reset(seed)[1], list(env.cards), env.expert(), env.mistake(), env.expert()) for seed in range(40)]

    words = episodes()
    assert all(episodes(**look) == words for look in LOOKS)
    assert episodes(image_size=[300, 100], recognition="additive") == words == episodes(recognition="additive")


@pytest.mark.parametrize("suits", ("black", "red", "mixed"))
def test_picture_shows_the_table_in_the_suits_asked_for(suits):
    """Read back from the pixels: ranks in the order that the expert names them, equal ranks in different suits."""
    allowed = {"black": {"spades", "clubs"}, "red": {"hearts", "diamonds"},
               "mixed": {"spades", "clubs", "hearts", "diamonds"}}[suits]
    env, seen, most = pictured(suits=suits, split="all", replacement=True), Counter(), 0
    for seed in [*range(60), seed_of("3", "3", "8", "8"), seed_of("6", "6", "6", "6"), seed_of("Q", "Q", "Q", "6")]:
        obs, _ = env.reset(seed)
        assert obs["image"].mode == "RGB" and obs["image"].size == (112, 112)
        table = table_in(obs["image"])
        assert [rank for rank, _ in table] == env.cards == json.loads(env.expert())["cards"]
        for rank, number in Counter(env.cards).items():
            mine = [suit for r, suit in table if r == rank]
            assert len(set(mine)) == min(number, len(allowed))
            most = max(most, number)
        seen.update(suit for _, suit in table)
        pixels = np.asarray(obs["image"]).astype(int)
        red, dark = pixels[..., 0] - pixels[..., 1] > 100, pixels.max(2) < 60
        assert red.any() or suits != "red" and dark.any()
        assert not (suits == "black" and red.any()) and not (suits == "red" and dark.any())
    assert most == 4 and set(seen) == allowed and min(seen.values()) > 0.5 * max(seen.values())


def test_red_and_black_pictures_differ_in_suits_alone():
    black, red = pictured(), pictured(suits="red")
    for seed in range(20):
        one, two = (table_in(env.reset(seed)[0]["image"]) for env in (black, red))
        assert [rank for rank, _ in one] == [rank for rank, _ in two] and not set(one) & set(two)


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_one_picture_per_episode(look):
    """The very same object at every step, so that whoever looks at it need look only once; a new one after `reset`."""
    env, answer = GeneralPoints(**look), json.dumps({"cards": ["A"], "formula": "1"})
    obs, _ = env.reset(0)
    first = obs["image"]
    pixels = first.tobytes()
    for _ in range(5):
        assert env.step(answer)[0]["image"] is first
    again = env.reset(0)[0]["image"]
    assert again is not first and again.tobytes() == first.tobytes() == pixels
    others = [env.reset(seed)[0]["image"].tobytes() for seed in range(1, 20)]
    assert len({pixels, *others}) > 15
    assert GeneralPoints(**look).reset(7)[0]["image"].tobytes() == others[6]  # whatever was dealt before
    assert GeneralPoints().reset(0)[0]["image"] is None


def test_pictures_are_the_same_in_any_process():
    code = f"""
import hashlib, gp
digest = hashlib.sha256()
for look in {LOOKS!r}:
    env = gp.GeneralPoints(**look)
    for seed in (0, 1, 12345):
        digest.update(env.reset(seed)[0]["image"].tobytes())
print(digest.hexdigest())"""
    one, two = (python(code, PYTHONHASHSEED=seed) for seed in "12")
    assert one == two and len(one) == 65


def test_jitter_moves_the_cards_and_not_the_answer(monkeypatch):
    """Another order on the table than in the expert's list, which is judged as a multiset and so earns the full reward."""
    tables, draw = [], gp.cards.draw_table

    def recorded(table, *args, **kwargs):
        tables.append((list(table), kwargs["jitter"] is not None))
        return draw(table, *args, **kwargs)

    jittered, plain, orders = pictured(jitter=True, suits="mixed"), pictured(suits="mixed"), set()
    monkeypatch.setattr(gp.cards, "draw_table", recorded)
    for seed in range(30):
        image, other = (env.reset(seed)[0]["image"] for env in (jittered, plain))
        (moved, shaken), (still, quiet) = tables[-2:]
        assert image.tobytes() != other.tobytes() and shaken and not quiet
        assert Counter(moved) == Counter(still) and [rank for rank, _ in still] == plain.cards == jittered.cards
        if len(set(still)) == 4:
            orders.add(tuple(map(moved.index, still)))
        _, reward, terminated, *_ = jittered.step(jittered.expert())
        assert (reward, terminated) == (5, True)
    assert len(orders) > 10


@pytest.mark.parametrize("options", [{}, {"split": "all"}, {"split": "unseen"}, {"rule": "face", "require_face": True},
                                     {"rule": "face", "split": "unseen", "require_face": True, "replacement": True},
                                     {"split": "all", "replacement": True}, {"suits": "red", "jitter": True}], ids=str)
def test_reference_names_the_likeliest_hand_of_the_deck(options, solvable_values):
    """Whatever lies on the table, and with a formula for it. Every hand of the 52 cards (or of four draws with replacement), counted one by one."""
    deck = [rank for rank in range(13) for _ in range(4)]
    hands = Counter(tuple(sorted(h)) for h in product(range(13), repeat=4)) if options.get("replacement") \
        else Counter(combinations(deck, 4))
    assert hands.total() == (13 ** 4 if options.get("replacement") else 270_725)

    def dealt(hand):
        values = tuple(min(r + 1, 10) if options.get("rule") != "face" else r + 1 for r in hand)
        apart = hashlib.sha256(f"gp|{values}".encode()).hexdigest()[1] in "08"  # see test_unseen_is_an_eighth_for_ever
        split = options.get("split", "train")
        return values in solvable_values and (split == "all" or apart == (split == "unseen")) \
            and (not options.get("require_face") or hand[-1] >= 10)

    env = pictured(**options)
    assert env.references == ("likeliest cards",) and [name for name, *_ in env.reports] == ["success", "recognition"]
    answers = {env.reference("likeliest cards") for seed in range(5) if env.reset(seed)}
    (answer,) = map(json.loads, answers)
    # a rank hand is as likely as the card hands that show it, each as likely as it was counted above
    odds = Counter()
    for hand, n in hands.items():
        odds[tuple(sorted(hand))] += n * dealt(tuple(sorted(hand)))
    hand = tuple(sorted(gp.RANKS.index(c) for c in answer["cards"]))
    assert odds[hand] == max(odds.values())
    numbers = [r + 1 if options.get("rule") == "face" else min(r + 1, 10) for r in map(gp.RANKS.index, answer["cards"])]
    value, used = evaluate(answer["formula"].split("=")[0])
    assert answer["number"] == numbers and (value, sorted(used)) == (24, sorted(numbers))
    with pytest.raises(ValueError, match="none of likeliest cards"):
        env.reference("blind")


def test_reference_is_right_where_its_cards_lie():
    """It neither moves the table's random stream nor fails on its own hand."""
    env, hit = pictured(), 0
    for seed in range(600):
        env.reset(seed)
        _, _, solved, _, info = env.step(env.reference("likeliest cards"))
        hit += solved
        assert solved == info["recognized"] == (sorted(env.cards) == sorted(json.loads(env.reference("likeliest cards"))["cards"]))
    env.reset(1)
    env.reference("likeliest cards")
    mistake = env.mistake()
    env.reset(1)
    assert env.mistake() == mistake
    assert hit < 6


# ---------------------------------------------------------------- bad arguments, imports
@pytest.mark.parametrize("name, value", [
    ("rule", "eleven"), ("rule", None), ("rule", 10), ("rule", ["J", "Q", "K"]), ("rule", {}), ("rule", {"J": 11, "Q": 12}),
    ("rule", {"J": 11, "Q": 12, "K": 13, "A": 1}), ("rule", {"J": 11, "Q": 12, "K": 0}), ("rule", {"J": 11, "Q": 12, "K": 100}),
    ("rule", {"J": 11, "Q": 12, "K": 13.0}), ("rule", {"J": 11, "Q": 12, "K": "13"}), ("rule", {"J": 11, "Q": 12, "K": True}),
    ("rule", {"J": 11, "Q": 12, 13: "K"}),
    ("target", 0), ("target", -24), ("target", 24.0), ("target", "24"), ("target", True), ("target", None), ("target", 10_001),
    ("split", "test"), ("split", None), ("split", ["train"]), ("expert", "random"), ("expert", None),
    ("replacement", 1), ("replacement", "yes"), ("require_face", 0), ("require_face", None),
    ("verify_iters", 0), ("verify_iters", -1), ("verify_iters", 5.0), ("verify_iters", True), ("verify_iters", 101),
    ("image_size", 112), ("image_size", "112x112"), ("image_size", []), ("image_size", [112]), ("image_size", [112] * 3),
    ("image_size", [112.0, 112]), ("image_size", ["112", 112]), ("image_size", [True, True]), ("image_size", {112: 112}),
    ("image_size", [None, None]), ("image_size", False), ("image_size", [0, 0]), ("image_size", [-112, 112]),
    ("image_size", [112, 20]), ("image_size", [60, 112]), ("image_size", [10, 10]),
    ("suits", "blue"), ("suits", None), ("suits", "spades"), ("suits", ["black"]), ("suits", {}), ("suits", True),
    ("recognition", "none"), ("recognition", None), ("recognition", ["gate"]), ("recognition", True),
    ("jitter", 1), ("jitter", None), ("jitter", "yes"), ("jitter", 0.5)])
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
    with pytest.raises(ValueError, match="no solvable hand makes 9999"):
        GeneralPoints(target=9999)
    split = "train" if gp.is_unseen((10, 10, 10, 10)) else "unseen"  # the only hand that makes 10 000 is in the other
    with pytest.raises(ValueError, match=f"no solvable hand makes 10000 with split {split}"):
        GeneralPoints(target=10_000, split=split)


def test_environment_does_not_import_torch():
    python("import sys, gp; assert 'torch' not in sys.modules")
