"""Whole episodes of an evaluation, ordered as a reader wants them: each problem, all arms beside.

eval.py writes conversations.jsonl, a line per arm and variant: {split, variant, arm, temperature,
env: settings, verify_iters, episodes: [[turn]]}, a turn being {seed, attempt, answer, reward,
verifier, category, correct, recognized}. Of the first run, at the first split and temperature, the
first eval.conversations of the episodes that the table counts (kept without their answers, when
fewer were wanted, they are played again: at T > 0 with other ones). No torch in this file.
"""
import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lib.errors import UserError
from lib.runs import read_settings

WRONG, MISREAD, PLAIN = "wrong", "misread", ""
ILLEGAL = "illegal"  # category of answers in which something was not found: there is no reading


class Part(NamedTuple):
    """A piece of an answer, and what is wrong with it: WRONG, MISREAD or PLAIN."""
    text: str
    kind: str


class Attempt(NamedTuple):
    """One answer and its grade."""
    number: int  # of the attempt, from 1
    parts: list  # Parts: the answer
    reward: float  # in the paper's points
    verifier: str  # its text, "" after a right answer
    correct: bool
    faults: list  # in words: "wrong value", "misread", "repeated"


class Position(NamedTuple):
    """A hand, or one position of a walk, and what each arm said there."""
    prompt: str  # "" if it is not known
    image: object  # PIL's, or None
    attempts: dict  # arm -> Attempts; an arm that did not come so far is left out


class Conversation(NamedTuple):
    """One problem as every arm met it."""
    variant: str
    number: int  # of the problem in its variant, from 1
    seed: int
    positions: list
    solved: dict  # arm -> whether it solved the whole of it

    def all_attempts(self):
        found = []
        for position in self.positions:
            for attempts in position.attempts.values():
                found += attempts
        return found

    @property
    def most_attempts(self):
        """Of any arm at any position."""
        return max(attempt.number for attempt in self.all_attempts())

    def has(self, fault):
        """Whether any answer has a fault."""
        return any(fault in attempt.faults for attempt in self.all_attempts())


def read_conversations(path):
    """{variant: lines} of a conversations.jsonl, {} if there is none; torn lines are left out."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    variants = {}
    for line in text.split("\n"):
        with suppress(ValueError, TypeError, KeyError):
            found = json.loads(line)
            if found["episodes"]:
                variants.setdefault(found["variant"], []).append(found)
    return variants


def seeds_of(lines):
    """Of the problems that the arms of a variant played."""
    return [episode[0]["seed"] for episode in lines[0]["episodes"]]


def conversation(lines, nth, observations, answer_key):
    """The nth problem of a variant, its arms side by side.

    Args:
        lines: of the variant, see `read_conversations`.
        observations: what is to be seen at each position in order, [] if that is not known.
        answer_key: the environment's: what stands before it in an answer reports, the rest decides.
    """
    played, solved = {}, {}  # arm -> its turns by position
    for line in lines:
        turns = line["episodes"][nth]
        played[line["arm"]] = by_position(turns)
        reached = len(played[line["arm"]])
        solved[line["arm"]] = turns[-1]["correct"] and reached >= len(observations)
    longest = max(map(len, played.values()))
    positions = []
    for at in range(max(longest, len(observations))):
        attempts = {}
        for arm, per_position in played.items():
            if at < len(per_position):
                attempts[arm] = attempts_of(per_position[at], answer_key)
        prompt, image = "", None
        if at < len(observations):
            prompt, image = prompt_of(observations[at]), observations[at]["image"]
        positions.append(Position(prompt, image, attempts))
    seed = lines[0]["episodes"][nth][0]["seed"]
    return Conversation(lines[0]["variant"], nth + 1, seed, positions, solved)


def by_position(turns):
    """An episode's turns, a list per position: a right answer moves on."""
    positions = [[]]
    for turn in turns:
        if positions[-1] and positions[-1][-1]["correct"]:
            positions.append([])
        positions[-1].append(turn)
    return positions


def prompt_of(observation):
    """The text of an observation's last message."""
    content = observation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(piece["text"] for piece in content if piece["type"] == "text")


def bare_answers(run, n=5):
    """The first answers of PPO that began from the bare model (ppo.init=none), where nobody plays
    that model as an arm. rl.py logs them before the first update has changed anything.

    Returns: {name of the training in the run's folder: n turns {answer, attempt, reward, verifier}}
    """
    found = {}
    for path in sorted(Path(run).glob("rl*/transcripts.jsonl")):
        with suppress(OSError, UserError, ValueError, TypeError, KeyError):
            if read_settings(path.with_name("config.yaml"))["ppo"]["init"] == "none":
                lines = path.read_text(encoding="utf-8").splitlines()[:n]
                turns = [json.loads(line) for line in lines]
                found[path.parent.name] = [turn for turn in turns if turn["step"] == 1]
    return found


# ---------------------------------------------------------------- what is wrong with an answer
def attempts_of(turns, answer_key):
    """The Attempts of the turns at one position."""
    attempts, said = [], set()
    for turn in turns:
        faults = []
        if not turn["correct"]:
            faults.append(turn["category"].replace("_", " "))
        if misread(turn) and MISREAD not in faults:
            faults.append(MISREAD)
        if turn["answer"] in said:
            faults.append("repeated")
        said.add(turn["answer"])
        attempts.append(Attempt(turn["attempt"], parts_of(turn, answer_key), turn["reward"],
                                turn["verifier"], turn["correct"], faults))
    return attempts


def misread(turn):
    """Whether the answer reports something that is not there."""
    return not turn["recognized"] and turn["category"] != ILLEGAL


def parts_of(turn, answer_key):
    """The Parts of an answer: what it reports to see, and what it decides."""
    answer = turn["answer"]
    at = answer.find(answer_key) if answer_key else -1
    read, decided = PLAIN, PLAIN
    if misread(turn):
        read = MISREAD
    if not turn["correct"] and turn["category"] != MISREAD:  # misread: the rest was not graded
        decided = WRONG
    if at < 0 or (turn["category"] == ILLEGAL and not turn["recognized"]):
        return [Part(answer, decided or read)]
    parts = [Part(answer[:at], read), Part(answer[at:], decided)]
    return [part for part in parts if part.text]
