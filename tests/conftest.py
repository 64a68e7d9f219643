"""Puts the repository root on sys.path, so that the tests import the flat modules as the scripts
do; shared fixtures.

python -m pytest tests            without the tests marked slow; those marked gpu skip where there
is no GPU
python -m pytest tests --slow     all of them
"""

import copy
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more are slower for models this small

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "mini" / "gp_l.yaml"
PICTURES = CONFIG.with_name("gp_vl.yaml")
FROZEN = (  # the language model alone learns, in the words of the text configurations
    "model.tune=[language]",
    r"lora.target_modules='.*language_model.*\.(q_proj|k_proj|v_proj|o_proj"
    r"|gate_proj|up_proj|down_proj)'",
)
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


# ---------------------------------------------------------------- markers
def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless --slow or -m is given")
    config.addinivalue_line("markers", "gpu: needs CUDA")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow") and not config.getoption("-m"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def subnormal_floats(request):
    """policy.py has the processor flush them to 0; hypothesis, which draws floats, wants them."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(not getattr(request.function, "is_hypothesis_test", False))


# ---------------------------------------------------------------- settings and policies (torch is
# imported on first use)
@pytest.fixture(scope="session")
def loaded():
    """(cfg, raw) of the shipped mini configuration; the fixtures below hand out copies."""
    from lib import settings as config

    return config.load([str(CONFIG)])[:2]


@pytest.fixture
def cfg(loaded):
    return copy.deepcopy(loaded[0])


@pytest.fixture
def raw(loaded):
    return copy.deepcopy(loaded[1])


def policies(cfg):
    """Factory of mini policies of a configuration (NF4, fp32).

    Untrained LoRA is the identity and an untrained value head is 0, which would hide mistakes, so
    both get random weights that depend on `noise` alone (0: leave them).
    """
    import torch
    from policy import Policy

    def make(noise=1, seed=0, value_detach=True, full=False, **model):
        settings = copy.deepcopy(cfg)
        vars(settings.model).update(model)
        policy = Policy(
            settings.model,
            None if full else settings.lora,
            settings.ppo.value_hidden,
            value_detach,
            seed,
        )
        if noise:
            generator = torch.Generator().manual_seed(noise)
            for name, parameter in [
                *policy.trainable.items(),
                *policy.value_head.named_parameters(),
            ]:
                if "lora_B" in name or name.startswith("net."):
                    scale = 0.06 if "lora_B" in name else 0.2
                    parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(
                        parameter
                    )
        return policy

    return make


@pytest.fixture(scope="session")
def make_policy(loaded):
    """The factory for the shipped text configuration."""
    return policies(loaded[0])


@pytest.fixture(scope="session")
def policy(make_policy):
    """One policy for the tests that only read it."""
    return make_policy()


def play(policy, env, temperature, tables=6, turns=3, seed=0, verify_iters=5):
    """Turns of episodes played for real, side by side: after a few of them the prompts differ in
    length.
    """
    import torch
    from rollout import Play, make_env, training_seeds

    games = Play([make_env(env, verify_iters) for _ in range(tables)], training_seeds(seed))
    generator = torch.Generator(policy.device).manual_seed(seed)
    return [turn for _ in range(turns) for turn in games.answer_all(policy, temperature, generator)]


def assert_read_in_parts(policy, prompts, monkeypatch, rows, parts):
    """Sampled answers are the same when `rows` prompts are read at a time, which takes so many
    `parts`.
    """
    import torch

    width, read, calls = max(len(p.ids) for p in prompts), policy._prefill_part, []
    monkeypatch.setattr(policy, "sample_tokens", 10**9)
    monkeypatch.setattr(
        policy, "_prefill_part", lambda *arguments: calls.append(1) or read(*arguments)
    )
    several = []
    for states in (10**9, rows * width * policy.base.lm_head.in_features):
        monkeypatch.setattr(policy, "states_at_once", states)
        several.append(policy.sample(prompts, 0.7, torch.Generator().manual_seed(0)))
    assert len(calls) == 1 + parts
    for one, two in zip(*several):
        assert one.ids == two.ids
        torch.testing.assert_close(one.logprobs, two.logprobs, rtol=0, atol=1e-4)
        assert abs(one.value - two.value) < 1e-4
    assert len({tuple(answer.ids) for answer in several[0]}) > 1
