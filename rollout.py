"""Where the policy meets the environments: episodes side by side, evaluation.

An environment (environments.py) owns its conversations and grades answers; the policy turns
conversations into answers. Neither knows the other: this file joins them, for sft.py, rl.py and
eval.py alike.

The way of the verifier's text: after a wrong answer `step` returns an observation whose messages
end with the answer and, as the user's next message, that text. `Play.answer_all` encodes the whole
conversation by the model's chat template (lib/prompts.py), and the policy answers it.
"""
import itertools
from collections import Counter
from dataclasses import dataclass

import torch

from environments import make_env
from lib.answers import final_answer
from lib.batching import Sequence

EVAL_SEEDS = 2**48  # evaluation seeds start here: no training seed reaches it


# ---------------------------------------------------------------- episodes, side by side
@dataclass
class Turn:
    """One step of the MDP: a whole answer v_out to a whole conversation v_in, and its grade."""
    slot: int  # which of the environments played side by side
    prompt: Sequence  # v_in: ids, and the image if there is one
    answer: list  # ids of v_out, (A,)
    logprobs: torch.Tensor  # (A,) under the sampling distribution
    value: float  # V(v_in)
    text: str  # v_out without thoughts
    reward: float  # in the paper's points
    done: bool  # solved or out of attempts
    solved: bool
    info: dict  # the environment's: see Environment.step
    seed: int  # of the episode


@dataclass
class Episode:
    """One under way."""
    seed: int
    progress: float  # where along its positions it began: see Environment.reset
    observation: dict  # to be answered next
    answers: list  # texts given so far


class Play:
    """N environments side by side, in lock-step; after an episode's end comes the next seed's.

    Args:
        envs: N environments. seeds: iterator of episode seeds, endless for training.
        spread: the first episodes begin evenly spread along their positions, as for training:
            without it all walks would be at their start in the first update.
    Attributes: episodes: N Episodes, None where the seeds have run out.
    """

    def __init__(self, envs, seeds, spread=False):
        self.envs = envs
        self.seeds = seeds
        self.episodes = [None] * len(envs)
        for slot in range(len(envs)):
            self._begin(slot, progress=slot / len(envs) if spread else 0.0)

    def _begin(self, slot, progress=0.0):
        """The next seed's episode, if there is a next seed."""
        seed = next(self.seeds, None)
        self.episodes[slot] = None
        if seed is not None:
            observation, _ = self.envs[slot].reset(seed, progress)
            self.episodes[slot] = Episode(seed, progress, observation, [])

    def answer_all(self, policy, temperature, generator):
        """Every environment that has an episode gets one answer.

        Returns: list of Turns, in the order of the environments.
        """
        slots = [slot for slot, episode in enumerate(self.episodes) if episode is not None]
        prompts = policy.encode([self.episodes[slot].observation for slot in slots])
        answers = policy.sample(prompts, temperature, generator)
        turns = []
        for slot, prompt, answer in zip(slots, prompts, answers):
            text = final_answer(policy.decode(answer.ids))
            turns.append(self._step(slot, prompt, answer, text))
        return turns

    def _step(self, slot, prompt, answer, text):
        """One environment's answer graded. Returns: its Turn."""
        episode = self.episodes[slot]
        observation, reward, terminated, truncated, info = self.envs[slot].step(text)
        done = terminated or truncated
        turn = Turn(slot, prompt, answer.ids, answer.logprobs, answer.value, text, reward, done,
                    terminated, info, episode.seed)
        episode.observation = observation
        episode.answers.append(text)
        if done:
            self._begin(slot)
        return turn

    def burn_in(self, policy, turns, temperature, generator):
        """Turns that nothing is learned from: with verify_iters - 1 of them the first update meets
        every attempt, as all others do."""
        with policy.inference():
            for _ in range(turns):
                self.answer_all(policy, temperature, generator)

    def unfinished(self):
        """Slots whose episode is under way: at least one answer given, not yet ended."""
        open_slots = [slot for slot, episode in enumerate(self.episodes) if episode is not None]
        return [slot for slot in open_slots if self.episodes[slot].answers]

    def last_values(self, policy):
        """(N,) V(s_T) of the episodes under way; 0 where a new one begins: gae ignores it there."""
        values = torch.zeros(len(self.envs))
        slots = self.unfinished()
        if slots:
            prompts = policy.encode([self.episodes[slot].observation for slot in slots])
            values[slots] = policy.values(prompts)
        return values

    def state(self):
        """What resumes this: the next seed; seed, answers so far and progress of each episode."""
        self.seeds, peek = itertools.tee(self.seeds)  # the next seed is looked at, not taken
        episodes = [(episode.seed, list(episode.answers)) for episode in self.episodes]
        progress = [episode.progress for episode in self.episodes]
        return {"next": next(peek), "episodes": episodes, "progress": progress}

    def restore(self, state):
        """Replay the answers of a saved state; everything else follows from the seeds."""
        self.seeds = itertools.count(state["next"])
        began = state.get("progress", [0.0] * len(self.envs))  # older runs: all at their start
        for slot, (seed, answers) in enumerate(state["episodes"]):
            observation, _ = self.envs[slot].reset(seed, began[slot])
            for answer in answers:
                observation, *_ = self.envs[slot].step(answer)
            self.episodes[slot] = Episode(seed, began[slot], observation, list(answers))


def training_seeds(run_seed):
    """Endless episode seeds of one training run, disjoint between run seeds and from evaluation."""
    return itertools.count(run_seed * 2**24)


# ---------------------------------------------------------------- a rollout for PPO
@dataclass
class Rollout:
    """T turns of N environments; nothing is missing, since each gets an answer every time."""
    turns: list  # T * N Turns, time first
    rewards: torch.Tensor  # (T, N) in the paper's points
    values: torch.Tensor  # (T, N) V(s_t)
    dones: torch.Tensor  # (T, N) bool, the turn ended its episode
    last_values: torch.Tensor  # (N,) V(s_T), for the episodes that go on


def collect(policy, play, turns, temperature, generator, bar):
    """`turns` answers of each of N environments; `bar` is tqdm's. Returns: Rollout."""
    played = []
    with policy.inference():
        for _ in range(turns):
            played += play.answer_all(policy, temperature, generator)
            bar.set_description(f"rollout {len(played)}")
        last_values = play.last_values(policy)
    shape = (turns, len(play.envs))  # (T, N)
    rewards = torch.tensor([turn.reward for turn in played], dtype=torch.float32).view(shape)
    values = torch.tensor([turn.value for turn in played], dtype=torch.float32).view(shape)
    dones = torch.tensor([turn.done for turn in played], dtype=torch.bool).view(shape)
    return Rollout(played, rewards, values, dones, last_values)


def outcome(turns):
    """What the verifier saw in a rollout, as if each hand were played to its end.

    Returns: dict of
        reward: mean per answer, in the paper's points,
        success: share of hands, or positions of walks, solved within the attempts allowed,
        first_attempt: share of first attempts that are right,
        per_step: share of all answers that are right,
        recognition: share of first attempts that report the right observation,
        answers: {category: share of the answers};
        None where nothing was counted.

    A rollout cuts hands and walks off anywhere, and those that fail take longer: shares of the
    hands that happen to end, or of its answers as they come, change from update to update though
    the policy stays the same. So attempts are weighted: see `attempt_shares`.
    """
    attempts = {}  # number of the attempt -> its Turns
    for turn in turns:
        attempts.setdefault(turn.info["attempt"], []).append(turn)
    first_attempts = [turn.info for turn in attempts.get(1, [])]
    answers = reward = solved = 0
    categories = Counter()
    for attempt, share in attempt_shares(attempts).items():
        weight = share / len(attempts[attempt])  # of one answer
        for turn in attempts[attempt]:
            answers += weight
            reward += weight * turn.reward
            solved += weight * turn.info["correct"]
            categories[turn.info["category"]] += weight
    return {"reward": reward / answers,
            "success": solved,
            "first_attempt": _mean([info["correct"] for info in first_attempts]),
            "per_step": solved / answers,
            "recognition": _mean([info["recognized"] for info in first_attempts]),
            "answers": {name: round(n / answers, 4) for name, n in categories.most_common()}}


def attempt_shares(attempts):
    """How many of the positions begun come to each attempt: all to the first, then those not solved
    by the one before (Kaplan and Meier's estimate, which does not mind what is cut off).

    Args: attempts: {number: its Turns}. Returns: {number: share of the positions}, in order.
    """
    shares, left = {}, 1.0
    for attempt, turns in sorted(attempts.items()):
        shares[attempt] = left
        left *= 1 - _mean([turn.info["correct"] for turn in turns])
    return shares


def summary(record):
    """The figures of a record of `outcome` and rl.py that a progress bar shows."""
    names = {"reward": "reward", "success": "success", "first_attempt": "first", "kl_start": "KL"}
    return " ".join(f"{name} {record[key] or 0:.2f}" for key, name in names.items())


def transcript(turn):
    """One turn as rl.py's transcripts show it."""
    return {"seed": turn.seed, "attempt": turn.info["attempt"], "answer": turn.text,
            "reward": turn.reward, "verifier": turn.info["feedback"]}


def _mean(values):
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------- evaluation
def counts(infos, solved):
    """What one episode adds to each metric, as (right, of): a metric is the ratio of their sums.

    Args: infos: the environment's info of every answer, in order; solved: whether the episode was.
    Returns: {metric: (right, of)} of
        solved: (0 or 1, 1),
        per_step: (right answers, answers),
        first: (right first attempts, first attempts); each position has one first attempt,
        recognized: (first attempts that report the right observation, first attempts),
        reported: (first attempts that report any, first attempts), where infos tell,
        recognized_if_reported: (those that report the right one, those that report any),
        first_<action>: as first, at the positions where the expert's action is of that type,
        positions: (positions solved, positions), those never reached included, where infos tell.
    Source: paper C.3 (success; per-step accuracy).
    """
    right, of = Counter(solved=int(solved)), Counter(solved=1)
    for info in infos:
        asked = {"per_step": info["correct"]}
        if info["attempt"] == 1:
            asked["first"] = info["correct"]
            asked["recognized"] = info["recognized"]
            if "reported" in info:
                asked["reported"] = info["reported"]
                if info["reported"]:
                    asked["recognized_if_reported"] = info["recognized"]
            if info["action"] is not None:
                asked[f"first_{info['action']}"] = info["correct"]
        right.update(asked)
        of.update(asked.keys())
    if "positions" in infos[0]:
        right["positions"], of["positions"] = right["per_step"], infos[0]["positions"]
    return {metric: (right[metric], of[metric]) for metric in of}


def grades(infos, texts):
    """How one episode's answers were graded.

    Args: infos: as of `counts`; texts: of the answers.
    Returns: {first: {category: first attempts}, retries: {category: later attempts}, repeated:
        retries that say word for word what an earlier answer to the same position said}.
    """
    first, retries, repeated = Counter(), Counter(), 0
    said = set()
    for info, text in zip(infos, texts):
        if info["attempt"] == 1:
            first[info["category"]] += 1
            said = set()
        else:
            retries[info["category"]] += 1
            repeated += text in said
        said.add(text)
    return {"first": dict(first), "retries": dict(retries), "repeated": repeated}


def record_of(seed, infos, texts, solved):
    """What an evaluation keeps of one episode, see `evaluate`."""
    return {"seed": seed, "cluster": infos[0]["cluster"], "counts": counts(infos, solved),
            "grades": grades(infos, texts)}


def evaluation_seeds(seed, n):
    """The seeds of the n episodes that every arm and every reference policy plays."""
    first = EVAL_SEEDS + seed * 1_000_000
    return range(first, first + n)


def evaluate(policy, settings, n, seed, verify_iters, temperature, batch_size, bar=None,
             **changes):
    """Play n episodes to their end; (settings, changes, seed) alone choose them: arms are paired.

    Args:
        settings, verify_iters, changes: as of make_env.
        batch_size: environments side by side. temperature: as of Policy.sample.
        bar: tqdm's, of episodes, or None.
    Returns: n records {seed, cluster, counts and grades: see there, turns: list of Turns}, ordered
        by seed.
    Source: paper Sec. 4, C.3.
    """
    envs = [make_env(settings, verify_iters, **changes) for _ in range(min(batch_size, n))]
    play = Play(envs, iter(evaluation_seeds(seed, n)))
    generator = torch.Generator(policy.device).manual_seed(seed)
    episodes = {}  # seed: its Turns
    with policy.inference():
        while any(play.episodes):
            for turn in play.answer_all(policy, temperature, generator):
                episodes.setdefault(turn.seed, []).append(turn)
                if turn.done and bar is not None:
                    bar.update()
    records = []
    for episode, turns in sorted(episodes.items()):
        infos, texts = [turn.info for turn in turns], [turn.text for turn in turns]
        record = record_of(episode, infos, texts, turns[-1].solved)
        records.append({**record, "turns": turns})
    return records


def play_reference(settings, name, n, seed, verify_iters, **changes):
    """The same n episodes, answered by the reference policy `name`, one of env.references.

    Returns: records as of `evaluate`, without turns.
    """
    env = make_env(settings, verify_iters, **changes)
    records = []
    for episode in evaluation_seeds(seed, n):
        env.reset(episode)
        infos, texts, solved, truncated = [], [], False, False
        while not (solved or truncated):
            texts.append(env.reference(name))
            _, _, solved, truncated, info = env.step(texts[-1])
            infos.append(info)
        records.append(record_of(episode, infos, texts, solved))
    return records
