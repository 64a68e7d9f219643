"""The policy on the bundled mini model, NF4 with fp32 compute as shipped: what is sampled is what
is scored, gradients
reach all they should and nothing else, checkpoints come back. Conversations are played for real."""

import importlib
import itertools
import json
import random
import shutil

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from conftest import ROOT, play
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText

import gp
import rl
import sft
from lib import head
from lib.lora import lora_layers
from lib.errors import UserError
from lib.batching import sequences_of
from rollout import Play, evaluate, make_env, training_seeds
from lib.batching import Sequence
from lib.ppo import answer_logprobs, token_weights
from lib.training import load_state, save_state

documents = importlib.import_module("mini.documents")
corpus = importlib.import_module("mini.corpus_gp")


def alone(turn):
    return turn.prompt.answered(turn.answer)


def greedy(policy, prompts):
    return policy.sample(prompts, 0, None)


def tensors(policy, trained):
    """Copies of what training may (or may not) change: 4-bit data, its scales, embeddings and
    lm_head included.
    """
    state = policy.net.state_dict()
    assert set(policy.trainable) <= set(state)
    return {n: t.clone() for n, t in state.items() if (n in policy.trainable) == trained}


def update(policy, cfg, turns):
    """One PPO update over played turns with made-up advantages."""
    vars(cfg.ppo).update({"envs": 6, "epochs": 1, "minibatch": 8, "kl_coef": 0, "temperature": 0.7})
    parameters = [*policy.trainable.values(), *policy.value_head.parameters()]
    noise = torch.randn(2, len(turns), generator=torch.Generator().manual_seed(0))
    batch = rl.prepare(policy, turns, *noise, cfg.ppo, '"formula"', None)
    return rl.update(
        policy,
        torch.optim.AdamW(parameters, lr=1e-3),
        batch,
        cfg.ppo,
        torch.Generator().manual_seed(0),
    )


def sft_batch(policy, cfg, n=6, mistakes=2):
    env = make_env(cfg.env, mistakes + 1)
    return sft.sft_batch(policy, env, range(n), mistakes)


@pytest.fixture(scope="module")
def turns(policy, loaded):
    """Four turns at six tables at the shipped rollout temperature, and at the paper's."""
    return {t: play(policy, loaded[0].env, t, turns=4) for t in (0.7, 0.2)}


@pytest.fixture(scope="module")
def prompts(turns):
    """Prompts of first and later attempts."""
    found = [t.prompt for t in turns[0.7]]
    assert len({len(p.ids) for p in found}) > 5
    return found


# ---------------------------------------------------------------- sampling = scoring
@pytest.mark.parametrize("temperature", [0.7, 0.2])
@pytest.mark.parametrize("packed", [True, False], ids=["conversations", "single turns"])
def test_ratio_is_one_before_the_first_step(policy, turns, temperature, packed):
    played = turns[temperature]
    assert (
        max(t.info["attempt"] for t in played) >= 3
        and len({len(t.prompt.ids) for t in played[-6:]}) > 1
    )  # it was padded
    groups = sequences_of(played, 6) if packed else [(alone(t), [i]) for i, t in enumerate(played)]
    assert not packed or len(groups) <= len(played) - 6  # conversations really were joined
    with torch.no_grad():
        out = policy.score([s for s, _ in groups], temperature)
    for place, index in enumerate(i for _, members in groups for i in members):
        turn, scored = played[index], out["logprobs"][out["answer_of"] == place]
        assert scored.shape == turn.logprobs.shape == (len(turn.answer),)
        for weight in (1, 0.5):
            log_ratio = (
                token_weights(policy, turn, '"formula"', weight) * (scored - turn.logprobs)
            ).sum()
            assert abs(log_ratio.exp() - 1) < 1e-4
        assert out["values"][place] == pytest.approx(turn.value, abs=1e-4)
    assert out["values"].std() > 0.01  # an untrained head would say 0 everywhere


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_softmax_at_that_temperature(policy, temperature):
    """Draws of a formula's first token against the exact distribution: nothing truncated, no
    other temperature.
    """
    text = f"{policy.tokenizer.bos_token}1, 2, 3, 4 make "
    prompt, draws = Sequence(policy.tokenizer(text, add_special_tokens=False).input_ids, []), 10_000
    with torch.no_grad():
        logits = (
            policy.base(input_ids=torch.tensor([prompt.ids]))
            .logits[0, -1, : len(policy.tokenizer)]
            .double()
        )
    wanted = torch.softmax(logits / temperature, -1)
    drawn = policy.sample(
        [prompt] * draws, temperature, torch.Generator().manual_seed(0), max_new_tokens=1
    )
    got = torch.bincount(torch.tensor([a.ids[0] for a in drawn]), minlength=len(wanted)) / draws
    assert ((got - wanted).abs() <= 5 * (wanted * (1 - wanted) / draws).sqrt() + 2 / draws).all()
    assert (wanted > 0.01).sum() > 2  # wide enough to tell temperatures apart
    assert wanted.max() < 0.7


def test_batched_greedy_answers_are_those_of_single_prompts(policy, prompts):
    """Whatever the padding, and although rows that are done leave the batch early. Their log-probs
    are those of T = 1.
    """
    together = greedy(policy, prompts)
    assert len({len(a.ids) for a in together}) > 1
    with torch.no_grad():
        scored = policy.score([p.answered(a.ids) for p, a in zip(prompts, together)], 1.0)
    sampled = torch.cat([a.logprobs for a in together])
    torch.testing.assert_close(scored["logprobs"], sampled, rtol=0, atol=1e-4)
    for prompt, answer in [*zip(prompts, together)][::2]:
        (single,) = greedy(policy, [prompt])
        assert single.ids == answer.ids
        torch.testing.assert_close(single.logprobs, answer.logprobs, rtol=0, atol=1e-4)
        assert single.value == pytest.approx(answer.value, abs=1e-4)
    for answer, value in zip(together, policy.values(prompts).tolist()):
        assert value == pytest.approx(answer.value, abs=1e-4)


def test_merging_the_adapter_for_sampling_changes_nothing_but_speed(make_policy, turns):
    prompts = [t.prompt for t in turns[0.7]][::3]
    merged, plain = make_policy(merge_for_sampling=True), make_policy(merge_for_sampling=False)
    weights = tensors(merged, True) | tensors(merged, False)
    for a, b in zip(greedy(merged, prompts), greedy(plain, prompts)):
        assert a.ids == b.ids
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-4)
    with pytest.raises(TypeError):
        merged.sample(
            prompts, 1.0, "no generator"
        )  # a failure in between leaves nothing merged either
    for name, parameter in [*merged.trainable.items()][
        :4
    ]:  # later changes of the weights reach the next sample
        parameter.data += 0.1 * ("lora_B" in name)
        plain.trainable[name].data += 0.1 * ("lora_B" in name)
    assert [a.ids for a in greedy(merged, prompts)] == [a.ids for a in greedy(plain, prompts)]
    after = tensors(merged, True) | tensors(merged, False)
    assert [n for n in weights if not torch.equal(weights[n], after[n])] == [
        n for n in [*merged.trainable][:4] if "lora_B" in n
    ]
    torch.testing.assert_close(logits(merged, turns), logits(plain, turns), rtol=0, atol=1e-4)


def test_learning_by_dense_weights_gives_the_gradients_of_peft(make_policy, turns):
    """Over two micro-batches of a step, and in the next, whose weights are others."""
    found = []
    for merge in (True, False):
        policy = make_policy(merge_for_sampling=merge)
        for _ in range(2):
            with policy.merged():
                for some in (turns[0.7][:4], turns[0.7][4:6]):
                    scored = policy.score([alone(t) for t in some], 0.7)
                    (scored["logprobs"].sum() + scored["entropy"].sum()).backward()
            for parameter in policy.trainable.values():
                parameter.data += 0.01
        found.append({n: p.grad for n, p in policy.trainable.items() if p.grad is not None})
    dense, plain = found
    assert dense.keys() == plain.keys()
    for name in plain:
        scale = plain[name].abs().max().item()
        torch.testing.assert_close(dense[name], plain[name], rtol=0, atol=1e-4 * scale, msg=name)


def test_what_fails_while_weights_are_merged_leaves_nothing_merged(make_policy, turns):
    """Nor is anything merged twice: the inner one would take the outer one's away."""
    policy = make_policy(merge_for_sampling=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="merged already"), policy.merged():
            greedy(policy, [turns[0.7][0].prompt])
    assert not any("forward" in vars(layer) for layer in lora_layers(policy.net))


def test_a_16_bit_output_layer_is_not_rounded(monkeypatch):
    """Its product, and the gradient of the states, are those of float64 but for float32's rounding,
    under autocast and however few rows are float32 at once. torch's own are off by far more.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 300, bias=False).bfloat16().requires_grad_(False)
    states = (20 * torch.randn(5, 64)).bfloat16()
    exact = states.double().requires_grad_()
    wanted = exact @ layer.weight.double().T
    upstream = torch.randn(5, 300)
    (wanted * upstream.double()).sum().backward()
    for rows in (300, 7, 1):
        monkeypatch.setattr(head, "WEIGHTS_AT_ONCE", 64 * rows)
        own = states.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = head.logits_in_float32(layer, own)
        (logits * upstream).sum().backward()
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(own.grad, exact.grad.bfloat16())
    assert (layer(states).double() - wanted).abs().max() > 0.01


def test_sampling_and_scoring_read_16_bit_logits_alike(make_policy, turns, monkeypatch):
    """Finer than 16 bits in both; those of fp32 are the layer's own, to the bit."""
    seen = []
    policy = make_policy(dtype="bfloat16")
    own = policy._logits
    monkeypatch.setattr(policy, "_logits", lambda hidden: seen.append(own(hidden)) or seen[-1])
    policy.sample([turns[0.7][0].prompt], 0, None, max_new_tokens=1)
    policy.score([alone(turns[0.7][0])])
    assert len(seen) == 2
    for logits in seen:
        allowed = logits[..., : len(policy.tokenizer) - 100]
        assert (allowed != allowed.bfloat16().float()).float().mean() > 0.9
    exact = make_policy()
    states = torch.randn(3, exact.base.lm_head.in_features)
    got = exact._logits(states)[:, ~exact.forbidden]
    assert torch.equal(got, exact.base.lm_head(states)[:, ~exact.forbidden])


@pytest.mark.parametrize("kind", ["bias", "4 bits", "lora"])
def test_output_layers_of_other_kinds_in_float32(kind):
    """With a bias, in 4 bits, or tuned."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 320, bias=kind == "bias").bfloat16().requires_grad_(False)
    states = (20 * torch.randn(5, 64)).bfloat16()
    wanted = states.double() @ layer.weight.double().T
    if kind == "bias":
        wanted += layer.bias.double()
    elif kind == "4 bits":
        packed = Linear4bit(64, 320, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        packed.weight = Params4bit(layer.weight, requires_grad=False, quant_type="nf4").to("cpu")
        layer = packed
        wanted = states.double() @ head.dense(layer).double().T
    else:
        settings = peft.LoraConfig(target_modules=["0"], r=4, init_lora_weights=False)
        net = peft.get_peft_model(torch.nn.Sequential(layer), settings).float()
        layer = net.base_model.model[0]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = layer.scaling["default"]
        wanted += scale * (states.double() @ down.double().T @ up.double().T)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head.logits_in_float32(layer, states)
    torch.testing.assert_close(logits.double(), wanted, rtol=0, atol=1e-4)


def test_same_generator_same_answers(policy, prompts):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return [answer.ids for answer in policy.sample(prompts[:6], 1.0, generator)]

    assert draw(1) == draw(1) != draw(2)


def test_answers_end_with_the_end_token_or_at_the_limit(policy, prompts):
    end = policy.tokenizer.eos_token_id
    for answer in greedy(policy, prompts):
        assert answer.ids.index(end) == len(answer.ids) - 1 == len(answer.logprobs) - 1
        assert "<|" not in policy.decode(answer.ids)
    for answer in policy.sample(prompts, 0, None, max_new_tokens=5):
        assert end not in answer.ids and len(answer.ids) == len(answer.logprobs) == 5


def test_any_end_token_of_the_model_ends_an_answer(make_policy, prompts):
    """Llama names three in its generation_config; the tokenizer's is one of them."""
    policy = make_policy()
    assert policy.end_tokens.tolist() == [policy.tokenizer.eos_token_id] * 2  # both name the same
    usual = greedy(policy, prompts[:4])
    other = usual[0].ids[2]
    policy.end_tokens = torch.tensor([*policy.end_tokens, other])
    for answer, before in zip(greedy(policy, prompts[:4]), usual):
        stop = next(i for i, token in enumerate(before.ids) if token in policy.end_tokens)
        assert answer.ids == before.ids[: stop + 1] and len(answer.logprobs) == stop + 1


def test_rows_of_the_output_layer_without_a_token_are_never_sampled(policy, prompts):
    assert policy.base.lm_head.out_features > len(
        policy.tokenizer
    )  # the mini's is padded to a multiple of 32
    ids = [i for a in policy.sample(prompts, 10, torch.Generator().manual_seed(0)) for i in a.ids]
    assert len(set(ids)) > 100 and max(ids) < len(policy.tokenizer)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_logits_that_are_not_finite_are_a_user_error(make_policy, prompts, temperature):
    policy = make_policy()
    next(iter(policy.trainable.values())).data.fill_(float("nan"))
    with pytest.raises(UserError, match="finite logits"):
        policy.sample(prompts, temperature, torch.Generator().manual_seed(0))


def test_compute_is_counted_as_in_the_paper(make_policy, turns):
    """2 N per token read or sampled (the last token of an answer is never read), 6 N per trained
    token.
    """
    policy, four = make_policy(), turns[0.7][:4]
    answers = greedy(policy, [t.prompt for t in four])
    read = sum(len(t.prompt.ids) + len(a.ids) - 1 for t, a in zip(four, answers))
    with torch.no_grad():
        policy.score([alone(t) for t in four])
    read += sum(len(alone(t).ids) for t in four)
    policy.score([alone(t) for t in four[:2]])
    trained = sum(len(alone(t).ids) for t in four[:2])
    assert policy.tokens == {
        "train": trained,
        "inference": read,
        "train_patches": 0,
        "inference_patches": 0,
    }
    n = sum(t.numel() for t in load_file(ROOT / "mini/gp/model.safetensors").values())
    assert policy.parameters == n  # 4-bit packing does not shrink N
    assert policy.flops() == 6 * n * trained + 2 * n * read
    policy.official_extra.update(train=10, inference=100)  # see test_eval.py
    assert policy.official_flops() == policy.flops() + n * (6 * 10 + 2 * 100)


# ---------------------------------------------------------------- gradients
def on_text_path(policy, name):
    """Text-only batches skip the cross-attention layer altogether."""
    return not any(
        f"layers.{i}." in name for i in policy.base.config.text_config.cross_attention_layers
    )


def test_a_rollout_leaves_every_gradient_as_it_was(make_policy, turns):
    """bitsandbytes repacks 4-bit weights at the first forward in eval mode on some CPUs; behind
    them gradients end.
    """
    used, fresh = make_policy(), make_policy()
    greedy(used, [t.prompt for t in turns[0.7]])
    for policy in (used, fresh):
        policy.net.train(policy is fresh)
        out = policy.score([alone(t) for t in turns[0.7][:8]], 0.7)
        (out["logprobs"].sum() + out["values"].sum()).backward()
    assert sum(on_text_path(used, name) for name in used.trainable) == 6 * 7 * 2
    for name, parameter in used.trainable.items():
        if on_text_path(used, name):
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(
                parameter.grad, fresh.trainable[name].grad, rtol=1e-4, atol=1e-5
            )
    assert all(p.grad.abs().max() > 0 for p in used.value_head.net[-1].parameters())


def test_value_loss_reaches_the_model_only_if_asked(make_policy, turns):
    for detach in (True, False):
        policy = make_policy(value_detach=detach)
        policy.score([alone(turns[0.7][0])])["values"].sum().backward()
        assert detach == all(p.grad is None for p in policy.trainable.values())


@pytest.mark.parametrize("step", ["ppo", "sft"])
def test_only_lora_learns(make_policy, cfg, turns, step):
    policy = make_policy()
    frozen, learns = tensors(policy, False), tensors(policy, True)
    assert {t.dtype for t in frozen.values()} >= {torch.uint8, torch.float32}
    if step == "ppo":
        update(policy, cfg, turns[0.7])
    else:
        sft.train_step(
            policy,
            torch.optim.AdamW(policy.trainable.values(), lr=1e-3),
            sft_batch(policy, cfg),
            cfg.sft,
        )
    after = tensors(policy, False)
    assert all(torch.equal(frozen[n], after[n]) for n in frozen)
    after = tensors(policy, True)
    assert all(torch.equal(learns[n], after[n]) != on_text_path(policy, n) for n in learns)


def test_sft_loss_is_the_cross_entropy_of_answer_tokens_alone(make_policy, cfg):
    """Against the library's own forward pass with labels -100 everywhere else: same loss, same
    gradients.
    """
    policy = make_policy()
    batch = sft_batch(policy, cfg)
    assert len({len(s.ids) for s in batch}) > 3  # padded; prompts hold 0 to 2 mistakes
    sgd = torch.optim.SGD(policy.trainable.values(), lr=0)
    cfg.sft.max_grad_norm = 1e9
    loss, _ = sft.train_step(policy, sgd, batch, cfg.sft)
    got = {n: p.grad.clone() for n, p in policy.trainable.items() if p.grad is not None}
    sgd.zero_grad()
    total, count = 0, 0
    for s in batch:
        ((start, end),) = s.spans
        labels = torch.tensor([-100] * start + s.ids[start:end] + [-100] * (len(s.ids) - end))
        assert s.ids[start - 1] == policy.tokenizer.convert_tokens_to_ids("<|assistant|>")
        assert s.ids[end - 1] == policy.tokenizer.eos_token_id and end == len(s.ids)
        logits = policy.base(input_ids=torch.tensor([s.ids])).logits[
            0, :-1, : len(policy.tokenizer)
        ]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        count += end - start
    (total / count).backward()
    assert loss == pytest.approx(total.item() / count, rel=1e-5)
    assert got
    for name, gradient in got.items():
        wanted = policy.trainable[name].grad
        rounding = 1e-4 * wanted.abs().max().item()
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=rounding)


def test_dft_weighs_each_token_by_its_probability(make_policy, cfg):
    """The gradient of -p log p with p held is p times that of -log p; of all tokens, by hand."""
    policy = make_policy()
    batch = sft_batch(policy, cfg)
    sgd = torch.optim.SGD(policy.trainable.values(), lr=0)
    cfg.sft.max_grad_norm, cfg.sft.loss = 1e9, "dft"
    loss, _ = sft.train_step(policy, sgd, batch, cfg.sft)
    got = {name: p.grad.clone() for name, p in policy.trainable.items() if p.grad is not None}
    sgd.zero_grad()
    logprobs = policy.score(batch)["logprobs"]
    likely = logprobs.detach().exp()
    assert loss == pytest.approx(-(likely * logprobs).mean().item(), rel=1e-5)
    (-likely @ logprobs / len(logprobs)).backward()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, policy.trainable[name].grad, rtol=1e-4, atol=1e-6)
    assert likely.min() < 0.1 < 0.9 < likely.max()  # the weights differ


def test_sft_learns_its_batch(make_policy, cfg):
    policy = make_policy()
    batch, adam = sft_batch(policy, cfg), torch.optim.AdamW(policy.trainable.values(), lr=1e-3)
    losses = [sft.train_step(policy, adam, batch, cfg.sft)[0] for _ in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2


def test_what_follows_an_answer_does_not_change_its_score(policy, turns):
    """Causal, and no span is off by one: scores of a conversation's first answer with and without
    the rest.
    """
    sequence, _ = max(sequences_of(turns[0.7], 6), key=lambda item: len(item[1]))
    first = Sequence(sequence.ids[: sequence.spans[0][1]], sequence.spans[:1])
    with torch.no_grad():
        long, short = policy.score([sequence]), policy.score([first])
    torch.testing.assert_close(
        long["logprobs"][long["answer_of"] == 0], short["logprobs"], rtol=0, atol=1e-4
    )


# ---------------------------------------------------------------- weights
def logits(policy, turns):
    with torch.no_grad():
        return policy.score([alone(t) for t in turns[0.7][:4]])["logprobs"]


def test_snapshot_scores_as_then_and_steps_aside(make_policy, cfg, turns):
    policy = make_policy()
    before, snapshot = logits(policy, turns), policy.snapshot()
    update(policy, cfg, turns[0.7])
    after = logits(policy, turns)
    with pytest.raises(KeyError):  # even if something fails meanwhile
        with policy.weights_of(snapshot):
            assert torch.equal(logits(policy, turns), before)
            raise KeyError
    assert torch.equal(logits(policy, turns), after) and not torch.allclose(after, before)


def test_checkpoint_comes_back_to_the_bit(make_policy, turns, tmp_path):
    saved, loaded = make_policy(noise=1), make_policy(noise=2, seed=5)
    assert not torch.equal(logits(saved, turns), logits(loaded, turns))
    saved.save(tmp_path)
    loaded.load(tmp_path)
    assert torch.equal(logits(saved, turns), logits(loaded, turns))
    assert saved.values([turns[0.7][0].prompt]) == loaded.values([turns[0.7][0].prompt])
    assert all(
        lib in (tmp_path / "versions.txt").read_text()
        for lib in ("torch==", "transformers==", "peft==")
    )
    other = make_policy(noise=2)
    other.load(tmp_path, value_head=False)
    assert torch.equal(logits(saved, turns), logits(other, turns))
    assert saved.values([turns[0.7][0].prompt]) != other.values([turns[0.7][0].prompt])


def test_adapter_loads_with_plain_peft(make_policy, turns, tmp_path):
    policy = make_policy(
        quantization="none"
    )  # whoever takes the adapter may hold the base in any precision
    policy.save(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(ROOT / "mini/gp", dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([alone(turns[0.7][0]).ids])
    with torch.no_grad():
        ours, theirs = policy.base(input_ids=ids).logits, plain(input_ids=ids).logits
        with plain.disable_adapter():
            bare = plain(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert not torch.allclose(ours, bare, atol=0.1)


def damage(folder, how):
    adapter, head = folder / "adapter_model.safetensors", folder / "value_head.safetensors"
    if how == "cut off":
        adapter.write_bytes(adapter.read_bytes()[:-1000])
    elif how == "empty":
        adapter.write_bytes(b"")
    elif how == "garbage":
        adapter.write_bytes(random.Random(0).randbytes(5000))
    elif how == "no adapter":
        adapter.unlink()
    elif how == "no value head":
        head.unlink()
    elif how == "one tensor missing":
        save_file(dict(itertools.islice(load_file(adapter).items(), 5)), adapter)
    elif how == "other rank":
        save_file({n: t[:8] for n, t in load_file(adapter).items()}, adapter)
    elif how == "other value head":
        save_file({"net.0.weight": torch.zeros(3)}, head)
    elif how == "no folder":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "how",
    [
        "cut off",
        "empty",
        "garbage",
        "no adapter",
        "no value head",
        "one tensor missing",
        "other rank",
        "other value head",
        "no folder",
    ],
)
def test_damaged_checkpoint_is_a_user_error(make_policy, turns, tmp_path, how):
    policy, folder = make_policy(), tmp_path / "step_1"
    policy.save(folder)
    damage(folder, how)
    with pytest.raises(UserError, match="step_1") as error:
        policy.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [None, 0, 1, 100, 0.5, -1], ids=str)
def test_damaged_trainer_state_is_a_user_error(tmp_path, keep):
    state = {"optimizer": {"x": torch.zeros(1000)}, "tokens": {"train": 1}, "gflops": 1.0}
    save_state(tmp_path, {**state, "play": [(1, ["a"])]})
    assert load_state(tmp_path)["play"] == [(1, ["a"])]
    path = tmp_path / "trainer.pt"
    data = path.read_bytes()
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="damaged"):
        load_state(tmp_path)


@pytest.mark.parametrize("kind", ["text", "list", "another state"])
def test_trainer_state_of_another_kind_is_a_user_error(tmp_path, kind):
    path = tmp_path / "trainer.pt"
    if kind == "text":
        path.write_text("torch==2.13.0\ntransformers==5.23.0\n")
    else:
        torch.save({"list": [1, 2], "another state": {"tokens": 5}}[kind], path)
    with pytest.raises(UserError, match="damaged"):
        load_state(tmp_path)


def test_trainer_state_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "owned").touch, ()

    torch.save({"optimizer": Evil()}, tmp_path / "trainer.pt")
    with pytest.raises(UserError):
        load_state(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_checkpoint_of_another_base_is_a_user_error(make_policy, tmp_path):
    """Of the same shape; the same base elsewhere and in 16 bits is no other."""
    make_policy(noise=1).save(tmp_path)
    shutil.copytree(ROOT / "mini/gp", tmp_path / "moved")
    make_policy(path=str(tmp_path / "moved"), dtype="bfloat16").load(tmp_path)
    with pytest.raises(UserError, match="another base than the one in model.path"):
        make_policy(path="mini/virl").load(tmp_path)


@pytest.mark.parametrize(
    "model, lora, named",
    [
        ({"path": "/no/such/folder"}, {}, "model.path"),
        ({"path": str(ROOT / "tests")}, {}, "model.path"),
        ({}, {"target_modules": "nothing_like_this"}, "lora.target_modules"),
        ({}, {"target_modules": "("}, "lora.target_modules"),
    ],
)
def test_model_that_cannot_be_built_is_a_user_error(cfg, model, lora, named):
    from policy import Policy

    vars(cfg.model).update(model)
    vars(cfg.lora).update(lora)
    with pytest.raises(UserError, match=named) as error:
        Policy(cfg.model, cfg.lora)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- text and ids
FUZZ = settings(max_examples=200, deadline=None, derandomize=True, database=None)
PIECES = st.sampled_from(
    [*corpus.phrases(), *'0123456789+-*/()"[]{}:, \n\\é😀', "\x00", "10", "24"]
)


@FUZZ
@given(st.text() | st.lists(PIECES, max_size=12).map("".join))
def test_text_survives_encoding(policy, text):
    assert policy.decode(policy.encode_answers([text])[0]) == text


@pytest.mark.parametrize(
    "text", [*"0123456789", *"+-*/()=", *gp.RANKS, *(f'"{r}"' for r in gp.RANKS)]
)
def test_what_formulas_are_made_of_is_one_token(policy, text):
    (ids,) = policy.encode_answers([text])
    assert (
        len(ids) == 2 and ids[1] == policy.tokenizer.eos_token_id
    )  # itself and the end of the turn
    assert text in gp.RANKS or len(policy.encode_answers([f"(7{text}5"])[0]) == 5


def conversation(seed, mistakes=3, **options):
    env = make_env({"name": "gp", **options}, mistakes + 1)
    obs, _ = env.reset(seed)
    yield obs, env.expert()
    for _ in range(mistakes):
        answer = env.mistake()
        obs, *_ = env.step(answer)
        yield obs, answer


def chatted(messages):
    """The text of mini.documents.chat for messages that end with an answer."""
    said = [m["content"] for m in messages]
    return documents.chat(itertools.starmap(documents.Exchange, zip(said[::2], said[1::2]))).text


def test_one_bos_and_the_template_of_pretraining(policy):
    """The backbone was trained on documents.chat's text: the chat template must say the same."""
    bos, assistant = (
        policy.tokenizer.bos_token,
        policy.tokenizer.convert_tokens_to_ids("<|assistant|>"),
    )
    for obs, answer in conversation(3):
        messages = obs["messages"]
        said = messages + [{"role": "assistant", "content": answer}]
        text = policy.tokenizer.apply_chat_template(said, tokenize=False)
        assert text == chatted(said) and text.startswith(bos) and text.count(bos) == 1
        ids = policy.encode([obs])[0].ids
        assert ids.count(policy.tokenizer.bos_token_id) == 1
        assert ids[0] == policy.tokenizer.bos_token_id and ids[-1] == assistant
        assert policy.tokenizer(text, add_special_tokens=False).input_ids[: len(ids)] == ids


def test_tokenizer_that_adds_a_bos_of_its_own_is_not_let(make_policy):
    """As Llama's does; the template has written one already, and answers want none."""
    policy = make_policy()
    bos = policy.tokenizer.bos_token, policy.tokenizer.bos_token_id
    policy.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    assert policy.tokenizer("x").input_ids[0] == bos[1]
    (obs, answer), *_ = conversation(3)
    assert (
        policy.encode([obs])[0].ids.count(bos[1]) == 1
        and bos[1] not in policy.encode_answers([answer])[0]
    )


@pytest.mark.parametrize(
    "options", [{"rule": "ten"}, {"rule": "face", "require_face": True}], ids=str
)
def test_next_prompt_continues_with_the_answer(policy, options):
    """What makes a conversation one sequence: prompt_{t+1} starts with prompt_t, the answer's ids
    and its end token.
    """
    for seed in range(20):
        steps = list(conversation(seed, **options))
        prompts = [p.ids for p in policy.encode([obs for obs, _ in steps])]
        for before, after, (_, answer) in zip(prompts, prompts[1:], steps[1:]):
            continued = before + policy.encode_answers([answer])[0]
            assert after[: len(continued)] == continued and len(after) > len(continued)


# ---------------------------------------------------------------- episodes
def test_evaluation_is_paired_and_independent_of_the_batch(policy, cfg):
    """Greedy answers: who sits at which table changes nothing; 7 hands at 3 tables, at 7, and with
    other attempts.
    """
    three, seven = (evaluate(policy, cfg.env, 7, 1000, 3, 0, batch) for batch in (3, 7))
    for a, b in zip(three, seven):
        assert [(t.text, t.reward) for t in a["turns"]] == [(t.text, t.reward) for t in b["turns"]]
    assert [r["seed"] for r in three] == sorted({r["seed"] for r in three}) and len(three) == 7
    for r in seven:
        rewards = [t.reward for t in r["turns"]]
        right = [int(reward == 5) for reward in rewards]
        assert (
            1 <= len(rewards) <= 3
            and r["counts"]["first"] == (right[0], 1)
            and r["counts"]["solved"] == (right[-1], 1)
        )
        assert r["counts"]["per_step"] == (sum(right), len(right)) and sum(right) <= 1
        assert [t.info["attempt"] for t in r["turns"]] == list(range(1, len(rewards) + 1))
        assert right[-1] or len(rewards) == 3
    single = evaluate(policy, cfg.env, 7, 1000, 1, 0, 7)
    assert [r["cluster"] for r in single] == [r["cluster"] for r in seven]
    firsts = [r["counts"]["first"] for r in seven]
    assert (
        [r["counts"]["first"] for r in single] == firsts == [r["counts"]["solved"] for r in single]
    )
    face = evaluate(policy, cfg.env, 7, 1000, 1, 0, 7, rule="face", require_face=True)
    assert [r["cluster"] for r in face] != [r["cluster"] for r in single]


def test_tables_resume_in_the_middle_of_episodes(policy, cfg):
    def games(seeds):
        return Play([make_env(cfg.env, 4) for _ in range(5)], seeds)

    def turn(tables):
        return [
            (t.slot, t.seed, t.prompt, t.answer, t.reward, t.info)
            for t in tables.answer_all(policy, 0, None)
        ]

    one = games(training_seeds(0))
    for _ in range(2):
        turn(one)
    state = json.loads(json.dumps(one.state()))  # plain data
    assert any(answers for _, answers in state["episodes"])
    two = games(training_seeds(9))
    two.restore(state)
    for _ in range(4):
        assert turn(one) == turn(two)


def test_no_training_seed_reaches_the_evaluation_seeds():
    from lib.settings import MAX_SEED
    from rollout import EVAL_SEEDS

    assert next(training_seeds(MAX_SEED)) + 10**9 < EVAL_SEEDS


@pytest.mark.gpu
def test_gpu_samples_what_it_scores(make_policy, cfg):
    policy = make_policy(device="cuda")
    played = play(policy, cfg.env, 0.7)
    packed = sequences_of(played, 6)
    scored = answer_logprobs(policy, packed, 2048, 0.7)
    for turn, again in zip(played, scored):
        assert abs((again - turn.logprobs).sum().exp() - 1) < 1e-3
