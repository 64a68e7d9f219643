"""V-IRL: follow walking directions along a route, turn by turn (paper Sec. 4.2, App. B).

A route becomes a rail of positions; at each of them one action is right: turn, go forward or stop. The environment
shows the instructions, what was seen and done so far, and what there is to see now, in words (V-IRL-L) or as a 2x2
street view (V-IRL-VL). A right action moves on and starts a fresh conversation; a wrong one stays in it together with
the verifier's text and the model may try again, `verify_iters` times in all at one position (sequential revision,
Sec. 3).

The routes themselves, generated or read, are routes.py's. Rewards are README's decided table. No torch in this file.

    python virl.py      draws docs/route.png: one route, position by position
"""
import json
import re
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from scenery import streets
from scenery.routes import COMPASS, SIDES, SPLITS, octant, split_route, stream, turn_word
from scenery.official import read_routes, refuse_unless as need
from scenery.panoramas import panoramas_of

TURNS = ("left", "right", "slightly left", "slightly right")
RULES = {"absolute": COMPASS, "relative": TURNS}  # what turn_direction() takes: trained on, rule OOD
REWARDS = {"correct": 1.0, "wrong_action": -1.0, "wrong_observation": -1.5}
EXHAUSTED = -1.0  # added to the last allowed answer at a position when it fails too


# ---------------------------------------------------------------- reading and grading an answer
KEYS = ("current observation", "current instruction", "action")
_SEEN = re.compile(rf"(?:the destination )?(.+?) is on your ({'|'.join(sorted(SIDES, key=len, reverse=True))})\b")


def read_answer(text):
    """The strings of KEYS in an answer or None: strict JSON first, else the first `"key": "..."` anywhere."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        found = {key: re.search(rf"""["']{key}["']\s*:\s*(?:"([^"]*)"|'([^']*)')""", text) for key in KEYS}
        data = {key: match and (match[1] if match[1] is not None else match[2]) for key, match in found.items()}
    return {key: data.get(key) if isinstance(data.get(key), str) else None for key in KEYS}


def sightings(observation):
    """What an observation claims: (set of (landmark, side), whether at an intersection), in any case and order."""
    sentences = re.split(r"[.;\n]", observation.lower())
    found = {match.groups() for s in sentences if (match := _SEEN.match(s.strip()))}
    return found, any("intersection" in s and not _SEEN.match(s.strip()) for s in sentences)


# ---------------------------------------------------------------- the environment
PROMPT = """\
You walk through a city. Follow the instructions to the destination, one action at a time.
Actions: forward(), turn_direction(x) where x is one of {words}, stop()
Instructions:
{instructions}
Answer with JSON only: {{"current observation": what you see, \
"current instruction": the instruction that you follow now, "action": one of the actions}}
{history}A_{n}:"""
PICTURE = "The picture shows the views to your front and right (top), back and left (bottom)."
NOTHING, INTERSECTION = "No landmarks nearby.", "You are at an intersection."
RETRY = "You failed this step: {reason}. Try again."
WRONG = {"wrong_action": "the action is wrong", "wrong_observation": "the observation and the action are wrong",
         "illegal": "the action is not one of the actions", "missing": 'no "action" was found in the answer'}


@dataclass(frozen=True)
class Position:
    """One point of the rail: where one stands and looks, what there is to see, and the right action's type."""
    place: tuple  # (x, y) metres
    heading: int  # degrees
    leg: int  # of the route, that ends at or lies ahead of this position
    action: str  # turn, forward or stop
    observation: str  # oracle text


@lru_cache(maxsize=512)
def _styled(scene, city):
    """The scene as it would look in another city; one object per pair, since streets keeps what it drew per scene."""
    return replace(scene, city=city) if scene and city else scene


@lru_cache(maxsize=4096)
def _drawn(scene, place, heading, size):
    """A street view as packed pixels: an evaluation comes back to the same places with every arm."""
    return zlib.compress(streets.street_views(scene, *place, heading, size).tobytes(), 1)


class Navigation:
    """One walk along a route with Gymnasium's `reset` and `step` (no dependency on it).

    Generated landmarks may not be near any other position of the walk: so an intersection's seldom stands behind.

    Args:
        rule: "absolute" (turn_direction takes one of 8 compass words, trained on) or "relative" (left, right, slightly
            left, slightly right: rule OOD). Instructions are the same under both.
        split: synthetic routes: "train", "seen" (48 of them), "unseen" (200 others of the same city), "mini" (18, two
            in each of nine cities), "cities" (25 in each of the eight cities never trained on).
        milestones: [fewest, most] per synthetic route, the destination included.
        routes: None or the path of an official route_infos.json, which then replaces the splits.
        image_size: None for V-IRL-L; pixels of the square street view for V-IRL-VL.
        city: synthetic street views: None or the city in whose style every route is drawn.
        panoramas: real street views for `routes`: a folder with panoramas.csv (lat, lng, pano_id), <pano_id>.jpg and
            <pano_id>.metadata.json.
        hide_intersection_text: V-IRL-VL: the text does not say that one is at an intersection; the picture shows it.
        verify_iters: answers allowed per position (paper: 2).
    Raises: ValueError naming the argument, and for files the route and the field.
    """

    answer_key = '"action"'  # tokens before it may weigh less in the PPO ratio (paper's code: 0.5)
    references = ("always forward", "copy the compass word", "copy the relative word", "blind")

    def __init__(self, rule="absolute", split="train", milestones=(2, 8), routes=None, image_size=None, city=None,
                 panoramas=None, hide_intersection_text=False, verify_iters=2):
        need(rule in tuple(RULES), f"rule: {rule!r} is none of {', '.join(RULES)}")
        need(split in tuple(SPLITS), f"split: {split!r} is none of {', '.join(SPLITS)}")
        need(isinstance(milestones, (list, tuple)) and len(milestones) == 2 and all(type(m) is int for m in milestones)
             and 1 <= milestones[0] <= milestones[1] <= 8,
             f"milestones: {milestones!r} is not [fewest, most] within 1 and 8")
        need(city is None or city in tuple(streets.CITIES), f"city: {city!r} is none of {', '.join(streets.CITIES)}")
        need(image_size is None or type(image_size) is int and streets.MIN_SIZE <= image_size <= 4096,
             f"image_size: {image_size!r} is neither null nor a number of pixels from {streets.MIN_SIZE} to 4096")
        need(isinstance(hide_intersection_text, bool),
             f"hide_intersection_text: {hide_intersection_text!r} is neither true nor false")
        need(image_size or not hide_intersection_text,
             "hide_intersection_text: needs image_size, or nothing would tell where to turn")
        need(type(verify_iters) is int and 1 <= verify_iters <= 100,
             f"verify_iters: {verify_iters!r} is not a whole number from 1 to 100")
        for name, path in (("routes", routes), ("panoramas", panoramas)):
            need(path is None or isinstance(path, str), f"{name}: {path!r} is neither null nor a path")
        self.rule, self.split, self.milestones, self.verify_iters = rule, split, tuple(milestones), verify_iters
        self.image_size, self.city, self.hidden = image_size, city, hide_intersection_text
        try:
            self._routes = routes and read_routes(routes)
        except ValueError as error:
            raise ValueError(f"routes: {error}") from None
        need(panoramas is None or routes and image_size, "panoramas: needs routes and image_size")
        self._views = None if panoramas is None else panoramas_of(panoramas, routes)
        need(not (routes and image_size) or self._views or all(r.scene for r in self._routes),
             "panoramas: routes without a synthetic scene need a folder of street views")
        self.done = True  # nothing to answer before reset
        self._legal = {"forward()", "stop()", *(f"turn_direction({word.replace(' ', '')})" for word in RULES[rule])}
        tries = f"within {verify_iters} attempts"
        self.reports = [
            ("per-step accuracy", "accuracy %, first attempts / all answers (per step)", ("first", "per_step")),
            ("turns", "first-attempt accuracy % where one goes forward / stops / turns",
             ("first_forward", "first_stop", "first_turn")),
            ("success", f"success %, every position of the route right {tries}", ("solved",))]
        if image_size:
            self.reports.append(("recognition", "recognition %, landmark and intersection reported right on the first "
                                 "attempt", ("recognized",)))

    # ------------------------------------------------------------ a walk
    def reset(self, seed, progress=0.0):
        """Start the walk that `seed` determines: the same under both rules, with and without pictures.

        Args: seed: successive ones take successive routes; progress: in [0, 1), where along the way to start.
        Returns: (obs, info); obs = {"messages": chat turns, "image": PIL image or None}, info = {cluster, positions:
        their number}. With an image, the first message's content is the list [image, text] that chat templates know.
        """
        if self._routes:
            self.route = self._routes[seed % len(self._routes)]
        else:
            self.route = split_route(self.split, seed % SPLITS[self.split], self.milestones)
        self.scene = _styled(self.route.scene, self.city)
        self.rng = stream(self.route.key, "walk", seed)
        route, heading = self.route, self.route.init_heading
        if heading is None:
            delta = self.rng.choice((-1, 1)) * self.rng.choice((self.rng.randint(15, 38), self.rng.randint(52, 165)))
            heading = (route.headings[0] - delta) % 360
        self.rail = self._rail(heading)
        self.turns = [turn_word(a, b) for a, b in zip((heading, *route.headings), route.headings)]
        self.instructions = []
        for leg, (turn, h, landmark) in enumerate(zip(self.turns, route.headings, route.landmarks)):
            goal = "you reach the destination" if leg == len(self.turns) - 1 else "the next intersection"
            where = f", where {landmark[0].lower() if landmark.startswith('The ') else landmark[0]}{landmark[1:]}" \
                if landmark else ""
            self.instructions += [f"Turn {turn} to face {COMPASS[octant(h)]}.", f"Move forward until {goal}{where}."]
        self.at, self.done = int(progress * len(self.rail)), False
        self._arrive()
        return self._obs(), {"cluster": route.key, "positions": len(self.rail)}

    def _rail(self, heading):
        """Positions of one walk; each leg has four candidates for a pause, kept by chance (Sec. 4.2, official)."""
        route, rail = self.route, [Position(self.route.points[0], heading, 0, "turn", NOTHING)]
        for leg, (place, h) in enumerate(zip(route.points[1:], route.headings)):
            for pause in route.pauses(leg):
                if self.rng.random() < 0.5 and pause:
                    rail.append(Position(pause, h, leg, "forward", NOTHING))
            landmark = f"{route.landmarks[leg]}." if route.landmarks[leg] else NOTHING
            rail.append(Position(place, h, leg, "stop", landmark) if place is route.points[-1] else
                        Position(place, h, leg + 1, "turn", f"{landmark} {INTERSECTION}"))
        return rail

    def _turn(self, leg, rule):
        word = COMPASS[octant(self.route.headings[leg])] if rule == "absolute" else self.turns[leg]
        return f"turn_direction({word})"

    def action(self, rule=None, at=None):
        """The right action at a position of the rail (default: here) under a rule (default: the environment's)."""
        now = self.rail[self.at if at is None else at]
        return self._turn(now.leg, rule or self.rule) if now.action == "turn" else f"{now.action}()"

    def _arrive(self):
        """The conversation at a new position: history holds the oracle's observations and the right actions."""
        now, place = self.rail[self.at], self.at
        here = now.observation
        lines = [f"O_{i + 1}: {self.rail[i].observation}\nA_{i + 1}: {self.action(at=i)}\n" for i in range(place)]
        if self.image_size:
            here = PICTURE + (f" {INTERSECTION}" if INTERSECTION in here and not self.hidden else "")
        lines.append(f"O_{place + 1}: {here}\n")
        words = RULES[self.rule]
        prompt = PROMPT.format(words=", ".join(words), n=place + 1, history="".join(lines),
                               instructions="\n".join(f"{i}. {text}" for i, text in enumerate(self.instructions, 1)))
        self.image = self._picture(now) if self.image_size else None
        self.messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]
                          if self.image_size else prompt}]
        self.attempt = 0

    def _picture(self, now):
        if self._views:
            return self._views.look(self.route, now.place, now.heading, self.image_size)
        pixels = zlib.decompress(_drawn(self.scene, now.place, now.heading, self.image_size))
        return Image.frombytes("RGB", (self.image_size, self.image_size), pixels)

    def _obs(self):
        return {"messages": list(self.messages), "image": self.image}

    def step(self, answer):
        """Grade one whole answer.

        Returns: (obs, reward in the paper's points, terminated = destination reached, truncated = attempts exhausted,
        info) with info = {category, correct, recognized: landmark and intersection reported right, attempt: 1.. at this
        position, action: turn, forward or stop, feedback, cluster}. Category: correct, wrong_action,
        wrong_observation (both are wrong) or illegal (no action of the list).
        Raises: RuntimeError if the episode is over. Never raises for an answer, whatever it holds.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset(seed)")
        self.attempt += 1
        read, now = read_answer(answer), self.rail[self.at]
        action = "".join((read["action"] or "").lower().split())
        correct = action == self.action().replace(" ", "")
        recognized = read[KEYS[0]] is not None and sightings(read[KEYS[0]]) == sightings(now.observation)
        grade = "correct" if correct else "wrong_action" if recognized else "wrong_observation"
        illegal = "illegal" if action and action not in self._legal else "missing" if not action else None
        info = {"category": "illegal" if illegal else grade, "correct": correct, "recognized": recognized,
                "attempt": self.attempt, "action": now.action, "cluster": self.route.key,
                "feedback": "" if correct else RETRY.format(reason=WRONG[illegal or grade])}
        reward = REWARDS[grade]
        terminated = correct and now.action == "stop"
        truncated = not correct and self.attempt == self.verify_iters
        self.done = terminated or truncated
        if correct and not terminated:
            self.at += 1
            self._arrive()
        elif not correct:
            self.messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": info["feedback"]}]
        return self._obs(), reward + truncated * EXHAUSTED, terminated, truncated, info

    # ------------------------------------------------------------ answers
    def answer(self, action, position=None, observation=None):
        """The JSON answer with this action, the instruction of a rail position and an observation (default: here's)."""
        now = self.rail[self.at if position is None else position]
        instruction = self.instructions[2 * now.leg + (now.action != "turn")]
        return json.dumps(dict(zip(KEYS, (observation or self.rail[self.at].observation, instruction, action))))

    def expert(self):
        """The answer that earns the full reward here."""
        return self.answer(self.action())

    def mistake(self):
        """A plausible answer that fails here: the walker follows the instruction of another position of the route, and
        now and then even sees what is there."""
        order = self.rng.sample(range(len(self.rail)), len(self.rail))
        other = next(i for i in order if self.action(at=i) != self.action())  # every rail has a turn and a stop
        seen = self.rail[other].observation if self.rng.random() < 0.2 else None
        return self.answer(self.action(at=other), other, seen)

    def reference(self, name):
        """The answer of a policy that does not think: one of `references`. Raises: ValueError for another name.

        "copy the .. word" knows where to turn and stop, and always gives that word of the instruction. "blind" looks at
        the text alone: it turns where the text says intersection (and at the start), otherwise goes forward, and
        when that was rejected takes the next turn that the text names or, when there is none, stops.
        """
        need(name in self.references, f"reference: {name!r} is none of {', '.join(self.references)}")
        now = self.rail[self.at]
        if name.startswith("copy"):
            return self.answer(self.action("absolute" if "compass" in name else "relative"))
        flagged = INTERSECTION in now.observation and not self.hidden
        seen = f"{NOTHING} {INTERSECTION}" if flagged else NOTHING
        action, ahead = "forward()", now.leg + (now.action != "turn")  # ahead: leg of the next turn in the text
        if name == "blind" and (self.at == 0 or flagged or self.attempt):
            action = self._turn(ahead, self.rule) if ahead < len(self.turns) else "stop()"
        return self.answer(action, observation=seen if self.image_size else None)


def main():
    """docs/route.png: a walk with its instructions, position by position, with what is right under both rules."""
    env = Navigation(split="unseen", milestones=(3, 3), image_size=430)
    for seed in range(200):
        env.reset(seed)
        if len(env.rail) == 8 and sum(map(bool, env.route.landmarks)) > 1:  # two rows, and something to see on the way
            break
    wide, high = 442, 494
    sheet = Image.new("RGB", (4 * wide + 12, 2 * high + 40 + 19 * len(env.instructions)), "white")
    write = ImageDraw.Draw(sheet).text
    for i, text in enumerate(env.instructions):
        write((14, 12 + 19 * i), f"{i + 1}. {text}", "black", ImageFont.load_default(15))
    top = 30 + 19 * len(env.instructions)
    while not env.done:
        x, y = 12 + wide * (env.at % 4), top + high * (env.at // 4)
        sheet.paste(env.image, (x, y + 42))
        right = dict.fromkeys(env.action(rule) for rule in RULES)
        write((x, y), f"{env.at + 1}. {'  |  '.join(right)}", "black", ImageFont.load_default(15))
        write((x, y + 20), env.rail[env.at].observation, "#666666", ImageFont.load_default(13))
        env.step(env.expert())
    path = Path(__file__).resolve().parent / "docs" / "route.png"
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
