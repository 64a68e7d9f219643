"""Supervised fine-tuning on expert answers: the memorising arm, and the Init that PPO starts from.

    python sft.py CONFIG.yaml [key=value ...]

Paper Sec. 5, App. C. One run gives both: its early checkpoint sft.init_step is Init, the later ones
are the SFT arm. An arm with sft.init, such as one at another rate, begins at a checkpoint instead
of the bare base, as PPO does. The loss is on the expert's answer tokens alone. With sft.mistakes
> 0 the prompt holds wrong attempts and the verifier's texts before the expert's answer (the paper's
sub-optimal trajectories); they carry no loss.

Logged per step (metrics.jsonl): loss (sft.loss per answer token), grad_norm, skipped (true: float16
overflowed, no step was made), lr, tokens, gflops, seconds, peak_memory_gib.
"""
import itertools
import random

import torch

from lib.batching import micro_batches
from lib.errors import run_main, within_memory
from lib.loading import check_reads_images
from lib.progress import progress_bar
from lib.runs import Run
from lib.settings import load
from lib.training import (
    Meter, backward, begin_at, clipped_step, load_checkpoint, save_checkpoint, set_learning_rates)
from policy import Policy
from rollout import make_env, training_seeds


def example(env, seed, mistakes):
    """The expert's answer at a random position of an episode, after 0..mistakes wrong ones there.

    Returns: (observation, expert answer).
    """
    progress = random.Random(f"progress {seed}").random()
    attempts = random.Random(f"mistakes {seed}").randint(0, mistakes)  # the deal draws by `seed`
    observation, _ = env.reset(seed, progress)
    for _ in range(attempts):
        observation, *_ = env.step(env.mistake())
    return observation, env.expert()


def sft_batch(policy, env, seeds, mistakes):
    """One Sequence per seed, whose one span is the expert's answer."""
    examples = [example(env, seed, mistakes) for seed in seeds]
    prompts = policy.encode([observation for observation, _ in examples])
    answers = policy.encode_answers([answer for _, answer in examples])
    return [prompt.answered(answer) for prompt, answer in zip(prompts, answers)]


def train_step(policy, optimizer, batch, sft):
    """One optimiser step on the mean negative log-prob per answer token; with sft.loss "dft" each
    token's is weighed by its own probability, through which no gradient goes (arXiv 2508.05629).

    Returns: (loss per answer token, gradient norm before clipping, None without a step).
    Raises: UserError if one of them is not finite; the weights are then unchanged.
    """
    answer_tokens = sum(end - start for sequence in batch for start, end in sequence.spans)
    optimizer.zero_grad()
    loss = 0.0
    items = [(sequence,) for sequence in batch]
    with policy.merged():
        for group in micro_batches(items, sft.micro_tokens):
            scored = policy.score([sequence for (sequence,) in group])
            logprobs = scored["logprobs"]
            if sft.loss == "dft":
                logprobs = logprobs.detach().exp() * logprobs
            part = -logprobs.sum() / answer_tokens
            backward(policy, part)
            loss += part.item()
    norm = clipped_step(policy, optimizer, sft.max_grad_norm, loss,
                        "the SFT loss is not finite; lower sft.lr")
    return loss, norm


def main(arguments):
    """Train on expert answers, or go on. arguments: CONFIG.yaml [key=value ...]."""
    cfg, raw, overrides = load(arguments)
    sft = cfg.sft
    env = make_env(cfg.env, sft.mistakes + 1)  # so that an episode outlives its mistakes
    check_reads_images(cfg.model, env.reset(0)[0])
    run = Run("sft", raw, overrides)
    if not run.goes_on("sft.py", cfg):
        return
    with within_memory("loading the model", cfg, "model.quantization=nf4"):
        policy = Policy(cfg.model, cfg.lora, cfg.ppo.value_hidden, seed=cfg.run.seed)
        begin_at(run.init, policy)
        run.begin()
        optimizer = torch.optim.AdamW(policy.trainable.values(), lr=sft.lr,
                                      weight_decay=sft.weight_decay)
        if run.last is not None:
            load_checkpoint(run.last, policy, optimizer)

    seeds = itertools.islice(training_seeds(cfg.run.seed), run.step * sft.batch_size, None)
    steps = range(run.step, sft.steps)
    bar = progress_bar(steps, desc="SFT", initial=run.step, total=sft.steps, unit="step")
    with run.stoppable("step"), bar:
        for step in bar:
            meter = Meter(policy)
            set_learning_rates(optimizer, (sft.lr,), step, sft.steps, sft.schedule,
                               sft.warmup)
            batch = sft_batch(policy, env, itertools.islice(seeds, sft.batch_size), sft.mistakes)
            with within_memory("training", cfg, "sft.micro_tokens",
                               "model.gradient_checkpointing=true",
                               "model.merge_for_sampling=false"):
                loss, norm = train_step(policy, optimizer, batch, sft)

            lr = optimizer.param_groups[0]["lr"]
            record = {"step": step + 1, "loss": loss, "grad_norm": norm, "skipped": norm is None,
                      "lr": lr, **meter.spent()}
            run.log("metrics", record)
            bar.set_postfix_str(f"loss {loss:.3f} {meter.rate()}", refresh=False)

            regular = (step + 1) % sft.save_every == 0 or step + 1 in (sft.init_step, sft.steps)
            if regular or run.stopping:
                with run.checkpoint(step + 1, regular) as folder:
                    save_checkpoint(folder, policy, optimizer)
    print(f"{run.dir}: {sft.steps} steps, {policy.flops() / 1e9:,.0f} model GFLOPs")


if __name__ == "__main__":
    run_main(main)
