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
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace

# ours first: policy sets up the libraries before they start
from policy import STATES_AT_ONCE, Policy
from lib.batching import Sequence
from lib.errors import UserError, run_main
from lib.images import PATCHES_AT_ONCE
from lib.live_bytes import LiveBytes, meta_kernels, replace_4bit_matmuls
from lib.loading import reads_text_alone
from lib.settings import find_model, load
from rollout import make_env

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit

GIB = 2**30
MARGIN = 1.0  # GiB kept for the CUDA context and for gaps between blocks
REMEDIES = {  # keys that make the moments of a phase smaller
    "sft.py": ("sft.micro_tokens", "model.gradient_checkpointing", "model.merge_for_sampling"),
    "rl.py rollout": ("model.sample_tokens", "model.merge_for_sampling"),
    "rl.py update": ("ppo.micro_tokens", "model.gradient_checkpointing",
                     "model.merge_for_sampling"),
    "eval.py": ("model.sample_tokens", "model.merge_for_sampling", "eval.batch_size")}
PHASES = tuple(REMEDIES)
SWITCHES = {"model.gradient_checkpointing": True, "model.merge_for_sampling": False}
NOT_SHAPE = ("sample_tokens", "merge_for_sampling", "gradient_checkpointing", "memory",
             "image_cache", "prompt_tokens", "revision_tokens", "max_new_tokens")
POLICIES = {}  # policies by the settings of their weights


# ---------------------------------------------------------------- the policy without storage
class MetaPolicy(Policy):
    """A policy of meta tensors, and what lives while it samples and scores.

    Args: as of Policy. Attributes: live, of LiveBytes; weights, {part and precision: bytes};
    counted, what `moments_of` found.
    """

    def __init__(self, model, lora, value_hidden):
        _, folder = shape_of(model)
        settings = {**vars(model), "random_init": True, "shape": folder, "device": "meta",
                    "gradient_checkpointing": True}
        with init_empty_weights():
            super().__init__(SimpleNamespace(**settings), lora, value_hidden)
        self.weights = self._bytes_of_weights()
        self.forbidden = torch.zeros(len(self.forbidden), dtype=torch.bool)
        self.end_tokens = torch.tensor([-1])  # no answer ends early
        self.sample_tokens = 10**9  # one batch
        self.states_at_once = STATES_AT_ONCE["cpu" if model.device == "cpu" else "cuda"]
        replace_4bit_matmuls(self.base)
        self.live = LiveBytes([*self.base.parameters(), *self.base.buffers(),
                               *self.value_head.parameters()])
        self.counted = {}

    def _bytes_of_weights(self):
        patterns = {"lm_head": "lm_head", "embeddings": ".*embed_tokens", **self.family.parts,
                    "rest": ""}
        sizes = {}
        for name, weight in self.base.named_parameters():
            if "lora_" in name:
                continue
            part = next(part for part, pattern in patterns.items() if re.match(pattern, name))
            in_4bit = isinstance(weight, Params4bit)
            precision = "nf4" if in_4bit else str(weight.dtype).removeprefix("torch.")
            kind = f"{part}, {precision}"
            size = nf4_bytes(weight.numel()) if in_4bit else weight.nbytes
            sizes[kind] = sizes.get(kind, 0) + size
        return sizes

    def _prefill(self, prompts):
        width = max(len(prompt.ids) for prompt in prompts)
        with self.live.during(f"reading {len(prompts)} prompts of {width} tokens"):
            return super()._prefill(prompts)

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
    key, folder = "path", find_model(model.path)
    if model.random_init or not os.path.isdir(folder):
        key, folder = "shape", find_model(model.shape)
    files = os.listdir(folder) if os.path.isdir(folder) else []
    needed = [("config.json",), ("preprocessor_config.json", "processor_config.json")]
    if "config.json" in files and reads_text_alone(folder):
        needed.pop()
    for kind in needed:
        if not any(name in files for name in kind):  # transformers writes either of the latter
            raise UserError(f"model.{key}: no {kind[0]} in {getattr(model, key)!r}")
    return f"model.{key}", folder


def policy_of(cfg):
    """The policy of a configuration, with gradients where text and pictures reach the weights."""
    shape = {key: value for key, value in vars(cfg.model).items() if key not in NOT_SHAPE}
    image = picture(cfg.env, cfg.ppo.verify_iters)
    key = repr((shape, cfg.lora, cfg.ppo.value_hidden, image is None))
    if key not in POLICIES:
        policy = MetaPolicy(cfg.model, cfg.lora, cfg.ppo.value_hidden)
        policy.checkpointing = False
        learning(policy, with_answers(policy, prompts_of(policy, 1, 8, image), 1, 2))
        POLICIES[key] = policy
    policy = POLICIES[key]
    policy.merge_for_sampling = cfg.model.merge_for_sampling
    policy.checkpointing = cfg.model.gradient_checkpointing
    return policy


# ---------------------------------------------------------------- what lives in each moment
def sampling(policy, prompts, answer):
    """{moment: bytes} at the peaks while `answer` tokens (at least 2) are sampled for each prompt.

    The last token alone is sampled with a full cache.
    """
    filler = [policy.encoder.filler] * (answer - 2)
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
    return {**peaks, last: live.peaks[last]}


def learning(policy, sequences):
    """{moment: bytes} at the peaks of scoring and the way back; gradients are then there."""
    size = f"{len(sequences)} conversations of {len(sequences[0].ids)} tokens"
    live = policy.live
    live.start()
    with meta_kernels(), live, live.during("merging LoRA and its gradient"), policy.merged():
        with live.during(f"scoring {size}"):
            out = policy.score(sequences)
        with live.during(f"backward through {size}"):
            (out["logprobs"].sum() + out["values"].sum() + out["entropy"].sum()).backward()
    return live.peaks


def prompts_of(policy, rows, tokens, image):
    """Prompts of so many tokens beside those of the image; the last is one shorter, as prompts of
    unlike lengths need a mask. Of as many images as are encoded at once."""
    images = [None]
    ids = [policy.encoder.filler] * tokens
    if image is not None:
        at_once = max(1, PATCHES_AT_ONCE // policy.family.tower_patches(image))
        images = [image.copy() for _ in range(min(rows, at_once))]
        ids[1] = policy.family.image_token
        ids = policy.family.expand_image_tokens(ids, image)
    prompts = [Sequence(ids, [], images[row % len(images)]) for row in range(rows)]
    if rows > 1:
        prompts[-1] = replace(prompts[-1], ids=ids[:-1])
    return prompts


def with_answers(policy, prompts, answers, tokens):
    """Conversations: the prompts, each with so many answers of so many tokens."""
    for _ in range(answers):
        prompts = [prompt.answered([policy.encoder.filler] * tokens) for prompt in prompts]
    return prompts


# ---------------------------------------------------------------- the largest batches
@dataclass(frozen=True)
class Batch:
    """Equal prompts of `tokens`, an image's apart, and so many answers of each to learn."""
    rows: int
    tokens: int
    answers: int
    width: int  # tokens of a row, the image's and an answer that is learnt included
    image: object  # PIL image or None


def picture(env, verify_iters):
    """The first picture of an environment, or None."""
    return make_env(env, verify_iters).reset(0)[0]["image"]


def answer_tokens(model):
    return model.answer_tokens if model.random_init else model.max_new_tokens


def batches(policy, model, images, attempts, limit, most, answer):
    """One Batch of `limit` padded tokens, but at most `most` rows, per attempt and image.

    Args: answer: tokens of the answer at the end of a row, 0 if that is still to be sampled.
    """
    found = []
    for attempt, image in product(reversed(range(attempts)), images):
        tokens = model.prompt_tokens + attempt * model.revision_tokens
        width = len(prompts_of(policy, 1, tokens, image)[0].ids) + answer
        rows = min(most, max(1, limit // width))
        found.append(Batch(rows, tokens, attempt + 1, width, image))
    return found


def moments_of(policy, batch, answer, learnt):
    """{moment: bytes} of a batch; phases and attempts share batches, which are counted once."""
    image = batch.image and batch.image.size
    answers = batch.answers if learnt else 0
    key = (replace(batch, image=image, answers=answers), answer, policy.checkpointing,
           policy.merge_for_sampling)
    if key not in policy.counted:
        tokens = max(2, batch.tokens - max(0, answers - 1) * answer)
        prompts = prompts_of(policy, batch.rows, tokens, batch.image)
        if learnt:
            found = learning(policy, with_answers(policy, prompts, answers, answer))
        else:
            found = sampling(policy, prompts, answer)
        policy.counted[key] = found
    return policy.counted[key]


def largest(found):
    """Of several {moment: bytes}, the one with the largest moment."""
    return max(found, key=lambda moments: max(moments.values()))


def largest_sampling(cfg, policy, images, attempts, most):
    """Moments of the batch that needs most: of most tokens when read, or in the end."""
    answer = answer_tokens(cfg.model)
    found = batches(policy, cfg.model, images, attempts, cfg.model.sample_tokens, most, answer=0)
    candidates = [max(found, key=lambda batch: batch.rows * batch.width),
                  max(found, key=lambda batch: batch.rows * (batch.width + answer))]
    return largest([moments_of(policy, batch, answer, learnt=False) for batch in candidates])


def largest_learning(cfg, policy, image, section, attempts, most):
    """Moments of the micro-batch that needs most: of most tokens, answers or pictures."""
    answer = answer_tokens(cfg.model)
    found = batches(policy, cfg.model, [image], attempts, section.micro_tokens, most, answer)
    if section is cfg.sft:  # the last answer alone is learnt
        found = [replace(batch, answers=1) for batch in found]
    candidates = [max(found, key=lambda batch: batch.rows * batch.width),
                  max(found, key=lambda batch: batch.rows * batch.answers)]
    if image:
        candidates.append(max(found, key=lambda batch: batch.rows))
    return largest([moments_of(policy, batch, answer, learnt=True) for batch in candidates])


# ---------------------------------------------------------------- phases
@dataclass
class Phase:
    """lying: {what: bytes} all the time; moments: {moment: bytes} that live besides."""
    lying: dict
    moments: dict

    @property
    def peak(self):
        """(bytes, moment) of the largest moment with what lies there all the time."""
        moment = max(self.moments, key=self.moments.get)
        return sum(self.lying.values()) + self.moments[moment], moment


def lying(cfg, policy, name):
    """{what: bytes} that lies there all the time in a phase."""
    trainable = sum(p.nbytes for p in policy.trainable.values())
    learnt = sum(p.grad.nbytes for p in policy.trainable.values() if p.grad is not None)
    head = sum(p.nbytes for p in policy.value_head.parameters())
    found = {"weights": sum(policy.weights.values()),
             "LoRA, fp32": trainable if policy.has_lora else 0}
    if name == "eval.py":
        return found
    found["AdamW's moments"] = 2 * learnt
    if name != "rl.py rollout":
        found["gradients"] = learnt
    if name == "sft.py":
        found["value head"] = head
    else:
        found["value head, trained"] = 4 * head
        found["start of the KL penalty"] = trainable if cfg.ppo.kl_coef else 0
    return found


def moments(cfg, policy, name):
    """{moment: bytes} of a phase, beside what lies there."""
    sft, ppo, test = cfg.sft, cfg.ppo, cfg.eval
    if name == "eval.py":
        images = [picture({**cfg.env, **changes}, test.verify_iters)
                  for changes in test.variants.values()]
        return largest_sampling(cfg, policy, images, test.verify_iters, test.batch_size)
    image = picture(cfg.env, ppo.verify_iters)
    if name == "rl.py rollout":
        return largest_sampling(cfg, policy, [image], ppo.verify_iters, ppo.envs)
    if name == "sft.py":
        return largest_learning(cfg, policy, image, sft, sft.mistakes + 1, sft.batch_size)
    return largest_learning(cfg, policy, image, ppo, ppo.verify_iters, ppo.envs * ppo.turns)


def budget(cfg, phases=PHASES):
    """{name: Phase} of what scripts need. Raises: UserError."""
    policy = policy_of(cfg)
    found = {}
    for name in phases:
        found[name] = Phase(lying(cfg, policy, name), dict(moments(cfg, policy, name)))
        if "gradients" in found[name].lying:  # AdamW's square roots
            found[name].moments["optimiser step"] = found[name].lying["gradients"]
    return found


# ---------------------------------------------------------------- advice
def advice(cfg, name, free):
    """["key=value (GiB)"] of single changes with which a phase fits, each the least that does."""
    fitting = []
    if sum(lying(cfg, policy_of(cfg), name).values()) > free:
        return fitting
    for key in REMEDIES[name]:
        section, setting = key.split(".")
        changed = deepcopy(cfg)
        now = getattr(getattr(cfg, section), setting)
        halves = [max(1, now // 2**times) for times in range(1, 7)]
        for value in [SWITCHES[key]] if key in SWITCHES else halves:
            setattr(getattr(changed, section), setting, value)
            size, _ = budget(changed, [name])[name].peak
            if size <= free:
                fitting.append(f"{key}={str(value).lower()} ({size / GIB:.2f})")
                break
    return fitting


# ---------------------------------------------------------------- on screen, in GiB
def show(lines, indent="  "):
    for what, size in lines.items():
        if size >= GIB / 200:
            print(f"{indent}{what:{62 - len(indent)}}{size / GIB:8.2f}")


def main(arguments):
    """Print the plan of a configuration. arguments: CONFIG.yaml [key=value ...]."""
    cfg, _, _ = load(arguments)
    phases = budget(cfg)
    free = (cfg.model.memory - MARGIN) * GIB
    print("planned for the shape in {}={}".format(*shape_of(cfg.model)))
    print("\nweights, GiB")
    show(policy_of(cfg).weights)
    if picture(cfg.env, cfg.ppo.verify_iters):
        print("\nhost memory, GiB")
        show({"image cache": cfg.model.image_cache * GIB})
    for name, phase in phases.items():
        print(f"\n{name}, GiB")
        show({"all the time": sum(phase.lying.values())})
        show(phase.lying, "    ")
        show(phase.moments)
    card = ""
    if torch.cuda.is_available():
        card = f"; this card has {torch.cuda.get_device_properties(0).total_memory / GIB:.1f}"
    print(f"\npeaks in GiB, of model.memory={cfg.model.memory:g} less {MARGIN:g} for the CUDA "
          f"context and gaps{card}")
    over = []
    for name, phase in phases.items():
        size, moment = phase.peak
        if size > free:
            over.append(name)
        verdict = "DOES NOT FIT" if size > free else "fits"
        print(f"  {name:16}{size / GIB:8.2f}  {verdict}: {moment}")
    for name in over:
        fitting = advice(cfg, name, free)
        if fitting:
            print(f"{name} fits with {' or '.join(fitting)}")
        else:
            print(f"{name}: no single key of {', '.join(REMEDIES[name])} is enough")
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    run_main(main)
