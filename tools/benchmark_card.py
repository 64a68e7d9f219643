"""Memory and speed of whole configurations on one GPU that is made to look like a smaller card.

    python tools/benchmark_card.py CONFIG.yaml [CONFIG.yaml ...] [key=value ...] [--json FILE]
                                   [--cap 24] [--turns N] [--batches 1,4,16,32,64] [--seconds 450]

Overrides (model.random_init=true) go to every configuration. Every figure is printed, and the JSON
written, as soon as it is measured. Running out of memory is a result (`failed`): the rest goes on.

--cap      GiB that PyTorch may hold. What CUDA and its libraries hold, `outside_gib`, comes on top:
           where that is 0.5, --cap 23.5 is a card of 24 GiB.
--turns    answers per environment in the PPO update, instead of ppo.turns, to save time. Peaks are
           then lower, as conversations have fewer turns; `seconds` of an update are scaled up.
--batches  rows at once in the sweep, which ends when memory does.
--seconds  of each configuration: what would begin later is `skipped`, what has begun goes on.

copy_gb_s  the card's own speed: 10^9 bytes read + written per second by copies of 1 GiB, median.
model      seconds to make the policy; weights_gib: all parameters as stored, 4-bit scales included.
sft        sft.train_step on one sft.sft_batch, whose making takes `data` seconds more.
ppo        rollout, then update, as rl.py does them, from new hands.
rollout    one batch of first attempts through Policy.sample, all rows at once, no optimiser.
  prefill  seconds to read the prompts and write one token, images included.
  step     seconds per further pass: those of whole answers, less those of a second prefill (which
           like them finds the images in the cache). Finished rows leave: late passes have fewer.
  tokens_per_s   sampled tokens over prefill + all further passes.
peak_gib is what tensors took at most (on a CPU: this process), reserved_gib what PyTorch held.
"""
import gc
import sys
from itertools import islice
from pathlib import Path
from statistics import mean, median
from time import perf_counter

from measure import (
    Iteration, changed, command_line, machine, new_policy, reset_peak, running_optimizer, timed,
    write_json)
import torch

import sft
from lib.errors import UserError, one_line, out_of_memory, run_main, within_memory
from lib.settings import load
from lib.training import peak_memory
from rollout import make_env, training_seeds

GIB = 2**30


# ---------------------------------------------------------------- the card
def card_of(device, cap):
    """Make a GPU as small as `cap` GiB. Returns: its size, and the speed of its copies."""
    card = {}
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
        card.update(total_gib=total, cap_gib=min(cap, total))
    source = torch.ones(GIB // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = [timed(target.copy_, source)[1] for _ in range(20)]
    card["copy_gb_s"] = 2 * source.nbytes / median(seconds) / 1e9
    return card


def peaks(device, prefix=""):
    """The most memory since reset_peak, and what others than PyTorch hold (CUDA, programs)."""
    figures = {f"{prefix}peak_gib": peak_memory(device)}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved(device)
        figures[f"{prefix}reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        figures[f"{prefix}outside_gib"] = outside / GIB
    return figures


def stored(parameter):
    """Bytes of a parameter as it lies in memory, scales and tables of a 4-bit one included."""
    tensors = [parameter]
    state = getattr(parameter, "quant_state", None)
    while state is not None:  # the scales of NF4 are quantised themselves: a state in the state
        tensors += [state.absmax, state.code, state.offset]
        state = getattr(state, "state2", None)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# ---------------------------------------------------------------- what is measured
# Each fills its record as it goes: what is known when memory runs out stays.
def measure_sft(record, policy, cfg):
    env = make_env(cfg.env, cfg.sft.mistakes + 1)
    seeds = list(islice(training_seeds(cfg.run.seed), cfg.sft.batch_size + 1))
    (first, *batch), record["data"] = timed(sft.sft_batch, policy, env, seeds, cfg.sft.mistakes)
    optimizer = running_optimizer(list(policy.trainable.values()))
    sft.train_step(policy, optimizer, [first], cfg.sft)  # the first passes load kernels: not timed
    reset_peak(policy.device)
    _, record["seconds"] = timed(sft.train_step, policy, optimizer, batch, cfg.sft)
    tokens = sum(len(sequence.ids) for sequence in batch)
    record.update(peaks(policy.device), answers=len(batch), tokens=tokens)


def measure_ppo(record, policy, cfg, turns):
    """One rollout and one update of rl.py: seconds and peaks, into the record."""
    device = policy.device
    ppo = changed(cfg.ppo, turns=turns)
    iteration = Iteration(policy, cfg)
    play = iteration.play(ppo.envs, training_seeds(cfg.run.seed))
    observation, _ = iteration.env().reset(0)
    policy.sample(policy.encode([observation]), ppo.temperature, iteration.sampler, 2)  # as above
    reset_peak(device)
    batch, rollout = timed(iteration.rollout, play, ppo)
    record.update(turns=turns, rollout_seconds=rollout, **peaks(device, "rollout_"))
    played, *_ = batch
    record.update(answers=len(played), sampled=sum(len(turn.answer) for turn in played),
                  prompt=mean(len(turn.prompt.ids) for turn in played))
    reset_peak(device)
    _, update = timed(iteration.update, batch, ppo)
    seconds = (rollout + update) * cfg.ppo.turns / turns
    record.update(update_seconds=update, seconds=seconds, **peaks(device, "update_"))


def measure_rollout(record, policy, cfg, rows):
    """One batch of first attempts: seconds to prefill and per step, tokens/s, peak."""
    env = make_env(cfg.env, cfg.ppo.verify_iters)
    seeds = islice(training_seeds(cfg.run.seed), rows)
    prompts = policy.encode([env.reset(seed)[0] for seed in seeds])

    def sample(limit):
        generator = torch.Generator(policy.device).manual_seed(0)
        return timed(policy.sample, prompts, cfg.ppo.temperature, generator, limit)

    policy.sample_tokens = sys.maxsize  # all rows at once
    reset_peak(policy.device)
    _, prefill = sample(1)
    _, prefill_again = sample(1)
    answers, whole = sample(None)
    lengths = [len(answer.ids) for answer in answers]
    decode = whole - prefill_again
    record.update(peaks(policy.device), tokens_per_s=sum(lengths) / (prefill + decode),
                  prefill=prefill, step=decode / max(1, max(lengths) - 1), sampled=sum(lengths),
                  prompt=mean(len(prompt.ids) for prompt in prompts))


def measured(end, function, policy, *arguments):
    """The record that the function fills, if it is not too late and memory suffices."""
    record = {}
    try:
        if perf_counter() > end:
            record["skipped"] = "no time left"
        else:
            function(record, policy, *arguments)
    except (RuntimeError, UserError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        record["failed"] = one_line(error)
    finally:  # the exception, and what its frames held, is gone by now
        for parameter in [*policy.trainable.values(), *policy.value_head.parameters()]:
            parameter.grad = None
        free_memory()
    return record


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()  # on a CPU: nothing


# ---------------------------------------------------------------- the run
class Log:
    """All figures, {configuration: {what: record}}, printed and written as they come."""

    def __init__(self, path):
        self.path = path
        self.results = {}

    def add(self, name, what, record):
        self.results.setdefault(name, {})[what] = record
        figures = []
        for key, value in record.items():
            figures.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        print(f"{name:<14}{what:<12}{', '.join(figures)}", flush=True)
        write_json(self.path, self.results)


def measure_all(log, name, cfg, options, device):
    """Everything of one configuration, until its time is up."""
    end = perf_counter() + options.seconds
    free_memory()  # of the policy before this one
    reset_peak(device)
    with within_memory("loading the model", cfg):
        policy, seconds = timed(new_policy, cfg)
    weights = sum(stored(parameter) for parameter in policy.base.parameters()) / GIB
    log.add(name, "model", {"seconds": seconds, "weights_gib": weights, **peaks(device)})
    turns = min(options.turns or cfg.ppo.turns, cfg.ppo.turns)
    log.add(name, "sft", measured(end, measure_sft, policy, cfg))
    log.add(name, "ppo", measured(end, measure_ppo, policy, cfg, turns))
    for rows in options.batches.split(","):
        record = measured(end, measure_rollout, policy, cfg, int(rows))
        log.add(name, f"rollout {rows}", record)
        if "step" not in record:
            break


def main(arguments):
    """Measure and print. arguments: of the command line, see above."""
    parser = command_line(__doc__)
    parser.add_argument("--cap", type=float, default=24.0)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--batches", default="1,4,16,32,64")
    parser.add_argument("--seconds", type=float, default=150.0)
    options = parser.parse_intermixed_args(arguments)
    overrides = [setting for setting in options.settings if "=" in setting]
    paths = [setting for setting in options.settings if "=" not in setting]
    loaded = {path: load([path, *overrides]) for path in paths}

    wanted = [cfg.model.device for cfg, _, _ in loaded.values()]
    on_gpu = torch.cuda.is_available() and "cpu" not in wanted
    device = torch.device("cuda" if on_gpu else "cpu")
    log = Log(options.json)
    log.add("", "machine", machine(device))
    log.add("", "card", card_of(device, options.cap))
    for path, (cfg, raw, _) in loaded.items():
        name = "/".join(Path(path).with_suffix("").parts[-2:])
        log.results[name] = {"config": raw}
        measure_all(log, name, cfg, options, device)


if __name__ == "__main__":
    run_main(main)
