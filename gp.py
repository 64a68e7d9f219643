"""GeneralPoints: write a formula that makes 24 from four cards (paper Sec. 4.1, App. A).

The environment deals a solvable hand, in words (GP-L) or as a picture (GP-VL), states the task and
the rule for J, Q and K, and grades one whole answer per `step`. A wrong answer stays in the
conversation together with the verifier's text, and the model may try again, `verify_iters` times
in all (sequential revision, Sec. 3).

Formulas are parsed and computed in exact fractions, never `eval`-ed: 8/(3-8/3) is 24. Rewards are
those of README's table. A hand is `unseen` by the values of its cards: see `is_unseen`. No torch.
"""
import hashlib
import json
import random
import re
from collections import Counter, defaultdict, deque
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, combinations, combinations_with_replacement, cycle, product
from math import comb, factorial, prod
from operator import index
from typing import NamedTuple

from lib.answers import read_fields
from lib.checks import (check_settings, checked, choice, either, fields, flag, list_of, optional,
                        whole)
from scenery import cards
from scenery.cards import RANKS

FACES = ("J", "Q", "K")
RULES = {"ten": {"J": 10, "Q": 10, "K": 10}, "face": {"J": 11, "Q": 12, "K": 13}}
REWARDS = {"correct": 5.0, "wrong_value": -1.0, "wrong_numbers": -2.0, "illegal": -3.0}
MISREAD = -1.5  # GP-VL: the answer's `cards` are not those in the picture
EXHAUSTED = -1.0  # added to the last allowed answer when it fails too
SUIT_SETS = {"black": ("spades", "clubs"), "red": ("hearts", "diamonds"),
             "mixed": tuple(cards.SUITS)}
UNSEEN_SHARE = 8  # one value multiset in eight is dealt in no training stage
MAX_FORMULA = 64  # tokens; a formula that uses four cards once needs at most a third of that


# ---------------------------------------------------------------- solving: exact, no search twice
INVERSE = {"+": "-", "*": "/"}


class Terms(NamedTuple):
    """A formula as one flat sum or product: formulas equal up to order and brackets coincide.

    8/(3-8/3) is Terms("*", ("8",), ("(3-8/3)",)); a lone number has the op "".
    """
    op: str  # "+": terms of a sum; "*": factors of a product
    plus: tuple  # texts of what is added or multiplied, sorted
    minus: tuple  # texts of what is subtracted or divided by, sorted

    def text(self):
        text = self.op.join(self.plus)
        for part in self.minus:
            text += INVERSE[self.op] + part
        return text

    def within(self, op):
        """(plus, minus) as part of a sum or product: itself one of that kind, or a single text."""
        if self.op == op:
            return self.plus, self.minus
        text = self.text()
        if self.op == "+":
            text = f"({text})"
        return (text,), ()


# An operation is + - * / on numbers x and y, or r- and r/: y - x and y / x, as Python's __rsub__.
def _results(x, y):
    """{operation: its result} of two numbers."""
    results = {"+": x + y, "-": x - y, "r-": y - x, "*": x * y}
    if y:
        results["/"] = x / y
    if x:
        results["r/"] = y / x
    return results


def _partners(x, target):
    """{operation: the y for which x operation y is the target, which is not 0}."""
    partners = {"+": target - x, "-": x - target, "r-": target + x}
    if x:
        partners.update({"*": target / x, "/": x / target, "r/": target * x})
    return partners


def _join(x, operation, y):
    """Terms of an operation on two Terms."""
    if operation in ("r-", "r/"):
        x, y = y, x
    op = "+" if operation in ("+", "-", "r-") else "*"
    plus, minus = x.within(op)
    y_plus, y_minus = y.within(op)
    if operation not in ("+", "*"):
        y_plus, y_minus = y_minus, y_plus
    return Terms(op, tuple(sorted(plus + y_plus)), tuple(sorted(minus + y_minus)))


def _splits(values):
    """All pairs of non-empty tuples that share out a sorted tuple, the shorter first."""
    splits = set()
    for size in range(1, len(values) // 2 + 1):
        for picked in combinations(range(len(values)), size):
            first = tuple(values[i] for i in picked)
            second = tuple(v for i, v in enumerate(values) if i not in picked)
            if (second, first) not in splits:
                splits.add((first, second))
    return splits


@lru_cache(maxsize=None)
def _makeable(values):
    """{number: set of Terms} that one to three values can make, each used once. (For the fourth,
    `solutions` solves for the last operation.)"""
    if len(values) == 1:
        return {Fraction(values[0]): {Terms("", (str(values[0]),), ())}}
    made = defaultdict(set)
    for first, second in _splits(values):
        pairs = product(_makeable(first).items(), _makeable(second).items())
        for (x, x_terms), (y, y_terms) in pairs:
            for operation, result in _results(x, y).items():
                for x_term, y_term in product(x_terms, y_terms):
                    made[result].add(_join(x_term, operation, y_term))
    return dict(made)


@lru_cache(maxsize=None)
def solutions(values, target=24):
    """All formulas that make `target` of the sorted tuple `values`, the shortest first.

    Formulas equal up to order and brackets count as one. The last operation is solved for (given x,
    which y makes the target?) and y looked up, instead of trying all pairs.
    """
    target = Fraction(target)
    found = set()
    for first, second in _splits(values):
        y_terms_of = _makeable(second)
        for x, x_terms in _makeable(first).items():
            for operation, y in _partners(x, target).items():
                for x_term, y_term in product(x_terms, y_terms_of.get(y, ())):
                    found.add(_join(x_term, operation, y_term).text())
    return tuple(sorted(sorted(found), key=len))


def is_unseen(values):
    """Whether a multiset of values (under the rule in force) is of the eighth kept for evaluation.

    No training stage shows it: SFT and PPO take split "train", and the pre-training of the bundled
    model leaves it out of hands, sums, wrong tries and lists (mini/corpus_gp.py).
    By SHA-256, the same for ever: checkpoints depend on it.
    """
    digest = hashlib.sha256(f"gp|{tuple(sorted(values))}".encode()).digest()
    return digest[0] % UNSEEN_SHARE == 0


# ---------------------------------------------------------------- computing a formula
CLOSING = {"(": ")", "[": "]", "{": "}"}


class FormulaError(ValueError):
    """The formula is illegal; the text says why and goes back to the model."""


def compute(formula):
    """Value and numbers of a formula with + - * / and brackets of any kind, exactly.

    Args: formula, any string.
    Returns: (Fraction, list of the integers used, in order).
    Raises: FormulaError for anything else, division by zero included. MAX_FORMULA bounds the work.
    """
    bad = re.search(r"[^0-9+\-*/()\[\]{}\s]", formula, re.ASCII)
    if bad:
        raise FormulaError(f"the formula has the illegal character {bad.group()!r}")
    tokens = re.findall(r"\d+|[-+*/()\[\]{}]", formula)
    if len(tokens) > MAX_FORMULA or len(formula) > 4 * MAX_FORMULA:
        raise FormulaError("the formula is too long")
    if not tokens:
        raise FormulaError("the formula is empty")
    rest = deque(tokens + [""])  # with an end marker
    value = _sum(rest)
    _expect("", rest)
    return Fraction(value), [int(token) for token in tokens if token.isdigit()]


# One function per level of precedence. Each takes its tokens from the front of `rest` and returns
# their value, an int until a division makes a Fraction.
def _sum(rest):
    value = _product(rest)
    while rest[0] in ("+", "-"):
        if rest.popleft() == "+":
            value += _product(rest)
        else:
            value -= _product(rest)
    return value


def _product(rest):
    value = _factor(rest)
    while rest[0] in ("*", "/"):
        if rest.popleft() == "*":
            value *= _factor(rest)
        else:
            divisor = _factor(rest)
            if divisor == 0:
                raise FormulaError("the formula divides by zero")
            value = Fraction(value) / divisor
    return value


def _factor(rest):
    token = rest.popleft()
    if token.isdigit():
        return int(token)
    if token == "-":  # a leading minus, as in -1+9
        return -_factor(rest)
    if token in CLOSING:
        value = _sum(rest)
        _expect(CLOSING[token], rest)
        rest.popleft()
        return value
    raise FormulaError("a number is missing in the formula")


def _expect(token, rest):
    """Raise what is wrong if a finished sum is not followed by this token."""
    if rest[0] != token:
        if rest[0] in ("", *CLOSING.values()):
            raise FormulaError("the formula has an unbalanced bracket")
        raise FormulaError("an operator is missing in the formula")


# ---------------------------------------------------------------- reading and grading an answer
class Answer(NamedTuple):
    """What an answer says; None for what is not found in it."""
    cards: list | None  # texts
    formula: str | None


def read_answer(text):
    """The Answer in a text of any kind.

    What follows `=` in the formula is dropped, as the official reader does, and a full stop.
    """
    said = read_fields(text, {"cards": list, "formula": str})
    named, formula = said["cards"], said["formula"]
    if named is not None:
        named = [_card_text(item) for item in named]
    if formula is not None:
        formula = formula.split("=")[0].strip().rstrip(".;,")
    return Answer(named, formula)


def _card_text(item):
    """A card of a list as text: "K", 10, {"rank": "K", "suit": "spades"} or ["K", "spades"]."""
    if isinstance(item, dict):
        ranks = [item[key] for key in ("rank", "card", "name", "value") if key in item]
        item = [*ranks[:1], item.get("suit")]
    parts = item if isinstance(item, list) else [item]
    return " ".join(str(part) for part in parts if isinstance(part, (str, int)))


def grade(formula, values, target):
    """Category (a key of REWARDS) of a formula for the sorted list `values`, and what is wrong."""
    if formula is None:
        return "illegal", 'no "formula" was found in the answer'
    try:
        result, used = compute(formula)
    except FormulaError as error:
        return "illegal", str(error)
    if sorted(used) != values:
        return "wrong_numbers", _misuse(Counter(used), Counter(values))
    if result != target:
        return "wrong_value", f"the formula equals {result} instead of {target}"
    return "correct", ""


def _misuse(used, table):
    """The first thing wrong with the numbers of a formula, as two Counters that differ."""
    for number in used:
        if number not in table:
            return f"the number {number} is not on the table"
    for number in table:
        if number not in used:
            return f"the number {number} is not used"
        if used[number] < table[number]:
            return f"the number {number} is used too rarely"
    number = next(number for number in used if used[number] > table[number])
    return f"the number {number} is used too often"


# ---------------------------------------------------------------- dealing
@lru_cache(maxsize=64)
def _hands(numbers, target, split, replacement, require_face):
    """Hands that may be dealt, each four of RANKS in that order, and the odds of each.

    Args: numbers, the value of each of RANKS under the rule; the rest as in GeneralPoints.
    """
    hands = []
    odds = []
    number = dict(zip(RANKS, numbers))
    for hand in combinations_with_replacement(RANKS, 4):
        values = tuple(sorted(number[rank] for rank in hand))
        if require_face and hand[-1] not in FACES:
            continue
        if split != "all" and is_unseen(values) != (split == "unseen"):
            continue
        if solutions(values, target):
            hands.append(list(hand))
            odds.append(_odds(hand, replacement))
    return hands, odds


def _odds(hand, replacement):
    """How many ordered draws with replacement, or hands of one deck, show these ranks."""
    counts = Counter(hand).values()
    if replacement:
        return factorial(4) // prod(map(factorial, counts))
    return prod(comb(4, count) for count in counts)


# ---------------------------------------------------------------- the environment
PROMPT = """\
You are playing the {target} points game. You see four cards. \
Write a formula that uses the number of each card exactly once, with + - * / and brackets ( ), \
and equals {target}.
'A' counts as 1, 'J' counts as {J}, 'Q' counts as {Q}, 'K' counts as {K}.
Answer with JSON only: {{"cards": [the four cards], "number": [their numbers], \
"formula": "an equation that equals {target}"}}
Cards: {cards}"""
# Stands for {cards} in GP-VL
PICTURE = 'in the picture, spelt "A", "2", "3" to "10", "J", "Q", "K".'
MISREAD_REASON = 'the "cards" in the answer are not the cards in the picture'
NO_CARDS_REASON = 'no "cards" were found in the answer'
RETRY = "You failed this trial: {reason}. Try again."


class GeneralPoints:
    """One table of four cards, with the interface of environments that environments.py describes.

    Args:
        rule: "ten" (J = Q = K = 10, trained on), "face" (11, 12, 13: rule OOD) or a mapping
            {"J": .., "Q": .., "K": ..}.
        target: positive integer to make.
        split: "train" (no unseen value multiset), "unseen" (only those) or "all".
        replacement: deal with replacement (official code) or from one 52-card deck (paper).
        require_face: only hands with at least one J, Q or K (the paper's OOD hands).
        expert: "canonical" (one formula per value multiset) or "varied" (any).
        image_size: None for GP-L; [width, height] in pixels of the picture for GP-VL.
        suits: "black" (trained on), "red" (visual OOD) or "mixed"; no influence on the ranks.
        jitter: GP-VL: cards lie shifted, scaled, turned and in another order than the expert names.
        recognition: GP-VL, `cards` misread: "gate", -1.5 in place of the grading (official code),
            or "additive", the grading - 1.5 (the paper's wording).
        verify_iters: answers allowed per hand (paper: 5).
    Raises: ValueError naming the argument and what it accepts; also when no hand is left to deal.
    """

    SETTINGS = {
        "rule": either(choice(*RULES), fields({face: whole(1, 99) for face in FACES})),
        "target": whole(1, 10_000),
        "split": choice("train", "unseen", "all"),
        "replacement": flag,
        "require_face": flag,
        "expert": choice("canonical", "varied"),
        "image_size": optional(list_of(whole(), length=2)),
        "suits": choice(*SUIT_SETS),
        "jitter": flag,
        "recognition": choice("gate", "additive"),
    }
    answer_key = '"formula"'

    def __init__(self, rule="ten", target=24, split="train", replacement=False, require_face=False,
                 expert="canonical", image_size=None, suits="black", jitter=False,
                 recognition="gate", verify_iters=5):
        settings = dict(
            rule=rule, target=target, split=split, replacement=replacement,
            require_face=require_face, expert=expert, image_size=image_size, suits=suits,
            jitter=jitter, recognition=recognition)
        check_settings(settings, self.SETTINGS)
        self.verify_iters = checked("verify_iters", verify_iters, whole(1, 100))
        self.rule = RULES[rule] if isinstance(rule, str) else rule
        self.target = target
        self.expert_kind = expert
        self.image_size = image_size
        self.suits = suits
        self.jitter = jitter
        self.recognition = recognition
        if image_size is not None:
            self._check_image_size()
        self.number = {rank: value for value, rank in enumerate(RANKS, start=1)} | self.rule
        numbers = tuple(self.number.values())
        self._hands, self._odds = _hands(numbers, target, split, replacement, require_face)
        if not self._hands:
            raise ValueError(
                f"target: no solvable hand makes {target} with split {split}, rule {self.rule}")
        self._cumulative_odds = list(accumulate(self._odds))
        self._prompt = PROMPT.format(target=target, cards="{cards}", **self.rule)
        self.done = True  # nothing to answer before reset

        title = f"success % on the first attempt / within {verify_iters} attempts"
        self.reports = [("success", title, ("first", "solved"))]
        self.references = ()
        if image_size is not None:
            title = "recognition %, all cards read right in the first answer"
            self.reports.append(("recognition", title, ("recognized",)))
            self.references = ("likeliest cards",)  # named without looking at the picture

    def _check_image_size(self):
        jitter = random.Random(0) if self.jitter else None
        try:
            cards.draw_table([("A", "spades")] * 4, *self.image_size, jitter=jitter)
        except ValueError as error:
            raise ValueError(f"image_size: {error}") from None

    def reset(self, seed, progress=0.0):
        """Deal the hand that `seed` determines: the same ranks in words, pictures and all suits.

        Args: seed: any integer; progress has no effect: a hand has one position only.
        Returns: (obs, info); info = {cluster: the value multiset}.
        """
        seed = index(seed)
        self.rng = random.Random(seed if seed >= 0 else str(seed))  # Random(-5) is Random(5)
        hand = self.rng.choices(self._hands, cum_weights=self._cumulative_odds)[0]
        self.cards = self.rng.sample(hand, 4)
        self.values = sorted(self.number[card] for card in self.cards)
        self.attempt = 0
        self.done = False
        if self.image_size:
            self.image = self._picture(random.Random(f"picture {seed}"))
            text = self._prompt.replace("{cards}", PICTURE)
            prompt = [{"type": "image"}, {"type": "text", "text": text}]
        else:
            self.image = None
            prompt = self._prompt.replace("{cards}", json.dumps(self.cards))
        self.messages = [{"role": "user", "content": prompt}]
        return self._obs(), {"cluster": str(self.values)}

    def _picture(self, rng):
        """The table as an image; cards of one rank differ in suit as long as there are suits."""
        allowed = SUIT_SETS[self.suits]
        suits = {rank: cycle(rng.sample(allowed, len(allowed))) for rank in RANKS}
        self.table = [(rank, next(suits[rank])) for rank in self.cards]
        if self.jitter:
            rng.shuffle(self.table)
        return cards.draw_table(self.table, *self.image_size, jitter=rng if self.jitter else None)

    def _obs(self):
        return {"messages": list(self.messages), "image": self.image}

    def step(self, answer):
        """Grade one whole answer, of any text.

        Returns: (obs, reward in the paper's points, terminated, truncated, info) as in
        environments.py; info's category is a key of REWARDS or, gated, "misread"; recognized:
        `cards` are those on the table; action is None: the expert's has one type. The verifier's
        text never says which cards lie in a picture.
        Raises: RuntimeError if the episode is over.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset(seed)")
        self.attempt += 1
        read = read_answer(answer)
        recognized = self._recognizes(read.cards or ())
        category, reward, reason = self._grade(read, recognized)
        terminated = category == "correct"
        truncated = not terminated and self.attempt == self.verify_iters
        self.done = terminated or truncated
        if truncated:
            reward += EXHAUSTED

        self.messages.append({"role": "assistant", "content": answer})
        feedback = ""
        if not terminated:
            feedback = RETRY.format(reason=reason)
            self.messages.append({"role": "user", "content": feedback})
        info = {"category": category, "correct": terminated, "recognized": recognized,
                "action": None, "attempt": self.attempt, "feedback": feedback,
                "cluster": str(self.values)}
        return self._obs(), reward, terminated, truncated, info

    def _recognizes(self, named):
        """Whether texts name the cards on the table, in any order; suits need not be named."""
        read = [cards.read_card(text) for text in named]
        if sorted(card.rank for card in read) != sorted(self.cards):
            return False
        suited = Counter(card for card in read if card.suit)
        return not self.image_size or suited <= Counter(self.table)

    def _grade(self, read, recognized):
        """Category and reward of an Answer, and the reason to give for it."""
        category, reason = grade(read.formula, self.values, self.target)
        if recognized or not self.image_size:
            return category, REWARDS[category], reason
        reason = NO_CARDS_REASON if read.cards is None else MISREAD_REASON
        if self.recognition == "additive":
            return category, REWARDS[category] + MISREAD, reason
        if read.cards is None:
            return "illegal", REWARDS["illegal"], reason
        return "misread", MISREAD, reason

    def answer(self, formula, hand=None):
        """The JSON answer for this table, or another hand of cards, with the given formula."""
        hand = hand or self.cards
        numbers = [self.number[card] for card in hand]
        return json.dumps({"cards": hand, "number": numbers, "formula": formula})

    def reference(self, name):
        """The first of the hands dealt most often, and a formula that solves it."""
        if name not in self.references:
            known = ", ".join(self.references) or "none"
            raise ValueError(f"reference: {name!r} is none of {known}")
        hand = self._hands[self._odds.index(max(self._odds))]
        values = sorted(self.number[card] for card in hand)
        formula = solutions(tuple(values), self.target)[0]
        return self.answer(f"{formula}={self.target}", hand)

    def expert(self):
        """The canonical (first) formula for this table, or any of the known ones."""
        known = solutions(tuple(self.values), self.target)
        formula = known[0] if self.expert_kind == "canonical" else self.rng.choice(known)
        return self.answer(f"{formula}={self.target}")

    def mistake(self):
        """Right numbers and a wrong value, or a card forgotten or used twice."""
        while True:
            formula = self._random_formula()
            if grade(formula, self.values, self.target)[0] != "correct":
                return self.answer(f"{formula}={self.target}")

    def _random_formula(self):
        numbers = self.rng.sample(self.values, 4)
        slip = self.rng.random()
        if slip < 0.2:
            numbers.pop()
        elif slip < 0.4:
            numbers[0] = self.rng.choice(numbers[1:])
        formula = str(numbers[0])
        for number in numbers[1:]:
            if not formula.isdigit() and self.rng.random() < 0.3:
                formula = f"({formula})"
            formula += self.rng.choice("+-*") + str(number)
        return formula
