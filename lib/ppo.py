"""The tensors of a PPO update, which rl.py learns from, and what is logged of it."""
import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lib.answers import final_answer
from lib.batching import micro_batches, turns_of


# ---------------------------------------------------------------- what rl.ppo_loss takes
def token_weights(policy, turn, key, weight):
    """(A,) weights of an answer's log-probs in the ratio of its turn.

    Tokens before the one that completes `key` weigh `weight` (paper's code: 0.5), the others 1;
    where the answer has no such key, all tokens weigh `weight`.
    """
    weights = torch.ones(len(turn.answer))
    if weight == 1:
        return weights
    for i in range(len(turn.answer)):
        if key in final_answer(policy.decode(turn.answer[:i + 1])):
            break
        weights[i] = weight
    return weights


def sum_per_turn(tokens, turn_of, turns):
    """Sums of token values (A,) by the turn they belong to (A,). Returns: (S,), S = turns."""
    return tokens.new_zeros(turns).index_add(0, turn_of, tokens)


@torch.no_grad()
def answer_logprobs(policy, packed, micro_tokens, temperature):
    """Log-probs of every turn's answer, computed as in the update.

    Args: packed: list of Packed that hold S turns, 0..S-1.
    Returns: list of S tensors (A_i,), on the CPU.
    """
    found = {}
    with policy.merged():
        for group in micro_batches(packed, micro_tokens):
            scored = policy.score([conversation.sequence for conversation in group], temperature)
            for position, index in enumerate(turns_of(group)):
                found[index] = scored["logprobs"][scored["answer_of"] == position].cpu()
    return [found[index] for index in range(len(found))]


def too_far(sums, ppo):
    """The key that ends an update since its policy has moved too far from the old one, or None.

    Args: sums: of a minibatch, see rl.ppo_loss.
    """
    if sums["exploded"]:
        return "ppo.max_ratio"
    if sums["kl_old"] / sums["turns"] > ppo.target_kl:
        return "ppo.target_kl"
    return None


# ---------------------------------------------------------------- a rollout to learn from
def spread_of(advantages):
    """Standard deviation of (S,) advantages; 0 of a single one."""
    return advantages.std().item() if len(advantages) > 1 else 0.0


def normalized(advantages, min_spread):
    """Advantages (S,) with mean 0 and standard deviation 1; 0 where they spread less than
    min_spread: dividing would blow noise up, and Adam's steps do not shrink with their gradient."""
    if spread_of(advantages) <= min_spread:
        return torch.zeros_like(advantages)
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


class Size(NamedTuple):
    """How much a minibatch holds."""
    turns: int
    tokens: int  # of all their answers


class Targets(NamedTuple):
    """What is known of S turns with A answer tokens in all before the update: see rl.ppo_loss."""
    old: torch.Tensor  # (A,)
    ratio_weights: torch.Tensor  # (A,)
    advantages: torch.Tensor  # (S,)
    returns: torch.Tensor  # (S,)
    start: torch.Tensor = None  # (A,)


@dataclass
class Batch:
    """A rollout as PPO learns from it: S turns; the answer of turn i has A_i tokens."""
    turns: list  # S Turns
    packed: list  # Packed conversations that hold them
    advantages: torch.Tensor  # (S,)
    returns: torch.Tensor  # (S,)
    ratio_weights: list  # S x (A_i,) of the tokens' log-probs in the ratio of their turn
    old: list  # S x (A_i,) log-probs before the update
    start: list  # S x (A_i,) log-probs under the start policy, None without a KL penalty
    spread: float  # of the advantages, before they were normalised

    @property
    def values(self):
        """(S,) V(s) when the turns were sampled."""
        return torch.tensor([turn.value for turn in self.turns])

    def size(self, packed):
        """The Size of a minibatch of Packed conversations."""
        lengths = [len(self.turns[index].answer) for index in turns_of(packed)]
        return Size(turns=len(lengths), tokens=sum(lengths))

    def targets(self, packed, device):
        """The Targets of Packed conversations, in the order of their turns, on the device."""
        members = turns_of(packed)  # S indices
        joined = {}  # (A,) each
        for name in ("old", "start", "ratio_weights"):
            answers = getattr(self, name)
            if answers is not None:
                joined[name] = torch.cat([answers[index] for index in members]).to(device)
        return Targets(advantages=self.advantages[members].to(device),
                       returns=self.returns[members].to(device), **joined)


# ---------------------------------------------------------------- what is logged
def ppo_statistics(batch, steps):
    """The statistics of one PPO update.

    Args: batch: a Batch; steps: the sums of each optimiser step (rl.minibatch_step), in order.
    Returns: dict of
        spread: standard deviation of the advantages, before they are normalised,
        steps: of the optimiser,
        skipped: those that float16 overflowed,
        stopped: the key that ended the update early, or None,
        kl_old: mean of ratio - 1 - log ratio over answers: KL(old || policy), prefix weighted,
        kl_start: half the squared log-ratio to the start, summed over an answer,
        clip_fraction: of the ratios,
        entropy: nats per token,
        explained_variance: of the returns by the values,
        value_loss: mean square,
        ratio_gap: mean |ratio - 1| before the first step,
        sampler_gap: the same between what was sampled and the old log-probs (0 in float32),
        ratio_noise: see `ratio_noise`,
        grad_norm: mean, before clipping, without the value head.
    """
    total = Counter()
    for step in steps:
        total.update({name: number for name, number in step.items() if name != "stopped"})
    turns = total["turns"]
    taken = len(steps) - bool(steps[-1]["stopped"]) - total["skipped"]
    return {"spread": batch.spread,
            "steps": taken,
            "skipped": total["skipped"],
            "stopped": steps[-1]["stopped"],
            "kl_old": total["kl_old"] / turns,
            "kl_start": total["kl_start"] / turns,
            "clip_fraction": total["clipped"] / total["ratios"],
            "entropy": total["entropy"] / turns,
            "explained_variance": explained_variance(batch.returns, batch.values),
            "value_loss": total["value_loss"] / turns,
            "ratio_gap": steps[0]["ratio_gap"] / steps[0]["turns"],
            "sampler_gap": sampler_gap(batch),
            "ratio_noise": ratio_noise(batch, steps),
            "grad_norm": total["grad_norm"] / max(1, taken)}


def explained_variance(returns, values):
    """Share of the returns' variance that the values (S,) explain: 1 all, 0 as a constant would."""
    rest = (returns - values).var(correction=0)
    return float(1 - rest / (returns.var(correction=0) + 1e-8))


def sampler_log_ratios(batch):
    """(S,) log-ratios of the turns between the old log-probs and those that were sampled from: the
    model is the same, so what differs is rounding."""
    found = []
    for weights, old, turn in zip(batch.ratio_weights, batch.old, batch.turns):
        found.append((weights * (old - turn.logprobs)).sum())
    return torch.stack(found)


def sampler_gap(batch):
    """Mean |ratio - 1| between the old log-probs and those that were sampled from."""
    return (sampler_log_ratios(batch).exp() - 1).abs().mean().item()


def ratio_noise(batch, steps):
    """Rounding over movement: the root mean square log-ratio from rounding alone (scorer against
    sampler, same model), over that of the last minibatch (after all steps before it). From 0.2 on
    rounding hides much of what is learned (docs/11b.md). 0 in float32, None after a single step."""
    moved = math.sqrt(steps[-1]["log_ratio_squared"] / steps[-1]["turns"])
    if len(steps) == 1 or moved == 0:
        return None
    return sampler_log_ratios(batch).square().mean().sqrt().item() / moved
