"""How fast a rollout and an update are, against one answer at a time and a bare batched `generate`.

    python tools/benchmark.py CONFIG.yaml [key=value ...] [--json FILE]

The configuration's policy (bare base, fresh LoRA) plays its environment in three ways:

one at a time   the official loop: HF `generate` with a batch of one, verify, repeat; then PPO
                with one turn per forward and backward pass, its whole prompt read anew. Its old
                log-probs and values, a second pass in the official code, are not timed.
ours            rollout (with log-probs, values and the bootstrap) and update of ppo.envs x
                ppo.turns turns, as rl.py does them.
bare generate   HF `generate` in batches of ppo.envs and the environments in lock-step, without
                log-probs, values and update: the speed limit of a simple library solution.

Turns/s are compared. Machines are noisy: rounds are interleaved (A B C A B C ...), each starts from
the same new hands for all three, a ratio is taken within a round and then the median over rounds.
Updates do the configured PPO, KL reference pass included, at learning rate 0, so that every round
meets the same policy. Answers are sampled: compare their mean lengths first. Seconds are
wall-clock; `cores`, CPU seconds over them, falls below `threads` where other programs had a share.
"""
import json
from dataclasses import replace
from itertools import count
from statistics import mean, median
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import NamedTuple

from measure import Iteration, Parser, changed, machine, reset_peak, timed
import torch
from tqdm import tqdm

from lib.settings import load, run_main
from lib.training import peak_memory
from policy import Answer, Policy
from rollout import training_seeds

ROUNDS = 3  # after one to warm up
SINGLE_TURNS = 24  # of one at a time, ppo.turns in each episode, so that prompts grow alike


class Ratio(NamedTuple):
    """Turns/s of ours over those of another way."""
    way: str
    phases: tuple  # whose seconds count
    wanted: float  # at least


RATIOS = (
    Ratio("one at a time", ("rollout",), 10),
    Ratio("one at a time", ("rollout", "update"), 5),
    Ratio("bare generate", ("rollout",), 0.85),
)


class Benchmark:
    """The three ways over one policy.

    Each takes (a section ppo, the first episode's seed) and returns (Turns, {phase: seconds}).
    """

    def __init__(self, cfg):
        self.policy = Policy(cfg.model, cfg.lora, cfg.ppo.value_hidden, cfg.ppo.value_detach,
                             cfg.run.seed)
        self.iteration = Iteration(self.policy, cfg)
        self.library = SimpleNamespace(encode=self.policy.encode, decode=self.policy.decode,
                                       sample=self.generate)  # a policy for Play

    def one_at_a_time(self, ppo, seed):
        episodes = max(1, min(ppo.envs, SINGLE_TURNS // ppo.turns))
        plays = [self.iteration.play(1, count(seed + i, episodes)) for i in range(episodes)]
        turns, rollout = self.timed(self.library_rollout, plays, ppo)
        turns = [replace(turn, slot=i) for i, turn in enumerate(turns)]  # none are packed together
        single = changed(ppo, envs=len(turns), turns=1, micro_tokens=1)  # a pass each
        batch = self.iteration.batch_of(turns, ppo)
        return turns, {"rollout": rollout, "update": self.update_seconds(batch, single, plays[0])}

    def ours(self, ppo, seed):
        play = self.iteration.play(ppo.envs, count(seed))
        batch, rollout = self.timed(self.iteration.rollout, play, ppo)
        return batch[0], {"rollout": rollout, "update": self.update_seconds(batch, ppo, play)}

    def bare_generate(self, ppo, seed):
        play = self.iteration.play(ppo.envs, count(seed))
        turns, rollout = self.timed(self.library_rollout, [play], ppo)
        return turns, {"rollout": rollout}

    def timed(self, function, *arguments):
        return timed(self.policy.device, function, *arguments)

    def update_seconds(self, batch, ppo, play):
        _, seconds = self.timed(self.iteration.update, batch, ppo, play.envs[0].answer_key)
        return seconds

    def library_rollout(self, plays, ppo):
        """ppo.turns turns of one Play after the other, answered by HF `generate`."""
        turns = []
        for play in plays:
            for _ in range(ppo.turns):
                turns += play.turn(self.library, ppo.temperature, None)
        return turns

    def generate(self, prompts, temperature, _generator):
        """In place of Policy.sample: HF `generate`, which draws from the global random state."""
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
            answers.append(Answer(ids, None, 0.0))
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


WAYS = {
    "one at a time": Benchmark.one_at_a_time,
    "ours": Benchmark.ours,
    "bare generate": Benchmark.bare_generate,
}


# ---------------------------------------------------------------- figures
def measured(bench, way, ppo, seed):
    """One way in one round. Returns: (its Turns, its record)."""
    reset_peak(bench.policy.device)
    began, cpu_began = perf_counter(), process_time()
    turns, seconds = WAYS[way](bench, ppo, seed)
    cores = (process_time() - cpu_began) / (perf_counter() - began)
    return turns, {
        "turns": len(turns),
        "prompt": mean(len(turn.prompt.ids) for turn in turns),
        "answer": mean(len(turn.answer) for turn in turns),
        **seconds,
        "cores": cores,
        "peak": peak_memory(bench.policy.device),
    }


def speeds(records, phases):
    """Turns/s of each round."""
    return [record["turns"] / sum(record[phase] for phase in phases) for record in records]


def ratios_of(rounds):
    """{name of a ratio: its median, its rounds, what is wanted}."""
    ratios = {}
    for way, phases, wanted in RATIOS:
        pairs = zip(speeds(rounds["ours"], phases), speeds(rounds[way], phases))
        each = [ours / theirs for ours, theirs in pairs]
        name = f"{' + '.join(phases)}, ours / {way}"
        ratios[name] = {"median": median(each), "rounds": each, "wanted": wanted}
    return ratios


def environment_times(env, turns):
    """Median microseconds of the environment's `reset` and `step`, over real first attempts."""
    cpu = torch.device("cpu")
    resets, steps = [], []
    for turn in turns * 10:
        if turn.info["attempt"] == 1:
            resets.append(timed(cpu, env.reset, turn.seed)[1])
            steps.append(timed(cpu, env.step, turn.text)[1])
    return {"reset": median(resets) * 1e6, "step": median(steps) * 1e6}


def report(result):
    """The table: medians over the rounds; prompt and answer are mean lengths in tokens."""
    facts = [f"{name} {value}" for name, value in result["machine"].items()]
    print(f"\n{', '.join(facts)}\n")
    print(f"{'':<15}{'turns':>6}{'prompt':>8}{'answer':>8}{'rollout s':>11}{'turns/s':>9}"
          f"{'update s':>10}{'cores':>7}{'peak GiB':>10}")
    for way, records in result["rounds"].items():
        r = {key: median(record[key] for record in records) for key in records[0]}
        speed = r["turns"] / r["rollout"]
        update = f"{r['update']:.2f}" if "update" in r else "-"
        print(f"{way:<15}{r['turns']:>6.0f}{r['prompt']:>8.1f}{r['answer']:>8.1f}"
              f"{r['rollout']:>11.2f}{speed:>9.1f}{update:>10}{r['cores']:>7.2f}{r['peak']:>10.2f}")
    for name, r in result["ratios"].items():
        verdict = "ok" if r["median"] >= r["wanted"] else "MISSED"
        print(f"{name:<40}{r['median']:>6.2f}x, rounds {min(r['rounds']):.2f} to "
              f"{max(r['rounds']):.2f}, at least {r['wanted']:g} wanted: {verdict}")
    times = [f"{name} {value:.0f} us" for name, value in result["environment_us"].items()]
    print(f"environment: {', '.join(times)}")


def main(arguments):
    options = Parser(__doc__).parse_intermixed_args(arguments)
    cfg, raw, _ = load(options.settings)
    bench = Benchmark(cfg)
    torch.manual_seed(cfg.run.seed)  # of HF generate
    first_seed = next(training_seeds(cfg.run.seed))
    rounds = {way: [] for way in WAYS}
    for number in tqdm(range(ROUNDS + 1), desc="rounds, the first to warm up", disable=None):
        ppo = cfg.ppo if number else changed(cfg.ppo, envs=2, turns=1)
        for way in WAYS:
            turns, record = measured(bench, way, ppo, first_seed + number * 10_000)
            if number:
                rounds[way].append(record)
    result = {
        "config": raw,
        "machine": machine(bench.policy.device),
        "rounds": rounds,
        "ratios": ratios_of(rounds),
        "environment_us": environment_times(bench.iteration.play(1, count()).envs[0], turns),
    }
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
