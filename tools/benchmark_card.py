"""Memory and speed of whole configurations on one GPU that is made to look like a smaller card.

    python tools/benchmark_card.py CONFIG.yaml [CONFIG.yaml ...] [key=value ...] [--json FILE] [--cap 24] [--turns N]
                                   [--batches 1,4,16,32,64] [--seconds 450]

Overrides (model.random_init=true) go to every configuration. Successive ones share a model if they differ in no key of
model (sample_tokens apart), lora, ppo.value_* and run.seed. Every figure is printed, and the JSON written, as soon as it
is measured. Running out of memory is a result (`failed`): the rest goes on.

--cap      GiB that PyTorch may hold. What CUDA and its libraries hold, `outside_gib`, comes on top: where that is 0.5,
           --cap 23.5 is a card of 24 GiB.
--turns    answers per table in the PPO update, instead of ppo.turns, to save time. In the table, seconds per update are
           then scaled up, and marked ~ like the peaks, which are lower where conversations have fewer turns.
--batches  rows at once in the sweep, which ends when memory does.
--seconds  each configuration gets an equal share of what is left of them; what would begin later is `skipped`. What has
           begun is not stopped: an update takes as long as it takes (--turns).

copy_gb_s  the card's own speed: 10^9 bytes read + written per second by copies of 1 GiB on the device, median.
model      seconds to make the policy; weights_gib: all parameters as stored, scales of 4-bit ones included;
           allocated_gib: what PyTorch holds then.
sft        sft.train_step on one sft.sft_batch, whose making takes `data` seconds more.
ppo        rl.rollout, then rl.update, as shipped, from new hands. before_gib and after_gib, what PyTorch holds before and
           after the rollout, are equal if it leaves no key/value cache and no image behind.
           sft and ppo have AdamW at learning rate 0 (all meet the same policy), its moments and the last step's gradients
           already there, as in the middle of a run.
rollout    one batch of first attempts through Policy.sample, all rows at once; peaks without an optimiser.
  prefill    seconds to read the prompts and write one token, image preparation and vision tower included.
  step       seconds per further pass: those of whole answers, less those of a second prefill (which finds the images in
             the policy's cache just as the whole answers do). Finished rows leave, so late passes have fewer.
  tokens_per_s   sampled tokens over prefill + all further passes.
  step_gb    10^9 bytes that a further pass reads at least, on average: each weight as stored, once (without embedding
             table, vision tower and projector; without the cross-attention layers if there is no image, else without their
             key and value projections, which the cache replaces; merged layers count dense, LoRA in model.dtype), and every row's keys and
             values, as large as the cache really is, less the padding of text. token_gb: the same per sampled token.
  share      step_gb / step as a share of `copy_gb_s`.
  dense_gb, dense_share   the same if bitsandbytes writes and reads a copy in model.dtype of every 4-bit weight in passes
             of two rows or more. It chooses by layer, card and rows (fused for few): the truth is between the two.
peak_gib is what tensors took at most (on a CPU: this process), reserved_gib what PyTorch held for them.
"""
import gc
import json
import platform
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from types import SimpleNamespace

from benchmark import json_file, machine, reset_peak, timed  # puts the repository root on sys.path
import torch
from tqdm import tqdm

import rl
import sft
from lib.runs import write_atomic
from lib.settings import UserError, load, out_of_memory, run_main
from rollout import Play, make_env, training_seeds
from lib.training import peak_memory
from policy import Policy

GIB = 2**30


def copy_speed(device):
    """Bytes read + written per second by copies on the device: median of 9 runs of 10."""
    source = torch.ones(GIB if device.type == "cuda" else GIB // 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(device, lambda: [target.copy_(source) for _ in range(10)])[1] for _ in range(10)]
    return 10 * 2 * source.numel() / median(seconds[1:])


# ---------------------------------------------------------------- memory
def allocated(device):
    """GiB in tensors now; None on a CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else None


def peaks(device, prefix=""):
    """The most memory since reset_peak, and what is held outside PyTorch: by CUDA (and by other programs, if any)."""
    figures = {"peak_gib": peak_memory(device)}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        figures.update(reserved_gib=torch.cuda.max_memory_reserved(device) / GIB,
                       outside_gib=(total - free - torch.cuda.memory_reserved(device)) / GIB)
    return {prefix + name: value for name, value in figures.items()}


def stored(parameter):
    """Bytes of a parameter as it lies in memory, scales and tables of a 4-bit one included."""
    state = getattr(parameter, "quant_state", None)
    tensors = [parameter] + [t for s in (state, getattr(state, "state2", None)) if s is not None
                             for t in (s.absmax, s.code, s.offset) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def weights_read(policy, model, image):
    """Bytes of weights that a decoding pass reads: (as stored, more if every 4-bit weight is written and read dense)."""
    base, width, merged = policy.base, getattr(torch, model.dtype).itemsize, model.merge_for_sampling
    read = re.compile(rf"language_model\.(?!layers\.({'|'.join(map(str, crossed(policy)))})\." + r"cross_attn\.[kv]_" * image
                      + ")|^lm_head")
    table, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    least = dense = 0
    for name, parameter in base.named_parameters():
        if not read.search(name) or (parameter is table and table is not head) or (merged and ".lora_" in name):
            continue
        state = getattr(parameter, "quant_state", None)
        size = width * (state.shape if state else parameter.shape).numel()
        if ".lora_" in name or (merged and name.endswith(".base_layer.weight")):
            least += size
        else:
            least, dense = least + stored(parameter), dense + (2 * size if state else 0)
    return least, dense


def crossed(policy):
    """Indices of the layers that attend to the image alone."""
    return getattr(policy.base.config.get_text_config(), "cross_attention_layers", ())


@contextmanager
def watched(policy, sizes):
    """Append to `sizes`, for each pass of the language model, the bytes of keys and values that each layer then has."""
    def look(module, arguments, output):
        layers = enumerate(output.past_key_values.layers)
        sizes.append({i: 2 * x.keys.numel() * x.keys.element_size() for i, x in layers if x.keys is not None})

    hook = policy.base.model.language_model.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()


# ---------------------------------------------------------------- what is measured; each fills its record of the JSON
def running_optimizer(parameters, eps=1e-8):
    """AdamW that changes nothing, with moments and gradients in place: the memory of a run under way."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, eps=eps, weight_decay=0.0)
    optimizer.step()
    return optimizer


def measure_sft(record, policy, cfg):
    env, seeds = make_env(cfg.env, cfg.sft.mistakes + 1), training_seeds(cfg.run.seed)
    (first, *batch), record["data"] = timed(policy.device, sft.sft_batch, policy, env,
                                            list(islice(seeds, cfg.sft.batch_size + 1)), cfg.sft.mistakes)
    optimizer = running_optimizer(list(policy.trainable.values()))
    sft.train_step(policy, optimizer, [first], cfg.sft)  # the first passes of a process load kernels: not timed
    reset_peak(policy.device)
    record["seconds"] = timed(policy.device, sft.train_step, policy, optimizer, batch, cfg.sft)[1]
    record.update(peaks(policy.device), answers=len(batch), tokens=sum(len(s.ids) for s in batch))


def measure_ppo(record, policy, cfg, turns):
    ppo, device = SimpleNamespace(**{**vars(cfg.ppo), "turns": turns}), policy.device
    play = Play([make_env(cfg.env, ppo.verify_iters) for _ in range(ppo.envs)], training_seeds(cfg.run.seed))
    start = policy.snapshot() if ppo.kl_coef else None
    optimizer = running_optimizer([*policy.trainable.values(), *policy.value_head.parameters()], ppo.adam_eps)
    sampler, shuffler = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
    first = policy.encode([make_env(cfg.env, ppo.verify_iters).reset(0)[0]])
    policy.sample(first, ppo.temperature, sampler, 2)  # loads kernels, as above
    reset_peak(device)
    record.update(turns=turns, scale=cfg.ppo.turns / turns, before_gib=allocated(device))
    batch, seconds = timed(device, rl.rollout, policy, play, ppo, sampler, tqdm(disable=True))
    record.update(after_gib=allocated(device), rollout_seconds=seconds, **peaks(device, "rollout_"), answers=len(batch[0]),
                  sampled=sum(len(t.answer) for t in batch[0]), prompt=mean(len(t.prompt.ids) for t in batch[0]))
    reset_peak(device)
    _, seconds = timed(device, rl.update, policy, optimizer, *batch, ppo, play.envs[0].answer_key, start, shuffler)
    record.update(update_seconds=seconds, **peaks(device, "update_"))


def measure_rollout(record, policy, cfg, copy):
    env, seeds = make_env(cfg.env, cfg.ppo.verify_iters), islice(training_seeds(cfg.run.seed), record["rows"])
    prompts, sizes = policy.encode([env.reset(seed)[0] for seed in seeds]), []
    sample = lambda limit: timed(policy.device, policy.sample, prompts, cfg.ppo.temperature,  # noqa: E731
                                 torch.Generator(policy.device).manual_seed(0), limit)
    reset_peak(policy.device)
    with watched(policy, sizes):
        _, prefill = sample(1)
    (_, again), (answers, whole) = sample(1), sample(None)
    record.update(peaks(policy.device))
    lengths, widest = sorted(len(answer.ids) for answer in answers), max(len(prompt.ids) for prompt in prompts)
    sampled, passes, shared = sum(lengths), max(1, lengths[-1] - 1), [1, *lengths][-2] - 1  # shared by two rows or more
    weights, dense = weights_read(policy, cfg.model, prompts[0].image is not None)
    picture = sum(sizes[0].get(layer, 0) for layer in crossed(policy)) / len(prompts)  # bytes of a row
    token = (sum(sizes[0].values()) / len(prompts) - picture) / widest  # bytes of a token of it in all other layers
    least = passes * weights + sum(picture + token * (len(p.ids) + t) for p, a in zip(prompts, answers)
                                   for t in range(1, len(a.ids)))  # the rows that still write
    most, step = least + shared * dense, (whole - again) / passes
    record.update(tokens_per_s=sampled / (prefill + whole - again), prefill=prefill, step=step, sampled=sampled,
                  prompt=mean(len(p.ids) for p in prompts), step_gb=least / passes / 1e9, token_gb=least / sampled / 1e9,
                  share=least / passes / step / copy, dense_gb=most / passes / 1e9, dense_share=most / passes / step / copy)


# ---------------------------------------------------------------- the run
def build(cfg, device):
    """The policy and its record. Raises: UserError if --cap has no room for it."""
    gc.collect()  # the policy before it
    torch.cuda.empty_cache()
    reset_peak(device)
    try:
        policy, seconds = timed(device, Policy, cfg.model, cfg.lora, cfg.ppo.value_hidden, cfg.ppo.value_detach,
                                cfg.run.seed)
    except torch.OutOfMemoryError:
        raise UserError("the model alone does not fit into --cap") from None
    return policy, {"seconds": seconds, "weights_gib": sum(map(stored, policy.base.parameters())) / GIB, **peaks(device),
                    "allocated_gib": allocated(device), "trainable": sum(p.numel() for p in policy.trainable.values())}


def attempt(function, end, record, policy, *arguments):
    """Measure, if it is not too late; what runs out of memory, or loses its numbers, says so and leaves nothing behind."""
    if perf_counter() > end:
        record["skipped"] = "no time left"
        return
    try:
        function(record, policy, *arguments)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        record["failed"] = "out of memory"
    except UserError as error:
        record["failed"] = str(error)
    finally:  # the exception, and what its frames held, is gone by now
        for parameter in [*policy.trainable.values(), *policy.value_head.parameters()]:
            parameter.grad = None
        gc.collect()
        torch.cuda.empty_cache()  # of a CPU: nothing


def table(configs):
    """One line per configuration: GiB (peaks of the PPO update's two phases and of the SFT step), seconds, best batch."""
    head = ("weights", "rollout", "update", "SFT GiB", "s/update", "turns", "SFT s", "tok/s", "rows", "share", "dense")
    print(f"\n{'':<14}" + "".join(f"{name:>9}" for name in head))
    for name, r in configs.items():
        best = max((row for row in r["rollout"] if "share" in row), key=lambda row: row["tokens_per_s"], default={})
        ppo, scale = r["ppo"], r["ppo"].get("scale", 1)
        seconds = (ppo["rollout_seconds"] + ppo["update_seconds"]) * scale if "update_seconds" in ppo else None
        mark = "~" if scale > 1 else ""
        cells = ((r["model"]["weights_gib"], ".2f", ""), (ppo.get("rollout_peak_gib"), ".2f", mark),
                 (ppo.get("update_peak_gib"), ".2f", mark), (r["sft"].get("peak_gib"), ".2f", ""), (seconds, ".1f", mark),
                 (ppo["answers"] * scale if "answers" in ppo else None, ".0f", ""), (r["sft"].get("seconds"), ".1f", ""),
                 (best.get("tokens_per_s"), ",.0f", ""), (best.get("rows"), "d", ""), (best.get("share"), ".1%", ""),
                 (best.get("dense_share"), ".1%", ""))
        print(f"{name:<14}" + "".join(f"{'-' if x is None else sign + format(x, form):>9}" for x, form, sign in cells))


class Parser(ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help explains")


def rows(text):
    return sorted({int(number) for number in text.split(",")})


def parse(arguments):
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("settings", nargs="+", metavar="CONFIG.yaml | key=value")
    for name, kind, default in (("json", json_file, None), ("cap", float, 24.0), ("turns", int, None),
                                ("batches", rows, [1, 4, 16, 32, 64]), ("seconds", float, 450.0)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    options = parser.parse_intermixed_args(arguments)
    if not all(number is None or number > 0 for number in (options.cap, options.turns, options.seconds, *options.batches)):
        raise UserError("--cap, --turns, --batches and --seconds must be more than 0")
    return options


def main(arguments):
    options = parse(arguments)
    overrides, paths = ([a for a in options.settings if ("=" in a) is given] for given in (True, False))
    loaded = {"/".join(Path(path).with_suffix("").parts[-2:]): load([path, *overrides])[:2] for path in paths or ["-"]}
    device = torch.device("cuda" if torch.cuda.is_available() and [*loaded.values()][0][0].model.device != "cpu" else "cpu")
    deadline, policy, kept = perf_counter() + options.seconds, None, None
    results = {"machine": {**machine(device), "python": platform.python_version(), "cuda": torch.version.cuda},
               "card": {}, "configs": {}}
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * GIB / total))
        results["card"].update(total_gib=total / GIB, cap_gib=min(options.cap, total / GIB))
    results["card"]["copy_gb_s"] = copy_speed(device) / 1e9

    def say(name, what, record):
        figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
        print(f"{name:<14}{what:<9}{figures}", flush=True)
        if options.json:
            write_atomic(options.json, json.dumps(results, indent=1) + "\n")

    for what in ("machine", "card"):
        say("", what, results[what])
    for index, (name, (cfg, raw)) in enumerate(loaded.items()):
        end = perf_counter() + (deadline - perf_counter()) / (len(loaded) - index)
        shape = {**raw["model"], "sample_tokens": 0}, raw["lora"], cfg.ppo.value_hidden, cfg.ppo.value_detach, cfg.run.seed
        if shape != kept:
            policy = None  # the old one goes before the new one comes
            (policy, model), kept = build(cfg, device), shape
        r = results["configs"][name] = {"config": raw, "model": model, "sft": {}, "ppo": {},
                                        "rollout": [{"rows": n} for n in options.batches]}
        say(name, "model", model)
        for function, record, *more in (
                (measure_sft, r["sft"]), (measure_ppo, r["ppo"], min(options.turns or cfg.ppo.turns, cfg.ppo.turns)),
                *((measure_rollout, row, results["card"]["copy_gb_s"] * 1e9) for row in r["rollout"])):
            policy.sample_tokens = sys.maxsize if function is measure_rollout else cfg.model.sample_tokens
            attempt(function, end, record, policy, cfg, *more)
            say(name, function.__name__[8:], record)
            if function is measure_rollout and "share" not in record:
                break
    table(results["configs"])


if __name__ == "__main__":
    run_main(main)
