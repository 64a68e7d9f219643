"""How much memory sft.py, rl.py and eval.py will need, before anything is loaded or downloaded.

    python plan.py CONFIG.yaml [key=value ...]          exit code 0: it fits model.memory, 1: it does not

The model is built without storage from model.path if that is a folder, else from model.shape; a picture is taken from the
environment; the formulas below count bytes: what lies on the device all the time and what each moment of a script adds. A
script's peak is its largest moment, over every number of attempts that a conversation may hold. Lengths are
model.prompt_tokens, revision_tokens and, as the longest answer, max_new_tokens (answer_tokens with random weights).

Held to the allocations of mid-sized Mllamas on a CPU: 3 % below to 12 % above them (tests/test_plan.py). A GPU's kernels
differ a little (workspaces, rounding, masks, batches of few rows not taken out of 4 bits); other families are estimates.
Letters: b bytes per number of model.dtype; C, I, Q, K widths of hidden states, MLP, queries and keys; V vocabulary.
"""
import math
import os
import re
import sys
from types import SimpleNamespace as Namespace

from policy import LOGITS_AT_ONCE as LOGITS, STATES_AT_ONCE, ValueHead  # first: it sets up the libraries
from lib.families import family_of as family
from lib.images import PATCHES_AT_ONCE as PATCHES
from lib.lora import add_lora as adapt
from lib.random_weights import skeleton
from lib.settings import UserError, find_model, load, one_line, run_main
from rollout import make_env

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoImageProcessor
from transformers.modeling_layers import GradientCheckpointingLayer


GIB, MARGIN = 2**30, 1.0  # GiB kept for the CUDA context and for gaps between blocks
BESIDE = ("sample_tokens", "merge_for_sampling", "gradient_checkpointing", "memory", "image_cache")  # not the model's shape
KNOWN = {}  # what describe and picture returned, by their arguments: advice asks again and again


# ---------------------------------------------------------------- the model and its pictures, without storage
def nf4(numel):
    """Bytes of a 4-bit weight: two per byte, a byte of scale per 64, 4 bytes per 256 scales, and its tables of codes."""
    scales = -(-numel // 64)
    return -(-numel // 2) + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)


def known(function, *settings):
    key = repr((function.__name__, settings))
    KNOWN[key] = KNOWN[key] if key in KNOWN else function(*settings)
    return KNOWN[key]


def shape_of(model):
    """Which key names the folder with the model's shape, and the folder."""
    path = find_model(model.path)
    if not model.random_init and os.path.isdir(path):
        return "model.path", path
    return "model.shape", find_model(model.shape)


def describe(model, lora, value_hidden):
    """What the formulas need: widths and counts, bytes of weights, which projections carry LoRA. Raises: UserError."""
    key, folder = shape_of(model)
    if not os.path.isdir(folder):
        raise UserError(f"model.shape: no folder {model.shape!r}")
    try:
        config, processor = AutoConfig.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {one_line(error)}") from None
    base, names = skeleton(model, config), family(config).parts
    patterns = {"lm_head": "lm_head", "embeddings": ".*embed_tokens", **names, "rest": ""}
    m = Namespace(eyes=family(config)(base, processor), b=base.dtype.itemsize, weights={})
    for name, p in base.named_parameters():
        part = next(part for part, pattern in patterns.items() if re.match(pattern, name))
        key = f"{part}, {'nf4' if isinstance(p, Params4bit) else model.dtype}"
        m.weights[key] = m.weights.get(key, 0) + (nf4(p.numel()) if isinstance(p, Params4bit) else p.numel() * m.b)
    m.largest = max((p.numel() for p in base.parameters() if isinstance(p, Params4bit)), default=0)
    with init_empty_weights():
        net, head = adapt(base, names, model.tune, lora), ValueHead(config.get_text_config().hidden_size, value_hidden)
    text, m.vision = config.get_text_config(), config.vision_config
    m.C, m.I, m.V, m.H = text.hidden_size, text.intermediate_size, text.vocab_size, text.num_attention_heads
    m.Q, m.K = ((getattr(text, "head_dim", None) or m.C // m.H) * heads for heads in (m.H, text.num_key_value_heads))
    crosses = list(getattr(text, "cross_attention_layers", []))
    m.selfs, m.crosses = text.num_hidden_layers - len(crosses), len(crosses)
    m.learns = {n: p.nbytes for n, p in net.named_parameters() if p.requires_grad}
    idle = "|".join(["(?!.*language_model|.*lm_head)", *(fr".*language_model\.layers\.{i}\." for i in crosses)])
    m.idle = sum(n for name, n in m.learns.items() if re.match(idle, name))  # gets no gradient from text alone
    m.lora, m.head = lora is not None, sum(p.nbytes for p in head.parameters())
    layers = {n: layer for n, layer in net.named_modules() if isinstance(layer, LoraLayer)}
    m.merged = sum(layer.get_base_layer().weight.numel() for layer in layers.values())
    m.own, m.across = ({n.split(".")[-1] for n in layers if f"language_model.layers.{i}." in n} for i in
                       (min(set(range(text.num_hidden_layers)) - set(crosses)), *(crosses or [-1])[:1]))
    tower = [layer for n, layer in base.named_modules() if re.match(names["vision"], n)]
    blocks = getattr(m.vision, "num_hidden_layers", 0) + getattr(m.vision, "num_global_layers", 0) or m.vision.depth
    width, inner = m.vision.hidden_size, m.vision.intermediate_size
    m.tower_kept = blocks * m.b * (7 * width + 3 * inner)
    again = any(isinstance(layer, GradientCheckpointingLayer) for layer in tower)  # Mllama's tower keeps all, come what may
    m.tower_inputs = blocks * m.b * width + m.tower_kept // blocks if again else m.tower_kept
    m.tower_mlp = m.b * inner * (3 if any(isinstance(layer, LoraLayer) for layer in tower) else 2)
    return m


def picture(eyes, env, verify_iters):
    """Of the environment's pictures: patches the text looks at, patches the tower works on, tokens added to the prompt."""
    image = make_env(env, verify_iters).reset(0)[0]["image"]
    if image is None:
        return Namespace(patches=0, tower=0, tokens=0)
    return Namespace(patches=eyes.image_patches(image), tower=eyes.tower_patches(image),
                     tokens=len(eyes.expand_image_tokens([eyes.image_token], image)) - 1)


# ---------------------------------------------------------------- moments: {moment: {what: bytes}}
def read_at_once(rows, width, channels):
    return math.ceil(rows / math.ceil(rows * width * channels / STATES_AT_ONCE))


def reading(m, tokens, patches):
    """Bytes of the largest layer, beside its cache, when `tokens` are read without a gradient and look at `patches`."""
    mlp = m.b * m.I * 3
    across = max(2 * m.b * m.Q, (8 + m.b) * m.K)  # keys and values repeated for all heads; before that their norm in fp32
    return tokens * 4 * m.b * m.C + max(tokens * max(mlp, 6 * m.b * m.Q), patches * across + tokens * m.b * m.C)


def kept(m, tokens, patches):
    """Bytes that autograd keeps of one self-attention layer and of one cross-attention layer (0 without patches)."""
    def inputs(lora, *names):  # of projections with LoRA or, without it, of all; they share one
        return m.b * max((m.I if name == "down_proj" else m.C for name in names if name in lora or not m.lora), default=0)

    def layer(lora):  # norms, attention, MLP
        return (8 * m.C + 2 * m.b * m.Q + 4 * m.H + 3 * m.b * m.I + inputs(lora, "gate_proj", "up_proj")
                + inputs(lora, "down_proj"))

    own = layer(m.own) + inputs(m.own, "q_proj", "k_proj", "v_proj") + 2 * m.b * m.Q
    across = layer(m.across) + inputs(m.across, "q_proj") + 4 * m.Q
    looked = 4 * m.K + 2 * m.b * m.Q
    return tokens * own, (tokens * across + patches * looked) * bool(patches)


def dequantised(m):
    """Bytes of the largest weight out of 4 bits with its scales, which lives while one projection is computed."""
    return m.largest * m.b + m.largest // 64 * 8


def seeing(m, image, rows, always, gathered):
    """New pictures of a batch: vlm.PATCHES at once go through the tower, which keeps every layer's states; then their
    features return from host memory, those of `gathered` rows at once."""
    v, several, one = m.vision, min(rows, max(1, PATCHES // image.tower)), m.C * m.b
    layers = getattr(v, "num_hidden_layers", 0) + getattr(v, "num_global_layers", 0)
    tokens, taken = several * image.tower, len(getattr(v, "intermediate_layers_indices", ()))
    last = max((2 * taken + 2) * v.hidden_size * m.b, 3 * v.hidden_size * m.b + m.tower_mlp)
    return {f"encoding {several} of {rows} pictures": {
        **always, "hidden states of the vision tower": tokens * (v.hidden_size * m.b * layers + last),
        "attention mask of the vision tower": tokens * image.tower * m.b, "pixels": tokens * 3 * v.patch_size**2 * (m.b + 4)},
        f"gathering {gathered} pictures": {**always, "image features, twice": gathered * 2 * image.patches * one}}


def sampling(m, image, rows, width, answer, merged):
    """vlm.Policy._sample: `rows` prompts of `width` tokens, read in parts, answers of `answer` tokens."""
    patches, layer = rows * image.patches * bool(m.crosses), rows * m.K * m.b * 2  # of a layer: keys and values of a token
    cached, part = layer * (width + answer), read_at_once(rows, width, m.C)
    always = {"dense copies of tuned layers": m.merged * m.b} if merged else \
        {f"LoRA, {8 * m.b} bits": sum(m.learns.values()) // 4 * m.b * m.lora}
    caches = {**always, "cross-attention cache": patches * m.K * m.b * 2 * m.crosses}
    read = {**caches, "KV cache": layer * width * m.selfs}
    return {f"reading {part} of {rows} prompts of {width} tokens": {
        **read, "image features": part * patches // rows * m.C * m.b,
        "attention mask": part * width**2 * (1 + m.b), "a weight out of 4 bits": dequantised(m),
        "one layer's activations": reading(m, part * width, part * patches // rows)},
        **({f"joining caches of {rows} prompts": {
            **read, "one layer's keys again": max(layer // 2 * width, patches * m.K * m.b)}} if part < rows else {}),
        f"sampling {rows} answers of {answer} tokens": {
        **caches, "KV cache": cached * m.selfs,
        "logits, or one layer's new cache or activations, weight": max(
            (24 + m.b) * rows * m.V, max(cached // 2, reading(m, rows, 0)) + dequantised(m))},
        **(seeing(m, image, rows, always, part) if image.patches else {})}


def learning(m, image, rows, width, scored, checkpointing, eyes):
    """vlm.Policy.score and its backward: `rows` conversations of `width` tokens, `scored` of all being answers'.

    eyes: they learn too. With checkpointing a layer keeps its input alone and is computed again.
    """
    tokens, patches = rows * width, rows * image.patches * bool(m.crosses)
    (own, across), chunk = kept(m, tokens, patches), min(scored, max(1, LOGITS // m.V))
    always = {"image features": rows * image.patches * m.C * m.b, "attention mask": rows * width**2 * (1 + m.b),
              "a gradient to be added": max(m.learns.values())}
    if eyes and image.patches:
        always["vision tower"] = rows * image.tower * (m.tower_inputs if checkpointing else m.tower_kept)
    if checkpointing:
        always["input of every layer"] = (m.selfs + m.crosses * bool(patches)) * tokens * m.C * m.b
    else:
        always["activations of all layers"] = m.selfs * own + m.crosses * across
    logits = (20 + m.b) * chunk * m.V if checkpointing else 12 * scored * m.V + (8 + m.b) * chunk * m.V
    gradients = max(tokens * m.b * m.I, patches * 2 * m.b * m.Q - tokens * 4 * m.b * m.I) + tokens * m.C * (4 + m.b)
    size = f"{rows} conversations of {width} tokens"
    return {f"scoring {size}": {**always, "logits, copies": logits, "final hidden states": tokens * m.C * (4 + 2 * m.b)},
            f"backward through {size}": {**always, "one layer's activations": max(own, across) * checkpointing,
                                         "its gradients": gradients, "a weight out of 4 bits": dequantised(m)},
            **(seeing(m, image, rows, {}, rows) if image.patches and not eyes else {})}


# ---------------------------------------------------------------- phases
def budget(cfg):
    """What each script needs, in bytes.

    Returns: {"weights": {part and precision: bytes}, "host memory": {what: bytes}} and per phase (sft.py, rl.py rollout,
    rl.py update, eval.py) {"all the time": {what: bytes}, moment: {what: bytes} ..}; see `peak`. Raises: UserError.
    """
    model, ppo, sft = cfg.model, cfg.ppo, cfg.sft
    shape = Namespace(**{k: value for k, value in vars(model).items() if k not in BESIDE})
    m = known(describe, shape, cfg.lora, ppo.value_hidden)
    train, *tests = (known(picture, m.eyes, {**cfg.env, **changes}, ppo.verify_iters)
                     for changes in ({}, *cfg.eval.variants.values()))
    test = max(tests, key=lambda image: image.patches)
    answer = model.answer_tokens if model.random_init else model.max_new_tokens

    def worst(image, attempts, moments_of):
        widths = [model.prompt_tokens + image.tokens + k * model.revision_tokens for k in range(attempts)]
        return max((moments_of(width, k) for k, width in enumerate(widths, 1)),
                   key=lambda moments: max(sum(lines.values()) for lines in moments.values()))

    def rollout(image, envs, attempts):
        return worst(image, attempts, lambda width, k: sampling(
            m, image, min(envs, max(1, model.sample_tokens // width)), width, answer, model.merge_for_sampling))

    def update(section, most, attempts):
        def of(width, k):
            rows = min(most, max(1, section.micro_tokens // (width + answer)))
            scored = rows * answer * (1 if section is sft else k)  # of SFT's answers the last alone
            return learning(m, train, rows, width + answer, scored, model.gradient_checkpointing, model.tune != ["language"])
        return worst(train, attempts, of)

    total = sum(m.learns.values())
    used = total - (0 if train.patches else m.idle)
    weights = {"weights": sum(m.weights.values()), "LoRA, fp32": total * m.lora}
    trained = {**weights, "gradients": used, "AdamW's moments": 2 * used}
    rl = {**trained, "start of the KL penalty": total * bool(ppo.kl_coef), "value head, trained": 4 * m.head}
    playing = {what: n for what, n in rl.items() if what != "gradients"}
    step = {"optimiser step": {"square roots of AdamW": used}}
    return {"weights": m.weights, "host memory": {"image cache": int(model.image_cache * GIB) * bool(train.patches)},
            "sft.py": {"all the time": {**trained, "value head": m.head}, **step,
                       **update(sft, sft.batch_size, sft.mistakes + 1)},
            "rl.py rollout": {"all the time": playing, **rollout(train, ppo.envs, ppo.verify_iters)},
            "rl.py update": {"all the time": rl, **update(ppo, ppo.envs * ppo.turns, ppo.verify_iters), **step},
            "eval.py": {"all the time": weights, **rollout(test, cfg.eval.batch_size, cfg.eval.verify_iters)}}


def peaks(plan):
    """{phase: (bytes, moment)} of a budget: the largest moment with what lies there all the time."""
    return {phase: max((sum(always["all the time"].values()) + sum(lines.values()), moment)
                       for moment, lines in always.items() if moment != "all the time")
            for phase, always in plan.items() if "all the time" in always}


# ---------------------------------------------------------------- advice
def need(arguments, phase):
    """Bytes at the peak of a phase under these arguments; infinite if they are refused."""
    try:
        return peaks(budget(load(arguments)[0]))[phase][0]
    except UserError:  # the environment draws no such picture, or the keys exclude one another
        return float("inf")


def choices(cfg, phase):
    """{key: values to try} of what a phase's memory depends on, the least change first."""
    def halves(value, least):
        found = [[n >> i for n in value] if isinstance(value, list) else value >> i for i in range(1, 9)]
        return [half for half in found if min(half if isinstance(half, list) else [half]) >= least]

    image, section = cfg.env.get("image_size"), {"sft.py": "sft", "rl.py update": "ppo"}.get(phase)
    if section:
        found = {"model.gradient_checkpointing": ["true"],
                 f"{section}.micro_tokens": halves(getattr(cfg, section).micro_tokens, 128)}
    else:
        found = {"model.sample_tokens": halves(cfg.model.sample_tokens, 128), "model.merge_for_sampling": ["false"]}
    if phase == "eval.py":
        found["eval.batch_size"] = halves(cfg.eval.batch_size, 1)
    return {**found, "model.quantization": ["nf4"], "model.dtype": ["bfloat16"], "model.tune": ["[language]"],
            "lora.r": halves(cfg.lora.r, 1) if cfg.lora else [], "env.image_size": halves(image, 100) if image else []}


def advice(arguments, cfg, phase, free):
    """[(bytes, "key=value")] of what makes an overflowing phase smaller, the best first: of each key the least change with
    which it fits, or the value that helps most; at the end several together, if none is enough alone."""
    helps, now = [], need(arguments, phase)
    for key, values in choices(cfg, phase).items():
        tried = []
        for value in values:
            change = f"{key}={value}".replace(" ", "")
            tried.append((need([*arguments, change], phase), change))
            if tried[-1][0] <= free:
                break
        helps += [best for best in sorted(tried)[:1] if best[0] < now]
    helps.sort()
    for last in range(2, len(helps) + 1) if helps and helps[0][0] > free else ():
        together = [change for _, change in helps[:last]]
        if need([*arguments, *together], phase) <= free:
            return [(need([*arguments, *together], phase), " ".join(together)), *helps]
    return helps


def widest(arguments, free):
    """The most tables, up to 1024, all of whose answers can be sampled in one batch; 0 if none."""
    low, high = 0, 1025
    while high - low > 1:
        middle = (low + high) // 2
        fits = need([*arguments, f"ppo.envs={middle}", "model.sample_tokens=1000000000"], "rl.py rollout") <= free
        low, high = (middle, high) if fits else (low, middle)
    return low


# ---------------------------------------------------------------- on screen, in GiB
def show(name, lines, open_lines=()):
    """A part of the plan; of the named entries also what they consist of."""
    print(f"\n{name}")
    for what, value in lines.items():
        if (total := sum(value.values()) if isinstance(value, dict) else value) >= GIB / 200 or what in open_lines:
            print(f"  {what:60}{total / GIB:8.2f}")
        for part, n in sorted(value.items(), key=lambda item: -item[1]) if what in open_lines else ():
            if n >= GIB / 200:
                print(f"    {part:58}{n / GIB:8.2f}")


def main(arguments):
    cfg, _, _ = load(arguments)
    plan = budget(cfg)
    tops, free = peaks(plan), (cfg.model.memory - MARGIN) * GIB
    print("planned for the shape in {}={}".format(*shape_of(cfg.model)))
    for name, lines in plan.items():
        show(f"{name}, GiB", lines, ("all the time", tops[name][1]) if name in tops else ())
    card = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory / GIB
    card = f"; this card has {card:.1f}" if card else ""
    print(f"\npeaks in GiB, of model.memory={cfg.model.memory:g} less {MARGIN:g} for the CUDA context and gaps{card}")
    for phase, (n, moment) in tops.items():
        print(f"  {phase:16}{n / GIB:8.2f}  {'fits' if n <= free else 'DOES NOT FIT'}: {moment}")
    print(f"a rollout fits up to ppo.envs={widest(arguments, free)} in one batch, with model.sample_tokens large enough")
    over = [phase for phase in tops if tops[phase][0] > free]
    for phase in over:
        helps = advice(arguments, cfg, phase, free)
        fits, less = ([f"{change} ({n / GIB:.2f})" for n, change in helps if (n <= free) == fit] for fit in (True, False))
        print(f"{phase} fits with {' or '.join(fits) or 'none of its keys'}; smaller with {', '.join(less) or 'no other'}")
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    run_main(main)
