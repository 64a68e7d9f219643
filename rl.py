"""PPO over verification turns: an action is one whole answer, to which the verifier replies.

    python rl.py CONFIG.yaml [key=value ...]

Paper Sec. 3, App. B/C. A stopped run goes on to the same numbers: a checkpoint has weights,
optimiser, token counts (lib/training.py: load_checkpoint) and each open episode's seed and answers,
which are replayed (Play.restore); random numbers follow from run.seed and the step (`seeded`); what
was logged after the checkpoint is dropped (lib/runs.py).

Deviations (docs/differences.md), each a YAML key: LoRA on a 4-bit base, a value head on detached
features with a rate of its own, a KL penalty, scaled rewards. SFT and PPO draw the same hands.

Logged per update (metrics.jsonl): how the rollout went (rollout.outcome), what the update did
(lib/ppo.py: ppo_statistics), tokens and gflops (so far, with Init), seconds, peak_memory_gib.
"""
from collections import Counter

import torch

from lib.batching import micro_batches, sequences_of, shuffled_epochs
from lib.errors import run_main, within_memory
from lib.loading import check_reads_images
from lib.ppo import (
    Batch, answer_logprobs, normalized, ppo_statistics, spread_of, sum_per_turn, token_weights,
    too_far)
from lib.progress import progress_bar
from lib.runs import Run
from lib.settings import load
from lib.training import (
    Meter, backward, begin_at, clipped_step, load_checkpoint, save_checkpoint, seeded,
    set_learning_rates)
from policy import Policy
from rollout import Play, collect, make_env, outcome, summary, training_seeds, transcript


# ---------------------------------------------------------------- the maths, pure
# Shapes: T turns in time of N environments; S turns of a micro-batch with A answer tokens in all.
def gae(rewards, values, dones, last_value, gamma, lam):
    """Advantages over the T turns of each environment (one turn = one whole answer).

    Args:
        rewards: (T, ...) verifier reward of each turn.
        values: (T, ...) V(s_t) read at the last prompt token, same units.
        dones: (T, ...) bool, the turn ended its episode (solved or out of attempts): nothing is
            bootstrapped across it.
        last_value: (...) V(s_T), ignored where dones[-1].
        gamma, lam: discount and GAE lambda, per turn.
    Returns: advantages (T, ...), returns (T, ...) = advantages + values.
    Raises: ValueError if the shapes differ.
    Source: arXiv 1506.02438 eq. 16; gamma 0.9, lam 0.95 as in the official configs.
    """
    shapes = [tuple(x.shape) for x in (rewards, values, dones, last_value)]
    if not shapes[0] == shapes[1] == shapes[2] or shapes[3] != shapes[1][1:]:
        raise ValueError(f"gae: shapes {shapes} of rewards, values, dones and last_value differ")
    advantages = torch.zeros_like(rewards)
    advantage, v_tp1 = torch.zeros_like(last_value), last_value
    for t in reversed(range(len(rewards))):
        goes_on = (~dones[t]).to(rewards.dtype)
        delta = rewards[t] + gamma * v_tp1 * goes_on - values[t]
        advantage = delta + gamma * lam * goes_on * advantage
        advantages[t] = advantage
        v_tp1 = values[t]
    return advantages, advantages + values


def clipped_surrogate(log_ratio, advantages, clip):
    """PPO's policy loss, summed.

    Args: log_ratio: (n,) log pi_new - log pi_old, of turns or of tokens; advantages: (n,);
        clip: the paper's 0.1.
    Returns: scalar loss, number of ratios outside [1 - clip, 1 + clip].
    Source: arXiv 1707.06347 eq. 7.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    outside = (ratio - 1).abs() > clip
    return loss.sum(), outside.sum()


def ppo_loss(new, old, start, ratio_weights, turn_of, advantages, values, returns, entropy, ppo,
             size):
    """Loss of a micro-batch; summed over those of a minibatch it is the minibatch's mean loss.

    Args:
        new, old, start: (A,) log-probs of the answer tokens now, before the update, and under the
            start policy, which others call the reference (None: no KL penalty).
        ratio_weights: (A,) of the tokens' log-probs in the ratio of their turn: see token_weights.
        turn_of: (A,) which of the S turns a token belongs to, 0..S-1.
        advantages, values, returns: (S,). entropy: (A,) of the policy at each token, nats.
        ppo: cfg.ppo: ratio ("turn" or "token"), clip, max_ratio and the coefficients.
        size: of the minibatch: size.turns, size.tokens.
    Returns: scalar loss; dict of sums over the micro-batch (numbers), for the log. Whatever
        ppo.ratio is, kl_old, ratio_gap and exploded (ppo.max_ratio) are those of turns.
    """
    turns, tokens = len(advantages), len(new)  # S, A
    token_log_ratio = new - old  # (A,)
    turn_log_ratio = sum_per_turn(ratio_weights * token_log_ratio, turn_of, turns)  # (S,)
    if ppo.ratio == "turn":
        policy_loss, clipped = clipped_surrogate(turn_log_ratio, advantages, ppo.clip)
    else:  # every token has its turn's advantage and weighs 1; the mean is over tokens
        policy_loss, clipped = clipped_surrogate(token_log_ratio, advantages[turn_of], ppo.clip)
        # so that "/ size.turns" below gives a mean over tokens
        policy_loss = policy_loss * size.turns / size.tokens
    value_loss = (values - returns).square().sum()
    lengths = sum_per_turn(torch.ones_like(new), turn_of, turns)  # (S,)
    turn_entropy = sum_per_turn(entropy, turn_of, turns) / lengths  # (S,) nats per token
    loss = policy_loss + ppo.value_coef * value_loss - ppo.entropy_coef * turn_entropy.sum()
    kl_start = torch.zeros(())
    if start is not None:
        # KL(pi || start) by half the squared log-ratio (k2): on policy its gradient is the KL's and
        # linear in the gap, where that of exp(gap) - 1 - gap (k3) explodes on tokens that the
        # policy has left, above all at T = 0.2
        kl_start = 0.5 * (start - new).square().sum()
        loss = loss + ppo.kl_coef * kl_start
    ratio = turn_log_ratio.exp()
    sums = {"turns": turns, "ratios": turns if ppo.ratio == "turn" else tokens,
            "loss": loss.item(), "value_loss": value_loss.item(),
            "entropy": turn_entropy.sum().item(), "clipped": clipped.item(),
            "kl_old": (ratio - 1 - turn_log_ratio).sum().item(), "kl_start": kl_start.item(),
            "ratio_gap": (ratio - 1).abs().sum().item(),
            "log_ratio_squared": turn_log_ratio.square().sum().item(),
            "exploded": (ratio > ppo.max_ratio).sum().item()}
    return loss / size.turns, sums


# ---------------------------------------------------------------- one update
def prepare(policy, turns, advantages, returns, ppo, key, start):
    """What an update compares with, above all old and start log-probs. Returns: Batch.

    Args: turns: S Turns; advantages, returns: (S,); key: the environment's answer_key;
        start: weights of the start policy (Policy.snapshot), None without a KL penalty.
    """
    spread = spread_of(advantages)
    if ppo.normalize_advantages:
        advantages = normalized(advantages, ppo.min_spread)
    weights = [token_weights(policy, turn, key, ppo.prefix_weight) for turn in turns]
    packed = sequences_of(turns, ppo.envs)
    if policy.exact:
        old = [turn.logprobs for turn in turns]
    else:  # 16 bits sample and score differently, and the ratio must start at 1 (so in the paper's)
        old = answer_logprobs(policy, packed, ppo.micro_tokens, ppo.temperature)
    start_logprobs = None
    if ppo.kl_coef:
        with policy.weights_of(start):
            start_logprobs = answer_logprobs(policy, packed, ppo.micro_tokens, ppo.temperature)
    return Batch(turns, packed, advantages, returns, weights, old, start_logprobs, spread)


def update(policy, optimizer, batch, ppo, generator):
    """PPO epochs over a batch, until the policy moves too far. Returns: of `ppo_statistics`."""
    steps = []
    for minibatch in shuffled_epochs(batch.packed, ppo.epochs, ppo.minibatch, generator):
        steps.append(minibatch_step(policy, optimizer, batch, minibatch, ppo))
        if steps[-1]["stopped"]:
            break
    return ppo_statistics(batch, steps)


def minibatch_step(policy, optimizer, batch, minibatch, ppo):
    """One optimiser step, a micro-batch at a time; none if the policy has moved too far.

    Returns: sums of `ppo_loss`; grad_norm; skipped: 0 or 1; stopped: the setting whose limit
        forbids it, or None.
    Raises: UserError if the loss or its gradient is not finite, before the weights change.
    """
    size = batch.size(minibatch)
    sums = Counter()
    optimizer.zero_grad()
    with policy.merged():
        for group in micro_batches(minibatch, ppo.micro_tokens):
            sequences = [conversation.sequence for conversation in group]
            scored = policy.score(sequences, ppo.temperature)
            known = batch.targets(group, policy.device)
            loss, part = ppo_loss(
                new=scored["logprobs"], old=known.old, start=known.start,
                ratio_weights=known.ratio_weights, turn_of=scored["answer_of"],
                advantages=known.advantages, values=scored["values"], returns=known.returns,
                entropy=scored["entropy"], ppo=ppo, size=size)
            backward(policy, loss)
            sums.update(part)
    sums["stopped"] = too_far(sums, ppo)
    if sums["stopped"]:
        return sums
    norm = clipped_step(policy, optimizer, ppo.max_grad_norm, sums["loss"],
                        "the PPO loss is not finite; lower ppo.lr or ppo.value_lr")
    sums.update(grad_norm=norm or 0.0, skipped=int(norm is None))
    return sums


# ---------------------------------------------------------------- the run
def start_policy(cfg, init):
    """The policy at the checkpoint `init`, or the bare base for None."""
    policy = Policy(cfg.model, cfg.lora, cfg.ppo.value_hidden, cfg.ppo.value_detach, cfg.run.seed)
    begin_at(init, policy)
    return policy


def main(arguments):
    """Train with PPO, or go on. arguments: CONFIG.yaml [key=value ...]."""
    cfg, raw, overrides = load(arguments)
    ppo = cfg.ppo
    envs = [make_env(cfg.env, ppo.verify_iters) for _ in range(ppo.envs)]
    play = Play(envs, training_seeds(cfg.run.seed), spread=True)
    check_reads_images(cfg.model, play.episodes[0].observation)
    run = Run("rl", raw, overrides)
    if not run.goes_on("rl.py", cfg):
        return
    with within_memory("loading the model", cfg, "model.quantization=nf4"):
        policy = start_policy(cfg, run.init)
        start = policy.snapshot() if ppo.kl_coef else None  # Init, before a stopped run's weights
        run.begin()  # writes nothing before the model is there
        groups = [{"params": policy.trainable.values(), "lr": ppo.lr},
                  {"params": policy.value_head.parameters(), "lr": ppo.value_lr}]
        optimizer = torch.optim.AdamW(groups, eps=ppo.adam_eps, weight_decay=0.0)
        if run.last is not None:
            state = load_checkpoint(run.last, policy, optimizer)
            play.restore(state["play"])
        else:
            play.burn_in(policy, ppo.verify_iters - 1, ppo.temperature,
                         seeded(policy.device, "warm up", cfg.run.seed))

    steps = range(run.step, ppo.updates)
    bar = progress_bar(steps, initial=run.step, total=ppo.updates, unit="update")
    with run.stoppable("update"), bar:
        for step in bar:
            meter = Meter(policy)
            set_learning_rates(optimizer, (ppo.lr, ppo.value_lr), step, ppo.updates, ppo.schedule)
            sampler = seeded(policy.device, "sample", cfg.run.seed, step)
            shuffler = seeded("cpu", "shuffle", cfg.run.seed, step)

            with within_memory("sampling", cfg, "model.sample_tokens",
                               "model.merge_for_sampling=false"):
                rollout = collect(policy, play, ppo.turns, ppo.temperature, sampler, bar)
            advantages, returns = gae(  # (T, N)
                rollout.rewards * ppo.reward_scale, rollout.values, rollout.dones,
                rollout.last_values, ppo.gamma, ppo.lam)

            bar.set_description("update")
            policy.learn(values_alone=step < ppo.value_warmup)
            with within_memory("training", cfg, "ppo.micro_tokens",
                               "model.gradient_checkpointing=true",
                               "model.merge_for_sampling=false"):
                batch = prepare(policy, rollout.turns, advantages.flatten(), returns.flatten(), ppo,
                                envs[0].answer_key, start)
                learned = update(policy, optimizer, batch, ppo, shuffler)
            optimizer.zero_grad()  # rollouts have a use for the memory
            record = {"step": step + 1, **outcome(rollout.turns), **learned, **meter.spent()}
            run.log("metrics", record)
            apart = len(rollout.turns) // 8 + 1
            for turn in rollout.turns[::apart]:  # at most eight, of other environments and times
                run.log("transcripts", {"step": step + 1, **transcript(turn)})
            bar.set_postfix_str(f"{summary(record)} {meter.rate()}", refresh=False)

            regular = (step + 1) % ppo.save_every == 0 or step + 1 == ppo.updates
            if regular or run.stopping:
                with run.checkpoint(step + 1, regular) as folder:  # ends the run if it is stopping
                    save_checkpoint(folder, policy, optimizer, play=play.state())
    print(f"{run.dir}: {ppo.updates} updates, {policy.flops() / 1e9:,.0f} model GFLOPs")


if __name__ == "__main__":
    run_main(main)
