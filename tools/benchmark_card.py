"""Memory and speed of whole configurations on one GPU that is made to look like a smaller card.

    python tools/benchmark_card.py CONFIG.yaml [CONFIG.yaml ...] [key=value ...] [--json FILE]
                                   [--cap 24] [--turns N] [--batches 1,4,16,32,64] [--seconds 450]

Overrides (model.random_init=true) go to every configuration. Successive ones share a model if they
differ in no key of model (sample_tokens apart), lora, ppo.value_* and run.seed. Every figure is
printed, and the JSON written, as soon as it is measured. Running out of memory is a result
(`failed`): the rest goes on.

--cap      GiB that PyTorch may hold. What CUDA and its libraries hold, `outside_gib`, comes on top:
           where that is 0.5, --cap 23.5 is a card of 24 GiB.
--turns    answers per environment in the PPO update, instead of ppo.turns, to save time. In the
           table, seconds per update are then scaled up, and marked ~ like the peaks, which are
           lower where conversations have fewer turns.
--batches  rows at once in the sweep, which ends when memory does.
--seconds  each configuration gets an equal share of what is left of them; what would begin later is
           `skipped`. What has begun is not stopped: an update takes as long as it takes (--turns).

copy_gb_s  the card's own speed: 10^9 bytes read + written per second by copies of 1 GiB, median.
model      seconds to make the policy; weights_gib: all parameters as stored, scales of 4-bit ones
           included; allocated_gib: what PyTorch holds then.
sft        sft.train_step on one sft.sft_batch, whose making takes `data` seconds more.
ppo        rollout, then update, as rl.py does them, from new hands. before_gib and after_gib, what
           PyTorch holds before and after the rollout, are equal if it leaves nothing behind.
rollout    one batch of first attempts through Policy.sample, all rows at once, no optimiser.
  prefill  seconds to read the prompts and write one token, image preparation and vision tower
           included.
  step     seconds per further pass: those of whole answers, less those of a second prefill (which
           finds the images in the policy's cache just as the whole answers do). Finished rows
           leave, so late passes have fewer.
  tokens_per_s   sampled tokens over prefill + all further passes.
  step_gb  10^9 bytes that a further pass reads at least, on average: each weight as stored, once
           (see `weights_read`), and every row's keys and values, as large as the cache really is,
           less the padding of text. token_gb: the same per sampled token.
  share    step_gb / step as a share of copy_gb_s.
  dense_*  the same if bitsandbytes writes and reads a copy in model.dtype of every 4-bit weight in
           passes of two rows or more. It chooses by layer, card and rows (fused for few): the truth
           is between the two.
peak_gib is what tensors took at most (on a CPU: this process), reserved_gib what PyTorch held.
"""
import gc
import json
import platform
import re
import sys
from itertools import islice
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from time import perf_counter

from measure import Iteration, Parser, changed, machine, reset_peak, running_optimizer, timed
import torch

import sft
from lib.runs import write_atomic
from lib.settings import UserError, load, out_of_memory, run_main
from lib.training import peak_memory
from policy import Policy
from rollout import make_env, training_seeds

GIB = 2**30


# ---------------------------------------------------------------- the card
def copy_speed(device):
    """Bytes read + written per second by copies on the device: median of 9 runs of 10."""
    size = GIB if device.type == "cuda" else GIB // 16
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies():
        for _ in range(10):
            target.copy_(source)

    seconds = [timed(device, copies)[1] for _ in range(10)]
    return 10 * 2 * size / median(seconds[1:])


def allocated(device):
    """GiB in tensors now; None on a CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else None


def peaks(device, prefix=""):
    """The most memory since reset_peak, and what others than PyTorch hold (CUDA, programs)."""
    figures = {f"{prefix}peak_gib": peak_memory(device)}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved(device)
        figures[f"{prefix}reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        figures[f"{prefix}outside_gib"] = outside / GIB
    return figures


# ---------------------------------------------------------------- bytes that decoding reads
def stored(parameter):
    """Bytes of a parameter as it lies in memory, scales and tables of a 4-bit one included."""
    tensors = [parameter]
    state = getattr(parameter, "quant_state", None)
    while state is not None:  # the scales of NF4 are quantised themselves: a state in the state
        tensors += [state.absmax, state.code, state.offset]
        state = getattr(state, "state2", None)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def image_layers(policy):
    """Indices of the layers that attend to the image alone."""
    return getattr(policy.base.config.get_text_config(), "cross_attention_layers", ())


def read_when_decoding(name, image_layers, has_image):
    """Whether a decoding pass reads the parameter of this name (not, for one, the vision tower's).

    Layers that attend to the image are skipped where there is none, else have their keys and values
    in the cache.
    """
    if "language_model." not in name:
        return name.startswith("lm_head")
    layer = re.search(r"language_model\.layers\.(\d+)\.", name)
    if layer is None or int(layer[1]) not in image_layers:
        return True
    return has_image and not re.search(r"\.cross_attn\.[kv]_", name)


def weights_read(policy, model, has_image):
    """Bytes of weights that a decoding pass reads; of the embedding table only what is tied to it.

    Returns: as stored (merged layers dense, LoRA in model.dtype); what comes on top if every 4-bit
    weight is written and read dense.
    """
    table = policy.base.get_input_embeddings().weight
    tied = table is policy.base.get_output_embeddings().weight
    least = dense = 0
    for name, parameter in policy.base.named_parameters():
        if not read_when_decoding(name, image_layers(policy), has_image):
            continue
        if parameter is table and not tied:
            continue
        state = getattr(parameter, "quant_state", None)
        shape = state.shape if state else parameter.shape
        dense_size = shape.numel() * getattr(torch, model.dtype).itemsize
        if ".lora_" in name:
            least += 0 if model.merge_for_sampling else dense_size
        elif model.merge_for_sampling and name.endswith(".base_layer.weight"):
            least += dense_size
        else:
            least += stored(parameter)
            dense += 2 * dense_size if state else 0
    return least, dense


def cache_sizes(cache):
    """{layer: bytes of its keys and values} of a transformers Cache."""
    sizes = {}
    for index, layer in enumerate(cache.layers):
        if layer.keys is not None:
            sizes[index] = 2 * layer.keys.numel() * layer.keys.element_size()
    return sizes


def cache_read(policy, cache, prompts, answers):
    """Bytes of keys and values that all passes after the prefill read.

    Args: cache: {layer: bytes} after the prefill, whose rows are as wide as the longest prompt.
    """
    image = sum(cache.get(layer, 0) for layer in image_layers(policy)) / len(prompts)  # of a row
    width = max(len(prompt.ids) for prompt in prompts)
    token = (sum(cache.values()) / len(prompts) - image) / width  # of a token in all other layers
    total = 0
    for prompt, answer in zip(prompts, answers):
        for written in range(1, len(answer.ids)):
            total += image + token * (len(prompt.ids) + written)
    return total


# ---------------------------------------------------------------- what is measured
# Each fills its record as it goes: what is known when memory runs out stays.
def measure_sft(record, policy, cfg):
    device = policy.device
    env = make_env(cfg.env, cfg.sft.mistakes + 1)
    seeds = list(islice(training_seeds(cfg.run.seed), cfg.sft.batch_size + 1))
    (first, *batch), record["data"] = timed(device, sft.sft_batch, policy, env, seeds,
                                            cfg.sft.mistakes)
    optimizer = running_optimizer(list(policy.trainable.values()))
    sft.train_step(policy, optimizer, [first], cfg.sft)  # the first passes load kernels: not timed
    reset_peak(device)
    _, record["seconds"] = timed(device, sft.train_step, policy, optimizer, batch, cfg.sft)
    tokens = sum(len(sequence.ids) for sequence in batch)
    record.update(peaks(device), answers=len(batch), tokens=tokens)


def measure_ppo(record, policy, cfg, turns):
    device = policy.device
    ppo = changed(cfg.ppo, turns=turns)
    iteration = Iteration(policy, cfg)
    play = iteration.play(ppo.envs, training_seeds(cfg.run.seed))
    observation, _ = make_env(cfg.env, ppo.verify_iters).reset(0)
    policy.sample(policy.encode([observation]), ppo.temperature, iteration.sampler, 2)  # as above
    reset_peak(device)
    record.update(turns=turns, scale=cfg.ppo.turns / turns, before_gib=allocated(device))
    batch, seconds = timed(device, iteration.rollout, play, ppo)
    record.update(after_gib=allocated(device), rollout_seconds=seconds, **peaks(device, "rollout_"))
    played = batch[0]
    record.update(answers=len(played), sampled=sum(len(turn.answer) for turn in played),
                  prompt=mean(len(turn.prompt.ids) for turn in played))
    reset_peak(device)
    _, seconds = timed(device, iteration.update, batch, ppo, play.envs[0].answer_key)
    record.update(update_seconds=seconds, **peaks(device, "update_"))


def measure_rollout(record, policy, cfg, copy_gb_s):
    env = make_env(cfg.env, cfg.ppo.verify_iters)
    seeds = islice(training_seeds(cfg.run.seed), record["rows"])
    prompts = policy.encode([env.reset(seed)[0] for seed in seeds])

    def sample(limit):
        generator = torch.Generator(policy.device).manual_seed(0)
        return timed(policy.device, policy.sample, prompts, cfg.ppo.temperature, generator, limit)

    caches = []  # of each pass

    def note(module, arguments, output):
        caches.append(cache_sizes(output.past_key_values))

    reset_peak(policy.device)
    with policy.base.model.language_model.register_forward_hook(note):
        _, prefill = sample(1)
    _, prefill_again = sample(1)
    answers, whole = sample(None)
    record.update(peaks(policy.device))

    lengths = sorted(len(answer.ids) for answer in answers)
    sampled = sum(lengths)
    passes = max(1, lengths[-1] - 1)  # after the prefill
    shared_passes = lengths[-2] - 1 if len(lengths) > 1 else 0  # of two rows or more
    weights, dense = weights_read(policy, cfg.model, prompts[0].image is not None)
    least = (passes * weights + cache_read(policy, caches[0], prompts, answers)) / 1e9
    most = least + shared_passes * dense / 1e9
    decode = whole - prefill_again
    record.update(tokens_per_s=sampled / (prefill + decode), prefill=prefill, step=decode / passes,
                  sampled=sampled, prompt=mean(len(prompt.ids) for prompt in prompts),
                  step_gb=least / passes, token_gb=least / sampled,
                  share=least / decode / copy_gb_s, dense_gb=most / passes,
                  dense_share=most / decode / copy_gb_s)


MEASURES = {"sft": measure_sft, "ppo": measure_ppo, "rollout": measure_rollout}


# ---------------------------------------------------------------- the run
def build(cfg, device):
    """The policy and its record. Raises: UserError if --cap has no room for it."""
    free_memory()  # of the policy before it
    reset_peak(device)
    arguments = (cfg.model, cfg.lora, cfg.ppo.value_hidden, cfg.ppo.value_detach, cfg.run.seed)
    try:
        policy, seconds = timed(device, Policy, *arguments)
    except torch.OutOfMemoryError:
        raise UserError("the model alone does not fit into --cap") from None
    return policy, {
        "seconds": seconds,
        "weights_gib": sum(stored(parameter) for parameter in policy.base.parameters()) / GIB,
        **peaks(device),
        "allocated_gib": allocated(device),
        "trainable": sum(parameter.numel() for parameter in policy.trainable.values()),
    }


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()  # on a CPU: nothing


class Session:
    """The figures of all configurations so far, and how the next are measured."""

    def __init__(self, options, device):
        software = {"python": platform.python_version(), "cuda": torch.version.cuda}
        self.results = {"machine": {**machine(device), **software}, "card": {}, "configs": {}}
        self.path = options.json
        self.end = None  # what would begin later is skipped

    def say(self, name, what, record):
        """Print a record, and write all of them."""
        figures = []
        for key, value in record.items():
            figures.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        print(f"{name:<14}{what:<9}{', '.join(figures)}", flush=True)
        if self.path:
            write_atomic(self.path, json.dumps(self.results, indent=1) + "\n")

    def measure(self, name, what, record, policy, *arguments):
        """Fill the record, if it is not too late.

        What runs out of memory, or loses its numbers, says so and leaves nothing behind.
        """
        try:
            if perf_counter() > self.end:
                record["skipped"] = "no time left"
            else:
                MEASURES[what](record, policy, *arguments)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            record["failed"] = "out of memory"
        except UserError as error:
            record["failed"] = str(error)
        finally:  # the exception, and what its frames held, is gone by now
            for parameter in [*policy.trainable.values(), *policy.value_head.parameters()]:
                parameter.grad = None
            free_memory()
        self.say(name, what, record)


def cell(record, key, form, mark=""):
    return f"{mark}{record[key]:{form}}" if key in record else "-"


def print_table(configs):
    """A line per configuration: peaks in GiB, seconds, the fastest batch."""
    print(f"\n{'':<14}  weights  rollout   update  SFT GiB s/update    turns    SFT s"
          "    tok/s     rows    share    dense")
    for name, result in configs.items():
        ppo = dict(result["ppo"])
        scale = ppo.get("scale", 1)
        mark = "~" if scale > 1 else ""  # fewer turns than configured
        if "answers" in ppo:
            ppo["all_answers"] = ppo["answers"] * scale
        if "update_seconds" in ppo:
            ppo["seconds"] = (ppo["rollout_seconds"] + ppo["update_seconds"]) * scale
        finished = [row for row in result["rollout"] if "share" in row]
        best = max(finished, key=itemgetter("tokens_per_s"), default={})
        cells = [
            cell(result["model"], "weights_gib", ".2f"),
            cell(ppo, "rollout_peak_gib", ".2f", mark),
            cell(ppo, "update_peak_gib", ".2f", mark),
            cell(result["sft"], "peak_gib", ".2f"),
            cell(ppo, "seconds", ".1f", mark),
            cell(ppo, "all_answers", ".0f"),
            cell(result["sft"], "seconds", ".1f"),
            cell(best, "tokens_per_s", ",.0f"),
            cell(best, "rows", "d"),
            cell(best, "share", ".1%"),
            cell(best, "dense_share", ".1%"),
        ]
        print(f"{name:<14}" + "".join(f"{text:>9}" for text in cells))


def row_counts(text):
    """The argument of --batches."""
    return sorted({int(number) for number in text.split(",")})


def parse(arguments):
    parser = Parser(__doc__)
    parser.add_argument("--cap", type=float, default=24.0)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--batches", type=row_counts, default=[1, 4, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=450.0)
    options = parser.parse_intermixed_args(arguments)
    numbers = [options.cap, options.turns, options.seconds, *options.batches]
    if any(number is not None and number <= 0 for number in numbers):
        raise UserError("--cap, --turns, --batches and --seconds must be more than 0")
    return options


def load_all(settings):
    """{name: (cfg, raw)} of each configuration, all with the same overrides."""
    overrides = [setting for setting in settings if "=" in setting]
    paths = [setting for setting in settings if "=" not in setting]
    configs = {}
    for path in paths or ["-"]:  # "-": the message that says how to call this
        name = "/".join(Path(path).with_suffix("").parts[-2:])
        configs[name] = load([path, *overrides])[:2]
    return configs


def limit_memory(device, cap):
    """Make a GPU as small as `cap` GiB. Returns: what is known about the card."""
    if device.type != "cuda":
        return {}
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    return {"total_gib": total, "cap_gib": min(cap, total)}


def main(arguments):
    options = parse(arguments)
    configs = load_all(options.settings)
    first_cfg, _ = next(iter(configs.values()))
    on_gpu = torch.cuda.is_available() and first_cfg.model.device != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    deadline = perf_counter() + options.seconds
    session = Session(options, device)
    card = session.results["card"]
    card.update(limit_memory(device, options.cap), copy_gb_s=copy_speed(device) / 1e9)
    session.say("", "machine", session.results["machine"])
    session.say("", "card", card)

    policy = built = None
    for index, (name, (cfg, raw)) in enumerate(configs.items()):
        share = (deadline - perf_counter()) / (len(configs) - index)
        session.end = perf_counter() + share
        model = {**raw["model"], "sample_tokens": None}
        wanted = (model, raw["lora"], cfg.ppo.value_hidden, cfg.ppo.value_detach, cfg.run.seed)
        if wanted != built:
            policy = None  # the old one goes before the new one comes
            policy, built_record = build(cfg, device)
            built = wanted
        batches = [{"rows": rows} for rows in options.batches]
        record = {"config": raw, "model": built_record, "sft": {}, "ppo": {}, "rollout": batches}
        session.results["configs"][name] = record
        session.say(name, "model", built_record)
        turns = min(options.turns or cfg.ppo.turns, cfg.ppo.turns)
        policy.sample_tokens = cfg.model.sample_tokens
        session.measure(name, "sft", record["sft"], policy, cfg)
        session.measure(name, "ppo", record["ppo"], policy, cfg, turns)
        policy.sample_tokens = sys.maxsize  # all rows at once
        for row in batches:
            session.measure(name, "rollout", row, policy, cfg, card["copy_gb_s"])
            if "share" not in row:
                break
    print_table(session.results["configs"])


if __name__ == "__main__":
    run_main(main)
