"""KL from Init: by hand, and against the exact one over the whole vocabulary."""

from types import SimpleNamespace

import pytest
import torch

from lib import divergence, measures
from lib.divergence import log_ratios
from policy import token_logprobs
from rollout import evaluate


def turn(slot, place):
    """Turn number `place`, whose prompt extends nothing before it."""
    prompt = SimpleNamespace(ids=[place], image=None, spans=[])
    prompt.answered = lambda answer: prompt
    return SimpleNamespace(slot=slot, prompt=prompt, answer=[place])


def test_log_ratios_are_summed_over_tokens_and_answers(monkeypatch):
    logprobs = {
        "start": [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5]), torch.tensor([-3.0])],
        "arm": [torch.tensor([-1.5, -4.0]), torch.tensor([-0.25]), torch.tensor([-3.0])],
    }

    def scored(policy, packed, micro_tokens, temperature):
        assert (micro_tokens, temperature) == (512, 1.0)
        assert sorted(index for one in packed for index in one.turns) == [0, 1, 2]
        return logprobs[policy]

    monkeypatch.setattr(divergence, "answer_logprobs", scored)
    records = [{"turns": [turn(0, 0), turn(0, 1)]}, {"turns": [turn(1, 2)]}]
    found = log_ratios(records, lambda checkpoint: checkpoint, "start", "arm", 512)
    assert found == [(pytest.approx(0.5 + 2.0 - 0.25), 2), (0.0, 1)]


@torch.no_grad()
def exact(policy, other, records):
    """Mean KL(policy || other) of the next token after the records' prompts."""
    found = []
    for record in records:
        (asked,) = record["turns"]
        sequence = asked.prompt.answered(asked.answer)
        logits = []
        for model in (policy, other):
            _, hidden = model._hidden_states([sequence])
            logits.append(model._logits(hidden[0, len(asked.prompt.ids) - 1]))
        every = torch.arange(len(logits[0]))[~policy.forbidden]
        own, its = (token_logprobs(one.expand(len(every), -1), every)[0] for one in logits)
        found.append((own.exp() * (own - its)).sum())
    return torch.stack(found).mean().item()


def test_estimate_agrees_with_the_exact_divergence(make_policy, cfg):
    """Of answers of one token, 200 of them: the mean of the log-ratios within four standard errors
    of the sum over the vocabulary. A policy is 0 from itself."""
    start, arm = make_policy(noise=1), make_policy(noise=0)
    for name, parameter in start.trainable.items():
        if "lora_B" in name:
            parameter.data *= 4
    start.max_new_tokens = 1
    records = evaluate(start, {"name": "gp"}, 200, 3, 1, 1.0, 256)
    get = {"arm": arm, "start": start}.get
    nats = torch.tensor(log_ratios(records, get, "start", "arm", 2048))[:, 0]
    wanted = exact(start, arm, records)
    error = nats.std().item() / len(nats) ** 0.5
    assert wanted > 10 * error  # or the test says nothing
    assert abs(nats.mean().item() - wanted) < 4 * error
    for nat, answers in log_ratios(records[:20], get, "start", "start", 2048):
        assert (nat, answers) == (0, 1)


def at(kl, share, gflops):
    """Checkpoints in two variants: this far from Init, solving this share of 20 hands, half of them
    at the first attempt."""
    found = []
    for variant in ("ID", "OOD"):
        episodes, from_init = [], []
        for hand in range(20):
            place = {"cluster": (variant, hand), "training": 0}
            counts = {"solved": (int(hand < 20 * share), 1), "recognized": (1, 1)}
            counts["first"] = int(hand < 10 * share), 1
            episodes.append({**place, "counts": counts})
            from_init.append({**place, "counts": {"kl": (kl, 1)}})
        found.append(measures.Checkpoint(gflops, episodes, 0, from_init if variant == "ID" else ()))
    return found


def test_ppo_above_the_curve_of_sft_where_that_has_gone_as_far():
    """SFT goes from 50 % at 0 nats to 10 % at 2, so by 40 % at 0.5 nats, where PPO has 60 %."""
    sft, ppo = [at(0.0, 0.5, 100), at(2.0, 0.1, 300)], at(0.5, 0.6, 900)
    found = measures.above_curve(*zip(*sft, ppo), "solved")
    assert found["metrics"]["equal KL"].value == pytest.approx(60 - 40)
    assert found["metrics"]["equal KL, first attempt"].value == pytest.approx(30 - 20)
    further = measures.above_curve(*zip(*sft, at(2.5, 0.6, 900)), "solved")
    assert "equal KL" not in further["metrics"]


def test_points_tell_nats_and_those_of_each_seed():
    known, _ = at(0.5, 0.6, 900)
    point = measures.point_of(known, "solved")
    assert point.kl.estimate == pytest.approx((0.5, 0.5, 0.5))
    assert point.kl.per_seed == [pytest.approx(0.5)]
    assert measures.point_of(known._replace(from_init=()), "solved").kl is None
