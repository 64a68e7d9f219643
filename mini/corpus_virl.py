"""What the V-IRL backbone reads: single steps of walks, by imperfect authors, under both rules."""
import random

import torch

import virl
from scenery import routes
from scenery.styles import CATEGORIES


def phrases():
    """Constant pieces of the conversations and the words of the task, each one token."""
    head, rest = virl.PROMPT.split("{words}")
    middle, rest = rest.split("{instructions}")
    ask = rest.split("{history}")[0].replace("{{", "{").replace("}}", "}").strip("\n")
    pieces = [head, f"{middle}1. ", f"\n{ask}\n", virl.PICTURE, f" {virl.INTERSECTION}"]
    pieces += [", ".join(words) for words in virl.RULES.values()]
    pieces += [*routes.COMPASS, *routes.SIDES, *virl.TURNS]
    pieces += ["Turn ", " to face ", "Move forward until the next intersection",
               "Move forward until you reach the destination", ", where ", "the destination ",
               "The destination ", " is on your ", virl.NOTHING]
    pieces += [f".\n{i}. " for i in range(2, 17)]
    for i in range(1, 42):
        pieces += [f"O_{i}: ", f"\nA_{i}: ", f"\nA_{i}:"]
    pieces += ["forward()", "stop()", "turn_direction(", ")\n", ")"]
    pieces += ['{"current observation": "', '", "current instruction": "',
               '.", "current instruction": "', '", "action": "', '.", "action": "',
               '"}', ')"}', 'forward()"}', 'stop()"}']
    pieces += [f"{word} " for word in routes.ADJECTIVES]
    pieces += CATEGORIES
    pieces += [virl.RETRY.format(reason=reason) for reason in virl.WRONG.values()]
    return list(dict.fromkeys(pieces))


class Corpus:
    """One position of a walk each: the task, an author's answer, the verifier's text, the next try.

    Args: data: the recipe's shares; seed: of all that is drawn but the routes, which are the
        corpus's own; image_size: None, or [size, size] of the street views.
    """

    def __init__(self, data, seed, image_size=None):
        self.data = data
        self.rng = random.Random(seed)
        self.image_size = image_size
        self.envs = {rule: virl.Navigation(rule=rule) for rule in virl.RULES}
        self.picture_envs = {}
        if image_size:
            for rule in virl.RULES:
                self.picture_envs[rule] = virl.Navigation(
                    rule=rule, image_size=image_size[0], hide_intersection_text=True)
        milestones = tuple(data["milestones"])
        walks = [routes.split_route("corpus", i, milestones) for i in range(data["routes"])]
        for env in (*self.envs.values(), *self.picture_envs.values()):
            env._routes = walks

    def document(self):
        """One author's turns at one position: {messages, image, probe: what `Probe` must say}."""
        env, seed, progress = self.position()
        obs, _ = env.reset(seed, progress)
        oracle = env.rail[env.at].observation
        if self.picture_envs:
            obs, _ = self.picture_envs[env.rule].reset(seed, progress)
        elif self.rng.random() < self.data["blind"]:
            self.hide(obs["messages"][0], oracle)
        messages = list(obs["messages"])
        answer = None
        while True:
            if answer is None or self.rng.random() >= self.data["repeat"]:
                answer = self.author(env)
            _, _, _, truncated, info = env.step(answer)
            messages.append({"role": "assistant", "content": answer})
            if info["correct"] or truncated or self.rng.random() >= self.data["continue"]:
                break
            messages.append({"role": "user", "content": info["feedback"]})
        return {"messages": messages, "image": obs["image"], "probe": probe_targets(oracle)}

    def position(self):
        """(environment in words, seed, progress) of a position of a walk, often at a landmark."""
        shares = [self.data["absolute"], self.data["relative"]]
        env = self.envs[self.rng.choices(("absolute", "relative"), shares)[0]]
        seed = self.rng.getrandbits(48)
        progress = self.rng.random()
        if self.rng.random() < self.data["landmarks"]:
            env.reset(seed)
            near = [i for i, p in enumerate(env.rail) if "is on your" in p.observation]
            progress = (self.rng.choice(near) + 0.5) / len(env.rail)
        return env, seed, progress

    def hide(self, message, oracle):
        """Speak of a picture that is not there, in place of what is seen."""
        words = virl.PICTURE
        if virl.INTERSECTION in oracle and self.rng.random() < 0.5:
            words += f" {virl.INTERSECTION}"
        before, after = message["content"].rsplit(oracle, 1)
        message["content"] = before + words + after

    def author(self, env):
        """What an imperfect author answers at a position of a walk."""
        if self.rng.random() >= self.data["right"]:
            return env.mistake()
        if env.rail[env.at].action == "turn":
            turns = [i for i, p in enumerate(env.rail[:env.at]) if p.action == "turn"]
            late = turns and env.at >= self.data["late"]
            if late and self.rng.random() < self.data["lost"]:
                return env.answer(env.action(at=turns[-1]), turns[-1])
            if self.rng.random() < self.data["slip"]:
                other = "relative" if env.rule == "absolute" else "absolute"
                return env.answer(env.action(other))
        return env.expert()


def probe_targets(observation):
    """The category in each of the picture's 12 parts (0: none), then whether at an intersection."""
    categories = [category.lower() for category in CATEGORIES]
    landmarks, crossing = virl.sightings(observation)
    parts = [0] * 12
    for name, side in landmarks:
        view, diagonal = divmod(routes.SIDES.index(side), 2)
        shown = [3 * view + 1]  # the middle of a view
        if diagonal:  # the right end of a view and the left end of the next
            shown = [3 * view + 2, 3 * ((view + 1) % 4)]
        for part in shown:
            parts[part] = 1 + categories.index(name.split()[-1])
    return [*parts, int(crossing)]


class Probe(torch.nn.Module):
    """Which landmark is near, in the left, middle and right part of each view; and the crossing."""

    def __init__(self, width, side):
        super().__init__()
        classes = 1 + len(CATEGORIES)
        self.half = side // 2
        self.sign = torch.nn.Linear(width, classes)
        self.crossing = torch.nn.Linear(4 * width, classes)

    def forward(self, grid):
        """(B, side, side, C) states of the patches -> (B, 13, 21) logits."""
        half = self.half
        edge = round(0.35 * half)  # a diagonal octant starts 22.5 of 55 degrees off the middle
        parts, ground = [], []
        for y in (0, half):
            for x in (0, half):  # front, right, back, left
                view = grid[:, y:y + half, x:x + half]  # (B, side/2, side/2, C)
                ground.append(view.flatten(1, 2).mean(1))  # (B, C)
                for part in view.split((edge, half - 2 * edge, edge), 2):
                    parts.append(part.flatten(1, 2).amax(1))  # (B, C)
        signs = self.sign(torch.stack(parts, 1))  # (B, 12, 21)
        crossing = self.crossing(torch.cat(ground, 1))  # (B, 21)
        return torch.cat([signs, crossing[:, None]], 1)
