"""What the GeneralPoints backbone reads: conversations of imperfect authors, and bare sums. See pretrain.py."""
import random
import re

import torch

import gp


def phrases():
    """Constant pieces of the conversations, so that a turn is some 20 tokens; digits, ranks, operators stay bytes."""
    prompt = gp.PROMPT.replace("{target}", "24").replace("{{", "{").replace("}}", "}")
    pieces = re.split(r"\{[JQK]\}", prompt.replace("{cards}", "["))
    pieces += ["10", "11", "12", "13", "24", '=24"}', '{"cards": [', '], "number": [', '], "formula": "']
    pieces += [f'"{rank}"' for rank in gp.RANKS] + [f', "{rank}"' for rank in gp.RANKS]
    pieces += [f", {n}" for n in range(1, 14)]
    start, end = gp.RETRY.split("{reason}")
    for reason in ("the formula equals # instead of 24", "the number # is not on the table", "the number # is not used",
                   "the number # is used too often", "the number # is used too rarely",
                   "the formula has an unbalanced bracket", "an operator is missing in the formula",
                   "a number is missing in the formula", "the formula divides by zero", "the formula is too long",
                   "the formula is empty", 'no "formula" was found in the answer'):
        pieces += [p for p in (start + reason + end).split("#")]
    pieces.append(re.split(r"\{[JQK]\}", prompt)[-1].replace("{cards}", gp.PICTURE))
    pieces += [gp.RETRY.format(reason=reason) for reason in (gp.MISREAD_REASON, 'no "cards" were found in the answer')]
    return list(dict.fromkeys(pieces))


class Corpus:
    """Conversations of imperfect authors about hands of the train split, under many rules for J, Q and K.

    Args: data: the recipe's shares; seed; image_size: None, or [width, height] of the pictures that the cards are read from.
    """

    def __init__(self, data, seed, image_size=None):
        self.data, self.rng, self.image_size, self.envs = data, random.Random(seed), image_size, {}

    def env(self):
        """A table under one of the rules, drawn by the recipe's shares."""
        kind = self.rng.choices(("ten", "face", "other"), [self.data["ten"], self.data["face"], self.data["other"]])[0]
        rule = {r: self.rng.randint(1, 13) for r in "JQK"} if kind == "other" else kind
        if kind == "other":  # building the table of a new rule costs milliseconds: keep some and replace them slowly
            slot = ("other", self.rng.randrange(40))
            if self.rng.random() > 0.002 and slot in self.envs:
                return self.envs[slot]
        else:
            slot = kind
        if slot not in self.envs or kind == "other":
            self.envs[slot] = gp.GeneralPoints(rule=rule, split="train", expert="varied", require_face=kind == "face",
                                               image_size=self.image_size)
        return self.envs[slot]

    def conversation(self):
        """Observation at the end of one author's turns: tries, the verifier's text, the same again or another try."""
        env, data, answer = self.env(), self.data, None
        if self.image_size:
            env.suits = self.rng.choices(("black", "red", "mixed"), [data[s] for s in ("black", "red", "mixed")])[0]
        obs, _ = env.reset(self.rng.getrandbits(48))
        while not env.done:
            if answer is None or self.rng.random() >= data["repeat"]:
                if self.rng.random() < data["right"]:
                    env.expert_kind = "canonical" if self.rng.random() < data["canonical"] else "varied"
                    answer = env.expert()
                else:
                    answer = env.mistake()
            obs, *_ = env.step(answer)
            if self.rng.random() >= data["continue"]:
                break
        messages = obs["messages"]
        if messages[-1]["role"] == "user" and not env.done:
            messages = messages[:-1]
        return {"messages": messages, "image": obs["image"], "probe": [gp.RANKS.index(c) for c in env.cards]}

    def document(self):
        """A bare sum, or the messages of a conversation."""
        return self.arithmetic() if self.rng.random() < self.data["arithmetic"] else self.conversation()["messages"]

    def arithmetic(self):
        """Plain sums, as any corpus has them: formula=value, one after another."""
        lines = []
        for _ in range(8):
            numbers = [self.rng.randint(1, 13) for _ in range(self.rng.randint(2, 4))]
            formula = str(numbers[0])
            for n in numbers[1:]:
                if not formula.isdigit() and self.rng.random() < 0.4:
                    formula = f"({formula})"
                op, left = self.rng.choice("+-*/"), self.rng.random() < 0.3
                formula = f"{n}{op}({formula})" if left and not formula.isdigit() else f"{formula}{op}{n}"
            try:
                lines.append(f"{formula}={gp.compute(formula)[0]}")
            except gp.FormulaError:
                continue
        return " ".join(lines)


class Probe(torch.nn.Module):
    """Which rank lies in each of the four places, linearly from the patches there; the cards lie in the middle rows."""

    def __init__(self, width, side):
        super().__init__()
        self.rows, self.columns = slice(side // 4, side - side // 4), side // 4
        self.rank = torch.nn.Linear(width * (side // 2) * self.columns, len(gp.RANKS))

    def forward(self, grid):
        """(B, side, side, C) states of the patches -> (B, 4, 13) logits."""
        grid = grid[:, self.rows].unflatten(2, (4, self.columns))  # (B, side/2, 4, side/4, C)
        return self.rank(grid.transpose(1, 2).flatten(2))
