"""What the V-IRL backbone reads: single steps of walks, by imperfect authors, under both action rules. See pretrain.py."""
import random

import torch

import virl
from scenery import routes, streets


def phrases():
    """Constant pieces of the conversations and the words of the task, each one token."""
    head, rest = virl.PROMPT.split("{words}")
    middle, rest = rest.split("{instructions}")
    ask = rest.split("{history}")[0].replace("{{", "{").replace("}}", "}")
    pieces = [head, middle + "1. ", "\n" + ask.strip("\n") + "\n", virl.PICTURE, f" {virl.INTERSECTION}",
              *(", ".join(words) for words in virl.RULES.values()), *routes.COMPASS, *routes.SIDES, *virl.TURNS]
    pieces += ["Turn ", " to face ", "Move forward until the next intersection", "Move forward until you reach the destination",
               ", where ", "the destination ", "The destination ", " is on your ", virl.NOTHING]
    pieces += [f".\n{i}. " for i in range(2, 17)]
    pieces += [mark for i in range(1, 42) for mark in (f"O_{i}: ", f"\nA_{i}: ", f"\nA_{i}:")]
    pieces += ["forward()", "stop()", "turn_direction(", ")\n", ")", '{"current observation": "', '", "current instruction": "',
               '.", "current instruction": "', '", "action": "', '.", "action": "', '"}', ')"}', 'forward()"}', 'stop()"}']
    pieces += [f"{word} " for word in routes.ADJECTIVES] + list(streets.CATEGORIES)
    pieces += [virl.RETRY.format(reason=reason) for reason in virl.WRONG.values()]
    return list(dict.fromkeys(pieces))


class Corpus:
    """One position of a walk each: the task, an author's answer, the verifier's text, the same again or another try.

    Args: data: the recipe's shares; seed; image_size: None, or [size, size] of the street views. The routes are its own.
    """

    def __init__(self, data, seed, image_size=None):
        self.data, self.rng = data, random.Random(seed)
        self.envs = {rule: virl.Navigation(rule=rule) for rule in virl.RULES}
        self.eyes = {rule: virl.Navigation(rule=rule, image_size=image_size[0], hide_intersection_text=True)
                     for rule in virl.RULES} if image_size else {}
        walks = [routes.split_route("corpus", i, tuple(data["milestones"])) for i in range(data["routes"])]
        for env in (*self.envs.values(), *self.eyes.values()):
            env._routes = walks

    def conversation(self):
        """Observation at the end of one author's turns at one position of a walk."""
        data, answer = self.data, None
        env = self.envs[self.rng.choices(("absolute", "relative"), (data["absolute"], data["relative"]))[0]]
        seed, progress = self.rng.getrandbits(48), self.rng.random()
        if self.rng.random() < data["landmarks"]:
            env.reset(seed)
            progress = self.rng.choice([(i + 0.5) / len(env.rail) for i, p in enumerate(env.rail) if "is on your" in p.observation])
        obs, _ = env.reset(seed, progress)
        here = env.rail[env.at]
        if self.eyes:
            obs, _ = self.eyes[env.rule].reset(seed, progress)
        said, image, seen = obs["messages"], obs["image"], here.observation
        if not self.eyes and self.rng.random() < data["blind"]:  # words about a picture that is not there
            words = virl.PICTURE + f" {virl.INTERSECTION}" * (virl.INTERSECTION in seen and self.rng.random() < 0.5)
            said[0]["content"] = words.join(said[0]["content"].rsplit(seen, 1))
        while True:
            if answer is None or self.rng.random() >= data["repeat"]:
                answer = self.author(env, here)
            _, _, _, truncated, info = env.step(answer)
            said = said + [{"role": "assistant", "content": answer}]
            if info["correct"] or truncated or self.rng.random() >= data["continue"]:
                return {"messages": said, "image": image, "probe": probe_targets(seen)}
            said = said + [{"role": "user", "content": info["feedback"]}]

    def author(self, env, here):
        """What an imperfect author answers at a position of a walk."""
        data, turns = self.data, [i for i, p in enumerate(env.rail[:env.at]) if p.action == "turn"]
        if self.rng.random() >= data["right"]:
            return env.mistake()
        if here.action == "turn" and turns and env.at >= data["late"] and self.rng.random() < data["lost"]:
            return env.answer(env.action(at=turns[-1]), turns[-1])
        if here.action == "turn" and self.rng.random() < data["slip"]:
            return env.answer(env.action("relative" if env.rule == "absolute" else "absolute"))
        return env.expert()

    def document(self):
        """The messages of a conversation."""
        return self.conversation()["messages"]


def probe_targets(observation):
    """[category in each of 12 parts of the picture (0: none), intersection] of an observation; see Probe."""
    parts, (found, crossing) = [0] * 12, virl.sightings(observation)
    for name, side in found:
        octant = routes.SIDES.index(side)
        for part in (octant // 2 * 3 + 1,) if octant % 2 == 0 else (octant // 2 * 3 + 2, (octant // 2 + 1) % 4 * 3):
            parts[part] = 1 + [c.lower() for c in streets.CATEGORIES].index(name.split()[-1])
    return [*parts, int(crossing)]


class Probe(torch.nn.Module):
    """Which landmark is near, in the left, middle and right part of each view; and whether one is at an intersection."""

    def __init__(self, width, side):
        super().__init__()
        self.half, classes = side // 2, 1 + len(streets.CATEGORIES)
        self.sign, self.crossing = torch.nn.Linear(width, classes), torch.nn.Linear(4 * width, classes)

    def forward(self, grid):
        """(B, side, side, C) states of the patches -> (B, 13, 21) logits."""
        half, edge = self.half, round(0.35 * self.half)  # a diagonal octant starts 22.5 of 55 degrees off the middle
        views = [grid[:, y:y + half, x:x + half] for y in (0, half) for x in (0, half)]  # front, right, back, left
        parts = [v[:, :, a:b].flatten(1, 2).amax(1) for v in views for a, b in ((0, edge), (edge, half - edge), (half - edge, half))]
        ground = torch.cat([v.flatten(1, 2).mean(1) for v in views], 1)  # (B, 4 C)
        return torch.cat([self.sign(torch.stack(parts, 1)), self.crossing(ground)[:, None]], 1)
