"""What a card shows in its first hour. Ordered by worth, and safe to stop: give it again to go on.

    python tools/first_hour.py [--minutes 60] [--json results/first_hour.json] [--cpu]

tests        those that need CUDA, marked gpu
benchmark    memory and speed of configs/8gb, 16gb and 11b, as far as they are there, with random
             weights, under the cap of model.memory: one of each card, the others at the end
updates      SFT, then ten updates of PPO in bfloat16 and in float16: of the model of configs/8gb,
             if its weights are here, else of the mini

Each step is a process of its own, which ends with the time that is left; what it has found until
then is in the JSON and counts. A step that is done is not done again. --minutes 6, given twice, has
the tests, a benchmark and the updates of the mini. --cpu tries the script itself on the mini.
"""
import json
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import perf_counter

from measure import machine, write_json
import torch
import yaml
from huggingface_hub import try_to_load_from_cache

from lib.settings import ROOT, UserError, find_model, override, run_main

CARDS = ("8gb", "16gb", "11b")  # folders of configs/, the smallest first
TASKS = ("gp_vl", "gp_l", "virl_vl", "virl_l")
MINI = "configs/mini/gp_l.yaml"
OUTSIDE = 0.5  # GiB of a card that CUDA itself takes
LEAST = 20  # seconds that a step is worth beginning with
AVERAGED = ("seconds", "success", "kl_old", "ratio_gap", "sampler_gap", "ratio_noise", "grad_norm")


@dataclass
class Step:
    """commands: lists of arguments of python, one after the other; found: the JSON or the folder
    that they leave."""
    name: str
    commands: list
    found: Path = None


# ---------------------------------------------------------------- what there is to do
def steps_of(cpu, scratch):
    """All Steps in their order. scratch: folder of runs and JSONs."""
    tests = ["-m", "pytest", "-q", "-m", "gpu", "tests", *(["--collect-only"] if cpu else [])]
    benchmarks = [benchmark(path, cpu, scratch) for path in configurations(cpu)]
    first, rest = one_of_each_card(benchmarks)
    trained = [updates(dtype, cpu, scratch) for dtype in ("bfloat16", "float16")]
    return [Step("tests", [tests]), *first, *trained, *rest]


def configurations(cpu):
    """Paths of the configurations to measure, as far as they are there."""
    if cpu:
        return [MINI]
    paths = [f"configs/{card}/{task}.yaml" for task in TASKS for card in CARDS]
    return [path for path in paths if (ROOT / path).is_file()]


def one_of_each_card(benchmarks):
    """(the first benchmark of each card, the others)."""
    first, rest, seen = [], [], set()
    for step in benchmarks:
        card = step.name.split("/")[0]
        (rest if card in seen else first).append(step)
        seen.add(card)
    return first, rest


def benchmark(path, cpu, scratch):
    """Memory and speed of a configuration with random weights, on a card as small as it names."""
    name = "/".join(Path(path).with_suffix("").parts[-2:])
    found = scratch / f"benchmark_{name.replace('/', '_')}.json"
    memory = model_of(path)["memory"]
    sizes = ["--turns", "2", "--batches", "1,16,64", "--seconds", "100"]
    if cpu:
        sizes = ["--turns", "1", "--batches", "1", "--seconds", "100", "ppo.envs=4",
                 "sft.batch_size=4"]
    else:
        sizes.append("model.random_init=true")
    command = ["tools/benchmark_card.py", path, "--cap", str(memory - OUTSIDE), "--json",
               str(found), *sizes]
    return Step(f"{name} on {memory:g} GiB", [command], found)


def updates(dtype, cpu, scratch):
    """SFT and ten updates of PPO, as short as they may be, from a YAML of their own."""
    path = MINI if cpu else smallest_real_model()
    folder = scratch / f"{Path(path).parent.name}_{dtype}"
    steps = 2 if cpu else 40
    changes = {
        "run.dir": folder, "model.dtype": dtype, "sft.steps": steps, "sft.init_step": steps,
        "sft.warmup": 2, "ppo.init": f"sft/step_{steps}", "ppo.updates": 2 if cpu else 10,
        "ppo.turns": 1 if cpu else 4, "ppo.minibatch": 64, "ppo.value_warmup": 0,
        "ppo.temperature": 0.2}
    if path == MINI:
        changes["model.device"] = "cpu" if cpu else "cuda"
    if cpu:
        changes.update({"sft.batch_size": 4, "ppo.envs": 4})
    settings = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    for name, value in changes.items():
        override(settings, f"{name}={value}")
    scratch.mkdir(parents=True, exist_ok=True)
    written = folder.with_suffix(".yaml")
    written.write_text(yaml.safe_dump(settings), encoding="utf-8")
    scripts = [[script, str(written)] for script in ("sft.py", "rl.py")]
    return Step(f"updates in {dtype}", scripts, folder / "rl")


def model_of(path):
    """The section `model` of a configuration."""
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["model"]


def smallest_real_model():
    """The first configuration of the smallest card whose weights are here, else the mini's."""
    for path in configurations(cpu=False):
        name = model_of(path)["path"]
        here = Path(find_model(name)).is_dir() or try_to_load_from_cache(name, "config.json")
        if here and "8gb" in path:
            return path
    return MINI


# ---------------------------------------------------------------- doing it
def done(step, seconds):
    """Do a step within so many seconds. Returns: its record, `status` first."""
    began = perf_counter()
    status = "done"
    for command in step.commands:
        left = seconds - (perf_counter() - began)
        try:
            ended = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=max(1, left))
        except subprocess.TimeoutExpired:
            status = "out of time"
            break
        if ended.returncode not in (0, 5):  # 5: pytest found no test
            status = f"failed with exit code {ended.returncode}"
            break
    return {"status": status, "seconds": perf_counter() - began, **figures_of(step.found)}


def figures_of(found):
    """What a step left: a benchmark's JSON, or the mean of what updates logged."""
    if found is None:
        return {}
    if found.suffix == ".json":
        return {"figures": json.loads(found.read_text())} if found.exists() else {}
    log = found / "metrics.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    records = [json.loads(line) for line in lines]
    if not records:
        return {}
    means = {}
    for key in AVERAGED:
        values = [record[key] for record in records if record[key] is not None]
        means[key] = mean(values) if values else None
    skipped = sum(record["skipped"] for record in records)
    return {"updates": len(records), "skipped": skipped, "mean": means,
            "peak_memory_gib": records[-1]["peak_memory_gib"]}


def main(arguments):
    """Do what there is time for. arguments: of the command line, see above."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "first_hour.json")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here; --cpu tries this script itself on the mini")
    end = perf_counter() + 60 * options.minutes
    device = torch.device("cpu" if options.cpu else "cuda")
    results = {"machine": machine(device), "steps": {}}
    if options.json.exists():  # go on
        results["steps"] = json.loads(options.json.read_text())["steps"]
    scratch = options.json.absolute().with_suffix("")
    for step in steps_of(options.cpu, scratch):
        before = results["steps"].get(step.name, {})
        left = end - perf_counter()
        if before.get("status") == "done" or left < LEAST:
            continue
        print(f"\n== {step.name}, {left / 60:.1f} minutes left", flush=True)
        results["steps"][step.name] = done(step, left)
        write_json(options.json, results)
    for name, record in results["steps"].items():
        print(f"{name:28}{record['status']}, {record['seconds']:.0f} s")


if __name__ == "__main__":
    run_main(main)
