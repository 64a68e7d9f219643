"""Other model families through the same code: small random Qwen2-VL, 2.5 and 3, Idefics3 and
SmolVLM, built here, saved and loaded by YAML.
"""

import copy
import json
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from bitsandbytes.nn import Params4bit
from conftest import PICTURES, ROOT, assert_read_in_parts, play
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import rl
import sft
from lib import loading
from lib.errors import UserError
from lib.families import FAMILIES, VERSION_4
from lib.settings import load
from lib.batching import sequences_of
from rollout import make_env
from lib.batching import Sequence
from policy import Policy

QWEN_TOKENS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
TEXT = {
    "vocab_size": 416,  # the mini's 375 tokens and those of a family, 38 at most
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
IN_VERSION_4 = {"rope_theta": 1e4, "rope_scaling": ROPE}
QWEN_TEXT = {
    **TEXT,
    **(IN_VERSION_4 if VERSION_4 else {"rope_parameters": {**ROPE, "rope_theta": 1e4}}),
}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
}
TILES = {  # of 16 patches and 4 tokens; a picture takes at most 2 x 2 of them
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
GRID = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
TILE_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", *GRID]
END = "<end_of_utterance>"
SMOLVLM_TEMPLATE = (  # SmolVLM2's own, which reads lists of parts alone
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SHAPES = {  # model_type: (config class, text, vision)
    "qwen2_vl": (
        "Qwen2VLConfig",
        QWEN_TEXT,
        {"depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        QWEN_TEXT,
        {**QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 56},
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {**QWEN_TEXT, "head_dim": 16},
        {**QWEN_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    ),
    "smolvlm": ("SmolVLMConfig", {**TEXT, "model_type": "llama"}, TILES),
    "idefics3": ("Idefics3Config", {**TEXT, "model_type": "llama"}, TILES),
}
TILED = ("smolvlm", "idefics3")


def tokenizer_of(kind):
    """The mini's tokenizer with the special tokens and the chat template of a family."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "mini/gp")
    special = [*TILE_TOKENS, "<|im_start|>", END] if kind in TILED else QWEN_TOKENS
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if kind in TILED:
        tokenizer.eos_token = END
        tokenizer.chat_template = SMOLVLM_TEMPLATE
    else:
        template = tokenizer.chat_template
        tokenizer.chat_template = template.replace("<|image|>", "".join(QWEN_TOKENS))
    return tokenizer


def pixels_of(kind, vision):
    """preprocessor_config.json of a family."""
    if kind in TILED:
        tile = vision["image_size"]
        return {
            "image_processor_type": SHAPES[kind][0].replace("Config", "ImageProcessor"),
            "do_image_splitting": True,
            "size": {"longest_edge": 2 * tile},
            "max_image_size": {"longest_edge": tile},
        }
    patch = 16 if kind == "qwen3_vl" else 14
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": (2 * patch) ** 2,
        "max_pixels": (8 * patch) ** 2,
    }


def build(kind, folder):
    """A model folder as of the hub: weights, tokenizer with chat template, image processor."""
    name, text, vision = SHAPES[kind]
    tokenizer = tokenizer_of(kind)
    image_token = "<image>" if kind in TILED else "<|image_pad|>"
    settings = getattr(transformers, name)(
        text_config=dict(text),
        vision_config=dict(vision),
        image_token_id=tokenizer.convert_tokens_to_ids(image_token),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(QWEN_TOKENS[0]),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(settings)
    for parameter in model.parameters():  # wide enough that images and positions matter
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = pixels_of(kind, vision)
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


# those that differ least from another are slow
ALIKE = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2_vl", "idefics3")]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "smolvlm", *ALIKE])
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


def library(model, folder, sequence):
    """Logits of the library's own model and image processor for one whole sequence."""
    length = len(sequence.ids)
    ids, kwargs = torch.tensor([sequence.ids]), {}
    if VERSION_4:  # its Qwen reads the token after a <|vision_start|>, sampled last here
        ids = torch.nn.functional.pad(ids, (0, 1))
    if sequence.image is not None:
        processor = loading.load_image_processor(folder, FAMILIES[model.config.model_type])
        kwargs = dict(processor([[sequence.image]], return_tensors="pt"))
    if "image_grid_thw" in kwargs and not VERSION_4:
        kwargs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits[0, :length]


def test_scores_are_the_library_s(policy, folder, turns):
    """Images, 3-D positions, padding and conversations of several turns, against its forward pass,
    one by one.
    """
    packed = sequences_of(turns, 6)
    with torch.no_grad():
        out, place = policy.score([s for s, _ in packed], 0.7), 0
        for sequence, _ in packed:
            logits = library(policy.base, folder, sequence)
            logits = logits.masked_fill(policy.forbidden, -torch.inf)
            logprobs = torch.log_softmax(logits / 0.7, -1)
            for start, end in sequence.spans:
                wanted = logprobs[range(start - 1, end - 1), sequence.ids[start:end]]
                torch.testing.assert_close(
                    out["logprobs"][out["answer_of"] == place], wanted, rtol=0, atol=1e-4
                )
                place += 1


def test_ratio_is_one_before_the_first_step(make, turns):
    policy = make()  # in 4 bits, merged for sampling
    prompts = [t.prompt for t in turns]
    answers = policy.sample(prompts, 0.7, torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = policy.score([p.answered(a.ids) for p, a in zip(prompts, answers)], 0.7)
    for place, answer in enumerate(answers):
        scored = out["logprobs"][out["answer_of"] == place]
        assert abs((scored - answer.logprobs).sum().exp() - 1) < 1e-3
        assert policy.family.image_token not in answer.ids


def test_prompts_are_read_in_parts(policy, turns, monkeypatch):
    assert_read_in_parts(policy, [t.prompt for t in turns[:5]], monkeypatch, 2, 3)


def test_the_language_model_alone_is_quantised(make):
    for name, parameter in make().base.named_parameters():
        if (
            name.endswith(("proj.weight", "base_layer.weight", "qkv.weight"))
            or ".linear_fc" in name
        ):
            quantised = bool(re.search(r"(language|text)_model\.layers", name))
            assert isinstance(parameter, Params4bit) == quantised, name


def test_image_tokens_are_as_many_as_the_image_takes(policy, turns):
    for turn in turns:
        image = turn.prompt.image
        assert turn.prompt.ids.count(policy.family.image_token) == (
            policy.family.image_patches(image) // policy.family.patches_per_token if image else 0
        )


def test_what_the_image_shows_matters(policy, settings):
    env = make_env({**settings.env, "image_size": [112, 112]}, 1)
    one, two = policy.encode([env.reset(seed)[0] for seed in (0, 1)])
    swapped = Sequence(one.ids, [], two.image)
    with torch.no_grad():
        a, b = (policy.score([s.answered([5, 6])])["logprobs"] for s in (one, swapped))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize(
    "dtype, checkpointing",
    [("float32", False), ("float32", True), ("bfloat16", True), ("float16", True)],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_adapter_on_the_way_learns(make, turns, checkpointing, dtype, device):
    policy = make(gradient_checkpointing=checkpointing, dtype=dtype, device=device)
    policy.score([t.prompt.answered(t.answer) for t in turns[:4]])["logprobs"].sum().backward()
    seen = turns[0].prompt.image is not None
    for name, parameter in policy.trainable.items():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == (
            seen or bool(re.search(policy.family.parts["language"], name))
        ), name


def test_random_weights_of_that_shape(make, folder, policy, env):
    """With the mini's tokenizer; image tokens come on top of the prompt's length."""
    random = make(
        random_init=True, shape=str(folder), prompt_tokens=30, answer_tokens=6, revision_tokens=15
    )
    assert random.parameters == policy.parameters
    for turn in play(random, env, 1.0, tables=2):
        one = [random.family.image_token]
        more = len(random.family.expand_image_tokens(one, turn.prompt.image)) - 1
        assert (
            len(turn.prompt.ids) == 30 + 15 * (turn.info["attempt"] - 1) + more
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


def test_plain_peft_and_merged_weights_give_the_same_logits(make, folder, turns, tmp_path):
    policy = make(quantization="none")
    sequence = turns[0].prompt.answered(turns[0].answer)
    with torch.no_grad():
        wanted = library(policy.base, folder, sequence)
        policy.save(tmp_path)
        base = AutoModelForImageTextToText.from_pretrained(folder)
        bare = library(base, folder, sequence)
        adapted = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(library(adapted, folder, sequence), wanted, rtol=0, atol=1e-4)
        policy.save_merged(tmp_path / "merged")
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(library(merged, folder, sequence), wanted, rtol=0, atol=1e-3)
    assert (bare - wanted).abs().max() > 0.1


# ---------------------------------------------------------------- SmolVLM's tiles
@pytest.fixture(scope="module")
def tiled(settings, tmp_path_factory):
    folder = build("idefics3", tmp_path_factory.mktemp("idefics3"))
    model = {**vars(settings.model), "path": str(folder), "quantization": "none"}
    return Policy(SimpleNamespace(**model), settings.lora, [])


@pytest.mark.parametrize("size", [(64, 64), (120, 60), (30, 61), (100, 3)])
def test_tiles_are_those_of_the_library_s_processor(tiled, size):
    """Ids and pixels; SmolVLM's processor does the same, but needs packages for video."""
    processor = transformers.Idefics3Processor(
        tiled.image_processor,
        copy.deepcopy(tiled.tokenizer),
        image_seq_len=4,
        chat_template=SMOLVLM_TEMPLATE,
    )
    picture = Image.effect_noise(size, 80).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "Cards:\n\nwhich?"}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    wanted = processor(text=text, images=[picture], return_tensors="pt")
    (prompt,) = tiled.encode([{"messages": messages, "image": picture}])
    assert prompt.ids == wanted["input_ids"][0].tolist()
    tiles = wanted["pixel_values"].shape[1]
    assert tiled.family.image_patches(picture) == 16 * tiles
    states = tiled.base.model(**wanted).last_hidden_state
    ids, hidden = tiled._hidden_states([prompt])
    torch.testing.assert_close(hidden, states, rtol=0, atol=1e-4)


@pytest.mark.parametrize("known", [len(TILE_TOKENS), 2], ids=["tokens", "spelt"])
def test_tiles_are_named_as_smolvlm_s_processor_does(tiled, monkeypatch, known):
    """By tokens in SmolVLM2; the first SmolVLM's tokenizer spells the names."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "mini/gp")
    tokenizer.add_special_tokens({"additional_special_tokens": TILE_TOKENS[:known]})
    monkeypatch.setattr(tiled.family, "tokenizer", tokenizer)
    monkeypatch.setattr(tiled.family, "tile_ids", {})
    names = ("<fake_token_around_image>", "<image>", "<global-img>")
    processing = pytest.importorskip(
        "transformers.models.smolvlm.processing_smolvlm",
        reason="transformers 4 needs torchvision for it",
        exc_type=ImportError,
    )
    text = processing.get_image_prompt_string(1, 2, 4, *names)
    ids = tiled.family.expand_image_tokens([tiled.family.image_token], Image.new("RGB", (120, 60)))
    assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_a_picture_may_stay_in_one_piece(tiled, monkeypatch):
    monkeypatch.setattr(tiled.image_processor, "do_image_splitting", False)
    monkeypatch.setattr(tiled.family, "tile_ids", {})
    picture = Image.new("RGB", (120, 60))
    ids = tiled.family.expand_image_tokens([tiled.family.image_token], picture)
    assert ids.count(tiled.family.image_token) == 4
    assert tiled.family.image_patches(picture) == 16
    assert len(tiled.family.encode_images([picture])[0][0]) == 4


def test_a_template_that_reads_parts_alone_loses_no_text(tiled):
    """As strings, as the environments write them; the answers after the template's space."""
    first = {"role": "user", "content": "Make 24."}
    wrong = '{"formula": "1+1"}'
    later = [first, {"role": "assistant", "content": wrong}, {"role": "user", "content": "No."}]
    one, two = tiled.encode([{"messages": m, "image": None} for m in ([first], later)])
    text = tiled.tokenizer.decode(two.ids)
    assert text == (
        f"<|im_start|>User: Make 24.{END}\nAssistant: {wrong}{END}\nUser: No.{END}\nAssistant:"
    )
    (answer,) = tiled.encode_answers([wrong])
    assert tiled.decode(answer) == wrong
    assert text.startswith(tiled.tokenizer.decode(one.ids + answer))  # one pass scores both


# ---------------------------------------------------------------- models that cannot be used
def test_a_template_beside_the_tokenizer_is_found(tmp_path):
    tokenizer_of("smolvlm").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        loading._tokenizer(tmp_path, "this")
    template = json.dumps({"chat_template": SMOLVLM_TEMPLATE})
    (tmp_path / "chat_template.json").write_text(template)
    assert loading._tokenizer(tmp_path, "this").chat_template == SMOLVLM_TEMPLATE


@pytest.mark.parametrize("error", [ImportError, ValueError])
def test_an_image_processor_that_needs_torchvision_is_a_user_error(tmp_path, monkeypatch, error):
    def refuse(*arguments, **settings):
        raise error("Some2ImageProcessor requires the Torchvision library\nbut it was not found")

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", refuse)
    with pytest.raises(UserError, match="the image processor of .* needs torchvision") as found:
        loading.load_image_processor(tmp_path, FAMILIES["mllama"])
    assert "\n" not in str(found.value)


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


PLAIN = {"rope_type": "default", "rope_theta": 1e5}


@pytest.mark.parametrize(
    "written, theta, scaling, lost",
    [
        (None, 1e4, None, False),  # as transformers 4 wrote it
        (PLAIN, 1e5, None, False),  # for both, as tools/model_from_gguf.py does
        (PLAIN, 1e4, None, True),
        ({**PLAIN, "rope_type": "llama3"}, 1e5, None, True),
        ({**PLAIN, "rope_type": "llama3"}, 1e5, {"rope_type": "llama3"}, False),
        ({"full_attention": PLAIN}, 1e5, None, True),  # Gemma 3's
    ],
)
def test_positions_that_transformers_4_would_lose_are_a_user_error(written, theta, scaling, lost):
    text = SimpleNamespace(rope_parameters=written, rope_theta=theta, rope_scaling=scaling)
    refused = pytest.raises(UserError, match="written by transformers 5") if lost else nullcontext()
    with refused:
        loading._check_positions(text, "this")
