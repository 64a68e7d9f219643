"""What sft.py and rl.py need beside the method: schedules, checkpoints, logs, PPO's tensors."""
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from lib.answers import final_answer
from lib.batching import micro_batches, turns_of
from lib.settings import UserError, one_line


# ---------------------------------------------------------------- schedules and random numbers
def learning_rate(step, steps, peak, schedule, warmup=0):
    """Linear warm-up over `warmup` steps, then constant at `peak`, or cosine from there to 1e-9."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    angle = math.pi * (step - warmup) / max(1, steps - warmup)
    return 1e-9 + 0.5 * (peak - 1e-9) * (1 + math.cos(angle))


def set_learning_rates(optimizer, peaks, step, steps, schedule, warmup=0):
    """The learning rate of each parameter group, from its peak."""
    for group, peak in zip(optimizer.param_groups, peaks):
        group["lr"] = learning_rate(step, steps, peak, schedule, warmup)


def seeded(device, *names):
    """A generator that follows from the names alone: no state to save, tied to a device."""
    return torch.Generator(device).manual_seed(random.Random(str(names)).getrandbits(63))


def backward(policy, loss):
    """The way back of a part of the loss, for `clipped_step`. In float16 the loss is scaled up:
    its gradients would vanish."""
    policy.scaler.scale(loss).backward()


def clipped_step(policy, optimizer, max_norm, loss, problem):
    """An optimiser step with the gradient's norm clipped to max_norm, after `backward`.

    In float16 the scale of the loss may have been too large for its gradient: then no step is made,
    and the next one has half the scale.
    Returns: the norm before, or None for a step that was not made.
    Raises: UserError with `problem` if the loss (a number) or the norm is not finite; the weights
        are then as they were.
    """
    scaler = policy.scaler
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(policy.trainable.values(), max_norm).item()
    too_large = not math.isfinite(norm) and scaler.is_enabled() and scaler.get_scale() > 1
    if not math.isfinite(loss) or not (math.isfinite(norm) or too_large):
        raise UserError(f"{problem} (the last checkpoint is intact)")
    scaler.step(optimizer)
    scaler.update()
    return None if too_large else norm


# ---------------------------------------------------------------- checkpoints
def save_state(folder, state):
    """Optimiser and environment state of a checkpoint, in a form that `weights_only` loads."""
    torch.save(state, folder / "trainer.pt")


# of a checkpoint from before it was counted
UNCOUNTED = {"beyond": {"train": math.nan, "inference": math.nan}, "official_gflops": math.nan}


def load_state(folder):
    """The state that `save_state` wrote. Raises: UserError if it is missing or damaged."""
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises in torch's reader, nobody lists
        raise UserError(f"checkpoint {folder} is missing or damaged: {one_line(error)}") from None
    for name in ("optimizer", "tokens", "gflops"):
        if not isinstance(state, dict) or name not in state:
            raise UserError(f"checkpoint {folder} is damaged: its trainer.pt has no {name}")
    return {**UNCOUNTED, **state}


def save_checkpoint(folder, policy, optimizer, **more):
    """Everything that a stopped run needs again; `more` is the script's own plain data."""
    policy.save(folder)
    save_state(folder, {"optimizer": optimizer.state_dict(), "tokens": policy.tokens,
                        "scaler": policy.scaler.state_dict(),  # empty but in float16
                        "beyond": policy.beyond, "gflops": policy.flops() / 1e9,
                        "official_gflops": policy.official_flops() / 1e9, **more})


def load_checkpoint(folder, policy, optimizer):
    """Take over what `save_checkpoint` wrote. Returns: the state, with the script's own data.

    Raises: UserError if it is damaged or of another shape.
    """
    state = load_state(folder)
    policy.load(folder)
    try:
        optimizer.load_state_dict(state["optimizer"])
        policy.tokens = {name: state["tokens"][name] for name in policy.tokens}
        policy.beyond = dict(state["beyond"])
        if policy.scaler.is_enabled():
            policy.scaler.load_state_dict(state["scaler"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {one_line(error)}") from None
    return state


def begin_at(init, policy):
    """Give a policy the weights of the checkpoint `init` where another training starts.

    Args: init: its folder, or None for the bare base. Init's compute counts: X_RL = 6N(D_init +
        D_RL) + 2N D_buffer (paper, C.3).
    """
    if init is not None:
        policy.load(init, value_head=False)
        state = load_state(init)
        policy.tokens, policy.beyond = state["tokens"], dict(state["beyond"])


# ---------------------------------------------------------------- what is logged
def peak_memory(device):
    """Peak memory so far in GiB: of the GPU, or of this process on a CPU (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    units = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


class Meter:
    """What a step or update costs. Made when it begins."""

    def __init__(self, policy):
        self.policy = policy
        self.began = time.time()
        self.tokens_before = sum(policy.tokens.values())

    def spent(self):
        """Tokens and GFLOPs of the run so far, seconds of this step, peak memory."""
        policy = self.policy
        return {"tokens": dict(policy.tokens), "gflops": policy.flops() / 1e9,
                "seconds": time.time() - self.began, "peak_memory_gib": peak_memory(policy.device)}

    def rate(self):
        """Text: tokens per second of this step."""
        tokens = sum(self.policy.tokens.values()) - self.tokens_before
        return f"{tokens / (time.time() - self.began):,.0f} tok/s"


def ppo_statistics(batch, steps):
    """The statistics of one PPO update, see rl.py's glossary.

    Args: batch: a Batch; steps: the sums of each optimiser step (rl.minibatch_step), in order.
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
    """(S,) log-ratios of the turns between the old log-probs and those that were sampled from: two
    readings of equal weights."""
    found = []
    for weights, old, sampled in zip(batch.weights, batch.old, batch.sampled):
        found.append((weights * (old - sampled)).sum())
    return torch.stack(found)


def sampler_gap(batch):
    """Mean |ratio - 1| between the old log-probs and those that were sampled from."""
    return (sampler_log_ratios(batch).exp() - 1).abs().mean().item()


def ratio_noise(batch, steps):
    """Rounding over movement: the root mean square of the log-ratios that the sampler makes at
    equal weights, over that of the last minibatch's, which the steps before it have made. None
    where there is none before it."""
    moved = math.sqrt(steps[-1]["log_ratio_squared"] / steps[-1]["turns"])
    if len(steps) == 1 or moved == 0:
        return None
    return sampler_log_ratios(batch).square().mean().sqrt().item() / moved


# ---------------------------------------------------------------- PPO's tensors
def sum_per_turn(tokens, turn_of, turns):
    """Sums of token values (A,) by the turn they belong to (A,). Returns: (S,), S = turns."""
    return tokens.new_zeros(turns).index_add(0, turn_of, tokens)


def spread_of(advantages):
    """Standard deviation of (S,) advantages; 0 of a single one."""
    return advantages.std().item() if len(advantages) > 1 else 0.0


def normalized(advantages, min_spread):
    """Advantages (S,) with mean 0 and standard deviation 1; 0 where they spread less than
    min_spread: dividing would blow noise up, and Adam's steps do not shrink with their gradient."""
    if spread_of(advantages) <= min_spread:
        return torch.zeros_like(advantages)
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def too_far(sums, ppo):
    """The key that ends an update since its policy has moved too far from the old one, or None.

    Args: sums: of a minibatch, see rl.ppo_loss.
    """
    if sums["exploded"]:
        return "ppo.max_ratio"
    if sums["kl_old"] / sums["turns"] > ppo.target_kl:
        return "ppo.target_kl"
    return None


class Size(NamedTuple):
    """Of a minibatch."""
    turns: int
    tokens: int  # of all their answers


class Targets(NamedTuple):
    """What is known of S turns with A answer tokens in all before the update: see rl.ppo_loss."""
    old: torch.Tensor  # (A,)
    weights: torch.Tensor  # (A,)
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
    weights: list  # S x (A_i,) of the tokens' log-probs in the ratio of their turn
    spread: float  # of the advantages, before they were normalised
    old: list = None  # S x (A_i,) log-probs before the update
    start: list = None  # S x (A_i,) log-probs under the start policy, None without a KL penalty

    @property
    def sampled(self):
        """S x (A_i,) log-probs under the distributions that the tokens were drawn from."""
        return [turn.logprobs for turn in self.turns]

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
        for name in ("old", "start", "weights"):
            answers = getattr(self, name)
            if answers is not None:
                joined[name] = torch.cat([answers[index] for index in members]).to(device)
        return Targets(advantages=self.advantages[members].to(device),
                       returns=self.returns[members].to(device), **joined)


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


@torch.no_grad()
def answer_logprobs(policy, packed, micro_tokens, temperature):
    """Log-probs of every turn's answer, computed as in the update.

    Args: packed: list of Packed that hold S turns, 0..S-1.
    Returns: list of S tensors (A_i,), on the CPU.
    """
    found = {}
    for group in micro_batches(packed, micro_tokens):
        scored = policy.score([conversation.sequence for conversation in group], temperature)
        for position, index in enumerate(turns_of(group)):
            found[index] = scored["logprobs"][scored["answer"] == position].cpu()
    return [found[index] for index in range(len(found))]
