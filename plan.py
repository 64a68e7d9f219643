"""How much memory sft.py, rl.py and eval.py will need, before anything is loaded or downloaded.

    python plan.py CONFIG.yaml [key=value ...]    exit code 0: it fits model.memory, 1: it does not

The policy is built without storage, from model.path if that is a folder, else from model.shape. It
samples and learns with the batches, lengths and pictures of the configuration, and the bytes that
live meanwhile are counted (lib/live_bytes.py). What lies there all the time is added: weights,
gradients, the optimiser's moments, the start of the KL penalty. Lengths are model.prompt_tokens,
revision_tokens and, as the longest answer, max_new_tokens (answer_tokens with random weights).

Held to the allocations of mid-sized Mllamas on a CPU: 3 % below to 12 % above (tests/test_plan.py).
A GPU's kernels differ a little (workspaces, rounding); other families are estimates.
"""
import os
import re
import sys
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace

from policy import Policy  # first of these: it sets up the libraries
from lib.batching import Sequence
from lib.images import PATCHES_AT_ONCE
from lib.live_bytes import LiveBytes, meta_kernels, replace_4bit_matmuls
from lib.settings import UserError, find_model, load, run_main
from rollout import make_env

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit

GIB = 2**30
MARGIN = 1.0  # GiB kept for the CUDA context and for gaps between blocks
PHASES = ("sft.py", "rl.py rollout", "rl.py update", "eval.py")
NOT_SHAPE = ("sample_tokens", "merge_for_sampling", "gradient_checkpointing", "memory",
             "image_cache", "prompt_tokens", "revision_tokens", "max_new_tokens")
KNOWN = {}  # policies and peaks by their settings: advice asks again and again


# ---------------------------------------------------------------- the policy without storage
class MetaPolicy(Policy):
    """A policy of meta tensors, and what lives while it samples and scores.

    Args: as of Policy. Attributes: live, of LiveBytes; weights, {part and precision: bytes}.
    """

    def __init__(self, model, lora, value_hidden):
        _, folder = shape_of(model)
        settings = {**vars(model), "random_init": True, "shape": folder, "device": "meta",
                    "gradient_checkpointing": True}
        with init_empty_weights():
            super().__init__(SimpleNamespace(**settings), lora, value_hidden)
        self.weights = self._bytes_of_weights(model.dtype)
        self.forbidden = torch.zeros(len(self.forbidden), dtype=torch.bool)
        self.end_tokens = torch.tensor([-1])  # no answer ends early
        self.sample_tokens = 10**9  # one batch
        replace_4bit_matmuls(self.base)
        self.live = LiveBytes([*self.base.parameters(), *self.base.buffers(),
                               *self.value_head.parameters()])

    def _bytes_of_weights(self, dtype):
        patterns = {"lm_head": "lm_head", "embeddings": ".*embed_tokens", **self.family.parts,
                    "rest": ""}
        sizes = {}
        for name, weight in self.base.named_parameters():
            if "lora_" in name:
                continue
            part = next(part for part, pattern in patterns.items() if re.match(pattern, name))
            in_4bit = isinstance(weight, Params4bit)
            kind = f"{part}, {'nf4' if in_4bit else dtype}"
            size = nf4_bytes(weight.numel()) if in_4bit else weight.nbytes
            sizes[kind] = sizes.get(kind, 0) + size
        return sizes

    def _prefill(self, prompts):
        width = max(len(prompt.ids) for prompt in prompts)
        self.first_part, self.unread = None, len(prompts)
        with self.live.during(f"reading {len(prompts)} prompts of {width} tokens"):
            read = super()._prefill(prompts)
        self.first_states = self.first_part = None
        return read

    def _prefill_part(self, ids, mask, features):
        """The first and the last part are read; between them lie copies of the first's cache."""
        self.unread -= len(ids)
        if self.first_part is not None and self.unread:
            first = copy(self.first_part)
            first.cache, first.further = deepcopy(first.cache), dict(first.further)
            return self.first_states.clone(), first
        hidden, decoding = super()._prefill_part(ids, mask, features)
        if self.first_part is None:
            self.first_states, self.first_part = hidden, decoding
        return hidden, decoding

    def _features(self, images):
        if images[0] is None:
            return images
        with self.live.during(f"encoding pictures for {len(images)} prompts"):
            return super()._features(images)


def nf4_bytes(numel):
    """Of a 4-bit weight: two per byte, a byte of scale per 64 weights, 4 bytes per 256 scales, and
    the tables of codes."""
    scales = -(-numel // 64)
    return -(-numel // 2) + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)


def shape_of(model):
    """Which key names the folder with the model's shape, and the folder. Raises: UserError."""
    path = find_model(model.path)
    if not model.random_init and os.path.isdir(path):
        return "model.path", path
    folder = find_model(model.shape)
    if not os.path.isdir(folder):
        raise UserError(f"model.shape: no folder {model.shape!r}")
    return "model.shape", folder


# ---------------------------------------------------------------- what lives in each moment
def sampling(policy, prompts, answer):
    """Peaks while `answer` tokens (at least 2) are sampled for each prompt.

    Returns: {moment: {moment of making: bytes}}. The last token alone is sampled with a full cache.
    """
    filler = [policy.text.filler] * (answer - 2)
    longer = [replace(prompt, ids=prompt.ids + filler) for prompt in prompts]
    last = f"sampling {len(prompts)} answers of {answer} tokens"
    live = policy.live
    live.start()
    with meta_kernels(), live, live.during("merging LoRA"), policy.inference():
        with live.during("sampling first tokens"):
            policy.sample(prompts, 1.0, None, 1)
        peaks = live.peaks
        live.peaks = {}
        with live.during(last):
            policy.sample(longer, 1.0, None, 2)
        peaks[last] = live.peaks[last]
    return peaks


def learning(policy, sequences):
    """Peaks of scoring conversations with gradients, and of the way back; gradients are then there.

    Returns: {moment: {moment of making: bytes}}.
    """
    size = f"{len(sequences)} conversations of {len(sequences[0].ids)} tokens"
    live = policy.live
    live.start()
    with meta_kernels(), live:
        with live.during(f"scoring {size}"):
            out = policy.score(sequences)
        with live.during(f"backward through {size}"):
            (out["logprobs"].sum() + out["values"].sum() + out["entropy"].sum()).backward()
    return live.peaks


def prompts_of(policy, rows, tokens, image):
    """Prompts of so many tokens beside those of the image; the last is one shorter, as prompts of
    unlike lengths need a mask. Of as many images as are encoded at once."""
    images = [None]
    ids = [policy.text.filler] * tokens
    if image is not None:
        at_once = max(1, PATCHES_AT_ONCE // policy.family.tower_patches(image))
        images = [image.copy() for _ in range(min(rows, at_once))]
        ids[1] = policy.family.image_token
        ids = policy.family.expand_image_tokens(ids, image)
    prompts = [Sequence(ids, [], images[row % len(images)]) for row in range(rows)]
    if rows > 1:
        prompts[-1] = replace(prompts[-1], ids=ids[:-1])
    return prompts


def batch_of(policy, rows, tokens, image, answers, answer):
    """Conversations: prompts of so many tokens that end in so many answers."""
    sequences = prompts_of(policy, rows, tokens, image)
    for _ in range(answers):
        sequences = [s.answered([policy.text.filler] * answer) for s in sequences]
    return sequences


# ---------------------------------------------------------------- phases
@dataclass
class Phase:
    """Bytes of a phase. lying: {what: bytes} all the time; moments: as of `sampling`."""
    lying: dict
    moments: dict

    @property
    def peak(self):
        """(bytes, moment) of the largest moment with what lies there all the time."""
        sums = {moment: sum(parts.values()) for moment, parts in self.moments.items()}
        moment = max(sums, key=sums.get)
        return sum(self.lying.values()) + sums[moment], moment


def policy_of(cfg):
    """The policy of a configuration, with gradients where text and pictures reach the weights."""
    shape = {key: value for key, value in vars(cfg.model).items() if key not in NOT_SHAPE}
    image = picture(cfg, cfg.env, cfg.ppo.verify_iters)
    key = repr((shape, cfg.lora, cfg.ppo.value_hidden, image and image.size))
    if key not in KNOWN:
        policy = MetaPolicy(cfg.model, cfg.lora, cfg.ppo.value_hidden)
        policy.checkpointing = False
        learning(policy, batch_of(policy, 1, 8, image, 1, 2))
        KNOWN[key] = policy
    policy = KNOWN[key]
    policy.merge_for_sampling = cfg.model.merge_for_sampling
    policy.checkpointing = cfg.model.gradient_checkpointing
    return policy


def picture(cfg, env, verify_iters):
    """The first picture of an environment, or None."""
    return make_env(env, verify_iters).reset(0)[0]["image"]


def largest(found):
    """Of several {moment: parts}, the one with the largest moment."""
    return max(found, key=lambda moments: Phase({}, moments).peak[0])


def answer_tokens(model):
    return model.answer_tokens if model.random_init else model.max_new_tokens


def rollout(cfg, policy, images, envs, attempts):
    """Moments of sampling for so many environments; the last attempts have the longest prompts."""
    model = cfg.model
    sizes = {}  # rows of a batch -> the longest prompts of them
    for attempt in range(attempts):
        tokens = model.prompt_tokens + attempt * model.revision_tokens
        for image in images:
            width = len(prompts_of(policy, 2, tokens, image)[0].ids)
            rows = min(envs, max(1, model.sample_tokens // width))
            sizes[rows, image and image.size] = (rows, tokens, image)
    return largest([sampling(policy, prompts_of(policy, *size), answer_tokens(model))
                    for size in sizes.values()])


def update(cfg, policy, image, section, most, attempts):
    """Moments of learning in micro-batches of section.micro_tokens, of at most so many rows."""
    model, answer = cfg.model, answer_tokens(cfg.model)
    sizes = []
    for attempt in range(attempts):
        tokens = model.prompt_tokens + attempt * model.revision_tokens
        width = len(prompts_of(policy, 2, tokens, image)[0].ids) + answer
        rows = min(most, max(1, section.micro_tokens // width))
        # of SFT's conversations the last answer is learnt, of PPO's each; all have `width` tokens
        answers = attempt + 1 if section is cfg.ppo else 1
        tokens -= (answers - 1) * answer
        sizes.append((rows * width, rows * answers, rows if image else 0, rows, tokens, answers))
    sizes = [a for a in sizes if not any(a != b and all(x <= y for x, y in zip(a[:3], b[:3]))
                                         for b in sizes)]
    return largest([learning(policy, batch_of(policy, rows, max(tokens, 2), image, answers, answer))
                    for _, _, _, rows, tokens, answers in sizes])


def budget(cfg, phases=PHASES):
    """{name: Phase} of what scripts need. Raises: UserError."""
    ppo = cfg.ppo
    policy = policy_of(cfg)
    image = picture(cfg, cfg.env, ppo.verify_iters)
    tests = [picture(cfg, {**cfg.env, **changes}, cfg.eval.verify_iters)
             for changes in cfg.eval.variants.values()]
    lora = sum(p.nbytes for p in policy.trainable.values()) if policy.has_lora else 0
    learning = sum(p.grad.nbytes for p in policy.trainable.values() if p.grad is not None)
    trainable = sum(p.nbytes for p in policy.trainable.values())
    head = sum(p.nbytes for p in policy.value_head.parameters())
    weights = {"weights": sum(policy.weights.values()), "LoRA, fp32": lora}
    moments = {"AdamW's moments": 2 * learning}
    gradients = {"gradients": learning}
    start = {"start of the KL penalty": trainable if ppo.kl_coef else 0}
    step = {"optimiser step": {"square roots of AdamW": learning}}

    def plan_of(name):
        if name == "sft.py":
            lying = {**weights, **gradients, **moments, "value head": head}
            found = update(cfg, policy, image, cfg.sft, cfg.sft.batch_size, cfg.sft.mistakes + 1)
            return Phase(lying, {**step, **found})
        if name == "eval.py":
            found = rollout(cfg, policy, tests, cfg.eval.batch_size, cfg.eval.verify_iters)
            return Phase(weights, found)
        playing = {**weights, **moments, **start, "value head, trained": 4 * head}
        if name == "rl.py rollout":
            return Phase(playing, rollout(cfg, policy, [image], ppo.envs, ppo.verify_iters))
        found = update(cfg, policy, image, ppo, ppo.envs * ppo.turns, ppo.verify_iters)
        return Phase({**playing, **gradients}, {**step, **found})

    return {name: plan_of(name) for name in phases}


# ---------------------------------------------------------------- advice
def need(arguments, name):
    """Bytes at the peak of a phase under these arguments; infinite if they are refused."""
    key = repr((arguments, name))
    if key not in KNOWN:
        try:
            KNOWN[key] = budget(load(arguments)[0], [name])[name].peak[0]
        except UserError:  # the environment draws no such picture, or keys exclude one another
            KNOWN[key] = float("inf")
    return KNOWN[key]


def halves(value, least):
    """value / 2, / 4 .. down to `least`."""
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def choices(cfg, name):
    """{key: values to try} of what a phase's memory depends on, the least change first."""
    found = {}
    if name in ("sft.py", "rl.py update"):
        section = "sft" if name == "sft.py" else "ppo"
        tokens = getattr(cfg, section).micro_tokens
        found["model.gradient_checkpointing"] = ["true"]
        found[f"{section}.micro_tokens"] = halves(tokens, 128)
    else:
        found["model.sample_tokens"] = halves(cfg.model.sample_tokens, 128)
        found["model.merge_for_sampling"] = ["false"]
    if name == "eval.py":
        found["eval.batch_size"] = halves(cfg.eval.batch_size, 1)
    found["model.quantization"] = ["nf4"]
    found["model.dtype"] = ["bfloat16"]
    found["model.tune"] = ["[language]"]
    found["lora.r"] = halves(cfg.lora.r, 1) if cfg.lora else []
    if cfg.env.get("image_size"):
        width, height = cfg.env["image_size"]
        found["env.image_size"] = [f"[{w},{h}]" for w, h in zip(halves(width, 100),
                                                               halves(height, 100))]
    return {key: values for key, values in found.items() if values}


def least_change(arguments, name, key, values, free):
    """(bytes, "key=value") of the first value that fits, or else of the last, by bisection."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        fits = need([*arguments, f"{key}={values[middle]}"], name) <= free
        low, high = (low, middle) if fits else (middle + 1, high)
    change = f"{key}={values[low]}"
    return need([*arguments, change], name), change


def advice(arguments, cfg, name, free):
    """[(bytes, "key=value")] of what makes a phase smaller that does not fit, the best first.

    Two single changes that fit are enough; if none does, several together that do come first.
    """
    now = need(arguments, name)
    helps, fitting = [], 0
    for key, values in choices(cfg, name).items():
        size, change = least_change(arguments, name, key, values, free)
        if size < now:
            helps.append((size, change))
            fitting += size <= free
        if fitting == 2:
            break
    helps.sort()
    together = []
    for _, change in helps if not fitting else ():
        together.append(change)
        size = need([*arguments, *together], name)
        if size <= free:
            return [(size, " ".join(together)), *helps]
    return helps


def widest(arguments, free):
    """The most environments, up to 1024, whose answers can be sampled in one batch; 0 if none."""
    def size(envs):
        one_batch = [*arguments, f"ppo.envs={envs}", "model.sample_tokens=1000000000"]
        return need(one_batch, "rl.py rollout")

    each = max(1, (size(64) - size(32)) // 32)  # a cache is about as large for every environment
    low, high = 0, 1025  # low fits, high does not
    guess = 64
    while high - low > 1:
        if size(guess) <= free:
            low = guess
        else:
            high = guess
        guess += int((free - size(guess)) // each)
        guess = min(max(guess, low + 1), high - 1)
    return low


# ---------------------------------------------------------------- on screen, in GiB
def show(lines, indent="  "):
    for what, size in lines.items():
        if size >= GIB / 200:
            print(f"{indent}{what:{62 - len(indent)}}{size / GIB:8.2f}")


def show_phase(name, phase):
    """What lies there all the time, the moments, and what lives in the largest."""
    top = phase.peak[1]
    print(f"\n{name}, GiB")
    show({"all the time": sum(phase.lying.values())})
    show(phase.lying, "    ")
    for moment, parts in phase.moments.items():
        show({moment: sum(parts.values())})
        if moment == top:
            show({f"made while {part}": size for part, size in parts.items()}, "    ")


def main(arguments):
    cfg, _, _ = load(arguments)
    phases = budget(cfg)
    free = (cfg.model.memory - MARGIN) * GIB
    print("planned for the shape in {}={}".format(*shape_of(cfg.model)))
    print("\nweights, GiB")
    show(policy_of(cfg).weights)
    if picture(cfg, cfg.env, cfg.ppo.verify_iters):
        print("\nhost memory, GiB")
        show({"image cache": cfg.model.image_cache * GIB})
    for name, phase in phases.items():
        show_phase(name, phase)
    card = ""
    if torch.cuda.is_available():
        card = f"; this card has {torch.cuda.get_device_properties(0).total_memory / GIB:.1f}"
    print(f"\npeaks in GiB, of model.memory={cfg.model.memory:g} less {MARGIN:g} for the CUDA "
          f"context and gaps{card}")
    for name, phase in phases.items():
        size, moment = phase.peak
        verdict = "fits" if size <= free else "DOES NOT FIT"
        print(f"  {name:16}{size / GIB:8.2f}  {verdict}: {moment}")
    print(f"a rollout fits up to ppo.envs={widest(arguments, free)} in one batch, with "
          "model.sample_tokens large enough")
    over = [name for name, phase in phases.items() if phase.peak[0] > free]
    for name in over:
        helps = advice(arguments, cfg, name, free)
        fits = [f"{change} ({size / GIB:.2f})" for size, change in helps if size <= free]
        less = [f"{change} ({size / GIB:.2f})" for size, change in helps if size > free]
        print(f"{name} fits with {' or '.join(fits) or 'none of its keys'}; "
              f"smaller with {', '.join(less) or 'no other'}")
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    run_main(main)
