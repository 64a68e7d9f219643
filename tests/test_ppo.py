"""The mathematics of PPO over turns and of batching, against numbers worked out by hand."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIG, play
from hypothesis import given, settings
from hypothesis import strategies as st

import rl
from lib.batching import Packed, Sequence, micro_batches, minibatches, pack, turns_of
from lib.errors import UserError
from lib.ppo import Batch, Size, normalized, ratio_noise, token_weights
from lib.training import backward, clipped_step, learning_rate, load_checkpoint, save_checkpoint
from policy import token_logprobs
from rl import clipped_surrogate, gae, ppo_loss
from rollout import Play, Rollout, collect, make_env, outcome, training_seeds

FUZZ = settings(max_examples=100, deadline=None, derandomize=True, database=None)
T, F = True, False


def close(a, b, **tolerance):
    torch.testing.assert_close(
        a, torch.as_tensor(b, dtype=a.dtype), **{"rtol": 1e-6, "atol": 1e-7, **tolerance}
    )


# ---------------------------------------------------------------- gae
REWARDS, VALUES = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 1.5])


@pytest.mark.parametrize(
    "dones, advantages",
    [  # gamma = lam = 0.5, so gamma * lam = 0.25, and V(s_T) = 2
        # deltas 1 + 0.5*1 - 0.5 = 1, 2 + 0.5*1.5 - 1 = 1.75, 3 + 0.5*2 - 1.5 = 2.5
        ([F, F, F], [1 + 0.25 * (1.75 + 0.25 * 2.5), 1.75 + 0.25 * 2.5, 2.5]),
        # the last turn ends its episode: V(s_T) belongs to another one; delta 3 - 1.5 = 1.5
        ([F, F, T], [1 + 0.25 * (1.75 + 0.25 * 1.5), 1.75 + 0.25 * 1.5, 1.5]),
        # the second one does: delta 2 - 1 = 1, and the first turn sees nothing of the third
        ([F, T, F], [1 + 0.25 * 1, 1, 2.5]),
        ([T, T, T], [0.5, 1, 1.5]),
    ],
)
def test_gae_by_hand(dones, advantages):
    got, returns = gae(REWARDS, VALUES, torch.tensor(dones), torch.tensor(2.0), 0.5, 0.5)
    close(got, advantages)
    close(returns, torch.tensor(advantages) + VALUES)


def test_gae_at_lambda_1_is_the_discounted_return():
    """Five answers of one hand, four wrong: R = -1 - 0.9 - 0.81 - 0.729 + 5 * 0.6561."""
    _, returns = gae(
        torch.tensor([-1.0, -1, -1, -1, 5]),
        torch.randn(5),
        torch.tensor([F, F, F, F, T]),
        torch.tensor(9.0),
        0.9,
        1.0,
    )
    close(returns[0], -0.1585, atol=1e-5)


def test_gae_leaks_nothing_across_the_end_of_an_episode():
    dones = torch.tensor([F, T, F, F])
    one, _ = gae(
        torch.tensor([1.0, 2, 3, 4]),
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
        dones,
        torch.tensor(5.0),
        0.9,
        0.95,
    )
    two, _ = gae(
        torch.tensor([1.0, 2, -9, 8]),
        torch.tensor([0.1, 0.2, 7.0, -3]),
        dones,
        torch.tensor(-6.0),
        0.9,
        0.95,
    )
    assert torch.equal(one[:2], two[:2]) and not torch.isclose(one[2:], two[2:]).any()


def test_gae_of_many_environments_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 7, 5, generator=generator)
    dones, last = torch.rand(7, 5, generator=generator) < 0.3, torch.randn(5, generator=generator)
    together = gae(rewards, values, dones, last, 0.9, 0.95)
    for n in range(5):
        alone = gae(rewards[:, n], values[:, n], dones[:, n], last[n], 0.9, 0.95)
        assert all(torch.equal(t[:, n], a) for t, a in zip(together, alone))


@pytest.mark.parametrize("wrong", ["rewards", "values", "dones", "last_value"])
def test_gae_refuses_shapes_that_differ(wrong):
    given = {
        "rewards": torch.zeros(3, 2),
        "values": torch.zeros(3, 2),
        "dones": torch.zeros(3, 2, dtype=torch.bool),
        "last_value": torch.zeros(2),
    }
    given[wrong] = given[wrong][:1]
    with pytest.raises(ValueError):
        gae(**given, gamma=0.9, lam=0.95)


# ---------------------------------------------------------------- loss
@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient, outside",
    [  # clip 0.1; gradient in log pi = -ratio * A or 0
        (1.0, 3.0, -3.0, -3.0, 0),
        (1.05, 2.0, -2.1, -2.1, 0),
        (0.95, -2.0, 1.9, 1.9, 0),
        (1.2, 2.0, -2.2, 0.0, 1),  # good and already likelier: no further
        (1.2, -2.0, 2.4, 2.4, 1),  # bad and likelier: pushed back in full
        (0.8, 2.0, -1.6, -1.6, 1),
        (0.8, -2.0, 1.8, 0.0, 1),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, gradient, outside):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    got, clipped = clipped_surrogate(log_ratio, torch.tensor([advantage]), 0.1)
    got.backward()
    close(got, loss, rtol=1e-5)
    close(log_ratio.grad, [gradient], rtol=1e-5)
    assert int(clipped) == outside


def test_clipped_surrogate_is_a_sum_so_that_parts_add_up():
    log_ratio, advantages = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    whole = clipped_surrogate(log_ratio, advantages, 0.1)
    parts = [
        clipped_surrogate(log_ratio[i:j], advantages[i:j], 0.1) for i, j in ((0, 2), (2, 3), (3, 9))
    ]
    close(whole[0], sum(loss for loss, _ in parts), rtol=1e-5)
    assert int(whole[1]) == sum(int(n) for _, n in parts)


def by_hand():
    """Two turns of a minibatch of 4 turns and 10 tokens. The first has two tokens, of ratios
    1.44 and 1.25: its own ratio is 1.2 * 1.25 = 1.5, since the first token weighs half. The
    second has one token, of ratio 0.8.
    """
    new = torch.tensor([-1.0, -2.0, -3.0])
    return {
        "new": new.requires_grad_(),
        "old": new.detach() - torch.tensor([1.44, 1.25, 0.8]).log(),
        "start": new.detach() + torch.tensor([0.1, -0.2, 0.3]),
        "ratio_weights": torch.tensor([0.5, 1, 1]),
        "turn_of": torch.tensor([0, 0, 1]),
        "advantages": torch.tensor([2.0, 3.0]),
        "values": torch.tensor([1.0, 4.0], requires_grad=True),
        "returns": torch.tensor([3.0, 3.0]),
        "entropy": torch.tensor([0.2, 0.4, 0.9], requires_grad=True),
        "size": Size(turns=4, tokens=10),
    }


def coefficients(**changes):
    off = {
        "ratio": "turn",
        "clip": 0.1,
        "max_ratio": 1.4,
        "value_coef": 0,
        "entropy_coef": 0,
        "kl_coef": 0,
    }
    return SimpleNamespace(**{**off, **changes})


def test_ppo_loss_by_hand():
    """All terms at once; 4 is the minibatch's number of turns.

    Surrogate: min(1.5 * 2, 1.1 * 2) = 2.2, clipped, and min(0.8 * 3, 0.9 * 3) = 2.4, not
    clipped. Values: 4 + 1. Entropy of the turns: 0.3 + 0.9. KL: (0.01 + 0.04 + 0.09) / 2.
    """
    given = by_hand()
    ppo = coefficients(value_coef=0.5, entropy_coef=0.1, kl_coef=2)
    loss, sums = ppo_loss(**given, ppo=ppo)
    close(loss, (-4.6 + 0.5 * 5 - 0.1 * 1.2 + 2 * 0.07) / 4, rtol=1e-5)
    loss.backward()
    # of the surrogate -ratio * A where it is not clipped; of the KL 2 * (new - start)
    close(given["new"].grad, torch.tensor([-0.2, 0.4, -2.4 - 0.6]) / 4, rtol=1e-4)
    close(given["values"].grad, torch.tensor([-2.0, 1.0]) / 4)
    close(given["entropy"].grad, torch.tensor([-0.05, -0.05, -0.1]) / 4)
    assert sums == pytest.approx(
        {
            "turns": 2,
            "ratios": 2,
            "clipped": 2,
            "loss": -4.6 + 0.5 * 5 - 0.1 * 1.2 + 2 * 0.07,
            "value_loss": 5,
            "entropy": 1.2,
            "kl_start": 0.07,
            "kl_old": 0.5 - math.log(1.5) - 0.2 - math.log(0.8),
            "ratio_gap": 0.5 + 0.2,
            "log_ratio_squared": math.log(1.5) ** 2 + math.log(0.8) ** 2,
            "exploded": 1,
        },
        rel=1e-4,
    )


def test_ppo_loss_of_tokens_by_hand():
    """Mean over the minibatch's 10 tokens of min(1.44 * 2, 2.2) + min(1.25 * 2, 2.2) + 0.8 * 3
    = 6.8; no weights.
    """
    given = by_hand()
    loss, sums = ppo_loss(**given, ppo=coefficients(ratio="token"))
    close(loss, -6.8 / 10, rtol=1e-5)
    loss.backward()
    close(given["new"].grad, [0, 0, -2.4 / 10], rtol=1e-4)
    assert (sums["ratios"], sums["clipped"]) == (3, 3)


def test_ppo_loss_without_a_start():
    loss, sums = ppo_loss(**{**by_hand(), "start": None}, ppo=coefficients())
    close(loss, -4.6 / 4, rtol=1e-5)
    assert sums["kl_start"] == 0


def test_token_logprobs_by_hand():
    """Logits 0, ln 2 / 2, ln 5 / 2 at temperature 0.5 are the odds 1 : 2 : 5."""
    logits = torch.tensor([[0, math.log(2) / 2, math.log(5) / 2]]).repeat(3, 1)
    chosen, entropy = token_logprobs(logits, torch.tensor([0, 1, 2]), 0.5)
    close(chosen.exp(), [1 / 8, 2 / 8, 5 / 8], rtol=1e-5)
    close(entropy, [-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))] * 3, rtol=1e-5)


def test_a_token_that_cannot_be_sampled_adds_nothing():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    chosen, entropy = token_logprobs(logits, torch.tensor([0]))
    (chosen + entropy).sum().backward()
    close(chosen, [-math.log(2)])
    close(entropy, [math.log(2)])
    close(logits.grad, [[0.5, -0.5, 0]])


def test_learning_rate_by_hand():
    constant = [learning_rate(s, 10, 0.4, "constant", 4) for s in range(10)]
    assert constant == pytest.approx([0.1, 0.2, 0.3, 0.4] + [0.4] * 6)
    cosine = [learning_rate(s, 14, 0.4, "cosine", 4) for s in range(15)]
    assert cosine[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert (
        cosine[9] == pytest.approx(0.2)
        and cosine[14] == pytest.approx(1e-9)
        and cosine[4:] == sorted(cosine[4:])[::-1]
    )
    assert learning_rate(0, 1, 0.4, "cosine") == pytest.approx(0.4)


# ---------------------------------------------------------------- batching
@FUZZ
@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.integers(1, 12))
def test_minibatches_hold_every_turn_once(sizes, wanted):
    packed, start = [], 0
    for size in sizes:
        packed.append(Packed(Sequence([], []), list(range(start, start + size))))
        start += size
    groups = minibatches(packed, wanted)
    assert [i for group in groups for _, members in group for i in members] == list(range(start))
    counts = [sum(len(members) for _, members in group) for group in groups]
    assert min(counts) >= wanted / 2 or len(counts) == 1  # no step on a handful of turns
    assert max(counts) < wanted + 5 + wanted / 2


def test_pack_joins_what_extends():
    turns = [
        ([1, 2], [3]),
        ([1, 2, 3, 4], [5, 6]),
        ([1, 2, 3, 4, 5, 6, 7], [8]),  # one conversation
        ([1, 2, 9, 4], [5]),  # another one: it differs from what came before
        ([1, 2], [3]),  # shorter than what came before
        ([1, 2, 3], [4]),
    ]  # extends it by nothing: still the same conversation
    packed = pack([(Sequence(prompt, []), answer) for prompt, answer in turns])
    assert [members for _, members in packed] == [[0, 1, 2], [3], [4, 5]]
    assert packed[0][0] == Sequence([1, 2, 3, 4, 5, 6, 7, 8], [(2, 3), (4, 6), (7, 8)])
    for sequence, members in packed:
        assert [sequence.ids[a:b] for a, b in sequence.spans] == [turns[i][1] for i in members]
        assert [sequence.ids[:a] for a, _ in sequence.spans] == [turns[i][0] for i in members]


@FUZZ
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 100))
def test_micro_batches_lose_nothing_and_fit(lengths, limit):
    groups = micro_batches([(Sequence([0] * n, []), [i]) for i, n in enumerate(lengths)], limit)
    assert sorted(i for group in groups for _, (i,) in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(len(s.ids) for s, _ in group) <= limit


def test_token_weights_change_with_the_token_that_completes_the_key():
    # the key comes twice, the first counts
    policy = reader('{"cards": [], ', '"for', "mula", '": ', '"1+2"', ', "formula"')

    def weigh(ids, weight):
        return token_weights(policy, SimpleNamespace(answer=ids), '"formula"', weight).tolist()

    assert weigh([0, 1, 2, 3, 4, 5], 0.5) == [0.5, 0.5, 0.5, 1, 1, 1]
    assert weigh([5, 4], 0.5) == [1, 1]
    assert weigh([0, 4, 4], 0.5) == [0.5] * 3  # it never comes
    assert weigh([0, 1, 2, 3], 1) == [1] * 4
    assert weigh([0, 1, 2, 3], 0) == [0, 0, 0, 1]


# ---------------------------------------------------------------- what an update compares with
def reader(*words):
    """A policy that decodes token i as words[i]."""
    return SimpleNamespace(decode=lambda ids: "".join(words[i] for i in ids), exact=True)


def test_a_key_is_found_in_the_text_not_in_the_tokens():
    """A token may be half a character, shown as the replacement sign until its other half
    follows.
    """
    halves = SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace"))
    answer = list('ä"k"é'.encode())
    assert answer[:2] == list("ä".encode()) and len(answer) == 7
    weights = token_weights(halves, SimpleNamespace(answer=answer), '"k"', 0.5)
    assert weights.tolist() == [0.5] * 4 + [1] * 3
    weights = token_weights(halves, SimpleNamespace(answer=answer), "é", 0.5)
    assert weights.tolist() == [0.5] * 6 + [1]


def test_batch_by_hand():
    """Advantages 1, 2, 3 have mean 2 and standard deviation 1; the log-probs sampled are the
    old ones.
    """
    turns = [
        SimpleNamespace(
            slot=slot,
            prompt=Sequence([slot], []),
            answer=[0, 1],
            logprobs=torch.tensor([-1.0, -2.0]) - slot,
            value=float(slot),
        )
        for slot in range(3)
    ]
    ppo = SimpleNamespace(
        envs=3, normalize_advantages=True, min_spread=0.01, prefix_weight=0.5, kl_coef=0
    )
    advantages, returns = torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6])
    batch = rl.prepare(reader("a", "key"), turns, advantages, returns, ppo, "key", None)
    targets = batch.targets([batch.packed[2], batch.packed[0]], "cpu")
    close(targets.advantages, [1, -1])
    close(targets.returns, [6, 4])
    close(targets.old, [-3, -4, -1, -2])
    close(targets.ratio_weights, [0.5, 1, 0.5, 1])
    assert targets.start is None and batch.size(batch.packed) == (3, 6)
    assert batch.spread == 1
    ppo.normalize_advantages = False
    close(
        rl.prepare(reader("a", "key"), turns, advantages, returns, ppo, "key", None).advantages,
        [1, 2, 3],
    )


@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.009])
def test_advantages_that_are_all_alike_count_as_none(spread):
    alike = 0.5 + spread * torch.tensor([-1.0, 0, 1])  # their standard deviation is `spread`
    close(normalized(alike, min_spread=0.01), [0, 0, 0])
    close(normalized(torch.tensor([3.0]), min_spread=0.0), [0])  # nor can a single one differ
    close(normalized(100 * alike + alike.new_tensor([-2, 0, 2]), min_spread=0.01), [-1, 0, 1])


def test_main_scales_rewards_before_gae(tmp_path, monkeypatch):
    """Rewards 10 and 20 times 0.1; gamma 0.5, lambda 1: deltas 1 + 0.5 * 2 - 1 = 1 and 2 + 0.5
    * 3 - 2 = 1.5.
    """
    given = Rollout(
        ["one", "two"],
        torch.tensor([[10.0], [20.0]]),
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[F], [F]]),
        torch.tensor([3.0]),
    )

    class Seen(Exception):
        pass

    def seen(policy, turns, *numbers):
        raise Seen(turns, *numbers[:2])

    net = torch.nn.Linear(1, 1)
    policy = SimpleNamespace(
        device=torch.device("cpu"),
        tokens={},
        trainable=dict(net.named_parameters()),
        value_head=torch.nn.Linear(1, 1),
        learn=lambda values_alone: None,
    )
    monkeypatch.setattr(rl, "start_policy", lambda cfg, init: policy)
    monkeypatch.setattr(Play, "burn_in", lambda *arguments: None)
    monkeypatch.setattr(rl, "collect", lambda *arguments: given)
    monkeypatch.setattr(rl, "prepare", seen)
    with pytest.raises(Seen) as stopped:
        rl.main(
            [
                str(CONFIG),
                f"run.dir={tmp_path}",
                "ppo.init=none",
                "ppo.reward_scale=0.1",
                "ppo.gamma=0.5",
                "ppo.lam=1",
                "ppo.envs=1",
                "ppo.turns=2",
                "ppo.kl_coef=0",
            ]
        )
    turns, advantages, returns = stopped.value.args
    assert turns == given.turns
    close(advantages, [1 + 0.5 * 1.5, 1.5])
    close(returns, [1 + 1 + 0.5 * 1.5, 2 + 1.5])


def test_collect_puts_turns_in_time_and_bootstraps_what_goes_on(free_policy, loaded):
    """5 environments of at most 2 answers: after 3 turns some wait in mid-episode, others have
    a new one.
    """
    game = Play([make_env(loaded[0].env, 2) for _ in range(5)], training_seeds(0))
    bar = SimpleNamespace(set_description=lambda text: None)
    rollout = collect(free_policy, game, 3, 0.7, torch.Generator().manual_seed(0), bar)
    assert [turn.slot for turn in rollout.turns] == [*range(5)] * 3
    for name in ("rewards", "values", "dones"):
        assert getattr(rollout, name).shape == (3, 5)
    for t in range(3):
        for slot in range(5):
            turn = rollout.turns[5 * t + slot]
            numbers = [rollout.rewards[t, slot], rollout.values[t, slot], rollout.dones[t, slot]]
            assert numbers == pytest.approx([turn.reward, turn.value, turn.done])
    for slot in range(5):
        ended = bool(rollout.dones[-1, slot])
        assert (rollout.last_values[slot] == 0) == ended
        if not ended:
            alone = free_policy.values(free_policy.encode([game.episodes[slot].observation]))
            close(rollout.last_values[slot], alone.item(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- one update of the mini model
@pytest.fixture(scope="module")
def free_policy(make_policy):
    """With the value head's gradient reaching the model, so that all three losses meet in the
    same weights.
    """
    return make_policy(value_detach=False)


@pytest.fixture(scope="module")
def turns(free_policy, loaded):
    return play(free_policy, loaded[0].env, 0.7, tables=5, turns=3)


class Recorder:
    """Stands in for the optimiser: keeps the gradients of every step and leaves the weights
    alone.
    """

    def __init__(self, policy):
        self.parameters = {
            **policy.trainable,
            **{f"value_head.{n}": p for n, p in policy.value_head.named_parameters()},
        }
        self.steps = []

    def zero_grad(self):
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self):
        self.steps.append(
            {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}
        )


def gradients(policy, turns, ppo, advantages=None, **changes):
    """({name: gradient} of each optimiser step, logged statistics) of one update with unclipped
    gradients.
    """
    vars(ppo).update(
        {
            "envs": 5,
            "turns": 3,
            "epochs": 1,
            "minibatch": 999,
            "max_grad_norm": 1e9,
            "temperature": 0.7,
            "clip": 0.1,
            **changes,
        }
    )
    generator, recorder = torch.Generator().manual_seed(1), Recorder(policy)
    noise = torch.randn(2, len(turns), generator=generator)
    advantages = noise[0] if advantages is None else advantages
    start = {n: p * 1.1 for n, p in policy.snapshot().items()}
    batch = rl.prepare(policy, turns, advantages, noise[1], ppo, '"formula"', start)
    stats = rl.update(policy, recorder, batch, ppo, generator)
    return recorder.steps, stats


def assert_same_gradients(a, b, rtol=1e-4):
    assert set(a) == set(b)
    for name in a:
        assert a[name].abs().max() > 0, name
        torch.testing.assert_close(
            a[name], b[name], rtol=rtol, atol=rtol * a[name].abs().max().item(), msg=name
        )


@pytest.mark.parametrize("ratio", ["turn", "token"])
def test_micro_batches_add_up_to_the_gradient_of_one_batch(free_policy, turns, cfg, ratio):
    """Old log-probs are moved, so that some ratios are clipped; every term of the loss is on."""
    generator = torch.Generator().manual_seed(0)
    moved = [
        SimpleNamespace(
            **{
                **vars(t),
                "logprobs": t.logprobs + 0.05 * torch.randn(len(t.answer), generator=generator),
            }
        )
        for t in turns
    ]
    changes = {"ratio": ratio, "entropy_coef": 0.1, "kl_coef": 0.1, "value_coef": 0.5}
    (whole,), big = gradients(free_policy, moved, cfg.ppo, micro_tokens=10**6, **changes)
    (parts,), small = gradients(free_policy, moved, cfg.ppo, micro_tokens=1, **changes)
    assert 0 < big["clip_fraction"] < 1
    assert_same_gradients(whole, parts)
    for name in ("stopped", "ratio_noise"):
        assert small.pop(name) is big.pop(name) is None
    assert small == pytest.approx(big, rel=1e-4)


@pytest.mark.parametrize("ratio", ["turn", "token"])
def test_first_step_is_the_policy_gradient(free_policy, turns, cfg, ratio):
    """At ratio 1 PPO is REINFORCE: mean over turns of -A * weighted log-prob of the whole
    answer, or, per token, mean over tokens of -A * log-prob; plus the value loss. Each turn is
    scored here on its own.
    """
    (got,), stats = gradients(
        free_policy,
        turns,
        cfg.ppo,
        ratio=ratio,
        kl_coef=0,
        entropy_coef=0,
        value_coef=0.5,
        normalize_advantages=False,
        prefix_weight=0.5,
    )
    noise = torch.randn(2, len(turns), generator=torch.Generator().manual_seed(1))
    recorder, loss, values = Recorder(free_policy), 0, 0
    recorder.zero_grad()
    for turn, advantage, target in zip(turns, *noise):
        out = free_policy.score([turn.prompt.answered(turn.answer)], 0.7)
        weights = token_weights(free_policy, turn, '"formula"', 0.5) if ratio == "turn" else 1
        loss = loss - advantage * (weights * out["logprobs"]).sum()
        values = values + (out["values"][0] - target) ** 2
    entries = len(turns) if ratio == "turn" else sum(len(t.answer) for t in turns)
    (loss / entries + 0.5 * values / len(turns)).backward()
    recorder.step()
    assert_same_gradients(got, recorder.steps[0], rtol=1e-3)
    assert stats["ratio_gap"] < 1e-4 and stats["clip_fraction"] == 0 and abs(stats["kl_old"]) < 1e-6


def test_every_epoch_trains_on_every_turn_once(free_policy, turns, cfg, monkeypatch):
    seen, targets = [], Batch.targets

    def spy(batch, packed, device):
        seen.extend(turns_of(packed))
        return targets(batch, packed, device)

    monkeypatch.setattr(Batch, "targets", spy)
    steps, _ = gradients(
        free_policy, turns, cfg.ppo, epochs=3, minibatch=5, micro_tokens=100, kl_coef=0
    )
    epochs = [seen[k : k + len(turns)] for k in range(0, len(seen), len(turns))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(len(turns)))] * 3
    assert (
        epochs[0] != epochs[1] != epochs[2] and len(steps) >= 6
    )  # in another order each time, in several steps


def test_kl_to_the_start_counts(free_policy, turns, cfg):
    (without,), zero = gradients(free_policy, turns, cfg.ppo, kl_coef=0)
    (with_kl,), some = gradients(free_policy, turns, cfg.ppo, kl_coef=0.5)
    assert zero["kl_start"] == 0 < some["kl_start"]
    assert any(not torch.allclose(without[n], with_kl[n]) for n in without)


@pytest.mark.parametrize("advantage", [math.nan, 1e30])
def test_loss_or_norm_that_is_not_finite_stops_before_the_step(free_policy, turns, cfg, advantage):
    """Squares of gradients of 1e30 are beyond float32, the loss itself is not."""
    recorder, advantages = Recorder(free_policy), torch.full((len(turns),), advantage)
    ppo = SimpleNamespace(
        **{**vars(cfg.ppo), "envs": 5, "kl_coef": 0, "normalize_advantages": False})
    batch = rl.prepare(
        free_policy, turns, advantages, torch.zeros(len(turns)), ppo, '"formula"', None
    )
    with pytest.raises(UserError, match="finite"):
        rl.update(free_policy, recorder, batch, ppo, torch.Generator().manual_seed(0))
    assert recorder.steps == []


def test_nothing_is_learned_where_advantages_are_alike(make_policy, turns, cfg):
    """Adam's step does not shrink with its gradient: of advantages a millionth apart no step is
    made. With the floor off it is made, as if they differed by 1.
    """
    for floor, moves in ((0.01, False), (0.0, True)):
        policy = make_policy()
        before = policy.snapshot()
        advantages = 0.3 + 1e-6 * torch.arange(len(turns))
        ppo = SimpleNamespace(**{**vars(cfg.ppo), "envs": 5, "kl_coef": 0, "min_spread": floor})
        batch = rl.prepare(
            policy, turns, advantages, torch.zeros(len(turns)), ppo, '"formula"', None
        )
        optimizer = torch.optim.AdamW(policy.trainable.values(), lr=1e-3, weight_decay=0)
        rl.update(policy, optimizer, batch, ppo, torch.Generator().manual_seed(0))
        changed = any(not torch.equal(before[n], p) for n, p in policy.trainable.items())
        assert changed == moves


@pytest.mark.parametrize(
    "changes, stopped",
    [
        ({"max_ratio": 2.9}, "ppo.max_ratio"),
        ({"max_ratio": math.inf, "target_kl": 0.05}, "ppo.target_kl"),
        ({"max_ratio": 3.1, "target_kl": 0.07}, None),
    ],
)
def test_an_update_ends_before_the_step_of_a_policy_that_moved_too_far(
    free_policy, turns, cfg, changes, stopped
):
    """One of 15 turns is three times as likely as it was: KL (3 - 1 - ln 3) / 15 = 0.06."""
    last = len(turns[-1].answer)
    far = turns[-1].logprobs - torch.tensor([0.0] * (last - 1) + [math.log(3)])
    moved = [*turns[:-1], type(turns[-1])(**{**vars(turns[-1]), "logprobs": far})]
    changes = {"epochs": 2, "kl_coef": 0, "prefix_weight": 1, **changes}
    steps, stats = gradients(free_policy, moved, cfg.ppo, **changes)
    assert stats["stopped"] == stopped
    assert stats["steps"] == len(steps) == (0 if stopped else 2)
    assert math.isfinite(stats["grad_norm"])


def test_rounding_is_measured_by_what_the_policy_moved():
    """The sampler's log-ratios 0.03 and -0.04 have mean square 0.00125; the weight 0.5 of a token
    counts. In the last of two steps, of 4 turns, the squares add up to 0.02: mean 0.005.
    """
    weights = [torch.tensor([0.5, 1.0]), torch.tensor([1.0])]
    old = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    sampled = [torch.tensor([-1.02, -2.02]), torch.tensor([-2.96])]
    turns, same = ([SimpleNamespace(logprobs=answer) for answer in of] for of in (sampled, old))
    batch = SimpleNamespace(ratio_weights=weights, old=old, turns=turns)
    first = {"log_ratio_squared": 7.0, "turns": 4}
    last = {"log_ratio_squared": 0.02, "turns": 4}
    assert ratio_noise(batch, [first, last]) == pytest.approx(0.5, rel=1e-4)
    assert ratio_noise(batch, [last]) is None  # nothing has been learned before it
    assert ratio_noise(batch, [first, {"log_ratio_squared": 0.0, "turns": 4}]) is None
    exact = SimpleNamespace(ratio_weights=weights, old=old, turns=same)
    assert ratio_noise(exact, [first, last]) == 0


# ---------------------------------------------------------------- updates of the value head alone
def test_the_value_head_can_learn_alone(make_policy, turns, cfg):
    """Even where its gradient may reach the model, which is read, not trained: 2 N per token."""
    policy = make_policy(value_detach=False)
    ppo = SimpleNamespace(**{**vars(cfg.ppo), "envs": 5, "kl_coef": 0, "value_hidden": []})
    groups = [{"params": policy.trainable.values()}, {"params": policy.value_head.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0)
    moved = {}
    for alone in (True, False):
        before = policy.snapshot(), [p.detach().clone() for p in policy.value_head.parameters()]
        trained = policy.tokens["train"]
        policy.learn(values_alone=alone)
        noise = torch.randn(2, len(turns), generator=torch.Generator().manual_seed(0))
        batch = rl.prepare(policy, turns, *noise, ppo, '"formula"', None)
        stats = rl.update(policy, optimizer, batch, ppo, torch.Generator().manual_seed(0))
        model = any(not torch.equal(before[0][n], p) for n, p in policy.trainable.items())
        head = any(not torch.equal(a, b) for a, b in zip(before[1], policy.value_head.parameters()))
        moved[alone] = model, head, policy.tokens["train"] > trained, stats["grad_norm"] > 0
    assert moved[True] == (False, True, False, False)
    assert moved[False] == (True, True, True, True)


# ---------------------------------------------------------------- float16
class OneWeight:
    """A model of one weight w = 2 whose loss is w: its gradient is 1."""

    def __init__(self, scale):
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))
        self.trainable = {"weight": self.weight}
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.tokens, self.official_extra = {"train": 0}, {"train": 0}
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)

    def step(self, loss):
        self.optimizer.zero_grad()
        backward(self, loss)
        return clipped_step(self, self.optimizer, 0.5, loss.item(), "it diverged")

    def flops(self):
        return 0

    official_flops = flops

    def save(self, folder):
        torch.save(self.weight, folder / "weight.pt")

    def load(self, folder):
        self.weight.data = torch.load(folder / "weight.pt", weights_only=True).data


def test_a_scaled_loss_makes_the_step_of_the_loss():
    """Clipped after the scale is taken off: 2 - 0.1 * 0.5."""
    policy = OneWeight(scale=1024.0)
    assert policy.step(policy.weight.sum()) == pytest.approx(1)
    close(policy.weight.detach(), [1.95], rtol=1e-4)


def overflowing(weight):
    """A loss of 2 whose gradient is finite but not in float16 at scale 2**15: 4 * 2**15 > 65504."""
    return (weight.half().float() * 4).sum() - 6


def test_a_step_that_overflows_is_skipped_and_the_scale_halved():
    policy = OneWeight(scale=2.0**15)
    assert policy.step(overflowing(policy.weight)) is None
    assert policy.weight.item() == 2 and policy.scaler.get_scale() == 2**14
    assert policy.step(overflowing(policy.weight)) is None
    assert policy.step(overflowing(policy.weight)) == pytest.approx(4)
    close(policy.weight.detach(), [1.95], rtol=1e-4)


def test_no_scale_helps_a_loss_that_is_not_finite():
    policy = OneWeight(scale=1024.0)
    with pytest.raises(UserError, match="it diverged"):
        policy.step(policy.weight.sum() * math.nan)
    at_one = OneWeight(scale=1.0)
    with pytest.raises(UserError, match="it diverged"):
        at_one.step(at_one.weight.half().float().mul(1e5).sum())
    assert policy.weight.item() == at_one.weight.item() == 2


def test_the_scale_is_part_of_a_checkpoint(tmp_path):
    policy, other = OneWeight(scale=2.0**15), OneWeight(scale=8.0)
    policy.step(overflowing(policy.weight))
    save_checkpoint(tmp_path, policy, policy.optimizer)
    load_checkpoint(tmp_path, other, other.optimizer)
    assert other.scaler.get_scale() == 2**14
    assert other.scaler.state_dict() == policy.scaler.state_dict()


# ---------------------------------------------------------------- what is logged of a rollout
def graded(attempt, correct, reward=0.0):
    info = {
        "attempt": attempt,
        "correct": correct,
        "recognized": correct,
        "category": "correct" if correct else "wrong",
    }
    return SimpleNamespace(info=info, reward=reward)


def test_outcome_by_hand():
    """Half of the first attempts are right and a quarter of the second ones: of 8 hands 4 go on
    to a second attempt, 3 to a third, which is right: all are solved, by 8 + 4 + 3 answers. In the
    rollout there were 2 first attempts, 4 second, 1 third.
    """
    turns = [graded(1, T, 5), graded(1, F, -1), graded(3, T, 5)]
    turns += [graded(2, T, 5), graded(2, F, -1), graded(2, F, -1), graded(2, F, -3)]
    assert outcome(turns) == {
        "reward": pytest.approx((8 * 2 + 4 * 0 + 3 * 5) / 15),
        "success": pytest.approx(1),
        "first_attempt": 0.5,
        "per_step": pytest.approx(8 / 15),
        "recognition": 0.5,
        "answers": {"correct": round(8 / 15, 4), "wrong": round(7 / 15, 4)},
    }


def test_what_is_logged_does_not_depend_on_where_rollouts_cut_hands_off():
    """A policy that is right at every attempt in 3 cases of 10, 5 attempts, rollouts of 4 turns:
    success 1 - 0.7 ** 5 and 0.3 of the answers in the first update as in all others.
    """
    rng, attempts, solved = random.Random(0), [1] * 20000, 1 - 0.7**5
    for rollout in range(5):
        turns = []
        for _ in range(4):
            for slot, attempt in enumerate(attempts):
                correct = rng.random() < 0.3
                turns.append(graded(attempt, correct))
                attempts[slot] = 1 if correct or attempt == 5 else attempt + 1
        if rollout == 0:
            continue  # as Play.burn_in does
        seen = outcome(turns)
        assert seen["success"] == pytest.approx(solved, abs=0.01)
        assert seen["per_step"] == pytest.approx(0.3, abs=0.01)
