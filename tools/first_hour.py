"""What a card shows in its first hour. Ordered by worth, and safe to stop: give it again to go on.

    python tools/first_hour.py [--minutes 60] [--json results/first_hour.json] [--cpu]

tests        those that need CUDA, marked gpu, for half of the time at most
benchmark    memory and speed of configs/8gb, 16gb and 11b, as far as the card holds them, with
             random weights, under the cap of model.memory: one of each size, the others at the end
updates      SFT, then ten updates of PPO in bfloat16 and in float16: of the model of configs/8gb or
             configs/smollm2, whichever's weights are here, else of the mini

A card without bfloat16 does all in float16. Each step is a process of its own, which is stopped as
by Ctrl-C when time is over; what it has found until then is in the JSON and counts. A step that is
done is not done again; one that was stopped or failed comes after those that nobody has tried.
--minutes 6, given twice, has the tests, a benchmark and the updates of the mini. --cpu tries the
script itself on the mini.
"""
import json
import signal
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import NamedTuple
from xml.etree import ElementTree

from measure import machine, write_json
import torch
import yaml
from huggingface_hub import try_to_load_from_cache

from lib.errors import Terminated, UserError, run_main
from lib.settings import ROOT, find_model, override

CARDS = ("8gb", "16gb", "11b")  # folders of configs/, the smallest first
TASKS = ("gp_vl", "gp_l", "virl_vl", "virl_l")
SMOLLM2 = "configs/smollm2/gp_l.yaml"
MINI = "configs/mini/gp_l.yaml"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # of a model on the hub
OUTSIDE = 0.5  # GiB of a card that CUDA itself takes
LEAST = 20  # seconds that a step is worth beginning with
GRACE = 15  # seconds for a step to end when it is asked to
AVERAGED = ("seconds", "success", "kl_old", "ratio_gap", "sampler_gap", "ratio_noise", "grad_norm")


@dataclass
class Step:
    """commands: lists of arguments of python, one after the other; found: the JSON, the report of
    pytest (XML) or the folder that they leave; share: of the time left that it may take."""
    name: str
    commands: list
    found: Path
    share: float = 1.0


class Card(NamedTuple):
    """A GPU: its memory and which 16 bits it computes in."""
    gib: float
    dtypes: tuple


def this_card():
    """The GPU at hand. One without bfloat16 would emulate it, slowly."""
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    dtypes = ("bfloat16", "float16") if has_bfloat16 else ("float16",)
    return Card(torch.cuda.get_device_properties(0).total_memory / 2**30, dtypes)


# ---------------------------------------------------------------- what there is to do
def steps_of(card, scratch):
    """All Steps in their order. card: a Card, None for a CPU; scratch: folder of runs and JSONs."""
    report = scratch / "tests.xml"
    tests = ["-m", "pytest", "-q", "-m", "gpu", "tests", f"--junitxml={report}"]
    tests += ["--collect-only"] if card is None else []
    benchmarks = [benchmark(path, card, scratch) for path in configurations(card)]
    first, rest = one_of_each_card(benchmarks)
    dtypes = ("bfloat16", "float16") if card is None else card.dtypes
    trained = [updates(dtype, card is None, scratch) for dtype in dtypes]
    return [Step("tests", [tests], report, share=0.5), *first, *trained, *rest]


def configurations(card):
    """Paths of the configurations to measure, as far as they are there and the card holds them."""
    if card is None:
        return [MINI]
    paths = [f"configs/{size}/{task}.yaml" for task in TASKS for size in CARDS]
    paths = [path for path in paths if (ROOT / path).is_file()]
    return [path for path in paths if model_of(path)["memory"] - OUTSIDE <= card.gib]


def one_of_each_card(benchmarks):
    """(the first benchmark of each card, the others)."""
    first, rest, seen = [], [], set()
    for step in benchmarks:
        card = step.name.split("/")[0]
        (rest if card in seen else first).append(step)
        seen.add(card)
    return first, rest


def benchmark(path, card, scratch):
    """Memory and speed of a configuration with random weights, on a card as small as it names."""
    name = "/".join(Path(path).with_suffix("").parts[-2:])
    found = scratch / f"benchmark_{name.replace('/', '_')}.json"
    memory = model_of(path)["memory"]
    sizes = ["--turns", "2", "--batches", "1,16,64", "--seconds", "100"]
    if card is None:
        sizes = ["--turns", "1", "--batches", "1", "--seconds", "100", "ppo.envs=4",
                 "sft.batch_size=4"]
    else:
        sizes += ["model.random_init=true", f"model.dtype={card.dtypes[0]}"]
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
    """The first configuration of a small model whose weights are here, else the mini's."""
    small = [f"configs/8gb/{task}.yaml" for task in TASKS] + [SMOLLM2]
    for path in small:
        if (ROOT / path).is_file() and is_here(model_of(path)["path"]):
            return path
    return MINI


def is_here(name):
    """Whether the weights of a model are in a folder or in the hub's cache."""
    if Path(find_model(name)).is_dir():
        return True
    if name.startswith((".", "/", "~")):  # no hub's name
        return False
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in WEIGHTS)


# ---------------------------------------------------------------- doing it
def done(step, seconds):
    """Do a step within so many seconds. Returns: its status and how long it took."""
    began = perf_counter()
    status = "done"
    for command in step.commands:
        code = ended(command, seconds - (perf_counter() - began))
        if code is None:
            status = "out of time"
            break
        if code not in (0, 5):  # 5: pytest found no test
            status = f"failed with exit code {code}"
            break
    return {"status": status, "seconds": perf_counter() - began}


def ended(command, seconds):
    """The exit code of python with these arguments, None if its time was over.

    It is then asked to stop, as by Ctrl-C: sft.py and rl.py keep the step under way, pytest writes
    its report.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background jobs inherit
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    try:
        return process.wait(max(1, seconds - GRACE))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return None
    except Terminated:  # Ctrl-C would have reached it, too
        process.send_signal(signal.SIGINT)
        raise
    finally:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def figures_of(found):
    """What a step left: counts of tests, a benchmark's JSON, or the mean of what updates logged."""
    if found.suffix == ".xml":
        return tests_of(found) if found.exists() else {}
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


def tests_of(report):
    """{outcome: how many tests}, and the names of those that failed, of pytest's report."""
    outcomes = {"passed": 0, "failed": 0, "skipped": 0}
    names = []
    for test in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in test}
        if kinds & {"failure", "error"}:
            outcomes["failed"] += 1
            names.append(test.get("name"))
        else:
            outcomes["skipped" if "skipped" in kinds else "passed"] += 1
    return {**outcomes, "failures": names}


def earlier(path):
    """{step: record} of the JSON, if there is one. Raises: UserError."""
    try:
        return json.loads(path.read_text())["steps"] if path.exists() else {}
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"--json: {path} is not of this script; name another file") from None


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
    records = earlier(options.json)
    scratch = options.json.absolute().with_suffix("")
    steps = steps_of(None if options.cpu else this_card(), scratch)
    tries = {step.name: records.get(step.name, {}).get("tries", 0) for step in steps}
    for step in sorted(steps, key=lambda step: tries[step.name]):
        left = end - perf_counter()
        if records.get(step.name, {}).get("status") == "done" or left < LEAST:
            continue
        print(f"\n== {step.name}, {left / 60:.1f} minutes left", flush=True)
        record = {"status": "stopped"}
        try:
            record = done(step, step.share * left)
        finally:  # Ctrl-C, too, keeps what there is
            record |= {"tries": tries[step.name] + 1, **figures_of(step.found)}
            records[step.name] = record
            write_json(options.json, {"machine": machine(device), "steps": records})
    for name, record in records.items():
        print(f"{name:28}{record['status']}, {record.get('seconds', 0):.0f} s")


if __name__ == "__main__":
    run_main(main)
