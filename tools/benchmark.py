"""How fast a rollout and an update are, against one answer at a time and a bare batched `generate`.

    python tools/benchmark.py CONFIG.yaml [key=value ...] [--json FILE]

The configuration's policy (bare base, fresh LoRA) plays its environment in three ways:

one at a time   the official loop: HF `generate` with a batch of one, verify, repeat; then PPO
                with one turn per forward and backward pass, its whole prompt read anew. Its old
                log-probs and values, a second pass in the official code, are not timed.
ours            rollout and update of ppo.envs x ppo.turns turns, as rl.py does them.
bare generate   HF `generate` in batches of ppo.envs and the environments in lock-step, without
                log-probs, values and update: the speed limit of a simple library solution.

Turns/s are compared. Machines are noisy: rounds are interleaved (A B C A B C ...), each starts from
the same new hands for all three, a ratio is taken within a round and then the median over rounds.
The learning rate is 0, so that every round meets the same policy. Answers are sampled: compare
their mean lengths first. On a CPU, the shares say what our rollout and update reach of the cores'
rate in plain matmuls, measured around them (measure.Iteration.share). `cores`, CPU seconds over
wall-clock seconds, falls below `threads` where other programs had a share.
"""
from dataclasses import replace
from itertools import count
from statistics import median
from time import perf_counter, process_time

from measure import (
    Iteration, changed, command_line, machine, mean_lengths, new_policy, print_machine, reset_peak,
    timed, write_json)
import torch
from tqdm import tqdm

from lib.errors import run_main
from lib.settings import load
from lib.training import peak_memory
from policy import Answer
from rollout import training_seeds

ROUNDS = 3  # after one to warm up
SINGLE_TURNS = 24  # of one at a time, ppo.turns in each episode, so that prompts grow alike
RATIOS = (  # turns/s of ours over those of: way, phases whose seconds count, at least wanted
    ("one at a time", ("rollout",), 10),
    ("one at a time", ("rollout", "update"), 5),
    ("bare generate", ("rollout",), 0.85),
)


# ---------------------------------------------------------------- the three ways
class Library:
    """HF `generate` in place of Policy.sample, for Play."""

    def __init__(self, policy):
        self.policy = policy
        self.encode = policy.encode
        self.decode = policy.decode

    def sample(self, prompts, temperature, _generator):
        """Answers without log-probs and values, drawn from the global random state."""
        tokenizer = self.policy.tokenizer
        end = tokenizer.eos_token_id
        ids = {"input_ids": [prompt.ids for prompt in prompts]}
        batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
        width = batch["input_ids"].shape[1]  # T
        if prompts[0].image is not None:
            batch.update(self.image_inputs(prompts, batch["input_ids"]))
        rows = self.policy.base.generate(
            **batch.to(self.policy.device), max_new_tokens=self.policy.max_new_tokens,
            do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
        )  # (N, T + A), finished rows padded
        answers = []
        for row in rows[:, width:].tolist():  # (N, A)
            ids = row[:row.index(end) + 1] if end in row else row
            answers.append(Answer(ids, torch.zeros(len(ids)), 0.0))
        return answers

    def image_inputs(self, prompts, ids):
        """What MllamaProcessor adds for one image per prompt, encoded anew in every turn."""
        images = [[prompt.image] for prompt in prompts]
        pixels = self.policy.image_processor(images, return_tensors="pt")
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        inputs = {name: pixels[name] for name in names}
        image_token = self.policy.base.config.image_token_index
        seen = (ids == image_token).cumsum(1)  # (N, T), 1 from the image on
        tiles = inputs["aspect_ratio_mask"]  # (N, 1, tiles)
        inputs["cross_attention_mask"] = seen[:, :, None, None] * tiles[:, None]  # (N, T, 1, tiles)
        return inputs

    def rollout(self, plays, ppo):
        """Returns: the Turns of ppo.turns turns of one Play after the other."""
        turns = []
        for play in plays:
            for _ in range(ppo.turns):
                turns += play.answer_all(self, ppo.temperature, None)
        return turns


# Each takes a section ppo and the first episode's seed, and returns Turns, {phase: seconds}.
def one_at_a_time(iteration, ppo, seed):
    episodes = max(1, min(ppo.envs, SINGLE_TURNS // ppo.turns))
    plays = [iteration.play(1, count(seed + i, episodes)) for i in range(episodes)]
    turns, rollout = timed(Library(iteration.policy).rollout, plays, ppo)
    turns = [replace(turn, slot=i) for i, turn in enumerate(turns)]  # none are packed together
    single = changed(ppo, envs=len(turns), turns=1, micro_tokens=1)  # a pass each
    rewards = torch.tensor([turn.reward for turn in turns])  # for any advantages: the same work
    _, update = timed(iteration.update, (turns, rewards, rewards), single)
    return turns, {"rollout": rollout, "update": update}


def ours(iteration, ppo, seed):
    play = iteration.play(ppo.envs, count(seed))
    (batch, rollout), rollout_share = iteration.share(timed, iteration.rollout, play, ppo)
    (_, update), update_share = iteration.share(timed, iteration.update, batch, ppo)
    return batch[0], {"rollout": rollout, "update": update,
                      "rollout_share": rollout_share, "update_share": update_share}


def bare_generate(iteration, ppo, seed):
    play = iteration.play(ppo.envs, count(seed))
    turns, rollout = timed(Library(iteration.policy).rollout, [play], ppo)
    return turns, {"rollout": rollout}


WAYS = {"one at a time": one_at_a_time, "ours": ours, "bare generate": bare_generate}


# ---------------------------------------------------------------- figures
def measured(way, iteration, ppo, seed):
    """One way in one round. Returns: (its Turns, its record)."""
    device = iteration.policy.device
    reset_peak(device)
    began, cpu_began = perf_counter(), process_time()
    turns, seconds = WAYS[way](iteration, ppo, seed)
    cores = (process_time() - cpu_began) / (perf_counter() - began)
    return turns, {
        "turns": len(turns),
        **mean_lengths(turns),
        **seconds,
        "cores": cores,
        "peak": peak_memory(device),
    }


def speed(record, phases):
    """Turns/s of a way in a round."""
    return record["turns"] / sum(record[phase] for phase in phases)


def ratios_of(rounds):
    """{name of a ratio: its median, its rounds, what is wanted}."""
    ratios = {}
    for way, phases, wanted in RATIOS:
        pairs = zip(rounds["ours"], rounds[way])
        each = [speed(ours, phases) / speed(theirs, phases) for ours, theirs in pairs]
        name = f"{' + '.join(phases)}, ours / {way}"
        ratios[name] = {"median": median(each), "rounds": each, "wanted": wanted}
    return ratios


def environment_times(env, turns):
    """Median microseconds of the environment's `reset` and `step`, over real first attempts."""
    resets, steps = [], []
    for turn in turns * 10:
        if turn.info["attempt"] == 1:
            resets.append(timed(env.reset, turn.seed)[1])
            steps.append(timed(env.step, turn.text)[1])
    return {"reset": median(resets) * 1e6, "step": median(steps) * 1e6}


def report(result):
    """The table: medians over the rounds; prompt and answer are mean lengths in tokens."""
    print_machine(result)
    print(f"{'':<15}{'turns':>6}{'prompt':>8}{'answer':>8}{'rollout s':>11}{'turns/s':>9}"
          f"{'update s':>10}{'cores':>7}{'peak GiB':>10}")
    for way, records in result["rounds"].items():
        r = {key: median(record[key] for record in records) for key in records[0]}
        update = f"{r['update']:.2f}" if "update" in r else "-"
        print(f"{way:<15}{r['turns']:>6.0f}{r['prompt']:>8.1f}{r['answer']:>8.1f}"
              f"{r['rollout']:>11.2f}{speed(r, ['rollout']):>9.1f}{update:>10}"
              f"{r['cores']:>7.2f}{r['peak']:>10.2f}")
    for name, r in result["ratios"].items():
        verdict = "ok" if r["median"] >= r["wanted"] else "MISSED"
        print(f"{name:<40}{r['median']:>6.2f}x, rounds {min(r['rounds']):.2f} to "
              f"{max(r['rounds']):.2f}, at least {r['wanted']:g} wanted: {verdict}")
    for phase in ("rollout", "update"):
        shares = [record[f"{phase}_share"] for record in result["rounds"]["ours"]]
        print(f"{phase}: {median(shares):.0%} of the matmul rate")
    times = [f"{name} {value:.0f} us" for name, value in result["environment_us"].items()]
    print(f"environment: {', '.join(times)}")


def main(arguments):
    """Measure and print. arguments: of the command line, see above."""
    options = command_line(__doc__).parse_intermixed_args(arguments)
    cfg, raw, _ = load(options.settings)
    iteration = Iteration(new_policy(cfg), cfg)
    torch.manual_seed(cfg.run.seed)  # of HF generate
    first_seed = next(training_seeds(cfg.run.seed))
    rounds = {way: [] for way in WAYS}
    for number in tqdm(range(ROUNDS + 1), desc="rounds, the first to warm up", disable=None):
        ppo = cfg.ppo if number else changed(cfg.ppo, envs=2, turns=1)
        for way in WAYS:
            turns, record = measured(way, iteration, ppo, first_seed + number * 10_000)
            if number:
                rounds[way].append(record)
    result = {
        "config": raw,
        "machine": machine(iteration.policy.device),
        "rounds": rounds,
        "ratios": ratios_of(rounds),
        "environment_us": environment_times(iteration.env(), turns),
    }
    report(result)
    write_json(options.json, result)


if __name__ == "__main__":
    run_main(main)
