"""What the V-IRL backbone reads: how to find one's way, in plain words under both vocabularies.

Directions, turns and sides; what instructions say; walks on maps of its own, told or talked
through; small tasks in JSON. Never an answer of the task, never a route that is evaluated.
"""
import math
import random
import re
from dataclasses import replace
from typing import NamedTuple

import torch

import virl
from mini.documents import Exchange, chat, prose
from scenery import routes
from scenery.streets import street_views
from scenery.styles import CATEGORIES
from scenery.town import Sign

OPENING = virl.PROMPT.split("Actions: ")[0]
WORDED = "Say where to turn in these words: {words}\nInstructions:\n{instructions}\n"
DIARY, SO_FAR, NOW = "Step {n}: {seen} {done}\n", "So far: {story}\n", "Now: {seen}"
SEE, WHICH, NUMBER = "What do you see?", "Which instruction is it?", "Number {n}: {instruction}"
BOTH = "Read the instruction, then say what to do."
ON_THE_WAY = " On the way: {names}\n"
READ, SPEAKS = "Read out number {n}.", "Which number speaks of {name}?"
COMPASS_WORD, TURN_WORD = " Which compass word is in it?", " Which way does it turn?"
OF_THESE = " Which of these words is in it: {words}?"
INSTRUCTION = "Turn {turn} to face {compass}."
FACING = "You face {before} and turn {turn}: now you face "
BETWEEN = "You face {before} and want to face {after}: turn "
QUARTER = " by a quarter"
LANDMARK, MEANS = "{name} is on your {side}", ": it is "
LANDMARK_IS = " is on your "
NAME = re.compile(f"({'|'.join(CATEGORIES)}) (?:{'|'.join(routes.PROPER_NAMES)})")
AROUND = ". You turn {turn}" + QUARTER + ": now it is on your "
MEANINGS = ("straight ahead", "to the right and ahead", "to the right", "to the right and behind",
            "straight behind", "to the left and behind", "to the left", "to the left and ahead")
JSON, WRONG = "JSON: {keys}\n{text}", "That is wrong. Try again."
FIELD = "{key} = {value}\n"
CALL, REPEAT = "Write the call of {name} with {thing}.", "Repeat: {words}"
VERBS = ("open", "find", "show", "go", "walk", "arrive", "turn", "forward", "stop")
OBJECTS = ("_door", "_page", "_direction")
KEYS = ("place", "side", "compass", "turn", "sentence", "crossing", "first", "last", "note", "name",
        "word", "answer", "seen", "view", "line", "next", "step", "observation",
        "instruction")  # of small tasks
CURRENT = "current "  # may stand before a key
WORDS = ("action", "forward", "stop", *KEYS)


class Manner(NamedTuple):
    """How people speak of a walk; the word for a direction stands in the same place under both
    vocabularies."""
    ask: str
    turn: str  # what to do
    walk: str
    arrive: str
    turned: str  # what was done
    walked: str

    def next_step(self, env, at, rule):
        """What to do at a position."""
        action = env.rail[at].action
        turn = self.turn.format(word=word_of(env, at, rule))
        return {"turn": turn, "forward": self.walk, "stop": self.arrive}[action]

    def past_step(self, env, at, rule):
        """What was done at a position, the last one not among them."""
        if env.rail[at].action == "turn":
            return self.turned.format(word=word_of(env, at, rule))
        return self.walked


MANNERS = (
    Manner("What comes next?", "Now turn {word}.", "Walk on.", "You have arrived.",
           "You turned {word}.", "You walked on."),
    Manner("What shall I do?", "Go {word}, please.", "Just keep going.", "Stop, this is it.",
           "I went {word}.", "I kept going."),
    Manner("Which call is next?", "go({word})", "walk()", "arrive()", "go({word})", "walk()"))
# What is reported of a position in JSON, under these keys
REPORT = {"seen": ("seen", "view", "note"), "line": ("line", "sentence", "word"),
          "next": ("next", "step", "answer")}


def word_of(env, at, rule):
    """The word for the direction into which a position's leg turns."""
    turn = env.turns[rule][env.rail[at].leg]
    return re.search(r"\((.*)\)", turn)[1]


def told_by(route):
    """What instructions say of a route after their first line, which hangs on where one looks."""
    turns = [routes.turn_word(*pair) for pair in zip(route.headings, route.headings[1:])]
    octants = [routes.octant(heading) for heading in route.headings[1:]]
    return route.landmarks, tuple(turns), tuple(octants)


def evaluated(milestones):
    """{told_by} of every route that is trained on or evaluated."""
    found = set()
    for split, size in routes.SPLITS.items():
        for i in range(size):
            found.add(told_by(routes.split_route(split, i, milestones)))
    return found


# ---------------------------------------------------------------- tokens
def phrases():
    """Constant pieces of the documents and of the task's prompt, one token each.

    The task's answers are put together from pieces that documents hold, too.
    """
    head, rest = virl.PROMPT.split("{words}")
    ask = rest.split("{instructions}")[1].split("{history}")[0]
    ask = ask.replace("{{", "{").replace("}}", "}").removesuffix("\n")
    templates = [OPENING, WORDED, DIARY, SO_FAR, NOW, NUMBER, ON_THE_WAY, READ, SPEAKS, OF_THESE,
                 INSTRUCTION, FACING, BETWEEN, LANDMARK, AROUND, JSON, FIELD, CALL, REPEAT]
    for manner in MANNERS[:2]:  # the calls of the third are put together from verbs and brackets
        templates += [manner.turn, manner.turned]
    pieces = [piece for template in templates for piece in re.split(r"\{\w+\}", template)]
    for manner in MANNERS:
        pieces += [manner.ask, f" {manner.ask}"]
    for manner in MANNERS[:2]:
        pieces += [manner.walk, manner.arrive, manner.walked]
    pieces += [SEE, f" {SEE}", WHICH, f" {WHICH}", BOTH, f" {BOTH}", COMPASS_WORD, TURN_WORD]
    pieces += [QUARTER, MEANS, WRONG]
    pieces += [*MEANINGS, *VERBS, *OBJECTS, CURRENT, *WORDS, "nothing", "yes", "no"]
    pieces += [head.removeprefix(OPENING), ", stop()\n", "Instructions:\n1. ", virl.PICTURE]
    pieces += re.split(f"{CURRENT}observation|{CURRENT}instruction(?=\")|action(?=\")", ask)
    pieces += [", ".join(words) for words in virl.RULES.values()]
    pieces += [*routes.COMPASS, *routes.SIDES, *virl.TURNS]
    pieces += ["Move forward until the next intersection", "the destination ", "The destination ",
               "Move forward until you reach the destination", ", where ", virl.NOTHING,
               f" {virl.INTERSECTION}"]
    pieces += [f".\n{i}. " for i in range(2, 17)]
    for i in range(1, 42):
        pieces += [str(i), f"{i}: "]
    pieces += ["\nO_", "\nA_", "()", '{"', '": "', '", "', '"}', ", "]
    pieces += [f" {word}" for word in routes.PROPER_NAMES]
    pieces += CATEGORIES
    pieces += [virl.RETRY.format(reason=reason) for reason in virl.WRONG.values()]
    return [piece for piece in dict.fromkeys(pieces) if piece]


# ---------------------------------------------------------------- documents
class Corpus:
    """Documents about directions and walks.

    Args: data: the recipe's shares; seed: of all that is drawn but the routes, which are the
        corpus's own; image_size: None, or [size, size] of the street views.
    """

    def __init__(self, data, seed, image_size=None):
        self.data = data
        self.rng = random.Random(seed)
        self.image_size = image_size
        self.env = virl.Navigation()
        self.pictures, self.drawn = None, {"views": [], "fairs": []}
        self.place = None  # of the latest fairs
        if image_size:
            self.pictures = virl.Navigation(image_size=image_size[0], hide_intersection_text=True)
        milestones = tuple(data["milestones"])
        own = [routes.split_route("corpus", i, milestones) for i in range(data["routes"])]
        others = evaluated(milestones)
        self.env._routes = [route for route in own if told_by(route) not in others]
        if image_size:
            self.env._routes = [self.moved(route) for route in self.env._routes]
            self.pictures._routes = self.env._routes

    def moved(self, route):
        """A share of the routes lies in other cities than the one that the task trains in."""
        if self.rng.random() < self.data["elsewhere"]:
            scene = replace(route.scene, city=self.rng.choice(routes.ELSEWHERE))
            return replace(route, scene=scene)
        return route

    def document(self):
        """A Document of one of the recipe's kinds, by their shares."""
        kinds = self.data["documents"]
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        document = getattr(self, kind)()
        return self.renamed(document) if self.pictures else document

    def renamed(self, document):
        """The same with other proper names of its landmarks. Pictures show the kind of a shop
        alone: its name is to be found in the text, not learned with the place."""
        names = {}

        def other(found):
            names.setdefault(found[0], self.name_of(found[1]))
            return names[found[0]]

        parts = [(NAME.sub(other, text), learned) for text, learned in document.parts]
        return document._replace(parts=parts)

    # ------------------------------------------------------------ walks
    def map(self, rule):
        numbered = [f"{i}. {line}" for i, line in enumerate(self.env.instructions, 1)]
        words = ", ".join(virl.RULES[rule])
        return OPENING + WORDED.format(words=words, instructions="\n".join(numbered))

    def replies(self, request, right, wrong, correction):
        """Exchanges that end with the right reply. Wrong ones before it, no two alike, carry no
        loss and are followed by the correction."""
        exchanges = []
        wrong = sorted(set(wrong) - {right})
        self.rng.shuffle(wrong)
        while wrong and self.rng.random() < self.data["slip"]:
            exchanges.append(Exchange(request, wrong.pop(), learned=False))
            request = correction
        return [*exchanges, Exchange(request, right)]

    def directed(self, request, manner, at, rule):
        """Exchanges about what to do at a position."""
        steps = [manner.next_step(self.env, i, rule) for i in range(len(self.env.rail))]
        return self.replies(request, steps[at], steps, self.correction())

    def correction(self):
        reason = self.rng.choice(("wrong_action", "wrong_observation"))
        return virl.RETRY.format(reason=virl.WRONG[reason])

    def position(self):
        """Take a walk. Returns: (a position of it, image); in the first stage without the image."""
        if self.pictures:
            return self.view()
        self.env.reset(self.rng.getrandbits(48))
        rail = self.env.rail
        at = self.rng.randrange(len(rail))
        if self.rng.random() < self.data["turns"]:
            at = self.rng.choice([i for i, here in enumerate(rail) if here.action != "forward"])
        return at, None

    def view(self):
        """(position of a walk, its picture), often one with a landmark."""
        seed, at, image = self.kept("views", self.draw_view)
        self.env.reset(seed)
        return at, image

    def draw_view(self):
        seed = self.rng.getrandbits(48)
        self.env.reset(seed)
        rail = self.env.rail
        at = self.rng.randrange(len(rail))
        if self.rng.random() < self.data["landmarks"]:
            near = [i for i, here in enumerate(rail) if LANDMARK_IS in here.observation]
            at = self.rng.choice(near)
        obs, _ = self.pictures.reset(seed, (at + 0.5) / len(rail))
        return seed, at, obs["image"]

    def draw_fair(self):
        """(Picture with several landmarks, Position, [(side, category)]); eight of one place."""
        turned = len(self.drawn["fairs"]) % 8
        if turned == 0:
            self.place = self.new_fair()
        scene, here, standing = self.place
        image = street_views(scene, *here.place, here.heading + 45 * turned, self.image_size[0])
        return image, here, sorted(((side - turned) % 8, category) for side, category in standing)

    def new_fair(self):
        """(Scene of a place on a walk with other signs, its Position, [(side, category)])."""
        self.env.reset(self.rng.getrandbits(48))
        here = self.rng.choice(self.env.rail)
        sides = self.rng.sample(range(8), self.rng.randint(2, 5))
        standing = list(zip(sides, self.rng.sample(CATEGORIES, len(sides))))
        signs = []
        for side, category in standing:
            angle = math.radians(here.heading + 45 * side + self.rng.uniform(-10, 10))
            away = self.rng.uniform(8, 14)
            x, y = here.place[0] + away * math.sin(angle), here.place[1] + away * math.cos(angle)
            signs.append(Sign(x, y, self.name_of(category), category))
        return replace(self.env.route.scene, signs=tuple(signs)), here, standing

    def kept(self, kind, draw):
        """Something drawn: a new one until `pictures` are there, then one of those. Drawing takes
        longer than learning from it."""
        drawn = self.drawn[kind]
        if len(drawn) == self.data["pictures"]:
            return self.rng.choice(drawn)
        drawn.append(draw())
        return drawn[-1]

    def story(self, manner, at, rule):
        """What was seen and done before a position: a diary, sentences, or the steps alone."""
        seen = [here.observation for here in self.env.rail[:at]]
        done = [manner.past_step(self.env, i, rule) for i in range(at)]
        style = self.rng.choice(("diary", "sentences", "steps"))
        if style == "diary":
            return "".join(DIARY.format(n=i + 1, seen=seen[i], done=done[i]) for i in range(at))
        if style == "sentences":
            done = [f"{a} {b}" for a, b in zip(seen, done)]
        return SO_FAR.format(story=" ".join(done)) if at else ""

    def told(self):
        """A walk so far, and questions about where one is and what comes next."""
        at, image = self.position()
        here = self.env.rail[at]
        rule, other = self.rng.sample(tuple(virl.RULES), 2)
        manner = self.rng.choice(MANNERS)
        in_words = other if self.rng.random() < self.data["mixed"] else rule
        seen = here.observation
        if image or self.rng.random() < self.data["blind"]:
            seen = virl.PICTURE
        request = self.map(rule) + self.story(manner, at, in_words) + NOW.format(seen=seen) + " "
        if self.rng.random() < self.data["report"]:
            return self.seen(self.reported(request, manner, at, rule), image, here)
        exchanges = []
        questions = (manner.ask, SEE, WHICH, BOTH)
        for question in self.rng.sample(questions, self.rng.randint(2, 3)):
            request += question
            if question == manner.ask:
                exchanges += self.directed(request, manner, at, rule)
            elif question == SEE:
                exchanges.append(Exchange(request, here.observation))
            elif question == WHICH:
                n, line = self.line(at)
                exchanges.append(Exchange(request, NUMBER.format(n=n, instruction=line)))
            else:
                step = manner.next_step(self.env, at, rule)
                exchanges.append(Exchange(request, f"{self.line(at)[1]} {step}"))
            request = ""
        return self.seen(exchanges, image, here)

    def line(self, at):
        """(number, text) of the instruction that is followed at a position."""
        here = self.env.rail[at]
        n = 2 * here.leg + (here.action != "turn")
        return n + 1, self.env.instructions[n]

    def reported(self, request, manner, at, rule):
        """Exchanges about a position in JSON, under other keys than the task's."""
        asked = self.rng.sample(tuple(REPORT), self.rng.randint(2, 3))
        keys = [self.rng.choice(REPORT[what]) for what in asked]
        replies = []
        for i in range(len(self.env.rail)):
            facts = {"seen": self.env.rail[at].observation, "line": self.line(i)[1],
                     "next": manner.next_step(self.env, i, rule)}
            fields = [f'"{key}": "{facts[what]}"' for key, what in zip(keys, asked)]
            replies.append("{" + ", ".join(fields) + "}")
        request += JSON.format(keys=", ".join(keys), text="")
        return self.replies(request, replies[at], replies, self.correction())

    def seen(self, exchanges, image, here):
        """The Document of exchanges at a position."""
        return chat(exchanges, image, probe_targets(here.observation) if image else None)

    def tour(self):
        """A whole walk talked through, step by step."""
        self.env.reset(self.rng.getrandbits(48))
        rule, manner = self.rng.choice(tuple(virl.RULES)), self.rng.choice(MANNERS)
        request, exchanges = self.map(rule), []
        for at, here in enumerate(self.env.rail):
            request += f"{NOW.format(seen=here.observation)} {manner.ask}"
            exchanges += self.directed(request, manner, at, rule)
            request = ""
        return chat(exchanges)

    def diary(self):
        """A whole walk as somebody tells of it afterwards."""
        self.env.reset(self.rng.getrandbits(48))
        rule, manner = self.rng.choice(tuple(virl.RULES)), self.rng.choice(MANNERS)
        end = len(self.env.rail) - 1
        arrived = NOW.format(seen=self.env.rail[end].observation) + f" {manner.arrive}"
        told = self.story(manner, end, rule) + arrived
        return prose((self.map(rule), False), (told, True))

    def look(self):
        """What a picture shows, among the landmarks on the way."""
        at, image = self.position()
        names = re.findall(r"([A-Z]\w+ [A-Z]\w+) is on your", " ".join(self.env.instructions))
        self.rng.shuffle(names)
        request = virl.PICTURE + ON_THE_WAY.format(names=", ".join(names)) + SEE
        here = self.env.rail[at]
        return self.seen([Exchange(request, here.observation)], image, here)

    def fair(self):
        """What a picture shows where landmarks stand on several sides."""
        image, here, standing = self.kept("fairs", self.draw_fair)
        landmarks = [(side, self.name_of(category)) for side, category in standing]
        others = sorted(set(CATEGORIES) - {category for _, category in standing})
        names = [name for _, name in landmarks]
        names += [self.name_of(category) for category in self.rng.sample(others, 2)]
        self.rng.shuffle(names)
        request = virl.PICTURE + ON_THE_WAY.format(names=", ".join(names)) + SEE
        told = [LANDMARK.format(name=name, side=routes.SIDES[side]) for side, name in landmarks]
        seen = f"{'. '.join(told)}."
        if virl.INTERSECTION in here.observation:
            seen += f" {virl.INTERSECTION}"
        return chat([Exchange(request, seen)], image, probe_targets(seen))

    def readout(self):
        """What the instructions say under which number."""
        self.env.reset(self.rng.getrandbits(48))
        request, exchanges = self.map(self.rng.choice(tuple(virl.RULES))), []
        lines = list(enumerate(self.env.instructions, 1))
        for n, line in self.rng.sample(lines, min(3, len(lines))):
            name = re.search(r"([A-Z]\w+ [A-Z]\w+) is on your", line)
            if name and self.rng.random() < 0.5:
                request += SPEAKS.format(name=name[1])
                exchanges.append(Exchange(request, NUMBER.format(n=n, instruction=line)))
            else:
                request += READ.format(n=n)
                exchanges.append(Exchange(request, line))
            request = ""
        return chat(exchanges)

    # ------------------------------------------------------------ words
    def name(self):
        return self.name_of(self.rng.choice(CATEGORIES))

    def name_of(self, category):
        return f"{category} {self.rng.choice(routes.PROPER_NAMES)}"

    def landmark(self):
        return LANDMARK.format(name=self.name(), side=self.rng.choice(routes.SIDES))

    def instruction(self):
        turn, compass = self.rng.choice(virl.TURNS), self.rng.choice(routes.COMPASS)
        return INSTRUCTION.format(turn=turn, compass=compass)

    def turning(self):
        """Where one faces after a turn, and which turn leads from one direction to another."""
        parts = []
        for _ in range(6):
            before = self.rng.randrange(8)
            change = self.rng.choice((-3, -2, -1, 1, 2, 3))
            after = (before + change) % 8
            turn = routes.turn_word(45 * before, 45 * after)
            start, end = routes.COMPASS[before], routes.COMPASS[after]
            if abs(change) == 3 or self.rng.random() < 0.5:
                said, answer = BETWEEN.format(before=start, after=end), turn
            else:
                turn += QUARTER if abs(change) == 2 else ""
                said, answer = FACING.format(before=start, turn=turn), end
            parts += [(said, False), (answer + ".\n", True)]
        return prose(*parts)

    def words(self):
        """Which compass word and which turn an instruction holds."""
        exchanges = []
        for _ in range(4):
            text = self.instruction()
            turn, compass = re.fullmatch(r"Turn (.*) to face (.*)\.", text).groups()
            rules = {"absolute": compass, "relative": turn}
            rule = self.rng.choice(tuple(rules))
            these = OF_THESE.format(words=", ".join(virl.RULES[rule]))
            asks = {COMPASS_WORD: compass, TURN_WORD: turn, these: rules[rule]}
            question, answer = self.rng.choice(tuple(asks.items()))
            exchanges.append(Exchange(text + question, answer + "."))
        return chat(exchanges)

    def sides(self):
        """Where a landmark is, and on which side it is after a turn."""
        parts = []
        for _ in range(6):
            side = self.rng.randrange(8)
            text = LANDMARK.format(name=self.name(), side=routes.SIDES[side])
            if self.rng.random() < 0.5:
                said, answer = text + MEANS, MEANINGS[side]
            else:
                turn, change = self.rng.choice((("left", 2), ("right", -2)))
                said = text + AROUND.format(turn=turn)
                answer = routes.SIDES[(side + change) % 8]
            parts += [(said, False), (answer + ".\n", True)]
        return prose(*parts)

    # ------------------------------------------------------------ small tasks
    def json_task(self):
        """What a text says, in JSON under keys of all sorts; a slip is corrected first."""
        texts = [self.some_text() for _ in range(4)]
        keys = self.rng.sample(list(texts[0][1]), self.rng.randint(1, len(texts[0][1])))
        replies = []
        for _, values in texts:
            fields = [f'"{key}": "{values[key]}"' for key in keys if key in values]
            replies.append("{" + ", ".join(fields) + "}")
        request = JSON.format(keys=", ".join(keys), text=texts[0][0])
        wrong = [reply for reply in replies[1:] if len(reply) > 2]
        return chat(self.replies(request, replies[0], wrong, WRONG))

    def some_text(self):
        """A text and what could be asked of it, {key: value}."""
        kind = self.rng.choice(("fields", "landmark", "instruction"))
        if kind == "fields":
            fields = {}
            for key in self.rng.sample(KEYS[:-2], self.rng.randint(2, 5)):
                fields[self.rng.choice(("", CURRENT)) + key] = self.value()
            fields[self.rng.choice(KEYS[-2:])] = self.value()
            text = "".join(FIELD.format(key=key, value=fields[key]) for key in fields)
            return text, fields
        if kind == "landmark":
            text = self.landmark()
            name, side = re.fullmatch("(.*) is on your (.*)", text).groups()
            crossing = self.rng.choice(("yes", "no"))
            seen = f"{text}." if crossing == "no" else f"{text}. {virl.INTERSECTION}"
            return seen, {"place": name, "side": side, "crossing": crossing, "sentence": seen}
        text = self.instruction()
        turn, compass = re.fullmatch(r"Turn (.*) to face (.*)\.", text).groups()
        return text, {"turn": turn, "compass": compass, "sentence": text}

    def value(self):
        """Of a field: a word, a name or a sentence."""
        word = self.rng.choice((*routes.COMPASS, *routes.SIDES, *virl.TURNS))
        sentence = self.rng.choice((f"{self.landmark()}.", self.instruction(), virl.NOTHING))
        return self.rng.choice((word, self.name(), sentence))

    def call(self):
        """Calls as in code, none of them one of the task's actions."""
        exchanges = []
        for _ in range(3):
            verb, thing = self.rng.choice(VERBS), self.rng.choice(CATEGORIES)
            others = [thing for thing in OBJECTS if verb + thing != "turn_direction"]
            name = verb + self.rng.choice(("", *others))
            said = thing
            if name not in ("forward", "stop") and self.rng.random() < 0.5:
                thing, said = "nothing", ""
            exchanges.append(Exchange(CALL.format(name=name, thing=thing), f"{name}({said})"))
        return chat(exchanges)

    def echo(self):
        """Words, names and sentences to be repeated; those of the task's answers among them."""
        words = []
        for _ in range(self.rng.randint(3, 8)):
            key = self.rng.choice(("", CURRENT)) + self.rng.choice(WORDS)
            words.append(self.rng.choice((key, self.value(), self.value())))
        said = ", ".join(words)
        return chat([Exchange(REPEAT.format(words=said), said)])


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
            parts[part] = 1 + categories.index(name.split()[0])
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
