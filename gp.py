"""GeneralPoints: write a formula that makes 24 from four cards (paper Sec. 4.1, App. A).

The environment deals a solvable hand, in words (GP-L) or as a picture (GP-VL), states the task and the rule for J, Q
and K, and grades one whole answer per `step`. A wrong answer stays in the conversation together with the verifier's
text and the model may try again, `verify_iters` times in all (sequential revision, Sec. 3).

Formulas are parsed and computed in exact fractions, never `eval`-ed: 8/(3-8/3) is 24.
Rewards are README's decided table. No torch in this file.
"""
import hashlib
import json
import random
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, combinations, combinations_with_replacement
from math import comb, factorial, prod

from scenery import cards

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
RULES = {"ten": {"J": 10, "Q": 10, "K": 10}, "face": {"J": 11, "Q": 12, "K": 13}}
REWARDS = {"correct": 5.0, "wrong_value": -1.0, "wrong_numbers": -2.0, "illegal": -3.0}
MISREAD = -1.5  # GP-VL: the answer's `cards` are not those in the picture
EXHAUSTED = -1.0  # added to the last allowed answer when it fails too
SUITS = {"black": ("spades", "clubs"), "red": ("hearts", "diamonds"), "mixed": tuple(cards.SUITS)}
UNSEEN_SHARE = 8  # one value multiset in eight never occurs in any training stage
MAX_FORMULA = 64  # tokens; a formula that uses four cards once needs at most a third of that
MAX_ANSWER = 10_000  # characters read of an answer


# ---------------------------------------------------------------- solving: exact, memoised over sub-hands
def _text(node):
    """Formula of a node (op, plus, minus): the terms of a sum or the factors of a product."""
    op, plus, minus = node
    if op == "*":
        return "*".join(plus) + "".join("/" + m for m in minus)
    return "+".join(plus) + "".join("-" + m for m in minus)


def _parts(node, op):
    """A node as (plus, minus) of an enclosing `op`: flattened if it is the same operation, else one bracketed part."""
    if node[0] == op:
        return node[1], node[2]
    return ((f"({_text(node)})" if op == "*" and node[0] == "+" else _text(node),), ())


def _join(op, x, y, inverse=False):
    """x+y, x-y, x*y or x/y as one flat node, so that formulas equal up to order and brackets coincide."""
    (xp, xm), (yp, ym) = _parts(x, op), _parts(y, op)
    if inverse:
        yp, ym = ym, yp
    return op, tuple(sorted(xp + yp)), tuple(sorted(xm + ym))


def _splits(values):
    """Distinct ways to part a sorted tuple into two non-empty sub-multisets, each pair once."""
    found = set()
    for size in range(1, len(values) // 2 + 1):
        for picked in combinations(range(len(values)), size):
            a = tuple(values[i] for i in picked)
            b = tuple(v for i, v in enumerate(values) if i not in picked)
            found.add((a, b) if (len(a), a) <= (len(b), b) else (b, a))
    return sorted(found)


@lru_cache(maxsize=None)
def _reach(values):
    """{number: set of formula nodes} that the given one to three values can make, each used once."""
    if len(values) == 1:
        return {Fraction(values[0]): {("", (str(values[0]),), ())}}
    table = {}
    for a, b in _splits(values):
        for x, xs in _reach(a).items():
            for y, ys in _reach(b).items():
                for number, op, inverse, left, right in (
                    (x + y, "+", False, xs, ys), (x - y, "+", True, xs, ys), (y - x, "+", True, ys, xs),
                    (x * y, "*", False, xs, ys), (y and x / y, "*", True, xs, ys if y else ()),
                    (x and y / x, "*", True, ys, xs if x else ())):
                    nodes = table.setdefault(number, set()) if left and right else ()
                    for l in left:
                        for r in right:
                            nodes.add(_join(op, l, r, inverse))
    return table


@lru_cache(maxsize=None)
def solutions(values, target=24):
    """All formulas that make `target` from the sorted tuple `values`, shortest first; equal up to order = one.

    The last operation is solved for (given x, which y makes the target?) and looked up, not searched.
    """
    target, found = Fraction(target), set()
    for a, b in _splits(tuple(values)):
        others = _reach(b)
        for x, xs in _reach(a).items():
            wanted = [(target - x, "+", False, False), (x - target, "+", True, False), (target + x, "+", True, True)]
            if x:
                wanted += [(target / x, "*", False, False), (x / target, "*", True, False),
                           (target * x, "*", True, True)]
            for y, op, inverse, swap in wanted:
                for r in others.get(y, ()):
                    for l in xs:
                        found.add(_text(_join(op, r, l, True) if swap else _join(op, l, r, inverse)))
    return tuple(sorted(found, key=lambda f: (len(f), f)))


def is_unseen(values):
    """Whether a value multiset belongs to the share that no training stage may touch (by SHA-256, for ever)."""
    return hashlib.sha256(f"gp|{tuple(sorted(values))}".encode()).digest()[0] % UNSEEN_SHARE == 0


# ---------------------------------------------------------------- reading and grading an answer
class FormulaError(ValueError):
    """The formula is illegal; the text says why and goes back to the model."""


def compute(formula):
    """Value and numbers of a formula with + - * / ( ), exactly.

    Args: formula, any string.
    Returns: (Fraction, list of the integers used, in order).
    Raises: FormulaError for anything else, division by zero included. Work is bounded by MAX_FORMULA tokens.
    """
    bad = re.search(r"[^0-9+\-*/() ]", formula)
    if bad:
        raise FormulaError(f"the formula has the illegal character {bad.group()!r}")
    tokens = re.findall(r"\d+|[-+*/()]", formula)
    if len(tokens) > MAX_FORMULA or len(formula) > 4 * MAX_FORMULA:
        raise FormulaError("the formula is too long")
    if not tokens:
        raise FormulaError("the formula is empty")
    tokens.append("")  # end marker
    (num, den), end = _sum(tokens, 0)
    if tokens[end]:
        raise FormulaError("the formula has an unbalanced bracket" if tokens[end] == ")"
                           else "an operator is missing in the formula")
    return Fraction(num, den), [int(t) for t in tokens if t.isdigit()]


def _sum(tokens, i):
    (n, d), i = _product(tokens, i)
    while tokens[i] in ("+", "-"):
        sign = 1 if tokens[i] == "+" else -1
        (n2, d2), i = _product(tokens, i + 1)
        n, d = n * d2 + sign * n2 * d, d * d2
    return (n, d), i


def _product(tokens, i):
    (n, d), i = _factor(tokens, i)
    while tokens[i] in ("*", "/"):
        divide = tokens[i] == "/"
        (n2, d2), i = _factor(tokens, i + 1)
        if divide:
            n2, d2 = d2, n2
            if not d2:
                raise FormulaError("the formula divides by zero")
        n, d = n * n2, d * d2
    return (n, d), i


def _factor(tokens, i):
    if tokens[i] == "(":
        value, i = _sum(tokens, i + 1)
        if tokens[i] != ")":
            raise FormulaError("the formula has an unbalanced bracket" if not tokens[i]
                               else "an operator is missing in the formula")
        return value, i + 1
    if tokens[i] == "-":  # a leading minus, as in -1+9
        (n, d), i = _factor(tokens, i + 1)
        return (-n, d), i
    if tokens[i].isdigit():
        return (int(tokens[i]), 1), i + 1
    raise FormulaError("a number is missing in the formula")


_LIST = r"""["']%s["']\s*:\s*\[([^\]]*)\]"""
_CARDS, _NUMBER = re.compile(_LIST % "cards"), re.compile(_LIST % "number")
_FORMULA = re.compile(r"""["']formula["']\s*:\s*["']([^"']*)["']""")


def read_answer(text):
    """`cards`, `number` and `formula` of an answer, as strings; None where absent.

    Strict JSON first; otherwise the first `"cards": [...]` and so on found anywhere, which also reads trailing
    commas, text around the object and single quotes. What follows `=` in the formula is dropped (official reader).
    """
    text = text[:MAX_ANSWER]
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict):
        cards, number, formula = (data.get(k) for k in ("cards", "number", "formula"))
        cards = [str(c) for c in cards] if isinstance(cards, list) else None
        number = [str(n) for n in number] if isinstance(number, list) else None
        formula = formula if isinstance(formula, str) else None
    else:
        cards, number, formula = (p.search(text) for p in (_CARDS, _NUMBER, _FORMULA))
        cards, number = ([c.strip(" \"'\r\n\t") for c in m.group(1).rstrip(", \r\n\t").split(",")] if m else None
                         for m in (cards, number))
        formula = formula.group(1) if formula else None
    return {"cards": cards, "number": number, "formula": None if formula is None else formula.split("=")[0].strip()}


def grade(formula, values, target):
    """Category (a key of REWARDS) of a formula for the sorted `values` on the table, and what is wrong with it."""
    if formula is None:
        return "illegal", 'no "formula" was found in the answer'
    try:
        result, used = compute(formula)
    except FormulaError as error:
        return "illegal", str(error)
    if sorted(used) != values:
        used, table = Counter(used), Counter(values)
        for number in used:
            if number not in table:
                return "wrong_numbers", f"the number {number} is not on the table"
        for number in table:
            if used[number] < table[number]:
                return "wrong_numbers", f"the number {number} is not used" if not used[number] \
                    else f"the number {number} is used too rarely"
        number = next(n for n in used if used[n] > table[n])
        return "wrong_numbers", f"the number {number} is used too often"
    if result != target:
        return "wrong_value", f"the formula equals {result} instead of {target}"
    return "correct", ""


# ---------------------------------------------------------------- the environment
PROMPT = """\
You are playing the {target} points game. You see four cards. Write a formula that uses the number of each card \
exactly once, with + - * / and brackets, and equals {target}.
'A' counts as 1, 'J' counts as {J}, 'Q' counts as {Q}, 'K' counts as {K}.
Answer with JSON only: {{"cards": [the four cards], "number": [their numbers], "formula": "an equation that equals \
{target}"}}
Cards: {cards}"""
PICTURE = "in the picture."  # stands for {cards} in GP-VL
MISREAD_REASON = 'the "cards" in the answer are not the cards in the picture'
RETRY = "You failed this trial: {reason}. Try again."


@lru_cache(maxsize=64)
def _deals(numbers, target, split, replacement, require_face):
    """Solvable rank multisets that may be dealt, with cumulative weights proportional to the deck's odds.

    Args: numbers, the value of each of RANKS under the rule; the rest as in GeneralPoints.
    """
    hands, weights = [], []
    for hand in combinations_with_replacement(range(len(RANKS)), 4):
        values = tuple(sorted(numbers[r] for r in hand))
        if require_face and hand[-1] < RANKS.index("J"):
            continue
        if split != "all" and is_unseen(values) != (split == "unseen"):
            continue
        if solutions(values, target):
            counts = Counter(hand).values()
            weights.append(factorial(4) // prod(map(factorial, counts)) if replacement
                           else prod(comb(4, k) for k in counts))
            hands.append([RANKS[r] for r in hand])
    return hands, list(accumulate(weights))


def _check(ok, message):
    if not ok:
        raise ValueError(message)


class GeneralPoints:
    """One table of four cards with Gymnasium's `reset` and `step` (no dependency on it).

    Args:
        rule: "ten" (J = Q = K = 10, trained on), "face" (11, 12, 13: rule OOD) or a mapping {"J": .., "Q": .., "K": ..}.
        target: positive integer to make.
        split: "train" (no unseen value multiset), "unseen" (only those) or "all".
        replacement: deal with replacement (official code) or from one 52-card deck (paper).
        require_face: only hands with at least one J, Q or K (the paper's OOD hands).
        expert: "canonical" (one formula per value multiset) or "varied" (any).
        image_size: None for GP-L; [width, height] in pixels of the picture for GP-VL.
        suits: "black" (trained on), "red" (visual OOD) or "mixed"; no influence on which ranks are dealt.
        jitter: GP-VL: cards lie shifted, scaled, turned and in another order than the expert names them.
        recognition: GP-VL, `cards` misread: "gate", -1.5 in place of the grading (official code), or "additive",
            the grading - 1.5 (the paper's wording).
        verify_iters: answers allowed per hand (paper: 5).
    Attributes: reports: what an evaluation shows, (name, title, columns: metrics of rollout.counts); references: names
        of the policies that `reference` answers for: in GP-VL the likeliest cards, named without looking.
    Raises: ValueError naming the argument and what it accepts; also when no hand is left to deal.
    """

    answer_key = '"formula"'  # tokens before it may weigh less in the PPO ratio (paper's code: 0.5)

    def __init__(self, rule="ten", target=24, split="train", replacement=False, require_face=False,
                 expert="canonical", image_size=None, suits="black", jitter=False, recognition="gate", verify_iters=5):
        if isinstance(rule, str):
            _check(rule in RULES, f"rule: {rule!r} is none of {', '.join(RULES)} or a mapping such as {{J: 11, Q: 12, K: 13}}")
            rule = RULES[rule]
        _check(isinstance(rule, dict) and set(rule) == {"J", "Q", "K"}
               and all(type(v) is int and 1 <= v <= 99 for v in rule.values()),
               f"rule: {rule!r} must give J, Q and K a whole number from 1 to 99 each")
        _check(type(target) is int and 1 <= target <= 10_000, f"target: {target!r} is not a whole number from 1 to 10000")
        _check(split in ("train", "unseen", "all"), f"split: {split!r} is none of train, unseen, all")
        _check(expert in ("canonical", "varied"), f"expert: {expert!r} is none of canonical, varied")
        _check(suits in tuple(SUITS), f"suits: {suits!r} is none of {', '.join(SUITS)}")
        _check(recognition in ("gate", "additive"), f"recognition: {recognition!r} is none of gate, additive")
        for name, value in (("replacement", replacement), ("require_face", require_face), ("jitter", jitter)):
            _check(isinstance(value, bool), f"{name}: {value!r} is neither true nor false")
        _check(type(verify_iters) is int and 1 <= verify_iters <= 100,
               f"verify_iters: {verify_iters!r} is not a whole number from 1 to 100")
        self.rule, self.target, self.expert_kind, self.verify_iters = rule, target, expert, verify_iters
        self.image_size, self.suits, self.jitter, self.recognition = image_size, suits, jitter, recognition
        if image_size is not None:
            _check(isinstance(image_size, list) and len(image_size) == 2 and all(type(x) is int for x in image_size),
                   f"image_size: {image_size!r} is neither null nor [width, height] in pixels")
            try:
                cards.draw_table([("A", "spades")] * 4, *image_size, jitter=random.Random(0) if jitter else None)
            except ValueError as error:
                raise ValueError(f"image_size: {error}") from None
        self.done = True  # nothing to answer before reset
        self.number = {rank: rule.get(rank, i + 1) for i, rank in enumerate(RANKS)}
        self._hands, self._weights = _deals(tuple(self.number[r] for r in RANKS), target, split, replacement,
                                            require_face)
        _check(self._hands, f"no solvable hand makes {target} with split {split}, rule {rule}")
        self._prompt = PROMPT.format(target=target, cards="{cards}", **rule)
        self.reports = [("success", f"success % on the first attempt / within {verify_iters} attempts", ("first", "solved"))]
        self.references = ()
        if image_size is not None:
            self.reports.append(("recognition", "recognition %, all cards read right in the first answer", ("recognized",)))
            self.references = ("likeliest cards",)

    def reset(self, seed, progress=0.0):
        """Deal the hand that `seed` determines: the same ranks with and without picture, in all suits.

        Args: progress: in [0, 1), where in the episode to start; a hand has one position only.

        Returns: (obs, info); obs = {"messages": chat turns, "image": PIL image or None}. With an image, the first
        message's content is the list [image, text] that chat templates know.
        """
        self.rng = random.Random(seed)
        hand = self.rng.choices(self._hands, cum_weights=self._weights)[0]
        self.cards = self.rng.sample(hand, 4)
        self.values = sorted(self.number[c] for c in self.cards)
        self.attempt, self.done = 0, False
        prompt = self._prompt.replace("{cards}", PICTURE if self.image_size else json.dumps(self.cards))
        if self.image_size:
            self.image = self._picture(random.Random(f"picture {seed}"))
            prompt = [{"type": "image"}, {"type": "text", "text": prompt}]
        self.messages = [{"role": "user", "content": prompt}]
        return self._obs(), {"cluster": str(self.values)}

    def _picture(self, rng):
        """The table as an image; cards of one rank differ in suit as long as there are suits."""
        suits = {rank: rng.sample(SUITS[self.suits], len(SUITS[self.suits])) for rank in RANKS}
        table = [(rank, suits[rank][self.cards[:i].count(rank) % len(suits[rank])])
                 for i, rank in enumerate(self.cards)]
        if self.jitter:
            rng.shuffle(table)
        return cards.draw_table(table, *self.image_size, jitter=rng if self.jitter else None)

    def _obs(self):
        return {"messages": list(self.messages), "image": self.image if self.image_size else None}

    def step(self, answer):
        """Grade one whole answer.

        Returns: (obs, reward in the paper's points, terminated = solved, truncated = attempts exhausted, info) with
        info = {category, correct: this answer was right, recognized: `cards` match the table as a multiset, action: None
        (the expert's action has one type), attempt: 1.., feedback, cluster}. Category: a key of REWARDS or, gated,
        "misread". The verifier's text never says which cards there are.
        Raises: RuntimeError if the episode is over. Never raises for an answer, whatever it holds.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset(seed)")
        self.attempt += 1
        read = read_answer(answer)
        category, reason = grade(read["formula"], self.values, self.target)
        reward, recognized = REWARDS[category], sorted(read["cards"] or ()) == sorted(self.cards)
        if self.image_size and not recognized:
            if self.recognition == "additive":
                reward += MISREAD
            elif read["cards"] is not None:
                category, reward = "misread", MISREAD
            else:
                category, reward = "illegal", REWARDS["illegal"]
            reason = MISREAD_REASON if read["cards"] is not None else 'no "cards" were found in the answer'
        terminated = category == "correct"
        truncated = not terminated and self.attempt == self.verify_iters
        self.done = terminated or truncated
        feedback = "" if terminated else RETRY.format(reason=reason)
        self.messages.append({"role": "assistant", "content": answer})
        if feedback:
            self.messages.append({"role": "user", "content": feedback})
        info = {"category": category, "correct": terminated, "recognized": recognized, "action": None,
                "attempt": self.attempt, "feedback": feedback, "cluster": str(self.values)}
        return self._obs(), reward + truncated * EXHAUSTED, terminated, truncated, info

    def answer(self, formula, hand=None):
        """The JSON answer for this table, or another hand of cards, with the given formula."""
        hand = hand or self.cards
        return json.dumps({"cards": hand, "number": [self.number[c] for c in hand], "formula": formula})

    def reference(self, name):
        """The answer of a reference policy: the first of the hands dealt most often, and a formula that solves it."""
        _check(name in self.references, f"reference: {name!r} is none of {', '.join(self.references) or 'none'}")
        odds = [b - a for a, b in zip([0, *self._weights], self._weights)]
        hand = self._hands[odds.index(max(odds))]
        known = solutions(tuple(sorted(self.number[c] for c in hand)), self.target)
        return self.answer(f"{known[0]}={self.target}", hand)

    def expert(self):
        """An answer that earns the full reward here: the canonical formula, or any of the known ones."""
        known = solutions(tuple(self.values), self.target)
        formula = known[0] if self.expert_kind == "canonical" else self.rng.choice(known)
        return self.answer(f"{formula}={self.target}")

    def mistake(self):
        """A plausible answer that fails here: right numbers and a wrong value, or a card forgotten or used twice."""
        while True:
            numbers = self.rng.sample(self.values, 4)
            slip = self.rng.random()
            if slip < 0.2:
                numbers.pop()
            elif slip < 0.4:
                numbers[0] = self.rng.choice(numbers[1:])
            formula = str(numbers[0])
            for n in numbers[1:]:
                if not formula.isdigit() and self.rng.random() < 0.3:
                    formula = f"({formula})"
                formula += self.rng.choice("+-*") + str(n)
            if grade(formula, self.values, self.target)[0] != "correct":
                return self.answer(f"{formula}={self.target}")
