"""The policy on pictures (GP-VL on the bundled mini model, NF4 with fp32 compute as shipped): the
image counts, what is sampled is what is scored, each image is read once per episode and never from
a stale cache, the named parts learn."""

import copy
import itertools
import json
import re

import pytest
import torch
from conftest import PICTURES, ROOT, play, policies
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from test_policy import alone, greedy, sft_batch, tensors, update

from lib import settings as config
from mini import corpus_gp
import gp
import sft
from lib.errors import UserError
from lib.batching import sequences_of
from lib.ppo import answer_logprobs, token_weights
from rollout import Play, collect, evaluate, make_env, play_reference, training_seeds
from lib.batching import Sequence, pack

PATCHES = 65  # of one image: 8 x 8 of 14 pixels, and the class token
PARTS = {
    "language": ("language_model", "lm_head"),
    "projector": ("multi_modal_projector",),
    "vision": ("vision_model",),
}
TUNED = [["language"], ["language", "projector"], ["language", "projector", "vision"]]


@pytest.fixture(scope="module")
def loaded():
    return config.load([str(PICTURES)])[:2]


@pytest.fixture
def cfg(loaded):
    return copy.deepcopy(loaded[0])


@pytest.fixture(scope="module")
def make_policy(loaded):
    return policies(loaded[0])


@pytest.fixture(scope="module")
def policy(make_policy):
    """One policy for the tests that only read it."""
    return make_policy()


@pytest.fixture(scope="module")
def sampled(make_policy, policy, loaded):
    """(policy, turns) of four turns at six tables; with three attempts each, so that new pictures
    come in between.
    """
    found, plain = {}, make_policy(merge_for_sampling=False)
    for merge, temperature in itertools.product((True, False), (0.7, 0.2)):
        mine = policy if merge else plain
        found[merge, temperature] = (
            mine,
            play(mine, loaded[0].env, temperature, turns=4, verify_iters=3),
        )
    return found


@pytest.fixture(scope="module")
def turns(sampled):
    return sampled[True, 0.7][1]


@pytest.fixture(scope="module")
def prompts(turns):
    """Prompts of first and later attempts, of a dozen pictures."""
    found = [t.prompt for t in turns]
    assert len({len(p.ids) for p in found}) > 5 and len({id(p.image) for p in found}) == 12
    return found


def part_of(name):
    (part,) = (part for part, names in PARTS.items() if any(n in name for n in names))
    return part


def hands(n, **options):
    """First prompts' observations of n hands; their ids are all the same."""
    env = make_env({"name": "gp", "image_size": [112, 112], "split": "all", **options}, 5)
    return [(env.reset(seed)[0], list(env.cards), env.expert()) for seed in range(n)]


def firsts(policy, n, **options):
    return policy.encode([obs for obs, _, _ in hands(n, **options)])


def shown(sequence, image):
    """The same words about another picture."""
    return Sequence(sequence.ids, sequence.spans, image)


def answers_of(policy, prompts):
    """All that a greedy pass says, in a form to compare: ids, log-probs, values."""
    found = greedy(policy, prompts)
    return (
        [a.ids for a in found],
        torch.cat([a.logprobs for a in found]),
        torch.tensor([a.value for a in found]),
    )


def assert_same_answers(one, two, atol=1e-4):
    assert one[0] == two[0]
    for a, b in zip(one[1:], two[1:]):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---------------------------------------------------------------- the image counts
def test_gates_are_open(make_policy):
    """At 0, where a fresh Mllama starts, whatever is in the picture changes nothing."""
    text = make_policy().base.model.language_model
    for layer in text.config.cross_attention_layers:
        for gate in (
            text.layers[layer].cross_attn_attn_gate,
            text.layers[layer].cross_attn_mlp_gate,
        ):
            assert gate.abs() > 0.05


@pytest.mark.parametrize("noise", [0, 1])
def test_other_picture_other_numbers(make_policy, noise):
    policy, (one, two, *_) = make_policy(noise), hands(2)
    assert one[1] != two[1]
    (prompt,), (answer,) = policy.encode([one[0]]), policy.encode_answers([one[2]])
    own, copied, other = (
        shown(prompt, image).answered(answer)
        for image in (prompt.image, prompt.image.copy(), two[0]["image"])
    )
    with torch.no_grad():
        own, copied, other = (policy.score([s]) for s in (own, copied, other))
    assert torch.equal(own["logprobs"], copied["logprobs"])  # any difference is the picture's
    assert not torch.equal(own["logprobs"], other["logprobs"])
    assert own["values"] != other["values"] or not noise


def test_batch_keeps_pictures_and_rows_together(policy):
    """Six prompts of the same words: only the picture tells the rows apart."""
    prompts = firsts(policy, 6)
    assert all(p.ids == prompts[0].ids for p in prompts)
    order = [3, 0, 5, 4, 1, 2]
    together, moved = greedy(policy, prompts), greedy(policy, [prompts[i] for i in order])
    for place, i in enumerate(order):
        (single,) = greedy(policy, [prompts[i]])
        for answer in (together[i], moved[place]):
            assert answer.ids == single.ids and answer.value == pytest.approx(
                single.value, abs=1e-5
            )
            torch.testing.assert_close(answer.logprobs, single.logprobs, rtol=0, atol=1e-4)
    values = sorted(a.value for a in together)
    assert (
        min(b - a for a, b in zip(values, values[1:])) > 5e-5
    )  # a row with another's picture would show


def test_scores_keep_pictures_and_rows_together(policy):
    answered = [
        p.answered(a)
        for p, a in zip(firsts(policy, 6), policy.encode_answers([e for *_, e in hands(6)]))
    ]
    order = [3, 0, 5, 4, 1, 2]
    with torch.no_grad():
        together, moved = policy.score(answered), policy.score([answered[i] for i in order])
        wrong = policy.score([shown(s, answered[i - 1].image) for i, s in enumerate(answered)])
    for place, i in enumerate(order):
        one, two, swapped = (
            out["logprobs"][out["answer_of"] == p]
            for out, p in ((together, i), (moved, place), (wrong, i))
        )
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
        assert (one - swapped).abs().max() > 1e-4


# ---------------------------------------------------------------- sampling = scoring
@pytest.mark.parametrize("temperature", [0.7, 0.2])
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "as adapters"])
@pytest.mark.parametrize("packed", [True, False], ids=["conversations", "single turns"])
def test_ratio_is_one_before_the_first_step(sampled, packed, merge, temperature):
    policy, played = sampled[merge, temperature]
    assert (
        max(t.info["attempt"] for t in played) == 3
        and len({len(t.prompt.ids) for t in played[12:18]}) > 1
    )  # padded
    assert len({len(t.answer) for t in played}) > 2  # rows that were done left the batch
    assert {t.seed for t in played} == set(range(12))
    groups = sequences_of(played, 6) if packed else [(alone(t), [i]) for i, t in enumerate(played)]
    assert not packed or len(groups) < len(played) - 5  # conversations really were joined
    with torch.no_grad():
        out = policy.score([s for s, _ in groups], temperature)
    for place, index in enumerate(i for _, members in groups for i in members):
        turn, scored = played[index], out["logprobs"][out["answer_of"] == place]
        assert scored.shape == turn.logprobs.shape == (len(turn.answer),)
        for weight in (1, 0.5):
            log_ratio = (
                token_weights(policy, turn, '"formula"', weight) * (scored - turn.logprobs)
            ).sum()
            assert abs(log_ratio.exp() - 1) < 7e-5 / temperature  # rounding is divided by it too
        assert out["values"][place] == pytest.approx(turn.value, abs=1e-4)
    assert out["values"].std() > 0.01


def test_rollout_of_the_trainer_is_scored_the_same(make_policy, cfg):
    """As rl.py goes about it: one `inference` for all turns, reference log-probs, with an update in
    between.
    """
    policy = make_policy()
    vars(cfg.ppo).update({"envs": 4, "turns": 3, "temperature": 0.7})
    tables = Play([make_env(cfg.env, 2) for _ in range(4)], training_seeds(0))

    class Bar:
        def set_description(self, text):
            pass

    for seed in range(2):
        played = collect(policy, tables, 3, 0.7, torch.Generator().manual_seed(seed), Bar()).turns
        with torch.no_grad():
            scored = answer_logprobs(policy, sequences_of(played, 4), 512, 0.7)
        for turn, again in zip(played, scored):
            assert abs((again - turn.logprobs).sum().exp() - 1) < 1e-4
        update(policy, cfg, played)


def test_batched_greedy_answers_are_those_of_single_prompts(policy, prompts):
    """Whatever the padding and the neighbours' pictures, and although rows that are done leave the
    batch early.
    """
    together = greedy(policy, prompts)
    assert len({len(a.ids) for a in together}) > 1
    for prompt, answer in [*zip(prompts, together)][::3]:
        (single,) = greedy(policy, [prompt])
        assert single.ids == answer.ids
        torch.testing.assert_close(single.logprobs, answer.logprobs, rtol=0, atol=1e-4)
        assert single.value == pytest.approx(answer.value, abs=1e-4)
    for answer, value in zip(together, policy.values(prompts).tolist()):
        assert value == pytest.approx(answer.value, abs=1e-4)


# ---------------------------------------------------------------- cross-attention mask
def hidden(policy, ids, images):
    ids = torch.tensor([ids] * len(images))
    with torch.no_grad():
        mask = torch.ones_like(ids)
        whole = policy.family.text_inputs(ids, mask, policy.family.encode_images(images)).prompt
        return policy.family.text_model(
            attention_mask=mask, use_cache=False, **whole
        ).last_hidden_state


def library(policy, ids, images, mask=None):
    """Hidden states by transformers' own way: pixels in, its masks."""
    pixels = policy.image_processor([[image] for image in images], return_tensors="pt")
    mask = torch.ones_like(ids) if mask is None else mask
    after = (ids == policy.family.image_token).cumsum(1) > 0
    with torch.no_grad():
        return policy.base.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            cross_attention_mask=after[:, :, None, None].long()
            * pixels["aspect_ratio_mask"][:, None],
            use_cache=False,
            **pixels,
        ).last_hidden_state


def test_pictures_are_seen_as_by_the_library(policy, turns):
    """Padded left as for sampling: tokens before and after the image, row by row."""
    eye, pad = policy.family.image_token, policy.tokenizer.pad_token_id
    rows = [turns[0].prompt, alone(turns[-1])]
    width = max(len(s.ids) for s in rows) + 3
    ids = torch.tensor([[pad] * (width - len(s.ids)) + s.ids for s in rows])
    assert all(s.ids.count(eye) == 1 and s.ids[2] == eye for s in rows)  # BOS, <|user|>, <|image|>
    mask, images = (ids != pad).long(), [s.image for s in rows]
    with torch.no_grad():
        inputs = policy.family.text_inputs(ids, mask, policy.family.encode_images(images))
        whole, later = inputs.prompt, inputs.further
        ours = policy.family.text_model(
            attention_mask=mask, use_cache=False, **whole
        ).last_hidden_state
    assert (
        whole["cross_attention_states"].shape == (2, PATCHES, 128)
        and later["cross_attention_mask"].shape[0] == 2
    )
    torch.testing.assert_close(
        ours[mask > 0], library(policy, ids, images, mask)[mask > 0], rtol=0, atol=1e-4
    )


def test_what_follows_the_image_token_sees_it(policy):
    one, two = firsts(policy, 2)
    states = hidden(policy, one.ids, [one.image, two.image])
    assert ((states[0] - states[1]).abs().amax(-1)[2:] > 1e-5).all()


@pytest.mark.xfail(
    strict=True, reason="transformers lets rows without any image to see attend to it (PITFALLS.md)"
)
def test_what_precedes_the_image_token_does_not_see_it(policy):
    one, two = firsts(policy, 2)
    states = hidden(policy, one.ids, [one.image, two.image])
    torch.testing.assert_close(states[0, :2], states[1, :2], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- what an answer spells stays text
SPECIAL = ["<|begin_of_text|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>", "<|pad|>"]
NESTED = [
    *SPECIAL,
    "<|ima<|image|>ge|>",
    "<|<|image|>image|>",
    "<|ima<|end|>ge|>",
    "<" * 3 + "|image|>" * 3,
    "<|image|><|image|>",
    '{"cards": ["<|image|>"], "formula": "<|end|><|user|>"}',
    "< |image|>",
    "<|image",
    "|>",
]
PIECES = st.lists(
    st.sampled_from(
        [*SPECIAL, "<|", "|>", "<", "|", ">", "image", "ima", "ge", "end", " ", "_of_text", "K"]
    ),
    max_size=12,
).map("".join)


def check_spelled(policy, text):
    """The next prompt has the special tokens of two user turns around an answer, and no more."""
    assert set(policy.encoder.special_tokens) == set(SPECIAL)
    bos, user, assistant, end, eye, _ = policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    special = set(policy.tokenizer.convert_tokens_to_ids(SPECIAL))
    env = make_env({"name": "gp", "image_size": [112, 112]}, 5)
    env.reset(0)
    obs, _, _, _, info = env.step(text)
    ((ids),) = [p.ids for p in policy.encode([obs])]
    assert [i for i in ids if i in special] == [bos, user, eye, assistant, end, user, assistant]
    feedback = policy.tokenizer(info["feedback"], add_special_tokens=False).input_ids
    assert ids[-len(feedback) - 1 : -1] == feedback
    assert obs["messages"][1]["content"] == text  # the environment keeps what was said


@pytest.mark.parametrize("text", NESTED)
def test_special_tokens_spelled_in_an_answer_stay_text(policy, text):
    check_spelled(policy, text)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(PIECES)
def test_any_answer_stays_text(policy, text):
    check_spelled(policy, text)


def test_special_tokens_sampled_in_an_answer_are_not_in_the_next_prompt(policy):
    """The image token itself is never sampled."""
    (prompt,) = firsts(policy, 1)
    eye, user = policy.tokenizer.convert_tokens_to_ids(["<|image|>", "<|user|>"])
    answer = [*policy.encode_answers(["10"])[0][:-1], user, eye, policy.tokenizer.eos_token_id]
    assert policy.decode(answer) == "10"
    with torch.no_grad():
        out = policy.score([prompt.answered(answer)])
    assert out["logprobs"].isfinite().tolist() == [True, True, False, True]
    check_spelled(policy, policy.decode(answer))


# ---------------------------------------------------------------- each image is looked at once
def test_images_are_encoded_once_per_episode(make_policy, cfg):
    policy = make_policy()
    tables = Play([make_env(cfg.env, 2) for _ in range(5)], training_seeds(0))
    with policy.inference():
        for turn in range(5):
            tables.answer_all(policy, 0.7, torch.Generator().manual_seed(turn))
            assert policy.tokens["inference_patches"] == PATCHES * 5 * (
                turn // 2 + 1
            )  # after two failures a new hand
        waiting = policy.encode([tables.episodes[slot].observation for slot in tables.unfinished()])
        policy.values(waiting)
        assert (
            len(waiting) == 5 and policy.tokens["inference_patches"] == PATCHES * 15
        )  # known already
    assert policy.tokens["train_patches"] == 0


def test_evaluation_encodes_each_hand_once(make_policy, cfg):
    policy = make_policy()
    records = evaluate(policy, cfg.env, 7, 1000, 3, 0.7, 3)
    assert (
        sum(len(r["turns"]) for r in records) > 14
        and policy.tokens["inference_patches"] == PATCHES * 7
    )


def test_each_sample_on_its_own_looks_again(make_policy):
    policy = make_policy()
    one, two = firsts(policy, 2)
    for calls in (1, 2):
        greedy(policy, [one, two, one])  # one picture twice in a batch is still one
        assert (
            policy.tokens["inference_patches"] == 2 * PATCHES * calls
            and not policy.images.remembered
        )
    for images in (1, 2, 2):
        with torch.no_grad():
            policy.score([one.answered([5])] * images)
    assert policy.tokens["inference_patches"] == PATCHES * (4 + 5)  # scoring encodes row by row


@pytest.mark.parametrize("cache", [1, 2e-4, 0])
def test_frozen_eyes_look_once_and_see_the_same(make_policy, cache):
    """Also in the update; what the cache has no room for is looked at again."""
    prompts = [p.answered([5, 6]) for p in firsts(make_policy(), 6)]
    one, two = (
        make_policy(tune=["language"], image_cache=cache),
        make_policy(tune=["language"], image_cache=0),
    )
    greedy(one, prompts)
    with torch.no_grad():
        states = two.family.encode_images([p.image for p in prompts])
    for _ in range(2):
        torch.testing.assert_close(
            one.score(prompts)["logprobs"], two.score(prompts)["logprobs"], rtol=0, atol=1e-5
        )
    bytes_of_one = states[0][0].nbytes + 3 * 112 * 112
    assert (
        len(one.images.remembered) == min(6, cache * 2**30 // bytes_of_one)
        and one.images.size == len(one.images.remembered) * bytes_of_one
    )
    assert (
        one.tokens["inference_patches"] == PATCHES * {1: 6, 2e-4: 12, 0: 18}[cache]
        and not one.tokens["train_patches"]
    )


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "as adapters"])
@pytest.mark.parametrize("part", ["vision", pytest.param("projector", marks=pytest.mark.slow)])
def test_changed_eyes_are_used_at_once(make_policy, merge, part):
    """Weights that change between two samples: what was seen before is forgotten, and so is what
    was merged.
    """

    def change(policy):
        for name, parameter in policy.trainable.items():
            if part_of(name) == part and "lora_B" in name:
                parameter.data += 0.1 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(3)
                )

    used, fresh = make_policy(merge_for_sampling=merge), make_policy(merge_for_sampling=merge)
    prompts = firsts(used, 4)
    with used.inference():
        greedy(used, prompts)
    before = answers_of(used, prompts)
    change(used)
    change(fresh)
    with used.inference():
        after = answers_of(used, prompts)
    assert_same_answers(after, answers_of(fresh, prompts), atol=1e-5)
    assert_same_answers(after, answers_of(used, prompts), atol=1e-5)
    assert not torch.allclose(after[2], before[2], atol=1e-4)


def test_eyes_that_changed_after_a_failure_within_are_used(make_policy):
    policy, fresh = make_policy(), make_policy()
    prompts = firsts(policy, 2)
    with pytest.raises(TypeError):
        with policy.inference():
            greedy(policy, prompts)
            policy.sample(prompts, 1.0, "no generator")
    for each in (policy, fresh):
        for name, parameter in each.trainable.items():
            parameter.data += 0.1 * (part_of(name) == "vision")
    assert_same_answers(answers_of(policy, prompts), answers_of(fresh, prompts), atol=1e-5)


def test_score_does_not_use_what_sampling_saw(make_policy):
    """Inside `inference` it is refused, as LoRA layers are copies and images remembered there;
    outside, weights count as they are.
    """
    policy, fresh = make_policy(), make_policy()
    sequences = [
        p.answered(a) for p, a in zip(firsts(policy, 2), policy.encode_answers(["1", "2"]))
    ]
    with torch.no_grad():
        before = policy.score(sequences)["logprobs"]
        with policy.inference():
            greedy(policy, [Sequence(s.ids[: s.spans[0][0]], [], s.image) for s in sequences])
            with pytest.raises(RuntimeError, match="inference"):
                policy.score(sequences)
        for each in (policy, fresh):
            for name, parameter in each.trainable.items():
                parameter.data += 0.1 * (part_of(name) == "vision" and "lora_B" in name)
        after = policy.score(sequences)["logprobs"]
        assert torch.equal(after, fresh.score(sequences)["logprobs"]) and not torch.allclose(
            after, before, atol=1e-5
        )


# ---------------------------------------------------------------- which parts learn
def test_a_tower_that_learns_is_checkpointed_too(make_policy, turns):
    """transformers does it for the text alone. The gradients are the same, less is kept."""
    kept, found = [], []
    for checkpointing in (False, True):
        policy, alive = make_policy(gradient_checkpointing=checkpointing, tune=TUNED[-1]), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, alive=alive: alive.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            policy.net.train(checkpointing)  # as in Policy.score
            policy._features([t.prompt.image for t in turns[:4]])
            policy.net.eval()
        kept.append(sum(t.nbytes for t in alive.values()))
        policy.score([alone(t) for t in turns[:4]], 0.7)["logprobs"].sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.trainable.values()]))
    assert kept[1] < kept[0] / 2
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_float16_sees_in_float32(make_policy, turns):
    """A tower some of whose numbers exceed float16's 65504; norms bring them back. The features are
    float16 again, and so is the text.
    """
    policy = make_policy(dtype="float16", tune=TUNED[-1])
    kinds = {}
    for name, parameter in policy.base.named_parameters():
        if "lora_" not in name and parameter.is_floating_point():
            kinds.setdefault(part_of(name), set()).add(parameter.dtype)
    assert kinds["vision"] == kinds["projector"] == {torch.float32}
    assert kinds["language"] == {torch.float16}
    policy.base.model.vision_model.patch_embedding.weight.data *= 1e6
    scored = policy.score([alone(t) for t in turns[:2]], 0.7)
    assert scored["logprobs"].isfinite().all()
    ((features,), *_), _ = policy.images.encode([turns[0].prompt.image])
    assert features.dtype == torch.float16 and features.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_16_bits_learn_in_the_direction_of_32(make_policy, turns, device, dtype):
    """LoRA computes in 16 bits too, but what learns and its gradients are fp32."""
    found = []
    for bits, where in (("float32", "cpu"), (dtype, device)):
        policy = make_policy(dtype=bits, device=where)
        policy.score([alone(t) for t in turns[:6]], 0.7)["logprobs"].sum().backward()
        found.append(torch.cat([p.grad.cpu().flatten() for p in policy.trainable.values()]))
    assert found[1].dtype == torch.float32 and torch.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize("step", ["ppo", "sft"])
@pytest.mark.parametrize("tune", TUNED, ids="+".join)
def test_named_parts_learn_and_nothing_else(make_policy, cfg, turns, tune, step):
    """After a rollout and through a step: each trainable tensor has a gradient and moves, cross-
    attention's too.
    """
    policy = make_policy(tune=tune)
    assert {part_of(name) for name in policy.trainable} == set(tune) and all(
        "lora_" in name for name in policy.trainable
    )
    assert any("layers.3.cross_attn.k_proj" in name for name in policy.trainable)
    assert {n for n, p in policy.net.named_parameters() if p.requires_grad} == set(policy.trainable)
    greedy(policy, [t.prompt for t in turns[:6]])
    frozen, learns = tensors(policy, False), tensors(policy, True)
    if step == "ppo":
        update(policy, cfg, turns)
    else:
        sft.train_step(
            policy,
            torch.optim.AdamW(policy.trainable.values(), lr=1e-3),
            sft_batch(policy, cfg),
            cfg.sft,
        )
    assert [
        n for n, p in policy.trainable.items() if p.grad is None or not p.grad.abs().max() > 0
    ] == []
    after = tensors(policy, False)
    assert [n for n in frozen if not torch.equal(frozen[n], after[n])] == []
    after = tensors(policy, True)
    assert [n for n in learns if torch.equal(learns[n], after[n])] == []


FULL = pytest.mark.parametrize("tune", [*TUNED, ["projector"]], ids="+".join)


@FULL
def test_full_tuning_of_the_named_parts(make_policy, cfg, tune):
    policy = make_policy(full=True, tune=tune, quantization="none")
    names = [n for n, _ in policy.net.named_parameters()]
    assert {n for n, p in policy.net.named_parameters() if p.requires_grad} == set(policy.trainable)
    assert set(policy.trainable) == {n for n in names if part_of(n) in tune}
    assert ("lm_head.weight" in policy.trainable) == (
        "language" in tune
    ) and "lm_head.weight" in names
    frozen, before = tensors(policy, False), tensors(policy, True)
    sft.train_step(
        policy,
        torch.optim.AdamW(policy.trainable.values(), lr=1e-3),
        sft_batch(policy, cfg, 3),
        cfg.sft,
    )
    after = tensors(policy, False)
    assert [n for n in frozen if not torch.equal(frozen[n], after[n])] == []
    moved = {part_of(n) for n, p in policy.trainable.items() if not torch.equal(before[n], p)}
    assert moved == set(tune)


@FULL
def test_checkpoint_of_full_tuning_comes_back(make_policy, turns, tmp_path, tune):
    saved, again = (make_policy(full=True, tune=tune, quantization="none") for _ in range(2))
    for parameter in saved.trainable.values():
        parameter.data += 0.01
    saved.save(tmp_path)
    again.load(tmp_path)
    with torch.no_grad():
        one, two = (p.score([alone(t) for t in turns[:3]])["logprobs"] for p in (saved, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "value",
    ["[]", "[eyes]", "[language, eyes]", "language", "null", "[5]", "[[vision]]", "{vision: 1}"],
)
def test_bad_tune_is_a_user_error(value):
    with pytest.raises(UserError, match=r"^model\.tune") as error:
        config.load([str(PICTURES), f"model.tune={value}"])
    assert "\n" not in str(error.value)


def test_adapters_that_meet_no_tuned_part_are_a_user_error(cfg):
    from policy import Policy

    cfg.model.tune, cfg.lora.target_modules = ["projector"], r".*language_model.*\.q_proj"
    with pytest.raises(UserError, match="lora.target_modules") as error:
        Policy(cfg.model, cfg.lora)
    assert "\n" not in str(error.value)


def test_sft_learns_its_batch(make_policy, cfg):
    policy = make_policy()
    batch, adam = sft_batch(policy, cfg), torch.optim.AdamW(policy.trainable.values(), lr=1e-3)
    assert len({len(s.ids) for s in batch}) > 2 and all(s.image is not None for s in batch)
    losses = [sft.train_step(policy, adam, batch, cfg.sft)[0] for _ in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2


# ---------------------------------------------------------------- words and pictures
def test_words_and_pictures_do_not_mix(policy):
    (seeing,), (blind,) = firsts(policy, 1), firsts(policy, 1, image_size=None)
    assert blind.image is None
    for pair in ([seeing, blind], [blind, seeing]):
        with pytest.raises(ValueError, match="mix"):
            greedy(
                policy, [shown(Sequence(blind.ids, []), p.image) for p in pair]
            )  # of one length, hence one batch
        with pytest.raises(ValueError, match="mix"):
            policy.score([p.answered([5]) for p in pair])
    assert not policy.images.remembered and not policy.in_inference
    assert len(greedy(policy, [seeing])) == 1  # and it goes on


def test_words_alone_are_read_as_by_the_text_policy(policy):
    """The GP-L configuration's policy with the same language adapters: same numbers, to the bit."""
    text = policies(config.load([str(PICTURES.with_name("gp_l.yaml"))])[0])(noise=0)
    assert {part_of(name) for name in text.trainable} == {"language"}
    for name, parameter in text.trainable.items():
        parameter.data.copy_(policy.trainable[name])
    text.value_head.load_state_dict(policy.value_head.state_dict())
    prompts = firsts(policy, 4, image_size=None)
    assert [p.ids for p in prompts] == [p.ids for p in firsts(text, 4, image_size=None)]
    patches = policy.tokens["inference_patches"]
    assert_same_answers(answers_of(policy, prompts), answers_of(text, prompts), atol=0)
    with torch.no_grad():
        one, two = (
            p.score([s.answered([65, 66]) for s in prompts])["logprobs"] for p in (policy, text)
        )
    assert torch.equal(one, two) and policy.tokens["inference_patches"] == patches


# ---------------------------------------------------------------- compute
def test_compute_with_pictures(make_policy, turns):
    """6 N or 2 N per text token, and the same of all but the language model's N per patch of a
    picture looked at.
    """
    policy, four = make_policy(), turns[:4]
    answers = greedy(policy, [t.prompt for t in four])
    read = sum(len(t.prompt.ids) + len(a.ids) - 1 for t, a in zip(four, answers))
    with torch.no_grad():
        policy.score([alone(t) for t in four])
    read += sum(len(alone(t).ids) for t in four)
    policy.score([alone(t) for t in four[:3]])
    trained = sum(len(alone(t).ids) for t in four[:3])
    assert policy.tokens == {
        "train": trained,
        "inference": read,
        "train_patches": 65 * 3,
        "inference_patches": 65 * 8,
    }
    weights = load_file(ROOT / "mini/gp/model.safetensors")
    n = sum(t.numel() for t in weights.values())
    eyes = sum(
        t.numel()
        for name, t in weights.items()
        if re.match("vision_model|multi_modal_projector", name)
    )
    assert (policy.parameters, policy.parameters_vision) == (n, eyes) and 0 < eyes < n / 5
    assert policy.flops() == 6 * n * trained + 2 * n * read + 6 * eyes * 65 * 3 + 2 * eyes * 65 * 8


# ---------------------------------------------------------------- one conversation, one picture
def test_pack_joins_the_turns_about_one_picture():
    one, two = (Image.new("RGB", (9, 9), colour) for colour in ("white", "white"))

    def about(image, *ids):
        return Sequence(list(ids), [], image)

    turns = [
        (about(one, 1, 2), [3]),
        (about(one, 1, 2, 3, 4), [5, 6]),
        (
            about(two, 1, 2),
            [3],
        ),  # same words, an equal picture, but another object: another episode
        (about(two, 1, 2, 3, 4), [5]),
        (about(one, 1, 2, 3, 4, 5, 6), [7]),
        (about(None, 1, 2, 3, 4, 5, 6, 7), [8]),
    ]
    packed = pack(turns)
    assert [members for _, members in packed] == [[0, 1], [2, 3], [4], [5]]
    assert packed[0][0].ids == [1, 2, 3, 4, 5, 6] and packed[0][0].spans == [(2, 3), (4, 6)]
    assert [s.image for s, _ in packed] == [one, two, one, None] and packed[1][0].image is two


def test_conversations_are_packed_with_their_picture(policy, turns):
    groups = sequences_of(turns, 6)
    assert sorted(i for _, members in groups for i in members) == list(range(len(turns)))
    for sequence, members in groups:
        assert {turns[i].seed for i in members} == {turns[members[0]].seed}
        assert all(turns[i].prompt.image is sequence.image for i in members)
        assert sequence.ids.count(policy.base.config.image_token_index) == 1
        assert [sequence.ids[a:b] for a, b in sequence.spans] == [turns[i].answer for i in members]
    before = policy.tokens["inference_patches"]
    with torch.no_grad():
        policy.score([s for s, _ in groups])
    assert policy.tokens["inference_patches"] - before == PATCHES * len(groups)


# ---------------------------------------------------------------- checkpoints, resuming
def test_checkpoint_with_eyes_comes_back_to_the_bit(make_policy, turns, tmp_path):
    def scores(policy):
        with torch.no_grad():
            return policy.score([alone(t) for t in turns[:4]])["logprobs"]

    saved, loaded = make_policy(noise=1), make_policy(noise=2, seed=5)
    assert not torch.equal(scores(saved), scores(loaded))
    saved.save(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert {part_of(name) for name in names} == set(PARTS)
    loaded.load(tmp_path)
    assert torch.equal(scores(saved), scores(loaded))
    assert_same_answers(
        answers_of(saved, [turns[0].prompt]), answers_of(loaded, [turns[0].prompt]), atol=0
    )


def test_checkpoint_of_other_parts_is_a_user_error(make_policy, tmp_path):
    make_policy(tune=["language"]).save(tmp_path)
    with pytest.raises(UserError, match="other LoRA shapes") as error:
        make_policy().load(tmp_path)
    assert "\n" not in str(error.value)


def test_tables_resume_in_the_middle_of_episodes(policy, cfg):
    cfg.env.update(suits="mixed", jitter=True)

    def games(seeds):
        return Play([make_env(cfg.env, 4) for _ in range(5)], seeds)

    def turn(tables):
        return [
            (t.slot, t.seed, t.prompt.ids, t.prompt.image.tobytes(), t.answer, t.reward, t.info)
            for t in tables.answer_all(policy, 0, None)
        ]

    one = games(training_seeds(0))
    for _ in range(2):
        turn(one)
    state = json.loads(json.dumps(one.state()))  # plain data, no pixels
    assert any(answers for _, answers in state["episodes"])
    two = games(training_seeds(9))
    two.restore(state)
    for _ in range(4):
        assert turn(one) == turn(two)


# ---------------------------------------------------------------- pictures of any kind
def test_picture_of_any_mode_or_size(policy):
    """Other modes are the same picture; other sizes are brought to the model's, undistorted."""
    env = make_env({"name": "gp", "image_size": [112, 112]}, 5)
    (prompt,) = policy.encode([env.reset(0)[0]])
    image = prompt.image

    def say(*images):
        return [answers_of(policy, [shown(prompt, i)]) for i in images]

    plain, alpha, palette = say(image, image.convert("RGBA"), image.convert("RGB").quantize(256))
    assert_same_answers(plain, alpha, atol=0)
    assert palette[1].isfinite().all()
    grey, also, black = say(
        image.convert("L"), image.convert("L").convert("RGB"), Image.new("RGB", (112, 112))
    )
    assert_same_answers(grey, also, atol=0)
    assert not torch.equal(grey[2], black[2])
    wide = gp.cards.draw_table([(rank, "spades") for rank in env.cards], 300, 200)
    fitted = Image.new(
        "RGB", (112, 112)
    )  # as the image processor has it: scaled to fit, black below
    fitted.paste(wide.resize((112, 74), Image.Resampling.BILINEAR), (0, 0))
    before = policy.tokens["inference_patches"]
    wide, fitted = say(wide, fitted)
    assert policy.tokens["inference_patches"] - before == 2 * PATCHES
    assert wide[0] == fitted[0] and (wide[1] - fitted[1]).abs().max() < 0.01
    assert (wide[2] - fitted[2]).abs() < 0.05 * (wide[2] - black[2]).abs()
    for size in ((1, 1), (3, 500), (560, 560)):
        assert say(Image.new("RGB", size, "green"))[0][1].isfinite().all()


# ---------------------------------------------------------------- the shipped eyes
def test_numbers_read_are_those_of_the_cards_in_the_picture(make_policy):
    """Forty hands, read in the bare backbone's plain words: far beyond guessing."""
    policy, dealt = make_policy(noise=0), hands(40)
    request = corpus_gp.ASKED["values"] + corpus_gp.rule_text(gp.RULES["face"])
    ask = {"type": "text", "text": f"{request}Cards: {gp.PICTURE}"}
    message = {"role": "user", "content": [{"type": "image"}, ask]}
    prompts = policy.encode([{**obs, "messages": [message]} for obs, _, _ in dealt])
    assert len({tuple(prompt.ids) for prompt in prompts}) == 1  # the pictures alone differ
    seen = 0
    for answer, (_, cards, _) in zip(greedy(policy, prompts), dealt):
        numbers = sorted(str(gp.RANKS.index(card) + 1) for card in cards)
        seen += sorted(policy.decode(answer.ids).split(", ")) == numbers
    guesses = play_reference(
        {"name": "gp", "image_size": [112, 112], "split": "all"}, "likeliest cards", 400, 0, 1
    )
    guessed = sum(r["counts"]["recognized"][0] for r in guesses)
    assert guessed < 4 and seen >= 12, (guessed, seen)
