"""Our PPO loop against TRL's GRPOTrainer: seconds for the same number of answers and steps.

    python tools/compare_trl.py CONFIG.yaml [key=value ...] [--json FILE]
                                [--rounds N] [--rows N] [--cases first,revision,conversation]

trl is no requirement of this repository and nothing is installed here: see MISSING. For a
configuration without images. Both train on ppo.envs x ppo.turns answers (256), in ppo.epochs passes
and minibatches of ppo.minibatch answers (12 optimiser steps), sampling included, in three cases:

first        prompts of the first attempt, of answers / GROUP hands, each prompt GROUP times
revision     the same after FAILURES wrong answers (the environment's `mistake`) and verifier texts
conversation ours plays ppo.envs conversations of ppo.turns answers, as rl.py does; TRL answers
             every GROUP-th of the very prompts that came up there, GROUP times

The same for both: the bare base in cfg.model's dtype and quantisation, read by its own transformers
class with the tokenizer alone (Mllama takes text without an image), sdpa attention; a fresh LoRA of
cfg.lora (B = 0, so both are one policy) in fp32; learning rate 0, AdamW, gradient clipping, PPO's
clipping; prompts (first, revision), temperature without top-k or top-p, longest answer, verifier;
ppo.kl_coef: a pass for the log-probs of a reference, here the start's; entropy is read; no gradient
checkpointing; one thread, flush-to-zero.

What differs: ours reads values (at the last prompt token, in sampling and in each pass) and learns
them, GRPO has none and takes advantages from a group. TRL makes old log-probs by a pass of its own,
ours are those of sampling. TRL's reference is the base without adapter, ours the start's weights.
Ours merges LoRA into dense weights, sorts answers by length into batches of ppo.micro_tokens padded
tokens, samples at most model.sample_tokens at a time, drops finished rows. TRL generates all
answers in one batch and trains on --rows at a time, padded to the longest of all. In
`conversation` ours learns an episode's answers in one sequence, and reads each unfinished one
once more for its value; TRL cannot, so an answer is a row with its whole prompt. There minibatches
of ours hold whole conversations, so that steps may be fewer.

Seconds are CPU seconds: with one thread those of an idle core, even where other programs have a
share of it; `wall` is by the clock. Ratios are TRL's seconds / ours, taken within a round and then
the median over rounds; rounds are interleaved, each on new hands, after a short one to warm up.
Sampling: prompts as ids, generate, text; ours has the verifier and the values in it. Update: all
the rest. Answers are sampled: compare their mean lengths first. A TRL trainer is made anew in each
round; the clock runs from the begin of its first step to the end of its last.
"""
import os
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, count, repeat
from statistics import mean, median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

from measure import (
    Iteration, changed, command_line, machine, mean_lengths, new_policy, print_machine, write_json)
import torch
from peft import LoraConfig
from tqdm import tqdm
from transformers import TrainerCallback

from lib.errors import UserError, run_main
from lib.families import family_of
from lib.loading import load_base
from lib.settings import load
from rollout import Play, make_env, training_seeds

MISSING = ("tools/compare_trl.py needs trl, which requirements.txt leaves out: pip install "
           "trl==1.16.0 into a virtual environment of its own")
GROUP = 4  # answers per prompt, GRPO's num_generations
FAILURES = 3  # failed attempts in a revision prompt
CASES = {"first": 1.5, "revision": 3.0, "conversation": None}  # ratio wanted of seconds in all
PHASES = ("sampling", "update", "all", "wall")  # the last by the clock, of all


def cpu_timed(function, *arguments):
    """What the function returns and its CPU seconds."""
    began = process_time()
    result = function(*arguments)
    return result, process_time() - began


def seconds_of(sampling, both, wall):
    """The PHASES of a record."""
    return {"sampling": sampling, "update": both - sampling, "all": both, "wall": wall}


# ---------------------------------------------------------------- prompts
class Revised:
    """An environment whose episodes begin after failed attempts and end with the next answer."""

    def __init__(self, settings, failures):
        self.env = make_env(settings, failures + 1)
        self.failures = failures

    def reset(self, seed, progress=0.0):
        observation, info = self.env.reset(seed, progress)
        for _ in range(self.failures):
            observation, _, _, _, info = self.env.step(self.env.mistake())
        return observation, info

    def step(self, answer):
        return self.env.step(answer)


class Recorded(Play):
    """Remembers what was asked: (seed, answers so far, messages) of each turn."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.asked = []

    def answer_all(self, *arguments):
        for episode in self.episodes:
            messages = episode.observation["messages"]
            self.asked.append((episode.seed, list(episode.answers), messages))
        return super().answer_all(*arguments)


def in_groups(seeds, answers, group):
    """The next seeds for so many answers, each `group` times: s s t t u u."""
    return list(chain.from_iterable(repeat(next(seeds), group) for _ in range(answers // group)))


def thinned(asked, group):
    """Every group-th of the turns, taken in the order of their prompts' lengths."""
    def length(turn):
        return sum(len(message["content"]) for message in turn[2])
    return sorted(asked, key=length)[group // 2::group]


# ---------------------------------------------------------------- ours
def ours(iteration, play, ppo):
    """One rollout and one update. Returns: the record of the round."""
    steps = []
    hook = iteration.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    began = perf_counter()
    batch, sampling = cpu_timed(iteration.rollout, play, ppo)
    _, update = cpu_timed(iteration.update, batch, ppo)
    wall = perf_counter() - began
    hook.remove()
    turns = batch[0]
    return {
        "answers": len(turns),
        "steps": len(steps),
        **mean_lengths(turns),
        **seconds_of(sampling, sampling + update, wall),
    }


# ---------------------------------------------------------------- TRL
class Clock(TrainerCallback):
    """Wall-clock and CPU seconds from the first step's begin to the last step's end."""

    def __init__(self):
        self.began = None

    def on_step_begin(self, *_, **__):
        if self.began is None:
            self.began = perf_counter(), process_time()

    def on_step_end(self, *_, **__):
        self.wall = perf_counter() - self.began[0]
        self.cpu = process_time() - self.began[1]


def grpo_settings(cfg, answers, rows, folder):
    """Keyword arguments of GRPOConfig that do what cfg.ppo does. rows: of a forward pass."""
    ppo = cfg.ppo
    return {
        "output_dir": folder, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "dataloader_pin_memory": False, "seed": cfg.run.seed,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": ppo.minibatch // rows,
        "steps_per_generation": answers // rows,
        "num_generations": GROUP,
        "num_iterations": ppo.epochs,
        "max_steps": ppo.epochs * answers // ppo.minibatch,
        "learning_rate": 0.0, "weight_decay": 0.0, "adam_epsilon": ppo.adam_eps,
        "max_grad_norm": ppo.max_grad_norm,
        "epsilon": ppo.clip, "beta": ppo.kl_coef,
        "importance_sampling_level": "sequence" if ppo.ratio == "turn" else "token",
        "temperature": ppo.temperature, "top_k": 0, "top_p": 1.0,
        "max_completion_length": cfg.model.max_new_tokens,
    }


def adapter(cfg, base):
    """LoRA on the layers that add_lora takes."""
    parts = family_of(base.config).parts
    tuned = "|".join(parts[part] for part in cfg.model.tune)
    return LoraConfig(r=cfg.lora.r, lora_alpha=cfg.lora.alpha, lora_dropout=0.0,
                      target_modules=f"(?={tuned})({cfg.lora.target_modules})")


def grading(settings, verify_iters):
    """A reward function for TRL: each completion graded after the attempts before it."""
    env = make_env(settings, verify_iters)

    def reward(completions, seed, attempts, **_):
        rewards = []
        for completion, start, before in zip(completions, seed, attempts):
            env.reset(start)
            for answer in before:
                env.step(answer)
            rewards.append(env.step(completion[0]["content"])[1])
        return rewards
    return reward


def new_trainer(cfg, asked, rows, folder):
    """A GRPOTrainer that notes what sampling took and how long prompts and answers were.

    Args: asked: (seed, answers so far, messages) of each prompt.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            found, self.sampling = cpu_timed(super()._generate, prompts)
            prompts, answers, *_ = found
            self.lengths = [mean(map(len, prompts)), mean(map(len, answers))]
            self.answers = len(answers)
            return found

    loaded = load_base(cfg.model, torch.device("cpu"))
    rows_of_data = [{"prompt": messages, "seed": seed, "attempts": attempts}
                    for seed, attempts, messages in asked]
    settings = grpo_settings(cfg, len(asked) * GROUP, rows, folder)
    trainer = Timed(
        model=loaded.base, args=GRPOConfig(**settings), peft_config=adapter(cfg, loaded.base),
        train_dataset=Dataset.from_list(rows_of_data), processing_class=loaded.tokenizer,
        reward_funcs=grading(cfg.env, cfg.ppo.verify_iters))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL would have adapters of a 4-bit base in bfloat16
            parameter.data = parameter.data.float()
    return trainer


def trl(cfg, asked, rows):
    """One generation and all steps on it. Returns: the record of the round."""
    clock = Clock()
    with TemporaryDirectory() as folder:
        trainer = new_trainer(cfg, asked, rows, folder)
        trainer.add_callback(clock)
        trainer.train()
    return {
        "answers": trainer.answers,
        "steps": trainer.state.global_step,
        "prompt": trainer.lengths[0],
        "answer": trainer.lengths[1],
        **seconds_of(trainer.sampling, clock.cpu, clock.wall),
    }


# ---------------------------------------------------------------- rounds
def prompts_of(settings, failures, seeds):
    """(seed, failed answers, messages) of the episodes that Revised begins."""
    asked = []
    for seed in seeds:
        observation, _ = Revised(settings, failures).reset(seed)
        messages = observation["messages"]
        attempts = [m["content"] for m in messages if m["role"] == "assistant"]
        asked.append((seed, attempts, messages))
    return asked


def one_round(case, iteration, cfg, answers, rows, seed):
    """Both on one case. Returns: (our record, TRL's)."""
    if case == "conversation":
        ppo = changed(cfg.ppo, envs=answers // cfg.ppo.turns)
        envs = [iteration.env() for _ in range(ppo.envs)]
        play = Recorded(envs, count(seed), spread=True)
        play.burn_in(iteration.policy, ppo.verify_iters - 1, ppo.temperature, iteration.sampler)
        play.asked.clear()
        record = ours(iteration, play, ppo)
        return record, trl(cfg, thinned(play.asked, GROUP), rows)
    failures = FAILURES if case == "revision" else 0
    seeds = in_groups(count(seed), answers, GROUP)
    play = Play([Revised(cfg.env, failures) for _ in seeds], iter(seeds))
    record = ours(iteration, play, changed(cfg.ppo, envs=answers, turns=1))
    return record, trl(cfg, prompts_of(cfg.env, failures, seeds[::GROUP]), rows)


def ratios_of(rounds):
    """{phase: {median, rounds}} of TRL's seconds / ours. rounds: {"ours": records, "trl": same}."""
    ratios = {}
    for phase in PHASES:
        each = [trl[phase] / ours[phase] for ours, trl in zip(rounds["ours"], rounds["trl"])]
        ratios[phase] = {"median": median(each), "rounds": each}
    return ratios


def report(result):
    """The table: medians over the rounds; prompt and answer are mean lengths in tokens."""
    print_machine(result)
    keys = ("answers", "steps", "prompt", "answer", *PHASES)
    print(f"{'':<20}" + "".join(f"{key:>10}" for key in keys))
    for case, found in result["cases"].items():
        for way, records in found["rounds"].items():
            figures = [median(record[key] for record in records) for key in keys]
            print(f"{case + ', ' + way:<20}" + "".join(f"{figure:>10.4g}" for figure in figures))
        ratios = found["ratios"]
        medians = "".join(f"{ratios[phase]['median']:>9.2f}x" for phase in PHASES)
        print(f"{'TRL / ours':<20}{'':40}{medians}")
        print(f"{'':<20}{spread_of(ratios['all'], found['wanted'])}")


def spread_of(ratio, wanted):
    """Text: what a ratio was in the rounds, and whether that is what was wanted (None: nothing)."""
    text = f"all: rounds {min(ratio['rounds']):.2f} to {max(ratio['rounds']):.2f}"
    if wanted is None:
        return text
    verdict = "ok" if ratio["median"] >= wanted else "MISSED"
    return f"{text}, at least {wanted:g} wanted: {verdict}"


def main(arguments):
    """Measure and print. arguments: of the command line, see above."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64, help="of TRL's forward passes")
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_intermixed_args(arguments)
    if find_spec("trl") is None:
        raise UserError(MISSING)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cfg, raw, _ = load(options.settings)
    iteration = Iteration(new_policy(cfg), cfg)
    first_seed = next(training_seeds(cfg.run.seed))
    cases = {case: {"wanted": CASES[case], "rounds": {"ours": [], "trl": []}}
             for case in options.cases.split(",")}
    facts = {**machine(iteration.policy.device), "trl": version("trl"),
             "accelerate": version("accelerate")}
    result = {"config": raw, "machine": facts, "rows": options.rows, "cases": cases}
    for number in tqdm(range(options.rounds + 1), desc="rounds, one to warm up", disable=None):
        answers = cfg.ppo.envs * cfg.ppo.turns if number else cfg.ppo.minibatch
        for place, (case, found) in enumerate(cases.items()):
            seed = first_seed + number * 10_000 + place * 1000
            records = one_round(case, iteration, cfg, answers, options.rows, seed)
            if number:
                for way, record in zip(("ours", "trl"), records):
                    found["rounds"][way].append(record)
                found["ratios"] = ratios_of(found["rounds"])
                write_json(options.json, result)  # a busy machine may not come to the end
    report(result)


if __name__ == "__main__":
    run_main(main)
