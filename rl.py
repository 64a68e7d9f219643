"""PPO over verification turns: one action is one whole answer, the verifier's text goes back to the model.

    python rl.py CONFIG.yaml [key=value ...]

Paper Sec. 3 and App. B/C. The loop reads play -> gae -> update -> log. Deviations from the paper, each a YAML key:
LoRA on a 4-bit base instead of full fine-tuning (so larger learning rates), a value head on detached features with its
own learning rate, an optional KL penalty to the start, rewards scaled before GAE. SFT and PPO of one seed draw the same
hands.
Beyond the paper's budget of attempts no ungraded answer is sampled, and nothing leaks across an episode's end.

Logged per update (metrics.jsonl): reward (mean per answer, paper's points), success (share of finished episodes solved),
first_attempt (share of first attempts that are right), per_step (share of answers that are right), recognition (share of
first attempts that report the right observation), answers (category shares), kl_old, kl_start (nats per answer),
clip_fraction, entropy (nats per token), explained_variance, value_loss, ratio_gap (mean |ratio - 1| before the first
step), sampler_gap (the same between what was sampled and the old log-probs, which 16 bits make anew), grad_norm, tokens,
gflops (paper's formulas, Init included), seconds, peak_memory_gib.
"""
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from lib.batching import micro_batches, minibatches, sequences_of
from lib.runs import Run
from lib.settings import UserError, load, run_main, within_memory
from lib.training import learning_rate, load_state, peak_memory, save_state
from policy import Policy
from rollout import Play, collect, make_env, outcome, training_seeds


# ---------------------------------------------------------------- the maths, pure
def gae(rewards, values, dones, last_value, gamma, lam):
    """Advantages over the T turns of each environment (one turn = one whole answer).

    Args:
        rewards: (T, ...) verifier reward of each turn.
        values: (T, ...) V(s_t) read at the last prompt token, same units.
        dones: (T, ...) bool, the turn ended its episode (solved or out of attempts): nothing is bootstrapped across it.
        last_value: (...) V(s_T), ignored where dones[-1].
        gamma, lam: discount and GAE lambda, per turn.
    Returns: advantages (T, ...), returns (T, ...) = advantages + values.
    Raises: ValueError if the shapes differ.
    Source: arXiv 1506.02438 eq. 16; gamma 0.9, lam 0.95 as in the official configs.
    """
    if not rewards.shape == values.shape == dones.shape or last_value.shape != values.shape[1:]:
        raise ValueError(f"gae: shapes {rewards.shape}, {values.shape}, {dones.shape}, {last_value.shape} differ")
    advantages, running, v_tp1 = torch.zeros_like(rewards), torch.zeros_like(last_value), last_value
    for t in reversed(range(len(rewards))):
        live = (~dones[t]).to(rewards.dtype)
        delta = rewards[t] + gamma * v_tp1 * live - values[t]
        running = delta + gamma * lam * live * running
        advantages[t], v_tp1 = running, values[t]
    return advantages, advantages + values


def ppo_loss(log_ratio, advantages, clip):
    """Clipped surrogate, summed (not averaged), so that micro-batches add up to the gradient of one large batch.

    Args: log_ratio (T,) log pi_new - log pi_old per turn or per token; advantages (T,); clip, the paper's 0.1.
    Returns: scalar loss, number of entries whose ratio is outside [1 - clip, 1 + clip].
    Source: arXiv 1707.06347 eq. 7.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return (-torch.min(ratio * advantages, clipped * advantages)).sum(), ((ratio - 1).abs() > clip).sum()


# ---------------------------------------------------------------- one rollout, one update
def rollout(policy, play, ppo, generator, bar):
    """`turns` answers at each of N tables. Returns: list of Turns (T x N, time first), their (T, N) advantages and returns."""
    played = collect(policy, play, ppo.turns, ppo.temperature, generator, bar)
    turns = played.turns
    advantages, returns = gae(played.rewards * ppo.reward_scale, played.values, played.dones, played.last_values, ppo.gamma,
                              ppo.lam)
    return turns, advantages.flatten(), returns.flatten()


def token_weights(policy, turn, key, weight):
    """(A,) weights of an answer's log-probs in the turn ratio: `weight` before the token that completes `key`."""
    weights = torch.ones(len(turn.answer))
    if weight != 1:
        low, high = 0, len(turn.answer)
        while low < high:  # first length whose text holds the key
            middle = (low + high) // 2
            low, high = (low, middle) if key in policy.decode(turn.answer[:middle + 1]) else (middle + 1, high)
        weights[:low] = weight
    return weights


@torch.no_grad()
def reference_logprobs(policy, packed, micro_tokens, temperature, weights=None):
    """Log-probs of every turn's answer recomputed through the update path, optionally under other weights."""
    found = {}
    for group in micro_batches(packed, micro_tokens):
        if weights is None:
            out = policy.score([s for s, _ in group], temperature)
        else:
            with policy.weights_of(weights):
                out = policy.score([s for s, _ in group], temperature)
        members = [i for _, m in group for i in m]
        for place, index in enumerate(members):
            found[index] = out["logprobs"][out["turn"] == place].cpu()
    return [found[i] for i in range(len(found))]


def micro_step(policy, group, batch, ppo, count):
    """Forward and backward of one micro-batch; losses are sums over turns divided by the minibatch's `count`.

    Args: group: [(Sequence, turn indices)]; batch: dict of per-turn lists and (turns,) tensors; count: turns (and,
    for ratio: token, tokens) of the whole minibatch.
    Returns: dict of summed statistics.
    """
    members = [i for _, m in group for i in m]
    take = lambda name: torch.cat([batch[name][i] for i in members]).to(policy.device)  # noqa: E731
    out = policy.score([s for s, _ in group], ppo.temperature)
    advantages, returns = (batch[k][members].to(policy.device) for k in ("advantages", "returns"))
    per_token = out["logprobs"] - take("old")  # (A,)
    turn_sum = lambda x: torch.zeros(len(members), device=policy.device).index_add(0, out["turn"], x)  # noqa: E731
    log_ratio = turn_sum(per_token * take("weights"))  # (turns,)
    entropy = turn_sum(out["entropy"]) / turn_sum(torch.ones_like(per_token))  # (turns,) nats per token
    if ppo.ratio == "turn":
        policy_loss, clipped = ppo_loss(log_ratio, advantages, ppo.clip)
        entries = len(log_ratio)
    else:
        policy_loss, clipped = ppo_loss(per_token, advantages[out["turn"]], ppo.clip)
        policy_loss, entries = policy_loss * count["turns"] / count["tokens"], len(per_token)
    value_loss = (out["values"] - returns).square().sum()
    loss = policy_loss + ppo.value_coef * value_loss - ppo.entropy_coef * entropy.sum()
    stats = {"value_loss": value_loss, "entropy": entropy.sum(), "clipped": clipped, "entries": entries,
             "kl_old": (log_ratio.exp() - 1 - log_ratio).sum(), "gap": (log_ratio.exp() - 1).abs().sum(),
             "policy_loss": policy_loss}
    if ppo.kl_coef:
        # KL(pi || start) by half the squared log-ratio: its gradient is the KL's on policy and stays linear in the gap,
        # where the usual exp(gap) - 1 - gap explodes on tokens that the policy has left, above all at T = 0.2
        kl = 0.5 * (take("start") - out["logprobs"]).square().sum()
        loss, stats["kl_start"] = loss + ppo.kl_coef * kl, kl
    (loss / count["turns"]).backward()
    return {name: float(torch.as_tensor(value).detach()) for name, value in stats.items()}


def update(policy, optimizer, turns, advantages, returns, ppo, key, start, generator):
    """PPO epochs over one rollout. Returns: dict of statistics for the log. Raises: UserError on a non-finite loss."""
    packed = sequences_of(turns, ppo.envs)
    if ppo.normalize_advantages and len(turns) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    batch = {"old": [t.logprobs for t in turns], "advantages": advantages, "returns": returns,
             "weights": [token_weights(policy, t, key, ppo.prefix_weight) for t in turns]}
    if not policy.exact:  # in 16 bits, sampling and scoring differ: the ratio must start at 1 (paper's code does this too)
        batch["old"] = reference_logprobs(policy, packed, ppo.micro_tokens, ppo.temperature)
    off = [(w * (old - t.logprobs)).sum().exp() - 1 for w, old, t in zip(batch["weights"], batch["old"], turns)]
    if ppo.kl_coef:
        batch["start"] = reference_logprobs(policy, packed, ppo.micro_tokens, ppo.temperature, start)
    total, norms, ratio_gap = Counter(), [], None
    for _ in range(ppo.epochs):
        order = torch.randperm(len(packed), generator=generator).tolist()
        for minibatch in minibatches([packed[i] for i in order], ppo.minibatch):
            members = [i for _, m in minibatch for i in m]
            count = {"turns": len(members), "tokens": sum(len(turns[i].answer) for i in members)}
            optimizer.zero_grad()
            stats = Counter({"turns": len(members)})
            for group in micro_batches(minibatch, ppo.micro_tokens):
                stats.update(micro_step(policy, group, batch, ppo, count))
            norms.append(torch.nn.utils.clip_grad_norm_(policy.trainable.values(), ppo.max_grad_norm).item())
            if not math.isfinite(stats["policy_loss"] + stats["value_loss"] + norms[-1]):
                raise UserError("the PPO loss is not finite; lower ppo.lr or ppo.value_lr (the last checkpoint is intact)")
            if ratio_gap is None:
                ratio_gap = stats["gap"] / stats["turns"]
            optimizer.step()
            total.update(stats)
    n = total["turns"]
    old_values = torch.tensor([t.value for t in turns])
    return {"kl_old": total["kl_old"] / n, "kl_start": total["kl_start"] / n,
            "clip_fraction": total["clipped"] / total["entries"], "entropy": total["entropy"] / n,
            "explained_variance": float(1 - (returns - old_values).var(correction=0) / (returns.var(correction=0) + 1e-8)),
            "value_loss": total["value_loss"] / n, "ratio_gap": ratio_gap,
            "sampler_gap": torch.stack(off).abs().mean().item(), "grad_norm": sum(norms) / len(norms)}


# ---------------------------------------------------------------- the run
def seeded(device, *names):
    """Random numbers that follow from the names alone: no state to save, which another device could not read."""
    return torch.Generator(device).manual_seed(random.Random(str(names)).getrandbits(63))


class Trainer:
    """Everything a stopped run needs again: policy, optimiser, tables in mid-episode."""

    def __init__(self, cfg, envs, policy):
        ppo = cfg.ppo
        self.policy, self.play = policy, Play(envs, training_seeds(cfg.run.seed))
        self.optimizer = torch.optim.AdamW([{"params": list(policy.trainable.values()), "lr": ppo.lr},
                                            {"params": list(policy.value_head.parameters()), "lr": ppo.value_lr}],
                                           eps=ppo.adam_eps, weight_decay=0.0)

    def save(self, folder):
        self.policy.save(folder)
        save_state(folder, {"optimizer": self.optimizer.state_dict(), "tokens": self.policy.tokens,
                            "gflops": self.policy.flops() / 1e9, "play": self.play.state()})

    def restore(self, folder):
        state = load_state(folder)
        self.policy.load(folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy.tokens = state["tokens"]
        self.play.restore(state["play"])


def start_policy(cfg):
    """The policy at ppo.init. Raises: UserError if that checkpoint is not there."""
    init = None if cfg.ppo.init == "none" else Path(cfg.run.dir) / cfg.ppo.init
    if init is not None and not init.is_dir():
        raise UserError(f"ppo.init: no checkpoint {init}; run sft.py with this configuration first")
    policy = Policy(cfg.model, cfg.lora, cfg.ppo.value_hidden, cfg.ppo.value_detach, cfg.run.seed)
    if init is not None:
        policy.load(init, value_head=False)
        policy.tokens = load_state(init)["tokens"]  # Init's compute counts: X_RL = 6N(D_init + D_RL) + 2N D_buffer
    return policy


def main(arguments):
    cfg, raw, overrides = load(arguments)
    ppo = cfg.ppo
    envs = [make_env(cfg.env, ppo.verify_iters) for _ in range(ppo.envs)]
    with within_memory("loading the model", cfg, "model.quantization=nf4"):
        policy = start_policy(cfg)
        start = policy.snapshot() if ppo.kl_coef else None
        run = Run("rl", raw, overrides)
        trainer = Trainer(cfg, envs, policy)
        if run.last is not None:
            trainer.restore(run.last)
    bar = tqdm(range(run.step, ppo.updates), initial=run.step, total=ppo.updates, unit="update", disable=None)
    with run.stoppable("update"), bar:
        for step in bar:
            began, tokens = time.time(), sum(policy.tokens.values())
            for group, peak in zip(trainer.optimizer.param_groups, (ppo.lr, ppo.value_lr)):
                group["lr"] = learning_rate(step, ppo.updates, peak, ppo.schedule)
            sampler = seeded(policy.device, "sample", cfg.run.seed, step)
            with within_memory("sampling", cfg, "model.sample_tokens", "model.merge_for_sampling=false"):
                turns, advantages, returns = rollout(policy, trainer.play, ppo, sampler, bar)
            bar.set_description("update")
            shuffler = seeded("cpu", "shuffle", cfg.run.seed, step)
            with within_memory("training", cfg, "ppo.micro_tokens", "model.gradient_checkpointing=true"):
                stats = update(policy, trainer.optimizer, turns, advantages, returns, ppo, envs[0].answer_key, start,
                               shuffler)
            trainer.optimizer.zero_grad()  # rollouts have a use for the memory
            seconds = time.time() - began
            record = {"step": step + 1, **outcome(turns), **stats, "tokens": dict(policy.tokens),
                      "gflops": policy.flops() / 1e9, "seconds": seconds, "peak_memory_gib": peak_memory(policy.device)}
            run.log("metrics", record)
            for turn in turns[::max(1, len(turns) // 8)]:
                run.log("transcripts", {"step": step + 1, "seed": turn.seed, "attempt": turn.info["attempt"],
                                        "answer": turn.text, "reward": turn.reward, "verifier": turn.info["feedback"]})
            rate = (sum(policy.tokens.values()) - tokens) / seconds
            bar.set_postfix_str(f"reward {record['reward']:.2f} success {record['success'] or 0:.2f} first "
                                f"{record['first_attempt'] or 0:.2f} KL {record['kl_start']:.3f} {rate:,.0f} tok/s")
            regular = (step + 1) % ppo.save_every == 0 or step + 1 == ppo.updates
            if regular or run.stopping:
                with run.checkpoint(step + 1, regular) as folder:
                    trainer.save(folder)
    print(f"{run.dir}: {ppo.updates} updates, {policy.flops() / 1e9:,.0f} model GFLOPs")


if __name__ == "__main__":
    run_main(main)
