"""Supervised fine-tuning on expert answers: the memorising arm, and the Init that PPO starts from.

    python sft.py CONFIG.yaml [key=value ...]

Paper Sec. 5, App. C. One run gives both: its early checkpoint sft.init_step is Init, the later ones are the SFT arm.
Loss on the expert's answer tokens alone. With sft.mistakes > 0 the prompt holds wrong attempts and the verifier's
texts before the expert's answer (the paper's sub-optimal trajectories); they carry no loss.

Logged per step (metrics.jsonl): loss (nats per answer token), grad_norm, lr, tokens, gflops, seconds, peak_memory_gib.
"""
import itertools
import math
import random
import time

import torch
from tqdm import tqdm

from lib.batching import micro_batches
from lib.runs import Run
from lib.settings import UserError, load, run_main, within_memory
from lib.training import learning_rate, load_state, peak_memory, save_state
from policy import Policy
from rollout import make_env, training_seeds


def example(env, seed, mistakes):
    """(observation, expert answer) at a random position of one episode, after 0..mistakes wrong attempts there."""
    obs, _ = env.reset(seed, progress=random.Random(f"progress {seed}").random())
    for _ in range(random.Random(seed).randint(0, mistakes)):
        obs, *_ = env.step(env.mistake())
    return obs, env.expert()


def sft_batch(policy, env, seeds, mistakes):
    """Sequences whose one span is the expert's answer."""
    observations, answers = zip(*(example(env, seed, mistakes) for seed in seeds))
    return [prompt.answered(answer) for prompt, answer in zip(policy.encode(observations), policy.encode_answers(answers))]


def train_step(policy, optimizer, batch, sft):
    """One optimiser step on the mean negative log-prob per answer token. Returns: (loss, gradient norm)."""
    tokens = sum(end - start for s in batch for start, end in s.spans)
    optimizer.zero_grad()
    loss = 0.0
    for group in micro_batches([(s,) for s in batch], sft.micro_tokens):
        part = -policy.score([s for s, in group])["logprobs"].sum() / tokens
        part.backward()
        loss += part.item()
    norm = torch.nn.utils.clip_grad_norm_(policy.trainable.values(), sft.max_grad_norm).item()
    if not math.isfinite(loss + norm):
        raise UserError("the SFT loss is not finite; lower sft.lr (the last checkpoint is intact)")
    optimizer.step()
    return loss, norm


def main(arguments):
    cfg, raw, overrides = load(arguments)
    sft = cfg.sft
    env = make_env(cfg.env, sft.mistakes + 1)
    with within_memory("loading the model", cfg, "model.quantization=nf4"):
        policy = Policy(cfg.model, cfg.lora, cfg.ppo.value_hidden, seed=cfg.run.seed)
        run = Run("sft", raw, overrides)
        optimizer = torch.optim.AdamW(policy.trainable.values(), lr=sft.lr, weight_decay=sft.weight_decay)
        if run.last is not None:
            state = load_state(run.last)
            policy.load(run.last)
            optimizer.load_state_dict(state["optimizer"])
            policy.tokens = state["tokens"]
    seeds = itertools.islice(training_seeds(cfg.run.seed), run.step * sft.batch_size, None)
    bar = tqdm(range(run.step, sft.steps), initial=run.step, total=sft.steps, unit="step", desc="SFT", disable=None)
    with run.stoppable("step"), bar:
        for step in bar:
            began, before = time.time(), policy.tokens["train"]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, sft.steps, sft.lr, sft.schedule, round(sft.warmup * sft.steps))
            batch = sft_batch(policy, env, list(itertools.islice(seeds, sft.batch_size)), sft.mistakes)
            with within_memory("training", cfg, "sft.micro_tokens", "model.gradient_checkpointing=true"):
                loss, norm = train_step(policy, optimizer, batch, sft)
            seconds = time.time() - began
            run.log("metrics", {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"],
                                "tokens": dict(policy.tokens), "gflops": policy.flops() / 1e9, "seconds": seconds,
                                "peak_memory_gib": peak_memory(policy.device)})
            bar.set_postfix_str(f"loss {loss:.3f} {(policy.tokens['train'] - before) / seconds:,.0f} tok/s")
            regular = (step + 1) % sft.save_every == 0 or step + 1 in (sft.init_step, sft.steps)
            if regular or run.stopping:
                with run.checkpoint(step + 1, regular) as folder:
                    policy.save(folder)
                    save_state(folder, {"optimizer": optimizer.state_dict(), "tokens": policy.tokens,
                                        "gflops": policy.flops() / 1e9})
    print(f"{run.dir}: {sft.steps} steps, {policy.flops() / 1e9:,.0f} model GFLOPs")


if __name__ == "__main__":
    run_main(main)
