"""What the benchmarks share: the command line, clocks, peaks of memory, PPO without a run folder.

`Iteration` alone calls rl.py. Importing this file puts the repository root on sys.path.
"""
import os
import platform
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from tqdm import tqdm

import rl
from lib.batching import sequences_of
from lib.settings import ROOT, UserError
from lib.training import answer_logprobs
from rollout import Play, collect, make_env


# ---------------------------------------------------------------- the command line
class Parser(ArgumentParser):
    """CONFIG.yaml, overrides and --json FILE; a wrong argument is a UserError: one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=RawDescriptionHelpFormatter)
        self.add_argument("settings", nargs="+", metavar="CONFIG.yaml | key=value")
        self.add_argument("--json", type=json_file)

    def error(self, message):
        raise UserError(f"{message}; --help explains")


def json_file(text):
    """The path of --json. Raises: UserError, before anything is measured, if it cannot be there."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--json {path}: not a file in a folder that is there")
    return path


def changed(section, **values):
    """A copy of a section of the configuration, with other values."""
    return SimpleNamespace(**{**vars(section), **values})


# ---------------------------------------------------------------- clocks and memory
def timed(device, function, *arguments):
    """What the function returns and its seconds, a GPU's pending work included."""
    wait(device)
    began = perf_counter()
    result = function(*arguments)
    wait(device)
    return result, perf_counter() - began


def wait(device):
    """Until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device):
    """Forget the peak of memory so far (on a CPU in Linux alone: elsewhere it only grows)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def machine(device):
    """Where and with what this was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    processor = platform.processor() or platform.machine()
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "device": name,
        "processor": f"{processor}, {os.cpu_count()} logical CPUs",
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        **{library: version(library) for library in libraries},
    }


def commit():
    """The short hash that is checked out, and whether files differ from it."""
    command = "git rev-parse --short HEAD && git status --porcelain"
    git = subprocess.run(command, shell=True, cwd=ROOT, text=True, capture_output=True)
    lines = git.stdout.splitlines()
    if not lines:
        return "unknown"
    return f"{lines[0]} with changes" if len(lines) > 1 else lines[0]


# ---------------------------------------------------------------- PPO, as rl.py does it
def running_optimizer(parameters, eps=1e-8):
    """AdamW as in the middle of a run, moments and gradients in place; learning rate 0.

    So every measurement meets the same policy, in the memory of a run under way.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, eps=eps, weight_decay=0.0)
    optimizer.step()
    return optimizer


class Iteration:
    """One rollout and one update of rl.py at a time; `ppo` is that section or a variant of it."""

    def __init__(self, policy, cfg):
        self.policy, self.cfg = policy, cfg
        self.start = policy.snapshot() if cfg.ppo.kl_coef else None
        trained = [*policy.trainable.values(), *policy.value_head.parameters()]
        self.optimizer = running_optimizer(trained, cfg.ppo.adam_eps)
        self.sampler = torch.Generator(policy.device).manual_seed(cfg.run.seed)
        self.shuffler = torch.Generator().manual_seed(cfg.run.seed)

    def play(self, envs, seeds):
        """Episodes of these seeds in `envs` environments side by side."""
        ppo = self.cfg.ppo
        return Play([make_env(self.cfg.env, ppo.verify_iters) for _ in range(envs)], seeds)

    def rollout(self, play, ppo):
        """Returns: (Turns, their advantages, their returns), what `update` takes."""
        found = collect(self.policy, play, ppo.turns, ppo.temperature, self.sampler,
                        tqdm(disable=True))
        advantages, returns = rl.gae(found.rewards * ppo.reward_scale, found.values, found.dones,
                                     found.last_values, ppo.gamma, ppo.lam)  # (T, N)
        return found.turns, advantages.flatten(), returns.flatten()

    def update(self, batch, ppo, answer_key):
        """All epochs over the batch of one rollout, the pass for the KL penalty included."""
        prepared = rl.prepare(self.policy, *batch, ppo, answer_key, self.start)
        rl.update(self.policy, self.optimizer, prepared, ppo, self.shuffler)

    def batch_of(self, turns, ppo):
        """What `update` takes, from Turns that were sampled without log-probs and values.

        Rewards stand in for advantages and returns: the update's work is the same.
        """
        packed = sequences_of(turns, len(turns))
        scored = answer_logprobs(self.policy, packed, 1, ppo.temperature)
        for turn, logprobs in zip(turns, scored):
            turn.logprobs = logprobs
        rewards = torch.tensor([turn.reward for turn in turns]) * ppo.reward_scale  # (T,)
        return turns, rewards, rewards
