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
from itertools import product
from types import SimpleNamespace

# ours first: policy sets up the libraries before they start
from policy import Policy
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
KNOWN = {}  # policies by the settings of their weights


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
        self.counted = {}
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

    def once(self, count, batch, answer):
        """count(batch), or what it was before: phases and attempts share batches."""
        image = batch.image and batch.image.size
        key = (count.__qualname__, replace(batch, image=image), answer, self.checkpointing,
               self.merge_for_sampling)
        if key not in self.counted:
            self.counted[key] = count(batch)
        return self.counted[key]

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


def answered(policy, prompts, answers, tokens):
    """Conversations: the prompts, each with so many answers of so many tokens."""
    for _ in range(answers):
        prompts = [prompt.answered([policy.text.filler] * tokens) for prompt in prompts]
    return prompts


# ---------------------------------------------------------------- the largest batches
@dataclass(frozen=True)
class Batch:
    """Equal prompts, each with its image and followed by so many answers."""
    rows: int
    tokens: int  # of a prompt beside those of its image
    answers: int
    width: int  # tokens of a whole row, the image's included
    image: object  # PIL image or None


def picture(cfg, env, verify_iters):
    """The first picture of an environment, or None."""
    return make_env(env, verify_iters).reset(0)[0]["image"]


def answer_tokens(model):
    return model.answer_tokens if model.random_init else model.max_new_tokens


def batches(cfg, policy, images, attempts, most, limit, answer):
    """Batches of at most `limit` padded tokens, one per attempt and image, longest first.

    Args: most: rows of a batch; answer: tokens of the row's last answer, 0 before it is sampled.
    """
    model = cfg.model
    found = []
    for attempt, image in product(reversed(range(attempts)), images):
        tokens = model.prompt_tokens + attempt * model.revision_tokens
        width = len(prompts_of(policy, 1, tokens, image)[0].ids) + answer
        rows = min(most, max(1, limit // width))
        found.append(Batch(rows, tokens, attempt + 1, width, image))
    return found


def largest(found):
    """Of several {moment: parts}, the one with the largest moment."""
    return max(found, key=lambda moments: Phase({}, moments).peak[0])


def largest_sampling(cfg, policy, images, attempts, most):
    """Moments of the batch that needs most: that of most tokens, read or in the end, or rows."""
    answer = answer_tokens(cfg.model)
    found = batches(cfg, policy, images, attempts, most, cfg.model.sample_tokens, answer=0)
    candidates = [max(found, key=lambda batch: batch.rows * batch.width),
                  max(found, key=lambda batch: batch.rows * (batch.width + answer)),
                  max(found, key=lambda batch: batch.rows)]

    def count(batch):
        prompts = prompts_of(policy, batch.rows, batch.tokens, batch.image)
        return sampling(policy, prompts, answer)

    return largest([policy.once(count, batch, answer) for batch in candidates])


def largest_learning(cfg, policy, image, attempts, section, most):
    """Moments of the micro-batch that needs most: that of most tokens, answers or pictures."""
    answer = answer_tokens(cfg.model)
    found = batches(cfg, policy, [image], attempts, most, section.micro_tokens, answer)
    if section is cfg.sft:  # the last answer alone is learnt
        found = [replace(batch, answers=1) for batch in found]
    candidates = [max(found, key=lambda batch: batch.rows * batch.width),
                  max(found, key=lambda batch: batch.rows * batch.answers)]
    if image:
        candidates.append(max(found, key=lambda batch: batch.rows))

    def count(batch):
        tokens = max(2, batch.tokens - (batch.answers - 1) * answer)
        prompts = prompts_of(policy, batch.rows, tokens, batch.image)
        return learning(policy, answered(policy, prompts, batch.answers, answer))

    return largest([policy.once(count, batch, answer) for batch in candidates])


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
    key = repr((shape, cfg.lora, cfg.ppo.value_hidden, image is None))
    if key not in KNOWN:
        policy = MetaPolicy(cfg.model, cfg.lora, cfg.ppo.value_hidden)
        policy.checkpointing = False
        learning(policy, answered(policy, prompts_of(policy, 1, 8, image), 1, 2))
        KNOWN[key] = policy
    policy = KNOWN[key]
    policy.merge_for_sampling = cfg.model.merge_for_sampling
    policy.checkpointing = cfg.model.gradient_checkpointing
    return policy


def lying(cfg, policy, name):
    """{what: bytes} that lies there all the time in a phase."""
    trainable = sum(p.nbytes for p in policy.trainable.values())
    learning = sum(p.grad.nbytes for p in policy.trainable.values() if p.grad is not None)
    head = sum(p.nbytes for p in policy.value_head.parameters())
    found = {"weights": sum(policy.weights.values()),
             "LoRA, fp32": trainable if policy.has_lora else 0}
    if name == "eval.py":
        return found
    found["AdamW's moments"] = 2 * learning
    if name != "rl.py rollout":
        found["gradients"] = learning
    if name == "sft.py":
        found["value head"] = head
    else:
        found["value head, trained"] = 4 * head
        found["start of the KL penalty"] = trainable if cfg.ppo.kl_coef else 0
    return found


def plan_of(cfg, policy, name):
    """The Phase of that name."""
    ppo = cfg.ppo
    always = lying(cfg, policy, name)
    image = picture(cfg, cfg.env, ppo.verify_iters)
    if name == "rl.py rollout":
        moments = largest_sampling(cfg, policy, [image], ppo.verify_iters, ppo.envs)
    elif name == "eval.py":
        test = cfg.eval
        images = [picture(cfg, {**cfg.env, **changes}, test.verify_iters)
                  for changes in test.variants.values()]
        moments = largest_sampling(cfg, policy, images, test.verify_iters, test.batch_size)
    else:
        if name == "sft.py":
            found = largest_learning(cfg, policy, image, cfg.sft.mistakes + 1, cfg.sft,
                                     cfg.sft.batch_size)
        else:
            found = largest_learning(cfg, policy, image, ppo.verify_iters, ppo,
                                     ppo.envs * ppo.turns)
        step = {"square roots of AdamW": always["gradients"]}
        moments = {"optimiser step": step, **found}
    return Phase(always, moments)


def budget(cfg, phases=PHASES):
    """{name: Phase} of what scripts need. Raises: UserError."""
    policy = policy_of(cfg)
    return {name: plan_of(cfg, policy, name) for name in phases}


# ---------------------------------------------------------------- advice
def choices(cfg, name):
    """{key: values to try}, the largest first, of what changes the moments of a phase."""
    if name == "sft.py":
        return {"sft.micro_tokens": halves(cfg.sft.micro_tokens),
                "model.gradient_checkpointing": [True]}
    if name == "rl.py update":
        return {"ppo.micro_tokens": halves(cfg.ppo.micro_tokens),
                "model.gradient_checkpointing": [True]}
    keys = {"model.sample_tokens": halves(cfg.model.sample_tokens),
            "model.merge_for_sampling": [False]}
    if name == "eval.py":
        keys["eval.batch_size"] = halves(cfg.eval.batch_size)
    return keys


def halves(value, most=6):
    """value / 2, / 4 .., whole numbers."""
    return [value // 2**times for times in range(1, most + 1) if value >= 2**times]


def advice(cfg, name, free):
    """["key=value (GiB)"] of single changes with which a phase fits, each as small as it can be."""
    fitting = []
    if sum(lying(cfg, policy_of(cfg), name).values()) > free:
        return fitting
    for key, values in choices(cfg, name).items():
        section, setting = key.split(".")
        for value in values:
            changed = deepcopy(cfg)
            setattr(getattr(changed, section), setting, value)
            size, _ = budget(changed, [name])[name].peak
            if size <= free:
                fitting.append(f"{key}={str(value).lower()} ({size / GIB:.2f})")
                break
    return fitting


def show_advice(cfg, name, free):
    fitting = advice(cfg, name, free)
    if fitting:
        print(f"{name} fits with {' or '.join(fitting)}")
    else:
        print(f"{name}: no single key of {', '.join(choices(cfg, name))} is enough")


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
    over = [name for name, phase in phases.items() if phase.peak[0] > free]
    for name in over:
        show_advice(cfg, name, free)
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    run_main(main)
