"""Plays generated answers and reads malformed route files: a soak that can fail.

    python tools/soak_answers.py [answers per environment, default 1000000]

An answer may hold anything: no exception, a reward of the table, under 10 ms of processor time
(what is slower is timed again, as a busy machine may be the cause). An expert's answer counts as
right however it is dressed up. A malformed route file is one line. All is seeded; the exit code is
1 if anything failed.
"""
import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gp import GeneralPoints
from lib.errors import one_line
from scenery.routes import SIDES, make_route
from virl import RULES, Navigation

LIMIT = 0.010  # seconds
SEED = 12
MAX_SHOWN = 10  # failures that are printed
ATTEMPTS = 100  # answers to one problem, which is then given up
ROUTE_FILES = 100

FORMULA = [*"0123456789+-*/+-*/()[]{}=.×x \n", "10", "24", "=24"]
CARDS = ["A", "10", "J", "K♠", "king of spades", "t", "1", 7, 10, None, True, 1e9, "", "♥",
         {"rank": "K", "suit": "hearts"}, {"rank": []}, ["K", "spades"], [[]]]
WORDS = [word for words in RULES.values() for word in words]
ACTION = [*"'\";.)- ", *"forward()|stop()|forward|turn_direction(|, |x=".split("|"), *WORDS]
SIGHT = ["\n", *SIDES, *(
    "Blue Cafe|Joe's \"Best\" {Bar}|The destination |the | is on your | is on the | is |. |, | and "
    "|; |No landmarks nearby|You are at an intersection|not |no |intersection|n't |’").split("|")]
KEYS = ["cards", "number", "formula", "current observation", "current instruction", "action"]
PIECES = [*"\"'{}[]:,\\\n\t -\ud800\0", *(f'"{key}"' for key in KEYS), "'formula': ", "'cards': [",
          *'"formula": "|"cards": [|8/(3-8/3)|forward()|1e999|null|```json\n|\\u2660'.split("|")]


# ---------------------------------------------------------------- answers
def _joined(rng, pieces, most):
    return "".join(rng.choices(pieces, k=rng.randrange(most)))


def by_grammar(rng, env):
    """JSON with fields of the right or any other kind, whole or nearly so, at any depth."""
    fields = {"cards": rng.choices(CARDS, k=rng.randrange(6)), "formula": _joined(rng, FORMULA, 24),
              "action": _joined(rng, ACTION, 6), "current observation": _joined(rng, SIGHT, 12)}
    for key in rng.sample(list(fields), rng.randrange(3)):
        fields[key] = rng.choice([None, 24, [], {}, "", [fields[key]], {key: fields[key]}])
    for _ in range(rng.randrange(3)):
        fields = {rng.choice(["answer", "output", "action", "Formula"]): fields}
    return rng.choice(["{}", "{},", "```json\n{}\n```", "Well. {} or {}", "'{}'"]).replace(
        "{}", json.dumps(fields, ensure_ascii=rng.random() < 0.5))


def by_mutation(rng, env):
    """An expert's answer or a mistake with some characters left out, doubled or put in."""
    text = rng.choice([env.expert, env.mistake])()
    for _ in range(rng.randint(1, 6)):
        start = rng.randrange(len(text) + 1)
        end = start + rng.randrange(12)
        new = rng.choice(["", text[start:end] * 2, rng.choice(PIECES), text[start:end].upper()])
        text = text[:start] + new + text[end:]
    return text


def by_pieces(rng, env):
    return _joined(rng, PIECES, 60)


def by_repetition(rng, env):
    """A few pieces again and again, longer than what is read of an answer."""
    unit = _joined(rng, PIECES + ACTION + SIGHT + FORMULA, 6) or "x"
    heads = "", '{"formula": "', '{"cards": [', '{"action": "x", "current observation": "'
    return rng.choice(heads) + unit * rng.randrange(12_000 // len(unit))


def by_chance(rng, env):
    """Bytes as characters, or any characters, lone surrogates included."""
    if rng.random() < 0.5:
        return rng.randbytes(rng.randrange(300)).decode("latin-1")
    return "".join(chr(rng.randrange(sys.maxunicode + 1)) for _ in range(rng.randrange(100)))


KINDS = {by_grammar: 45, by_mutation: 35, by_pieces: 10, by_repetition: 1, by_chance: 9}  # weights


def dressed(rng, env):
    """An expert's answer in a form that a person would call right."""
    text = env.expert()
    frame = rng.choice(["{}", "```json\n{}\n```", "The answer: {}.", "[{}]", '{"output": {}}',
                        '{"thoughts": "?", "answer": {}}', '{"a": {"b": {}}}'])
    if rng.random() < 0.5:
        text = text[:-1] + ",}"
    for key in KEYS:
        text = text.replace(f'"{key}"', f'"{rng.choice([key, key.title(), key.upper()])}"')
    return frame.replace("{}", text)


# ---------------------------------------------------------------- playing them
class Soak:
    """Attributes: failures: texts; slowest: (seconds, answer) of the best of several timings."""

    def __init__(self):
        self.failures = []
        self.slowest = 0.0, ""
        self.graded = Counter()

    def fail(self, what, example):
        self.failures.append(what)
        if len(self.failures) <= MAX_SHOWN:
            print(f"FAILED: {what}: {ascii(example)[:400]}")

    def answers(self, name, envs, n):
        """Play n answers in these environments."""
        rng = random.Random(f"{SEED} {name}")
        for i in range(n):
            env = envs[i % len(envs)]
            if env.done or env.attempt == ATTEMPTS // 2:
                env.reset(rng.randrange(-10 ** 6, 10 ** 6))
            is_right = rng.random() < 0.05
            kind = dressed if is_right else rng.choices(list(KINDS), KINDS.values())[0]
            answer = kind(rng, env)
            try:
                took, category = self._timed(env, answer)
                if took > self.slowest[0]:
                    self._time_again(env, answer, took)
            except Exception as error:
                self.fail(f"{name}: {type(error).__name__} {one_line(error)}", answer)
                env.reset(i)
                continue
            self.graded[f"{name}: {category}"] += 1
            if is_right and category != "correct":
                self.fail(f"{name}: {category} though right", answer)

    def _timed(self, env, answer):
        start = time.process_time()
        *_, info = env.step(answer)
        return time.process_time() - start, info["category"]

    def _time_again(self, env, answer, took):
        for _ in range(5):
            if env.done:
                env.reset(0)
            took = min(took, self._timed(env, answer)[0])
        if took > self.slowest[0]:
            self.slowest = took, answer
        if took > LIMIT:
            self.fail(f"{1000 * took:.1f} ms", answer)

    def route_files(self, n):
        """Read n malformed route files."""
        rng = random.Random(SEED)
        with tempfile.TemporaryDirectory() as folder:
            for i, text in enumerate(rng.sample(list(malformed_files(rng)), n)):
                path = Path(folder, f"routes{i}.json")
                path.write_text(text, encoding="utf-8")
                try:
                    Navigation(routes=str(path))
                    self.fail("a malformed route file was read", text)
                except Exception as error:
                    is_line = isinstance(error, ValueError) and "\n" not in str(error)
                    if not (is_line and str(error).startswith(f"routes: {path}: ")):
                        self.fail(f"route file: {type(error).__name__} {error}", text)


# ---------------------------------------------------------------- route files
BROKEN = (..., None, 3, True, "x", [], {}, [None], {"x": 1}, [float("nan"), 0], [1e9, 0])
NEEDED = (("start_place",), ("start_place", "relocated_geocode"), ("route_results",),
          ("route_results", "geocode_list"), ("route_results", "geocode_list", 1),
          ("milestone_info",), ("synthetic", "nodes"), ("synthetic", "nodes", 0),
          ("synthetic", "edges", 0), ("synthetic", "signs", 0), ("synthetic", "city"))


def malformed_files(rng):
    """Texts of route files, each with something wrong."""
    whole = json.dumps([[make_route("mini", 3)], 1])
    for name, value in product(NEEDED, BROKEN):
        data = json.loads(whole)
        at = data[0][0]
        for step in name[:-1]:
            at = at[step]
        if value is ...:
            del at[name[-1]]
        else:
            at[name[-1]] = value
        if not (name[-1] == 0 and value is ...):  # one street or sign less is a route, too
            yield json.dumps(data)
    for _ in range(40):
        yield whole[:rng.randrange(len(whole))]
    for _ in range(20):
        yield by_chance(rng, None).encode("utf-8", "replace").decode("utf-8")
    for wrong in ("southwest", "-5", "361", "", "{"):
        data = json.loads(whole)
        info = data[0][0]["milestone_info"]
        data[0][0]["milestone_info"] = re.sub(r'(to_next_\w+": )"[^"]*"', rf'\1"{wrong}"', info)
        yield json.dumps(data)


def main(arguments):
    """Grade random answers. arguments: of the command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n", nargs="?", type=int, default=1_000_000, help="answers per environment")
    n = parser.parse_args(arguments).n
    looks = {"image_size": [112, 112], "suits": "mixed", "verify_iters": ATTEMPTS}
    tables = [GeneralPoints(verify_iters=ATTEMPTS), GeneralPoints("face", verify_iters=ATTEMPTS),
              GeneralPoints(**looks), GeneralPoints(recognition="additive", **looks)]
    walks = [Navigation(rule, verify_iters=ATTEMPTS) for rule in RULES]
    soak = Soak()
    start = time.process_time()
    soak.answers("GeneralPoints", tables, n)
    soak.answers("V-IRL", walks, n)
    soak.route_files(ROUTE_FILES)
    for name, count in sorted(soak.graded.items()):
        print(f"{name:32} {count:9}")
    seconds, answer = soak.slowest
    print(f"slowest {1000 * seconds:.2f} ms: {ascii(answer)[:200]} ({len(answer)} characters)")
    print(f"{n} answers to each environment, {ROUTE_FILES} route files: {len(soak.failures)} "
          f"failures, {time.process_time() - start:.0f} s")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
