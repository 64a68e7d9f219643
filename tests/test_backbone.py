"""The 11B path on small random models: exact shapes without weights, several tiles, 16 bits,
checkpointing, missing models;
and, marked slow, the full shape on this CPU."""

import copy
import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from benchmark_card import stored
from bitsandbytes.nn import Params4bit
from conftest import FROZEN, PICTURES, ROOT, assert_read_in_parts, play, policies
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lib import loading, random_weights, training
import plan
import rl
import sft
import policy as policy_module
from lib.errors import UserError
from lib.settings import load
from lib.batching import sequences_of
from rollout import make_env
from lib.batching import Sequence

SHIPPED = ROOT / "configs/11b"
TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "cross_attention_layers": [1, 3],
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": 56,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 96,
}
PATCHES = (56 // 14) ** 2 + 1  # per tile


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """The 11B's shape folder made small: up to 4 tiles, grouped queries, two cross-attention
    layers.
    """
    folder = tmp_path_factory.mktemp("shape")
    settings = json.loads((SHIPPED / "llama-3.2-11b-vision/config.json").read_text())
    settings["text_config"].update(TEXT)
    settings["vision_config"].update(VISION)
    (folder / "config.json").write_text(json.dumps(settings))
    pixels = json.loads((SHIPPED / "llama-3.2-11b-vision/preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**pixels, "size": {"height": 56, "width": 56}})
    )
    return str(folder)


@pytest.fixture(scope="module")
def settings(shape):
    """The shipped 11B configuration with pictures, on this small shape, in fp32, with short
    prompts.
    """
    cfg = load(
        [
            str(SHIPPED / "gp_vl.yaml"),
            "model.random_init=true",
            f"model.shape={shape}",
            "model.device=cpu",
            "model.dtype=float32",
            "model.prompt_tokens=40",
            "model.answer_tokens=9",
            "model.revision_tokens=20",
            "env.image_size=[112, 56]",
            "ppo.value_hidden=[8]",
            *FROZEN,
        ]
    )[0]
    return cfg


@pytest.fixture(scope="module")
def make(settings):
    return policies(settings)


@pytest.fixture(scope="module")
def policy(make):
    return make()


@pytest.fixture(scope="module")
def turns(policy, settings):
    return play(policy, settings.env, 1.0, turns=7)


# ---------------------------------------------------------------- the shape of the Instruct model
def test_the_11b_shape_is_exact():
    """The published weights are 21,340,441,670 bytes in 16 bits; 1601 patches per tile of 560
    pixels, llama3 rotary angles.
    """
    model = load([str(SHIPPED / "gp_vl.yaml")])[0].model
    base = random_weights.skeleton(model, AutoConfig.from_pretrained(ROOT / model.shape))
    assert 2 * sum(p.numel() for p in base.parameters()) == 21_340_441_670
    assert all(p.device.type == "meta" for p in base.parameters())
    assert (
        base.model.vision_model.num_patches == 1601 and base.config.vision_config.max_num_tiles == 4
    )
    angles = base.model.language_model.rotary_emb.inv_freq
    assert angles[0] == 1 and angles[-1] == pytest.approx(
        500_000 ** (-126 / 128) / 8
    )  # long waves are stretched 8-fold
    kept = {
        n.rsplit(".", 1)[0]
        for n, p in base.named_parameters()
        if not isinstance(p, Params4bit) and p.dim() == 2
    }
    assert {"lm_head", "model.multi_modal_projector", "model.language_model.embed_tokens"} <= kept
    assert not any("language_model.layers" in name for name in kept)
    assert not any(
        isinstance(p, Params4bit)
        for n, p in base.named_parameters()
        if "language_model.layers" not in n
    )


def test_random_weights_take_that_shape(policy, shape):
    plain = random_weights.skeleton(
        copy.copy(load([str(SHIPPED / "gp_vl.yaml")])[0].model), AutoConfig.from_pretrained(shape)
    )
    assert policy.parameters == sum(p.numel() for p in plain.parameters())
    layer = policy.base.model.language_model.layers[0].mlp.up_proj.base_layer
    assert (
        isinstance(layer.weight, Params4bit)
        and layer.weight.dtype == torch.uint8
        and layer.weight.quant_state.nested
    )
    assert (
        policy.base.lm_head.weight.dtype == torch.float32
        and policy.base.lm_head.weight.std() == pytest.approx(0.15, rel=0.05)
    )
    assert all(
        p.isfinite().all() and p.device.type == "cpu"
        for p in policy.net.parameters()
        if p.is_floating_point()
    )
    assert all(
        layer.cross_attn_attn_gate.item()
        for i, layer in enumerate(policy.base.model.language_model.layers)
        if i in TEXT["cross_attention_layers"]
    )  # else the image would be ignored


def test_random_conversations_have_the_real_lengths_and_pack(policy, turns):
    """Prompts of 40 + 20 k tokens, answers of 9; read back as sampled, so that a conversation is
    one sequence.
    """
    for turn in turns:
        assert (
            len(turn.prompt.ids) == 40 + 20 * (turn.info["attempt"] - 1) and len(turn.answer) == 9
        )
        assert max(turn.prompt.ids + turn.answer) < len(policy.tokenizer)
    packed = sequences_of(turns, 6)
    assert len(packed) == 12 and sorted(len(members) for _, members in packed) == [2] * 6 + [5] * 6
    assert len({tuple(turn.answer) for turn in turns}) > 30


def test_random_sft_answers_have_the_real_length(policy, settings):
    batch = sft.sft_batch(policy, make_env(settings.env, 1), range(4), 0)
    assert [(s.spans, len(s.ids)) for s in batch] == [([(40, 49)], 49)] * 4


# ---------------------------------------------------------------- several tiles
def shown(policy, sizes, before=2):
    """The same text, with `before` tokens before the image token, about pictures of noise."""
    noise = torch.Generator().manual_seed(0)
    for width, height in sizes:
        pixels = torch.randint(256, (height, width, 3), generator=noise, dtype=torch.uint8).numpy()
        yield Sequence(
            [5] * before + [policy.family.image_token] + list(range(10, 20)),
            [],
            Image.fromarray(pixels),
        )


def ours(policy, prompts):
    ids = torch.tensor([p.ids for p in prompts])
    with torch.no_grad():
        whole = policy.family.text_inputs(
            ids, torch.ones_like(ids), policy.family.encode_images([p.image for p in prompts])
        ).prompt
        return policy.family.text_model(
            attention_mask=torch.ones_like(ids), use_cache=False, **whole
        ).last_hidden_state


def library(policy, prompts):
    ids = torch.tensor([p.ids for p in prompts])
    pixels = policy.image_processor([[p.image] for p in prompts], return_tensors="pt")
    after = (ids == policy.family.image_token).cumsum(1) > 0
    with torch.no_grad():
        return policy.base.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            cross_attention_mask=after[:, :, None, None].long()
            * pixels["aspect_ratio_mask"][:, None],
            **pixels,
        ).last_hidden_state


@pytest.mark.parametrize(
    "sizes, before",
    [([(112, 112)], 2), ([(56, 56)], 0), ([(112, 50), (56, 56), (112, 112)], 0)],
    ids=["all four", "one", "two, one and four"],
)
def test_tiles_are_seen_as_by_the_library(policy, sizes, before):
    """Without text before the image also where tiles are unused (there the library lets that text
    see the empty ones).
    """
    prompts = [*shown(policy, sizes, before)]
    torch.testing.assert_close(ours(policy, prompts), library(policy, prompts), rtol=0, atol=1e-4)


def test_unused_tiles_cost_nothing_and_change_nothing(policy):
    prompts = [*shown(policy, [(112, 50), (56, 56), (112, 112), (20, 56)])]
    features = policy.family.encode_images([p.image for p in prompts])
    assert [states.shape[:2] for (states,) in features] == [(n, PATCHES) for n in (2, 1, 4, 1)]
    assert [policy.family.image_patches(p.image) for p in prompts] == [
        policy.family.count_patches(f) for f in features
    ]
    together = ours(policy, prompts)
    for row, prompt in zip(together, prompts):
        torch.testing.assert_close(row[None], ours(policy, [prompt]), rtol=0, atol=1e-4)
    assert (together[1] - together[3]).abs().max() > 1e-2  # they do see


@pytest.mark.parametrize(
    "pictures, rows, parts",
    [(["same"] * 5, 2, 3), ([None] * 5, 2, 3), ([None] * 5, 5, 1), (["same", "other"] * 2, 1, 1)],
)
def test_prompts_are_read_in_parts(policy, turns, monkeypatch, pictures, rows, parts):
    """Of different lengths; pictures with different numbers of tiles all at once."""
    other = Image.new("RGB", (56, 56))
    prompts = [
        replace(
            t.prompt,
            ids=[i for i in t.prompt.ids if what or i != policy.family.image_token],
            image={"same": t.prompt.image, "other": other, None: None}[what],
        )
        for what, t in zip(pictures, turns)
    ]
    prompts[1].ids.insert(len(prompts[1].ids) // 2, policy.encoder.filler)
    assert_read_in_parts(policy, prompts, monkeypatch, rows, parts)


# ---------------------------------------------------------------- scoring
def gradients(policy, turns, temperature=1.0):
    out = policy.score([s for s, _ in sequences_of(turns, 6)], temperature)
    (out["logprobs"].sum() + out["entropy"].sum()).backward()
    found = {n: p.grad for n, p in policy.trainable.items()}
    policy.net.zero_grad()
    return out, found


def test_ratio_is_one_before_the_first_step(policy, turns):
    with torch.no_grad():
        packed = sequences_of(turns, 6)
        out = policy.score([s for s, _ in packed])
    for place, index in enumerate(i for _, members in packed for i in members):
        scored = out["logprobs"][out["answer_of"] == place]
        assert abs((scored - turns[index].logprobs).sum().exp() - 1) < 1e-4


@pytest.mark.parametrize(
    "logits", [policy_module.LOGITS_AT_ONCE, 512 * 7], ids=["at once", "7 at a time"]
)
def test_checkpointing_and_chunks_change_no_number(make, turns, monkeypatch, logits):
    plain, wanted = gradients(make(gradient_checkpointing=False), turns)
    monkeypatch.setattr(policy_module, "LOGITS_AT_ONCE", logits)
    policy = make(gradient_checkpointing=True)
    out, found = gradients(policy, turns)
    torch.testing.assert_close(out["logprobs"], plain["logprobs"], rtol=0, atol=1e-5)
    assert wanted.keys() == found.keys() and all(
        torch.allclose(found[n], wanted[n], rtol=1e-3, atol=1e-4) for n in wanted
    )
    assert not policy.net.training  # sampling goes on without
    assert (
        policy.sample([turns[0].prompt], 0, None)[0].ids
        == make(gradient_checkpointing=False).sample([turns[0].prompt], 0, None)[0].ids
    )


def test_checkpointing_keeps_less(make, turns):
    def kept(**model):
        policy, alive = make(**model), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: alive.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            policy.score([s for s, _ in sequences_of(turns, 6)])
        return sum(t.nbytes for t in alive.values())

    assert kept(gradient_checkpointing=True) < kept(gradient_checkpointing=False) / 3


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_16_bits_start_at_ratio_one(make, settings, temperature):
    """Sampling and scoring differ in bf16; the old log-probs are the update path's, so the first
    ratio is 1 all the same.
    """
    policy, cfg = make(dtype="bfloat16"), copy.deepcopy(settings)
    vars(cfg.ppo).update(
        envs=6, epochs=1, minibatch=999, micro_tokens=400, kl_coef=0, temperature=temperature
    )
    played = play(policy, cfg.env, temperature, turns=4)
    parameters = [*policy.trainable.values(), *policy.value_head.parameters()]
    advantages, returns = torch.randn(2, len(played), generator=torch.Generator().manual_seed(0))
    batch = rl.prepare(policy, played, advantages, returns, cfg.ppo, '"formula"', None)
    stats = rl.update(
        policy,
        torch.optim.AdamW(parameters, lr=1e-4),
        batch,
        cfg.ppo,
        torch.Generator().manual_seed(0),
    )
    assert stats["ratio_gap"] < 0.02 < 10 * stats["sampler_gap"]
    assert {p.dtype for p in policy.trainable.values()} == {
        torch.float32
    }  # only what learns is 32-bit
    assert {p.dtype for n, p in policy.base.named_parameters() if "lora" not in n} == {
        torch.bfloat16,
        torch.uint8,
    }


def test_lora_in_16_bits_learns_what_it_learns_in_fp32(make_policy, cfg):
    """Weights and gradients of the adapters are fp32; gradients point where those of fp32 do."""
    found = []
    turns = play(make_policy(), cfg.env, 0.7)
    for dtype in ("float32", "bfloat16"):
        policy = make_policy(dtype=dtype)
        out = policy.score([s for s, _ in sequences_of(turns, 6)], 0.7)
        out["logprobs"].sum().backward()
        gradients = [p.grad for p in policy.trainable.values() if p.grad is not None]
        assert {g.dtype for g in gradients} == {torch.float32}
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert torch.cosine_similarity(*found, dim=0) > 0.99


# ---------------------------------------------------------------- models that cannot be had
@pytest.mark.parametrize(
    "error, named",
    [
        (
            "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/x",
            "licence is not accepted",
        ),
        ("401 Client Error", "licence is not accepted"),
        ("We couldn't connect to 'https://huggingface.co' to load the files", "out of reach"),
        (
            "meta-llama/x is not a local folder and is not a valid model identifier",
            "not on the hub",
        ),
    ],
)
def test_missing_or_gated_model_is_one_line_that_says_what_to_do(monkeypatch, error, named):
    def refuse(*_, **__):
        raise OSError(error)

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", refuse)
    cfg = load([str(SHIPPED / "gp_l.yaml"), "model.device=cpu"])[0]
    with pytest.raises(UserError) as caught:
        policy_module.Policy(cfg.model, cfg.lora)
    line = str(caught.value)
    assert "\n" not in line and named in line
    for word in (
        "model.path",
        "licence",
        "hf auth login",
        "local folder",
        "EU",
        "Qwen/",
        "model.random_init=true",
    ):
        assert word in line


def test_another_model_out_of_reach_is_not_told_of_llama_s_licence(monkeypatch):
    def refuse(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", refuse)
    cfg = load([str(ROOT / "configs/8gb/gp_l.yaml"), "model.device=cpu"])[0]
    with pytest.raises(UserError, match="out of reach .*; give a local folder") as caught:
        policy_module.Policy(cfg.model, cfg.lora)
    assert "Llama" not in str(caught.value) and "licence" not in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/llama", "./llama", "mini/typo"])
def test_a_slip_in_a_local_path_does_not_ask_the_hub(path):
    cfg = load([str(PICTURES), f"model.path={path}"])[0]
    with pytest.raises(UserError, match=f"no folder '{path}'"):
        policy_module.Policy(cfg.model, cfg.lora)


def test_damaged_local_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    cfg = load([str(PICTURES), f"model.path={tmp_path}"])[0]
    with pytest.raises(UserError, match="model.path: cannot load"):
        policy_module.Policy(cfg.model, cfg.lora)


def cut(path):  # an interrupted copy
    path.write_bytes(path.read_bytes()[:-1000])


def lacking(path):
    weights = load_file(path)
    del weights["language_model.model.norm.weight"]
    save_file(weights, path, {"format": "pt"})


def other_shape(path):
    save_file(
        {**load_file(path), "language_model.model.norm.weight": torch.zeros(3)},
        path,
        {"format": "pt"},
    )


@pytest.mark.parametrize(
    "damage, said",
    [
        (cut, "cannot load"),
        (other_shape, "cannot load"),
        (lacking, "lack 1 tensors, such as model.language_model.norm.weight"),
    ],
)
def test_damaged_weights_are_named(tmp_path, damage, said):
    shutil.copytree(ROOT / "mini/gp", tmp_path / "model")
    damage(tmp_path / "model" / "model.safetensors")
    cfg = load([str(PICTURES), f"model.path={tmp_path / 'model'}", "model.quantization=none"])[0]
    with pytest.raises(UserError, match=f"model.path: .*{said}") as error:
        policy_module.Policy(cfg.model, cfg.lora)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the full shape
@pytest.mark.slow
def test_the_11b_is_built_quantised_and_trained_a_step_on_this_cpu():
    """10.67 billion random weights within 24 GiB: a picture is looked at, an answer sampled and
    scored, LoRA learns. The
    tensors are as large as plan.py says. Ten minutes on two cores."""
    cfg = load(
        [
            str(SHIPPED / "gp_vl.yaml"),
            "model.random_init=true",
            "model.device=cpu",
            "model.prompt_tokens=40",
            "model.answer_tokens=3",
            *FROZEN,
        ]
    )[0]
    policy = policy_module.Policy(cfg.model, cfg.lora, cfg.ppo.value_hidden)
    assert 2 * policy.parameters == 21_340_441_670
    planned, held = plan.policy_of(cfg).weights, Counter()
    for name, parameter in policy.base.named_parameters():
        part = next(
            (
                p
                for p in ("vision", "multi_modal_projector", "embed_tokens", "lm_head")
                if p in name
            ),
            "language",
        )
        held["LoRA" if "lora" in name else part] += stored(parameter)
    for part, of_plan in (
        ("vision", "vision, bfloat16"),
        ("multi_modal_projector", "projector, bfloat16"),
        ("embed_tokens", "embeddings, bfloat16"),
        ("lm_head", "lm_head, bfloat16"),
        ("language", "language, nf4"),
    ):
        assert held[part] == pytest.approx(planned[of_plan], rel=0.05), part
    (prompt,) = policy.encode([make_env(cfg.env, 1).reset(0)[0]])
    (answer,) = policy.sample([prompt], 1.0, torch.Generator().manual_seed(0))
    out = policy.score([prompt.answered(answer.ids)])
    torch.testing.assert_close(
        out["logprobs"].detach(), answer.logprobs, rtol=0, atol=0.3
    )  # two ways in 16 bits
    optimizer = torch.optim.AdamW(
        [*policy.trainable.values(), *policy.value_head.parameters()], lr=1e-4
    )
    (out["logprobs"].sum() + out["values"].sum()).backward()
    learns = {
        n: p for n, p in policy.trainable.items() if "lora_B" in n
    }  # A's gradient is 0 while B is
    assert len(learns) == 40 * 7 and all(
        p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in learns.values()
    )
    optimizer.step()
    assert all(p.abs().max() > 0 for p in learns.values())
    assert training.peak_memory(policy.device) < 24
