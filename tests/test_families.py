"""Other model families through the same code: small random Qwen2.5-VL and Qwen3-VL, built here,
saved and loaded by YAML.
"""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from bitsandbytes.nn import Params4bit
from conftest import PICTURES, ROOT, assert_read_in_parts, play
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import rl
import sft
from lib.families import FAMILIES
from lib.settings import UserError, load
from lib.batching import sequences_of
from rollout import make_env
from lib.batching import Sequence
from policy import Policy

TOKENS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
TEXT = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
}
SHAPES = {  # model_type: (config class, what it has beyond TEXT, beyond VISION)
    "qwen2_5_vl": ("Qwen2_5_VLConfig", {}, {"fullatt_block_indexes": [1], "window_size": 56}),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {"head_dim": 16},
        {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    ),
}


def build(kind, folder):
    """A model folder as of the hub: weights, tokenizer with chat template, image processor."""
    name, text, vision = SHAPES[kind]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "mini/gp")
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|image|>", "".join(TOKENS))
    image_token = tokenizer.convert_tokens_to_ids(TOKENS[1])
    settings = getattr(transformers, name)(
        text_config={**TEXT, **text},
        vision_config={**VISION, **vision},
        image_token_id=image_token,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(settings)
    for parameter in model.parameters():  # wide enough that images and positions matter
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    patch = settings.vision_config.patch_size
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "patch_size": patch,
                "merge_size": 2,
                "temporal_patch_size": 2,
                "min_pixels": (2 * patch) ** 2,
                "max_pixels": (8 * patch) ** 2,
            }
        )
    )
    return folder


@pytest.fixture(scope="module", params=list(SHAPES))
def folder(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def settings():
    return load([str(PICTURES)])[0]


@pytest.fixture(scope="module")
def make(folder, settings):
    """Policies of that model with noise in the adapters; keyword arguments are model settings."""

    def make(seed=0, **model):
        model = SimpleNamespace(
            **{**vars(settings.model), "path": str(folder), "max_new_tokens": 8, **model}
        )
        policy = Policy(model, settings.lora, [], seed=seed)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.trainable.items():
            parameter.data += (
                0.05 * ("lora_B" in name) * torch.randn(parameter.shape, generator=generator)
            )
        return policy

    return make


@pytest.fixture(scope="module")
def policy(make):
    return make(quantization="none")


@pytest.fixture(
    scope="module", params=[[112, 112], [120, 60], None], ids=["square", "wide", "text"]
)
def env(request, settings):
    return {**settings.env, "image_size": request.param}


@pytest.fixture(scope="module")
def turns(policy, env):
    return play(policy, env, 0.7)


def library(policy, folder, sequence):
    """Hidden states of the library's own model and processor for one whole sequence."""
    ids, kwargs = torch.tensor([sequence.ids]), {}
    if sequence.image is not None:
        pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(
            [sequence.image], return_tensors="pt"
        )
        kwargs = {
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
            "mm_token_type_ids": (ids == policy.family.image_token).int(),
        }
    return policy.base(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits[0]


def test_scores_are_the_library_s(policy, folder, turns):
    """Images, 3-D positions, padding and conversations of several turns, against its forward pass,
    one by one.
    """
    packed = sequences_of(turns, 6)
    with torch.no_grad():
        out, place = policy.score([s for s, _ in packed], 0.7), 0
        for sequence, _ in packed:
            logprobs = torch.log_softmax(
                library(policy, folder, sequence).masked_fill(policy.forbidden, -torch.inf) / 0.7,
                -1,
            )
            for start, end in sequence.spans:
                wanted = logprobs[range(start - 1, end - 1), sequence.ids[start:end]]
                torch.testing.assert_close(
                    out["logprobs"][out["answer"] == place], wanted, rtol=0, atol=1e-4
                )
                place += 1


def test_ratio_is_one_before_the_first_step(make, turns):
    policy = make()  # in 4 bits, merged for sampling
    prompts = [t.prompt for t in turns]
    answers = policy.sample(prompts, 0.7, torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = policy.score([p.answered(a.ids) for p, a in zip(prompts, answers)], 0.7)
    for place, answer in enumerate(answers):
        assert (
            abs((out["logprobs"][out["answer"] == place] - answer.logprobs).sum().exp() - 1) < 1e-3
        )
        assert policy.family.image_token not in answer.ids


def test_prompts_are_read_in_parts(policy, turns, monkeypatch):
    assert_read_in_parts(policy, [t.prompt for t in turns[:5]], monkeypatch, 2, 3)


def test_the_language_model_alone_is_quantised(make):
    for name, parameter in make().base.named_parameters():
        if (
            name.endswith(("proj.weight", "base_layer.weight", "qkv.weight"))
            or ".linear_fc" in name
        ):
            assert isinstance(parameter, Params4bit) == ("language_model.layers" in name), name


def test_image_tokens_are_as_many_as_the_image_takes(policy, turns):
    for turn in turns:
        image = turn.prompt.image
        assert turn.prompt.ids.count(policy.family.image_token) == (
            policy.family.image_patches(image) // 4 if image else 0
        )


def test_what_the_image_shows_matters(policy, settings):
    env = make_env({**settings.env, "image_size": [112, 112]}, 1)
    one, two = policy.encode([env.reset(seed)[0] for seed in (0, 1)])
    swapped = Sequence(one.ids, [], two.image)
    with torch.no_grad():
        a, b = (policy.score([s.answered([5, 6])])["logprobs"] for s in (one, swapped))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_adapter_on_the_way_learns(make, turns, checkpointing, dtype, device):
    policy = make(gradient_checkpointing=checkpointing, dtype=dtype, device=device)
    policy.score([t.prompt.answered(t.answer) for t in turns[:4]])["logprobs"].sum().backward()
    seen = turns[0].prompt.image is not None
    for name, parameter in policy.trainable.items():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == (
            seen or "language" in name
        ), name


def test_random_weights_of_that_shape(make, folder, policy, env):
    """With the mini's tokenizer; image tokens come on top of the prompt's length."""
    random = make(
        random_init=True, shape=str(folder), prompt_tokens=30, answer_tokens=6, revision_tokens=15
    )
    assert random.parameters == policy.parameters
    for turn in play(random, env, 1.0, tables=2):
        seen = random.family.image_patches(turn.prompt.image) // 4 - 1 if turn.prompt.image else 0
        assert (
            len(turn.prompt.ids) == 30 + 15 * (turn.info["attempt"] - 1) + seen
            and len(turn.answer) == 6
        )


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_trains_and_resumes_by_yaml(folder, tmp_path, dtype):
    """sft.py and rl.py, 2 updates at once and as 1 and 1."""

    def call(script, where):
        script.main(
            [
                str(PICTURES),
                f"model.path={folder}",
                f"run.dir={where}",
                "model.max_new_tokens=8",
                f"model.dtype={dtype}",
                "sft.steps=2",
                "sft.batch_size=4",
                "sft.init_step=1",
                "ppo.init=none",
                "ppo.updates=2",
                "ppo.envs=4",
                "ppo.turns=2",
                "ppo.epochs=1",
                "ppo.save_every=1",
            ]
        )
        (arm,) = where.glob(f"{script.__name__}*")
        lines = [json.loads(line) for line in (arm / "metrics.jsonl").read_text().splitlines()]
        return arm, [
            {k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gib")}
            for line in lines
        ]

    for script in (sft, rl):
        arm, wanted = call(script, tmp_path / "a")
        last = max(arm.glob("step_*"))
        assert last.name == "step_2" and {f.name for f in last.iterdir()} >= {
            "adapter_model.safetensors",
            "trainer.pt",
        }
        shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "b" / arm.name / "step_2")
        assert call(script, tmp_path / "b")[1] == wanted and len(wanted) == 2


def test_unknown_family_is_a_user_error(settings, tmp_path):
    transformers.LlavaConfig().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ROOT / "mini/gp").save_pretrained(tmp_path)
    shutil.copy(ROOT / "configs/11b/llama-3.2-11b-vision/preprocessor_config.json", tmp_path)
    model = copy.deepcopy(settings.model)
    model.path = str(tmp_path)
    with pytest.raises(
        UserError, match="llava is none of the known families, " + ", ".join(FAMILIES)
    ):
        Policy(model, settings.lora)
