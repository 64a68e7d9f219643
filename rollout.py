"""Where the policy meets the environments: make_env, play (batched episodes), evaluate; reference policies."""
import inspect
import itertools
from collections import Counter
from dataclasses import dataclass

import torch

import gp
import virl
from lib.batching import Sequence
from lib.settings import UserError, nearest

ENVIRONMENTS = {"gp": gp.GeneralPoints, "virl": virl.Navigation}
EVAL_SEEDS = 2**48  # evaluation seeds start here: no training seed reaches it


def make_env(settings, verify_iters, **changes):
    """The environment that the YAML's `env` section names, with `changes` of an evaluation variant.

    Raises: UserError for an unknown environment, an unknown setting or one out of range.
    """
    settings = {**settings, **changes}
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in ENVIRONMENTS:
        raise UserError(f"env.name: {name!r} is none of {', '.join(ENVIRONMENTS)}")
    known = [p for p in inspect.signature(ENVIRONMENTS[name]).parameters if p != "verify_iters"]
    for key in settings:
        if key not in known:
            raise UserError(f"unknown key env.{key}{nearest(str(key), known)}")
    try:
        return ENVIRONMENTS[name](**settings, verify_iters=verify_iters)
    except ValueError as error:
        raise UserError(f"env.{error}") from None


@dataclass
class Turn:
    """One step of the MDP: a whole answer v_out to a whole conversation v_in, and what the verifier made of it."""
    slot: int  # which of the tables played side by side
    prompt: Sequence  # v_in: ids, and the image if there is one
    answer: list  # ids of v_out, (A,)
    logprobs: torch.Tensor  # (A,) under the sampling distribution
    value: float  # V(v_in)
    text: str  # v_out
    reward: float  # in the paper's points
    done: bool  # solved or out of attempts
    solved: bool
    info: dict  # the environment's: category, correct, recognized, action, attempt, feedback, cluster
    seed: int  # of the episode


class Play:
    """N episodes side by side, in lock-step; a finished one is replaced by the next seed's.

    Args: envs: N environments; seeds: iterator of episode seeds, endless for training.
    """

    def __init__(self, envs, seeds):
        self.envs, self.seeds = envs, seeds
        self.episodes = [None] * len(envs)  # per table [seed, observation, answers so far]; None = closed
        for slot in range(len(envs)):
            self._deal(slot)

    def _deal(self, slot):
        seed = next(self.seeds, None)
        self.episodes[slot] = None
        if seed is not None:
            obs, _ = self.envs[slot].reset(seed)
            self.episodes[slot] = [seed, obs, []]

    def turn(self, policy, temperature, generator):
        """Every open table answers once. Returns: list of Turns, in the order of the tables."""
        slots = [s for s, episode in enumerate(self.episodes) if episode]
        prompts = policy.encode([self.episodes[s][1] for s in slots])
        turns = []
        for slot, prompt, answer in zip(slots, prompts, policy.sample(prompts, temperature, generator)):
            seed, _, answers = self.episodes[slot]
            text = policy.decode(answer.ids)
            obs, reward, terminated, truncated, info = self.envs[slot].step(text)
            turns.append(Turn(slot, prompt, answer.ids, answer.logprobs, answer.value, text, reward,
                              terminated or truncated, terminated, info, seed))
            self.episodes[slot] = [seed, obs, answers + [text]]
            if terminated or truncated:
                self._deal(slot)
        return turns

    def waiting(self):
        """Tables whose episode is under way: at least one answer given, not yet ended."""
        return [slot for slot, episode in enumerate(self.episodes) if episode and episode[2]]

    def state(self):
        """What resumes these tables: the next seed, and per table its seed and the answers so far."""
        self.seeds, peek = itertools.tee(self.seeds)
        return {"next": next(peek), "tables": [(seed, list(answers)) for seed, _, answers in self.episodes]}

    def restore(self, state):
        """Replay the answers of a saved state; everything else follows from the seeds."""
        self.seeds = itertools.count(state["next"])
        for slot, (seed, answers) in enumerate(state["tables"]):
            obs, _ = self.envs[slot].reset(seed)
            for answer in answers:
                obs, *_ = self.envs[slot].step(answer)
            self.episodes[slot] = [seed, obs, list(answers)]


def counts(infos, solved):
    """What one episode adds to each metric, as (right, of); a metric is the ratio of the sums over episodes.

    Args: infos: the environment's info of every answer, in order; solved: whether the episode was.
    Returns: {"solved": (0 or 1, 1), "per_step": (right answers, answers), "first": (right first attempts, first
    attempts: one per position), "recognized": (first attempts that report the right observation, first attempts)} and
    for each action type of the expert that occurs "first_<action>", as "first" at its positions.
    Source: paper C.3 (success; per-step accuracy).
    """
    right, of = Counter(solved=int(solved)), Counter(solved=1)
    for info in infos:
        names = {"per_step": info["correct"]}
        if info["attempt"] == 1:
            names.update(first=info["correct"], recognized=info["recognized"])
            if info["action"] is not None:
                names[f"first_{info['action']}"] = info["correct"]
        right.update(names)
        of.update(list(names))
    return {name: (right[name], of[name]) for name in of}


def evaluation_seeds(seed, n):
    """The seeds of the n episodes that every arm and every reference policy plays."""
    return range(EVAL_SEEDS + seed * 1_000_000, EVAL_SEEDS + seed * 1_000_000 + n)


def evaluate(policy, settings, n, seed, verify_iters, temperature, batch_size, progress=None, **changes):
    """Play n episodes to their end; they depend on (settings, changes, seed) alone, so arms are paired.

    Returns: list of n records {seed, cluster, counts: see there, turns: list of Turns}, in the order of the seeds.
    Source: paper Sec. 4, C.3.
    """
    envs = [make_env(settings, verify_iters, **changes) for _ in range(min(batch_size, n))]
    play = Play(envs, iter(evaluation_seeds(seed, n)))
    generator = torch.Generator(policy.device).manual_seed(seed)
    episodes = {}
    with policy.inference():
        while any(play.episodes):
            for turn in play.turn(policy, temperature, generator):
                episodes.setdefault(turn.seed, []).append(turn)
                if turn.done and progress is not None:
                    progress.update()
    return [{"seed": s, "cluster": turns[0].info["cluster"], "turns": turns,
             "counts": counts([t.info for t in turns], turns[-1].solved)} for s, turns in sorted(episodes.items())]


def play_reference(settings, name, n, seed, verify_iters, **changes):
    """The same n episodes, answered by the environment's reference policy `name` (one of env.references).

    Returns: records as of `evaluate`, without turns.
    """
    env, records = make_env(settings, verify_iters, **changes), []
    for episode in evaluation_seeds(seed, n):
        env.reset(episode)
        infos, solved, truncated = [], False, False
        while not (solved or truncated):
            _, _, solved, truncated, info = env.step(env.reference(name))
            infos.append(info)
        records.append({"seed": episode, "cluster": infos[0]["cluster"], "counts": counts(infos, solved)})
    return records


def training_seeds(run_seed):
    """Endless episode seeds of one training run, disjoint between run seeds and from evaluation."""
    return itertools.count(run_seed * 2**24)
