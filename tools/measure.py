"""What the benchmarks share: the command line, clocks, memory peaks, PPO without a run folder."""
import json
import os
import platform
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from time import perf_counter, process_time
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that ours are found
import torch
from tqdm import tqdm

import rl
from lib.runs import commit, write_atomic
from policy import Policy
from rollout import Play, collect, make_env


# ---------------------------------------------------------------- command line and results
def command_line(description):
    """A parser of CONFIG.yaml, overrides and --json FILE."""
    parser = ArgumentParser(description=description, allow_abbrev=False,
                            formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="CONFIG.yaml | key=value")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def write_json(path, results):
    """Write the results, if --json names a file."""
    if path is not None:
        write_atomic(path, json.dumps(results, indent=1) + "\n")


def machine(device):
    """Where and with what this was measured."""
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "processor": f"{platform.machine()}, {os.cpu_count()} logical CPUs",
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        **{library: version(library) for library in libraries},
    }


# ---------------------------------------------------------------- clocks and memory
def timed(function, *arguments):
    """What the function returns and its seconds, a GPU's pending work included."""
    wait()
    began = perf_counter()
    result = function(*arguments)
    wait()
    return result, perf_counter() - began


def wait():
    """Until a GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(seconds=0.3):
    """FLOPs per CPU second of products of two 512 x 512 matrices in fp32: what the cores can do."""
    matrix = torch.randn(512, 512)
    products, began = 0, process_time()
    while process_time() < began + seconds:
        matrix @ matrix
        products += 1
    return products * 2 * 512**3 / (process_time() - began)


def mean_lengths(turns):
    """Tokens of the prompts and of the answers of Turns."""
    return {"prompt": mean(len(turn.prompt.ids) for turn in turns),
            "answer": mean(len(turn.answer) for turn in turns)}


def print_machine(result):
    """The line with what a measurement was made on."""
    facts = [f"{name} {value}" for name, value in result["machine"].items()]
    print(f"\n{', '.join(facts)}\n")


def reset_peak(device):
    """Forget the peak of memory so far (on a CPU in Linux alone: elsewhere it only grows)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------- PPO, as rl.py does it
def text_weights(policy):
    """Weights of the text model's linear layers: those that each token of a text is multiplied
    with, less those of cross-attention."""
    text_model = policy.family.text_model
    crossing = getattr(text_model.config, "cross_attention_layers", ())
    total = 0
    for number, layer in enumerate(text_model.layers):
        for name, module in layer.named_modules():
            if number in crossing or "lora_" in name or not isinstance(module, torch.nn.Linear):
                continue
            total += module.in_features * module.out_features
    return total


def new_policy(cfg):
    """The bare base with a fresh LoRA and value head."""
    return Policy(cfg.model, cfg.lora, cfg.ppo.value_hidden, cfg.ppo.value_detach, cfg.run.seed)


def changed(section, **values):
    """A copy of a section of the configuration, with other values."""
    return SimpleNamespace(**{**vars(section), **values})


def running_optimizer(parameters, eps=1e-8):
    """AdamW with moments and gradients in place, as in a run under way; at learning rate 0."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, eps=eps, weight_decay=0.0)
    optimizer.step()
    return optimizer


class Iteration:
    """One rollout and one update of rl.py at a time; `ppo` is that section or a variant of it."""

    def __init__(self, policy, cfg):
        self.policy = policy
        self.cfg = cfg
        self.start = policy.snapshot() if cfg.ppo.kl_coef else None
        trained = [*policy.trainable.values(), *policy.value_head.parameters()]
        self.optimizer = running_optimizer(trained, cfg.ppo.adam_eps)
        self.sampler = torch.Generator(policy.device).manual_seed(cfg.run.seed)
        self.shuffler = torch.Generator().manual_seed(cfg.run.seed)

    def share(self, function, *arguments):
        """A rollout or update, on a CPU, and the share of the cores' matmul rate that it reached.

        Counted are the products of text tokens with weights, by their shapes: 2 FLOPs per weight
        to read a token, twice as many again to learn from it. Not counted: attention, the
        output layer, images, LoRA's own products.
        Returns: what the function returns, the share.
        """
        policy = self.policy
        tokens = dict(policy.tokens)
        rates = [matmul_rate()]
        began = process_time()
        result = function(*arguments)
        seconds = process_time() - began
        rates.append(matmul_rate())  # other programs come and go
        read = policy.tokens["inference"] - tokens["inference"]
        learned = policy.tokens["train"] - tokens["train"]
        flops = (2 * read + 6 * learned) * text_weights(policy)
        return result, flops / seconds / mean(rates)

    def env(self):
        return make_env(self.cfg.env, self.cfg.ppo.verify_iters)

    def play(self, envs, seeds):
        """Episodes of these seeds in `envs` environments side by side."""
        return Play([self.env() for _ in range(envs)], seeds)

    def rollout(self, play, ppo):
        """Returns: (Turns, their advantages, their returns), what `update` takes."""
        found = collect(self.policy, play, ppo.turns, ppo.temperature, self.sampler,
                        tqdm(disable=True))
        advantages, returns = rl.gae(found.rewards * ppo.reward_scale, found.values, found.dones,
                                     found.last_values, ppo.gamma, ppo.lam)  # (T, N)
        return found.turns, advantages.flatten(), returns.flatten()

    def update(self, batch, ppo):
        """All epochs over the batch of one rollout, the pass for the KL penalty included."""
        prepared = rl.prepare(self.policy, *batch, ppo, self.env().answer_key, self.start)
        rl.update(self.policy, self.optimizer, prepared, ppo, self.shuffler)
