"""What the GeneralPoints backbone reads: conversations of imperfect authors, and bare sums.

See pretrain.py.
"""
import random
import re

import torch

import gp


REASONS = (  # why an answer is refused, "#" for a number
    "the formula equals # instead of 24", "the number # is not on the table",
    "the number # is not used", "the number # is used too often", "the number # is used too rarely",
    "the formula has an unbalanced bracket", "an operator is missing in the formula",
    "a number is missing in the formula", "the formula divides by zero", "the formula is too long",
    "the formula is empty", 'no "formula" was found in the answer',
)


def phrases():
    """Constant pieces of the conversations, so that a turn is some 20 tokens.

    Digits, ranks and operators stay bytes.
    """
    prompt = gp.PROMPT.replace("{target}", "24").replace("{{", "{").replace("}}", "}")
    pieces = re.split(r"\{[JQK]\}", prompt.replace("{cards}", "["))
    pieces += ["10", "11", "12", "13", "24", '=24"}']
    pieces += ['{"cards": [', '], "number": [', '], "formula": "']
    pieces += [f'"{rank}"' for rank in gp.RANKS]
    pieces += [f', "{rank}"' for rank in gp.RANKS]
    pieces += [f", {n}" for n in range(1, 14)]
    start, end = gp.RETRY.split("{reason}")
    for reason in REASONS:
        pieces += f"{start}{reason}{end}".split("#")
    pieces.append(re.split(r"\{[JQK]\}", prompt)[-1].replace("{cards}", gp.PICTURE))
    for reason in (gp.MISREAD_REASON, 'no "cards" were found in the answer'):
        pieces.append(gp.RETRY.format(reason=reason))
    return list(dict.fromkeys(pieces))


class Corpus:
    """Conversations of imperfect authors about hands of the train split, under many rules.

    Args:
        data: the recipe's shares.
        seed: of everything that is drawn.
        image_size: None, or [width, height] of the pictures that the cards are read from.
    """

    def __init__(self, data, seed, image_size=None):
        self.data = data
        self.rng = random.Random(seed)
        self.image_size = image_size
        self.envs = {}

    def drawn(self, *names):
        """One of these names, by the recipe's shares."""
        return self.rng.choices(names, [self.data[name] for name in names])[0]

    def env(self):
        """An environment under one of the rules, drawn by the recipe's shares."""
        slot = rule = self.drawn("ten", "face", "other")
        if rule == "other":
            # to build one for a new rule costs milliseconds: keep some and replace them slowly
            rule = {rank: self.rng.randint(1, 13) for rank in "JQK"}
            slot = ("other", self.rng.randrange(40))
            if self.rng.random() <= 0.002:
                self.envs.pop(slot, None)
        if slot not in self.envs:
            self.envs[slot] = gp.GeneralPoints(
                rule=rule, split="train", expert="varied", require_face=slot == "face",
                image_size=self.image_size)
        return self.envs[slot]

    def conversation(self):
        """One author's turns: tries, the verifier's text, the same again or another try.

        Returns: {messages, image, probe: what `Probe` has to say}.
        """
        env = self.env()
        if self.image_size:
            env.suits = self.drawn("black", "red", "mixed")
        obs, _ = env.reset(self.rng.getrandbits(48))
        answer = None
        while not env.done:
            if answer is None or self.rng.random() >= self.data["repeat"]:
                answer = self.author(env)
            obs, *_ = env.step(answer)
            if self.rng.random() >= self.data["continue"]:
                break
        messages = obs["messages"]
        if messages[-1]["role"] == "user" and not env.done:
            messages = messages[:-1]
        ranks = [gp.RANKS.index(card) for card in env.cards]
        return {"messages": messages, "image": obs["image"], "probe": ranks}

    def author(self, env):
        """What an imperfect author answers."""
        if self.rng.random() >= self.data["right"]:
            return env.mistake()
        canonical = self.rng.random() < self.data["canonical"]
        env.expert_kind = "canonical" if canonical else "varied"
        return env.expert()

    def document(self):
        """A bare sum, or the messages of a conversation."""
        if self.rng.random() < self.data["arithmetic"]:
            return self.arithmetic()
        return self.conversation()["messages"]

    def arithmetic(self):
        """Plain sums, as any corpus has them: formula=value, one after another."""
        lines = []
        for _ in range(8):
            formula = self.formula()
            try:
                lines.append(f"{formula}={gp.compute(formula)[0]}")
            except gp.FormulaError:
                continue
        return " ".join(lines)

    def formula(self):
        """Two to four numbers; brackets by chance."""
        count = self.rng.randint(2, 4)
        first, *others = [self.rng.randint(1, 13) for _ in range(count)]
        formula = str(first)
        for number in others:
            if not formula.isdigit() and self.rng.random() < 0.4:
                formula = f"({formula})"
            operator = self.rng.choice("+-*/")
            to_the_left = self.rng.random() < 0.3
            if to_the_left and not formula.isdigit():
                formula = f"{number}{operator}({formula})"
            else:
                formula = f"{formula}{operator}{number}"
        return formula


class Probe(torch.nn.Module):
    """Which rank lies in each of the four places, linearly from the patches there.

    The cards lie in the middle rows.
    """

    def __init__(self, width, side):
        super().__init__()
        self.rows = slice(side // 4, side - side // 4)
        self.columns = side // 4
        self.rank = torch.nn.Linear(width * (side // 2) * self.columns, len(gp.RANKS))

    def forward(self, grid):
        """(B, side, side, C) states of the patches -> (B, 4, 13) logits."""
        rows = grid[:, self.rows]  # (B, side/2, side, C)
        places = rows.unflatten(2, (4, self.columns)).transpose(1, 2)  # (B, 4, side/2, side/4, C)
        return self.rank(places.flatten(2))
