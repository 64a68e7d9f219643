"""What the GeneralPoints backbone reads: the game's knowledge in other forms than its answers.

Puzzle lines and sums, plain-word games with corrections, readings of cards under many rules, small
tasks in JSON under other keys. No document holds an answer as the task asks for it, and none shows
four numbers of the `unseen` split together: not as a hand, not as a formula, not as a list.
"""
import random
import re
from typing import NamedTuple

import torch

import gp
from mini.documents import Exchange, chat, prose

REASONS = (  # why an answer is refused, "#" for a number
    "the formula equals # instead of 24", "the number # is not on the table",
    "the number # is not used", "the number # is used too often", "the number # is used too rarely",
    "the formula has an unbalanced bracket", "an operator is missing in the formula",
    "a number is missing in the formula", "the formula divides by zero", "the formula is too long",
    "the formula is empty", 'no "formula" was found in the answer',
)
ASKED = {  # how a small task is asked for, by the key of its answer
    "sorted": "Sort these. ", "sum": "Add these. ", "largest": "Which is the largest? ",
    "smallest": "Which is the smallest? ", "reversed": "Turn the order round. ",
    "equation": "Add these up in an equation. ", "first": "Which comes first? ",
    "last": "Which comes last? ", "count": "How many are these? ", "hand": "Repeat the cards. ",
    "values": "Which numbers do the cards count as? ",
}
ABOUT_NUMBERS = ("sorted", "sum", "largest", "smallest", "reversed", "equation", "first", "last",
                 "count")
ABOUT_CARDS = (("hand",), ("values",), ("hand", "values"), ("values", "hand"), ("hand", "largest"),
               ("values", "equation"), ("sorted", "values"))
NUMBERS = re.compile(r"\[(\d+(?:, \d+)+)]")  # a list of them in JSON
WORDS = ("cards", "number", "formula", *ASKED)  # that are repeated on request
NAME, REPEAT, PUZZLE = "Name the cards. ", "Repeat: ", "Make 24. "

# The task's prompt in pieces: the game, the rule, the answer's form (which no document shows)
_PROMPT = gp.PROMPT.format(target=24, J="#", Q="#", K="#", cards="")
GAME, _rest = _PROMPT.split("'A' counts", 1)
RULE, _rest = _rest.split("Answer with", 1)
RULE = "'A' counts" + RULE
FORM = ("Answer with" + _rest).removesuffix("Cards: ")


def phrases():
    """Constant pieces of the documents and of the task, one token each; digits stay bytes."""
    pieces = [GAME, *RULE.split("#"), FORM, "Cards: [", f"Cards: {gp.PICTURE}", "Numbers: ["]
    pieces += [" make 24: ", " make ", ": ", "JSON: ", PUZZLE, REPEAT, NAME]
    pieces += ['{"', '": [', '], "', '": "', '": ', '", "', '"}', "]}", "=24", ", "]
    pieces += [*WORDS, *ASKED.values(), "10", "11", "12", "13", "24"]
    pieces += [f'"{rank}"' for rank in gp.RANKS]
    pieces += [f', "{rank}"' for rank in gp.RANKS]
    pieces += [f", {n}" for n in range(1, 14)]
    start, end = gp.RETRY.split("{reason}")
    pieces += [start, end, gp.MISREAD_REASON, gp.NO_CARDS_REASON]
    for reason in REASONS:
        pieces += [piece for piece in reason.split("#") if piece]
    return list(dict.fromkeys(pieces))


# ---------------------------------------------------------------- texts
def listed(items):
    return ", ".join(str(item) for item in items)


def quoted(cards):
    return listed(f'"{card}"' for card in cards)


def rule_text(rule):
    """The task's sentence about A, J, Q and K."""
    text = RULE
    for face in gp.FACES:
        text = text.replace("#", str(rule[face]), 1)
    return text


def shows_unseen(text):
    """Whether four numbers of the `unseen` split stand together: in a formula, in a list.

    Cards are not numbers: those shown are dealt as seen hands (Corpus.cards).
    """
    for run in re.findall(r"\d+(?:, \d+)+|[\d+\-*/()]+", text):
        numbers = re.findall(r"\d+", run)
        if len(numbers) == 4 and gp.is_unseen([int(number) for number in numbers]):
            return True
    return False


# ---------------------------------------------------------------- documents
class Cards(NamedTuple):
    """What lies on the table under a rule, perhaps in a picture."""
    rule: dict  # {"J": .., "Q": .., "K": ..}
    ranks: list  # of gp.RANKS
    image: object = None

    @property
    def values(self):
        return [self.rule.get(rank, gp.RANKS.index(rank) + 1) for rank in self.ranks]

    @property
    def text(self):
        return f"Cards: {gp.PICTURE}" if self.image else f"Cards: [{quoted(self.ranks)}]"

    @property
    def probe(self):
        return [gp.RANKS.index(rank) for rank in self.ranks]


class Corpus:
    """Documents of several kinds, by the recipe's shares.

    Args: data: the recipe's shares; seed: of all that is drawn; image_size: None, or [width,
        height] of the pictures that the cards are read from.
    """

    def __init__(self, data, seed, image_size=None):
        self.data = data
        self.rng = random.Random(seed)
        self.image_size = image_size
        self.kinds = data["pictures" if image_size else "documents"]
        self.envs = {}

    def document(self):
        while True:
            kind = self.drawn(self.kinds)
            document = getattr(self, kind)()
            if not shows_unseen(document.text):
                return document

    def drawn(self, shares):
        """A key of {key: share}."""
        return self.rng.choices(list(shares), list(shares.values()))[0]

    def chance(self, name):
        return self.rng.random() < self.data[name]

    # ------------------------------------------------------------ what is spoken about
    def rule(self):
        """A key of gp.RULES, or a rule of one's own."""
        rule = self.drawn(self.data["rules"])
        return rule if rule in gp.RULES else {face: self.rng.randint(1, 13) for face in gp.FACES}

    def dealt(self):
        """Four Cards from which 24 can be made, no unseen hand, in words or in a picture."""
        rule = slot = self.rule()
        if not isinstance(rule, str):
            # to build one for a new rule costs milliseconds: keep some and replace them slowly
            slot = self.rng.randrange(40)
            if self.rng.random() < 0.002:
                self.envs.pop(slot, None)
        if slot not in self.envs:
            self.envs[slot] = gp.GeneralPoints(
                rule=rule, require_face=rule == "face", image_size=self.image_size)
        env = self.envs[slot]
        if self.image_size:
            env.suits = self.drawn(self.data["suits"])
        env.reset(self.rng.getrandbits(48))
        return Cards(env.rule, env.cards, env.image)

    def some_cards(self):
        """Cards: four dealt in a picture, or any three to six in words."""
        if self.image_size:
            return self.dealt()
        rule, count = self.rule(), self.rng.randint(3, 6)
        rule = gp.RULES[rule] if isinstance(rule, str) else rule
        while True:
            cards = Cards(rule, [self.rng.choice(gp.RANKS) for _ in range(count)])
            if count != 4 or not gp.is_unseen(cards.values):
                return cards

    def some_numbers(self, least, most):
        count = self.rng.randint(least, most)
        return [self.rng.randint(1, 13) for _ in range(count)]

    def hand(self):
        """Four numbers in any order that make 24, with no cards behind them: no unseen ones."""
        while True:
            values = self.some_numbers(4, 4)
            if not gp.is_unseen(values) and gp.solutions(tuple(sorted(values))):
                return values

    # ------------------------------------------------------------ formulas
    def solved(self, values):
        known = gp.solutions(tuple(sorted(values)))
        return known[0] if self.chance("canonical") else self.rng.choice(known)

    def some_formula(self, numbers):
        """A formula of these numbers in this order, and what it equals."""
        while True:
            formula = str(numbers[0])
            for number in numbers[1:]:
                if not formula.isdigit() and formula[0] != "(" and self.rng.random() < 0.4:
                    formula = f"({formula})"
                operator = self.rng.choice("+-*/")
                if self.rng.random() < 0.3 and not formula.isdigit():
                    formula = f"{number}{operator}({formula})"
                else:
                    formula = f"{formula}{operator}{number}"
            try:
                return formula, gp.compute(formula)[0]
            except gp.FormulaError:  # it divides by zero
                continue

    def slip(self, values, formula):
        """A wrong formula as people write them, and the verifier's reason against it."""
        slips = {self.other_operator: 0.35, self.other_number: 0.15, self.cut_short: 0.1,
                 self.without_brackets: 0.1, self.guess: 0.3}
        while True:
            tokens = re.findall(r"\d+|[-+*/()]", formula)
            wrong = "".join(self.drawn(slips)(tokens, values))
            category, reason = gp.grade(wrong, sorted(values), 24)
            if category != "correct":
                return wrong, reason

    def other_operator(self, tokens, values):
        places = [i for i, token in enumerate(tokens) if token in "+-*/"]
        tokens[self.rng.choice(places)] = self.rng.choice("+-*/")
        return tokens

    def other_number(self, tokens, values):
        places = [i for i, token in enumerate(tokens) if token.isdigit()]
        tokens[self.rng.choice(places)] = str(self.rng.choice(values))
        return tokens

    def cut_short(self, tokens, values):
        return tokens[:-2]

    def without_brackets(self, tokens, values):
        return [token for token in tokens if token not in "()"]

    def guess(self, tokens, values):
        numbers = self.rng.sample(values, 4)
        return [self.some_formula(numbers)[0]]

    # ------------------------------------------------------------ kinds of documents
    def puzzles(self):
        """3, 3, 8, 8 make 24: 8/(3-8/3)"""
        parts = []
        for _ in range(6):
            if self.chance("other_targets"):
                numbers = self.some_numbers(2, 3)
                formula, value = self.some_formula(numbers)
            else:
                numbers, value = self.hand(), 24
                formula = self.solved(numbers)
            parts += [(f"{listed(numbers)} make {value}: ", False), (f"{formula}\n", True)]
        return prose(*parts)

    def sums(self):
        """5*(3-1)=10"""
        parts = []
        for _ in range(6):
            formula, value = self.some_formula(self.some_numbers(2, 4))
            parts += [(formula, False), (f"={value}\n", True)]
        return prose(*parts)

    def game(self):
        """The game in plain words, with corrections: which numbers, and how they make 24."""
        if self.image_size or self.chance("cards"):
            cards = self.dealt()
            values = cards.values
            request = f"{GAME}{rule_text(cards.rule)}{cards.text}"
        else:
            cards, values = None, self.hand()
            request = f"{PUZZLE}Numbers: [{listed(values)}]"
        exchanges, said = [], set()
        for _ in range(5):
            formula, reason = self.solved(values), ""
            if not self.chance("right"):
                formula, reason = self.slip(values, formula)
            if formula in said:  # nothing is said twice
                continue
            said.add(formula)
            reply = f"{listed(values)} make 24: {formula}"
            exchanges.append(Exchange(request, reply, learned=not reason))
            if not reason:
                break
            request = gp.RETRY.format(reason=reason)
        return shown(exchanges, cards)

    def reading(self):
        """What cards are called or count as, under any rule, in plain words."""
        cards = self.some_cards()
        ask, reply = NAME, quoted(cards.ranks)
        if self.chance("counted"):
            ask, reply = ASKED["values"] + rule_text(cards.rule), listed(cards.values)
        return shown([Exchange(ask + cards.text, reply)], cards)

    def json_task(self):
        """Small tasks answered in JSON, some corrected after a number is forgotten or added."""
        if self.image_size or self.chance("json_cards"):
            cards = self.some_cards()
            keys, given = self.rng.choice(ABOUT_CARDS), rule_text(cards.rule) + cards.text
            answers = about(cards.values)
            answers["hand"] = f"[{quoted(cards.ranks)}]"
        else:
            cards, numbers = None, self.some_numbers(2, 6)
            keys = self.rng.sample(ABOUT_NUMBERS, self.rng.choice((1, 1, 2, 3)))
            given, answers = f"Numbers: [{listed(numbers)}]", about(numbers)
        request = "".join(ASKED[key] for key in keys) + f"JSON: {listed(keys)}\n{given}"
        right = "{" + listed(f'"{key}": {answers[key]}' for key in keys) + "}"
        exchanges = []
        while len(exchanges) < 4 and NUMBERS.search(right) and self.chance("json_slips"):
            wrong, reason = self.json_slip(right)
            exchanges.append(Exchange(request, wrong, learned=False))
            request = gp.RETRY.format(reason=reason)
        return shown([*exchanges, Exchange(request, right)], cards)

    def json_slip(self, right):
        """The answer with one of its first list's numbers forgotten or added, and the reason."""
        found = NUMBERS.search(right)[1]
        numbers = found.split(", ")
        place = self.rng.randrange(len(numbers))
        if self.rng.random() < 0.6:
            wrong = numbers[:place] + numbers[place + 1:]
            reason = f"the number {numbers[place]} is not used"
            if numbers[place] in wrong:
                reason = f"the number {numbers[place]} is used too rarely"
        else:
            added = str(self.rng.randint(1, 13))
            wrong = [*numbers[:place], added, *numbers[place:]]
            reason = f"the number {added} is not on the table"
            if added in numbers:
                reason = f"the number {added} is used too often"
        return right.replace(found, listed(wrong), 1), reason

    def echo(self):
        """Words, to have read each of them."""
        words = listed(self.rng.sample(WORDS, self.rng.randint(2, 5)))
        return chat([Exchange(REPEAT + words, words)])


def shown(exchanges, cards):
    """A Document about Cards, None for those that speak of numbers alone."""
    if cards is None or cards.image is None:
        return chat(exchanges)
    return chat(exchanges, cards.image, cards.probe)


def about(numbers):
    """{key of a small task: its answer as JSON}."""
    total = sum(numbers)
    equation = "+".join(str(number) for number in numbers)
    return {"sorted": f"[{listed(sorted(numbers))}]", "reversed": f"[{listed(numbers[::-1])}]",
            "values": f"[{listed(numbers)}]", "sum": total, "count": len(numbers),
            "largest": max(numbers), "smallest": min(numbers),
            "first": numbers[0], "last": numbers[-1], "equation": f'"{equation}={total}"'}


class Probe(torch.nn.Module):
    """Which rank lies in each of the four places, linearly from the patches there."""

    def __init__(self, width, side):
        super().__init__()
        self.rows = slice(side // 4, side - side // 4)  # the cards lie in the middle
        self.columns = side // 4
        self.rank = torch.nn.Linear(width * (side // 2) * self.columns, len(gp.RANKS))

    def forward(self, grid):
        """(B, side, side, C) states of the patches -> (B, 4, 13) logits."""
        rows = grid[:, self.rows]  # (B, side/2, side, C)
        places = rows.unflatten(2, (4, self.columns)).transpose(1, 2)  # (B, 4, side/2, side/4, C)
        return self.rank(places.flatten(2))
