"""How fast a rollout and an update are, against one answer at a time and against a bare batched `generate`.

    python tools/benchmark.py CONFIG.yaml [key=value ...] [--json FILE]

The configuration's policy (bare base, fresh LoRA) plays its environment in three ways; turns/s are compared:

one at a time   the official loop: HF `generate` with a batch of one, verify, repeat; then PPO with one turn per forward
                and backward pass, its whole prompt read anew. Its old log-probs and values, a second forward pass in
                the official code, are left out of its time.
ours            rl.rollout (with log-probs, values and the bootstrap) and rl.update of ppo.envs x ppo.turns turns.
bare generate   HF `generate` in batches of ppo.envs and the environments in lock-step, without log-probs, values and
                update: the speed limit of a simple library solution.

Machines are noisy: rounds are interleaved (A B C A B C ...), each starts from the same new hands for all three, a ratio
is taken within a round and then the median over rounds. Updates do the configured PPO, KL reference pass included, at
learning rate 0, so that every round meets the same policy. Answers are sampled: compare their mean lengths first.
Seconds are wall-clock; `cores`, CPU seconds over them, falls below `threads` where other programs had their share.
"""
import json
import os
import platform
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import mean, median
from time import perf_counter, process_time
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import rl  # noqa: E402
from lib import batching  # noqa: E402
from lib.settings import ROOT, UserError, load, run_main  # noqa: E402
from rollout import Play, make_env, training_seeds  # noqa: E402
from lib.training import peak_memory  # noqa: E402
from policy import Answer, Policy  # noqa: E402

ROUNDS = 3
REFERENCE_TURNS = 24  # of one at a time; ppo.turns at each of fewer tables, so that prompts grow alike
RATIOS = (  # of turns/s: ours over which way, in what, wanted at least
    ("one at a time", ("rollout",), 10), ("one at a time", ("rollout", "update"), 5), ("bare generate", ("rollout",), 0.85))


class Benchmark:
    """The three ways over one policy; each takes (ppo section, first seed), returns (Turns, seconds by what was done)."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.policy = policy = Policy(cfg.model, cfg.lora, cfg.ppo.value_hidden, cfg.ppo.value_detach, cfg.run.seed)
        self.library = SimpleNamespace(encode=policy.encode, decode=policy.decode, sample=self.generate)  # for Play
        self.start = policy.snapshot() if cfg.ppo.kl_coef else None
        self.optimizer = torch.optim.AdamW([*policy.trainable.values(), *policy.value_head.parameters()], lr=0.0,
                                           eps=cfg.ppo.adam_eps, weight_decay=0.0)
        self.sampler = torch.Generator(policy.device).manual_seed(cfg.run.seed)
        self.shuffler = torch.Generator().manual_seed(cfg.run.seed)

    def play(self, tables, seeds):
        return Play([make_env(self.cfg.env, self.cfg.ppo.verify_iters) for _ in range(tables)], seeds)

    def timed(self, function, *arguments):
        return timed(self.policy.device, function, *arguments)

    def update(self, turns, advantages, returns, ppo, play):
        return self.timed(rl.update, self.policy, self.optimizer, turns, advantages, returns, ppo,
                          play.envs[0].answer_key, self.start, self.shuffler)[1]

    def generate(self, prompts, temperature, _):
        """In place of Policy.sample: Answers of HF `generate`, which draws from the global random state, with text alone."""
        tokenizer, end = self.policy.tokenizer, self.policy.tokenizer.eos_token_id
        batch = tokenizer.pad({"input_ids": [p.ids for p in prompts]}, padding_side="left", return_tensors="pt")
        if prompts[0].image is not None:  # as MllamaProcessor makes them; every turn encodes its images anew
            pixels = self.policy.image_processor([[p.image] for p in prompts], return_tensors="pt")
            after = (batch["input_ids"] == self.policy.base.config.image_token_index).cumsum(1)  # (N, T)
            batch["cross_attention_mask"] = after[:, :, None, None] * pixels["aspect_ratio_mask"][:, None]
            batch.update({k: pixels[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")})
        batch = batch.to(self.policy.device)
        rows = self.policy.base.generate(**batch, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
                                         max_new_tokens=self.policy.max_new_tokens, eos_token_id=end,
                                         pad_token_id=tokenizer.pad_token_id)  # (N, T + A), finished rows padded
        answers = rows[:, batch["input_ids"].shape[1]:].tolist()  # (N, A)
        return [Answer(row[:row.index(end) + 1] if end in row else row, None, 0.0) for row in answers]

    def library_rollout(self, plays, ppo):
        """ppo.turns turns of one Play after the other, answered by HF `generate`, and the seconds."""
        return self.timed(lambda: [turn for play in plays for _ in range(ppo.turns)
                                   for turn in play.turn(self.library, ppo.temperature, None)])

    def one_at_a_time(self, ppo, seed):
        tables = max(1, min(ppo.envs, REFERENCE_TURNS // ppo.turns))
        plays = [self.play(1, count(seed + table, tables)) for table in range(tables)]
        turns, rollout = self.library_rollout(plays, ppo)
        turns = [replace(turn, slot=slot) for slot, turn in enumerate(turns)]  # a slot each: never packed together
        single = SimpleNamespace(**{**vars(ppo), "envs": len(turns), "turns": 1, "micro_tokens": 1})  # a pass each
        packed = batching.sequences_of(turns, len(turns))
        for turn, logprobs in zip(turns, rl.reference_logprobs(self.policy, packed, 1, ppo.temperature)):
            turn.logprobs = logprobs
        rewards = torch.tensor([turn.reward for turn in turns]) * ppo.reward_scale  # in place of GAE: same work
        return turns, {"rollout": rollout, "update": self.update(turns, rewards, rewards, single, plays[0])}

    def ours(self, ppo, seed):
        play = self.play(ppo.envs, count(seed))
        batch, rollout = self.timed(rl.rollout, self.policy, play, ppo, self.sampler, tqdm(disable=True))
        return batch[0], {"rollout": rollout, "update": self.update(*batch, ppo, play)}

    def bare_generate(self, ppo, seed):
        turns, rollout = self.library_rollout([self.play(ppo.envs, count(seed))], ppo)
        return turns, {"rollout": rollout}

    def environment(self, turns):
        """Median microseconds of the environment's `reset` and `step`, over the first attempts among real turns."""
        env, firsts = self.play(1, count()).envs[0], [turn for turn in turns if turn.info["attempt"] == 1] * 10
        seconds = [(self.timed(env.reset, t.seed)[1], self.timed(env.step, t.text)[1]) for t in firsts]
        return {name: median(column) * 1e6 for name, column in zip(("reset", "step"), zip(*seconds))}


def timed(device, function, *arguments):
    """What the function returns and its seconds, a GPU's pending work included."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    began = perf_counter()
    result = function(*arguments)
    sync()
    return result, perf_counter() - began


def reset_peak(device):
    """Forget the peak memory so far, so that each way shows its own (CPU: Linux alone; elsewhere it only grows)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def machine(device):
    """Where and with what this was measured."""
    commit, *changes = subprocess.run("git rev-parse --short HEAD && git status --porcelain", shell=True, cwd=ROOT,
                                      text=True, capture_output=True).stdout.splitlines() or ["unknown"]
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processor": f"{platform.processor() or platform.machine()}, {os.cpu_count()} logical CPUs",
            "load": round(os.getloadavg()[0], 1), "threads": torch.get_num_threads(),
            "commit": commit + " with changes" * bool(changes),
            **{name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}}


def json_file(text):
    """The argument of --json. Raises: UserError before anything is measured, if it cannot be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--json {path}: not a file in a folder that is there")
    return path


def report(result):
    """The table: medians over the rounds; prompt and answer are mean lengths in tokens."""
    print("\n" + ", ".join(f"{name} {value}" for name, value in result["machine"].items()) + "\n")
    print(f"{'':<15}{'turns':>6}{'prompt':>8}{'answer':>8}{'rollout s':>11}{'turns/s':>9}{'update s':>10}{'cores':>7}{'peak GiB':>10}")
    for way, rounds in result["rounds"].items():
        r = {key: median(row[key] for row in rounds) for key in rounds[0]}
        update = f"{r['update']:.2f}" if "update" in r else "-"
        print(f"{way:<15}{r['turns']:>6.0f}{r['prompt']:>8.1f}{r['answer']:>8.1f}{r['rollout']:>11.2f}"
              f"{r['turns'] / r['rollout']:>9.1f}{update:>10}{r['cores']:>7.2f}{r['peak']:>10.2f}")
    for name, r in result["ratios"].items():
        print(f"{name:<40}{r['median']:>6.2f}x, rounds {min(r['rounds']):.2f} to {max(r['rounds']):.2f}, "
              f"at least {r['wanted']:g} wanted: {'ok' if r['median'] >= r['wanted'] else 'MISSED'}")
    print("environment: " + ", ".join(f"{name} {value:.0f} us" for name, value in result["environment_us"].items()))


def main(arguments):
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=json_file)
    options, arguments = parser.parse_known_args(arguments)
    cfg, raw, _ = load(arguments)
    bench, ways = Benchmark(cfg), ("one at a time", "ours", "bare generate")
    torch.manual_seed(cfg.run.seed)  # of HF generate
    rounds, small = {way: [] for way in ways}, SimpleNamespace(**{**vars(cfg.ppo), "envs": 2, "turns": 1})
    for number in tqdm(range(ROUNDS + 1), desc="rounds, the first to warm up", disable=None):
        for way in ways:
            reset_peak(bench.policy.device)
            began, cpu = perf_counter(), process_time()
            first_seed = next(training_seeds(cfg.run.seed)) + number * 10_000
            turns, seconds = getattr(bench, way.replace(" ", "_"))(cfg.ppo if number else small, first_seed)
            rounds[way].append({"turns": len(turns), "prompt": mean(len(turn.prompt.ids) for turn in turns),
                                "answer": mean(len(turn.answer) for turn in turns), **seconds,
                                "cores": (process_time() - cpu) / (perf_counter() - began),
                                "peak": peak_memory(bench.policy.device)})
    rounds, ratios = {way: rows[1:] for way, rows in rounds.items()}, {}
    for way, work, wanted in RATIOS:
        ours, theirs = ([r["turns"] / sum(r[w] for w in work) for r in rounds[name]] for name in ("ours", way))
        each = [a / b for a, b in zip(ours, theirs)]
        ratios[f"{' + '.join(work)}, ours / {way}"] = {"median": median(each), "rounds": each, "wanted": wanted}
    result = {"config": raw, "machine": machine(bench.policy.device), "rounds": rounds, "ratios": ratios,
              "environment_us": bench.environment(turns)}
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
