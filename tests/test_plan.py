"""plan.py against reality: bytes of real weights and optimisers, peaks of real allocations; figures
made by hand; advice.

Allocations are those of torch's CPU allocator as its profiler reports them, kernels' own buffers
included; those grow with
the number of threads, which is therefore one here; numpy's (pixels in fp32) are not among them.
"""

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from benchmark_card import stored
from conftest import FROZEN, PICTURES, ROOT
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

import plan
from lib import head
from lib.errors import UserError
from lib.random_weights import skeleton
from lib.settings import load
from lib.batching import Sequence
from policy import STATES_AT_ONCE, Policy

LARGE = ROOT / "configs" / "11b"
GIB = 2**30


@pytest.fixture(autouse=True)
def head_in_many_parts(request, monkeypatch):
    """As of a real model's output layer, only a small part of a middle-sized one's is float32 at a
    time.
    """
    if {"middle", "other"} & set(request.fixturenames):
        monkeypatch.setattr(head, "WEIGHTS_AT_ONCE", 2**18)


# ---------------------------------------------------------------- a middle-sized Mllama
def write_shape(folder, image=140, tower=160, vocab=8192):
    """The 11B's shape made small: 8 layers of 512, two of them cross-attention, pictures of up to 4
    tiles.
    """
    shape = json.loads((LARGE / "llama-3.2-11b-vision" / "config.json").read_text())
    shape["text_config"].update(
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=8,
        cross_attention_layers=[1, 5],
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=vocab,
        bos_token_id=256,
        eos_token_id=259,
        pad_token_id=261,
    )
    shape["vision_config"].update(
        hidden_size=tower,
        intermediate_size=4 * tower,
        num_hidden_layers=8,
        num_global_layers=2,
        attention_heads=4,
        image_size=image,
        intermediate_layers_indices=[0, 1, 3, 5, 6],
        vision_output_dim=6 * tower,
    )
    pixels = json.loads((LARGE / "llama-3.2-11b-vision" / "preprocessor_config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**pixels, "size": {"height": image, "width": image}})
    )
    return folder


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """middle(shape, *overrides): (policy, what plan knows of it); of each only one is built."""
    folder, made = tmp_path_factory.mktemp("shapes"), {}
    shapes = {
        "middle": write_shape(folder / "middle"),
        "wide": write_shape(folder / "wide", 280, 320, 1024),
    }

    def make(shape, *overrides):
        if (shape, *overrides) not in made:
            cfg, *_ = load(
                [
                    str(LARGE / "gp_vl.yaml"),
                    f"model.shape={shapes[shape]}",
                    "model.random_init=true",
                    "model.device=cpu",
                    *FROZEN,
                    *overrides,
                ]
            )
            made[shape, *overrides] = (
                Policy(cfg.model, cfg.lora, cfg.ppo.value_hidden),
                plan.MetaPolicy(cfg.model, cfg.lora, cfg.ppo.value_hidden),
            )
            for policy in made[shape, *overrides]:
                policy.states_at_once = STATES_AT_ONCE["cuda"]  # one part, the largest there is
        return made[shape, *overrides]

    return make


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


VISION = (
    "model.tune=[language,projector,vision]",
    "lora.target_modules='.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|multi_modal_projector)'",
)
HALF = ("model.dtype=float16",)  # the eyes are in float32
FULL = ("lora=null", "model.quantization=none", "model.dtype=float32")
DENSE32 = ("model.quantization=none", "model.dtype=float32")
MERGED32 = (*DENSE32, "model.merge_for_sampling=true")


# ---------------------------------------------------------------- what lies there all the time
@pytest.mark.parametrize(
    "overrides",
    [(), VISION, HALF, slow(FULL), slow(DENSE32), slow(("model.keep_unquantized=[lm_head]",))],
)
def test_weights_are_counted_to_the_byte(middle, overrides):
    policy, m = middle("middle", *overrides)
    found = {}
    for name, p in policy.base.named_parameters():
        if "lora_" not in name:
            part = (
                "lm_head"
                if "lm_head" in name
                else "embeddings"
                if "embed_tokens" in name
                else "vision"
                if "vision_model" in name
                else "projector"
                if "projector" in name
                else "language"
            )
            kind = f"{part}, {'nf4' if hasattr(p, 'quant_state') else str(p.dtype)[6:]}"
            found[kind] = found.get(kind, 0) + stored(p)
    assert m.weights == found
    assert sum(p.nbytes for p in m.trainable.values()) == sum(
        p.nbytes for p in policy.trainable.values()
    )
    assert sum(p.nbytes for p in m.value_head.parameters()) == sum(
        p.nbytes for p in policy.value_head.parameters()
    )


@pytest.mark.parametrize("picture", [False, True])
def test_gradients_and_moments_are_those_of_what_the_text_reads(middle, picture):
    policy, m = middle("middle")
    answers(
        policy, conversations(policy, 1, 8, Image.new("RGB", (140, 140)) if picture else None, 1, 4)
    )
    optimizer = torch.optim.AdamW(policy.trainable.values())
    optimizer.step()
    m.checkpointing = False
    for p in m.trainable.values():
        p.grad = None
    plan.learning(
        m, conversations(policy, 1, 8, Image.new("RGB", (140, 140)) if picture else None, 1, 4)
    )
    learning = sum(p.grad.nbytes for p in m.trainable.values() if p.grad is not None)
    assert sum(p.grad.nbytes for p in policy.trainable.values() if p.grad is not None) == learning
    moments = sum(s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
    assert moments == 2 * learning
    for p in policy.trainable.values():
        p.grad = None


# ---------------------------------------------------------------- what moments allocate
def allocated(function):
    """Peak in bytes of what torch allocates on the CPU during the call, beside what was there
    before.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    finally:
        torch.set_num_threads(threads)
    events = sorted(
        (
            (e.start_ns(), i, e.nbytes())
            for i, e in enumerate(profiler.profiler.kineto_results.events())
            if e.name() == "[memory]"
        )
    )
    now = top = 0
    for _, _, size in events:
        now += size
        top = max(top, now)
    return top


def conversations(policy, rows, width, image=None, spans=0, answer=0):
    """Prompts of `width` tokens, each with a picture of its own or none, followed by `spans`
    answers.
    """
    found = []
    for _ in range(rows):
        ids = [policy.encoder.filler] * width
        if image is not None:
            ids[1] = policy.family.image_token
            ids = policy.family.expand_image_tokens(ids, image)
        sequence = Sequence(ids, [], image and image.copy())
        for _ in range(spans):
            sequence = sequence.answered([policy.encoder.filler] * answer)
        found.append(sequence)
    return found


def answers(policy, sequences):
    with policy.merged():
        out = policy.score(sequences, 0.5)
        (out["logprobs"].sum() + out["values"].sum() + out["entropy"].sum()).backward()


def compare(moments, tracked, dominant, pixels=0, features=0):
    """The plan is hardly below the truth and little above it; its largest moment is the one that
    the case is for.

    pixels: bytes of fp32 that an encoding has on the device and numpy, which is not tracked, on a
    CPU.
    features: bytes of remembered features, which on a CPU lie in the memory that is tracked.
    """
    sums = {}
    for moment, size in moments.items():
        sums[moment] = size - pixels if moment.startswith("encoding") else size + features
    top = max(sums, key=sums.get)
    ratio = sums[top] / tracked
    print(
        f"{top}: planned {sums[top]:,} bytes, allocated {tracked:,}, {ratio - 1:+.1%}; {dominant}"
    )
    assert 0.97 < ratio < 1.12
    assert top.startswith(dominant)


def pixels_of(policy, image, rows):
    return rows * policy.family._pixels([image])["pixel_values"].nbytes if image else 0


TALL, SQUARE = (280, 140), (560, 560)  # two tiles of the middle shape, four of the wide one


@pytest.mark.parametrize(
    "shape, overrides, rows, width, answer, size, dominant",
    [
        ("middle", (), 16, 100, 2, None, "reading"),
        ("middle", (), 64, 20, 2, None, "reading"),
        slow("middle", (), 64, 4, 16, None, "sampling"),
        slow("middle", ("model.keep_unquantized=[]",), 64, 4, 16, None, "sampling"),
        slow("wide", (), 32, 4, 35, None, "sampling"),  # the last token makes the caches grow
        slow("middle", (), 4, 200, 2, TALL, "reading"),
        ("middle", (), 8, 20, 2, TALL, "encoding"),
        slow("wide", (), 2, 20, 2, SQUARE, "encoding"),
        ("middle", ("model.merge_for_sampling=true",), 16, 100, 2, None, "reading"),
        slow("middle", VISION, 4, 20, 2, TALL, "encoding"),
        slow("middle", DENSE32, 16, 50, 2, None, "reading"),
        slow("middle", FULL, 16, 100, 2, None, "reading"),
    ],
)
def test_sampling(middle, shape, overrides, rows, width, answer, size, dominant):
    policy, m = middle(shape, *overrides)
    image = size and Image.new("RGB", size)
    policy.images.remembered.clear()
    policy.sample_tokens = 10**9
    prompts = conversations(policy, rows, width, image)
    tracked = allocated(lambda: policy.sample(prompts, 1.0, None, answer))
    m.images.clear()
    m.merge_for_sampling = policy.merge_for_sampling
    features = sum(f.nbytes for _, images, _ in policy.images.remembered.values() for f in images)
    compare(
        plan.sampling(m, prompts, answer),
        tracked,
        dominant,
        pixels_of(policy, image, rows),
        features,
    )


@pytest.mark.parametrize("rows, width", [slow(2, 20), (4, 60)])
def test_reading_prompts_whose_pictures_were_seen_before(middle, rows, width):
    """All but the tower: the cross-attention cache, features, and keys and values of a layer
    repeated for all heads.
    """
    policy, m = middle("wide")
    image = Image.new("RGB", SQUARE)
    prompts = conversations(policy, rows, width, image)
    policy.images.remembered.clear()
    policy.sample_tokens = 10**9
    policy.sample(prompts, 1.0, None, 1)
    tracked = allocated(lambda: policy.sample(prompts, 1.0, None, 2))
    m.merge_for_sampling = False
    plan.sampling(m, prompts, 2)
    compare(plan.sampling(m, prompts, 2), tracked, "reading")


@pytest.mark.parametrize(
    "shape, rows, width, size, part, dominant",
    [
        slow("middle", 64, 100, None, 32, "reading"),
        ("middle", 16, 100, None, 4, "reading"),
        slow("wide", 6, 60, SQUARE, 1, "reading"),
        ("wide", 6, 20, SQUARE, 3, "reading"),
    ],
)
def test_prompts_read_in_parts_need_the_activations_of_one(
    middle, monkeypatch, shape, rows, width, size, part, dominant
):
    """Beside the caches of all; pictures were seen before."""
    policy, m = middle(shape)
    image = size and Image.new("RGB", size)
    for one in (policy, m):
        monkeypatch.setattr(one, "states_at_once", part * width * m.base.lm_head.in_features)
    monkeypatch.setattr(policy, "sample_tokens", 10**9)
    prompts = conversations(policy, rows, width)
    prompts = [
        replace(p, ids=[policy.encoder.filler, policy.family.image_token, *p.ids[2:]], image=image)
        if size
        else p
        for p in prompts
    ]
    policy.sample(prompts[:1], 1.0, None, 1)
    tracked = allocated(lambda: policy.sample(prompts, 1.0, None, 2))
    m.merge_for_sampling = False
    plan.sampling(m, prompts[:1], 2)
    compare(plan.sampling(m, prompts, 2), tracked, dominant)


@pytest.mark.parametrize(
    "shape, overrides, rows, width, spans, answer, size, checkpointing, dominant",
    [
        ("middle", (), 4, 100, 1, 8, None, True, "backward"),
        slow("middle", (), 4, 200, 1, 4, None, True, "backward"),
        ("middle", (), 4, 20, 3, 20, None, True, ("scoring", "backward")),
        ("middle", (), 4, 100, 1, 8, None, False, ("scoring", "backward")),
        slow("middle", (), 2, 10, 3, 40, None, False, ("scoring", "backward")),
        slow("middle", (), 4, 100, 1, 8, TALL, True, "backward"),
        slow("wide", (), 2, 20, 1, 8, SQUARE, True, "backward"),
        slow("wide", (), 2, 20, 1, 8, SQUARE, False, ("scoring", "backward")),
        slow("middle", DENSE32, 4, 100, 1, 8, None, True, "backward"),
        slow("middle", DENSE32, 4, 40, 1, 8, TALL, False, ("scoring", "backward")),
        ("middle", MERGED32, 4, 100, 1, 8, None, True, "backward"),
        slow("middle", (*MERGED32, *VISION), 4, 40, 1, 8, TALL, False, ("scoring", "backward")),
        slow("middle", FULL, 4, 100, 1, 8, None, False, ("scoring", "backward")),
        ("middle", VISION, 2, 40, 1, 8, TALL, True, ("scoring", "backward")),
        slow("middle", (*VISION, *FULL), 2, 40, 1, 8, TALL, True, ("scoring", "backward")),
    ],
)
def test_update(
    middle, shape, overrides, rows, width, spans, answer, size, checkpointing, dominant
):
    policy, m = middle(shape, *overrides)
    image = size and Image.new("RGB", size)
    policy.checkpointing = checkpointing
    sequences = conversations(policy, rows, width, image, spans, answer)
    answers(policy, sequences)  # now there are gradients, and a frozen tower has seen the pictures
    tracked = allocated(lambda: answers(policy, sequences))
    m.checkpointing = checkpointing
    m.merge_for_sampling = policy.merge_for_sampling
    plan.learning(m, sequences)
    compare(plan.learning(m, sequences), tracked, dominant)


# ---------------------------------------------------------------- other families
OTHERS = {  # folder under configs: what makes its text and its vision middle-sized
    "8gb/qwen3-vl-2b": (
        {
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [12, 10, 10],
                "rope_type": "default",
            }
        },
        {
            "depth": 4,
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_heads": 4,
            "out_hidden_size": 512,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
    "8gb/smolvlm2-256m": (
        {},
        {
            "num_hidden_layers": 4,
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_attention_heads": 4,
            "image_size": 128,
        },
    ),
}


@pytest.fixture(scope="module", params=list(OTHERS))
def other(request, tmp_path_factory):
    """As `middle`, of another family; pictures of 256 x 128 take 32 tokens or 3 tiles."""
    shape = ROOT / "configs" / request.param
    config = json.loads((shape / "config.json").read_text())
    pixels = json.loads((shape / "preprocessor_config.json").read_text())
    text, vision = OTHERS[request.param]
    config["text_config"].update(
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=8192,
        bos_token_id=256,
        eos_token_id=259,
        pad_token_id=261,
        **text,
    )
    config["vision_config"].update(vision)
    if "smolvlm" in request.param:
        pixels.update(size={"longest_edge": 256}, max_image_size={"longest_edge": 128})
    else:
        pixels.update(size={"longest_edge": 256 * 128, "shortest_edge": 64 * 64})
    folder = tmp_path_factory.mktemp("other")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    overrides = [f"model.shape={folder}", "model.random_init=true", "model.device=cpu"]
    cfg, *_ = load([str(ROOT / "configs" / "8gb" / "gp_vl.yaml"), *overrides])
    made = (
        Policy(cfg.model, cfg.lora, cfg.ppo.value_hidden),
        plan.MetaPolicy(cfg.model, cfg.lora, cfg.ppo.value_hidden),
    )
    for policy in made:
        policy.states_at_once = STATES_AT_ONCE["cuda"]
        policy.sample_tokens = 10**9
    return made


def test_weights_of_other_families_are_counted_to_the_byte(other):
    """A head that is the embeddings once more counts once."""
    policy, m = other
    real = [p for name, p in policy.base.named_parameters() if "lora_" not in name]
    assert sum(m.weights.values()) == sum(stored(p) for p in real)
    assert policy.parameters == m.parameters
    assert sum(p.nbytes for p in m.trainable.values()) == sum(
        p.nbytes for p in policy.trainable.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (256, 128)])
def test_sampling_of_other_families(other, size):
    policy, m = other
    image = size and Image.new("RGB", size)
    prompts = conversations(policy, 4, 100, image)
    policy.sample(prompts, 1.0, None, 1)  # pictures are seen
    tracked = allocated(lambda: policy.sample(prompts, 1.0, None, 2))
    plan.sampling(m, prompts, 2)
    compare(plan.sampling(m, prompts, 2), tracked, ("reading", "sampling"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (256, 128)])
def test_update_of_other_families(other, size):
    policy, m = other
    image = size and Image.new("RGB", size)
    sequences = conversations(policy, 4, 100, image, 1, 8)
    answers(policy, sequences)
    tracked = allocated(lambda: answers(policy, sequences))
    plan.learning(m, sequences)
    compare(plan.learning(m, sequences), tracked, ("scoring", "backward"))


# ---------------------------------------------------------------- docs/models.md
MODELS_PAGE = (ROOT / "docs" / "models.md").read_text()
LINKED = re.findall(r"\]\(\.\./(configs/\S+\.yaml)\)", MODELS_PAGE)
PLANNED = re.findall(  # (path, four figures) of each row that has them
    r"\]\(\.\./(configs/\S+\.yaml)\)[^\n]*?((?: \d+\.\d \|){4})\n", MODELS_PAGE
)
PARAMETERS = {  # of the weights on the hub: the sizes of its files, in two or four bytes each
    "8gb/qwen3-vl-2b": 2_127_532_032,
    "16gb/qwen3-vl-4b": 4_437_815_808,
    "8gb/smolvlm2-256m": 256_484_928,
    "8gb/smolvlm2-500m": 507_482_304,
    "8gb/smolvlm2-2.2b": 2_246_784_880,
}


@pytest.mark.parametrize("shape", list(PARAMETERS))
def test_shapes_have_as_many_parameters_as_the_models(shape):
    overrides = [f"model.shape=configs/{shape}", "model.quantization=none"]
    cfg, *_ = load([str(ROOT / "configs" / "8gb" / "gp_l.yaml"), *overrides])
    base = skeleton(cfg.model, AutoConfig.from_pretrained(ROOT / "configs" / shape))
    assert sum(p.numel() for p in base.parameters()) == PARAMETERS[shape]


@pytest.mark.slow
@pytest.mark.parametrize("path, figures", PLANNED)
def test_documented_plans_are_those_of_the_configurations(path, figures):
    cfg, *_ = load([str(ROOT / path)])
    peaks = [phase.peak[0] / GIB for phase in plan.budget(cfg).values()]
    assert [f"{peak:.1f}" for peak in peaks] == re.findall(r"[\d.]+", figures)
    assert max(peaks) <= cfg.model.memory - plan.MARGIN


def test_every_configuration_of_a_card_is_documented():
    shipped = [f"configs/{p.parent.name}/{p.name}" for p in ROOT.glob("configs/*gb/*.yaml")]
    assert len(shipped) == 8 and sorted(LINKED) == sorted(shipped)


# ---------------------------------------------------------------- the 11B by hand
SIZES = (
    "model.sample_tokens=8192",
    "ppo.micro_tokens=2048",
    "sft.micro_tokens=4096",
    "ppo.envs=32",
    "eval.batch_size=32",
    "model.max_new_tokens=160",
    "model.memory=24",
    *FROZEN,
)


@functools.lru_cache
def large(name, *overrides, phases=tuple(plan.PHASES)):
    """The plan of a configuration of the 11B, of batches of a fixed size."""
    return plan.budget(load([str(LARGE / f"{name}.yaml"), *SIZES, *overrides])[0], phases)


def large_weights(name, *overrides):
    return plan.policy_of(load([str(LARGE / f"{name}.yaml"), *SIZES, *overrides])[0]).weights


def large_lying(phase, name, *overrides):
    """What lies there all the time, for which no moment needs to be played."""
    cfg, *_ = load([str(LARGE / f"{name}.yaml"), *SIZES, *overrides])
    return plan.lying(cfg, plan.policy_of(cfg), phase)


@pytest.mark.slow
def test_weights_of_the_11b():
    weights, elements = (
        large_weights("gp_l"),
        40 * 3 * 4096 * 14336 + 40 * (2 * 4096 + 2 * 1024) * 4096,
    )
    assert (
        weights["lm_head, bfloat16"] == 2 * 128256 * 4096
        and weights["embeddings, bfloat16"] == 2 * 128264 * 4096
    )
    assert weights["language, nf4"] == pytest.approx(
        elements * (1 / 2 + 1 / 64 + 4 / 64 / 256), rel=1e-3
    )
    assert weights["projector, bfloat16"] == 2 * (7680 * 4096 + 4096)
    assert sum(weights.values()) == pytest.approx(8.4e9, rel=0.01)
    assert sum(large_weights("gp_l", "model.quantization=none").values()) == 2 * 10_670_220_835


@pytest.mark.slow
def test_weights_of_the_11b_that_keeps_only_its_head_in_16_bits():
    weights = large_weights("gp_l", "model.keep_unquantized=[lm_head]")
    assert sum(weights.values()) == pytest.approx(7.2e9, rel=0.02)


def test_adapters_of_the_11b():
    """r (in + out) per projection; in text the 8 cross-attention layers have no gradient."""
    layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    still = large_lying("rl.py update", "gp_l")
    assert still["LoRA, fp32"] == still["start of the KL penalty"] == 40 * layer * 4 == 209_715_200
    assert still["gradients"] == 32 * layer * 4 and still["AdamW's moments"] == 2 * 32 * layer * 4
    assert still["value head, trained"] == 4 * 4 * (2 * 4096 + 4097 * 1024 + 1025 * 512 + 513)


@pytest.mark.slow
def test_adapters_of_the_11b_with_pictures_or_without_a_start():
    layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    sft = large_lying("sft.py", "virl_vl")
    assert sft["gradients"] == 40 * layer * 4 and "start of the KL penalty" not in sft
    free = large_lying("rl.py update", "gp_l", "ppo.kl_coef=0")
    assert free["start of the KL penalty"] == 0


@pytest.mark.slow
def test_caches_of_the_11b():
    """131 kB of keys and values per token of 32 layers; 0.21 GB per sequence that looks at 4 tiles
    of 1601 patches. Beside
    them lie the states, activations and logits of a step."""
    moments = large("virl_vl", phases=("rl.py rollout",))["rl.py rollout"].moments
    (sampling,) = (
        size for moment, size in moments.items() if moment.startswith("sampling 11 answers of 160")
    )
    caches = 11 * 860 * 131_072 + 11 * 209_846_272
    assert 1 < sampling / caches < 1.25


NOT_CHECKPOINTED = (  # as the configurations' comments say
    "model.gradient_checkpointing=false",
    "model.tune=[language]",
    "ppo.micro_tokens=1024",
    "sft.micro_tokens=1024",
)


@pytest.mark.parametrize(
    "name, gib", [("gp_l", 16), slow("gp_vl", 22), slow("virl_l", 22), slow("virl_vl", 22)]
)
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="checkpointed"),
        pytest.param(NOT_CHECKPOINTED, id="not", marks=pytest.mark.slow),
    ],
)
def test_shipped_configurations_fit(name, gib, overrides):
    cfg, *_ = load([str(LARGE / f"{name}.yaml"), *overrides])
    assert (
        max(phase.peak[0] for phase in plan.budget(cfg).values())
        < min(gib, cfg.model.memory - plan.MARGIN) * GIB
    )


@pytest.mark.parametrize(
    "change, phase",
    [
        slow("ppo.envs=16", "rl.py rollout"),
        slow("model.sample_tokens=4096", "rl.py rollout"),
        slow("eval.batch_size=8", "eval.py"),
        slow("lora.r=4", "sft.py"),
        slow("ppo.micro_tokens=512", "rl.py update"),
        slow("sft.micro_tokens=512", "sft.py"),
        slow("env.image_size=null", "rl.py rollout"),
        slow("ppo.kl_coef=0", "rl.py update"),
    ],
)
def test_less_of_anything_needs_less(change, phase):
    before, after = (
        large("gp_vl", *more, phases=(phase,))[phase].peak[0] for more in ((), (change,))
    )
    assert after < before


# ---------------------------------------------------------------- the script
def script(*arguments, **environment):
    """(exit code, stdout, stderr) of plan.py without a network and with an empty hub cache."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "plan.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", **environment},
    )
    return done.returncode, done.stdout, done.stderr


def main(capsys, *arguments):
    """(exit code, stdout) of the script's main, in this process."""
    with pytest.raises(SystemExit) as stopped:
        plan.main([str(a) for a in arguments])
    return stopped.value.code, capsys.readouterr().out


@pytest.mark.slow
def test_a_gated_model_is_planned_without_a_download():
    code, out, err = script(LARGE / "gp_vl.yaml")
    assert code == 0 and not err, err
    assert out.startswith("planned for the shape in model.shape=configs/11b/llama-3.2-11b-vision\n")
    assert "language, nf4" in out and "DOES NOT FIT" not in out and out.count(" fits: ") == 4
    assert "model.memory=24 less 1" in out


@pytest.mark.slow
def test_what_does_not_fit_names_keys_that_make_it_fit(capsys):
    overrides = (
        *SIZES,
        "model.memory=14",
        "model.sample_tokens=65536",
        "model.gradient_checkpointing=false",
    )
    code, out = main(capsys, LARGE / "virl_vl.yaml", *overrides)
    assert code == 1 and "DOES NOT FIT" in out
    helped = dict(line.split(" fits with ") for line in out.splitlines() if " fits with " in line)
    assert set(helped) >= {"rl.py rollout", "rl.py update"}
    assert "model.sample_tokens=" in helped["rl.py rollout"]
    assert "model.gradient_checkpointing=true" in helped["rl.py update"]
    first = []
    for phase, fixes in helped.items():
        for fix in fixes.split(" or "):
            change = fix.split(" (")[0]
            needed = large("virl_vl", *overrides, change, phases=(phase,))[phase].peak[0]
            assert needed <= 13 * GIB, change
        first.append(fixes.split(" (")[0])
    assert main(capsys, LARGE / "virl_vl.yaml", *overrides, *first)[0] == 0


def test_what_never_fits_says_so(capsys):
    code, out = main(capsys, LARGE / "gp_l.yaml", "model.memory=6")
    assert code == 1 and out.count("no single key of ") == 4 and out.count("DOES NOT FIT") == 4


@pytest.mark.parametrize(
    "argument, meant",
    [
        ("ppo.micro_token=5", "ppo.micro_tokens"),
        ("env.image_siz=5", "did you mean image_size"),
        ("model.shape=nowhere", "model.shape"),
        ("model.shape=tests", "model.shape"),
        ("lora.target_modules=nothing", "lora.target_modules"),
    ],
)
def test_mistakes_are_named_in_one_line(argument, meant):
    with pytest.raises(UserError, match=meant) as error:
        plan.main([str(LARGE / "gp_vl.yaml"), argument])
    assert "\n" not in str(error.value)


def test_a_local_model_is_planned_in_its_own_shape():
    cfg, *_ = load([str(PICTURES), "model.shape=configs/11b/llama-3.2-11b-vision"])
    assert sum(plan.policy_of(cfg).weights.values()) < GIB / 10
